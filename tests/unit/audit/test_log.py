"""G7: the log on disk: what was appended is there after a kill, whole, or the append was refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsm_pool.audit import files, query
from hsm_pool.audit.log import AuditLog
from hsm_pool.audit.query import Filter
from hsm_pool.audit.record import Operation
from hsm_pool.audit.tree import Tree, leaf_hash, verify_consistency, verify_inclusion
from hsm_pool.errors import AuditUnavailable
from tests.running_pool import until

IDENTITY = "spiffe://pool/partition/0"


def _record(name: str = "KeyGet", sequence: int = 0, of: int = 0) -> bytes:
    return Operation(name, "spiffe://pool/client/one").record(sequence, of)


def _records(directory: Path) -> list[bytes]:
    return [record for _, record in query.records_from(directory, 0)]


def _root(records: list[bytes]) -> bytes:
    tree = Tree()
    for record in records:
        tree.append(leaf_hash(record))
    return tree.root()


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, IDENTITY, 0)
    for _ in range(10):
        log.append(_record())
    log.close()
    again = AuditLog(tmp_path, IDENTITY, 0)
    again.append(_record())
    assert again.log_id == log.log_id
    assert again.size == 12
    assert again.root(12) == _root(_records(tmp_path))
    again.close()
    with pytest.raises(AuditUnavailable):
        again.append(_record())


def test_files_rotate_and_old_proofs_are_read_from_them(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, IDENTITY, 0, file_bytes=2_000)
    for _ in range(50):
        log.append(_record())
    records = _records(tmp_path)
    assert len(files.listed(tmp_path, files.RECORDS)) > 5
    for index in (0, 1, 20, 50):
        proof = log.inclusion_proof(index, 51)
        verify_inclusion(leaf_hash(records[index]), index, 51, proof, log.root_of(51))
    for old_size in (1, 13, 32, 50):
        verify_consistency(
            old_size, _root(records[:old_size]), 51, log.root(51), log.consistency_proof(old_size, 51)
        )
    log.close()
    again = AuditLog(tmp_path, IDENTITY, 0, file_bytes=2_000)
    assert again.root(51) == _root(records)
    again.close()


def test_mutations_are_appended_once_and_a_gap_is_said(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, IDENTITY, 0)
    log.append_mutations(1, [_record("KeyCreate", 1, 1)])
    log.append_mutations(1, [_record("KeyCreate", 1, 1)])
    log.append_mutations(2, [_record("KeyCreate", 2, 1)])
    log.close()
    log = AuditLog(tmp_path, IDENTITY, 0)
    assert log.sequence == 2
    log.append_mutations(2, [_record("KeyCreate", 2, 1)])
    log.append_mutations(7, [_record("KeyDelete", 7, 1)])
    log.close()
    names = [json.loads(record)["operationName"] for record in _records(tmp_path)]
    assert names == ["AuditLogCreate", "KeyCreate", "KeyCreate", "AuditChainGap", "KeyDelete"]


def test_a_file_names_the_newest_mutation_before_it(tmp_path: Path) -> None:
    """Also the one that filled the file before: else it is appended again, or missed by verification."""
    log = AuditLog(tmp_path, IDENTITY, 0, file_bytes=1_000)
    for sequence in range(1, 12):
        log.append_mutations(sequence, [_record("KeyCreate", sequence, 1)])
    log.close()
    newest = 0
    for path in files.listed(tmp_path, files.RECORDS):
        assert files.read_header(path).sequence == newest
        found = [files.sequence_of(record)[0] for record in files.read_lines(path, skip_header=True)]
        newest = max([newest, *found])
    assert newest == 11


@pytest.mark.parametrize("cut", [1, 40, 300, 700])
def test_what_a_kill_cut_is_removed_whole(tmp_path: Path, cut: int) -> None:
    """A record that was written in part was never acknowledged; a transaction is there whole or not."""
    log = AuditLog(tmp_path, IDENTITY, 0)
    log.append_mutations(1, [_record("KeyCreate", 1, 1)])
    log.append_mutations(2, [_record("KeyUpdate", 2, 3) for _ in range(3)])
    log.close()
    (path,) = files.listed(tmp_path, files.RECORDS)
    path.write_bytes(path.read_bytes()[:-cut])
    again = AuditLog(tmp_path, IDENTITY, 0)
    assert again.sequence == 1
    assert again.size == 2
    again.append_mutations(2, [_record("KeyUpdate", 2, 3) for _ in range(3)])
    assert again.root(5) == _root(_records(tmp_path))
    again.close()


_WRITER = """
import sys
from pathlib import Path
from hsm_pool.audit.log import AuditLog
from hsm_pool.audit.record import Operation

log = AuditLog(Path(sys.argv[1]), "spiffe://pool/partition/0", 0)
number = 0
while True:
    number += 1
    operation = Operation("KeySign", "spiffe://pool/client/one", items=number)
    log.append(operation.record())
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_kill_9_loses_no_record_that_was_appended(tmp_path: Path, seed: int) -> None:
    """The writer is killed at any point, again and again, in the same log."""
    for round_number in range(5):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout
        lines = [writer.stdout.readline() for _ in range(20 + (seed + round_number * 37) % 200)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        writer.wait()
        acknowledged = max(int(line) for line in lines if line.endswith(b"\n"))
        log = AuditLog(tmp_path, IDENTITY, 0)
        records = [json.loads(record) for record in _records(tmp_path)]
        log.close()
        newest = [r["properties"]["items"] for r in records if r["operationName"] == "KeySign"][-1]
        assert newest >= acknowledged


def _fill(log: AuditLog) -> int:
    """Append until it is refused; return how many were taken."""
    for count in range(100_000):
        try:
            log.append(_record())
        except AuditUnavailable:
            return count
    raise AssertionError("the file system never became full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here; the limit on a file's size is tested instead")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_full_disk_stops_operations_and_no_record_is_half_written(
    small_disk: Path, request: pytest.FixtureRequest
) -> None:
    log = AuditLog(small_disk / "audit", IDENTITY, 0)
    request.addfinalizer(log.close)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    taken = _fill(log)
    assert taken > 10
    assert "No space left" in log.failure
    with pytest.raises(AuditUnavailable, match="No space left"):
        log.check()
    with pytest.raises(AuditUnavailable):
        log.append_mutations(1, [_record("KeyCreate", 1, 1)])
    assert log.sequence == 0
    assert log.size == taken + 1 == len(_records(small_disk / "audit"))
    ballast.unlink()
    until(lambda: not log.failure, 20, "the log is written again")
    log.check()
    log.append_mutations(1, [_record("KeyCreate", 1, 1)])
    names = [json.loads(record)["operationName"] for record in _records(small_disk / "audit")]
    assert names[-2:] == ["AuditLogResume", "KeyCreate"]
    assert log.root(log.size) == _root(_records(small_disk / "audit"))


def test_a_full_disk_costs_counted_records_if_that_was_chosen(small_disk: Path) -> None:
    log = AuditLog(small_disk / "audit", IDENTITY, 0, on_failure="continue")
    for _ in range(2_000):
        log.append(_record())
        log.check()
    assert log.lost > 100
    assert log.failure
    assert log.size + log.lost == 2_001
    log.close()


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from hsm_pool.audit.log import AuditLog
from hsm_pool.audit.record import Operation
from hsm_pool.errors import AuditUnavailable

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
log = AuditLog(Path(sys.argv[1]), "spiffe://pool/partition/0", 0)
taken = 0
try:
    while True:
        log.append(Operation("KeySign", "spiffe://pool/client/one").record())
        taken += 1
except AuditUnavailable as error:
    print(taken, error.message)
"""


def test_a_file_that_cannot_grow_stops_operations(tmp_path: Path) -> None:
    """Needs no rights: the kernel refuses the write beyond RLIMIT_FSIZE, a part of it at first."""
    completed = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    taken, _, message = completed.stdout.splitlines()[-1].partition(" ")
    assert "the audit log cannot be written" in message
    log = AuditLog(tmp_path, IDENTITY, 0)
    assert log.size == int(taken) + 1
    log.close()


def test_a_query_filters_and_pages(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, IDENTITY, 0)
    for number in range(30):
        operation = Operation("KeySign" if number % 3 else "KeyGet", f"spiffe://pool/client/{number % 2}")
        if number % 5 == 0:
            operation.refused("NOT_FOUND", "KEY_NOT_FOUND")
        log.append(operation.record())
    wanted = Filter(operation_name="KeySign", identity="spiffe://pool/client/1", result_type="Success")
    found, start = [], 0
    while True:
        page = query.page(tmp_path, start, log.size, 3, wanted)
        found += page.records
        start = page.next_index
        if not page.more:
            break
    log.close()
    expected = [n for n in range(30) if n % 3 and n % 2 and n % 5]
    assert [index - 1 for index, _ in found] == expected
    assert all(json.loads(record)["resultType"] == "Success" for _, record in found)
    assert query.page(tmp_path, 0, 31, 9, Filter(until_time=query.instant("2020-01-01"))).records == []


def test_a_key_filters_by_its_whole_name() -> None:
    """Records without a key are let through by no name."""
    admitted = []
    for name in ("signer", "signer2", None):
        operation = Operation("KeySign", "spiffe://pool/client/one")
        operation.key_name = name or ""
        admitted.append(Filter(key_name="signer").admits(operation.record()))
    assert admitted == [True, False, False]


@pytest.mark.parametrize(
    "text", ["05", "05Z", "05:00Z", "05:00:00", "05:00:00Z", "05:00:00.0Z", "05:00:00.000"]
)
def test_a_time_filters_the_same_in_all_its_forms(text: str) -> None:
    """Inclusive from, exclusive until: no record of the first second is left out, none of the last let in."""
    time = query.instant(f"2026-11-26T{text}")
    for shown, after in (("04:59:59.999", False), ("05:00:00.000", True), ("05:00:00.500", True)):
        record = json.dumps({"time": f"2026-11-26T{shown}Z"}).encode()
        assert Filter(from_time=time).admits(record) == after
        assert Filter(until_time=time).admits(record) != after


@pytest.mark.parametrize(
    "text", ["", "2026", "2026-13-01", "2026-11-26T24Z", "2026-11-26T05:60", "2026-11-2\u0666", "2026-11-26T"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        query.instant(text)


def test_a_record_holds_the_allowed_fields_and_nothing_else() -> None:
    operation = Operation("KeySign", "spiffe://pool/client/one", "127.0.0.1", "/service/Sign", 2)
    operation.key_name, operation.key_version = "k", "0" * 32
    operation.algorithm, operation.items = "ES256", 256
    operation.refused("UNAVAILABLE", "NOT_FRESH")
    fields = json.loads(operation.record(7, 1))
    assert set(fields) == {
        "callerIpAddress",
        "category",
        "correlationId",
        "durationMs",
        "httpStatusCode",
        "identity",
        "operationName",
        "properties",
        "resultDescription",
        "resultSignature",
        "resultType",
        "time",
    }
    assert fields["properties"] == {
        "algorithm": "ES256",
        "items": 256,
        "keyName": "k",
        "keyVersion": "0" * 32,
        "partition": 2,
        "sequence": 7,
        "transactionRecords": 1,
    }
    assert (fields["httpStatusCode"], fields["resultType"]) == (503, "Failed")
