"""The files of a ceremony: each step begins with what the steps before it have left (G7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hsm_pool.ceremony_runner import transcript
from hsm_pool.ceremony_runner.plan import parse_plan
from hsm_pool.ceremony_runner.transcript import Journal
from hsm_pool.ceremony_runner.verification import TranscriptRefused, verify
from security_domain.fingerprints import words_of_digest
from tests.unit.ceremony_runner.rehearsal import POOL_ID, Administrator, entry_fields
from tests.unit.ceremony_runner.test_run import Room, Terminal

PLAN = """
title: A file goes from hand to hand
purpose: To be tested
parameters:
  - {name: directory, prompt: Where, kind: path}
steps:
  - {actor: operator, action: Make it, expected: It is there, outputs: ["{directory}/file"]}
  - {actor: operator, action: Look at it, expected: It is the same, inputs: ["{directory}/file"]}
  - {actor: operator, action: Go home, expected: The room is empty, inputs: ["{directory}/file"]}
"""


def evidence(octet: int, words: str | None = None) -> dict[str, str]:
    digest = bytes([octet]) * 32
    return {"path": "d/file", "sha256": digest.hex(), "words": words or words_of_digest(digest)}


def made(path: Path, administrator: Administrator, *files: dict[str, Any]) -> bytes:
    """Return a signed transcript of the plan, with these inputs and outputs of its steps."""
    plan, values = parse_plan(PLAN.encode()), {"directory": "d", "data_directory": "/pool"}
    header = transcript.make_header(plan, values, administrator.identity, POOL_ID, "test", "terminal")
    journal = Journal(path, header)
    for number, fields in enumerate(files, start=1):
        journal.append(entry_fields(plan, number, values, **fields))
    octets = journal.sealed(administrator.identity, "completed", "")
    journal.remove()
    return octets


def test_a_step_that_began_with_another_file_is_no_step_of_the_ceremony(
    tmp_path: Path, administrator: Administrator
) -> None:
    """Nor is evidence whose words, which people compared, are not those of its digest."""
    first, same, other = {"outputs": [evidence(1)]}, {"inputs": [evidence(1)]}, {"inputs": [evidence(2)]}
    assert verify(made(tmp_path / "a", administrator, first, same, same)).result == "completed"
    for files in ((first, other, same), (first, same, other), (first, other, other)):
        with pytest.raises(TranscriptRefused, match="another file than before"):
            verify(made(tmp_path / "b", administrator, *files))
    words = words_of_digest(bytes([2]) * 32)
    for digest in ({"outputs": [evidence(1, words)]}, {"outputs": [{**evidence(1), "sha256": "x" * 64}]}):
        with pytest.raises(TranscriptRefused, match="without a digest and its words"):
            verify(made(tmp_path / "c", administrator, digest, same, same))


def test_the_runner_notices_a_file_that_changes_between_two_steps(
    tmp_path: Path, administrator: Administrator
) -> None:
    room = Room(tmp_path, administrator, PLAN)
    file = tmp_path / "file"
    file.write_text("as it was made")
    terminal = Terminal(*room.arguments())
    terminal.until("Where: ")
    terminal.type(f"{tmp_path}\n")
    terminal.until("continue / abort: ")
    terminal.type("continue\n")
    terminal.until("Look at it")
    terminal.until("continue / abort: ")
    file.write_text("exchanged meanwhile")
    terminal.type("continue\n")
    terminal.until("changed while the step was done")
    terminal.until("repeat / abort: ")
    terminal.type("repeat\n")
    terminal.until("another file than before in this ceremony")
    terminal.until("repeat / abort: ")
    file.write_text("as it was made")
    terminal.type("repeat\n")
    for _ in range(2):
        terminal.until("continue / abort: ")
        terminal.type("continue\n")
    assert terminal.end() == 0, terminal.shown.decode()
    entries = json.loads(room.transcript.read_bytes())["entries"]
    assert [entry["result"] for entry in entries] == ["done", "failed", "failed", "done", "done", "completed"]
    assert room.verified()["result"] == "completed"
