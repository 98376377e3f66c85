"""mhsm ceremony as people run it: real commands as children, each end on record (G7, G8)."""

from __future__ import annotations

import base64
import errno
import json
import os
import random
import select
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hsm_pool.ceremony_runner import verification
from hsm_pool.cli.evidence_files import encode
from hsm_pool.enclave.evidence import exchange_key_report_data
from security_domain import domain
from tests.running_pool import make_officers, until
from tests.unit.attested import TestPool
from tests.unit.ceremony_runner.rehearsal import Administrator, ceremony, ceremony_argv

OFFICERS = """
title: Officers are made
purpose: To be tested
parameters:
  - {name: directory, prompt: Where, kind: path}
  - {name: count, prompt: How many, kind: integer, default: 2}
steps:
  - {actor: witness, action: Look around, expected: All are here}
  - actor: operator
    action: Make them
    command: [mhsm, officers, make, --count, "{count}", --output-dir, "{directory}"]
    expected: Files
    expected_output: made 2 officers
    outputs: ["{directory}/officer-1.crt", "{directory}/officer-2.crt"]
  - actor: operator
    action: There is no pool
    command: [mhsm, status, --data-dir, "{directory}"]
    exit_code: 5
    expected: Unreachable
    inputs: ["{directory}/officer-1.crt"]
"""

# A command that waits for as long as nobody opens the pipe's other end for writing and closes it.
WAITING = """
title: A command that waits
purpose: To be interrupted
parameters:
  - {name: directory, prompt: Where, kind: path}
steps:
  - actor: operator
    action: Make officers
    command: [mhsm, officers, make, --count, "1", --output-dir, "{directory}/o"]
    expected: Files
  - actor: operator
    action: Wait
    command:
      [mhsm, security-domain, download, --officer, "{directory}/pipe", --required, "2",
       --output, "{directory}/x", --attempt-output, "{directory}/y"]
    expected: Nothing
"""


class Room:
    """A directory with a plan, answers and a place for the transcript."""

    def __init__(self, directory: Path, administrator: Administrator, plan: str) -> None:
        self.directory = directory
        self.administrator = administrator
        self.plan = directory / "plan.yaml"
        self.plan.write_text(plan)
        self.transcript = directory / "transcript.json"
        self.journal = directory / "transcript.json.partial"

    def arguments(self, *more: str, confirm: list[str] | None = None, **parameters: Any) -> list[str]:
        arguments = ["run", str(self.plan), "--output", str(self.transcript)]
        arguments += ["--data-dir", str(self.administrator.directory), *more]
        if confirm is not None:
            answers = self.directory / "answers.json"
            answers.write_text(json.dumps({"parameters": parameters, "confirm": confirm}))
            arguments += ["--answers", str(answers)]
        return arguments

    def run(self, *more: str, **answers: Any) -> subprocess.CompletedProcess[str]:
        return ceremony(*self.arguments(*more, **answers))

    def verify(self, *more: str) -> subprocess.CompletedProcess[str]:
        ca = str(self.administrator.ca_file)
        return ceremony("verify", str(self.transcript), "--ca-file", ca, "--json", *more)

    def verified(self) -> dict[str, Any]:
        completed = self.verify()
        assert completed.returncode == 0, completed.stderr
        value: dict[str, Any] = json.loads(completed.stdout)
        return value


@pytest.fixture
def officers_room(tmp_path: Path, administrator: Administrator) -> Room:
    return Room(tmp_path, administrator, OFFICERS)


@pytest.fixture
def waiting_room(tmp_path: Path, administrator: Administrator) -> Room:
    os.mkfifo(tmp_path / "pipe")
    return Room(tmp_path, administrator, WAITING)


def test_a_completed_ceremony(officers_room: Room) -> None:
    room, made = officers_room, officers_room.directory / "made"
    completed = room.run("--json", confirm=["continue"] * 3, directory=str(made))
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout.splitlines()[-1])
    assert (result["result"], result["steps_done"]) == ("completed", 3)
    assert result["transcript"] == str(room.transcript)
    assert "Step 2 of 3 - operator" in completed.stderr
    assert f"$ mhsm officers make --count 2 --output-dir {made}" in completed.stderr
    assert "made 2 officers" in completed.stderr, "the command's output is shown"
    assert stat.S_IMODE(room.transcript.stat().st_mode) == 0o600
    left = {path.name for path in room.directory.iterdir()}
    assert left == {"plan.yaml", "answers.json", "transcript.json", "made"}
    document = json.loads(room.transcript.read_bytes())
    step = document["entries"][1]
    assert step["stdout"] == f"made 2 officers in {made}\n"
    assert [item["path"] for item in step["outputs"]] == [f"{made}/officer-{n}.crt" for n in (1, 2)]
    assert document["entries"][2]["exit_code"] == 5
    assert document["answers"] == "file"
    certificate, key = made / "officer-1.crt", made / "officer-1.key"
    verified = room.verify("--file", str(certificate), "--file", str(room.plan))
    assert verified.returncode == 0, verified.stderr
    assert [item["evidence"] for item in json.loads(verified.stdout)["files"]] == ["step 2, output", "plan"]
    assert room.verify("--file", str(key)).returncode == 6
    text = ceremony("verify", str(room.transcript))
    assert "only proves integrity under the embedded certificate" in text.stdout
    assert "nobody confirmed" in text.stdout
    again = room.run(confirm=["continue"] * 3, directory=str(made))
    assert again.returncode == 1
    assert "not overwritten" in again.stderr


def test_a_failed_step_ends_the_ceremony_on_record(officers_room: Room) -> None:
    room = officers_room
    completed = room.run("--json", confirm=["continue"] * 3, directory=str(room.directory / "m"), count=1)
    assert completed.returncode == 1
    assert json.loads(completed.stdout)["result"] == "failed"
    verified = room.verified()
    assert (verified["result"], verified["steps_done"]) == ("failed", 1)
    assert verified["reason"] == "step 2: the command did not print what was expected"


def test_a_missing_input_and_a_wrong_exit_code_fail(officers_room: Room) -> None:
    room = officers_room
    room.plan.write_text(OFFICERS.replace("outputs: [", 'outputs: ["{directory}/none", '))
    room.run(confirm=["continue"] * 3, directory=str(room.directory / "m"))
    assert room.verified()["reason"] == f"step 2: {room.directory}/m/none: No such file or directory"
    room.transcript.unlink()
    room.plan.write_text(OFFICERS.replace("exit_code: 5", "exit_code: 4"))
    room.run(confirm=["continue"] * 3, directory=str(room.directory / "n"))
    assert room.verified()["reason"] == "step 3: exit code 5 instead of 4"


def test_an_abort_ends_the_ceremony_on_record(officers_room: Room) -> None:
    room = officers_room
    completed = room.run(confirm=["continue", "abort"], directory=str(room.directory / "m"))
    assert completed.returncode == 130
    assert not (room.directory / "m").exists()
    assert (room.verified()["result"], room.verified()["steps_done"]) == ("aborted", 1)


def test_a_dry_run_does_nothing(officers_room: Room) -> None:
    room = officers_room
    before = {path.name for path in room.directory.iterdir()}
    completed = ceremony("run", str(room.plan), "--dry-run", "--data-dir", "/nowhere", cwd=room.directory)
    assert completed.returncode == 0
    assert "$ mhsm officers make --count 2 --output-dir '{directory}'" in completed.stdout
    assert "Step 3 of 3" in completed.stdout
    built_in = ceremony("run", "recovery.yaml", "--dry-run", "--json", cwd=room.directory)
    assert ["mhsm", "security-domain"] in [c[:2] for c in json.loads(built_in.stdout)["commands"]]
    assert {path.name for path in room.directory.iterdir()} == before


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ("[", "not JSON"),
        ("[" * 50_000, "not JSON"),
        ('{"confirm": ["continue"]}', "one answer for each of 3 steps"),
        ('{"confirm": ["yes", "yes", "yes"]}', '"continue" and "abort"'),
        ('{"parameters": {"other": "x"}}', "names of the plan"),
        ('{"confirm": ["continue", "continue", "continue"]}', "directory has no value"),
        ('{"parameters": {"directory": "--x"}, "confirm": ["abort"]}', "not begin with a dash"),
        ('{"parameters": {"directory": 1.5}, "confirm": ["abort"]}', "text or a whole number"),
    ],
)
def test_bad_answers_are_refused_before_anything_happens(
    officers_room: Room, answers: str, said: str
) -> None:
    room = officers_room
    (room.directory / "a").write_text(answers)
    completed = room.run("--answers", str(room.directory / "a"))
    assert completed.returncode == 2
    assert said in completed.stderr
    assert not room.transcript.exists()
    assert not room.journal.exists()


def test_bad_circumstances_are_refused_before_anything_happens(officers_room: Room, tmp_path: Path) -> None:
    room = officers_room
    without_terminal = room.run()
    assert without_terminal.returncode == 2
    assert "terminal" in without_terminal.stderr
    confirm = ["continue"] * 3
    no_pool = room.run("--data-dir", str(tmp_path / "none"), confirm=confirm, directory="d")
    assert no_pool.returncode == 5
    room.transcript = tmp_path / "no" / "t.json"
    assert room.run(confirm=confirm, directory="d").returncode == 1
    room.transcript = tmp_path / "transcript.json"
    room.plan.write_text("title: x")
    assert room.run(confirm=confirm, directory="d").returncode == 2
    assert not list(tmp_path.glob("transcript*"))
    assert ceremony("verify", str(tmp_path / "none")).returncode == 1


@contextmanager
def _waiting(room: Room) -> Iterator[subprocess.Popen[str]]:
    """A ceremony whose second step's command waits; at the end it is let go."""
    arguments = room.arguments(confirm=["continue"] * 2, directory=str(room.directory))
    runner = subprocess.Popen(
        ceremony_argv(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def writer() -> int | None:
        """Open the pipe: possible only while the command has it open for reading."""
        assert runner.poll() is None, runner.communicate()
        try:
            return os.open(room.directory / "pipe", os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO
            return None

    try:
        descriptor = until(writer, 60, "the command waits")
        try:
            yield runner
        finally:
            os.close(descriptor)
    finally:
        runner.kill()
        runner.communicate(timeout=60)


def test_kill_9_within_a_step_leaves_a_journal(waiting_room: Room) -> None:
    room = waiting_room
    with _waiting(room) as runner:
        assert room.run(confirm=["abort"], directory="d").returncode == 1, "one ceremony a transcript"
        runner.kill()
        runner.wait(timeout=60)
    assert not room.transcript.exists()
    assert stat.S_IMODE(room.journal.stat().st_mode) == 0o600
    for name in (room.transcript, room.journal):
        unfinished = ceremony("verify", str(name))
        assert unfinished.returncode == 6
        assert "unfinished ceremony (A command that waits): 1 of 2 steps done" in unfinished.stderr
        assert "step 2 was under way" in unfinished.stderr
    content = room.journal.read_bytes()
    again = room.run(confirm=["abort"], directory="d")
    assert again.returncode == 1
    assert "is unfinished, or under way" in again.stderr
    assert room.journal.read_bytes() == content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_ceremony_on_record(waiting_room: Room, number: signal.Signals) -> None:
    room = waiting_room
    with _waiting(room) as runner:
        # As a terminal does it: to the runner and to the command.
        os.killpg(runner.pid, number)
        assert runner.wait(timeout=60) == 130
    verified = room.verified()
    assert (verified["result"], verified["steps_done"]) == ("aborted", 1)
    assert verified["reason"] == "interrupted in step 2"
    assert json.loads(room.transcript.read_bytes())["entries"][1]["exit_code"] != 0
    assert not room.journal.exists()


def _begun(journal: Path, runner: subprocess.Popen[bytes]) -> bool:
    return journal.exists() or runner.poll() is not None


def test_kill_9_at_any_moment_leaves_a_whole_transcript_a_journal_or_nothing(
    officers_room: Room, seed: int
) -> None:
    """G8: after an interrupted command nothing half-written is taken for a record."""
    room, moments = officers_room, random.Random(seed)
    seen = set()
    for attempt in range(5):
        room.transcript = room.directory / f"{attempt}.json"
        room.journal = room.directory / f"{attempt}.json.partial"
        arguments = room.arguments(confirm=["continue"] * 3, directory=str(room.directory / f"m{attempt}"))
        runner = subprocess.Popen(
            ceremony_argv(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            if attempt:  # the first one at any moment of its start, the others while they work
                until(partial(_begun, room.journal, runner), 60.0, "its journal")
            runner.wait(timeout=moments.uniform(0.0, 1.0))
        except subprocess.TimeoutExpired:
            runner.kill()
            runner.wait(timeout=60)
        if room.transcript.exists():
            assert verification.verify(room.transcript.read_bytes()).result == "completed"
            seen.add("transcript")
        elif room.journal.exists() and room.journal.stat().st_size:
            assert verification.read_journal(room.journal.read_bytes()).steps_done <= 3
            seen.add("journal")
    assert seen, "every run was killed before it began"


TERMINAL_SECONDS = 60.0
"""How long a prompt may take; one that was renamed is then named by the failure, and not by a time-out."""


class Terminal:
    """A pseudo-terminal with the ceremony as its foreground process."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = os.openpty()
        take_it = "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        argv = ceremony_argv(*arguments)
        argv[2] = take_it + argv[2]
        self.process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(slave)
        self._unread = b""
        self.shown = b""

    def until(self, text: str) -> bytes:
        """Read until a text appears, and return what came before it."""
        deadline = time.monotonic() + TERMINAL_SECONDS
        while text.encode() not in self._unread:
            octets = self._read(deadline)
            if not octets:
                self.process.kill()
                raise AssertionError(f"{text!r} never came: {self.shown.decode(errors='replace')}")
            self._unread += octets
        before, _, self._unread = self._unread.partition(text.encode())
        return before

    def _read(self, deadline: float) -> bytes:
        """Return what is shown next, nothing at the end or when the deadline (monotonic) comes first."""
        ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
        octets = b""
        if ready:
            with suppress(OSError):  # the other side is closed
                octets = os.read(self.master, 4096)
        self.shown += octets
        return octets

    def echoes(self) -> bool:
        """Return whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self.master)[3] & termios.ECHO)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        deadline = time.monotonic() + TERMINAL_SECONDS
        while self._read(deadline):
            pass
        code = self.process.wait(timeout=60)
        os.close(self.master)
        return code


# The key file is encrypted, so that submit-share asks for its passphrase; the file that it reads
# next is no security domain, so that it ends there and needs no pool.
AT_A_TERMINAL = """
title: At a terminal
purpose: To be tested
parameters:
  - {name: word, prompt: A word, kind: text, default: plain}
  - {name: directory, prompt: Where, kind: path}
steps:
  - {actor: officer 1, action: "Say {word}", expected: Heard}
  - actor: officer 2
    action: Answer the command
    command:
      [mhsm, security-domain, submit-share, --attempt, "{directory}/attempt",
       --security-domain, "{directory}/domain", --officer-key, "{directory}/key",
       --platform-root, "{directory}/platform.crt", --owner-root, "{directory}/owner.crt"]
    exit_code: 1
    expected: It refuses
  - {actor: officer 2, action: Go home, expected: The room is empty}
"""
PASSPHRASE = "typed for the command only"


@pytest.fixture
def terminal_room(tmp_path: Path, administrator: Administrator) -> Room:
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(PASSPHRASE.encode()),
    )
    (tmp_path / "key").write_bytes(key)
    pool = TestPool(tmp_path / "pool")
    (tmp_path / "platform.crt").write_bytes(pool.platform_root.certificate_pem)
    (tmp_path / "owner.crt").write_bytes(pool.owner_root.certificate_pem)
    attempt_id, exchange_key = bytes(16), bytes(32)
    data = exchange_key_report_data(attempt_id, exchange_key)
    attempt = {
        "purpose": "verification",
        "partition": 0,
        "pool_id": "p",
        "generation": 1,
        "attempt_id": base64.b64encode(attempt_id).decode(),
        "exchange_public_key": base64.b64encode(exchange_key).decode(),
        "new_officers": [],
        "new_required": 0,
        "exchange_certificate": "",
        "evidence": encode(pool.nodes[0].attester.attest(attempt_id, data, exchange_key)),
    }
    (tmp_path / "attempt").write_text(json.dumps(attempt))
    certificates = [officer.certificate_der for officer in make_officers(3)]
    (tmp_path / "domain").write_bytes(domain.create("p", 1, certificates, 2).file)
    return Room(tmp_path, administrator, AT_A_TERMINAL)


def _to_the_question(terminal: Terminal, room: Room) -> None:
    for prompt, keys in (
        ("A word [plain]: ", "\n"),
        ("Where: ", f"{room.directory}\n"),
        ("continue / abort: ", "continue\n"),
        ("press Enter: ", "\n"),
        ("continue / abort: ", "continue\n"),
    ):
        terminal.until(prompt)
        terminal.type(keys)


def _to_the_passphrase(terminal: Terminal, room: Room) -> None:
    _to_the_question(terminal, room)
    terminal.until("submit? [y/N]: ")
    assert b"this share is given for: verification" in terminal.shown, "what is agreed to is shown before"
    assert b"passphrase: " not in terminal.shown
    terminal.type("y\n")
    terminal.until("passphrase: ")
    until(lambda: not terminal.echoes(), 60, "the command has switched echo off")


def test_a_prompt_that_never_comes_is_a_failure_with_what_was_shown(
    terminal_room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests at a terminal end by themselves when a prompt was renamed."""
    monkeypatch.setattr(sys.modules[__name__], "TERMINAL_SECONDS", 5.0)
    terminal = Terminal(*terminal_room.arguments())
    with pytest.raises(AssertionError, match="'No such prompt' never came"):
        terminal.until("No such prompt")
    terminal.end()


def test_people_at_a_terminal(terminal_room: Room) -> None:
    room = terminal_room
    terminal = Terminal(*room.arguments())
    terminal.type("abort\n")  # typed too early: nobody confirms what he has not seen
    terminal.until("A word [plain]: ")
    terminal.type("\n")
    terminal.until("Where: ")
    terminal.type("--output=x\n")
    terminal.until("not begin with a dash")
    terminal.until("Where: ")
    terminal.type(f"{room.directory}\n")
    terminal.until("Say plain")
    terminal.until("continue / abort: ")
    terminal.type("yes\n")
    terminal.until("continue / abort: ")
    terminal.type("continue\n")
    terminal.until("The next step is for officer 2.")
    terminal.until("press Enter: ")
    assert b"Answer the command" not in terminal.shown, "the next officer's step comes after the change"
    terminal.type("\n")
    assert b"\x1b[2J" in terminal.until("Answer the command"), "the screen is cleared"
    terminal.until("continue / abort: ")
    terminal.type("abort\n")
    assert terminal.end() == 130
    document = json.loads(room.transcript.read_bytes())
    assert (document["answers"], document["parameters"]["word"]) == ("terminal", "plain")
    assert room.verified()["steps_done"] == 1


def test_a_passphrase_goes_from_the_keyboard_to_the_command(terminal_room: Room) -> None:
    """G3: it is shown nowhere and is in no record."""
    room = terminal_room
    terminal = Terminal(*room.arguments())
    _to_the_passphrase(terminal, room)
    terminal.type(f"{PASSPHRASE}\n")
    terminal.until("Go home")
    terminal.until("continue / abort: ")
    terminal.type("continue\n")
    assert terminal.end() == 0, terminal.shown.decode()
    assert PASSPHRASE.encode() not in room.transcript.read_bytes() + terminal.shown
    assert b"not an RSA key" in terminal.shown, "the command opened the key with it"
    assert room.verified()["result"] == "completed"


def test_an_officer_who_does_not_agree_is_not_asked_for_his_passphrase(terminal_room: Room) -> None:
    """G3, G4: he sees first what the share is given for."""
    room = terminal_room
    terminal = Terminal(*room.arguments())
    _to_the_question(terminal, room)
    terminal.until("submit? [y/N]: ")
    terminal.type("\n")
    terminal.until("nothing was submitted")
    terminal.until("continue / abort: ")
    terminal.type("continue\n")
    assert terminal.end() == 0, terminal.shown.decode()
    assert b"passphrase: " not in terminal.shown


@pytest.mark.parametrize(
    ("keys", "answer"), [("\x03", "interrupted"), ("\x04", "abort"), ("abort\n", "abort")]
)
def test_a_step_is_not_confirmed_by_control_keys(terminal_room: Room, keys: str, answer: str) -> None:
    room = terminal_room
    terminal = Terminal(*room.arguments())
    terminal.until("A word [plain]: ")
    terminal.type("\n")
    terminal.until("Where: ")
    terminal.type(f"{room.directory}\n")
    terminal.until("continue / abort: ")
    terminal.type(keys)
    assert terminal.end() == 130
    assert room.verified()["result"] == "aborted"
    assert json.loads(room.transcript.read_bytes())["entries"][0]["answer"] == answer


def test_ctrl_c_at_a_passphrase(terminal_room: Room) -> None:
    """On record, and the terminal echoes again."""
    room = terminal_room
    terminal = Terminal(*room.arguments())
    _to_the_passphrase(terminal, room)
    terminal.type("\x03")
    terminal.until("aborted: 1 of 3 steps")
    assert terminal.echoes()
    assert terminal.end() == 130
    assert (room.verified()["result"], room.verified()["reason"]) == ("aborted", "interrupted in step 2")
    # 143 if the signal came just before the command began to read: then the runner ended it.
    assert json.loads(room.transcript.read_bytes())["entries"][1]["exit_code"] in (130, 143)


REPEATED = """
title: A step that fails
purpose: To be tested
parameters:
  - {name: directory, prompt: Where, kind: path}
steps:
  - actor: operator
    action: Make officers
    command: [mhsm, officers, make, --count, "2", --output-dir, "{directory}/made"]
    expected: Files
    inputs: ["{directory}/late"]
    outputs: ["{directory}/made/officer-1.crt"]
  - {actor: operator, action: Go home, expected: The room is empty}
"""


def test_a_step_that_failed_is_done_again_at_a_terminal(tmp_path: Path, administrator: Administrator) -> None:
    """G7: each time is on record, and the ceremony completes."""
    room = Room(tmp_path, administrator, REPEATED)
    terminal = Terminal(*room.arguments())
    terminal.until("Where: ")
    terminal.type(f"{room.directory}\n")
    terminal.until("late: No such file or directory")
    terminal.until("repeat / abort: ")
    (room.directory / "late").write_text("here")
    (room.directory / "made").write_text("in the way")
    terminal.type("repeat\n")
    terminal.until("continue / abort: ")
    terminal.type("continue\n")
    terminal.until("failed: step 1: exit code 1 instead of 0")
    terminal.until("repeat / abort: ")
    (room.directory / "made").unlink()
    terminal.type("repeat\n")
    terminal.until("continue / abort: ")
    terminal.type("continue\n")
    terminal.until("Go home")
    terminal.until("continue / abort: ")
    terminal.type("continue\n")
    assert terminal.end() == 0, terminal.shown.decode()
    entries = json.loads(room.transcript.read_bytes())["entries"]
    assert [entry["result"] for entry in entries] == ["failed", "failed", "done", "done", "completed"]
    assert (room.verified()["result"], room.verified()["steps_done"]) == ("completed", 2)
    made = room.verify("--file", str(room.directory / "made/officer-1.crt"))
    assert json.loads(made.stdout)["files"][0]["evidence"] == "step 1, output"


@pytest.mark.parametrize("keys", ["abort\n", "\x03", "\x04"])
def test_a_step_that_failed_ends_the_ceremony_if_nobody_repeats_it(
    tmp_path: Path, administrator: Administrator, keys: str
) -> None:
    room = Room(tmp_path, administrator, REPEATED)
    terminal = Terminal(*room.arguments())
    terminal.until("Where: ")
    terminal.type(f"{room.directory}\n")
    terminal.until("repeat / abort: ")
    terminal.type(keys)
    assert terminal.end() == 1
    assert (room.verified()["result"], room.verified()["steps_done"]) == ("failed", 0)


def test_the_commands_come_from_the_installed_package(officers_room: Room) -> None:
    """A file in the directory where people stand is never run."""
    room = officers_room
    package = room.directory / "hsm_pool"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit(99)")
    inner = ceremony_argv(*room.arguments(confirm=["continue"] * 3, directory=str(room.directory / "m")))
    inner.insert(1, "-P")
    completed = subprocess.run(
        inner, cwd=room.directory, capture_output=True, text=True, timeout=120, check=False
    )
    assert completed.returncode == 0, completed.stderr
    assert sys.executable == inner[0]
