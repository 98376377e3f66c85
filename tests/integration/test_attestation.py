"""G3, G5: evidence of a real pool: for clients, for peers, and for officers before they open a share."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hsm_pool import settings
from hsm_pool.cli.main import mhsm as mhsm_command
from hsm_pool.client import aio
from hsm_pool.enclave import admission, key_attestation
from hsm_pool.enclave.claims import DebugStatus
from hsm_pool.enclave.evidence import (
    Attester,
    certificate_key,
    client_report_data,
    exchange_key_report_data,
    measurement,
)
from hsm_pool.enclave.healing import HealAttempt
from hsm_pool.enclave.key_attestation import KeyAttestation
from hsm_pool.enclave.verifier import Expected, TrustAnchors, Verifier
from hsm_pool.errors import InvalidField
from hsm_pool.settings import PartitionSettings
from mhsm.keys.v1 import keys_pb2
from mhsm.peer.v1 import peer_pb2, peer_pb2_grpc
from security_domain.encoding import decode
from tests.running_pool import RunningPool, TestOfficer, mhsm, until
from tests.unit.attested import TestPool, claims_of

pytestmark = pytest.mark.pool
NONCE = b"0123456789abcdef"
REFUSED = 6
SECRET = bytes(range(60, 92))


def here(*arguments: str) -> Result:
    """Run the mhsm command in this process."""
    return CliRunner().invoke(mhsm_command, arguments)


def verifier_of(pool: RunningPool) -> Verifier:
    directory = pool.directory / "pki"
    anchors = TrustAnchors.load(directory / "platform-root.crt", directory / "owner-root.crt")
    return Verifier(anchors, admission.load(None))


@pytest.mark.parametrize("client", ["administrator", "application"])
def test_a_client_gets_fresh_evidence_of_every_partition(pool: RunningPool, client: str) -> None:
    """Under both roots, for the client's nonce; it says what runs and which keys are whose."""
    verifier = verifier_of(pool)
    with pool.client(client) as connected:
        for index in range(3):
            evidence = connected.evidence(index, NONCE)
            expected = Expected(
                NONCE, client_report_data(NONCE), pool_id=pool.connection.pool_id, partition_index=index
            )
            claims = verifier.verify(evidence, expected)
            pki = pool.directory / f"nodes/{index}/pki"
            keys = [
                hashlib.sha256(certificate_key((pki / f"{p}.crt").read_bytes())) for p in ("client", "peer")
            ]
            assert [claims.client_tls_key, claims.peer_tls_key] == [key.digest() for key in keys]
            assert (claims.measurement, claims.signer) == (measurement(), b"")
            assert claims.debug_status is DebugStatus.DISABLED_SINCE_BOOT
            assert claims.boot_count == connected.partition_status(index).incarnation
        for nonce in (b"", NONCE[:-1], b"x" * 65):
            with pytest.raises(InvalidField):
                connected.evidence(0, nonce)


def test_evidence_is_asked_for_without_threads_too(pool: RunningPool) -> None:
    """The asyncio client asks the same partition the same question."""

    async def ask() -> Any:
        async with aio.AsyncPool(pool.connection, "application") as connected:
            return await connected.evidence(2, NONCE)

    expected = Expected(NONCE, client_report_data(NONCE), partition_index=2)
    assert verifier_of(pool).verify(asyncio.run(ask()), expected).partition_index == 2


def test_attest_shows_keeps_and_verifies(pool: RunningPool, tmp_path: Path) -> None:
    """The command on a pool, and on a machine that has nothing but two roots and a file."""
    kept, data_dir = tmp_path / "evidence.json", ("--data-dir", str(pool.directory))
    made = json.loads(mhsm("attest", "--json", "--output", str(kept), *data_dir).stdout)
    assert [entry["claims"]["sub"][-1] for entry in made["partitions"]] == ["0", "1", "2"]
    assert {entry["claims"]["eat_nonce"] for entry in made["partitions"]} == {made["nonce"]}
    roots = []
    for name in ("platform-root", "owner-root"):
        shutil.copy(pool.directory / f"pki/{name}.crt", tmp_path)
        roots += [f"--{name}", str(tmp_path / f"{name}.crt")]
    offline = ("attest", "--json", "--verify", str(kept), "--data-dir", str(tmp_path / "nothing"))
    again = json.loads(mhsm(*offline, "--nonce", made["nonce"], *roots).stdout)
    assert again["partitions"] == made["partitions"]
    assert again["root_words"] == made["root_words"]

    def ended(*arguments: str) -> int:
        return here(*arguments).exit_code

    assert ended(*offline, "--nonce", made["nonce"]) == 1, "no roots, no verification"
    assert ended(*offline, "--nonce", NONCE.hex(), *roots) == REFUSED, "another nonce"
    exchanged = ["--platform-root", roots[3], "--owner-root", roots[1]]
    assert ended(*offline, "--nonce", made["nonce"], *exchanged) == REFUSED, "other roots"
    policy = tmp_path / "policy.json"
    policy.write_text(admission.default_document().replace(measurement().hex(), "00" * 48))
    one = here("attest", "--partition", "1", "--policy", str(policy), *data_dir)
    assert (one.exit_code, "mhsm.measurement" in one.stderr) == (REFUSED, True)
    for junk in ("{}", '{"evidence": []}', '{"evidence": [{"partition": 0}]}', "[" * 9999):
        bad = tmp_path / "junk.json"
        bad.write_text(junk)
        assert ended("attest", "--verify", str(bad), "--nonce", made["nonce"], *roots) == 1
    for wrong in (("--nonce", "00"), ("--nonce", "xyz"), ("--verify", str(kept)), ("--partition", "3")):
        assert ended("attest", *wrong, *data_dir) == 2
    assert ended("attest", "--output", str(kept), *data_dir) == 1, "nothing is overwritten"


# -- keys --------------------------------------------------------------------------------


def test_what_a_key_is_can_be_proved_without_the_pool(pool: RunningPool, tmp_path: Path) -> None:
    """G3, G6: the commands on a pool, and on a machine that has nothing but two roots and a file."""
    data_dir = ("--data-dir", str(pool.directory))
    with pool.client("application") as client:
        made = client.create_key("attested", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P384)
        client.import_key("attested-oct", octets=SECRET)
        client.create_key("other", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P384)
    kept, oct_kept = tmp_path / "attested.json", tmp_path / "oct.json"
    written = json.loads(
        mhsm("key", "attestation", "attested", "--json", "--output", str(kept), *data_dir).stdout
    )
    assert written["name"] == made.name
    mhsm("key", "attestation", "attested-oct", "--output", str(oct_kept), *data_dir)
    mhsm("key", "public-key", "attested", "--output", str(tmp_path / "attested.pem"), *data_dir)
    mhsm("key", "public-key", "other", "--output", str(tmp_path / "other.pem"), *data_dir)
    roots = []
    for name in ("platform-root", "owner-root"):
        shutil.copy(pool.directory / f"pki/{name}.crt", tmp_path)
        roots += [f"--{name}", str(tmp_path / f"{name}.crt")]
    offline = ("--json", "--data-dir", str(tmp_path / "nothing"), *roots)

    def verified(file: Path, *options: str) -> dict[str, Any]:
        done = here("key", "verify-attestation", str(file), *options, *offline)
        assert done.exit_code == 0, done.stderr
        claims: dict[str, Any] = json.loads(done.stdout)["claims"]
        return claims

    claims = verified(kept, "--public-key", str(tmp_path / "attested.pem"))
    assert claims["iss"].startswith(f"spiffe://{pool.connection.pool_id}/partition/")
    assert (claims["sub"], claims["key_type"], claims["curve"]) == (made.name, "EC", "P-384")
    assert claims["public_key"] == hashlib.sha256(made.public_key_der).hexdigest()
    assert (claims["exportable"], claims["origin"]) == (False, "generated")
    symmetric = verified(oct_kept)
    assert (symmetric["key_type"], symmetric["size_bits"], symmetric["origin"]) == ("oct", 256, "imported")
    assert "public_key" not in symmetric
    content = json.loads(oct_kept.read_text())["attestation"]
    octets = b"".join(decode(content[name]) for name in ("certificatePemFile", "privateKeyAttestation"))
    assert SECRET not in octets
    assert set(content) == {"certificatePemFile", "privateKeyAttestation", "version"}

    def refused(file: Path, *options: str) -> int:
        return here("key", "verify-attestation", str(file), *offline, *options).exit_code

    exchanged = ["--platform-root", roots[3], "--owner-root", roots[1]]
    assert refused(kept, *exchanged) == REFUSED, "other roots"
    assert refused(kept, "--public-key", str(tmp_path / "other.pem")) == REFUSED
    assert refused(oct_kept, "--public-key", str(tmp_path / "other.pem")) == REFUSED
    bad = tmp_path / "bad.json"
    bad.write_text(
        kept.read_text().replace(made.name, f"{made.name[:-1]}{'0' if made.name[-1] != '0' else '1'}")
    )
    assert refused(bad) == REFUSED, "the name in the file is another one"
    for junk in ("{}", '{"name": "x", "attestation": {}}', "[" * 9999):
        bad.write_text(junk)
        assert refused(bad) == 1
    assert here("key", "attestation", "attested", "--output", str(kept), *data_dir).exit_code == 1, "kept"


def test_a_partition_attests_a_key_the_same_after_an_update(pool: RunningPool) -> None:
    """Whichever partition is asked, the claims are the same; an ordinary read has no attestation."""
    anchors = TrustAnchors.load(
        pool.directory / "pki/platform-root.crt", pool.directory / "pki/owner-root.crt"
    )
    said = set()
    with pool.client("application") as client:
        made = client.create_key("updated", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048)
    for index in range(3):
        with pool.client("application", partition=index) as client:
            before = client.get_key_attestation(made.name)
            client.update_key(made.name, tags={"round": str(index)})
            after = client.get_key_attestation("keys/updated")
            assert after.attestation == before.attestation
            assert after.key == client.get_key(made.name)
        found = KeyAttestation(
            after.attestation.certificates_pem,
            after.attestation.private_key_attestation,
            after.attestation.public_key_attestation,
        )
        claims = key_attestation.verify(found, anchors, datetime.now(UTC))
        assert claims.partition_index == index
        said.add(dataclasses.replace(claims, partition_index=0))
    assert len(said) == 1
    assert "attestation" not in {field.name for field in keys_pb2.Key.DESCRIPTOR.fields}


# -- peers -------------------------------------------------------------------------------


def test_a_stolen_peer_identity_alone_is_given_nothing(pool: RunningPool, tmp_path: Path) -> None:
    """G3: TLS as partition 2 is not enough: without its platform's and owner's keys nobody is admitted."""
    chosen = settings.load(PartitionSettings, pool.directory / "nodes/2/partition.json")
    identity = chosen.peer_plane
    certificate = Path(identity.certificate_file).read_bytes()
    credentials = grpc.ssl_channel_credentials(
        Path(identity.ca_file).read_bytes(), Path(identity.key_file).read_bytes(), certificate
    )
    thief = TestPool(tmp_path / "thief", chosen.pool_id).nodes[2]
    verifier, tls_key = verifier_of(pool), certificate_key(certificate)
    genuine = Attester(chosen, 99, debug=lambda: DebugStatus.DISABLED_SINCE_BOOT)
    # Partition 2 was seen at its first start at least: a disk that was put back comes before that.
    rolled_back = Attester(chosen, 0, debug=lambda: DebugStatus.DISABLED_SINCE_BOOT)
    debugged = Attester(chosen, 99)  # of this process, to which the kernel lets others attach

    def heal(attester: Attester, change: Callable[[peer_pb2.HealRequest], None]) -> peer_pb2.HealResponse:
        with grpc.secure_channel(pool.connection.partitions[0].peer_endpoint, credentials) as channel:
            stub = peer_pb2_grpc.PeerServiceStub(channel)
            nonce = stub.BeginHeal(peer_pb2.BeginHealRequest(), timeout=10).nonce
            request = HealAttempt(attester, verifier, chosen.pool_id, tls_key).request(nonce)
            change(request)
            response: peer_pb2.HealResponse = stub.Heal(request, timeout=10)
            return response

    def one_root(request: peer_pb2.HealRequest) -> None:
        request.evidence.owner_token = thief.owner.token(claims_of(request.evidence).encode())

    cases: tuple[tuple[Attester, Callable[[peer_pb2.HealRequest], None]], ...] = (
        (thief.attester, lambda _: None),
        (genuine, lambda request: request.ClearField("evidence")),
        (genuine, one_root),
        (debugged, lambda _: None),
        (rolled_back, lambda _: None),
    )
    for attester, change in cases:
        with pytest.raises(grpc.RpcError) as refused:
            heal(attester, change)
        status = rpc_status.from_call(refused.value)
        info = error_details_pb2.ErrorInfo()
        status.details[0].Unpack(info)
        assert (refused.value.code(), info.reason) == (grpc.StatusCode.PERMISSION_DENIED, "EVIDENCE_REFUSED")
    # Control: the very same request with all of its keys is answered, so the keys were the reason.
    assert heal(genuine, lambda _: None).sealed_pool_keys


def test_the_admission_policy_of_the_pool_decides(pool: RunningPool) -> None:
    """G5: a partition whose policy no peer meets stays without keys; with the policy gone it heals."""
    policy = pool.directory / "policy/admission-policy.json"
    strict = json.loads(admission.default_document())
    strict["anyOf"][0]["allOf"].append({"claim": "mhsm.security_version", "greaterOrEquals": 99})
    policy.write_text(json.dumps(strict))
    log = pool.directory / "nodes/1/logs/partition.log"
    try:
        mhsm("kill", "1", "--data-dir", str(pool.directory))
        pool.await_states(["SERVING", "LOCKED", "SERVING"])
        with pool.client() as connected:  # who has no keys can say what he is, too
            expected = Expected(NONCE, client_report_data(NONCE), partition_index=1)
            assert verifier_of(pool).verify(connected.evidence(1, NONCE), expected)
        until(lambda: "greaterOrEquals 99" in log.read_text(), 10, "the log says why")
        assert "refuse this one's evidence, or it theirs" in pool.status(1).state_reason, (
            "no quorum is needed"
        )
    finally:
        policy.unlink()
    mhsm("kill", "1", "--data-dir", str(pool.directory))
    pool.await_states(["SERVING"] * 3)


# -- officers ----------------------------------------------------------------------------


def test_a_share_is_opened_for_an_attested_exchange_key_only(
    pool: RunningPool, officers: list[TestOfficer], tmp_path: Path
) -> None:
    """G4: whoever puts his own exchange key into the attempt file learns no share.

    The officer's key file holds no key in the refused cases: the command ends before it is read.
    """
    attempt, domain, key, no_key = (tmp_path / name for name in ("attempt", "domain", "key", "no-key"))
    domain.write_bytes(pool.file)
    key.write_bytes(
        officers[0].key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    no_key.write_text("no key")
    data_dir = ("--data-dir", str(pool.directory))
    mhsm("security-domain", "verify", "--partition", "1", "--output", str(attempt), *data_dir)
    genuine = json.loads(attempt.read_text())
    attempt_id = base64.b64decode(genuine["attempt_id"])
    own = X25519PrivateKey.generate().public_key().public_bytes_raw()

    def submit(content: dict[str, Any], key_file: Path, *options: str) -> Any:
        used, output = tmp_path / os.urandom(4).hex(), tmp_path / os.urandom(4).hex()
        used.write_text(json.dumps(content))
        completed = here(
            "security-domain", "submit-share", "--attempt", str(used), "--security-domain", str(domain),
            "--officer-key", str(key_file), "--output", str(output), *(options or data_dir),
        )  # fmt: skip
        return completed.exit_code, completed.stderr, output

    def evidence_by(attester: Attester, exchange_key: bytes, expires_at: int = 2**40) -> dict[str, str]:
        data = exchange_key_report_data(attempt_id, exchange_key)
        made = attester.attest(attempt_id, data, exchange_key, expires_at)
        return {
            "platform_token": base64.b64encode(made.platform_token).decode(),
            "owner_token": base64.b64encode(made.owner_token).decode(),
        }

    thief = TestPool(tmp_path / "thief", pool.connection.pool_id)
    chosen = settings.load(PartitionSettings, pool.directory / "nodes/1/partition.json")
    hardened = Attester(chosen, 1, debug=lambda: DebugStatus.DISABLED_SINCE_BOOT)
    genuine_key = base64.b64decode(genuine["exchange_public_key"])
    own_key = {"exchange_public_key": base64.b64encode(own).decode()}
    refused: dict[str, dict[str, Any]] = {
        "another exchange key": own_key,
        "absent": {"evidence": {"platform_token": "", "owner_token": ""}},
        "platform's token does not verify": {
            **own_key,
            "evidence": evidence_by(thief.nodes[1].attester, own),
        },
        "another partition": {"partition": 2},
        "not fresh": {"attempt_id": base64.b64encode(os.urandom(16)).decode()},
        "no such exchange key": {"exchange_public_key": ""},
        "dbgstat": {"evidence": evidence_by(Attester(chosen, 1), genuine_key)},
        "expired": {"evidence": evidence_by(hardened, genuine_key, 1)},
    }
    for text, change in refused.items():
        code, stderr, output = submit({**genuine, **change}, no_key)
        assert (code, text in stderr, output.exists()) == (REFUSED, True, False), (text, stderr)
    without = {name: value for name, value in genuine.items() if name != "evidence"}
    assert submit(without, no_key)[0] == 1, "an attempt file without evidence is none"
    wrong_pool = [
        str(part)
        for name, root in (("platform-root", thief.platform_root), ("owner-root", thief.owner_root))
        for part in (f"--{name}", _written(tmp_path / f"{name}.crt", root.certificate_pem))
    ]
    assert submit(genuine, no_key, *wrong_pool)[0] == REFUSED, "another pool"
    # Controls: the genuine file comes as far as the key, and with the right key to a submission.
    assert submit(genuine, no_key)[0] == 1
    code, stderr, output = submit(genuine, key)
    assert (code, output.exists()) == (0, True), stderr
    assert genuine["exchange_key_words"] in stderr
    assert genuine["root_words"]["owner"] in stderr
    mhsm("security-domain", "cancel", "--attempt", str(attempt), *data_dir)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
