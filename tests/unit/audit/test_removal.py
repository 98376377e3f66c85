"""G7: the oldest records go when the chain says so, and nobody else can say it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsm_pool.audit import files, query
from hsm_pool.audit.checkpoint import Note, origin
from hsm_pool.audit.record import Operation, own_record
from hsm_pool.audit.retention import KeptFrom
from hsm_pool.audit.tree import Forgotten, Tree, leaf_hash
from hsm_pool.audit.verify import Report
from tests.unit.audit.logs import Honest, ThreeLogs, verify


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreeLogs]:
    """Logs with small files of records and of checkpoints."""
    monkeypatch.setattr("hsm_pool.audit.history._FILE_BYTES", 3_000)
    three = ThreeLogs(tmp_path / "pool")
    yield three
    three.close()


def _bound(logs: ThreeLogs, index: int = 0, retention_bytes: int = 10_000) -> None:
    trail = logs.trails[index]
    trail.log._file_bytes, trail.removals.retention_bytes = 4_000, retention_bytes


def _fill(logs: ThreeLogs, index: int = 0, rounds: int = 6) -> None:
    for _ in range(rounds):
        logs.read(index, 12)
        logs.checkpoint()


def _first(logs: ThreeLogs, index: int = 0) -> int:
    return query.first_index(logs.log_directory(index))


def _texts(report: Report) -> str:
    return "\n".join(f"{finding.partition}: {finding.what}" for finding in report.findings)


def _assert_verifies(logs: ThreeLogs) -> None:
    report = verify(logs.directory, logs.pool_id)
    assert report.ok, _texts(report)


def test_the_oldest_files_go_with_the_retention(logs: ThreeLogs) -> None:
    _bound(logs)
    _fill(logs)
    logs.note(0)
    kept = logs.kept[0]
    assert kept.first_record > 0
    logs.note(0)
    # Removed now, they would be missed if this disk is the only one that has it on record.
    logs.checkpoint()
    logs.note(0, elsewhere=0)
    assert _first(logs) == 0
    logs.restart(0)
    _bound(logs)
    logs.read(0)
    logs.note(0)
    # Nor is it the word of this log before its checkpoint covers it.
    logs.note(0)
    assert _first(logs) == 0
    logs.checkpoint()
    logs.note(0)
    assert _first(logs) == kept.first_record
    logs.checkpoint()
    _assert_verifies(logs)
    log = logs.trails[0].log
    assert sum(path.stat().st_size for path in files.listed(log.directory, files.RECORDS)) < 14_000
    with pytest.raises(Forgotten):
        log.inclusion_proof(0, log.size)
    assert log.inclusion_proof(kept.first_record, log.size)


def test_a_removal_that_a_kill_interrupts_is_no_cut(logs: ThreeLogs, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every point of a removal the log verifies; after a restart it is completed."""
    directory = logs.log_directory(0)
    unlink = Path.unlink
    verified: list[str] = []

    def verified_before(path: Path, missing_ok: bool = False) -> None:
        if path.parent == directory:
            _assert_verifies(logs)
            verified.append(path.name)
        unlink(path, missing_ok)

    _bound(logs)
    _fill(logs)
    logs.note(0)
    # Killed when the chain has taken note of it: nothing is gone.
    logs.trails[0].log.close()
    logs.trails[0].history.close()
    _assert_verifies(logs)
    logs.trails[0] = logs._open(0)
    _bound(logs)
    logs.note(0)
    logs.checkpoint()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", verified_before)
        logs.note(0)
    assert {name.partition("-")[0] for name in verified} == {"records", "checkpoints"}
    assert _first(logs) > 0
    logs.checkpoint()
    _assert_verifies(logs)


def test_retention_keeps_logs_that_verify(logs: ThreeLogs) -> None:
    """Also when the records of one removal are removed by another partition, and one log is idle."""
    _bound(logs, 0)
    _fill(logs, 0)
    for _ in range(3):
        logs.note(0)
        logs.checkpoint()
    kept, claimed = _first(logs, 0), logs.sequence
    assert kept > 0
    for index in (1, 2):
        _bound(logs, index)
    for _ in range(4):
        for index in (1, 2):
            logs.mutate()
            _fill(logs, index, rounds=3)
            logs.note(index)
            logs.checkpoint()
    assert _first(logs, 0) == kept
    assert [log.sequences[0] > claimed for log in verify(logs.directory, logs.pool_id).logs[1:]] == [True] * 2
    logs.restart(0)
    logs.checkpoint()
    _assert_verifies(logs)


def test_a_removal_while_an_export_is_read_is_no_cut(logs: ThreeLogs, tmp_path: Path) -> None:
    """The logs of the others were read before it; what they witnessed is read again at last."""
    _bound(logs)
    _fill(logs)
    export = tmp_path / "export"
    for index in (1, 2):
        shutil.copytree(logs.log_directory(index), export / f"nodes/{index}/audit")
    for _ in range(3):
        logs.note(0)
        logs.checkpoint()
    assert _first(logs) > 0
    shutil.copytree(logs.log_directory(0), export / "nodes/0/audit")
    for index in range(3):
        after = export / f"nodes/{index}/audit/{files.PEERS_AFTER}"
        shutil.copyfile(logs.log_directory(index) / files.PEERS, after)
    # The first one's own peers were read before the other logs, too.
    (export / f"nodes/0/audit/{files.PEERS}").unlink()
    shutil.copytree(logs.directory / "nodes/0/owner", export / "nodes/0/owner")
    report = verify(export, logs.pool_id)
    assert report.ok, _texts(report)


def test_removed_first_records_are_no_retention(logs: ThreeLogs) -> None:
    _bound(logs, retention_bytes=10**9)
    _fill(logs)
    _assert_verifies(logs)
    paths = files.listed(logs.log_directory(0), files.RECORDS)
    assert len(paths) > 3
    paths[0].unlink()
    assert "were removed" in _texts(verify(logs.directory, logs.pool_id))


# -- forged removals ---------------------------------------------------------------------


def _cut_beginning(audit: Path, cut: int) -> int:
    """Remove the first records of a log of one file, and the checkpoints before; return the first one kept.

    Whoever has the disk can compute the frontier that the header needs.
    """
    (path,) = files.listed(audit, files.RECORDS)
    first, *records = path.read_bytes().splitlines(keepends=True)
    tree = Tree()
    for record in records[:cut]:
        tree.append(leaf_hash(record[:-1]))
    sequence = max(files.sequence_of(record)[0] for record in records[:cut])
    header = files.Header(files.Header.parse(first, path.name).log_id, cut, tree.frontier(), sequence)
    path.unlink()
    (audit / files.records_name(cut)).write_bytes(b"".join([header.line(), *records[cut:]]))
    lines = [
        line for path in files.listed(audit, files.CHECKPOINTS) for line in path.read_bytes().splitlines()
    ]
    notes = [
        (number, Note.parse(json.loads(line)["checkpoint"]).checkpoint)
        for number, line in enumerate(lines)
        if b'"checkpoint":' in line
    ]
    begin, kept = next((number, checkpoint) for number, checkpoint in notes if checkpoint.size >= cut)
    for path in files.listed(audit, files.CHECKPOINTS):
        path.unlink()
    signers = [line for line in lines[:begin] if b'"signer"' in line]
    remaining = b"".join(line + b"\n" for line in (*signers, *lines[begin:]))
    (audit / files.checkpoints_name(kept.number)).write_bytes(remaining)
    return kept.number


def _retention_record(logs: ThreeLogs, kept: KeptFrom) -> bytes:
    identity = logs.trails[0].identity
    return own_record(
        "AuditRetention", identity, 0, firstRecord=kept.first_record, firstCheckpoint=kept.first_checkpoint
    )


def _note_record(logs: ThreeLogs, kept: KeptFrom) -> bytes:
    operation = Operation("NoteCheckpoint", logs.trails[0].identity, kept_from=(kept,))
    return operation.record(logs.sequence + 1, 1)


@pytest.mark.parametrize("claim", [_retention_record, _note_record])
def test_a_removal_that_was_forged_at_a_stopped_partition_is_detected(
    tmp_path: Path, claim: Callable[[ThreeLogs, KeptFrom], bytes]
) -> None:
    """One disk is enough to append a line: the partition signs it when it goes on, the peers cosign that."""
    logs = ThreeLogs(tmp_path / "pool")
    audit = logs.log_directory(0)
    try:
        for _ in range(4):
            logs.read(0, 10)
            logs.mutate()
            logs.checkpoint()
        logs.trails[0].close()
        (path,) = files.listed(audit, files.RECORDS)
        cut = len(path.read_bytes().splitlines()) - 1
        kept = KeptFrom(logs.trails[0].log.log_id, cut, 4)
        with path.open("ab") as stream:
            stream.write(claim(logs, kept) + b"\n")
        logs.trails[0] = logs._open(0)
        logs.read(0, 3)
        logs.mutate()
        logs.checkpoint()
        assert logs.trails[0].failure() == ""
    finally:
        logs.close()
    first_number = _cut_beginning(audit, cut)
    texts = _texts(verify(logs.directory, logs.pool_id)).splitlines()
    assert f"0: records 0 to {cut - 1} were removed" in texts
    assert f"0: checkpoints 1 to {first_number - 1} were removed" in texts


def test_a_removal_that_no_checkpoint_covers_is_no_retention(copied: Path, honest: Honest) -> None:
    """Whoever has an export can append to any log, and describe it as he likes; he signs nothing."""
    cut = 20
    kept_number = _cut_beginning(copied / "nodes/0/audit", cut)
    (path,) = files.listed(copied / "nodes/0/audit", files.RECORDS)
    kept = KeptFrom(files.read_header(path).log_id, cut, kept_number)
    sequence = 1 + verify(copied, honest.pool_id).logs[1].sequences[1]
    operation = Operation("NoteCheckpoint", f"spiffe://{honest.pool_id}/partition/0", kept_from=(kept,))
    (path,) = files.listed(copied / "nodes/1/audit", files.RECORDS)
    with path.open("ab") as stream:
        stream.write(operation.record(sequence, 1) + b"\n")
    header, *records = path.read_bytes().splitlines()
    tree = Tree()
    for record in records:
        tree.append(leaf_hash(record))
    (checkpoints,) = files.listed(copied / "nodes/1/audit", files.CHECKPOINTS)
    line = [line for line in checkpoints.read_bytes().splitlines() if b'"checkpoint":' in line][-1]
    newest = Note.parse(json.loads(line)["checkpoint"])
    name = origin(honest.pool_id, 1, files.Header.parse(header, path.name).log_id)
    forged = Note(type(newest.checkpoint)(name, tree.size, tree.root(), 1, bytes(32)), newest.signatures)
    assert forged.checkpoint.size == newest.checkpoint.size + 1
    for anchors in ((), ((forged.text, "the pool's chain"),)):
        texts = _texts(verify(copied, honest.pool_id, anchors)).splitlines()
        assert f"0: records 0 to {cut - 1} were removed" in texts
        assert f"0: checkpoints 1 to {kept_number - 1} were removed" in texts


def test_only_anchors_that_were_compared_are_counted(logs: ThreeLogs) -> None:
    _bound(logs)
    logs.read(0, 3)
    logs.checkpoint()
    old = [text for text in logs.trails[0].newest_checkpoints() if "/partition/0/" in text.partition("\n")[0]]
    _fill(logs)
    for _ in range(3):
        logs.note(0)
        logs.checkpoint()
    new = [text for text in logs.trails[0].newest_checkpoints() if "/partition/0/" in text.partition("\n")[0]]
    without = verify(logs.directory, logs.pool_id)
    report = verify(logs.directory, logs.pool_id, ((old[0], "an old backup"), (new[0], "a new backup")))
    assert report.ok, _texts(report)
    assert (report.anchors, report.anchors_before) == (without.anchors + 1, 1)
    assert without.anchors_before == 0


def _beside(directory: Path, number: int, first: int, size: int = 10**8) -> None:
    """Put a file with a well-formed header beside the records."""
    log_id = files.read_header(files.listed(directory, files.RECORDS)[0]).log_id
    path = directory / files.records_name(number)
    path.write_bytes(files.Header(log_id, first, (bytes(32),) * first.bit_count(), 0).line())
    os.truncate(path, max(size, path.stat().st_size))


def _beside_what_is_kept(directory: Path) -> None:
    first = files.read_header(files.listed(directory, files.RECORDS)[-1]).first - 1
    _beside(directory, first, first, 0)


def _rewrite_the_oldest(directory: Path) -> None:
    path = files.listed(directory, files.RECORDS)[0]
    path.write_bytes(path.read_bytes().replace(b"client/one", b"client/two", 1))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda directory: _beside(directory, 1, 1), id="a file between"),
        pytest.param(lambda directory: _beside(directory, 1, 2**40), id="under another name"),
        pytest.param(lambda directory: _beside(directory, 2**40, 2**40), id="after all others"),
        pytest.param(_beside_what_is_kept, id="a small one between"),
        pytest.param(_rewrite_the_oldest, id="changed before it goes"),
    ],
)
def test_a_file_that_is_not_the_logs_own_makes_no_record_go(
    logs: ThreeLogs, change: Callable[[Path], None]
) -> None:
    """Whoever has the disk could else make the partition itself say on the chain that its records go."""
    _bound(logs, retention_bytes=10**9)
    _fill(logs)
    before = _first(logs)
    change(logs.log_directory(0))
    _bound(logs)
    for _ in range(3):
        logs.note(0)
        logs.checkpoint()
    assert logs.kept == {}
    assert _first(logs) == before


def test_records_that_were_made_longer_stay_for_verification(logs: ThreeLogs) -> None:
    """Their file counts like any other: older ones go for it, it does not."""
    _bound(logs, retention_bytes=10**9)
    _fill(logs)
    path = files.listed(logs.log_directory(0), files.RECORDS)[-2]
    path.write_bytes(path.read_bytes().replace(b"KeyGet", b"KeyGet" * 1_000))
    _bound(logs)
    for _ in range(4):
        _fill(logs, rounds=3)
        logs.note(0)
    assert path.exists()
    assert "records were changed" in _texts(verify(logs.directory, logs.pool_id))
