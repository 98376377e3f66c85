"""JSON Web Keys (RFC 7517, 7518) as key material: the form in which Azure's clients import keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OctKey, RSAKey

from hsm_pool.errors import InvalidField

_KINDS: Mapping[str, type[RSAKey | ECKey | OctKey]] = {"RSA": RSAKey, "EC": ECKey, "oct": OctKey}
_MATERIAL = ("n", "e", "d", "p", "q", "dp", "dq", "qi", "crv", "x", "y", "k")


def material(jwk: Mapping[str, Any] | bytes) -> dict[str, bytes]:
    """Return the material of a private or symmetric key, as import_key takes it.

    ``kty`` may be Azure's (RSA-HSM, EC-HSM, oct-HSM), and ``crv`` P-256K stands for secp256k1. What says
    how a key may be used (``key_ops``, ``alg``, ``kid``) is left to the arguments of the import.

    Args:
        jwk: The JSON object, or its octets.

    Raises:
        InvalidField: It is no such key.
    """
    try:
        fields = json.loads(jwk) if isinstance(jwk, bytes) else jwk
        kind = str(fields["kty"]).removesuffix("-HSM")
        given = {name: fields[name] for name in _MATERIAL if name in fields}
        if given.get("crv") == "P-256K":
            given["crv"] = "secp256k1"
        key = _KINDS[kind].import_key({"kty": kind, **given})
        if isinstance(key, OctKey):
            return {"octets": key.raw_value}
        if not key.is_private:
            raise ValueError("a public key")
        return {"pkcs8_der": key.as_der(private=True)}
    except (JoseError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidField(
            "the JWK is no private key or octets that can be imported", field="material"
        ) from None
