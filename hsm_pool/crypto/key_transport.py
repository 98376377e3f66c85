"""Keys that leave or enter a pool encrypted to an RSA key: CKM_RSA_AES_KEY_WRAP and its relatives.

PKCS #11 v3.0, 2.1.21: a one-time AES key under RSAES-OAEP, then the key under AES key wrap with
padding (RFC 5649) with that AES key. Azure Key Vault names the forms with other hashes.
"""

from __future__ import annotations

import os

from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import AlgorithmNotSupported, DecryptionFailed

CKM_RSA_AES_KEY_WRAP = "CKM_RSA_AES_KEY_WRAP"
_HASHES: dict[str, hashes.HashAlgorithm] = {
    CKM_RSA_AES_KEY_WRAP: hashes.SHA1(),  # noqa: S303 - as PKCS #11 and Azure have it
    "RSA_AES_KEY_WRAP_256": hashes.SHA256(),
    "RSA_AES_KEY_WRAP_384": hashes.SHA384(),
}
ENCRYPTION_ALGORITHMS = tuple(_HASHES)
"""What a released key can be encrypted with."""

_AES_KEY_BYTES = 32


def check_encryption_algorithm(name: str) -> None:
    """Check the name of an encryption algorithm.

    Raises:
        AlgorithmNotSupported: There is none of that name.
    """
    if name not in _HASHES:
        raise AlgorithmNotSupported(
            f"a key is released with {', '.join(_HASHES)}", field="encryption_algorithm"
        )


def wrap(algorithm: str, target: rsa.RSAPublicKey, material: SecretBytes) -> bytes:
    """Return key material (PKCS#8 or octets) encrypted to an RSA key; begins with as much as its modulus."""
    one_time = os.urandom(_AES_KEY_BYTES)
    to_target = target.encrypt(one_time, _padding(algorithm))
    return to_target + keywrap.aes_key_wrap_with_padding(one_time, material.reveal())


def unwrap(private: rsa.RSAPrivateKey, wrapped: bytes) -> SecretBytes:
    """Return key material that was wrapped to an RSA key with CKM_RSA_AES_KEY_WRAP.

    Raises:
        DecryptionFailed: It does not unwrap, whatever the cause.
    """
    size = private.key_size // 8
    try:
        one_time = private.decrypt(wrapped[:size], _padding(CKM_RSA_AES_KEY_WRAP))
        return SecretBytes(keywrap.aes_key_unwrap_with_padding(one_time, wrapped[size:]))
    except (keywrap.InvalidUnwrap, ValueError):
        raise DecryptionFailed from None


def _padding(algorithm: str) -> padding.OAEP:
    return padding.OAEP(padding.MGF1(_HASHES[algorithm]), _HASHES[algorithm], None)
