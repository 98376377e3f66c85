"""The attestation authority of the development profile: says of an environment what it is told to.

It stands for Microsoft Azure Attestation and vouches for nothing. It is a part of the development
profile's token issuer, with a key and an issuer name of its own: none of its tokens is a bearer
token, and no bearer token is one of its. A pool without the development profile has none.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey

from hsm_pool import limits

ISSUER_PATH = "/attestation"
"""Behind the token issuer's URL: the authority's own name."""

KEYS_PATH = ISSUER_PATH + "/keys"
TOKEN_PATH = ISSUER_PATH + "/token"
_KEYS_MAX = 8


class AttestationAuthority:
    """Signs attestations with a key of this process.

    Args:
        issuer: What ``iss`` says.
    """

    def __init__(self, issuer: str) -> None:
        self._issuer = issuer
        self._key = ECKey.generate_key("P-256", {"kid": uuid.uuid4().hex, "use": "sig", "alg": "ES256"})

    def key_set(self) -> dict[str, Any]:
        """Return the public key set."""
        return {"keys": [self._key.as_dict(private=False)]}

    def token(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return an attestation of {"claims": {...}, "keys": [JWK, ...]}.

        Raises:
            ValueError: The request is of another form.
        """
        claims, keys = request.get("claims"), request.get("keys")
        if not isinstance(claims, dict) or not isinstance(keys, list) or len(keys) > _KEYS_MAX:
            raise ValueError("claims and keys are needed")
        now = int(time.time())
        expires = now + limits.DEVELOPMENT_TOKEN_SECONDS
        said = {
            **claims,
            "iss": self._issuer,
            "iat": now,
            "nbf": now,
            "exp": expires,
            "x-ms-runtime": {"keys": keys},
        }
        header = {"alg": "ES256", "kid": self._key.kid, "typ": "JWT"}
        return {
            "attestation_token": jwt.encode(header, said, self._key, algorithms=["ES256"]),
            "exp": expires,
        }
