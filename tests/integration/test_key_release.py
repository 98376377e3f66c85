"""Secure key release on a real pool, with the development profile's attestation authority (G2, G3)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from hsm_pool.audit import query
from hsm_pool.client import calls, tokens
from hsm_pool.client.aio import AsyncPool
from hsm_pool.client.pool import Pool
from hsm_pool.core.model import KeyOperation
from hsm_pool.crypto import algorithms
from hsm_pool.errors import (
    DecryptionFailed,
    KeyNotUsable,
    KeyReleaseRefused,
    LimitExceeded,
    OperationNotPermitted,
    ReleasePolicyImmutable,
)
from mhsm.keys.v1 import keys_pb2
from security_domain.encoding import decode, encode
from tests.running_pool import RunningPool, TestOfficer, mhsm
from tests.unit.test_key_release import opened

pytestmark = pytest.mark.pool

ENVIRONMENT = rsa.generate_private_key(65_537, 2048)
KEYS_MAX = 20
SECRET = bytes(range(100, 132))
EXPORTABLE = keys_pb2.KeyAttributes(exportable=True)
CLAIMS = {"sdk-test": True, "x-ms": {"svn": 3}}


@pytest.fixture(scope="module")
def pool(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> Iterator[RunningPool]:
    """A pool that holds no more keys than this module makes, and few more."""
    limits = ("--keys-max", str(KEYS_MAX), "--versions-per-key-max", "2")
    made = make_pool(attended=True, options=limits)
    made.activate(officers, 2)
    yield made
    made.down()


def policy(pool: RunningPool, claim: str = "sdk-test", value: Any = True) -> bytes:
    authority = tokens.development_authority(pool.connection)
    conditions = [{"claim": claim, "equals": value}]
    return json.dumps({"version": "1.0.0", "anyOf": [{"authority": authority, "anyOf": conditions}]}).encode()


def attestation(pool: RunningPool, **claims: Any) -> str:
    numbers = ENVIRONMENT.public_key().public_numbers()
    key = {
        "kty": "RSA",
        "kid": "environment",
        "key_ops": ["encrypt"],
        "n": encode(numbers.n.to_bytes(256, "big")),
        "e": "AQAB",
    }
    made = tokens.development_attestation(pool.connection, {**CLAIMS, **claims}, [key])
    return str(made["attestation_token"])


def answer_of(pool: RunningPool, jws: str) -> dict[str, Any]:
    """Return what a release says, after its signature and its chain to the owner's root were checked."""
    header, payload, signature = jws.split(".")
    named = json.loads(decode(header))
    leaf, root = (x509.load_der_x509_certificate(base64.b64decode(entry)) for entry in named["x5c"])
    pinned = x509.load_pem_x509_certificate((pool.directory / "pki/owner-root.crt").read_bytes())
    assert (named["alg"], root) == ("ES256", pinned)
    leaf.verify_directly_issued_by(pinned)
    octets, public = decode(signature), leaf.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    r, s = int.from_bytes(octets[:32], "big"), int.from_bytes(octets[32:], "big")
    digest = hashlib.sha256(f"{header}.{payload}".encode()).digest()
    public.verify(utils.encode_dss_signature(r, s), digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    answer: dict[str, Any] = json.loads(decode(payload))
    return answer


def material_of(answer: dict[str, Any]) -> bytes:
    key_hsm = json.loads(decode(answer["response"]["key"]["key"]["key_hsm"]))
    assert set(key_hsm) == {"ciphertext", "header", "schema_version"}
    assert key_hsm["header"] == {"alg": "dir", "enc": answer["request"]["enc"], "kid": "environment"}
    return opened(key_hsm["header"]["enc"], ENVIRONMENT, decode(key_hsm["ciphertext"]))


def test_every_partition_releases_the_very_key_to_the_attested_environment(pool: RunningPool) -> None:
    """G3: the material comes out only under the environment's key, whatever it is wrapped with."""
    with pool.client() as client:
        made = client.import_key(
            "released",
            octets=SECRET,
            key_attributes=EXPORTABLE,
            release_policy=calls.release_policy(policy(pool)),
        )
    assert made.attributes.exportable
    assert made.release_policy.data == policy(pool)
    token = attestation(pool)
    for index, algorithm in enumerate(("", "RSA_AES_KEY_WRAP_256", "RSA_AES_KEY_WRAP_384")):
        with pool.client(partition=index) as client:
            jws = client.release_key("keys/released", token, algorithm, nonce=f"nonce {index}")
        answer = answer_of(pool, jws)
        assert SECRET not in jws.encode()
        assert encode(SECRET) not in jws
        assert answer["request"] == {
            "api-version": "mhsm.keys.v1",
            "enc": algorithm or "CKM_RSA_AES_KEY_WRAP",
            "kid": made.name,
            "nonce": f"nonce {index}",
        }
        key = answer["response"]["key"]
        assert set(key) == {"attributes", "key", "release_policy"}
        assert key["attributes"]["exportable"] is True
        assert (key["key"]["kty"], key["key"]["kid"]) == ("oct", made.name)
        assert decode(key["release_policy"]["data"]) == policy(pool)
        assert material_of(answer) == SECRET


@pytest.mark.parametrize(
    "kind",
    [
        {"key_type": keys_pb2.KEY_TYPE_RSA, "size_bits": 2048},
        {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P521},
    ],
    ids=["RSA", "EC"],
)
def test_a_made_key_is_released_with_both_halves(pool: RunningPool, kind: dict[str, Any]) -> None:
    key_id = f"made-{kind['key_type']}"
    with pool.client() as client:
        made = client.create_key(
            key_id,
            **kind,
            key_attributes=EXPORTABLE,
            release_policy=calls.release_policy(policy(pool)),
        )
        client.update_key(f"keys/{key_id}", key_attributes=calls.attributes(enabled=False))
        with pytest.raises(KeyNotUsable):
            client.release_key(made.name, attestation(pool))
        out_of_date = calls.attributes(enabled=True, expires=datetime(2020, 1, 1, tzinfo=UTC))
        client.update_key(f"keys/{key_id}", key_attributes=out_of_date)
        answer = answer_of(pool, client.release_key(made.name, attestation(pool)))
    private = serialization.load_der_private_key(material_of(answer), None)
    public = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert public == made.public_key_der, "out of date, and released all the same"
    assert "d" not in answer["response"]["key"]["key"]


def refused(client: Pool, name: str, token: str) -> tuple[str, str]:
    with pytest.raises(KeyReleaseRefused) as refusal:
        client.release_key(name, token)
    return refusal.value.message, str(refusal.value.metadata)


def test_whoever_the_policy_does_not_name_gets_nothing_and_learns_nothing(pool: RunningPool) -> None:
    """G8: a bad signature, an unknown authority and an unmet claim are answered alike."""
    release_policy = calls.release_policy(policy(pool, "x-ms.svn", 3))
    with pool.client() as client:
        client.import_key("guarded", octets=SECRET, key_attributes=EXPORTABLE, release_policy=release_policy)
        good = attestation(pool)
        header, payload, signature = good.split(".")
        raised = encode(json.dumps({**json.loads(decode(payload)), "x-ms": {"svn": 4}}).encode())
        bearer = tokens.development_token(pool.connection, "alice")["access_token"]
        seen = {
            refused(client, "keys/guarded", token)
            for token in (
                attestation(pool, **{"x-ms": {"svn": 2}}),
                attestation(pool, **{"x-ms": {"svn": "3"}}),
                f"{header}.{raised}.{signature}",
                f"{header}.{payload}.{signature[:-4]}AAAA",
                bearer,
                "",
            )
        }
        assert len(seen) == 1
        assert material_of(answer_of(pool, client.release_key("keys/guarded", good))) == SECRET
        elsewhere = json.loads(policy(pool))
        elsewhere["anyOf"][0]["authority"] = "https://another.example"
        client.update_key("keys/guarded", release_policy=calls.release_policy(json.dumps(elsewhere).encode()))
        assert {refused(client, "keys/guarded", good)} == seen, "nobody believes an unknown authority"


def test_a_changed_policy_holds_on_every_partition_at_once(pool: RunningPool) -> None:
    """G2: no partition releases under the policy that was replaced, and an immutable one stays."""
    with pool.client() as client:
        client.import_key(
            "strict",
            octets=SECRET,
            key_attributes=EXPORTABLE,
            release_policy=calls.release_policy(policy(pool)),
        )
        token = attestation(pool)
        client.release_key("keys/strict", token)
        other = policy(pool, "sdk-test", False)
        client.update_key("keys/strict", release_policy=calls.release_policy(other, immutable=True))
        for index in range(3):
            with pool.client(partition=index) as pinned:
                refused(pinned, "keys/strict", token)
        with pytest.raises(ReleasePolicyImmutable):
            client.update_key("keys/strict", release_policy=calls.release_policy(policy(pool)))
        client.create_key("kept", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=256)
        with pytest.raises(OperationNotPermitted):
            client.release_key("keys/kept", token)


def test_the_asyncio_client_releases_and_the_log_says_so(pool: RunningPool) -> None:
    """G7: name, key, version and algorithm are on record; a refusal is, too."""
    with pool.client() as client:
        made = client.import_key(
            "logged",
            octets=SECRET,
            key_attributes=EXPORTABLE,
            release_policy=calls.release_policy(policy(pool)),
        )

    async def release() -> str:
        async with AsyncPool(pool.connection, partition=0) as client:
            jws = await client.release_key("keys/logged", attestation(pool), "RSA_AES_KEY_WRAP_256")
            with pytest.raises(KeyReleaseRefused):
                await client.release_key("keys/logged", "no token")
            return jws

    assert material_of(answer_of(pool, asyncio.run(release()))) == SECRET
    records = [json.loads(octets) for _, octets in query.records_from(pool.directory / "nodes/0/audit", 0)]
    found = [
        (entry["resultType"], entry["properties"])
        for entry in records
        if entry["operationName"] == "KeyRelease" and entry["properties"].get("keyName") == "logged"
    ]
    assert [result for result, _ in found] == ["Success", "Failed"]
    assert found[0][1]["keyVersion"] == made.name.rpartition("/")[2]
    assert found[0][1]["algorithm"] == "RSA_AES_KEY_WRAP_256"


def test_the_commands_from_policy_to_opened_key(pool: RunningPool, tmp_path: Path) -> None:
    """What docs/operations.md shows, and its refusals (G8: nothing half-written)."""
    data = ("--data-dir", str(pool.directory), "--json")
    (tmp_path / "environment.pub").write_bytes(
        ENVIRONMENT.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    (tmp_path / "secret").write_bytes(SECRET)

    def run(*arguments: str, check: bool = True) -> tuple[int, dict[str, Any]]:
        done = mhsm(*arguments, *data, cwd=tmp_path, check=check)
        return done.returncode, json.loads(done.stdout) if done.returncode == 0 else {}

    run("key", "new-release-policy", "--claim", "tee=good", "--claim", "a.b=1", "--output", "policy.json")
    refusal, _ = run("key", "create", "cli", "--type", "RSA", "--exportable", check=False)
    assert refusal == 1
    _, made = run(
        *("key", "import", "cli", "--file", "secret", "--exportable", "--release-policy", "policy.json")
    )
    assert made["key"]["attributes"]["exportable"] is True
    token = ("key", "attestation-token", "--public-key", "environment.pub")
    run(*token, "--claim", "tee=good", "--claim", "a.b=1", "--output", "good.jwt")
    run(*token, "--claim", "tee=good", "--claim", "a.b=2", "--output", "bad.jwt")
    release = ("key", "release", "cli", "--output", "released.jws")
    refusal, _ = run(*release, "--attestation-token", "bad.jwt", check=False)
    assert refusal == 1
    assert not (tmp_path / "released.jws").exists()
    run(*release, "--attestation-token", "good.jwt")
    assert material_of(answer_of(pool, (tmp_path / "released.jws").read_text())) == SECRET
    refusal, _ = run(*release, "--attestation-token", "good.jwt", check=False)
    assert refusal == 1, "a file is never overwritten"
    fixing = ("key", "update", "cli", "--release-policy", "policy.json", "--immutable")
    _, changed = run(*fixing)
    assert changed["key"]["releasePolicy"]["immutable"] is True


# -- secure wrap --------------------------------------------------------------------------------

SECURE: dict[str, Any] = {
    "key_operations": [
        keys_pb2.KEY_OPERATION_SECURE_WRAP_KEY,
        keys_pb2.KEY_OPERATION_SECURE_UNWRAP_KEY,
    ]
}


def unwrapped(jws_answer: dict[str, Any], name: str, algorithm: str, wrapped: bytes) -> bytes:
    """Return the key of a secure unwrap, after what the answer says of the request was compared."""
    request = {"alg": algorithm, "api-version": "mhsm.keys.v1", "kid": name, "value": encode(wrapped)}
    assert jws_answer["request"] == request
    key_hsm = json.loads(decode(jws_answer["response"]["key_hsm"]))
    assert key_hsm["header"] == {"alg": "dir", "enc": "RSA_AES_KEY_WRAP_256", "kid": "environment"}
    return opened("RSA_AES_KEY_WRAP_256", ENVIRONMENT, decode(key_hsm["ciphertext"]))


@pytest.mark.parametrize(
    "kind",
    [
        {"key_type": keys_pb2.KEY_TYPE_RSA, "size_bits": 2048},
        *({"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": size_bits} for size_bits in (128, 192, 256)),
    ],
    ids=["RSA", "oct-128", "oct-192", "oct-256"],
)
def test_a_key_wrapped_on_one_partition_is_unwrapped_on_another_for_the_environment(
    pool: RunningPool, kind: dict[str, Any]
) -> None:
    """G3: it is new each time, and plain nowhere but in the environment; with every algorithm that fits."""
    key_id = f"wrapping-{kind['key_type']}-{kind['size_bits']}"
    with pool.client() as client:
        made = client.create_key(key_id, **kind, **SECURE, release_policy=calls.release_policy(policy(pool)))
    assert not made.attributes.exportable
    fitting = [
        name
        for name in algorithms.names(KeyOperation.SECURE_WRAP_KEY)
        if algorithms.named(name).key_type == kind["key_type"]
        and algorithms.named(name).size_bits in {0, kind["size_bits"]}
    ]
    assert len(fitting) == (1 if kind["key_type"] == keys_pb2.KEY_TYPE_RSA else 4)
    token, seen = attestation(pool), set()
    for number, algorithm in enumerate(fitting * 2):
        with pool.client(partition=number % 3) as client:
            wrapped = client.secure_wrap_key(f"keys/{key_id}", algorithm)
        with pool.client(partition=(number + 1) % 3) as client:
            jws = client.secure_unwrap_key(made.name, algorithm, wrapped, token)
        key = unwrapped(answer_of(pool, jws), made.name, algorithm, wrapped)
        assert len(key) == 32
        seen.add(key)
    assert len(seen) == 2 * len(fitting)


def test_a_secure_unwrap_is_for_whom_the_policy_names(pool: RunningPool) -> None:
    """G3, G8: whom it does not name learns nothing, and no other operation of the key gives it away."""
    with pool.client() as client:
        release_policy = calls.release_policy(policy(pool, "x-ms.svn", 3))
        made = client.create_key(
            "wrapping",
            key_type=keys_pb2.KEY_TYPE_OCT,
            size_bits=256,
            **SECURE,
            release_policy=release_policy,
        )
        wrapped = client.secure_wrap_key(made.name, "A256KW")
        bad = attestation(pool, **{"x-ms": {"svn": 2}})
        seen = set()
        for token, octets in ((bad, wrapped), ("", wrapped), (bad, b"no wrapped key"), (bad, b"")):
            with pytest.raises(KeyReleaseRefused) as refusal:
                client.secure_unwrap_key(made.name, "A256KW", octets, token)
            seen.add((refusal.value.message, str(refusal.value.metadata)))
        assert len(seen) == 1
        good = attestation(pool)
        for octets in (wrapped[:-1] + bytes([wrapped[-1] ^ 1]), wrapped[:-8], b"", bytes(70_000)):
            with pytest.raises(DecryptionFailed):
                client.secure_unwrap_key(made.name, "A256KW", octets, good)
        for attempt in (
            lambda: client.unwrap_key(made.name, "A256KW", wrapped),
            lambda: client.wrap_key(made.name, "A256KW", bytes(32)),
            lambda: client.encrypt(made.name, "A256GCM", b""),
            lambda: client.release_key(made.name, good),
        ):
            with pytest.raises(OperationNotPermitted):
                attempt()
        client.update_key(made.name, key_attributes=calls.attributes(enabled=False))
        with pytest.raises(KeyNotUsable):
            client.secure_unwrap_key(made.name, "A256KW", wrapped, good)
        out_of_date = calls.attributes(enabled=True, expires=datetime(2020, 1, 1, tzinfo=UTC))
        client.update_key(made.name, key_attributes=out_of_date)
        jws = client.secure_unwrap_key(made.name, "A256KW", wrapped, good)
        assert len(unwrapped(answer_of(pool, jws), made.name, "A256KW", wrapped)) == 32


def test_the_commands_of_secure_wrap_and_the_log(pool: RunningPool, tmp_path: Path) -> None:
    """What docs/operations.md shows; name, version and algorithm are on record (G7)."""
    data = ("--data-dir", str(pool.directory), "--json")
    (tmp_path / "policy.json").write_bytes(policy(pool))
    (tmp_path / "environment.jwt").write_text(attestation(pool))

    def run(*arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(mhsm(*arguments, *data, cwd=tmp_path).stdout)
        return found

    operations = ("--operation", "secureWrapKey", "--operation", "secureUnwrapKey")
    made = run(
        *("key", "create", "securely", "--type", "oct", "--size", "256", *operations),
        *("--release-policy", "policy.json"),
    )
    name = made["key"]["name"]
    algorithm = ("--algorithm", "A256KWPAD")
    run("key", "secure-wrap", "securely", *algorithm, "--output", "wrapped")
    run(
        *("key", "secure-unwrap", "securely", *algorithm, "--file", "wrapped"),
        *("--attestation-token", "environment.jwt", "--output", "answer.jws"),
    )
    wrapped = (tmp_path / "wrapped").read_bytes()
    answer = answer_of(pool, (tmp_path / "answer.jws").read_text())
    assert len(unwrapped(answer, name, "A256KWPAD", wrapped)) == 32
    noted = {
        (entry["operationName"], entry["properties"].get("keyVersion"), entry["properties"].get("algorithm"))
        for index in range(3)
        for entry in (
            json.loads(octets) for _, octets in query.records_from(pool.directory / f"nodes/{index}/audit", 0)
        )
        if entry["properties"].get("keyName") == "securely"
    }
    version = name.rpartition("/")[2]
    assert {
        ("SecureWrapKey", version, "A256KWPAD"),
        ("SecureUnwrapKey", version, "A256KWPAD"),
    } <= noted


def test_a_pool_holds_as_many_keys_and_versions_as_it_was_made_for(pool: RunningPool) -> None:
    """Mhsm up --keys-max, --versions-per-key-max: on every partition, and soft-deleted keys count."""
    kind: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": 128}
    with pool.client() as client:
        for _ in range(2):
            client.create_key("full", **kind)
        for number in range(KEYS_MAX - len(list(client.list_keys()))):
            client.create_key(f"more-{number}", **kind)
        client.delete_key("keys/full")
    for index in range(3):
        with pool.client(partition=index) as client:
            with pytest.raises(LimitExceeded):
                client.create_key("too-many", **kind)
            client.recover_deleted_key("keys/full")
            with pytest.raises(LimitExceeded):
                client.create_key("full", **kind)
            client.delete_key("keys/full")
