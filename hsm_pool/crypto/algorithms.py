"""The one table of algorithms: adding an algorithm is adding a row.

Names are those of RFC 7518 and RFC 8812 as Azure Key Vault uses them, and PKCS #11's for two key wraps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from cryptography.hazmat.primitives import hashes

from hsm_pool.core.model import Curve, KeyOperation, KeyType
from hsm_pool.errors import AlgorithmNotSupported, InvalidField


class Scheme(Enum):
    """How an algorithm works; :mod:`hsm_pool.crypto.operations` has one function for each."""

    RSA_PKCS1V15 = "RSASSA-PKCS1-v1_5 (RFC 8017)"
    RSA_PSS = "RSASSA-PSS (RFC 8017), salt as long as the hash"
    RSA_NO_DIGEST_INFO = "PKCS #1 v1.5 signature padding (RFC 2437) around the octets as they are"
    RSA_OAEP = "RSAES-OAEP (RFC 8017)"
    RSA_PKCS1V15_ENCRYPTION = "RSAES-PKCS1-v1_5 (RFC 8017)"
    ECDSA = "ECDSA (FIPS 186-5), signature r || s"
    HMAC = "HMAC (RFC 2104) over the digest"
    ML_DSA = "ML-DSA (FIPS 204) of a message representative (external mu)"
    ML_KEM_WRAP = (
        "ML-KEM (FIPS 203), HKDF-SHA-256, AES-256 key wrap, as KEMRecipientInfo (RFC 9629, RFC 9936)"
    )
    AES_GCM = "AES-GCM (NIST SP 800-38D)"
    AES_CBC = "AES-CBC (NIST SP 800-38A), zeros added up to the block and not taken away"
    AES_CBC_PADDED = "AES-CBC (NIST SP 800-38A) with PKCS #7 padding"
    AES_KW = "AES key wrap (RFC 3394)"
    AES_KW_PADDED = "AES key wrap with padding (RFC 5649)"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A row of the table."""

    name: str
    scheme: Scheme
    key_type: KeyType
    operations: frozenset[KeyOperation]
    hash: hashes.HashAlgorithm | None = None
    curve: Curve = Curve.NONE
    size_bits: int = 0
    """The only key size that fits; 0 for any. Of AKP: the public key's, which tells the parameter set."""
    preview: bool = False
    """Whether it may still change, because Azure's own is a preview, or Azure has none."""

    @property
    def digest_bytes(self) -> int:
        """Length of the digests it signs; 0 when it signs none."""
        return self.hash.digest_size if self.hash else 0


_SIGN = frozenset({KeyOperation.SIGN, KeyOperation.VERIFY})
_ENCRYPT = frozenset({KeyOperation.ENCRYPT, KeyOperation.DECRYPT})
_WRAP = frozenset({KeyOperation.WRAP_KEY, KeyOperation.UNWRAP_KEY})
_SECURE = frozenset({KeyOperation.SECURE_WRAP_KEY, KeyOperation.SECURE_UNWRAP_KEY})
_RSA, _EC, _OCT, _AKP = KeyType.RSA, KeyType.EC, KeyType.OCT, KeyType.AKP

ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm("RS256", Scheme.RSA_PKCS1V15, _RSA, _SIGN, hashes.SHA256()),
    Algorithm("RS384", Scheme.RSA_PKCS1V15, _RSA, _SIGN, hashes.SHA384()),
    Algorithm("RS512", Scheme.RSA_PKCS1V15, _RSA, _SIGN, hashes.SHA512()),
    Algorithm("RSNULL", Scheme.RSA_NO_DIGEST_INFO, _RSA, _SIGN),
    Algorithm("PS256", Scheme.RSA_PSS, _RSA, _SIGN, hashes.SHA256()),
    Algorithm("PS384", Scheme.RSA_PSS, _RSA, _SIGN, hashes.SHA384()),
    Algorithm("PS512", Scheme.RSA_PSS, _RSA, _SIGN, hashes.SHA512()),
    Algorithm("RSA-OAEP-256", Scheme.RSA_OAEP, _RSA, _ENCRYPT | _WRAP | _SECURE, hashes.SHA256()),
    Algorithm("RSA-OAEP", Scheme.RSA_OAEP, _RSA, _ENCRYPT | _WRAP, hashes.SHA1()),  # noqa: S303 - as named
    Algorithm("RSA1_5", Scheme.RSA_PKCS1V15_ENCRYPTION, _RSA, _ENCRYPT | _WRAP),
    Algorithm("ES256", Scheme.ECDSA, _EC, _SIGN, hashes.SHA256(), Curve.P256),
    Algorithm("ES384", Scheme.ECDSA, _EC, _SIGN, hashes.SHA384(), Curve.P384),
    Algorithm("ES512", Scheme.ECDSA, _EC, _SIGN, hashes.SHA512(), Curve.P521),
    Algorithm("ES256K", Scheme.ECDSA, _EC, _SIGN, hashes.SHA256(), Curve.P256K),
    Algorithm("ML-DSA-44", Scheme.ML_DSA, _AKP, _SIGN, hashes.SHAKE256(64), size_bits=10_496, preview=True),
    Algorithm("ML-DSA-65", Scheme.ML_DSA, _AKP, _SIGN, hashes.SHAKE256(64), size_bits=15_616, preview=True),
    Algorithm("ML-DSA-87", Scheme.ML_DSA, _AKP, _SIGN, hashes.SHAKE256(64), size_bits=20_736, preview=True),
    Algorithm(
        "ML-KEM-768-HKDF-SHA256-A256KW", Scheme.ML_KEM_WRAP, _AKP, _WRAP, size_bits=9_472, preview=True
    ),
    Algorithm(
        "ML-KEM-1024-HKDF-SHA256-A256KW", Scheme.ML_KEM_WRAP, _AKP, _WRAP, size_bits=12_544, preview=True
    ),
    Algorithm("HS256", Scheme.HMAC, _OCT, _SIGN, hashes.SHA256()),
    Algorithm("HS384", Scheme.HMAC, _OCT, _SIGN, hashes.SHA384()),
    Algorithm("HS512", Scheme.HMAC, _OCT, _SIGN, hashes.SHA512()),
    Algorithm("A128GCM", Scheme.AES_GCM, _OCT, _ENCRYPT, size_bits=128),
    Algorithm("A192GCM", Scheme.AES_GCM, _OCT, _ENCRYPT, size_bits=192),
    Algorithm("A256GCM", Scheme.AES_GCM, _OCT, _ENCRYPT, size_bits=256),
    Algorithm("A128CBC", Scheme.AES_CBC, _OCT, _ENCRYPT, size_bits=128),
    Algorithm("A192CBC", Scheme.AES_CBC, _OCT, _ENCRYPT, size_bits=192),
    Algorithm("A256CBC", Scheme.AES_CBC, _OCT, _ENCRYPT, size_bits=256),
    Algorithm("A128CBCPAD", Scheme.AES_CBC_PADDED, _OCT, _ENCRYPT, size_bits=128),
    Algorithm("A192CBCPAD", Scheme.AES_CBC_PADDED, _OCT, _ENCRYPT, size_bits=192),
    Algorithm("A256CBCPAD", Scheme.AES_CBC_PADDED, _OCT, _ENCRYPT, size_bits=256),
    Algorithm("A128KW", Scheme.AES_KW, _OCT, _WRAP | _SECURE, size_bits=128),
    Algorithm("A192KW", Scheme.AES_KW, _OCT, _WRAP | _SECURE, size_bits=192),
    Algorithm("A256KW", Scheme.AES_KW, _OCT, _WRAP | _SECURE, size_bits=256),
    Algorithm("A128KWPAD", Scheme.AES_KW_PADDED, _OCT, _SECURE, size_bits=128),
    Algorithm("A192KWPAD", Scheme.AES_KW_PADDED, _OCT, _SECURE, size_bits=192),
    Algorithm("A256KWPAD", Scheme.AES_KW_PADDED, _OCT, _SECURE, size_bits=256),
    Algorithm("CKM_AES_KEY_WRAP", Scheme.AES_KW, _OCT, _WRAP | _SECURE),
    Algorithm("CKM_AES_KEY_WRAP_PAD", Scheme.AES_KW_PADDED, _OCT, _WRAP | _SECURE),
)

CURVE_BITS = {Curve.P256: 256, Curve.P384: 384, Curve.P521: 521, Curve.P256K: 256}
"""Field size of each curve."""

RSA_SIZES_BITS = (2048, 3072, 4096)
RSA_EXPONENT = 65_537
RSA_EXPONENTS = (3, 5, 17, 257, RSA_EXPONENT)
"""Public exponents of keys that are made, the Fermat primes: Azure has no list, and its tests ask for 17."""

OCT_SIZES_BITS = (128, 192, 256)
AKP_SIZES_BITS = tuple(algorithm.size_bits for algorithm in ALGORITHMS if algorithm.key_type is KeyType.AKP)

_SIZES_BITS = {KeyType.RSA: RSA_SIZES_BITS, KeyType.OCT: OCT_SIZES_BITS, KeyType.AKP: AKP_SIZES_BITS}

_NOT_BY_DEFAULT = {KeyType.OCT: _SIGN | _SECURE, KeyType.RSA: _SECURE}
"""An oct key signs, and either wraps securely, only if its creator says so (Azure Managed HSM)."""

_BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}


def names(operation: KeyOperation) -> tuple[str, ...]:
    """Return the names of the algorithms of an operation, in the order of the table."""
    return tuple(algorithm.name for algorithm in ALGORITHMS if operation in algorithm.operations)


def named(name: str) -> Algorithm:
    """Return the algorithm of that name.

    Raises:
        AlgorithmNotSupported: It does not exist.
    """
    algorithm = _BY_NAME.get(name)
    if algorithm is None:
        raise AlgorithmNotSupported("this algorithm is not known", field="algorithm")
    return algorithm


def find(name: str, key_type: KeyType, curve: Curve, size_bits: int, operation: KeyOperation) -> Algorithm:
    """Return the algorithm of that name if it fits the key and the operation.

    Raises:
        AlgorithmNotSupported: It does not exist or does not fit.
    """
    algorithm = named(name)
    if operation not in algorithm.operations or not _fits(algorithm, key_type, curve, size_bits):
        fitting = (
            a for a in ALGORITHMS if operation in a.operations and _fits(a, key_type, curve, size_bits)
        )
        taken = ", ".join(a.name for a in fitting) or "no algorithm"
        raise AlgorithmNotSupported(
            f"the key is {kind(key_type, curve, size_bits)}: for {operation.azure_name} it takes {taken}, "
            f"not {name}",
            field="algorithm",
        )
    return algorithm


def _fits(algorithm: Algorithm, key_type: KeyType, curve: Curve, size_bits: int) -> bool:
    return (
        algorithm.key_type is key_type
        and algorithm.curve in {Curve.NONE, curve}
        and algorithm.size_bits in {0, size_bits}
    )


def kind(key_type: KeyType, curve: Curve, size_bits: int) -> str:
    """Return how people name a kind of key: "EC P-256", "RSA-2048"."""
    if key_type is KeyType.EC:
        return f"EC {curve.azure_name}"
    return f"{key_type.azure_name}-{_size(key_type, size_bits)}"


def _size(key_type: KeyType, size_bits: int) -> str:
    """Return a size, of an AKP key with the parameter set that it stands for."""
    sets = (a.name for a in ALGORITHMS if key_type is KeyType.AKP and a.size_bits == size_bits)
    return " ".join([str(size_bits), *(f"({name})" for name in sets)])


def _served(key_type: KeyType, size_bits: int) -> frozenset[KeyOperation]:
    """Return what the algorithms do that fit a key type and a size; an EC key's may be 0."""
    fitting = (a for a in ALGORITHMS if a.key_type is key_type and a.size_bits in {0, size_bits})
    return frozenset[KeyOperation]().union(*(algorithm.operations for algorithm in fitting))


def default_key_operations(key_type: KeyType, size_bits: int) -> tuple[KeyOperation, ...]:
    """Return what a key may be used for when its creator does not say (Azure Managed HSM)."""
    return tuple(sorted(_served(key_type, size_bits) - _NOT_BY_DEFAULT.get(key_type, frozenset())))


def check_key_operations(key_type: KeyType, size_bits: int, operations: Iterable[KeyOperation]) -> None:
    """Check that key operations fit a key type and size.

    Raises:
        InvalidField: One does not fit, or one is repeated.
    """
    listed = list(operations)
    if len(set(listed)) != len(listed):
        raise InvalidField("a key operation is repeated", field="key_operations")
    if KeyOperation.IMPORT in listed and len(listed) > 1:
        raise InvalidField("a key that imports has no other operation", field="key_operations")
    possible = _served(key_type, size_bits) | ({KeyOperation.IMPORT} if key_type is KeyType.RSA else set())
    for operation in listed:
        if operation not in possible:
            raise InvalidField(
                f"{operation.azure_name} does not fit a key of type {key_type.azure_name}",
                field="key_operations",
            )


def check_key_size(key_type: KeyType, curve: Curve, size_bits: int) -> None:
    """Check that a key of this kind can be made; an EC key's size may be 0 (its curve says it).

    Raises:
        InvalidField: It cannot.
    """
    if key_type is KeyType.EC:
        if curve is Curve.NONE:
            raise InvalidField("an EC key needs a curve: P-256, P-384, P-521 or P-256K", field="curve")
        if size_bits not in {0, CURVE_BITS[curve]}:
            raise InvalidField("the curve gives the size of an EC key", field="size_bits")
        return
    if curve is not Curve.NONE:
        raise InvalidField("only an EC key has a curve", field="curve")
    sizes = _SIZES_BITS[key_type]
    if size_bits not in sizes:
        allowed = ", ".join(_size(key_type, size) for size in sizes)
        raise InvalidField(f"a key of type {key_type.azure_name} has {allowed} bits", field="size_bits")


def check_public_exponent(key_type: KeyType, public_exponent: int) -> None:
    """Check the public exponent of a key to make; 0 stands for the usual one.

    Raises:
        InvalidField: It is not one of those, or the key is no RSA key.
    """
    if public_exponent == 0:
        return
    if key_type is not KeyType.RSA:
        raise InvalidField("only an RSA key has a public exponent", field="public_exponent")
    if public_exponent not in RSA_EXPONENTS:
        allowed = ", ".join(map(str, RSA_EXPONENTS))
        raise InvalidField(f"a public exponent is one of {allowed}", field="public_exponent")
