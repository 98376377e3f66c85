"""The vectors of ECDSA and ML-DSA in one form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from hsm_pool.crypto.algorithms import Algorithm
from hsm_pool.crypto.key_generation import CURVES
from hsm_pool.crypto.loaded_keys import MLDSAPublicKey
from tests.vectors.published import BY_NAME, Key, Vector, digest_of, directory, groups, left_out
from tests.vectors.test_ml_dsa import pkcs8 as ml_dsa_pkcs8
from tests.vectors.test_ml_dsa import representative
from tests.vectors.test_nist import SECTIONS, octets, p1363, pkcs8
from tests.vectors.vector_files import paragraphs

_OTHER_KEY = "another key"


def ecdsa() -> Iterator[Vector]:
    for name in ("FIPS_186-3/SigGen.txt", "FIPS_186-3/SigVer.rsp", "SECP256K1/SigGen.txt"):
        path = directory("cryptography") / "asymmetric/ECDSA" / name
        for case in paragraphs(path):
            if case["section"] not in SECTIONS or "R" not in case:
                continue
            algorithm = BY_NAME[SECTIONS[case["section"]]]
            valid = case.get("Result", "P").startswith("P")
            key = Key(kind=algorithm.name)
            if "d" in case:
                secret = ec.derive_private_key(int(case["d"], 16), CURVES[algorithm.curve])
                key = Key(pkcs8(secret).reveal())
            signature = p1363(algorithm, int(case["R"], 16), int(case["S"], 16))
            yield from _signature(
                name, case["section"], valid, key, algorithm, signature, octets(case["Msg"])
            )
    yield from _rfc6979()
    for name in ("secp256r1_sha256", "secp384r1_sha384", "secp521r1_sha512", "secp256k1_sha256"):
        algorithm = BY_NAME[{"2": "ES256", "3": "ES384", "5": "ES512"}[name[4]] + "K" * (name[7] == "k")]
        file = f"ecdsa_{name}_p1363_test"
        for group in groups(file):
            for case in group["tests"]:
                fields = (octets(case["sig"]), octets(case["msg"]))
                key = Key(kind=algorithm.name)
                yield from _signature(file, "", case["result"] == "valid", key, algorithm, *fields)


def _signature(
    file: str,
    parameters: str,
    valid: bool,
    key: Key,
    algorithm: Algorithm,
    signature: bytes,
    message: bytes,
) -> Iterable[Vector]:
    """Yield a case; where only the public half of its key is published, if every key must refuse it."""
    if key.kind:
        parameters += _OTHER_KEY
        if valid:
            left_out["the private key is not published"] += 1
            return
    digest, published = digest_of(algorithm, message), "valid" if valid else "invalid"
    yield Vector(file, parameters, published, key, algorithm, "verify", signature, digest, valid)


def _rfc6979() -> Iterator[Vector]:
    path = directory("cryptography") / "asymmetric/ECDSA/RFC6979/evppkey_ecdsa_rfc6979.txt"
    text = path.read_text()
    armoured = re.findall(
        r"^PrivateKey=(P-\d+)_PRIV\n(-----BEGIN[^-]+-----[^-]+-----END[^-]+-----)", text, re.MULTILINE
    )
    keys = {name: serialization.load_pem_private_key(pem.encode(), None) for name, pem in armoured}
    wanted = {("P-256", "SHA256"): "ES256", ("P-384", "SHA384"): "ES384", ("P-521", "SHA512"): "ES512"}
    assert {curve for curve, _ in wanted} <= keys.keys()
    for block in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^(\w+) = (.*)$", block, re.MULTILINE))
        curve = fields.get("Key", "").removesuffix("_PUB")
        found = wanted.get((curve, fields.get("DigestVerify", "")))
        if found:
            algorithm, private = BY_NAME[found], keys[curve]
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            signature = p1363(algorithm, *utils.decode_dss_signature(octets(fields["Output"])))
            message, valid = fields["Input"].strip('"').encode(), "Result" not in fields
            yield from _signature(
                path.name, curve, valid, Key(pkcs8(private).reveal()), algorithm, signature, message
            )


def ml_dsa() -> Iterator[Vector]:
    for parameters in (44, 65, 87):
        algorithm = BY_NAME[f"ML-DSA-{parameters}"]
        seeds: dict[str, Key] = {}
        for group in groups(f"mldsa_{parameters}_sign_seed_test"):
            seed = bytes.fromhex(group["privateSeed"])
            material = bytes.fromhex(group.get("privateKeyPkcs8") or ml_dsa_pkcs8(parameters, seed))
            key = Key(material, held=len(seed) == 32)
            if key.held:
                seeds[group["publicKey"]] = key
            for case in group["tests"]:
                if case["result"] == "valid" or not key.held:
                    mu, signature = (octets(case.get(field, "")) for field in ("mu", "sig"))
                    yield Vector(
                        f"mldsa_{parameters}_sign_seed_test", "", case["result"], key, algorithm, "verify",
                        signature, mu, key.held,
                    )  # fmt: skip
        yield from _ml_dsa_verify(f"mldsa_{parameters}_verify_test", algorithm, seeds)


def _ml_dsa_verify(name: str, algorithm: Algorithm, seeds: dict[str, Key]) -> Iterator[Vector]:
    for group in groups(name):
        try:
            public = serialization.load_der_public_key(bytes.fromhex(group["publicKeyDer"]))
        except ValueError:
            left_out["there is no such public key"] += len(group["tests"])
            continue
        assert isinstance(public, MLDSAPublicKey)
        key = seeds.get(group["publicKey"], Key(kind=algorithm.name))
        for case in group["tests"]:
            mu, valid = representative(public, case), case["result"] == "valid"
            if mu is None:
                left_out["there is no digest of a context that long"] += 1
            elif valid and key.kind:
                left_out["the private key is not published"] += 1
            else:
                yield Vector(
                    name, _OTHER_KEY if key.kind else "", case["result"], key, algorithm, "verify",
                    octets(case["sig"]), mu, valid,
                )  # fmt: skip
