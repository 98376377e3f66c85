"""Asks the development profile's issuer for a token, or its authority for an attestation."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
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
    return _post(connection, "/token", {"name": name, "groups": list(groups)})


def development_authority(connection: Connection) -> str:
    """Return the name by which release policies know the development profile's attestation authority.

    Raises:
        NoIssuer: There is none.
    """
    if connection.token_issuer is None:
        raise NoIssuer("this pool has no token issuer and no attestation authority of its own")
    return f"{connection.token_issuer['issuer']}/attestation"


def development_attestation(
    connection: Connection, claims: Mapping[str, Any], keys: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return {"attestation_token", "exp"} for an environment with these claims and public keys (JWK).

    Raises:
        NoIssuer: As above, or the request is too large.
    """
    request = {"claims": dict(claims), "keys": [dict(key) for key in keys]}
    return _post(connection, "/attestation/token", request)


def _post(connection: Connection, path: str, content: dict[str, Any]) -> dict[str, Any]:
    if connection.token_issuer is None:
        raise NoIssuer("this pool has no token issuer and no attestation authority of its own")
    administrator = connection.clients["administrator"]
    context = ssl.create_default_context(cafile=connection.client_ca_file)
    context.load_cert_chain(administrator.certificate_file, administrator.key_file)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    url = connection.token_issuer["issuer"] + path
    request = urllib.request.Request(url, json.dumps(content).encode())  # noqa: S310
    try:
        with opener.open(request, timeout=_SECONDS) as response:
            answer: dict[str, Any] = json.loads(response.read(_BYTES_MAX))
    except urllib.error.HTTPError as error:
        raise NoIssuer(f"the token issuer refused this (HTTP {error.code})") from None
    except (OSError, ValueError):
        raise NoIssuer("the token issuer does not answer") from None
    return answer
