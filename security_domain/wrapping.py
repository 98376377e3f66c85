"""JWE to officers, the one-time wrapping key, and what is derived from the SD root."""

from __future__ import annotations

import os
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from joserfc import jwe
from joserfc.errors import JoseError
from joserfc.jwk import RSAKey

from security_domain.encoding import bind
from security_domain.errors import InvalidFile, InvalidShare
from security_domain.secret import Secret

ALGORITHMS = ["RSA-OAEP-256", "A256GCM"]
"""The only JWE algorithms that are ever accepted (RFC 7518)."""

SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
"""HPKE suite (RFC 9180)."""

JWE_CHARACTERS_MAX = 4096


class _Registry(jwe.JWERegistry):
    """Its default bound is too small for a key encrypted to RSA of more than 6144 bits."""

    max_encrypted_key_length = 1366


_REGISTRY = _Registry(algorithms=ALGORITHMS)
_NONCE_BYTES = 12


class OneTimeKey:
    """A random AES-256-GCM key that seals exactly once, so that a fixed nonce rule is never needed."""

    def __init__(self) -> None:
        self.key = Secret(os.urandom(32))
        self._used = False

    def seal(self, plaintext: bytes, additional_data: bytes) -> bytes:
        """Seal the payload: nonce || ciphertext || tag.

        Raises:
            RuntimeError: It was used before.
        """
        if self._used:
            raise RuntimeError("a one-time wrapping key seals once")
        self._used = True
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + AESGCM(self.key.reveal()).encrypt(nonce, plaintext, additional_data)


def open_payload(key: Secret, sealed: bytes, additional_data: bytes) -> bytes:
    """Open what a one-time key sealed.

    Raises:
        InvalidFile: The file was changed, or the key is another one.
    """
    try:
        return AESGCM(key.reveal()).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], additional_data)
    except (InvalidTag, ValueError):
        raise InvalidFile("the payload does not open: the file was changed") from None


def wrap_to_officer(public_key: rsa.RSAPublicKey, thumbprint: str, plaintext: bytes) -> str:
    """Return a compact JWE (RFC 7516) to an officer's RSA key."""
    header = _jwe_header(thumbprint)
    return jwe.encrypt_compact(header, plaintext, RSAKey.import_key(public_key), registry=_REGISTRY)


def unwrap_by_officer(private_key: rsa.RSAPrivateKey, thumbprint: str, token: str) -> bytes:
    """Open a compact JWE with an officer's RSA key.

    Raises:
        InvalidShare: It is not for this key, or was changed.
    """
    if len(token) > JWE_CHARACTERS_MAX:
        raise InvalidShare("a wrapped share is too large")
    try:
        opened = jwe.decrypt_compact(token, RSAKey.import_key(private_key), registry=_REGISTRY)
    except (JoseError, ValueError):
        raise InvalidShare("the wrapped share does not open with this key") from None
    if opened.headers() != _jwe_header(thumbprint) or opened.plaintext is None:
        raise InvalidShare("the wrapped share is another officer's")
    return opened.plaintext


def _jwe_header(thumbprint: str) -> dict[str, Any]:
    return {"alg": "RSA-OAEP-256", "enc": "A256GCM", "kid": thumbprint}


class DerivedKeys:
    """What follows from the SD root by HKDF-SHA256 (RFC 5869)."""

    def __init__(self, root: Secret, pool_id: str, generation: int) -> None:
        def derive(label: str, length: int = 32) -> bytes:
            info = bind(f"mhsm-sd/{label}/v1", pool_id, generation)
            return HKDF(hashes.SHA256(), length, salt=pool_id.encode(), info=info).derive(root.reveal())

        self.recovery = X25519PrivateKey.from_private_bytes(derive("recovery"))
        self.backup = X25519PrivateKey.from_private_bytes(derive("backup"))
        self.check_value = derive("check-value", 16)


def raw_public(key: X25519PublicKey) -> bytes:
    """Return the 32 bytes of a public key."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
