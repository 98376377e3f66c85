"""G7: what is signed, by whom, and when: material that a key has really signed and must not have."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsm_pool.audit import files, trail
from hsm_pool.audit.checkpoint import Checkpoint, CheckpointInvalid, Note, Signer, origin
from hsm_pool.audit.record import Operation
from hsm_pool.enclave.evidence import Attester
from hsm_pool.errors import CheckpointRefused
from hsm_pool.limits import AUDIT_LOGS_MAX
from mhsm.peer.v1 import peer_pb2
from tests.unit.audit.logs import ThreeLogs, owner_root, verify


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[ThreeLogs]:
    """Logs with three checkpoints each."""
    three = ThreeLogs(tmp_path / "pool")
    for _ in range(3):
        for index in range(3):
            three.read(index, 2)
        three.checkpoint()
    yield three
    three.close()


def _findings(logs: ThreeLogs) -> str:
    return "\n".join(finding.what for finding in verify(logs.directory, logs.pool_id).findings)


def _lines(logs: ThreeLogs, index: int) -> tuple[Path, list[dict[str, object]]]:
    (path,) = files.listed(logs.log_directory(index), files.CHECKPOINTS)
    return path, [json.loads(line) for line in path.read_bytes().splitlines()]


def _checkpoints(logs: ThreeLogs, index: int = 0) -> list[Checkpoint]:
    return [
        Note.parse(line["checkpoint"]).checkpoint for line in _lines(logs, index)[1] if "checkpoint" in line
    ]


def _replace(logs: ThreeLogs, number: int, note: Note) -> None:
    """Put another note in the place of a checkpoint of log 0, or after the last one."""
    path, lines = _lines(logs, 0)
    places = [place for place, line in enumerate(lines) if "checkpoint" in line]
    if number <= len(places):
        lines[places[number - 1]] = {"checkpoint": note.text}
    else:
        lines.append({"checkpoint": note.text})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_checkpoint_of_another_signer_is_detected(logs: ThreeLogs) -> None:
    """Another partition's key is certified, too."""
    last = _checkpoints(logs)[-1]
    _replace(logs, last.number, logs.trails[1].signer.sign(last))
    assert f"checkpoint {last.number} is not signed by its partition" in _findings(logs)


@pytest.mark.parametrize(
    ("number", "changed", "expected"),
    [
        (3, {"previous": bytes(32)}, "checkpoint 3 names another one before it"),
        (4, {"size": 1}, "checkpoint 4 is of a smaller log than the one before"),
        (1, {"previous": b"x" * 32}, "the first checkpoint names one before it"),
    ],
)
def test_a_signed_checkpoint_that_does_not_follow_is_detected(
    logs: ThreeLogs, number: int, changed: dict[str, int | bytes], expected: str
) -> None:
    """The partition itself has signed it."""
    checkpoints = _checkpoints(logs)
    before = checkpoints[-1]
    following = dataclasses.replace(before, number=before.number + 1, previous=before.digest)
    checkpoint = (*checkpoints, following)[number - 1]
    forged = dataclasses.replace(checkpoint, **changed)  # type: ignore[arg-type]
    _replace(logs, number, logs.trails[0].signer.sign(forged))
    assert expected in _findings(logs)


def test_a_partition_that_cosigns_itself_is_detected(logs: ThreeLogs) -> None:
    path, lines = _lines(logs, 0)
    last = _checkpoints(logs)[-1]
    lines.append({"number": last.number, "cosignatures": [logs.trails[0].signer.cosign(last)]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "a partition has cosigned its own checkpoint" in _findings(logs)


def test_a_header_that_names_other_records_before_it_is_detected(logs: ThreeLogs) -> None:
    logs.trails[0].log._file_bytes = 1_000
    logs.read(0, 12)
    logs.checkpoint()
    path = files.listed(logs.log_directory(0), files.RECORDS)[-1]
    header, _, records = path.read_bytes().partition(b"\n")
    first = files.Header.parse(header, path.name)
    changed = dataclasses.replace(first, frontier=(bytes(32), *first.frontier[1:]))
    path.write_bytes(changed.line() + records)
    assert "its header names other records before it" in _findings(logs)


def test_what_a_witness_notes_must_be_signed(logs: ThreeLogs) -> None:
    """Else it could be made to say that it knows more than it does."""
    path = logs.log_directory(1) / files.PEERS
    document = json.loads(path.read_bytes())
    for entry in document["logs"]:
        note = Note.parse(entry["checkpoint"])
        newer = dataclasses.replace(note.checkpoint, number=note.checkpoint.number + 1)
        entry["checkpoint"] = Note(newer, note.signatures).text
    path.write_text(json.dumps(document))
    assert "peers.json: a signature of" in _findings(logs)


def test_a_key_that_another_partition_certified_is_refused(logs: ThreeLogs) -> None:
    attester = Attester(logs._settings[0], 1)
    root = owner_root(logs.directory)
    assert Signer(attester, logs.pool_id, 0, 7).public.check(root, logs.pool_id) == 0
    with pytest.raises(CheckpointInvalid, match="of another key or partition"):
        Signer(attester, logs.pool_id, 1, 7).public.check(root, logs.pool_id)


# -- what a witness cosigns --------------------------------------------------------------


def _request(logs: ThreeLogs, note: Note, signer: int = 0) -> peer_pb2.CosignRequest:
    """Return a request for a checkpoint of the size that partition 1 has seen."""
    return peer_pb2.CosignRequest(
        checkpoint=note.text,
        signer=logs.trails[signer].signer.public.message(),
        old_size=_checkpoints(logs)[-1].size,
    )


def test_a_witness_cosigns_what_follows_and_nothing_else(logs: ThreeLogs) -> None:
    last, signer = _checkpoints(logs)[-1], logs.trails[0].signer
    witness = logs.trails[1].witness
    following = dataclasses.replace(last, number=last.number + 1, previous=last.digest)
    for refused in (
        dataclasses.replace(last, number=last.number - 1),
        dataclasses.replace(last, previous=bytes(32)),
        dataclasses.replace(following, previous=bytes(32)),
    ):
        with pytest.raises(CheckpointRefused):
            witness.cosign(_request(logs, signer.sign(refused)), 0)
    signed = signer.sign(following)
    with pytest.raises(CheckpointRefused, match="does not fit"):
        witness.cosign(_request(logs, Note(following, signer.sign(last).signatures)), 0)
    with pytest.raises(CheckpointRefused, match="of another partition"):
        witness.cosign(_request(logs, signed), 2)
    with pytest.raises(CheckpointRefused, match="of another partition"):
        witness.cosign(_request(logs, logs.trails[2].signer.sign(following), 2), 2)
    assert witness.cosign(_request(logs, signed), 0).cosignature


def test_a_witness_remembers_a_bounded_number_of_logs(logs: ThreeLogs) -> None:
    signer, witness = logs.trails[0].signer, logs.trails[1].witness
    last = _checkpoints(logs)[-1]

    def begin(number: int) -> None:
        another = dataclasses.replace(last, origin=origin(logs.pool_id, 0, f"{number:032x}"), number=1)
        request = _request(logs, signer.sign(another))
        request.old_size = 0
        witness.cosign(request, 0)

    for number in range(AUDIT_LOGS_MAX - 1):
        begin(number)
    with pytest.raises(CheckpointRefused, match="too many logs"):
        begin(AUDIT_LOGS_MAX)


def test_a_cosignature_that_does_not_fit_is_not_kept(
    logs: ThreeLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail_0, last = logs.trails[0], _checkpoints(logs)[-1]

    def another(index: int, request: peer_pb2.CosignRequest) -> peer_pb2.CosignResponse:
        signer = logs.trails[index].signer
        return peer_pb2.CosignResponse(
            known_size=request.old_size, signer=signer.public.message(), cosignature=signer.cosign(last)
        )

    monkeypatch.setattr(trail_0, "_cosign_peer", another)
    logs.read(0)
    trail_0.step()
    assert trail_0.history.newest
    assert trail_0.history.newest.checkpoint.number == last.number + 1
    assert len(trail_0.history.newest.signatures) == 1


# -- what is durable before somebody relies on it ----------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that finishes no sync of records until the event is set."""
    released, fdatasync = threading.Event(), os.fdatasync

    def wait(descriptor: int) -> None:
        assert released.wait(30)
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", wait)
    monkeypatch.setattr(trail, "_SYNC_SECONDS", 0.3)
    yield released
    released.set()


def _checkpoint_numbers(logs: ThreeLogs, held: threading.Event) -> tuple[int, int]:
    """Return the newest checkpoint that is made while nothing is synced, and the one after that."""
    numbers = []
    for done in (False, True):
        if done:
            held.set()
            assert logs.trails[0].log.wait_synced(logs.trails[0].log.size, 20)
        logs.trails[0].step()
        newest = logs.trails[0].history.newest
        assert newest
        numbers.append(newest.checkpoint.number)
    return numbers[0], numbers[1]


def test_a_checkpoint_covers_only_what_is_synced(logs: ThreeLogs, held: threading.Event) -> None:
    logs.read(0)
    assert _checkpoint_numbers(logs, held) == (3, 4)


def test_what_a_killed_partition_wrote_is_synced_before_a_checkpoint(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    logs = ThreeLogs(tmp_path / "pool")
    logs.checkpoint()
    logs.read(0)
    logs.trails[0].log.close()
    logs.trails[0].history.close()
    held: threading.Event = request.getfixturevalue("held")
    logs.trails[0] = logs._open(0)
    assert _checkpoint_numbers(logs, held) == (1, 2)
    logs.close()


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that were synced, in order."""
    paths: list[str] = []
    for name in ("fsync", "fdatasync"):
        original: Callable[[int], None] = getattr(os, name)

        def record(descriptor: int, original: Callable[[int], None] = original) -> None:
            original(descriptor)
            paths.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

        monkeypatch.setattr(os, name, record)
    return paths


def test_a_checkpoint_is_durable_before_a_peer_sees_it(
    logs: ThreeLogs, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure must not let its number be given twice."""
    trail_0 = logs.trails[0]
    path, _ = _lines(logs, 0)
    seen: list[list[str]] = []
    cosign = trail_0._cosign_peer

    def looked_at(index: int, request: peer_pb2.CosignRequest) -> peer_pb2.CosignResponse:
        seen.append([entry for entry in synced if entry.startswith(str(path.parent))])
        return cosign(index, request)

    monkeypatch.setattr(trail_0, "_cosign_peer", looked_at)
    logs.read(0)
    synced.clear()
    trail_0.step()
    assert str(path) in seen[0]
    assert str(trail_0.log.file) in seen[0]


def test_a_new_file_of_records_is_durable_with_its_name(logs: ThreeLogs, synced: list[str]) -> None:
    log = logs.trails[0].log
    log._file_bytes = 1
    synced.clear()
    log.append(Operation("KeyGet", "spiffe://pool/client/one").record())
    assert str(log.directory) in synced
    assert any("records-" in path for path in synced)
