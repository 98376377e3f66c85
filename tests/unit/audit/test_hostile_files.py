"""G8: whatever stands in the files of an export, verification answers; G7: it says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from click.testing import CliRunner, Result
from hypothesis import strategies as st

from hsm_pool.cli.main import mhsm
from tests.unit.audit.logs import Honest

DEEP = b"[" * 15_000
NUMBERS = (b"1", b"-1", b"1.5", b"NaN", b"Infinity", b"1e999", b"9" * 18, b"9" * 19, b"9" * 5_000)
TEXTS = (b'"x"', b'""', b'"\\ud800"', b'"\\u001b[2J"')
VALUES = (*NUMBERS, *TEXTS, b"null", b"true", b"[]", b"[1]", b'["x"]', b"{}", b'{"a":1}', DEEP)
OWN_FILES = ("export.json", "owner-root.crt")
"""What an export says of itself: without it nothing can be verified."""


@pytest.fixture(scope="session")
def export(honest: Honest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The honest logs as mhsm audit export writes them."""
    directory = tmp_path_factory.mktemp("hostile") / "export"
    for index in range(3):
        shutil.copytree(honest.directory / f"nodes/{index}/audit", directory / f"partition-{index}")
    shutil.copyfile(honest.directory / "nodes/0/owner/root.crt", directory / "owner-root.crt")
    document = {
        "format": 1,
        "pool_id": honest.pool_id,
        "audit_checkpoints": honest.checkpoints,
    }
    (directory / "export.json").write_text(json.dumps(document) + "\n")
    return directory


def run(export: Path, *arguments: str) -> Result:
    """Verify; the command may end with any documented code, and never with a traceback."""
    result = CliRunner().invoke(mhsm, ["audit", "verify", str(export), "--json", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def findings(result: Result) -> list[str]:
    """Return what the report says; it must be one."""
    assert result.exit_code in {0, 6}, result.output
    found = json.loads(result.stdout.splitlines()[0])["findings"]
    assert (result.exit_code == 6) == bool(found)
    return [entry["what"] for entry in found]


def run_with(export: Path, path: Path, content: bytes) -> Result:
    """Verify while one file has other content."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        return run(export)
    finally:
        path.write_bytes(before)


def paths(export: Path) -> list[Path]:
    """Return all files of an export."""
    return sorted(path for path in export.rglob("*") if path.is_file())


def test_an_honest_export_verifies(export: Path) -> None:
    assert findings(run(export)) == []


def _header(octets: bytes) -> Callable[[bytes], bytes]:
    return lambda content: octets + b"\n" + content.partition(b"\n")[2]


def _line(octets: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content + octets + b"\n"


def _all(octets: bytes) -> Callable[[bytes], bytes]:
    return lambda _: octets


_PEERS = b'{"format":1,"logs":[{"checkpoint":"","signers":%s}]}'
_BEGIN = b'{"format":1,"log":"x",'


@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        pytest.param("records-*", _header(DEEP), id="header nested deeply"),
        pytest.param("records-*", _header(b"[1]"), id="header is a list"),
        pytest.param(
            "records-*",
            _header(_BEGIN + b'"first":Infinity,"frontier":[],"sequence":0}'),
            id="header infinite",
        ),
        pytest.param(
            "records-*", _header(_BEGIN + b'"first":-1,"frontier":["00"],"sequence":0}'), id="header negative"
        ),
        pytest.param(
            "records-*",
            _header(_BEGIN + b'"first":1,"frontier":["00"],"sequence":0}'),
            id="frontier too short",
        ),
        pytest.param("records-*", _line(DEEP), id="record nested deeply"),
        pytest.param(
            "records-*",
            _line(b'{"properties":{"sequence":10000000000000,"transactionRecords":1},"sequence":1}'),
            id="sequence far away",
        ),
        pytest.param("checkpoints-*", _line(DEEP), id="checkpoint nested deeply"),
        pytest.param("checkpoints-*", _line(b'{"checkpoint":1}'), id="checkpoint is a number"),
        pytest.param("checkpoints-*", _line(b'{"signer":[1]}'), id="signer is a list"),
        pytest.param("checkpoints-*", _line(b'{"signer":{"name":[[]]}}'), id="signer with a list for a name"),
        pytest.param(
            "checkpoints-*",
            lambda content: content + content.splitlines(keepends=True)[-1].replace(b'["', b'[1,"'),
            id="cosignature is a number",
        ),
        pytest.param("peers.json", _all(DEEP), id="peers nested deeply"),
        pytest.param("peers.json", _all(b"1"), id="peers is a number"),
        pytest.param("peers.json", _all(_PEERS % b"1"), id="signers is a number"),
        pytest.param("peers.json", _all(_PEERS % DEEP), id="signers nested deeply"),
    ],
)
def test_a_hostile_file_is_a_finding(export: Path, pattern: str, change: Callable[[bytes], bytes]) -> None:
    (path,) = (export / "partition-0").glob(pattern)
    assert findings(run_with(export, path, change(path.read_bytes())))


@pytest.mark.parametrize(
    "record",
    [
        b'{"properties":{"sequence":Infinity,"transactionRecords":1},"sequence":1}',
        b'{"sequence":' + DEEP,
        b'{"operationName":"AuditRetention","properties":{"firstRecord":1e999,"firstCheckpoint":1}}',
        b'{"operationName":"AuditRetention","properties":' + DEEP,
        b'{"operationName":"AuditChainGap","properties":{"last":Infinity}}',
    ],
)
def test_a_hostile_record_that_no_checkpoint_covers_counts_for_nothing(export: Path, record: bytes) -> None:
    (path,) = (export / "partition-0").glob("records-*")
    assert findings(run_with(export, path, path.read_bytes() + record + b"\n")) == []


def test_a_directory_in_place_of_a_file_is_a_finding(export: Path, tmp_path: Path) -> None:
    for name in ("records-0000000000009999.jsonl", "checkpoints-0000000000009999.jsonl", "peers.json"):
        copy = tmp_path / name
        shutil.copytree(export, copy)
        (copy / "partition-0" / name).unlink(missing_ok=True)
        (copy / "partition-0" / name).mkdir()
        assert findings(run(copy))


@hypothesis.given(data=st.data(), content=st.binary(max_size=200))
@hypothesis.settings(max_examples=25)
def test_any_octets_in_a_files_place_are_a_finding(export: Path, data: st.DataObject, content: bytes) -> None:
    path = data.draw(st.sampled_from(paths(export)))
    result = run_with(export, path, content)
    if path.name in OWN_FILES:
        assert result.exit_code == 1
        assert result.stderr.startswith("mhsm: ")
    else:
        assert findings(result)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_any_value_in_any_line_gives_a_report(export: Path, data: st.DataObject) -> None:
    """A line that would be honest but for one value, in the place of a line or after the last one."""
    path = data.draw(st.sampled_from([path for path in paths(export) if path.name != "owner-root.crt"]))
    lines = path.read_bytes().splitlines(keepends=True)
    if path.name == "peers.json":
        lines = [b"".join(lines)]
    number = data.draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[number])
    places = list(_places(value))
    holder, key = data.draw(st.sampled_from(places))
    holder[key] = "PLACE"
    hostile = data.draw(st.sampled_from(VALUES))
    line = json.dumps(value).encode().replace(b'"PLACE"', hostile) + b"\n"
    if data.draw(st.booleans()):
        lines[number] = line
    else:
        lines.append(line)
    result = run_with(export, path, b"".join(lines))
    assert "\x1b" not in result.output
    if path.name not in OWN_FILES or result.exit_code != 1:
        findings(result)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (holder, key) of everything in a JSON value."""
    entries = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = [(value, key) for key, _ in entries]
    for _, entry in entries:
        if isinstance(entry, dict | list):
            found += _places(entry)
    return found


@pytest.mark.parametrize(
    "content",
    [b"", DEEP, b'{"a":' * 15_000, b'{"audit_checkpoints":5}', b'{"audit_checkpoints":[Infinity]}', b"\xff"],
)
def test_a_file_that_is_no_anchor_is_refused(export: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "anchor").write_bytes(content)
    result = run(export, "--anchor", str(tmp_path / "anchor"))
    assert result.exit_code == 1
    assert "holds no checkpoint of an audit log" in result.stderr


def test_an_anchor_of_another_pool_is_wrong_usage_and_no_tampering(
    export: Path, honest: Honest, tmp_path: Path
) -> None:
    """As after a recovery in a new pool, with the old pool's backup."""
    anchor = tmp_path / "manifest.json"
    anchor.write_text(json.dumps({"audit_checkpoints": honest.checkpoints}))
    assert findings(run(export, "--anchor", str(anchor))) == []
    other = honest.pool_id[::-1]
    anchor.write_text(
        json.dumps(
            {"audit_checkpoints": [text.replace(honest.pool_id, other) for text in honest.checkpoints]}
        )
    )
    result = run(export, "--anchor", str(anchor))
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"mhsm: the anchor manifest.json is of pool {other}, this log is of pool {honest.pool_id}"
    )


def test_an_export_does_not_say_which_partitions_there_are(export: Path, tmp_path: Path) -> None:
    """G7: logs that were deleted from an export are missed, whatever its own description names."""
    copy = tmp_path / "export"
    shutil.copytree(export, copy)
    document = json.loads((copy / "export.json").read_text())
    for index in range(3):
        shutil.rmtree(copy / f"partition-{index}")
    (copy / "export.json").write_text(json.dumps({**document, "partitions": [], "audit_checkpoints": []}))
    assert findings(run(copy)) == ["there is no log"] * 3


def test_a_log_that_is_there_is_not_lost(export: Path) -> None:
    """Whoever says so has another pool or another time in mind."""
    result = run(export, "--known-lost", "0" * 32)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"mhsm: log {'0' * 32} is not lost")


def test_an_anchor_that_is_newer_than_the_export_may_be_no_cut(export: Path, tmp_path: Path) -> None:
    """Nothing tells it from a cut but when both were made; whoever gave it knows, and is asked."""
    document = json.loads((export / "export.json").read_bytes())
    lines = document["audit_checkpoints"][0].split("\n")
    anchor = tmp_path / "manifest.json"
    newer = "\n".join([lines[0], "999", lines[2], "number 999", *lines[4:]])
    anchor.write_text(json.dumps({"audit_checkpoints": [newer]}))
    result = run(export, "--anchor", str(anchor))
    assert any("was cut" in what for what in findings(result))
    assert "if manifest.json was made after what is verified here: take a newer export" in result.stderr
