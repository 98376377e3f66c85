"""Asks the development profile's issuer for a token."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from hsm_pool.client.connection import Connection

_SECONDS = 5.0
_BYTES_MAX = 64 * 1024


class NoIssuer(Exception):
    """This pool has no issuer of its own, or it does not answer."""


def development_token(connection: Connection, name: str, groups: Sequence[str] = ()) -> dict[str, Any]:
    """Return {"access_token", "oid", "groups", "exp"} of a new token.

    Raises:
        NoIssuer: There is none, it does not answer, or it refuses the names.
    """
    if connection.token_issuer is None:
        raise NoIssuer("this pool has no token issuer of its own")
    administrator = connection.clients["administrator"]
    context = ssl.create_default_context(cafile=connection.client_ca_file)
    context.load_cert_chain(administrator.certificate_file, administrator.key_file)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    body = json.dumps({"name": name, "groups": list(groups)}).encode()
    request = urllib.request.Request(f"{connection.token_issuer['issuer']}/token", body)  # noqa: S310
    try:
        with opener.open(request, timeout=_SECONDS) as response:
            token: dict[str, Any] = json.loads(response.read(_BYTES_MAX))
    except urllib.error.HTTPError as error:
        raise NoIssuer(f"the token issuer refused this (HTTP {error.code})") from None
    except (OSError, ValueError):
        raise NoIssuer("the token issuer does not answer") from None
    return token
