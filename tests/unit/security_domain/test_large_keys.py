"""An officer whose key was accepted can open what was encrypted to it (G4)."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import rsa

from security_domain.azure import tokens
from security_domain.secret import Secret
from security_domain.wrapping import unwrap_by_officer, wrap_to_officer


def test_shares_to_keys_of_more_than_6144_bits_open() -> None:
    """The JWE library's own bound ends at 6144 bits; officers may have keys of up to 8192."""
    key = rsa.generate_private_key(65537, 6400)
    token = wrap_to_officer(key.public_key(), "thumbprint", b"a share")
    assert unwrap_by_officer(key, "thumbprint", token) == b"a share"
    wrapped = tokens.wrap(key.public_key(), Secret(b"a share"), "any")
    assert tokens.unwrap(key, wrapped).reveal() == b"a share"
