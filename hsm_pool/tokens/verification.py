"""Verifies bearer tokens: JWTs (RFC 7519) of one configured issuer, as Entra ID makes them.

The algorithm is taken from a fixed list and must fit the issuer's key; nothing else of the
token's header is believed (RFC 8725).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import GuestProtocol
from joserfc.jws import JWSRegistry

from hsm_pool import limits
from hsm_pool.errors import Unauthenticated
from hsm_pool.settings import TokenSettings
from hsm_pool.tokens.issuer_keys import IssuerKey, IssuerKeys

ALGORITHMS = ("RS256", "ES256")
# What the header holds beside them is not looked at; RFC 7515 tells to ignore it.
_REGISTRY = JWSRegistry(algorithms=list(ALGORITHMS), strict_check_header=False)
_GUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, slots=True)
class Bearer:
    """Who presented a token: his object id (or the application's id) first, then his groups, as GUIDs."""

    principals: tuple[str, ...]
    expires_at: float
    """Unix seconds, the allowed difference of clocks included."""


class TokenVerifier:
    """Verifies the tokens of one issuer. Thread-safe.

    Args:
        settings: Issuer and audience.
        keys: The issuer's keys.
        now: Unix seconds.
    """

    def __init__(
        self, settings: TokenSettings, keys: IssuerKeys, now: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._now = now

    def verify(self, token: str) -> Bearer:
        """Return who presents a token.

        Raises:
            Unauthenticated: It is not acceptable.
        """
        claims = verified_claims(token, self._keys, self._settings.issuer, self._now())
        audience = claims.get("aud")
        if self._settings.audience not in (audience if isinstance(audience, list) else [audience]):
            raise Unauthenticated("the token is for another audience")
        subject = claims.get("oid", claims.get("appid"))
        groups = claims.get("groups", [])
        if not isinstance(groups, list) or len(groups) > limits.TOKEN_GROUPS_MAX:
            raise Unauthenticated("the token's groups are malformed or too many")
        principals = [subject, *groups]
        if not all(isinstance(entry, str) and _GUID.fullmatch(entry) for entry in principals):
            raise Unauthenticated("the token names its bearer or a group by no GUID")
        expires_at = float(claims["exp"]) + limits.TOKEN_SKEW_SECONDS
        return Bearer(tuple(entry.lower() for entry in principals), expires_at)


def verified_claims(token: str, keys: IssuerKeys, issuer: str, now: float) -> dict[str, Any]:
    """Return what an issuer says in a token that it signed and that is valid now.

    Args:
        token: JWS compact serialization.
        keys: The issuer's keys.
        issuer: What ``iss`` must be.
        now: Unix seconds.

    Raises:
        Unauthenticated: It is not acceptable.
    """
    if len(token) > limits.TOKEN_BYTES_MAX:
        raise Unauthenticated("the token is too large")

    def find(guest: GuestProtocol) -> IssuerKey:
        key_id = guest.headers().get("kid")
        if not isinstance(key_id, str):
            raise Unauthenticated("the token names no key")
        return keys.find(key_id)

    try:
        decoded = jwt.decode(token, find, registry=_REGISTRY)
    except Unauthenticated:
        raise
    except (JoseError, ValueError, TypeError, KeyError, RecursionError):
        raise Unauthenticated("the token is not one of the configured issuer") from None
    if "crit" in decoded.header:
        raise Unauthenticated("the token demands an extension that is not known")
    claims, skew = decoded.claims, limits.TOKEN_SKEW_SECONDS
    if claims.get("iss") != issuer:
        raise Unauthenticated("the token is of another issuer")
    expires = _seconds(claims, "exp")
    if expires is None or expires + skew <= now:
        raise Unauthenticated("the token has expired, or never would")
    for name in ("nbf", "iat"):
        begins = _seconds(claims, name)
        if begins is not None and begins - skew > now:
            raise Unauthenticated("the token is not valid yet")
    return claims


def _seconds(claims: dict[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unauthenticated(f"the token's {name} is no time")
    return float(value)
