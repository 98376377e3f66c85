"""What keys do: pure functions of a parsed key, a row of the algorithm table and octets."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature as LibraryInvalidSignature
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hmac, keywrap
from cryptography.hazmat.primitives import padding as block_padding
from cryptography.hazmat.primitives.asymmetric import ec, padding, utils
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hsm_pool import limits
from hsm_pool.crypto.algorithms import Algorithm, Scheme
from hsm_pool.crypto.loaded_keys import ECKey, LoadedKey, MLDSAKey, MLKEMKey, OctKey, RSAKey
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import (
    AlgorithmNotSupported,
    DecryptionFailed,
    DigestLength,
    InvalidField,
    PayloadTooLarge,
)

GCM_NONCE_BYTES = 12
GCM_TAG_BYTES = 16
AES_BLOCK_BYTES = 16
_PKCS1V15_BYTES = 11
"""Least that PKCS #1 v1.5 adds to what it pads."""

_RSA_SIGNATURES = frozenset({Scheme.RSA_PKCS1V15, Scheme.RSA_PSS, Scheme.RSA_NO_DIGEST_INFO})
_RSA_ENCRYPTIONS = frozenset({Scheme.RSA_OAEP, Scheme.RSA_PKCS1V15_ENCRYPTION})
_CBC = frozenset({Scheme.AES_CBC, Scheme.AES_CBC_PADDED})
_KEY_WRAPS = frozenset({Scheme.AES_KW, Scheme.AES_KW_PADDED})

_ENCAPSULATED_BYTES = {9_472: 1088, 12_544: 1568}
"""Ciphertext of ML-KEM-768 and ML-KEM-1024 (FIPS 203, table 3), by the key's size in bits."""

KEM_OTHER_INFO = bytes.fromhex("3010300b060960864801650304012d020120")
"""CMSORIforKEMOtherInfo (RFC 9629, section 5), DER: aes256-wrap, a key of 32 octets, no ukm."""


class InvalidSignature(Exception):
    """The signature is not one of this key over this digest."""


@dataclass(frozen=True, slots=True)
class EncryptedData:
    """A ciphertext; the vector is empty for RSA, the tag for all but GCM."""

    ciphertext: bytes
    initialization_vector: bytes = b""
    authentication_tag: bytes = b""


def sign(key: LoadedKey, algorithm: Algorithm, digest: bytes) -> bytes:
    """Sign a digest; ML-DSA: the representative mu of a message (FIPS 204, 6.2).

    ECDSA signatures are r || s, each as long as the field (IEEE P1363).

    Raises:
        DigestLength: The digest is not as long as the algorithm's hash; RSNULL: does not fit the modulus.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    if algorithm.scheme is Scheme.ECDSA and isinstance(key, ECKey):
        prehashed = utils.Prehashed(_checked_hash(algorithm, digest))
        r, s = utils.decode_dss_signature(key.private.sign(digest, ec.ECDSA(prehashed)))
        width = (key.private.key_size + 7) // 8
        return r.to_bytes(width, "big") + s.to_bytes(width, "big")
    if algorithm.scheme in _RSA_SIGNATURES and isinstance(key, RSAKey):
        kind = _rsa_digest(key, algorithm, digest)
        return key.private.sign(digest, _signature_padding(algorithm), kind)
    if algorithm.scheme is Scheme.ML_DSA and isinstance(key, MLDSAKey):
        _checked_hash(algorithm, digest)
        return key.private.sign_mu(digest)
    if algorithm.scheme is Scheme.HMAC and isinstance(key, OctKey):
        _checked_hash(algorithm, digest)
        return authentication_code(key.raw, algorithm, digest)
    raise _unfit(algorithm)


def verify(key: LoadedKey, algorithm: Algorithm, digest: bytes, signature: bytes) -> None:
    """Verify a signature over a digest.

    Raises:
        InvalidSignature: It does not verify, whatever the cause.
        DigestLength: As for sign.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    try:
        if algorithm.scheme is Scheme.ECDSA and isinstance(key, ECKey):
            prehashed = utils.Prehashed(_checked_hash(algorithm, digest))
            width = (key.public.key_size + 7) // 8
            if len(signature) != 2 * width:
                raise InvalidSignature
            r = int.from_bytes(signature[:width], "big")
            s = int.from_bytes(signature[width:], "big")
            key.public.verify(utils.encode_dss_signature(r, s), digest, ec.ECDSA(prehashed))
        elif algorithm.scheme in _RSA_SIGNATURES and isinstance(key, RSAKey):
            kind = _rsa_digest(key, algorithm, digest)
            # The library takes NoDigestInfo here, too; only its annotation does not say so.
            key.public.verify(signature, digest, _signature_padding(algorithm), kind)  # type: ignore[arg-type]
        elif algorithm.scheme is Scheme.ML_DSA and isinstance(key, MLDSAKey):
            _checked_hash(algorithm, digest)
            key.public.verify_mu(signature, digest)
        elif algorithm.scheme is Scheme.HMAC and isinstance(key, OctKey):
            _checked_hash(algorithm, digest)
            verify_authentication_code(key.raw, algorithm, digest, signature)
        else:
            raise _unfit(algorithm)
    except (LibraryInvalidSignature, ValueError):
        raise InvalidSignature from None


def authentication_code(raw: SecretBytes, algorithm: Algorithm, message: bytes) -> bytes:
    """Return the HMAC of a message of any length, as long as the hash."""
    return _hmac(raw, algorithm, message).finalize()


def verify_authentication_code(raw: SecretBytes, algorithm: Algorithm, message: bytes, code: bytes) -> None:
    """Compare an HMAC in constant time.

    Raises:
        InvalidSignature: It is another one, or is cut.
    """
    try:
        _hmac(raw, algorithm, message).verify(code)
    except LibraryInvalidSignature:
        raise InvalidSignature from None


def encrypt(
    key: LoadedKey,
    algorithm: Algorithm,
    plaintext: bytes,
    additional_data: bytes = b"",
    initialization_vector: bytes = b"",
) -> EncryptedData:
    """Encrypt; the vector is made here, unless the caller gives one for CBC (16 octets).

    CBC adds zeros up to the block, and decryption returns them, as Azure's service does.

    Raises:
        PayloadTooLarge: More than fits.
        InvalidField: Additional data for another algorithm than GCM; a vector for another than CBC,
            or of another length; nothing to encrypt with CBC.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    _check_payload("plaintext", plaintext, additional_data)
    if algorithm.scheme in _CBC and isinstance(key, OctKey):
        _check_absent(algorithm, additional_data, "additional_data")
        vector = initialization_vector or os.urandom(AES_BLOCK_BYTES)
        if len(vector) != AES_BLOCK_BYTES:
            raise InvalidField("a vector of CBC has 16 bytes", field="initialization_vector")
        return EncryptedData(_cbc_encrypt(key, algorithm, vector, plaintext), vector)
    if algorithm.scheme in _RSA_ENCRYPTIONS and isinstance(key, RSAKey):
        _check_absent(algorithm, additional_data, "additional_data")
        _check_absent(algorithm, initialization_vector, "initialization_vector")
        return EncryptedData(_rsa_encrypt(key, algorithm, plaintext, "plaintext"))
    if algorithm.scheme is Scheme.AES_GCM and isinstance(key, OctKey):
        _check_absent(algorithm, initialization_vector, "initialization_vector")
        nonce = os.urandom(GCM_NONCE_BYTES)
        sealed = key.gcm.encrypt(nonce, plaintext, additional_data)
        return EncryptedData(sealed[:-GCM_TAG_BYTES], nonce, sealed[-GCM_TAG_BYTES:])
    raise _unfit(algorithm)


def decrypt(key: LoadedKey, algorithm: Algorithm, data: EncryptedData, additional_data: bytes = b"") -> bytes:
    """Decrypt.

    Only GCM tells a changed ciphertext. CBC returns what comes out. CBCPAD says whether the padding
    was right, which nothing but authentication by the caller can hide. RSA1_5 returns octets made from
    key and ciphertext where the padding is wrong (implicit rejection, by the library).

    Raises:
        DecryptionFailed: It does not decrypt, whatever the cause.
        PayloadTooLarge: More than a ciphertext can have.
        InvalidField: Additional data or a tag for another algorithm than GCM.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    block = AES_BLOCK_BYTES if algorithm.scheme is Scheme.AES_CBC_PADDED else 0
    _check_payload("ciphertext", data.ciphertext, additional_data, block)
    try:
        if algorithm.scheme in _RSA_ENCRYPTIONS and isinstance(key, RSAKey):
            _check_absent(algorithm, additional_data, "additional_data")
            return _rsa_decrypt(key, algorithm, data.ciphertext)
        if algorithm.scheme in _CBC and isinstance(key, OctKey):
            _check_absent(algorithm, additional_data, "additional_data")
            _check_absent(algorithm, data.authentication_tag, "authentication_tag")
            return _cbc_decrypt(key, algorithm, data)
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
        InvalidField: RFC 3394 takes 16 octets or more, in blocks of 8; RFC 5649 at least one.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    if algorithm.scheme in _RSA_ENCRYPTIONS and isinstance(key, RSAKey):
        return _rsa_encrypt(key, algorithm, target, "keys")
    if algorithm.scheme in _KEY_WRAPS and isinstance(key, OctKey):
        if algorithm.scheme is Scheme.AES_KW_PADDED:
            _check_wrappable(target)
            if not target:
                raise InvalidField("a key to wrap has at least one byte", field="keys")
            return keywrap.aes_key_wrap_with_padding(key.raw.reveal(), target)
        return _aes_key_wrap(key.raw, target)
    if algorithm.scheme is Scheme.ML_KEM_WRAP and isinstance(key, MLKEMKey):
        shared_secret, encapsulated = key.public.encapsulate()
        return encapsulated + _aes_key_wrap(kem_key_encryption_key(SecretBytes(shared_secret)), target)
    raise _unfit(algorithm)


def unwrap_key(key: LoadedKey, algorithm: Algorithm, wrapped: bytes) -> bytes:
    """Unwrap a key; RSA1_5 as in decrypt.

    ML-KEM decapsulates whatever is as long as it must be (implicit rejection); the integrity of the key
    wrap then tells, and nothing else does.

    Raises:
        DecryptionFailed: It does not unwrap, whatever the cause.
        AlgorithmNotSupported: The algorithm does not do this, or the key is of another type.
    """
    try:
        if algorithm.scheme in _RSA_ENCRYPTIONS and isinstance(key, RSAKey):
            return _rsa_decrypt(key, algorithm, wrapped)
        if algorithm.scheme in _KEY_WRAPS and isinstance(key, OctKey):
            if len(wrapped) > limits.WRAPPED_KEY_BYTES_MAX + 8:
                raise DecryptionFailed
            if algorithm.scheme is Scheme.AES_KW_PADDED:
                return keywrap.aes_key_unwrap_with_padding(key.raw.reveal(), wrapped)
            return keywrap.aes_key_unwrap(key.raw.reveal(), wrapped)
        if algorithm.scheme is Scheme.ML_KEM_WRAP and isinstance(key, MLKEMKey):
            return _kem_unwrap(key, algorithm, wrapped)
    except (keywrap.InvalidUnwrap, ValueError):
        raise DecryptionFailed from None
    raise _unfit(algorithm)


def kem_key_encryption_key(
    shared_secret: SecretBytes, other_info: bytes = KEM_OTHER_INFO, length_bytes: int = 32
) -> SecretBytes:
    """Return the AES key of a shared secret: HKDF with SHA-256, no salt, as RFC 9936 has it in CMS."""
    return SecretBytes(HKDF(hashes.SHA256(), length_bytes, None, other_info).derive(shared_secret.reveal()))


def _kem_unwrap(key: MLKEMKey, algorithm: Algorithm, wrapped: bytes) -> bytes:
    size = _ENCAPSULATED_BYTES[algorithm.size_bits]
    if not size < len(wrapped) <= size + limits.WRAPPED_KEY_BYTES_MAX + 8:
        raise DecryptionFailed
    shared_secret = SecretBytes(key.private.decapsulate(wrapped[:size]))
    return keywrap.aes_key_unwrap(kem_key_encryption_key(shared_secret).reveal(), wrapped[size:])


def _check_wrappable(target: bytes) -> None:
    if len(target) > limits.WRAPPED_KEY_BYTES_MAX:
        text = f"a key to wrap has at most {limits.WRAPPED_KEY_BYTES_MAX} bytes"
        raise PayloadTooLarge(text, field="keys")


def _aes_key_wrap(key: SecretBytes, target: bytes) -> bytes:
    _check_wrappable(target)
    if len(target) < 16 or len(target) % 8:
        raise InvalidField("a key to wrap has 16 bytes or more, a multiple of 8", field="keys")
    return keywrap.aes_key_wrap(key.reveal(), target)


def _signature_padding(algorithm: Algorithm) -> padding.PKCS1v15 | padding.PSS:
    if algorithm.scheme is Scheme.RSA_PSS:
        assert algorithm.hash
        return padding.PSS(padding.MGF1(algorithm.hash), algorithm.digest_bytes)
    return padding.PKCS1v15()


def _rsa_digest(key: RSAKey, algorithm: Algorithm, digest: bytes) -> utils.Prehashed | utils.NoDigestInfo:
    if algorithm.scheme is not Scheme.RSA_NO_DIGEST_INFO:
        return utils.Prehashed(_checked_hash(algorithm, digest))
    allowed = key.public.key_size // 8 - _PKCS1V15_BYTES
    if not 1 <= len(digest) <= allowed:
        raise DigestLength(f"{algorithm.name} with this key signs 1 to {allowed} bytes", field="digests")
    return utils.NoDigestInfo()


def _encryption_padding(algorithm: Algorithm) -> padding.PKCS1v15 | padding.OAEP:
    if algorithm.scheme is Scheme.RSA_PKCS1V15_ENCRYPTION:
        return padding.PKCS1v15()
    assert algorithm.hash
    return padding.OAEP(padding.MGF1(algorithm.hash), algorithm.hash, None)


def _rsa_encrypt(key: RSAKey, algorithm: Algorithm, plaintext: bytes, field: str) -> bytes:
    added = _PKCS1V15_BYTES if algorithm.hash is None else 2 * algorithm.digest_bytes + 2
    allowed = key.public.key_size // 8 - added
    if len(plaintext) > allowed:
        raise PayloadTooLarge(f"{algorithm.name} with this key takes at most {allowed} bytes", field=field)
    return key.public.encrypt(plaintext, _encryption_padding(algorithm))


def _rsa_decrypt(key: RSAKey, algorithm: Algorithm, ciphertext: bytes) -> bytes:
    return key.private.decrypt(ciphertext, _encryption_padding(algorithm))


def _cbc_encrypt(key: OctKey, algorithm: Algorithm, vector: bytes, plaintext: bytes) -> bytes:
    if algorithm.scheme is Scheme.AES_CBC_PADDED:
        padder = block_padding.PKCS7(8 * AES_BLOCK_BYTES).padder()
        padded = padder.update(plaintext) + padder.finalize()
    else:
        if not plaintext:
            raise InvalidField("there is nothing to encrypt", field="items")
        padded = plaintext + bytes(-len(plaintext) % AES_BLOCK_BYTES)
    encryptor = Cipher(AES(key.raw.reveal()), CBC(vector)).encryptor()
    return encryptor.update(padded) + encryptor.finalize()


def _cbc_decrypt(key: OctKey, algorithm: Algorithm, data: EncryptedData) -> bytes:
    if not data.ciphertext:
        raise DecryptionFailed
    decryptor = Cipher(AES(key.raw.reveal()), CBC(data.initialization_vector)).decryptor()
    padded = decryptor.update(data.ciphertext) + decryptor.finalize()
    if algorithm.scheme is Scheme.AES_CBC:
        return padded
    unpadder = block_padding.PKCS7(8 * AES_BLOCK_BYTES).unpadder()
    return unpadder.update(padded) + unpadder.finalize()


def _hmac(raw: SecretBytes, algorithm: Algorithm, message: bytes) -> hmac.HMAC:
    assert algorithm.hash
    code = hmac.HMAC(raw.reveal(), algorithm.hash)
    code.update(message)
    return code


def _checked_hash(algorithm: Algorithm, digest: bytes) -> hashes.HashAlgorithm:
    assert algorithm.hash
    if len(digest) != algorithm.digest_bytes:
        raise DigestLength(
            f"{algorithm.name} signs digests of {algorithm.digest_bytes} bytes", field="digests"
        )
    return algorithm.hash


def _check_payload(field: str, payload: bytes, additional_data: bytes, added_bytes: int = 0) -> None:
    allowed = limits.PAYLOAD_BYTES_MAX
    for name, size in ((field, len(payload) - added_bytes), ("additional_data", len(additional_data))):
        if size > allowed:
            raise PayloadTooLarge(f"a payload has at most {allowed} bytes", field=name)


def _check_absent(algorithm: Algorithm, value: bytes, field: str) -> None:
    if value:
        raise InvalidField(f"{algorithm.name} takes no {field.replace('_', ' ')}", field=field)


def _unfit(algorithm: Algorithm) -> AlgorithmNotSupported:
    return AlgorithmNotSupported(f"{algorithm.name} does not fit this key", field="algorithm")
