"""The vectors of AES and HMAC in one form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from hsm_pool.crypto.algorithms import OCT_SIZES_BITS
from tests.vectors.published import BY_NAME, Vector, directory, groups, judged, oct_key
from tests.vectors.test_nist import octets
from tests.vectors.vector_files import paragraphs


def gcm() -> Iterator[Vector]:
    for size in OCT_SIZES_BITS:
        algorithm = BY_NAME[f"A{size}GCM"]
        for name in ("gcmDecrypt", "gcmEncryptExtIV"):
            path = directory("cryptography") / f"ciphers/AES/GCM/{name}{size}.rsp"
            for case in paragraphs(path):
                valid, lengths = "PT" in case, (case["IVlen"], case["Taglen"])
                yield Vector(
                    path.name,
                    "nonce {}, tag {}".format(*lengths),
                    "valid" if valid else "invalid",
                    oct_key(case["Key"]),
                    algorithm,
                    "decrypt",
                    octets(case["CT"]),
                    octets(case.get("PT", "")),
                    valid and lengths == ("96", "128"),
                    octets(case["IV"]),
                    octets(case["Tag"]),
                    octets(case["AAD"]),
                )
    for group in groups("aes_gcm_test"):
        lengths = (group["ivSize"], group["tagSize"])
        for case in group["tests"]:
            yield Vector(
                "aes_gcm_test",
                "nonce {}, tag {}, key {}".format(*lengths, group["keySize"]),
                case["result"],
                oct_key(case["key"]),
                BY_NAME[f"A{group['keySize']}GCM"],
                "decrypt",
                octets(case["ct"]),
                octets(case["msg"]),
                case["result"] == "valid" and lengths == (96, 128),
                octets(case["iv"]),
                octets(case["tag"]),
                octets(case["aad"]),
            )


def cbc() -> Iterator[Vector]:
    for size in OCT_SIZES_BITS:
        for name in ("GFSbox", "KeySbox", "MMT", "VarKey", "VarTxt"):
            path = directory("cryptography") / f"ciphers/AES/CBC/CBC{name}{size}.rsp"
            for case in paragraphs(path):
                if "PLAINTEXT" in case:
                    yield Vector(
                        path.name,
                        "",
                        "valid",
                        oct_key(case["KEY"]),
                        BY_NAME[f"A{size}CBC"],
                        "decrypt",
                        octets(case["CIPHERTEXT"]),
                        octets(case["PLAINTEXT"]),
                        True,
                        octets(case["IV"]),
                    )


def cbc_with_padding(shared: Path) -> Iterator[Vector]:
    path = shared / "wycheproof/aes_cbc_pkcs5_test.json"
    for group in json.loads(path.read_text())["testGroups"]:
        for case in group["tests"]:
            yield Vector(
                path.stem,
                f"key {group['keySize']}",
                case["result"],
                oct_key(case["key"]),
                BY_NAME[f"A{group['keySize']}CBCPAD"],
                "decrypt",
                octets(case["ct"]),
                octets(case["msg"]),
                judged(case["result"]),
                octets(case["iv"]),
            )


def _wrap(
    file: str, parameters: str, key: str, algorithm: str, wrapped: str, target: str | None, result: str
) -> Vector:
    return Vector(
        file,
        parameters,
        result,
        oct_key(key),
        BY_NAME[algorithm],
        "unwrap",
        octets(wrapped),
        octets(target or ""),
        judged(result),
    )


def key_wrap() -> Iterator[Vector]:
    keywrap = directory("cryptography") / "keywrap"
    for size in OCT_SIZES_BITS:
        for kind, algorithm in (("KW", f"A{size}KW"), ("KWP", "CKM_AES_KEY_WRAP_PAD")):
            for direction in ("AE", "AD"):
                path = keywrap / f"kwtestvectors/{kind}_{direction}_{size}.txt"
                for case in paragraphs(path):
                    target, result = case.get("P"), "valid" if "P" in case else "invalid"
                    length = f"target {case['PLAINTEXT LENGTH']}"
                    yield _wrap(path.name, length, case["K"], algorithm, case["C"], target, result)
    for case in paragraphs(keywrap / "kwp_botan.txt"):
        if "Input" in case:
            fields = (case["Key"], "CKM_AES_KEY_WRAP_PAD", case["Output"], case["Input"])
            yield _wrap("kwp_botan.txt", f"key {4 * len(case['Key'])}", *fields, "valid")
    for name in ("aes_kwp_test", "aes_wrap_test"):
        for group in groups(name):
            by_size = f"A{group['keySize']}KW"
            names = ["CKM_AES_KEY_WRAP_PAD"] if name == "aes_kwp_test" else [by_size, "CKM_AES_KEY_WRAP"]
            for case in group["tests"]:
                for algorithm in names:
                    parameters = f"{algorithm}, key {group['keySize']}"
                    fields = (case["key"], algorithm, case["ct"], case["msg"])
                    yield _wrap(name, parameters, *fields, case["result"])


def _code(file: str, algorithm: str, case: dict[str, str], result: str) -> Vector:
    """A digest is what the pool authenticates, and whole codes are what it takes."""
    row, message, code = BY_NAME[algorithm], octets(case["msg"]), octets(case["tag"])
    digest, whole = len(message) == row.digest_bytes, len(code) == row.digest_bytes
    parameters = f"{'digest' if digest else 'message is no digest'}, {'whole' if whole else 'cut'}"
    parameters += f", key {8 * len(octets(case['key']))}"
    accepted = result == "valid" and digest and whole
    return Vector(file, parameters, result, oct_key(case["key"]), row, "verify", code, message, accepted)


def hmac() -> Iterator[Vector]:
    for bits in (256, 384, 512):
        path = directory("cryptography") / f"HMAC/rfc-4231-sha{bits}.txt"
        for case in paragraphs(path):
            if "Msg" in case:
                fields = {"key": case["Key"], "msg": case["Msg"], "tag": case["MD"]}
                yield _code(path.name, f"HS{bits}", fields, "valid")


def shared_hmac(shared: Path) -> Iterator[Vector]:
    for bits in (256, 384, 512):
        path = shared / f"wycheproof/hmac_sha{bits}_test.json"
        for group in json.loads(path.read_text())["testGroups"]:
            for case in group["tests"]:
                yield _code(path.stem, f"HS{bits}", case, case["result"])
