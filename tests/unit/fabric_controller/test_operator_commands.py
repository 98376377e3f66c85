"""Commands of mhsm-fabric that ask the journal only: exit codes, --json, --dry-run, and what is suggested."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fabric_controller.cli import cli
from fabric_controller.journal import Journal
from fabric_controller.work import RollOut, goal_entry

PLACE = "with space"


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """The journal of a pool whose data directory is ``PLACE`` here; no partition is asked."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / PLACE / "fabric"
    directory.mkdir(parents=True)
    settings = {
        "pool_id": "p",
        "partitions": [{"index": index, "enclave_endpoint": f"127.0.0.1:{index + 1}"} for index in range(3)],
        "identity": {name: str(directory / name) for name in ("certificate_file", "key_file", "ca_file")},
        "data_directory": str(directory),
    }
    (directory / "fabric.json").write_text(json.dumps(settings))
    with closing(Journal(directory, range(3))) as made:
        yield made


def run(*arguments: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mhsm-fabric", *arguments])
        return CliRunner().invoke(cli, [*arguments, "--data-dir", PLACE], standalone_mode=False)


def test_halt_resume_and_abandon(journal: Journal) -> None:
    """Each refused where there is nothing to do it to; a dry run ends the same way and changes nothing."""
    status = f"mhsm-fabric status --data-dir '{PLACE}'"
    for command in (["halt"], ["halt", "--abandon"], ["resume"]):
        for options in ([], ["--dry-run"]):
            refused = run(*command, *options)
            assert (refused.exit_code, refused.stdout) == (1, ""), command
            assert refused.stderr.endswith(f"next: {status}\n"), command
        refused = run(*command, "--json")
        assert (refused.exit_code, refused.stdout) == (1, "")
        told = json.loads(refused.stderr)["error"]
        assert told.pop("message")
        assert told == {"reason": "", "definite": True, "exit_code": 1, "next": [status], "hints": []}
    with journal.exclusive():
        journal.append(goal_entry(RollOut((1,), {1: 4})))
    planned = run("halt", "--dry-run", "--json")
    assert (planned.exit_code, json.loads(planned.stdout)) == (0, {"dry_run": True, "halted": False})
    assert journal.refresh().running
    assert run("resume").exit_code == 1, "it has not halted"
    assert run("halt").exit_code == 0
    halted = journal.refresh()
    assert (halted.running, halted.halted) == (False, "an operator has halted it")
    again = run("halt")
    assert again.exit_code == 1
    assert again.stderr.splitlines()[-1] == f"next: mhsm-fabric halt --abandon --data-dir '{PLACE}'"
    for command in (["resume"], ["halt", "--abandon"]):
        planned = run(*command, "--dry-run", "--json")
        assert (planned.exit_code, json.loads(planned.stdout)["dry_run"]) == (0, True)
        assert journal.refresh() == halted
    assert run("resume").exit_code == 0
    assert journal.refresh().running
    abandoned = run("halt", "--abandon", "--json")
    assert json.loads(abandoned.stdout) == {"dry_run": False, "abandoned": True}
    assert journal.refresh().goal is None
    told = [json.loads(line)["kind"] for line in run("history", "--json").stdout.splitlines()]
    assert told == ["goal", "halt", "continue", "abandon"]


def test_words_are_no_commands(journal: Journal) -> None:
    with journal.exclusive():
        journal.append(goal_entry(RollOut((1,), {1: 4})))
    said = run("halt", "--abandon").stderr.splitlines()
    assert [line.split(":")[0] for line in said] == ["next", "hint"]


@pytest.mark.parametrize(
    "arguments", [["drain"], ["drain", "3"], ["restart"], ["restart", "1", "1"], ["patch", "0"], ["unknown"]]
)
def test_wrong_usage_ends_with_2(journal: Journal, arguments: list[str]) -> None:
    assert not journal.history()
    refused = CliRunner().invoke(cli, [*arguments, "--data-dir", PLACE])
    assert refused.exit_code == 2, refused.output
