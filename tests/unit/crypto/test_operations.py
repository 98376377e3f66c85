"""Every row of the algorithm table, by enumeration: what fits works, what does not is refused (G8)."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import pickle
import queue
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hsm_pool import errors, limits
from hsm_pool.core.model import Curve, KeyOperation, KeyType
from hsm_pool.crypto import algorithms, operations
from hsm_pool.crypto.algorithms import ALGORITHMS, Algorithm, Scheme
from hsm_pool.crypto.key_generation import (
    KeyGenerator,
    KeyMaterial,
    generate,
    import_octets,
    import_pkcs8,
)
from hsm_pool.crypto.loaded_keys import LoadedKey, LoadedKeyCache, load
from hsm_pool.crypto.secret import SecretBytes

KINDS = [
    (KeyType.RSA, Curve.NONE, 2048),
    *((KeyType.EC, curve, bits) for curve, bits in algorithms.CURVE_BITS.items()),
    *((KeyType.AKP, Curve.NONE, bits) for bits in algorithms.AKP_SIZES_BITS),
    *((KeyType.OCT, Curve.NONE, bits) for bits in algorithms.OCT_SIZES_BITS),
]


@pytest.fixture(scope="module")
def keys() -> dict[tuple[KeyType, Curve, int], tuple[KeyMaterial, LoadedKey]]:
    """One key of each kind, made for this run."""
    made = {kind: generate(*kind) for kind in KINDS}
    return {kind: (material, load(material.key_type, material.material)) for kind, material in made.items()}


def named(name: str) -> Algorithm:
    return algorithms.named(name)


def fitting(algorithm: Algorithm) -> tuple[KeyType, Curve, int]:
    """Return the kind of key of an algorithm."""
    return next(
        kind
        for kind in KINDS
        if kind[0] is algorithm.key_type
        and algorithm.curve in {Curve.NONE, kind[1]}
        and algorithm.size_bits in {0, kind[2]}
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_each_algorithm_round_trips(keys, algorithm: Algorithm) -> None:
    _, key = keys[fitting(algorithm)]
    if KeyOperation.SIGN in algorithm.operations:
        digest = os.urandom(algorithm.digest_bytes or 20)  # RSNULL takes any length
        signature = operations.sign(key, algorithm, digest)
        operations.verify(key, algorithm, digest, signature)
        damaged = bytes([signature[0] ^ 1]) + signature[1:]
        half = len(signature) // 2
        longer = signature[:half] + b"\0" + signature[half:]  # the same s, in one octet more
        for bad in (damaged, longer, signature[:-1], signature + b"\0", b"", bytes(len(signature))):
            with pytest.raises(operations.InvalidSignature):
                operations.verify(key, algorithm, digest, bad)
        with pytest.raises(operations.InvalidSignature):
            operations.verify(key, algorithm, os.urandom(len(digest)), signature)
        wrong = {0, 246, 70_000} if algorithm.hash is None else {0, 20, 32, 48, 64} - {len(digest)}
        for length in wrong:
            with pytest.raises(errors.DigestLength):
                operations.sign(key, algorithm, bytes(length))
            with pytest.raises(errors.DigestLength):
                operations.verify(key, algorithm, bytes(length), signature)
    if KeyOperation.ENCRYPT in algorithm.operations:
        data = b"additional" if algorithm.scheme is Scheme.AES_GCM else b""
        sealed = operations.encrypt(key, algorithm, b"plain", data)
        opened = b"plain" + bytes(11) if algorithm.scheme is Scheme.AES_CBC else b"plain"
        assert operations.decrypt(key, algorithm, sealed, data) == opened
        assert operations.encrypt(key, algorithm, b"plain", data) != sealed
    if KeyOperation.WRAP_KEY in algorithm.operations:
        target = os.urandom(32)
        assert operations.unwrap_key(key, algorithm, operations.wrap_key(key, algorithm, target)) == target


S, V, E, D, W, U, SW, SU = (
    KeyOperation.SIGN,
    KeyOperation.VERIFY,
    KeyOperation.ENCRYPT,
    KeyOperation.DECRYPT,
    KeyOperation.WRAP_KEY,
    KeyOperation.UNWRAP_KEY,
    KeyOperation.SECURE_WRAP_KEY,
    KeyOperation.SECURE_UNWRAP_KEY,
)
RSA_KINDS = {(KeyType.RSA, Curve.NONE, bits) for bits in (2048, 3072, 4096)}
OCT_KINDS = {(KeyType.OCT, Curve.NONE, bits) for bits in (128, 192, 256)}
ML_KEM_KINDS = {  # FIPS 203, table 3: octets of the public key
    name: (KeyType.AKP, Curve.NONE, 8 * public_key_bytes)
    for name, public_key_bytes in (("ML-KEM-768", 1184), ("ML-KEM-1024", 1568))
}
PUBLISHED: dict[str, tuple[set[tuple[KeyType, Curve, int]], set[KeyOperation]]] = {
    **{f"{family}{bits}": (RSA_KINDS, {S, V}) for family in ("RS", "PS") for bits in (256, 384, 512)},
    "RSNULL": (RSA_KINDS, {S, V}),
    **{
        f"ML-DSA-{parameters}": ({(KeyType.AKP, Curve.NONE, 8 * public_key_bytes)}, {S, V})
        for parameters, public_key_bytes in ((44, 1312), (65, 1952), (87, 2592))  # FIPS 204, table 2
    },
    **{f"{name}-HKDF-SHA256-A256KW": ({kind}, {W, U}) for name, kind in ML_KEM_KINDS.items()},
    **{name: (RSA_KINDS, {E, D, W, U}) for name in ("RSA-OAEP", "RSA1_5")},
    "RSA-OAEP-256": (RSA_KINDS, {E, D, W, U, SW, SU}),
    "ES256": ({(KeyType.EC, Curve.P256, 256)}, {S, V}),
    "ES384": ({(KeyType.EC, Curve.P384, 384)}, {S, V}),
    "ES512": ({(KeyType.EC, Curve.P521, 521)}, {S, V}),
    "ES256K": ({(KeyType.EC, Curve.P256K, 256)}, {S, V}),
    **{f"A{bits}GCM": ({(KeyType.OCT, Curve.NONE, bits)}, {E, D}) for bits in (128, 192, 256)},
    **{
        f"A{bits}{mode}": ({(KeyType.OCT, Curve.NONE, bits)}, {E, D})
        for bits in (128, 192, 256)
        for mode in ("CBC", "CBCPAD")
    },
    **{f"A{bits}KW": ({(KeyType.OCT, Curve.NONE, bits)}, {W, U, SW, SU}) for bits in (128, 192, 256)},
    **{f"A{bits}KWPAD": ({(KeyType.OCT, Curve.NONE, bits)}, {SW, SU}) for bits in (128, 192, 256)},
    **{name: (OCT_KINDS, {W, U, SW, SU}) for name in ("CKM_AES_KEY_WRAP", "CKM_AES_KEY_WRAP_PAD")},
    **{f"HS{bits}": (OCT_KINDS, {S, V}) for bits in (256, 384, 512)},
}
"""RFC 7518, RFC 8812 and Azure's documentation, written down apart from the table."""


def test_find_accepts_what_fits_and_nothing_else() -> None:
    """By enumeration over algorithm x kind x operation."""
    assert {algorithm.name for algorithm in ALGORITHMS} == PUBLISHED.keys()
    for algorithm, kind, operation in itertools.product(ALGORITHMS, {*KINDS, *RSA_KINDS}, KeyOperation):
        kinds, served = PUBLISHED[algorithm.name]
        if kind in kinds and operation in served:
            assert algorithms.find(algorithm.name, *kind, operation) is algorithm
        else:
            with pytest.raises(errors.AlgorithmNotSupported):
                algorithms.find(algorithm.name, *kind, operation)
    for unknown in ("", "none", "RS1", "rs256", "A256CMAC", "RS256 "):
        with pytest.raises(errors.AlgorithmNotSupported):
            algorithms.find(unknown, KeyType.RSA, Curve.NONE, 2048, KeyOperation.SIGN)


def test_a_refusal_says_what_the_key_is_and_what_fits() -> None:
    """In Azure's words, so that the next try can be right."""
    with pytest.raises(errors.AlgorithmNotSupported, match=r"EC P-256: for sign it takes ES256, not RS256"):
        algorithms.find("RS256", KeyType.EC, Curve.P256, 256, KeyOperation.SIGN)
    with pytest.raises(errors.AlgorithmNotSupported, match=r"oct-256: for wrapKey it takes A256KW, CKM_"):
        algorithms.find("A128KW", KeyType.OCT, Curve.NONE, 256, KeyOperation.WRAP_KEY)
    with pytest.raises(errors.InvalidField, match="type oct has 128, 192, 256 bits"):
        algorithms.check_key_size(KeyType.OCT, Curve.NONE, 512)
    with pytest.raises(errors.InvalidField, match=r"AKP has 10496 \(ML-DSA-44\), "):
        algorithms.check_key_size(KeyType.AKP, Curve.NONE, 100)
    with pytest.raises(errors.InvalidField, match="a curve: P-256, "):
        algorithms.check_key_size(KeyType.EC, Curve.NONE, 256)


def test_functions_refuse_what_does_not_fit(keys) -> None:
    """By enumeration: an algorithm of another operation, or a key of another type (defence behind find)."""
    functions = {
        S: lambda key, algorithm: operations.sign(key, algorithm, bytes(algorithm.digest_bytes)),
        V: lambda key, algorithm: operations.verify(key, algorithm, bytes(algorithm.digest_bytes), b"x"),
        E: lambda key, algorithm: operations.encrypt(key, algorithm, b"x"),
        D: lambda key, algorithm: operations.decrypt(key, algorithm, operations.EncryptedData(b"x")),
        W: lambda key, algorithm: operations.wrap_key(key, algorithm, bytes(16)),
        U: lambda key, algorithm: operations.unwrap_key(key, algorithm, bytes(24)),
    }
    refused, securely = 0, {W: SW, U: SU}  # which the same functions do
    for algorithm, kind, operation in itertools.product(ALGORITHMS, KINDS, functions):
        served = {operation, securely.get(operation)} & algorithm.operations
        if kind[0] is algorithm.key_type and served:
            continue
        with pytest.raises(errors.AlgorithmNotSupported):
            functions[operation](keys[kind][1], algorithm)
        refused += 1
    assert refused > len(ALGORITHMS) * len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].name}-{kind[1].name}-{kind[2]}")
def test_key_operations_by_kind(kind: tuple[KeyType, Curve, int]) -> None:
    """Azure's defaults, which leave HMAC out; each operation alone, and twice."""
    key_type, _, size_bits = kind
    default = {
        KeyType.RSA: {S, V, E, D, W, U},
        KeyType.EC: {S, V},
        KeyType.OCT: {E, D, W, U},
        KeyType.AKP: {W, U} if kind in ML_KEM_KINDS.values() else {S, V},
    }[key_type]
    allowed = default | ({SW, SU} if key_type in {KeyType.RSA, KeyType.OCT} else set())
    allowed |= {S, V} if key_type is KeyType.OCT else set()
    assert set(algorithms.default_key_operations(key_type, size_bits)) == default
    algorithms.check_key_operations(
        key_type, size_bits, algorithms.default_key_operations(key_type, size_bits)
    )
    for operation in KeyOperation:
        if operation in allowed:
            algorithms.check_key_operations(key_type, size_bits, [operation])
            with pytest.raises(errors.InvalidField):
                algorithms.check_key_operations(key_type, size_bits, [operation, operation])
        else:
            with pytest.raises(errors.InvalidField):
                algorithms.check_key_operations(key_type, size_bits, [*allowed, operation])


def test_nonces_of_gcm_do_not_repeat(keys) -> None:
    _, key = keys[KeyType.OCT, Curve.NONE, 256]
    gcm = next(a for a in ALGORITHMS if a.name == "A256GCM")
    assert len({operations.encrypt(key, gcm, b"").initialization_vector for _ in range(2000)}) == 2000


def test_both_forms_of_an_ecdsa_signature_verify(keys) -> None:
    """(r, s) and (r, -s), as FIPS 186-5 has it; the low-S rule of some block chains is not applied."""
    order = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
    _, key = keys[KeyType.EC, Curve.P256K, 256]
    algorithm = next(a for a in ALGORITHMS if a.name == "ES256K")
    signature = operations.sign(key, algorithm, bytes(32))
    s = int.from_bytes(signature[32:], "big")
    operations.verify(key, algorithm, bytes(32), signature[:32] + (order - s).to_bytes(32, "big"))
    for bad in (0, order, order + s if order + s < 2**256 else 0):
        with pytest.raises(operations.InvalidSignature):
            operations.verify(key, algorithm, bytes(32), signature[:32] + bad.to_bytes(32, "big"))


def kem_failures(keys) -> list[Callable[[], bytes]]:
    """Return what does not unwrap with an ML-KEM key, by whatever part of it is wrong."""
    failures: list[Callable[[], bytes]] = []
    for name, kind in ML_KEM_KINDS.items():
        key, algorithm = keys[kind][1], named(f"{name}-HKDF-SHA256-A256KW")
        wrapped, size = operations.wrap_key(key, algorithm, bytes(32)), len(key.public.encapsulate()[1])
        other = load(KeyType.AKP, generate(*kind).material)
        wrongs = [
            *(flipped(wrapped, position) for position in (0, size - 1, size, len(wrapped) - 1)),
            *(wrapped[:length] for length in (0, 1, size - 1, size, size + 8, len(wrapped) - 8)),
            wrapped + bytes(8),
            bytes(len(wrapped)),
            bytes(70_000),
            operations.wrap_key(other, algorithm, bytes(32)),
        ]
        failures += [functools.partial(operations.unwrap_key, key, algorithm, wrong) for wrong in wrongs]
    return failures


def flipped(octets: bytes, position: int) -> bytes:
    return octets[:position] + bytes([octets[position] ^ 1]) + octets[position + 1 :]


def test_every_cause_of_a_failed_decryption_looks_the_same(keys) -> None:
    """G3: one error, one text, whatever the cause."""
    _, rsa_key = keys[KeyType.RSA, Curve.NONE, 2048]
    _, oct_key = keys[KeyType.OCT, Curve.NONE, 256]
    oaep = next(a for a in ALGORITHMS if a.name == "RSA-OAEP-256")
    gcm = next(a for a in ALGORITHMS if a.name == "A256GCM")
    key_wrap = next(a for a in ALGORITHMS if a.name == "A256KW")
    good = operations.encrypt(oct_key, gcm, b"plain", b"")
    data = operations.EncryptedData
    wrapped = operations.wrap_key(oct_key, key_wrap, bytes(32))
    nonce, tag = good.initialization_vector, good.authentication_tag
    padded, plain = named("A256CBCPAD"), named("A256CBC")
    padded_wrap, pkcs1 = named("CKM_AES_KEY_WRAP_PAD"), named("RSA1_5")
    blocks = operations.encrypt(oct_key, plain, bytes(16) + b"not a padding ..", b"", bytes(16))
    causes = [
        lambda: operations.decrypt(oct_key, padded, blocks),
        lambda: operations.decrypt(oct_key, padded, data(blocks.ciphertext[:16], bytes(16))),
        lambda: operations.decrypt(oct_key, padded, data(blocks.ciphertext[:-1], bytes(16))),
        lambda: operations.decrypt(oct_key, padded, data(b"", bytes(16))),
        lambda: operations.decrypt(oct_key, padded, data(blocks.ciphertext, bytes(12))),
        lambda: operations.decrypt(oct_key, padded, data(blocks.ciphertext)),
        lambda: operations.decrypt(oct_key, plain, data(blocks.ciphertext[:-1], bytes(16))),
        lambda: operations.decrypt(oct_key, plain, data(b"", bytes(16))),
        lambda: operations.decrypt(oct_key, plain, data(blocks.ciphertext, bytes(17))),
        lambda: operations.decrypt(rsa_key, pkcs1, data(b"short")),
        lambda: operations.decrypt(rsa_key, pkcs1, data(b"\xff" * 256)),
        lambda: operations.unwrap_key(rsa_key, pkcs1, bytes(255)),
        lambda: operations.unwrap_key(oct_key, padded_wrap, wrapped),
        lambda: operations.unwrap_key(oct_key, padded_wrap, b""),
        lambda: operations.unwrap_key(oct_key, padded_wrap, bytes(17)),
        lambda: operations.unwrap_key(oct_key, padded_wrap, bytes(4096)),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext, nonce, bytes(16))),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext, nonce, tag[:12])),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext, nonce[:8], tag)),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext, bytes(12), tag)),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext + b"x", nonce, tag)),
        # Cut elsewhere, the whole is still the octets that the library takes.
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext + tag[:4], nonce, tag[4:])),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext[:2], nonce, good.ciphertext[2:] + tag)),
        lambda: operations.decrypt(oct_key, gcm, good, b"other additional data"),
        lambda: operations.decrypt(rsa_key, oaep, data(bytes(256))),
        lambda: operations.decrypt(rsa_key, oaep, data(b"short")),
        lambda: operations.unwrap_key(rsa_key, oaep, os.urandom(256)),
        lambda: operations.unwrap_key(oct_key, key_wrap, wrapped[:-8]),
        lambda: operations.unwrap_key(oct_key, key_wrap, wrapped[:-1] + bytes([wrapped[-1] ^ 1])),
        lambda: operations.unwrap_key(oct_key, key_wrap, b""),
        lambda: operations.unwrap_key(oct_key, key_wrap, bytes(4096)),
        *kem_failures(keys),
    ]
    texts = set()
    for cause in causes:
        with pytest.raises(errors.DecryptionFailed) as failed:
            cause()
        texts.add((failed.value.message, tuple(failed.value.metadata)))
        assert failed.value.__cause__ is None
    assert len(texts) == 1


def test_wrong_paddings_of_pkcs1_are_no_oracle(keys) -> None:
    """G3: implicit rejection. A wrong padding gives octets as a right one does, the same each time.

    They are made from the key and the ciphertext: another key gives others, so nobody can foresee them.
    """
    _, key = keys[KeyType.RSA, Curve.NONE, 2048]
    pkcs1 = named("RSA1_5")
    numbers = key.public.public_numbers()
    paddings = {
        "signature": b"\0\1" + b"\xff" * 222 + b"\0",
        "first octet": b"\1\2" + b"\xaa" * 222 + b"\0",
        "short padding": b"\0\2" + b"\xaa" * 7 + b"\0" + b"\xaa" * 215,
        "no end": b"\0\2" + b"\xaa" * 223,
    }
    secret = os.urandom(31).replace(b"\0", b"\1")
    for name, padding in paddings.items():
        block = int.from_bytes(padding + secret, "big")
        ciphertext = operations.EncryptedData(pow(block, numbers.e, numbers.n).to_bytes(256, "big"))
        first = operations.decrypt(key, pkcs1, ciphertext)
        assert first != secret, name
        assert len(first) <= 256 - 11, name
        assert operations.decrypt(key, pkcs1, ciphertext) == first, name
        assert operations.unwrap_key(key, pkcs1, ciphertext.ciphertext) == first, name
    right = operations.EncryptedData(
        pow(int.from_bytes(b"\0\2" + b"\xaa" * 222 + b"\0" + secret, "big"), numbers.e, numbers.n).to_bytes(
            256, "big"
        )
    )
    assert operations.decrypt(key, pkcs1, right) == secret


def test_cbc(keys) -> None:
    """The caller's vector or one of the pool's; zeros up to the block stay, as with Azure's service."""
    _, key = keys[KeyType.OCT, Curve.NONE, 256]
    plain, padded = named("A256CBC"), named("A256CBCPAD")
    vector = os.urandom(16)
    for algorithm in (plain, padded):
        chosen = operations.encrypt(key, algorithm, b"x" * 16, b"", vector)
        assert chosen == operations.encrypt(key, algorithm, b"x" * 16, b"", vector)
        assert (chosen.initialization_vector, chosen.authentication_tag) == (vector, b"")
        made = {operations.encrypt(key, algorithm, b"x").initialization_vector for _ in range(500)}
        assert len(made) == 500
        for length in (1, 12, 15, 17):
            with pytest.raises(errors.InvalidField):
                operations.encrypt(key, algorithm, b"x", b"", bytes(length))
        with pytest.raises(errors.InvalidField):
            operations.encrypt(key, algorithm, b"x", b"additional data", vector)
        with pytest.raises(errors.InvalidField):
            operations.decrypt(key, algorithm, chosen, b"additional data")
        with pytest.raises(errors.InvalidField):  # a tag that nobody would compare
            operations.decrypt(key, algorithm, operations.EncryptedData(chosen.ciphertext, vector, bytes(16)))
        full = operations.encrypt(key, algorithm, bytes(limits.PAYLOAD_BYTES_MAX))
        assert operations.decrypt(key, algorithm, full) == bytes(limits.PAYLOAD_BYTES_MAX)
    for length in range(1, 33):
        sealed = operations.encrypt(key, plain, b"x" * length)
        blocks = -(-length // 16)
        assert operations.decrypt(key, plain, sealed) == b"x" * length + bytes(16 * blocks - length)
        sealed = operations.encrypt(key, padded, b"x" * length)
        assert len(sealed.ciphertext) == length + 16 - length % 16
        assert operations.decrypt(key, padded, sealed) == b"x" * length
    assert operations.decrypt(key, padded, operations.encrypt(key, padded, b"")) == b""
    with pytest.raises(errors.InvalidField):
        operations.encrypt(key, plain, b"")
    for name in ("A256GCM", "RSA-OAEP"):
        other = keys[fitting(named(name))][1]
        with pytest.raises(errors.InvalidField):
            operations.encrypt(other, named(name), b"x", b"", vector)


def test_rsnull_is_the_bare_padding(keys) -> None:
    """A DigestInfo of SHA-256 (RFC 8017, 9.2), signed by RSNULL, is the signature of RS256."""
    _, key = keys[KeyType.RSA, Curve.NONE, 2048]
    digest = os.urandom(32)
    digest_info = bytes.fromhex("3031300d060960864801650304020105000420") + digest
    signature = operations.sign(key, named("RSNULL"), digest_info)
    assert signature == operations.sign(key, named("RS256"), digest)
    operations.verify(key, named("RSNULL"), digest_info, signature)
    for other in (digest, digest_info[:-1], digest_info + b"\0"):
        with pytest.raises(operations.InvalidSignature):
            operations.verify(key, named("RSNULL"), other, signature)
    for length in (1, 245):
        operations.verify(
            key, named("RSNULL"), bytes(length), operations.sign(key, named("RSNULL"), bytes(length))
        )


def test_payload_bounds(keys) -> None:
    _, rsa_key = keys[KeyType.RSA, Curve.NONE, 2048]
    _, oct_key = keys[KeyType.OCT, Curve.NONE, 128]
    oaep = next(a for a in ALGORITHMS if a.name == "RSA-OAEP-256")
    gcm = next(a for a in ALGORITHMS if a.name == "A128GCM")
    key_wrap = next(a for a in ALGORITHMS if a.name == "A128KW")
    operations.encrypt(rsa_key, oaep, bytes(256 - 66))
    with pytest.raises(errors.PayloadTooLarge) as refused:
        operations.encrypt(rsa_key, oaep, bytes(256 - 65))
    assert refused.value.metadata == {"field": "plaintext"}
    operations.encrypt(oct_key, gcm, bytes(limits.PAYLOAD_BYTES_MAX))
    with pytest.raises(errors.PayloadTooLarge) as refused:
        operations.encrypt(oct_key, gcm, bytes(limits.PAYLOAD_BYTES_MAX + 1))
    assert refused.value.metadata == {"field": "plaintext"}
    with pytest.raises(errors.PayloadTooLarge) as refused:
        operations.encrypt(oct_key, gcm, b"x", bytes(limits.PAYLOAD_BYTES_MAX + 1))
    assert refused.value.metadata == {"field": "additional_data"}
    with pytest.raises(errors.PayloadTooLarge) as refused:
        too_long = operations.EncryptedData(bytes(limits.PAYLOAD_BYTES_MAX + 17), bytes(12), bytes(16))
        operations.decrypt(oct_key, gcm, too_long)
    assert refused.value.metadata == {"field": "ciphertext"}
    with pytest.raises(errors.PayloadTooLarge) as refused:
        operations.wrap_key(rsa_key, oaep, bytes(256 - 65))
    assert refused.value.metadata == {"field": "keys"}
    with pytest.raises(errors.InvalidField):
        operations.encrypt(rsa_key, oaep, b"x", b"RSA has no additional data")
    with pytest.raises(errors.InvalidField):
        operations.decrypt(rsa_key, oaep, operations.encrypt(rsa_key, oaep, b"x"), b"nor here")
    for length in (0, 8, 17):
        with pytest.raises(errors.InvalidField):
            operations.wrap_key(oct_key, key_wrap, bytes(length))
    with pytest.raises(errors.PayloadTooLarge) as refused:
        operations.wrap_key(oct_key, key_wrap, bytes(limits.WRAPPED_KEY_BYTES_MAX + 8))
    assert refused.value.metadata == {"field": "keys"}


@pytest.mark.parametrize("kind", ML_KEM_KINDS.values(), ids=ML_KEM_KINDS)
def test_an_ml_kem_wrap_is_opened_by_what_its_standards_say(keys, kind: tuple[KeyType, Curve, int]) -> None:
    """FIPS 203, RFC 9629 and RFC 3394 without any of the product's code; each wrap is another."""
    material, key = keys[kind]
    algorithm = next(a for a in ALGORITHMS if a.size_bits == kind[2])
    assert algorithm.preview
    private = serialization.load_der_private_key(material.material.reveal(), None)
    for length in (16, 32, 64, limits.WRAPPED_KEY_BYTES_MAX):
        target = os.urandom(length)
        wrapped = operations.wrap_key(key, algorithm, target)
        size = len(wrapped) - length - 8
        shared_secret = private.decapsulate(wrapped[:size])
        aes256_wrap = bytes.fromhex("300b060960864801650304012d")
        other_info = b"\x30\x10" + aes256_wrap + b"\x02\x01\x20"
        key_encryption_key = HKDF(hashes.SHA256(), 32, None, other_info).derive(shared_secret)
        assert keywrap.aes_key_unwrap(key_encryption_key, wrapped[size:]) == target
        again = operations.wrap_key(key, algorithm, target)
        assert again[:size] != wrapped[:size]
        assert again[size:] != wrapped[size:]
    for length in (0, 8, 15, 17):
        with pytest.raises(errors.InvalidField):
            operations.wrap_key(key, algorithm, bytes(length))
    with pytest.raises(errors.PayloadTooLarge):
        operations.wrap_key(key, algorithm, bytes(limits.WRAPPED_KEY_BYTES_MAX + 8))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].name}-{kind[1].name}-{kind[2]}")
def test_exported_material_comes_back_the_same(keys, kind: tuple[KeyType, Curve, int]) -> None:
    material, _ = keys[kind]
    again = import_octets(material.material) if kind[0] is KeyType.OCT else import_pkcs8(material.material)
    assert (again.key_type, again.curve, again.size_bits) == kind
    assert again.public_key_der == material.public_key_der
    assert again.material.equals(material.material)


def der(key, encryption: serialization.KeySerializationEncryption | None = None) -> SecretBytes:
    return SecretBytes(
        key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            encryption or serialization.NoEncryption(),
        )
    )


def tagged(tag: int, content: bytes) -> bytes:
    """Encode a value of less than 65,536 octets by DER (X.690)."""
    length = len(content)
    if length < 128:
        return bytes([tag, length]) + content
    if length < 256:
        return bytes([tag, 0x81, length]) + content
    return bytes([tag, 0x82]) + length.to_bytes(2, "big") + content


def rsa_of(p: int, q: int, e: int, modulus: int = 0) -> SecretBytes:
    """Encode the RSA key of two primes as PKCS#8 (RFC 8017, A.1.2), or one with another modulus.

    By hand, for the library refuses to encode what it should refuse to read.
    """
    d = pow(e, -1, math.lcm(p - 1, q - 1))
    numbers = (0, modulus or p * q, e, d, p, q, d % (p - 1), d % (q - 1), pow(q, -1, p))
    encoded = [tagged(0x02, n.to_bytes(n.bit_length() // 8 + 1, "big")) for n in numbers]
    algorithm = bytes.fromhex("300d06092a864886f70d0101010500")
    content = tagged(0x04, tagged(0x30, b"".join(encoded)))
    return SecretBytes(tagged(0x30, tagged(0x02, b"\0") + algorithm + content))


def test_imports_that_the_pool_does_not_hold_are_refused(keys) -> None:
    """G8: each with a typed error and no internal text."""
    rsa_material = keys[KeyType.RSA, Curve.NONE, 2048][0].material.reveal()
    ec_material = keys[KeyType.EC, Curve.P256, 256][0]
    point = ec_material.public_key_der[-65:]
    other_point = generate(KeyType.EC, Curve.P256, 256).public_key_der[-65:]
    assert point in ec_material.material.reveal()
    strange = {
        "1024 bits": der(rsa.generate_private_key(65537, 1024)),
        "2056 bits": der(rsa.generate_private_key(65537, 2056)),
        "exponent 3": der(rsa.generate_private_key(3, 2048)),
        "P-224": der(ec.generate_private_key(ec.SECP224R1())),
        "DSA": der(dsa.generate_private_key(2048)),
        "Ed25519": der(ed25519.Ed25519PrivateKey.generate()),
        "encrypted": der(
            ec.generate_private_key(ec.SECP256R1()), serialization.BestAvailableEncryption(b"password")
        ),
        "another public point": SecretBytes(ec_material.material.reveal().replace(point, other_point)),
        "public key": SecretBytes(ec_material.public_key_der),
        "trailing octets": SecretBytes(rsa_material + b"x"),
        "cut": SecretBytes(rsa_material[:-1]),
        "junk": SecretBytes(b"junk"),
        "nothing": SecretBytes(b""),
    }
    for name, material in strange.items():
        with pytest.raises(errors.InvalidField) as refused:
            import_pkcs8(material)
        assert "Error" not in refused.value.message, name
    for length in (0, 15, 20, 33, 64):
        with pytest.raises(errors.InvalidField):
            import_octets(SecretBytes(bytes(length)))


@pytest.mark.parametrize("public_exponent", [0, *algorithms.RSA_EXPONENTS])
def test_public_exponents_of_new_keys(public_exponent: int) -> None:
    """The key has the exponent that was asked for, signs and decrypts by it, and its numbers are right."""
    made = generate(KeyType.RSA, Curve.NONE, 2048, public_exponent)
    key = load(made.key_type, made.material)
    numbers = key.private.private_numbers()
    assert numbers.public_numbers.e == (public_exponent or 65_537)
    assert numbers.d.bit_length() > 1024  # FIPS 186-5, A.1.1
    numbers.private_key()  # proves it
    operations.verify(key, named("RS256"), bytes(32), operations.sign(key, named("RS256"), bytes(32)))
    oaep = named("RSA-OAEP-256")
    assert operations.decrypt(key, oaep, operations.encrypt(key, oaep, b"plain")) == b"plain"


def test_other_public_exponents_are_refused() -> None:
    for public_exponent in (1, 2, 4, 9, 15, 65_536, 65_539, 2**32 - 1):
        with pytest.raises(errors.InvalidField):
            generate(KeyType.RSA, Curve.NONE, 2048, public_exponent)
    for kind in ((KeyType.EC, Curve.P256, 0), (KeyType.OCT, Curve.NONE, 256)):
        with pytest.raises(errors.InvalidField):
            generate(*kind, 65_537)


def test_public_exponents_of_imports() -> None:
    """Odd, 65537 to 2^32: the bounds themselves, from both sides."""
    numbers = rsa.generate_private_key(65537, 2048).private_numbers()
    coprime = math.lcm(numbers.p - 1, numbers.q - 1)

    def next_fitting(e: int) -> int:
        return next(x for x in itertools.count(e | 1, 2) if math.gcd(x, coprime) == 1)

    for e in (65_537, next_fitting(65_539), next_fitting(2**32 - 1_001)):
        assert import_pkcs8(rsa_of(numbers.p, numbers.q, e)).size_bits == 2048
    for e in (next_fitting(2**32), next_fitting(60_001), next_fitting(2**64)):
        assert not 65_537 <= e < 2**32
        with pytest.raises(errors.InvalidField):
            import_pkcs8(rsa_of(numbers.p, numbers.q, e))


def test_huge_numbers_are_refused_before_they_are_proved() -> None:
    """G8: proving a key of 19,630 bits, which fits into a message, would take more than a minute."""
    p, q = 2**9689 - 1, 2**9941 - 1  # prime (Mersenne)
    e = next(e for e in itertools.count(65_537, 2) if math.gcd(e, math.lcm(p - 1, q - 1)) == 1)
    modulus = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n
    begun = time.thread_time()
    for material in (rsa_of(p, q, e), rsa_of(p, q, e, modulus)):
        assert 4096 < len(material) < limits.IMPORT_BYTES_MAX
        with pytest.raises(errors.InvalidField):
            import_pkcs8(material)
    assert time.thread_time() - begun < 5


def test_rsa_keys_with_a_short_prime_are_refused() -> None:
    """FIPS 186-5: 4096 bits of which 879 are one prime are no key of 4096 bits."""
    p = 2**3217 - 1  # prime (Mersenne)
    short = rsa.generate_private_key(65537, 2 * 879).private_numbers().p
    e = next(e for e in itertools.count(65_537, 2) if math.gcd(e, math.lcm(p - 1, short - 1)) == 1)
    assert (p * short).bit_length() == 4096
    with pytest.raises(errors.InvalidField, match="half its bits"):
        import_pkcs8(rsa_of(p, short, e))


def test_damaged_imports_are_refused_or_whole(keys, full: bool, seed: int) -> None:
    """G8: any octets are either a key that works or a typed refusal, never another error."""
    chance = random.Random(seed)
    whole = [
        material.material.reveal()
        for (key_type, _, _), (material, _) in keys.items()
        if key_type is KeyType.EC
    ]
    for _ in range(20_000 if full else 2_000):
        damaged = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 1, 2, 4))):
            position = chance.randrange(len(damaged))
            length = chance.randrange(4)
            damaged[position : position + length] = chance.randbytes(chance.randrange(4))
        try:
            material = import_pkcs8(SecretBytes(bytes(damaged)))
        except errors.InvalidField:
            continue
        load(material.key_type, material.material)


def test_kinds_that_cannot_be_made_are_refused() -> None:
    for kind in (
        (KeyType.RSA, Curve.NONE, 1024),
        (KeyType.RSA, Curve.P256, 2048),
        (KeyType.EC, Curve.NONE, 256),
        (KeyType.EC, Curve.P256, 384),
        (KeyType.OCT, Curve.NONE, 64),
        (KeyType.OCT, Curve.P256, 128),
    ):
        with pytest.raises(errors.InvalidField):
            generate(*kind)


def test_the_openssl_program_verifies_what_we_sign(keys, tmp_path: Path) -> None:
    """Another implementation, the signature turned into DER."""
    import subprocess

    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    material, key = keys[KeyType.EC, Curve.P521, 521]
    algorithm = next(a for a in ALGORITHMS if a.name == "ES512")
    text = tmp_path / "text"
    text.write_bytes(b"signed text")
    signature = operations.sign(key, algorithm, hashlib.sha512(b"signed text").digest())
    assert len(signature) == 132
    r, s = (int.from_bytes(part, "big") for part in (signature[:66], signature[66:]))
    (tmp_path / "signature").write_bytes(encode_dss_signature(r, s))
    (tmp_path / "key").write_bytes(material.public_key_der)
    command = ["openssl", "dgst", "-sha512", "-keyform", "DER", "-verify", str(tmp_path / "key")]
    subprocess.run([*command, "-signature", str(tmp_path / "signature"), str(text)], check=True)


def test_parsed_keys_are_kept_up_to_the_capacity() -> None:
    cache = LoadedKeyCache(2)
    loads: list[str] = []

    def loader(name: str):
        def load_material() -> tuple[KeyType, SecretBytes]:
            loads.append(name)
            return KeyType.OCT, SecretBytes(bytes(32))

        return load_material

    first = cache.get("a", loader("a"))
    assert cache.get("a", loader("a")) is first
    cache.get("b", loader("b"))
    cache.get("c", loader("c"))
    cache.get("b", loader("b"))
    cache.get("a", loader("a"))
    cache.discard("a")
    cache.get("a", loader("a"))
    assert loads == ["a", "b", "c", "a", "a"]


def test_a_key_that_is_forgotten_while_it_is_parsed_is_not_kept() -> None:
    """G3: after discard and clear nothing of the key is held."""
    for forget in (lambda cache: cache.discard("a"), lambda cache: cache.clear()):
        cache = LoadedKeyCache(2)
        loads: list[str] = []

        def load_material(
            forget=forget, cache: LoadedKeyCache = cache, loads: list[str] = loads
        ) -> tuple[KeyType, SecretBytes]:
            loads.append("a")
            if len(loads) == 1:
                forget(cache)
            return KeyType.OCT, SecretBytes(bytes(32))

        for _ in range(3):
            cache.get("a", load_material)
        assert len(loads) == 2, "parsed again once, then kept"


def test_loading_what_does_not_fit_its_type(keys) -> None:
    for kind, other in itertools.permutations((KeyType.RSA, KeyType.EC), 2):
        material = next(m for (key_type, _, _), (m, _) in keys.items() if key_type is kind)
        with pytest.raises(ValueError, match="does not fit"):
            load(other, material.material)


def test_the_key_generator_is_bounded() -> None:
    """G8: a time-out, a full queue and a closed generator are typed answers."""
    generator = KeyGenerator()
    answers: queue.Queue[KeyMaterial | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(generator.generate(KeyType.RSA, Curve.NONE, 3072, timeout_seconds=60))
        except Exception as error:  # noqa: BLE001 - every answer is looked at
            answers.put(error)

    try:
        with pytest.raises(errors.Overloaded):
            generator.generate(KeyType.RSA, Curve.NONE, 4096, timeout_seconds=0.0)
        made = generator.generate(KeyType.EC, Curve.P256, 0, timeout_seconds=1)
        assert made.size_bits == 256
        callers = [threading.Thread(target=ask) for _ in range(64)]
        for caller in callers:
            caller.start()
        first = [answers.get(timeout=60) for _ in range(16)]
        assert any(isinstance(answer, errors.Overloaded) for answer in first)
    finally:
        generator.close()
    for caller in callers:
        caller.join(60)
    rest = [answers.get_nowait() for _ in range(64 - 16)]
    assert {type(answer) for answer in first + rest} <= {KeyMaterial, errors.Overloaded}
    assert errors.Overloaded in {type(answer) for answer in rest}, "closing answers those who wait"
    with pytest.raises(errors.Overloaded):
        generator.generate(KeyType.RSA, Curve.NONE, 2048, timeout_seconds=1)


def test_secrets_are_not_printed_pickled_or_compared() -> None:
    """G3."""
    secret = SecretBytes(b"hidden octets")
    assert "hidden" not in f"{secret} {secret!r}"
    for misuse in (lambda: pickle.dumps(secret), lambda: secret == secret, lambda: hash(secret)):
        with pytest.raises(TypeError):
            misuse()
    assert secret.equals(SecretBytes(b"hidden octets"))
