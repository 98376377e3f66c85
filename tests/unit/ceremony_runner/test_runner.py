"""The runner by itself, without a terminal and without commands: what it notices, and where it ends (G7)."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hsm_pool.ceremony_runner import runner, transcript, verification
from hsm_pool.ceremony_runner.interaction import CONTINUE
from hsm_pool.ceremony_runner.plan import parse_plan
from hsm_pool.ceremony_runner.runner import Outcome, Runner
from hsm_pool.ceremony_runner.transcript import REPEATS_MAX, Journal
from tests.unit.ceremony_runner.rehearsal import POOL_ID, Administrator

PLAN = """
title: A file is used
purpose: To be tested
parameters:
  - {name: place, prompt: Where, kind: path}
steps:
  - {actor: operator, action: Look at it, expected: It is there, inputs: ["{place}"]}
  - {actor: operator, action: Change it, expected: It is new, inputs: ["{place}"], outputs: ["{place}"]}
"""


class Scripted:
    """Somebody who continues and repeats without end, and does something before he continues."""

    standard_input: int | None = subprocess.DEVNULL

    def __init__(self, before: Callable[[int], object]) -> None:
        self._before = before

    def change_actor(self, actor: str) -> None:
        """Stay."""

    def confirm(self, number: int) -> str:
        self._before(number)
        return CONTINUE

    def repeats(self) -> bool:
        return True


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("as it was")
    return path


def run(file: Path, administrator: Administrator, before: Callable[[int], object]) -> Outcome:
    """Run the plan with somebody at the keyboard; what it leaves verifies."""
    plan, values = parse_plan(PLAN.encode()), {"place": str(file), "data_directory": "/pool"}
    header = transcript.make_header(plan, values, administrator.identity, POOL_ID, "test", "terminal")
    journal = Journal(file.with_name("transcript"), header)
    written: list[bytes] = []
    running = Runner(plan, plan.filled(values), Console(file=io.StringIO()), Scripted(before))
    outcome = running.run(journal, administrator.identity, written.append, lambda: ["a checkpoint"])
    assert written == [outcome.transcript]
    assert not journal.path.exists()
    verified = verification.verify(outcome.transcript, administrator.ca_file.read_bytes())
    assert (verified.result, verified.reason) == (outcome.result, outcome.reason)
    assert verified.steps_done == outcome.steps_done
    return outcome


def entries(outcome: Outcome) -> list[dict[str, Any]]:
    document = verification.verify(outcome.transcript).document
    found: list[dict[str, Any]] = document["entries"]
    return found


def test_a_step_may_change_its_own_outputs_only(file: Path, administrator: Administrator) -> None:
    """G7, positive control: the second step says that it changes the file; the record has both states."""

    def change(number: int) -> None:
        if number == 2:
            file.write_text("as it is now")

    outcome = run(file, administrator, change)
    assert (outcome.result, outcome.reason, outcome.steps_done) == ("completed", "", 2)
    _, second, end = entries(outcome)
    digests = [second[kind][0]["sha256"] for kind in ("inputs", "outputs")]
    assert digests == [transcript.sha256(text) for text in (b"as it was", b"as it is now")]
    assert end["audit_checkpoints"] == ["a checkpoint"]


def test_an_input_that_changes_during_a_step_is_noticed(file: Path, administrator: Administrator) -> None:
    """G7: the step may have used what nobody was shown; done again, it is shown and confirmed anew."""
    contents = ["exchanged"]
    outcome = run(file, administrator, lambda _: contents and file.write_text(contents.pop()))
    assert (outcome.result, outcome.steps_done) == ("completed", 2)
    first, again, *_ = entries(outcome)
    assert (first["result"], again["result"]) == ("failed", "done")
    assert first["reason"] == f"step 1: {file} changed while the step was done"
    assert first["inputs"][0]["sha256"] == transcript.sha256(b"as it was")
    assert again["inputs"][0]["sha256"] == transcript.sha256(b"exchanged")


def test_an_input_that_is_gone_after_a_step_is_noticed(file: Path, administrator: Administrator) -> None:
    outcome = run(file, administrator, lambda number: number == 1 and file.unlink())
    assert (outcome.result, outcome.steps_done) == ("failed", 0)
    assert {entry["result"] for entry in entries(outcome)[:-1]} == {"failed"}


def test_repeats_are_bounded_in_number(file: Path, administrator: Administrator) -> None:
    """Somebody who repeats without end is not asked without end; the record stays a record."""
    octets = iter(range(1000))
    outcome = run(file, administrator, lambda _: file.write_text(str(next(octets))))
    assert (outcome.result, outcome.steps_done) == ("failed", 0)
    assert len(entries(outcome)) == 1 + REPEATS_MAX + 1


def test_repeats_are_bounded_in_length(
    file: Path, administrator: Administrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = sum(map(len, parse_plan(PLAN.encode()).filled({"place": str(file)})[0].texts()))
    monkeypatch.setattr(runner, "FILLED_LENGTH_MAX", 3 * length)
    octets = iter(range(1000))
    outcome = run(file, administrator, lambda _: file.write_text(str(next(octets))))
    assert len(entries(outcome)) == 1 + 3 + 1
