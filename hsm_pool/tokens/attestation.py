"""Verifies environment attestation: JWTs in which an authority says what runs somewhere.

The token of Azure's secure key release: besides the claims it holds a key of the environment in
``x-ms-runtime.keys``, to which a released key is encrypted. Only authorities that are configured
count, whatever a release policy names: nothing is fetched that a token or a policy points to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc import jws
from joserfc.errors import JoseError

from hsm_pool import limits
from hsm_pool.errors import KeyReleaseRefused, Unauthenticated
from hsm_pool.settings import AttestationAuthority
from hsm_pool.tokens.issuer_keys import IssuerKeys
from hsm_pool.tokens.verification import verified_claims
from security_domain.encoding import decode
from security_domain.errors import InvalidFile

_REFUSED = (
    *(Unauthenticated, JoseError, InvalidFile),
    *(ValueError, TypeError, KeyError, AttributeError, RecursionError),
)
_RSA_BITS = range(2048, 4096 + 1)
_EXPONENT_MAX = 2**32


@dataclass(frozen=True, slots=True)
class Target:
    """An environment: who vouches for it, what he says, and its key."""

    authority: str
    claims: Mapping[str, Any]
    key_id: str
    public_key: rsa.RSAPublicKey


class AttestationVerifier:
    """Verifies tokens of the configured authorities. Thread-safe.

    Args:
        authorities: Who is believed.
        now: Unix seconds.
    """

    def __init__(
        self, authorities: Sequence[AttestationAuthority], now: Callable[[], float] = time.time
    ) -> None:
        self._keys = {entry.issuer: IssuerKeys(entry.keys, entry.keys_ca_file) for entry in authorities}
        self._now = now

    def verify(self, token: str) -> Target:
        """Return the environment that a token is about.

        Raises:
            KeyReleaseRefused: It is not acceptable, whatever the cause.
        """
        try:
            issuer = _claimed_issuer(token)
            claims = verified_claims(token, self._keys[issuer], issuer, self._now())
            key_id, public_key = _encryption_key(claims)
        except _REFUSED:
            raise KeyReleaseRefused from None
        return Target(issuer, claims, key_id, public_key)


def _claimed_issuer(token: str) -> str:
    """Return who a token says that it is of: not verified, it only tells which keys to try."""
    if len(token) > limits.TOKEN_BYTES_MAX:
        raise ValueError
    issuer = json.loads(jws.extract_compact(token.encode()).payload)["iss"]
    if not isinstance(issuer, str):
        raise TypeError
    return issuer


def _encryption_key(claims: Mapping[str, Any]) -> tuple[str, rsa.RSAPublicKey]:
    """Return id and key of the first RSA key that is there to encrypt to."""
    for entry in claims["x-ms-runtime"]["keys"]:
        uses = {entry.get("use"), entry.get("key_use")}
        if entry.get("kty") != "RSA" or not ("enc" in uses or "encrypt" in entry.get("key_ops", [])):
            continue
        octets, key_id = decode(entry["n"]), entry.get("kid", "")
        if len(octets) > _RSA_BITS[-1] // 8 or not isinstance(key_id, str):
            raise ValueError
        exponent, modulus = int.from_bytes(decode(entry["e"]), "big"), int.from_bytes(octets, "big")
        if modulus.bit_length() not in _RSA_BITS or exponent >= _EXPONENT_MAX:
            raise ValueError
        return key_id, rsa.RSAPublicNumbers(exponent, modulus).public_key()
    raise KeyError("x-ms-runtime.keys")
