"""JSON Web Keys as key material (RFC 7517, 7518; Azure's kty and crv)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc.jwk import ECKey, OctKey, RSAKey

from hsm_pool.client import jwk
from hsm_pool.errors import InvalidField

CURVES = {"P-256": "P-256", "P-384": "P-384", "P-521": "P-521", "P-256K": "secp256k1"}


def fields(key: Any, **changes: Any) -> dict[str, Any]:
    return {**key.as_dict(private=True), **changes}


@pytest.mark.parametrize("suffix", ["", "-HSM"])
@pytest.mark.parametrize("curve", CURVES)
def test_an_elliptic_curve_key_is_the_same_key(curve: str, suffix: str) -> None:
    made = ECKey.generate_key(CURVES[curve])
    found = jwk.material(fields(made, kty=f"EC{suffix}", crv=curve, kid="ignored", key_ops=["sign"]))
    loaded = serialization.load_der_private_key(found["pkcs8_der"], None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert made.private_key
    assert loaded.private_numbers() == made.private_key.private_numbers()


@pytest.mark.parametrize("kind", ["RSA", "RSA-HSM"])
def test_an_rsa_key_is_the_same_key(kind: str) -> None:
    made = RSAKey.generate_key(2048)
    found = jwk.material(json.dumps(fields(made, kty=kind)).encode())
    loaded = serialization.load_der_private_key(found["pkcs8_der"], None)
    assert isinstance(loaded, rsa.RSAPrivateKey)
    assert made.private_key
    assert loaded.private_numbers() == made.private_key.private_numbers()


@pytest.mark.parametrize("kind", ["oct", "oct-HSM"])
def test_octets_are_the_same_octets(kind: str) -> None:
    made = OctKey.generate_key(256)
    assert jwk.material(fields(made, kty=kind)) == {"octets": made.raw_value}


JUNK: list[Any] = [
    *(b"", b"{}", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"kty": "EC"}', b'{"kty": 1, "k": 2}'),
    {"kty": "oct"},
    {"kty": "oct", "k": 5},
    {"kty": "OKP", "crv": "Ed25519", "x": "AA", "d": "AA"},
    ECKey.generate_key("P-256").as_dict(private=False),
    RSAKey.generate_key(2048).as_dict(private=False),
    fields(ECKey.generate_key("P-256"), x="AA"),
    fields(ECKey.generate_key("P-256"), crv="P-999"),
    fields(RSAKey.generate_key(2048), n="AA"),
]
"""Some of it is made anew each time, so numbers are its names."""


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_anything_else_is_refused_without_a_word_of_it(junk: Any) -> None:
    """G3, G8: one typed error, whatever is wrong."""
    with pytest.raises(InvalidField) as refused:
        jwk.material(junk)
    assert "JWK" in refused.value.message
    assert refused.value.__cause__ is None
