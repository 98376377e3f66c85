"""The public keys of a token issuer (JWKS, RFC 7517), fetched when they are needed.

An unknown key id is the sign of a rotation: the keys are fetched again, but never more often
than every few seconds, whatever callers send. Keys that cannot be renewed for too long are
not trusted any more.
"""

from __future__ import annotations

import json
import ssl
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey

from hsm_pool import limits
from hsm_pool.errors import Unauthenticated
from hsm_pool.store.replica import boot_time
from security_domain.encoding import decode
from security_domain.errors import InvalidFile

IssuerKey = RSAKey | ECKey
_RSA_BITS_MIN = 2048


class KeysUnavailable(Exception):
    """The issuer's keys cannot be had."""


class IssuerKeys:
    """The keys of one issuer, by key id. Thread-safe.

    Args:
        source: Path of a file, or an https URL on loopback.
        ca_file: Authority of the URL's certificate, PEM; "" for a file.
        clock: Seconds that never run backwards.
    """

    def __init__(self, source: str, ca_file: str, clock: Callable[[], float] = boot_time) -> None:
        self._source = source
        self._ca_file = ca_file
        self._clock = clock
        self._keys: dict[str, IssuerKey] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._lock = threading.Lock()

    def find(self, key_id: str) -> IssuerKey:
        """Return the key of an id.

        Raises:
            Unauthenticated: The issuer has no such key, or its keys cannot be had.
        """
        age = self._clock() - self._fetched_at
        if key_id not in self._keys or age > limits.TOKEN_KEYS_RENEWAL_SECONDS:
            self._renew()
        key = self._keys.get(key_id)
        if key is None or self._clock() - self._fetched_at > limits.TOKEN_KEYS_SECONDS_MAX:
            raise Unauthenticated("the token is signed by no key of its issuer")
        return key

    def _renew(self) -> None:
        """Fetch the keys, unless that was tried a moment ago; on failure the old ones stay."""
        with self._lock:
            if self._clock() - self._tried_at < limits.TOKEN_KEYS_PAUSE_SECONDS:
                return
            self._tried_at = self._clock()
            try:
                self._keys = _parse(self._read())
                self._fetched_at = self._clock()
            except KeysUnavailable:
                return

    def _read(self) -> bytes:
        try:
            if self._source.startswith("https://"):
                return self._fetch()
            with Path(self._source).open("rb") as stream:
                return stream.read(limits.TOKEN_KEYS_BYTES_MAX + 1)
        except (OSError, ValueError):  # urllib's errors and ssl's are OSErrors
            raise KeysUnavailable from None

    def _fetch(self) -> bytes:
        context = ssl.create_default_context(cafile=self._ca_file)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context), _NoRedirect()
        )
        with opener.open(self._source, timeout=limits.TOKEN_KEYS_FETCH_SECONDS) as response:
            content: bytes = response.read(limits.TOKEN_KEYS_BYTES_MAX + 1)
        return content


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An issuer that sends its callers elsewhere is not the one that was configured."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""


def _parse(content: bytes) -> dict[str, IssuerKey]:
    """Return the keys that can sign tokens here; others are left out."""
    if len(content) > limits.TOKEN_KEYS_BYTES_MAX:
        raise KeysUnavailable
    try:
        entries = json.loads(content)["keys"]
        if not isinstance(entries, list) or len(entries) > limits.TOKEN_KEYS_MAX:
            raise KeysUnavailable
        found = [(entry["kid"], _key(entry)) for entry in entries if isinstance(entry.get("kid"), str)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise KeysUnavailable from None
    return {key_id: key for key_id, key in found if key is not None}


def _key(entry: dict[str, Any]) -> IssuerKey | None:
    if entry.get("use", "sig") != "sig":
        return None
    public: dict[str, Any] = {
        name: entry[name] for name in ("kty", "n", "e", "crv", "x", "y") if name in entry
    }
    try:
        if public.get("kty") == "RSA":
            # Before it is imported: the library only warns of a short key.
            if len(decode(public["n"])) * 8 < _RSA_BITS_MIN:
                return None
            return RSAKey.import_key(public)
        if (public.get("kty"), public.get("crv")) == ("EC", "P-256"):
            return ECKey.import_key(public)
    except (JoseError, InvalidFile, ValueError, TypeError, KeyError):
        return None
    return None
