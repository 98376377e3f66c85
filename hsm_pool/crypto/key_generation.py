"""Making and importing keys. RSA keys are made off the serving threads, in a bounded pool."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, mlkem, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from hsm_pool.core.model import Curve, KeyType, KeyVersionRecord
from hsm_pool.crypto.algorithms import (
    AKP_SIZES_BITS,
    CURVE_BITS,
    OCT_SIZES_BITS,
    RSA_EXPONENT,
    RSA_EXPONENTS,
    RSA_SIZES_BITS,
    check_key_size,
    check_public_exponent,
)
from hsm_pool.crypto.loaded_keys import MLDSAPrivateKey, MLKEMPrivateKey
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import InvalidField, Overloaded

_EXPONENT_MAX = 2**32
_PRIMES_TRIED_MAX = 200
"""One pair of primes in four fits the exponent 3, and more fit the others."""
_WORKERS = 2
_WAITING_MAX = 32

_Asymmetric = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | MLDSAPrivateKey | MLKEMPrivateKey

CURVES: dict[Curve, ec.EllipticCurve] = {
    Curve.P256: ec.SECP256R1(),
    Curve.P384: ec.SECP384R1(),
    Curve.P521: ec.SECP521R1(),
    Curve.P256K: ec.SECP256K1(),
}

_AKP: dict[int, Callable[[], MLDSAPrivateKey | MLKEMPrivateKey]] = dict(
    zip(
        AKP_SIZES_BITS,
        (
            mldsa.MLDSA44PrivateKey.generate,
            mldsa.MLDSA65PrivateKey.generate,
            mldsa.MLDSA87PrivateKey.generate,
            mlkem.MLKEM768PrivateKey.generate,
            mlkem.MLKEM1024PrivateKey.generate,
        ),
        strict=True,
    )
)
"""In the order of the algorithm table."""


@dataclass(frozen=True, slots=True)
class KeyMaterial:
    """New key material: PKCS#8 (DER), raw octets for oct keys."""

    key_type: KeyType
    curve: Curve
    size_bits: int
    public_key_der: bytes
    material: SecretBytes


def generate(key_type: KeyType, curve: Curve, size_bits: int, public_exponent: int = 0) -> KeyMaterial:
    """Make a key; takes up to seconds for RSA. A public exponent of 0 is the usual one.

    Raises:
        InvalidField: No such kind of key.
    """
    check_key_size(key_type, curve, size_bits)
    check_public_exponent(key_type, public_exponent)
    if key_type is KeyType.OCT:
        return KeyMaterial(key_type, Curve.NONE, size_bits, b"", SecretBytes(os.urandom(size_bits // 8)))
    if key_type is KeyType.AKP:
        return _asymmetric(_AKP[size_bits]())
    if key_type is KeyType.EC:
        return _asymmetric(ec.generate_private_key(CURVES[curve]))
    return _asymmetric(_generate_rsa(size_bits, public_exponent or RSA_EXPONENT))


def _generate_rsa(size_bits: int, public_exponent: int) -> rsa.RSAPrivateKey:
    """Make an RSA key; the library makes the primes, whatever the exponent."""
    for _ in range(_PRIMES_TRIED_MAX):
        key = rsa.generate_private_key(RSA_EXPONENT, size_bits)
        if public_exponent == RSA_EXPONENT:
            return key
        numbers = key.private_numbers()
        p, q = numbers.p, numbers.q
        order = math.lcm(p - 1, q - 1)
        if math.gcd(public_exponent, order) == 1:
            d = pow(public_exponent, -1, order)
            halves = rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), numbers.iqmp
            public = rsa.RSAPublicNumbers(public_exponent, p * q)
            return rsa.RSAPrivateNumbers(p, q, d, *halves, public).private_key()  # proves it
    raise Overloaded("no primes were found that fit the public exponent")


def import_pkcs8(der: SecretBytes) -> KeyMaterial:
    """Take an RSA, EC, ML-DSA or ML-KEM private key (PKCS#8 PrivateKeyInfo, RFC 5208, DER, not encrypted).

    Raises:
        InvalidField: It is no such key or of a kind that the pool does not hold.
    """
    # Proving the numbers of an RSA key takes minutes when they are huge: bound them first (G8).
    key = _parse(der, skip_validation=True)
    if isinstance(key, rsa.RSAPrivateKey):
        _check_rsa(key)
        key = _parse(der, skip_validation=False)
    if not isinstance(key, _Asymmetric):
        raise InvalidField("only RSA, EC, ML-DSA and ML-KEM private keys can be imported", field="material")
    return _asymmetric(key)


def _parse(der: SecretBytes, *, skip_validation: bool) -> PrivateKeyTypes:
    try:
        return serialization.load_der_private_key(
            der.reveal(), None, unsafe_skip_rsa_key_validation=skip_validation
        )
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidField(
            "the material is not an unencrypted PKCS#8 private key", field="material"
        ) from None


def _check_rsa(key: rsa.RSAPrivateKey) -> None:
    """Check what is cheap to check of a key whose numbers are not proved yet (FIPS 186-5, A.1.1)."""
    numbers = key.private_numbers()
    public = numbers.public_numbers
    if key.key_size not in RSA_SIZES_BITS:
        raise InvalidField("an RSA key has 2048, 3072 or 4096 bits", field="material")
    if not RSA_EXPONENT <= public.e < _EXPONENT_MAX or public.e % 2 == 0:
        raise InvalidField("the public exponent is odd, 65537 to 2^32", field="material")
    if (
        numbers.p * numbers.q != public.n
        or max(numbers.d, numbers.dmp1, numbers.dmq1, numbers.iqmp) >= public.n
    ):
        raise InvalidField("the numbers of the RSA key do not belong together", field="material")
    if not numbers.p.bit_length() == numbers.q.bit_length() == key.key_size // 2:
        raise InvalidField("the primes of an RSA key have half its bits each", field="material")


def import_octets(octets: SecretBytes) -> KeyMaterial:
    """Take a symmetric key of 128, 192 or 256 bits.

    Raises:
        InvalidField: It has another length.
    """
    size_bits = len(octets) * 8
    if size_bits not in OCT_SIZES_BITS:
        raise InvalidField("an oct key has 128, 192 or 256 bits", field="material")
    return KeyMaterial(KeyType.OCT, Curve.NONE, size_bits, b"", octets)


def _asymmetric(key: _Asymmetric) -> KeyMaterial:
    if isinstance(key, rsa.RSAPrivateKey):
        key_type, curve, size_bits = KeyType.RSA, Curve.NONE, key.key_size
    elif isinstance(key, MLDSAPrivateKey | MLKEMPrivateKey):
        key_type, curve = KeyType.AKP, Curve.NONE
        size_bits = 8 * len(key.public_key().public_bytes_raw())
    else:
        key_type = KeyType.EC
        found = [curve for curve, kind in CURVES.items() if kind.name == key.curve.name]
        if not found:
            raise InvalidField("the curve is not one of P-256, P-384, P-521, P-256K", field="material")
        curve = found[0]
        size_bits = CURVE_BITS[curve]
    return KeyMaterial(
        key_type,
        curve,
        size_bits,
        key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        SecretBytes(
            key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        ),
    )


class KeyGenerator:
    """Makes keys; RSA keys in its own threads (the library releases the interpreter lock meanwhile)."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_WORKERS, thread_name_prefix="key-generator")
        self._slots = threading.BoundedSemaphore(_WAITING_MAX)

    def generate(
        self,
        key_type: KeyType,
        curve: Curve,
        size_bits: int,
        *,
        timeout_seconds: float,
        public_exponent: int = 0,
    ) -> KeyMaterial:
        """Make a key; a public exponent of 0 is the usual one.

        Raises:
            InvalidField: No such kind of key.
            Overloaded: Too many RSA keys are waited for, it took too long, or the generator was closed.
        """
        if key_type is not KeyType.RSA:
            return generate(key_type, curve, size_bits, public_exponent)
        check_key_size(key_type, curve, size_bits)
        check_public_exponent(key_type, public_exponent)
        if not self._slots.acquire(blocking=False):
            raise Overloaded("too many RSA keys are being made")
        try:
            future = self._executor.submit(generate, key_type, curve, size_bits, public_exponent)
        except RuntimeError:  # closed meanwhile
            self._slots.release()
            raise Overloaded("no more RSA keys are made here") from None
        future.add_done_callback(lambda _: self._slots.release())
        try:
            return future.result(timeout_seconds)
        except FutureTimeoutError:
            future.cancel()
            raise Overloaded("the RSA key was not made in time") from None
        except CancelledError:
            raise Overloaded("no more RSA keys are made here") from None

    def generate_like(self, version: KeyVersionRecord, timeout_seconds: float) -> KeyMaterial:
        """Make a key of the same kind as a version, an RSA key with its public exponent.

        Raises:
            Overloaded: As above.
        """
        exponent = 0
        if version.key_type is KeyType.RSA:
            public = serialization.load_der_public_key(version.public_key_der)
            assert isinstance(public, rsa.RSAPublicKey)
            # An imported key may have one that keys are not made with.
            exponent = public.public_numbers().e if public.public_numbers().e in RSA_EXPONENTS else 0
        curve, size_bits = version.curve, version.size_bits
        size_bits = 0 if version.key_type is KeyType.EC else size_bits
        return self.generate(
            version.key_type, curve, size_bits, timeout_seconds=timeout_seconds, public_exponent=exponent
        )

    def close(self) -> None:
        """End the threads; whoever waits for a key that is not begun is answered."""
        self._executor.shutdown(cancel_futures=True)
