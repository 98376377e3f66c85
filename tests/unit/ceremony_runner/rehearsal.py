"""What the tests of ceremonies share: an administrator without a pool, plans, and the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsm_pool.ceremony_runner import transcript
from hsm_pool.ceremony_runner.plan import Plan, parse_plan
from hsm_pool.ceremony_runner.transcript import Identity, Journal
from hsm_pool.provisioning.pki import Authority
from security_domain.fingerprints import words_of_digest

POOL_ID = "0123456789abcdef0123456789abcdef"
_MAIN = (
    "from hsm_pool.cli import output\n"
    "from hsm_pool.cli.ceremony_commands import ceremony_group\n"
    "output.main(ceremony_group)\n"
)

THREE_STEPS = b"""
title: Three steps
purpose: To be tested
parameters:
  - {name: place, prompt: Where, kind: path, default: here}
steps:
  - {actor: witness, action: Look at the \xc3\xbcbung, expected: All is well}
  - actor: officer 1
    action: Show
    command: [mhsm, --version]
    expected: A version
    expected_output: mhsm
    outputs: ["{place}"]
  - {actor: operator, action: "Look at {place}", expected: It is there, inputs: ["{place}"]}
"""


@dataclass(frozen=True)
class Administrator:
    """A data directory with nothing but the files that a client needs to be the administrator."""

    directory: Path
    ca_file: Path
    authority: Authority
    identity: Identity


def make_administrator(directory: Path, authority: Authority | None = None) -> Administrator:
    authority = authority or Authority("test client plane")
    certificate, key = authority.issue(f"spiffe://{POOL_ID}/client/administrator")
    directory.mkdir()
    (directory / "administrator.crt").write_bytes(certificate)
    (directory / "administrator.key").write_bytes(key)
    (directory / "ca.crt").write_bytes(authority.certificate_pem)
    connection = {
        "format": 1,
        "pool_id": POOL_ID,
        "data_directory": str(directory),
        "attended": True,
        "client_ca_file": str(directory / "ca.crt"),
        "clients": {
            "administrator": {
                "certificate_file": str(directory / "administrator.crt"),
                "key_file": str(directory / "administrator.key"),
            }
        },
        "partitions": [],
        "store": {},
        "fabric_controller": {},
        "supervisor": {"process_id": 0},
    }
    (directory / "connection.json").write_text(json.dumps(connection))
    identity = transcript.load_identity(certificate, key, POOL_ID)
    return Administrator(directory, directory / "ca.crt", authority, identity)


def ceremony_argv(*arguments: str) -> list[str]:
    """Return the command line of `mhsm ceremony ...` as its own process."""
    return [sys.executable, "-c", _MAIN, *arguments]


def ceremony(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `mhsm ceremony ...` without a terminal; it may never end with a traceback."""
    completed = subprocess.run(
        ceremony_argv(*arguments),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in completed.stderr, completed.stderr
    return completed


def entry_fields(plan: Plan, number: int, values: dict[str, str], **changed: Any) -> dict[str, Any]:
    """Return what the runner would record of a step that is done."""
    step = plan.filled(values)[number - 1]

    def evidence(paths: Sequence[str]) -> list[dict[str, str]]:
        return [{"path": path, "sha256": "0" * 64, "words": words_of_digest(bytes(32))} for path in paths]

    return {
        "actor": step.actor,
        "action": step.action,
        "command": list(step.command),
        "expected": step.expected,
        "answer": "continue",
        "started": transcript.now(),
        "inputs": evidence(step.inputs),
        "outputs": evidence(step.outputs),
        "result": "done",
        "reason": "",
        "exit_code": step.exit_code if step.command else None,
        "stdout": step.expected_output,
        "stdout_sha256": transcript.sha256(step.expected_output.encode()),
        "stderr_sha256": transcript.sha256(b""),
        "ended": transcript.now(),
        **changed,
    }


def made_transcript(
    output: Path, identity: Identity, steps: Sequence[int] = (1, 2, 3), ended: str = "completed", **last: Any
) -> bytes:
    """Return a signed transcript of THREE_STEPS with entries for these steps of it."""
    plan = parse_plan(THREE_STEPS)
    values = {"place": "here", "data_directory": "/pool"}
    header = transcript.make_header(plan, values, identity, POOL_ID, "test", "file")
    journal = Journal(output, header)
    for position, number in enumerate(steps, start=1):
        changed = last if position == len(steps) else {}
        journal.append(entry_fields(plan, number, values, **changed))
    sealed = journal.sealed(identity, ended, last.get("reason", ""))
    journal.remove()
    return sealed
