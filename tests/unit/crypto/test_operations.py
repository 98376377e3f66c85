"""Every row of the algorithm table, by enumeration: what fits works, what does not is refused (G8)."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa

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
    *((KeyType.OCT, Curve.NONE, bits) for bits in algorithms.OCT_SIZES_BITS),
]


@pytest.fixture(scope="module")
def keys() -> dict[tuple[KeyType, Curve, int], tuple[KeyMaterial, LoadedKey]]:
    """One key of each kind, made for this run."""
    made = {kind: generate(*kind) for kind in KINDS}
    return {kind: (material, load(material.key_type, material.material)) for kind, material in made.items()}


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
        digest = os.urandom(algorithm.digest_bytes)
        signature = operations.sign(key, algorithm, digest)
        operations.verify(key, algorithm, digest, signature)
        damaged = bytes([signature[0] ^ 1]) + signature[1:]
        for bad in (damaged, signature[:-1], signature + b"\0", b"", bytes(len(signature))):
            with pytest.raises(operations.InvalidSignature):
                operations.verify(key, algorithm, digest, bad)
        with pytest.raises(operations.InvalidSignature):
            operations.verify(key, algorithm, os.urandom(algorithm.digest_bytes), signature)
        for length in {0, 20, 32, 48, 64} - {algorithm.digest_bytes}:
            with pytest.raises(errors.DigestLength):
                operations.sign(key, algorithm, bytes(length))
    if KeyOperation.ENCRYPT in algorithm.operations:
        data = b"" if algorithm.scheme is Scheme.RSA_OAEP else b"additional"
        sealed = operations.encrypt(key, algorithm, b"plain", data)
        assert operations.decrypt(key, algorithm, sealed, data) == b"plain"
        assert operations.encrypt(key, algorithm, b"plain", data) != sealed
    if KeyOperation.WRAP_KEY in algorithm.operations:
        target = os.urandom(32)
        assert operations.unwrap_key(key, algorithm, operations.wrap_key(key, algorithm, target)) == target


def test_find_accepts_what_fits_and_nothing_else() -> None:
    """By enumeration over algorithm x kind x operation."""
    accepted = 0
    for algorithm, kind, operation in itertools.product(ALGORITHMS, KINDS, KeyOperation):
        fits = (
            kind[0] is algorithm.key_type
            and algorithm.curve in {Curve.NONE, kind[1]}
            and algorithm.size_bits in {0, kind[2]}
            and operation in algorithm.operations
        )
        if fits:
            assert algorithms.find(algorithm.name, *kind, operation) is algorithm
            accepted += 1
        else:
            with pytest.raises(errors.AlgorithmNotSupported):
                algorithms.find(algorithm.name, *kind, operation)
    assert accepted == 6 * 2 + 4 + 4 * 2 + 3 * 2 + 3 * 2
    for unknown in ("", "none", "RS1", "rs256", "HS256"):
        with pytest.raises(errors.AlgorithmNotSupported):
            algorithms.find(unknown, KeyType.RSA, Curve.NONE, 2048, KeyOperation.SIGN)


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
    causes = [
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext, nonce, bytes(16))),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext, nonce, tag[:12])),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext, nonce[:8], tag)),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext, bytes(12), tag)),
        lambda: operations.decrypt(oct_key, gcm, data(good.ciphertext + b"x", nonce, tag)),
        lambda: operations.decrypt(oct_key, gcm, good, b"other additional data"),
        lambda: operations.decrypt(rsa_key, oaep, data(bytes(256))),
        lambda: operations.decrypt(rsa_key, oaep, data(b"short")),
        lambda: operations.unwrap_key(rsa_key, oaep, os.urandom(256)),
        lambda: operations.unwrap_key(oct_key, key_wrap, wrapped[:-8]),
        lambda: operations.unwrap_key(oct_key, key_wrap, wrapped[:-1] + bytes([wrapped[-1] ^ 1])),
        lambda: operations.unwrap_key(oct_key, key_wrap, b""),
        lambda: operations.unwrap_key(oct_key, key_wrap, bytes(4096)),
    ]
    texts = set()
    for cause in causes:
        with pytest.raises(errors.DecryptionFailed) as failed:
            cause()
        texts.add((failed.value.message, tuple(failed.value.metadata)))
        assert failed.value.__cause__ is None
    assert len(texts) == 1


def test_payload_bounds(keys) -> None:
    _, rsa_key = keys[KeyType.RSA, Curve.NONE, 2048]
    _, oct_key = keys[KeyType.OCT, Curve.NONE, 128]
    oaep = next(a for a in ALGORITHMS if a.name == "RSA-OAEP-256")
    gcm = next(a for a in ALGORITHMS if a.name == "A128GCM")
    key_wrap = next(a for a in ALGORITHMS if a.name == "A128KW")
    operations.encrypt(rsa_key, oaep, bytes(256 - 66))
    with pytest.raises(errors.PayloadTooLarge):
        operations.encrypt(rsa_key, oaep, bytes(256 - 65))
    operations.encrypt(oct_key, gcm, bytes(limits.PAYLOAD_BYTES_MAX))
    with pytest.raises(errors.PayloadTooLarge):
        operations.encrypt(oct_key, gcm, bytes(limits.PAYLOAD_BYTES_MAX + 1))
    with pytest.raises(errors.InvalidField):
        operations.encrypt(rsa_key, oaep, b"x", b"RSA has no additional data")
    for length in (0, 8, 17):
        with pytest.raises(errors.InvalidField):
            operations.wrap_key(oct_key, key_wrap, bytes(length))
    with pytest.raises(errors.PayloadTooLarge):
        operations.wrap_key(oct_key, key_wrap, bytes(limits.WRAPPED_KEY_BYTES_MAX + 8))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].name}-{kind[1].name}-{kind[2]}")
def test_exported_material_comes_back_the_same(keys, kind: tuple[KeyType, Curve, int]) -> None:
    material, _ = keys[kind]
    again = import_octets(material.material) if kind[0] is KeyType.OCT else import_pkcs8(material.material)
    assert (again.key_type, again.curve, again.size_bits) == kind
    assert again.public_key_der == material.public_key_der
    assert again.material.equals(material.material)


def test_imports_that_the_pool_does_not_hold_are_refused() -> None:
    def der(key) -> SecretBytes:
        return SecretBytes(
            key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )

    strange = [
        der(rsa.generate_private_key(65537, 1024)),
        der(rsa.generate_private_key(65537, 2056)),
        der(rsa.generate_private_key(3, 2048)),
        der(ec.generate_private_key(ec.SECP224R1())),
        der(dsa.generate_private_key(2048)),
        SecretBytes(b"junk"),
        SecretBytes(b""),
    ]
    for material in strange:
        with pytest.raises(errors.InvalidField) as refused:
            import_pkcs8(material)
        assert "Error" not in refused.value.message
    for length in (0, 15, 20, 33, 64):
        with pytest.raises(errors.InvalidField):
            import_octets(SecretBytes(bytes(length)))


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


def test_the_key_generator_is_bounded() -> None:
    generator = KeyGenerator()
    try:
        with pytest.raises(errors.Overloaded):
            generator.generate(KeyType.RSA, Curve.NONE, 4096, timeout_seconds=0.0)
        made = generator.generate(KeyType.EC, Curve.P256, 0, timeout_seconds=1)
        assert made.size_bits == 256
    finally:
        generator.close()


def test_secrets_are_not_printed_pickled_or_compared() -> None:
    """G3."""
    secret = SecretBytes(b"hidden octets")
    assert "hidden" not in f"{secret} {secret!r}"
    for misuse in (lambda: pickle.dumps(secret), lambda: secret == secret, lambda: hash(secret)):
        with pytest.raises(TypeError):
            misuse()
    assert secret.equals(SecretBytes(b"hidden octets"))
