"""G7: whatever is done to a log afterwards, verification says so; an honest log passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hsm_pool.audit import files
from hsm_pool.audit.record import Operation
from hsm_pool.audit.verify import Report, Verifier
from tests.unit.audit.logs import Honest, ThreeLogs, owner_root, verify


def _records(pool: Path, index: int) -> Path:
    (path,) = (pool / f"nodes/{index}/audit").glob("records-*")
    return path


def _change(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


def _texts(report: Report) -> str:
    return "\n".join(f"{finding.partition}: {finding.what}" for finding in report.findings)


def test_an_honest_pool_verifies(honest: Honest) -> None:
    report = verify(honest.directory, honest.pool_id, ((honest.checkpoints[0], "backup"),))
    assert report.ok, _texts(report)
    assert [log.records for log in report.logs] == [39, 42, 39]
    # Seven of them: the witnesses each hold two, and the one that was given.
    assert report.anchors == 7
    assert [log.sequences for log in report.logs] == [(1, 9)] * 3
    assert all(log.covered == log.first_record + log.records for log in report.logs)
    assert all(log.cosigned == log.checkpoints for log in report.logs)


@pytest.mark.parametrize("count", [1, 7, 30])
def test_a_cut_is_detected(copied: Path, honest: Honest, count: int) -> None:
    _change(_records(copied, 0), lambda lines: lines[:-count])
    assert "the log was cut" in _texts(verify(copied, honest.pool_id))


def test_a_cut_together_with_its_checkpoints_is_detected_by_the_witnesses(
    copied: Path, honest: Honest
) -> None:
    """Whoever owns the partition's disk can make log and checkpoints fit each other again."""
    audit = copied / "nodes/0/audit"
    (checkpoints,) = audit.glob("checkpoints-*")
    lines = checkpoints.read_bytes().splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if b'"checkpoint":' in line]
    size = int(json.loads(lines[places[1]])["checkpoint"].split("\n")[1])
    checkpoints.write_bytes(b"".join(lines[: places[2]]))
    _change(_records(copied, 0), lambda records: records[: size + 1])
    report = verify(copied, honest.pool_id)
    assert "a checkpoint that partition 1 holds" in _texts(report)
    # Without the witnesses only an anchor kept elsewhere tells: that is what backups are given.
    for index in range(3):
        (copied / f"nodes/{index}/audit/peers.json").unlink()
        (path,) = (copied / f"nodes/{index}/audit").glob("checkpoints-*")
        _change(path, lambda lines: [line for line in lines if b'"cosignatures"' not in line])
    assert verify(copied, honest.pool_id).ok
    own = next(text for text in honest.checkpoints if "/partition/0/" in text.split("\n")[0])
    assert "a checkpoint that backup holds" in _texts(verify(copied, honest.pool_id, ((own, "backup"),)))


def test_a_rewritten_record_is_detected(copied: Path, honest: Honest) -> None:
    def rewrite(lines: list[bytes]) -> list[bytes]:
        lines[4] = lines[4].replace(b"client/one", b"client/two")
        return lines

    _change(_records(copied, 2), rewrite)
    assert "2: the first" in _texts(verify(copied, honest.pool_id))


def test_one_change_is_one_finding_of_each_holder_of_checkpoints(tmp_path: Path) -> None:
    """It is named with its place; all roots after it differ, too, and say no more."""
    logs = ThreeLogs(tmp_path / "pool")
    for _ in range(5):
        logs.read(0, 2)
        logs.checkpoint()
    logs.close()
    path = _records(logs.directory, 0)
    before = path.read_bytes()

    def rewrite(lines: list[bytes]) -> list[bytes]:
        lines[6] = lines[6].replace(b"client/one", b"client/two")
        return lines

    _change(path, rewrite)
    found = [finding.what for finding in verify(logs.directory, logs.pool_id).findings]
    assert len(found) == 3, found
    (own,) = (what for what in found if "that the log holds" in what)
    assert "the first 7 records are not those of checkpoint 3" in own
    assert "after record 4 records were changed" in own
    assert "2 later ones" in own
    path.write_bytes(b"".join(before.splitlines(keepends=True)[:6]))
    cut = [finding.what for finding in verify(logs.directory, logs.pool_id).findings]
    assert len(cut) == 3, cut


def test_a_root_of_another_owner_is_one_finding(copied: Path, honest: Honest, tmp_path: Path) -> None:
    another = ThreeLogs(tmp_path / "another")
    another.close()
    directories = {index: copied / f"nodes/{index}/audit" for index in range(3)}
    report = Verifier(honest.pool_id, owner_root(another.directory)).verify(directories)
    assert len(report.findings) == 1, _texts(report)
    assert "nothing else was verified" in _texts(report)


def test_reordered_records_are_detected(copied: Path, honest: Honest) -> None:
    def reorder(lines: list[bytes]) -> list[bytes]:
        lines[3], lines[10] = lines[10], lines[3]
        return lines

    _change(_records(copied, 1), reorder)
    assert "records were changed, reordered, added or removed" in _texts(verify(copied, honest.pool_id))


def test_a_record_that_was_added_is_detected(copied: Path, honest: Honest) -> None:
    _change(_records(copied, 1), lambda lines: [*lines[:6], lines[5], *lines[6:]])
    assert not verify(copied, honest.pool_id).ok


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_dropped_checkpoint_is_detected(copied: Path, honest: Honest, number: int) -> None:
    (path,) = (copied / "nodes/0/audit").glob("checkpoints-*")

    def drop(lines: list[bytes]) -> list[bytes]:
        places = [place for place, line in enumerate(lines) if b'"checkpoint":' in line]
        dropped = json.loads(lines[places[number]])["checkpoint"].partition("number ")[2].partition("\n")[0]
        signed = b'"number":' + dropped.encode() + b"}"
        return [
            line
            for place, line in enumerate(lines)
            if place != places[number] and not (b'"cosignatures"' in line and signed in line)
        ]

    _change(path, drop)
    report = verify(copied, honest.pool_id)
    assert not report.ok


def test_all_checkpoints_dropped_is_detected(copied: Path, honest: Honest) -> None:
    (path,) = (copied / "nodes/0/audit").glob("checkpoints-*")
    path.unlink()
    assert "there is no checkpoint" in _texts(verify(copied, honest.pool_id))


def test_a_deleted_log_is_detected(copied: Path, honest: Honest) -> None:
    shutil.rmtree(copied / "nodes/1/audit")
    assert "1: there is no log, although partition 0 knows one" in _texts(verify(copied, honest.pool_id))


def test_a_partition_that_is_left_out_is_detected(copied: Path, honest: Honest) -> None:
    assert "1: there is no log" in _texts(verify(copied, honest.pool_id, (), (0, 2)))


@pytest.mark.parametrize("left", [(0,), ()])
def test_logs_of_which_no_trace_is_left_are_missed(
    copied: Path, honest: Honest, left: tuple[int, ...]
) -> None:
    """G7: no witness and no anchor is needed for it: a pool has three partitions."""
    for index in left:
        (copied / f"nodes/{index}/audit/peers.json").unlink()
    texts = _texts(verify(copied, honest.pool_id, (), left)).splitlines()
    assert [f"{index}: there is no log" for index in range(3) if index not in left] == texts


def test_a_log_that_was_begun_anew_is_detected(tmp_path: Path) -> None:
    logs = ThreeLogs(tmp_path / "pool")
    try:
        logs.read(0, 5)
        logs.checkpoint()
        logs.trails[0].close()
        shutil.rmtree(logs.log_directory(0))
        logs.trails[0] = logs._open(0)
        logs.read(0, 9)
        logs.checkpoint()
        # The pool goes on and cosigns the new log; the old one is not forgotten.
        assert logs.trails[0].failure() == ""
    finally:
        logs.close()
    report = verify(logs.directory, logs.pool_id)
    assert "it was deleted or replaced" in _texts(report)
    (lost,) = report.lost
    assert (lost.checkpoint.size, lost.known) == (6, False)
    assert lost.kept_by == ("partition 1", "partition 2"), "both cosigned its last checkpoint"
    # The operator knows of this loss: the gap is stated and nothing else is forgiven.
    directories = {index: logs.log_directory(index) for index in range(3)}
    verifier = Verifier(logs.pool_id, owner_root(logs.directory))
    known = verifier.verify(directories, known_lost=[lost.log_id])
    assert known.ok, _texts(known)
    assert [entry.known for entry in known.lost] == [True]
    shutil.rmtree(logs.log_directory(0))
    verifier = Verifier(logs.pool_id, owner_root(logs.directory))
    again = verifier.verify(directories, known_lost=[lost.log_id])
    assert sorted((entry.checkpoint.size, entry.known) for entry in again.lost) == [(6, True), (10, False)]
    assert "there is no log, although partition 1 knows one" in _texts(again)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_witness_that_was_put_back_is_detected(tmp_path: Path, *, deleted: bool) -> None:
    """G7: before a log is cut to what the witness still knows, and before the other witness forgets, too."""
    logs = ThreeLogs(tmp_path / "pool")
    path = logs.log_directory(1) / files.PEERS
    try:
        logs.read(0, 3)
        logs.checkpoint()
        before = path.read_bytes()
        for index in (0, 2):
            logs.read(index, 30)
        logs.checkpoint()
    finally:
        logs.close()
    assert verify(logs.directory, logs.pool_id).ok
    if deleted:
        path.unlink()
    else:
        path.write_bytes(before)
    numbers = {
        index: json.loads(line)["number"]
        for index in (0, 2)
        for log in logs.log_directory(index).glob("checkpoints-*")
        for line in log.read_bytes().splitlines()
        if b'"cosignatures"' in line and b"/partition/1/" in line
    }
    assert _texts(verify(logs.directory, logs.pool_id)).splitlines() == [
        f"1: it cosigned checkpoint {number} of partition {index} and knows {'none' if deleted else 1} "
        "of that log: what it witnessed was put back or deleted"
        for index, number in numbers.items()
    ]


def test_a_partition_that_was_replaced_need_not_know_what_it_cosigned_before(tmp_path: Path) -> None:
    logs = ThreeLogs(tmp_path / "pool")
    try:
        logs.read(2, 3)
        logs.checkpoint()
        logs.unreachable = {2}
        logs.trails[1].close()
        shutil.rmtree(logs.log_directory(1))
        logs.trails[1] = logs._open(1)
        logs.checkpoint()
    finally:
        logs.close()
    directories = {index: logs.log_directory(index) for index in range(3)}
    verifier = Verifier(logs.pool_id, owner_root(logs.directory))
    (lost,) = verifier.verify(directories).lost
    again = Verifier(logs.pool_id, owner_root(logs.directory)).verify(directories, (), [lost.log_id])
    assert again.ok, _texts(again)


@pytest.mark.parametrize("with_log", [True, False])
def test_two_honest_keys_of_one_name_are_no_finding(tmp_path: Path, *, with_log: bool) -> None:
    """A partition whose disk was lost counts its starts anew; its audit log may be there all the same."""
    logs = ThreeLogs(tmp_path / "pool")
    try:
        for index in range(3):
            logs.read(index, 3)
        logs.checkpoint()
        if not with_log:
            logs.trails[2].close()
            shutil.rmtree(logs.log_directory(2))
            logs._incarnations[2] = 0
            logs.trails[2] = logs._open(2)
        else:
            logs.restart_without_state(2)
        for index in range(3):
            logs.read(index, 3)
        logs.checkpoint()
        assert [trail.failure() for trail in logs.trails] == [""] * 3
    finally:
        logs.close()
    directories = {index: logs.log_directory(index) for index in range(3)}
    report = Verifier(logs.pool_id, owner_root(logs.directory)).verify(directories)
    known = [lost.log_id for lost in report.lost]
    assert len(known) == (0 if with_log else 1)
    again = Verifier(logs.pool_id, owner_root(logs.directory)).verify(directories, (), known)
    assert again.ok, _texts(again)
    assert again.repeated_names == {f"{logs.pool_id}/partition/2/1": 2}


def test_an_export_of_a_running_pool_knows_its_newest_cosignatures(tmp_path: Path) -> None:
    """What is witnessed while the logs are read stands in the second copy only."""
    logs = ThreeLogs(tmp_path / "pool")
    try:
        logs.read(0, 3)
        logs.checkpoint()
        before = (logs.log_directory(1) / files.PEERS).read_bytes()
        logs.read(0, 3)
        logs.checkpoint()
    finally:
        logs.close()
    path = logs.log_directory(1) / files.PEERS
    path.rename(path.with_name(files.PEERS_AFTER))
    path.write_bytes(before)
    report = verify(logs.directory, logs.pool_id)
    assert report.ok, _texts(report)


def test_a_forged_checkpoint_is_detected(copied: Path, honest: Honest) -> None:
    (path,) = (copied / "nodes/0/audit").glob("checkpoints-*")

    def forge(lines: list[bytes]) -> list[bytes]:
        place = max(place for place, line in enumerate(lines) if b'"checkpoint":' in line)
        value = json.loads(lines[place])
        text = value["checkpoint"]
        size = text.split("\n")[1]
        value["checkpoint"] = text.replace(f"\n{size}\n", f"\n{int(size) - 1}\n", 1)
        lines[place] = json.dumps(value).encode() + b"\n"
        return lines

    _change(path, forge)
    assert "does not fit the checkpoint" in _texts(verify(copied, honest.pool_id))


def test_a_signer_that_nothing_certifies_is_refused(copied: Path, honest: Honest) -> None:
    (path,) = (copied / "nodes/0/audit").glob("checkpoints-*")

    def swap(lines: list[bytes]) -> list[bytes]:
        value = json.loads(lines[0])
        value["signer"]["public_key"] = "A" * 43 + "="
        lines[0] = json.dumps(value).encode() + b"\n"
        return lines

    for index in (1, 2):
        (copied / f"nodes/{index}/audit/peers.json").unlink()
    _change(path, swap)
    assert not verify(copied, honest.pool_id).ok


def test_a_mutation_without_a_record_is_detected(tmp_path: Path) -> None:
    logs = ThreeLogs(tmp_path / "pool")
    try:
        logs.mutate(count=2)
        logs.sequence += 1  # committed, and put on record nowhere
        logs.trails[1].log.sequence += 1
        logs.trails[2].log.sequence += 1
        logs.mutate()
        logs.checkpoint()
    finally:
        logs.close()
    texts = _texts(verify(logs.directory, logs.pool_id))
    assert "1: mutations 3 to 3 of the chain have no record" in texts
    assert "the first is 3" in texts


@pytest.mark.parametrize("changed", ["rewritten", "dropped", "repeated"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_record_of_a_group_commit_is_compared(tmp_path: Path, number: int, changed: str) -> None:
    """G7: what a kill left without a checkpoint is changed on the disk; its own partition signs that."""
    logs = ThreeLogs(tmp_path / "pool")

    def change(lines: list[bytes]) -> list[bytes]:
        place = next(n for n, line in enumerate(lines) if b'"sequence":2,' in line) + number
        line = lines[place]
        rewritten = {
            "rewritten": [line.replace(b"client/", b"stranger/")],
            "dropped": [],
            "repeated": [line] * 2,
        }
        return [*lines[:place], *rewritten[changed], *lines[place + 1 :]]

    try:
        logs.checkpoint()
        for sequence in (1, 2, 3):
            records = [
                Operation("KeyDelete", f"spiffe://pool/client/{name}").record(sequence, 3)
                for name in ("a", "b", "c")
            ]
            for trail in logs.trails:
                trail.log.append_mutations(sequence, records)
        logs.trails[0].log.close()
        logs.trails[0].history.close()
        (path,) = logs.log_directory(0).glob("records-*")
        _change(path, change)
        logs.trails[0] = logs._open(0)
        logs.checkpoint()
        assert logs.trails[0].failure() == ""
    finally:
        logs.close()
    texts = _texts(verify(logs.directory, logs.pool_id))
    count = {"rewritten": 3, "dropped": 2, "repeated": 4}[changed]
    if changed == "rewritten":
        differs = "mutation 2 has other records than at partition 0"
        assert texts == f"1: {differs}\n2: {differs}"
    else:
        assert f"0: mutation 2 has {count} of its 3 records" in texts


def test_a_transaction_that_is_still_written_is_no_finding(copied: Path, honest: Honest) -> None:
    """As an export of a running pool may catch it, or a kill leave it."""
    sequence = 1 + verify(copied, honest.pool_id).logs[0].sequences[1]
    record = Operation("KeyDelete", "spiffe://pool/client/one").record(sequence, 3)
    _change(_records(copied, 0), lambda lines: [*lines, record + b"\n"])
    report = verify(copied, honest.pool_id)
    assert report.ok, _texts(report)


def test_a_witness_does_not_cosign_another_history(tmp_path: Path) -> None:
    """The partition itself rewrites its log while it runs, and signs it: the others refuse."""
    logs = ThreeLogs(tmp_path / "pool")
    try:
        logs.read(0, 9)
        logs.checkpoint()
        logs.trails[0].close()
        path = next(logs.log_directory(0).glob("records-*"))
        _change(path, lambda lines: [*lines[:4], lines[3], *lines[5:]])
        logs.trails[0] = logs._open(0)
        logs.read(0, 3)
        logs.checkpoint()
        assert "rewritten or cut" in logs.trails[0].failure()
        newest = logs.trails[0].history.newest
        assert newest
        assert len(newest.signatures) == 1
    finally:
        logs.close()
    assert not verify(logs.directory, logs.pool_id).ok


def test_a_peer_that_was_away_cosigns_what_it_missed(tmp_path: Path) -> None:
    logs = ThreeLogs(tmp_path / "pool")
    try:
        logs.unreachable = {2}
        for _ in range(3):
            logs.read(0, 4)
            logs.checkpoint()
        newest = logs.trails[0].history.newest
        assert newest
        assert len(newest.signatures) == 2
        logs.unreachable = set()
        logs.checkpoint()
        newest = logs.trails[0].history.newest
        assert newest
        assert len(newest.signatures) == 3
    finally:
        logs.close()
    assert verify(logs.directory, logs.pool_id).ok


def test_checkpoints_go_on_in_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash may leave the new file empty: numbers are not given twice."""
    monkeypatch.setattr("hsm_pool.audit.history._FILE_BYTES", 3_000)
    logs = ThreeLogs(tmp_path / "pool")
    try:
        for _ in range(6):
            logs.read(0)
            logs.checkpoint()
        newest = logs.trails[0].history.newest
        assert newest
        number = newest.checkpoint.number
        assert number == 6
        logs.trails[0].close()
        (logs.log_directory(0) / f"checkpoints-{number + 1:016d}.jsonl").touch()
        logs.trails[0] = logs._open(0)
        logs.read(0)
        logs.checkpoint()
        assert logs.trails[0].failure() == ""
    finally:
        logs.close()
    report = verify(logs.directory, logs.pool_id)
    assert report.ok, _texts(report)
    assert report.logs[0].checkpoints == 7
