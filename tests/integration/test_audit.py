"""G7 on a real pool: every operation is on record, and what is done to a log afterwards shows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hsm_pool import limits
from hsm_pool.audit import query
from hsm_pool.audit.checkpoint import Note
from hsm_pool.audit.tree import leaf_hash, verify_consistency, verify_inclusion
from hsm_pool.client import audit_calls, calls
from hsm_pool.client.channels import OPTIONS, credentials
from hsm_pool.core.roles import CRYPTO_USER
from hsm_pool.errors import AuditUnavailable, KeyNotFound, MHSMError, PermissionDenied
from mhsm.audit.v1 import audit_pb2
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2
from tests.running_pool import RunningPool, TestOfficer, mhsm, until

pytestmark = pytest.mark.pool

EC: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
DIGEST = hashlib.sha256(b"text").digest()


def records(pool: RunningPool, index: int) -> list[dict[str, Any]]:
    """Return the records of a partition's log as they lie on its disk."""
    directory = pool.directory / f"nodes/{index}/audit"
    return [json.loads(record) for _, record in query.records_from(directory, 0)]


def matching(pool: RunningPool, index: int, **fields: Any) -> list[dict[str, Any]]:
    """Return the records with these fields; key is the key's name."""
    key = fields.pop("key", None)
    return [
        record
        for record in records(pool, index)
        if (key is None or record["properties"].get("keyName") == key)
        and all(record.get(name) == value for name, value in fields.items())
    ]


def _created(pool: RunningPool, index: int) -> dict[str, Any] | None:
    found = matching(pool, index, key="recorded", operationName="KeyCreate")
    assert len(found) <= 1
    return found[0] if found else None


def test_who_was_given_which_role_and_what_was_changed_is_on_record(pool: RunningPool) -> None:
    """G7: names of principals, roles and fields; no value of a key's attributes or tags."""
    with pool.client("administrator") as administrator:
        given = administrator.create_role_assignment(
            "client/recorded", CRYPTO_USER.role_definition_id, "/keys/some"
        )
        administrator.delete_role_assignment(given.name, "/keys/some")
    with pool.client() as client:
        client.create_key("updated", **EC)
        client.update_key(
            "keys/updated", tags={"a": "a-value"}, key_attributes=calls.attributes(enabled=False)
        )

    def last(operation: str) -> dict[str, Any]:
        found = [record for index in range(3) for record in matching(pool, index, operationName=operation)]
        wanted = [entry["properties"] for entry in found if "some" in str(entry) or "updated" in str(entry)]
        return wanted[-1] if wanted else {}

    made = until(lambda: last("CreateRoleAssignment"), 30.0, "the record of the assignment")
    assert made["principalId"] == "client/recorded"
    assert made["roleDefinitionId"] == CRYPTO_USER.role_definition_id
    assert (made["scope"], made["roleAssignment"]) == ("/keys/some", given.name)
    taken = until(lambda: last("DeleteRoleAssignment"), 30.0, "the record of its end")
    assert (taken["scope"], taken["roleAssignment"]) == ("/keys/some", given.name)
    changed = until(lambda: last("KeyUpdate"), 30.0, "the record of the update")
    assert changed["changed"] == "enabled,tags"
    assert "a-value" not in str(changed)


def test_a_call_whose_request_never_came_is_on_record(pool: RunningPool) -> None:
    """Without a message, too large for us, too large for gRPC: what failed is on record, too (G7, G8)."""
    connection = pool.connection
    entry = connection.partitions[1]
    before = len(matching(pool, 1, operationName="KeySign"))
    tls = credentials(connection, "application")
    with grpc.secure_channel(entry.endpoint, tls, options=OPTIONS[:-1]) as channel:
        sign: Any = channel.stream_unary("/mhsm.crypto.v1.CryptoService/Sign", request_serializer=bytes)
        requests: tuple[list[bytes], ...] = (
            [],
            [bytes(limits.REQUEST_BYTES_MAX + 1)],
            [bytes(2 * limits.MESSAGE_BYTES_MAX)],
        )
        for request in requests:
            with pytest.raises(grpc.RpcError):
                sign(iter(request), timeout=60)

    def recorded() -> list[str]:
        found = matching(pool, 1, operationName="KeySign")[before:]
        return [record["resultDescription"] for record in found] if len(found) == len(requests) else []

    reasons = until(recorded, 30.0, "the records")
    assert reasons[:2] == ["INVALID_FIELD", "PAYLOAD_TOO_LARGE"]
    assert reasons[2] in {"REQUEST_LOST", "INVALID_FIELD"}


def test_every_operation_is_on_record_before_its_answer(pool: RunningPool) -> None:
    """No waiting anywhere: when the answer is here the record is there."""
    with pool.client(partition=1) as client:
        version = client.create_key("recorded", **EC).name.rpartition("/")[2]
        (created,) = matching(pool, 1, key="recorded", operationName="KeyCreate")
        assert created["properties"]["keyVersion"] == version
        for index in range(3):
            # On record everywhere, unless a partition was silent for T: it reads the chain when it is back.
            created = until(lambda at=index: _created(pool, at), 20, "the record at every partition")
            assert created["properties"]["partition"] == 1
            assert created["identity"].endswith("/client/application")
            assert created["callerIpAddress"] == "127.0.0.1"
        client.sign_batch("keys/recorded", "ES256", [DIGEST] * 256)
        (signed,) = matching(pool, 1, key="recorded", operationName="KeySign")
        assert signed["properties"]["items"] == 256
        assert signed["properties"]["algorithm"] == "ES256"
        assert signed["resultType"] == "Success"
        with pytest.raises(KeyNotFound):
            client.sign("keys/nowhere", "ES256", DIGEST)
        (refused,) = matching(pool, 1, key="nowhere")
        assert (refused["resultType"], refused["resultDescription"]) == ("Failed", "KEY_NOT_FOUND")
        assert refused["httpStatusCode"] == 404
        requests = [
            crypto_pb2.StreamOperationsRequest(
                correlation_id=number,
                sign=crypto_pb2.SignRequest(name=name, algorithm="ES256", digests=[DIGEST]),
            )
            for number, name in enumerate(["keys/recorded", "keys/streamed-nowhere", "keys/recorded"])
        ]
        answers = list(client.stream(requests))
        assert len(answers) == 3
    assert len(matching(pool, 1, key="recorded", operationName="KeySign")) == 3
    assert len(matching(pool, 1, key="streamed-nowhere", resultDescription="KEY_NOT_FOUND")) == 1
    before = len(matching(pool, 0, operationName="KeyGet", resultDescription="PERMISSION_DENIED"))
    with pool.client("administrator", partition=0) as administrator, pytest.raises(PermissionDenied):
        administrator.get_key("keys/recorded")
    assert len(matching(pool, 0, operationName="KeyGet", resultDescription="PERMISSION_DENIED")) == before + 1


def test_ceremonies_healing_and_the_controllers_commands_are_on_record(pool: RunningPool) -> None:
    names = {record["operationName"] for index in range(3) for record in records(pool, index)}
    assert {"SecurityDomainBackup", "SubmitShare", "Heal", "PartitionServe", "AuditLogCreate"} <= names
    shares = matching(pool, 0, operationName="SubmitShare", resultType="Success")
    assert len({record["properties"]["officer"] for record in shares}) == len(pool.officers)
    settings = str(pool.directory / "fabric" / "fabric.json")
    for verb in ("drain", "resume"):
        command = [sys.executable, "-m", "fabric_controller", verb, "2", "--settings", settings]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    pool.await_states(["SERVING"] * 3)
    for index in range(3):
        for name in ("Drain", "Resume"):
            (done,) = matching(pool, index, operationName=name, resultType="Success")
            assert done["identity"].endswith("/fabric")


def _note(pool: RunningPool, index: int, size: int = 0) -> Note:
    """Return a checkpoint of at least this size, cosigned by both others."""

    def found() -> Note | None:
        with pool.client("administrator") as client:
            answer = client.call(audit_calls.get_checkpoint(), index)
        if not answer.checkpoint:
            return None
        note = Note.parse(answer.checkpoint)
        return note if note.checkpoint.size >= size and len(note.signatures) == 3 else None

    return until(found, 30, "a checkpoint with both cosignatures")


def test_proofs_verify_against_a_cosigned_checkpoint(pool: RunningPool) -> None:
    with pool.client("administrator", partition=0) as client:
        old = _note(pool, 0).checkpoint
        for _ in range(5):
            with pytest.raises(MHSMError):
                client.get_key("keys/whatever")
        new = _note(pool, 0, old.size + 5).checkpoint
        consistent = client.call(audit_calls.get_consistency_proof(old.size, new.size))
        verify_consistency(old.size, old.root, new.size, new.root, list(consistent.proof))
        answer = client.call(audit_calls.query_records(audit_pb2.QueryRecordsRequest(start_index=3)))
        record = answer.records[0]
        proof = client.call(audit_calls.get_inclusion_proof(record.index, new.size))
        leaf = leaf_hash(record.json.encode())
        assert leaf == proof.leaf_hash
        verify_inclusion(leaf, record.index, new.size, list(proof.proof), new.root)


def test_the_commands_prove_a_record_and_that_the_log_continues_a_checkpoint(
    pool: RunningPool, tmp_path: Path
) -> None:
    """What the first one writes the second one verifies without the pool; nothing is overwritten."""
    directory = ("--data-dir", str(pool.directory))
    (tmp_path / "kept").write_text(_note(pool, 1).text)
    with pool.client(partition=1) as client, pytest.raises(KeyNotFound):
        client.get_key("keys/to-be-proved")
    # At once: the command waits for the checkpoint that covers the record.
    (found,) = (n for n, r in enumerate(records(pool, 1)) if r["properties"].get("keyName") == "to-be-proved")
    root = shutil.copyfile(pool.directory / "nodes/0/owner/root.crt", tmp_path / "root.crt")
    of_record, of_log = str(tmp_path / "record.json"), str(tmp_path / "log.json")
    arguments = ("audit", "prove", str(found), "--partition", "1", "--output", of_record, *directory)
    made = json.loads(mhsm(*arguments, "--json").stdout)
    assert [entry["partition"] for entry in made["cosigned"]] == [0, 2]
    assert mhsm(*arguments, check=False).returncode == 1
    kept = ("--old-checkpoint", str(tmp_path / "kept"))
    mhsm("audit", "prove", *kept, "--partition", "1", "--output", of_log, *directory)
    offline = ("--owner-root", str(root), "--data-dir", str(tmp_path / "no pool"), "--json")
    shown = json.loads(mhsm("audit", "verify-proof", of_record, *offline).stdout)
    assert json.loads(shown["record"])["properties"]["keyName"] == "to-be-proved"
    assert json.loads(mhsm("audit", "verify-proof", of_log, *kept, *offline).stdout)["ok"]
    output = ("--output", str(tmp_path / "refused.json"), *directory)
    for refused in (("1000000000", "--partition", "1"), (*kept, "--partition", "2")):
        assert mhsm("audit", "prove", *refused, *output, check=False).returncode == 1
    # A checkpoint of a longer log, or of another history: what there is now was cut, or rewritten.
    checkpoint = Note.parse((tmp_path / "kept").read_text()).checkpoint
    longer, another = (
        dataclasses.replace(checkpoint, size=10**9),
        dataclasses.replace(checkpoint, root=bytes(32)),
    )
    for other in (longer, another):
        (tmp_path / "kept").write_text(Note(other, ("\u2014 nobody AAAA",)).text)
        contradicted = mhsm("audit", "prove", *kept, "--partition", "1", *output, check=False)
        assert contradicted.returncode == 6
        assert f"next: mhsm audit verify --anchor {kept[1]}" in contradicted.stderr
    assert not (tmp_path / "refused.json").exists()


def test_the_command_shows_exports_and_verifies(pool: RunningPool, tmp_path: Path) -> None:
    directory = ("--data-dir", str(pool.directory))
    with pool.client(partition=2) as client, pytest.raises(KeyNotFound):
        client.get_key("keys/asked-for")
    found = mhsm("audit", "query", "--operation", "KeyGet", "--result", "Failed", *directory, "--json").stdout
    asked = [json.loads(line) for line in found.splitlines()]
    assert any(record["properties"].get("keyName") == "asked-for" for record in asked)
    assert {record["operationName"] for record in asked} == {"KeyGet"}
    of_key = mhsm("audit", "query", "--key", "asked-for", *directory, "--json").stdout.splitlines()
    assert {json.loads(line)["properties"]["keyName"] for line in of_key} == {"asked-for"}
    everything = mhsm("audit", "query", *directory, "--json").stdout.splitlines()
    of_logs = [json.loads(line)["partition"] for line in everything]
    assert of_logs != sorted(of_logs), "one log after the other"
    tail = mhsm("audit", "tail", "--lines", "5", *directory, "--json").stdout.splitlines()
    assert len(tail) == 5
    output = tmp_path / "export"
    exported = json.loads(mhsm("audit", "export", "--output", str(output), *directory, "--json").stdout)
    assert exported["partitions"] == [0, 1, 2]
    assert mhsm("audit", "export", "--output", str(output), *directory, check=False).returncode == 1
    for arguments in ((str(output),), (), (str(pool.directory),)):
        verified = json.loads(mhsm("audit", "verify", *arguments, *directory, "--json").stdout)
        assert verified["ok"], verified
        assert len(verified["logs"]) == 3
    assert verified["anchors"] == 6


def _rewritten(export: Path) -> None:
    path = next((export / "partition-1").glob("records-*"))
    path.write_bytes(path.read_bytes().replace(b'"Failed"', b'"Success"', 1))


def _cut(export: Path) -> None:
    path = next((export / "partition-1").glob("records-*"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))


def _reordered(export: Path) -> None:
    path = next((export / "partition-1").glob("records-*"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))


def _without_a_checkpoint(export: Path) -> None:
    path = next((export / "partition-1").glob("checkpoints-*"))
    lines = path.read_bytes().splitlines(keepends=True)
    places = [place for place, line in enumerate(lines) if b'"checkpoint":' in line]
    del lines[places[len(places) // 2]]
    path.write_bytes(b"".join(lines))


def _deleted(export: Path) -> None:
    shutil.rmtree(export / "partition-1")


@pytest.mark.parametrize("tamper", [_rewritten, _cut, _reordered, _without_a_checkpoint, _deleted])
def test_what_is_done_to_an_export_ends_verify_with_code_6(
    pool: RunningPool, tmp_path: Path, tamper: Callable[[Path], None]
) -> None:
    with pool.client(partition=1) as client, pytest.raises(KeyNotFound):
        client.get_key("keys/for-the-record")
    _note(pool, 1, len(records(pool, 1)))
    output = tmp_path / "export"
    mhsm("audit", "export", "--output", str(output), "--data-dir", str(pool.directory))
    tamper(output)
    verified = mhsm("audit", "verify", str(output), check=False)
    assert verified.returncode == 6, verified.stdout
    assert "partition 1" in verified.stderr


PLAN = """\
title: A look at the clock
purpose: To be tested
steps:
  - {actor: witness, action: Looks at the clock, expected: It goes}
"""


def _forget_all_witnesses(export: Path, index: int, size: int) -> None:
    """Cut a log and its checkpoints to a size that fits, everywhere: what only an anchor can contradict."""
    for peers in export.glob("partition-*/peers*.json"):
        peers.unlink()
    for checkpoints in export.glob("partition-*/checkpoints-*"):
        lines = checkpoints.read_bytes().splitlines(keepends=True)
        checkpoints.write_bytes(b"".join(line for line in lines if b'"cosignatures"' not in line))
    document = json.loads((export / "export.json").read_text())
    (export / "export.json").write_text(json.dumps({**document, "audit_checkpoints": []}))
    path = next((export / f"partition-{index}").glob("checkpoints-*"))
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        value = json.loads(line)
        if "checkpoint" in value and Note.parse(value["checkpoint"]).checkpoint.size > size:
            break
        kept.append(line)
    path.write_bytes(b"".join(kept))
    path = next((export / f"partition-{index}").glob("records-*"))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: size + 1]))


def test_backups_and_ceremony_records_anchor_the_logs(pool: RunningPool, tmp_path: Path) -> None:
    """Even if all three disks are made to agree on a shorter log, a backup kept elsewhere says no."""
    directory = ("--data-dir", str(pool.directory))
    size = _note(pool, 0).checkpoint.size
    with pool.client(partition=0) as client:
        for _ in range(3):
            with pytest.raises(KeyNotFound):
                client.get_key("keys/before-the-backup")
    _note(pool, 0, size + 3)
    mhsm("backup", "create", "--output", str(tmp_path / "backup"), *directory)
    manifest = tmp_path / "backup" / "manifest.json"
    assert len(json.loads(manifest.read_text())["audit_checkpoints"]) >= 3
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "answers.json").write_text('{"parameters": {}, "confirm": ["continue"]}')
    record = tmp_path / "transcript.json"
    answers = ("--answers", str(tmp_path / "answers.json"))
    mhsm("ceremony", "run", str(tmp_path / "plan.yaml"), *answers, "--output", str(record), *directory)
    mhsm("ceremony", "verify", str(record))
    output = tmp_path / "export"
    mhsm("audit", "export", "--output", str(output), *directory)
    for anchor in (manifest, record):
        assert mhsm("audit", "verify", str(output), "--anchor", str(anchor), check=False).returncode == 0
    _forget_all_witnesses(output, 0, size)
    for anchor in (manifest, record):
        verified = mhsm("audit", "verify", str(output), "--anchor", str(anchor), check=False)
        assert verified.returncode == 6
        assert anchor.name in verified.stderr


@pytest.mark.slow
def test_the_chain_takes_note_of_checkpoints(pool: RunningPool) -> None:
    """A log whose own disk and both witnesses are lost still contradicts the chain."""

    def noted() -> set[int]:
        with pool.client("administrator") as client:
            texts = client.call(audit_calls.get_checkpoint(), 1).noted_checkpoints
        notes = [Note.parse(text) for text in texts]
        assert all(len(note.signatures) >= 2 for note in notes)
        return {note.checkpoint.partition for note in notes}

    until(lambda: noted() == {0, 1, 2}, 90, "notes of all three logs")


@pytest.fixture
def small_disk_pool(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> Iterator[RunningPool]:
    """A pool whose partition 0 has its audit log on a real file system of 512 KiB."""
    pool = make_pool(attended=False)
    pool.activate(officers, 2)
    pool.down()
    place = pool.directory / "nodes/0/audit"
    aside = place.with_name("audit-before")
    place.rename(aside)
    place.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here; tests/unit/audit/test_log.py limits a file's size")
    shutil.copytree(aside, place, dirs_exist_ok=True)
    pool.up()
    pool.await_states(["SERVING"] * 3)
    yield pool
    pool.down()
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_one_partition_and_costs_no_record(small_disk_pool: RunningPool) -> None:
    pool = small_disk_pool
    place = pool.directory / "nodes/0/audit"
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        while True:
            try:
                if not stream.write(bytes(1024)):
                    break
            except OSError:
                break

    def refused() -> bool:
        try:
            with pool.client(partition=0) as client:
                client.get_key("keys/nowhere")
        except AuditUnavailable as error:
            assert error.definite
            return True
        except MHSMError:
            return False
        return False

    until(refused, 30, "partition 0 refuses operations")
    status = pool.status(0)
    assert status is not None
    assert "No space left" in status.audit_failure
    # The pool goes on, at the other two, and no write waits for partition 0 for longer than a lease.
    with pool.client() as client:
        client.create_key("made-meanwhile", **EC)
    assert matching(pool, 1, key="made-meanwhile")
    assert not matching(pool, 0, key="made-meanwhile")
    ballast.unlink()
    pool.await_states(["SERVING"] * 3)
    until(lambda: bool(matching(pool, 0, key="made-meanwhile")), 30, "partition 0 has caught up")
    assert matching(pool, 0, operationName="AuditLogResume")
    with pool.client(partition=0) as client:
        client.get_key("keys/made-meanwhile")
    for index in range(3):
        _note(pool, index, len(records(pool, index)))
    assert mhsm("audit", "verify", str(pool.directory), check=False).returncode == 0
