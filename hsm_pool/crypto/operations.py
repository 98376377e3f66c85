"""What keys do: pure functions of a parsed key, a row of the algorithm table and octets."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature as LibraryInvalidSignature
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, utils

from hsm_pool import limits
from hsm_pool.crypto.algorithms import Algorithm, Scheme
from hsm_pool.crypto.loaded_keys import ECKey, LoadedKey, OctKey, RSAKey
from hsm_pool.errors import (
    AlgorithmNotSupported,
    DecryptionFailed,
    DigestLength,
    InvalidField,
    PayloadTooLarge,
)

GCM_NONCE_BYTES = 12
GCM_TAG_BYTES = 16


class InvalidSignature(Exception):
    """The signature is not one of this key over this digest."""


@dataclass(frozen=True, slots=True)
class EncryptedData:
    """A ciphertext; nonce and tag are empty for RSA."""

    ciphertext: bytes
    initialization_vector: bytes = b""
    authentication_tag: bytes = b""


def sign(key: LoadedKey, algorithm: Algorithm, digest: bytes) -> bytes:
    """Sign a digest. ECDSA signatures are r || s, each as long as the field (IEEE P1363).

    Raises:
        DigestLength: The digest is not as long as the algorithm's hash.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    prehashed = utils.Prehashed(_checked_hash(algorithm, digest))
    if algorithm.scheme is Scheme.ECDSA and isinstance(key, ECKey):
        r, s = utils.decode_dss_signature(key.private.sign(digest, ec.ECDSA(prehashed)))
        width = (key.private.key_size + 7) // 8
        return r.to_bytes(width, "big") + s.to_bytes(width, "big")
    if algorithm.scheme in {Scheme.RSA_PKCS1V15, Scheme.RSA_PSS} and isinstance(key, RSAKey):
        return key.private.sign(digest, _signature_padding(algorithm), prehashed)
    raise _unfit(algorithm)


def verify(key: LoadedKey, algorithm: Algorithm, digest: bytes, signature: bytes) -> None:
    """Verify a signature over a digest.

    Raises:
        InvalidSignature: It does not verify, whatever the cause.
        DigestLength: The digest is not as long as the algorithm's hash.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    prehashed = utils.Prehashed(_checked_hash(algorithm, digest))
    try:
        if algorithm.scheme is Scheme.ECDSA and isinstance(key, ECKey):
            width = (key.public.key_size + 7) // 8
            if len(signature) != 2 * width:
                raise InvalidSignature
            r = int.from_bytes(signature[:width], "big")
            s = int.from_bytes(signature[width:], "big")
            key.public.verify(utils.encode_dss_signature(r, s), digest, ec.ECDSA(prehashed))
        elif algorithm.scheme in {Scheme.RSA_PKCS1V15, Scheme.RSA_PSS} and isinstance(key, RSAKey):
            key.public.verify(signature, digest, _signature_padding(algorithm), prehashed)
        else:
            raise _unfit(algorithm)
    except (LibraryInvalidSignature, ValueError):
        raise InvalidSignature from None


def encrypt(
    key: LoadedKey, algorithm: Algorithm, plaintext: bytes, additional_data: bytes = b""
) -> EncryptedData:
    """Encrypt; the nonce of GCM is made here.

    Raises:
        PayloadTooLarge: More than fits.
        InvalidField: Additional data with RSA.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    _check_payload(plaintext, additional_data)
    if algorithm.scheme is Scheme.RSA_OAEP and isinstance(key, RSAKey):
        _check_no_additional_data(additional_data)
        return EncryptedData(_oaep_encrypt(key, algorithm, plaintext))
    if algorithm.scheme is Scheme.AES_GCM and isinstance(key, OctKey):
        nonce = os.urandom(GCM_NONCE_BYTES)
        sealed = key.gcm.encrypt(nonce, plaintext, additional_data)
        return EncryptedData(sealed[:-GCM_TAG_BYTES], nonce, sealed[-GCM_TAG_BYTES:])
    raise _unfit(algorithm)


def decrypt(key: LoadedKey, algorithm: Algorithm, data: EncryptedData, additional_data: bytes = b"") -> bytes:
    """Decrypt.

    Raises:
        DecryptionFailed: It does not decrypt, whatever the cause.
        PayloadTooLarge: More than a ciphertext can have.
        InvalidField: Additional data with RSA.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    _check_payload(data.ciphertext, additional_data)
    try:
        if algorithm.scheme is Scheme.RSA_OAEP and isinstance(key, RSAKey):
            _check_no_additional_data(additional_data)
            return _oaep_decrypt(key, algorithm, data.ciphertext)
        if algorithm.scheme is Scheme.AES_GCM and isinstance(key, OctKey):
            nonce, tag = data.initialization_vector, data.authentication_tag
            if len(nonce) != GCM_NONCE_BYTES or len(tag) != GCM_TAG_BYTES:
                raise DecryptionFailed
            return key.gcm.decrypt(nonce, data.ciphertext + tag, additional_data)
    except (InvalidTag, ValueError):
        raise DecryptionFailed from None
    raise _unfit(algorithm)


def wrap_key(key: LoadedKey, algorithm: Algorithm, target: bytes) -> bytes:
    """Wrap a key.

    Raises:
        PayloadTooLarge: More than fits.
        InvalidField: AES-KW takes 16 octets or more, in blocks of 8.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    if algorithm.scheme is Scheme.RSA_OAEP and isinstance(key, RSAKey):
        return _oaep_encrypt(key, algorithm, target)
    if algorithm.scheme is Scheme.AES_KW and isinstance(key, OctKey):
        if len(target) > limits.WRAPPED_KEY_BYTES_MAX:
            raise PayloadTooLarge(f"a key to wrap has at most {limits.WRAPPED_KEY_BYTES_MAX} bytes")
        if len(target) < 16 or len(target) % 8:
            raise InvalidField("a key to wrap has 16 bytes or more, a multiple of 8", field="keys")
        return keywrap.aes_key_wrap(key.raw.reveal(), target)
    raise _unfit(algorithm)


def unwrap_key(key: LoadedKey, algorithm: Algorithm, wrapped: bytes) -> bytes:
    """Unwrap a key.

    Raises:
        DecryptionFailed: It does not unwrap, whatever the cause.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    try:
        if algorithm.scheme is Scheme.RSA_OAEP and isinstance(key, RSAKey):
            return _oaep_decrypt(key, algorithm, wrapped)
        if algorithm.scheme is Scheme.AES_KW and isinstance(key, OctKey):
            if len(wrapped) > limits.WRAPPED_KEY_BYTES_MAX + 8:
                raise DecryptionFailed
            return keywrap.aes_key_unwrap(key.raw.reveal(), wrapped)
    except (keywrap.InvalidUnwrap, ValueError):
        raise DecryptionFailed from None
    raise _unfit(algorithm)


def _signature_padding(algorithm: Algorithm) -> padding.PKCS1v15 | padding.PSS:
    if algorithm.scheme is Scheme.RSA_PKCS1V15:
        return padding.PKCS1v15()
    assert algorithm.hash
    return padding.PSS(padding.MGF1(algorithm.hash), algorithm.digest_bytes)


def _oaep(algorithm: Algorithm) -> padding.OAEP:
    assert algorithm.hash
    return padding.OAEP(padding.MGF1(algorithm.hash), algorithm.hash, None)


def _oaep_encrypt(key: RSAKey, algorithm: Algorithm, plaintext: bytes) -> bytes:
    allowed = key.public.key_size // 8 - 2 * algorithm.digest_bytes - 2
    if len(plaintext) > allowed:
        raise PayloadTooLarge(f"{algorithm.name} with this key takes at most {allowed} bytes")
    return key.public.encrypt(plaintext, _oaep(algorithm))


def _oaep_decrypt(key: RSAKey, algorithm: Algorithm, ciphertext: bytes) -> bytes:
    return key.private.decrypt(ciphertext, _oaep(algorithm))


def _checked_hash(algorithm: Algorithm, digest: bytes) -> hashes.HashAlgorithm:
    if algorithm.hash is None:
        raise _unfit(algorithm)
    if len(digest) != algorithm.digest_bytes:
        raise DigestLength(
            f"{algorithm.name} signs digests of {algorithm.digest_bytes} bytes", field="digests"
        )
    return algorithm.hash


def _check_payload(payload: bytes, additional_data: bytes) -> None:
    if len(payload) > limits.PAYLOAD_BYTES_MAX or len(additional_data) > limits.PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(f"a payload has at most {limits.PAYLOAD_BYTES_MAX} bytes")


def _check_no_additional_data(additional_data: bytes) -> None:
    if additional_data:
        raise InvalidField("RSA takes no additional data", field="additional_data")


def _unfit(algorithm: Algorithm) -> AlgorithmNotSupported:
    return AlgorithmNotSupported(f"{algorithm.name} does not fit this key", field="algorithm")
