"""The runner of a ceremony: one step after the other, each confirmed, each on record before the next.

A command runs as a child process: arguments as a list, never through a shell; its standard input is
the terminal itself, so that an officer agrees there, and a passphrase goes from the keyboard to the
command and never through here.
Its output is shown as it comes and goes into the record.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final, Protocol, Self

from rich.console import Console

from hsm_pool.ceremony_runner.plan import FILLED_LENGTH_MAX, Plan, Step
from hsm_pool.ceremony_runner.transcript import (
    ABORTED,
    COMPLETED,
    DONE,
    FAILED,
    REPEATS_MAX,
    Identity,
    Journal,
    evidence,
    now,
)

OUTPUT_TEXT_BYTES_MAX: Final = 64 * 1024
"""Bytes of a command's standard output that are recorded as text; the digest is of all."""
OUTPUT_TEXT_TOTAL_BYTES_MAX: Final = 1024 * 1024
"""The same over all steps, so that a transcript stays bounded."""
COMMAND_SECONDS_MAX: Final = 3600.0
"""How long a command may take; officers may have to fetch a key from a safe."""
END_SECONDS: Final = 5.0
"""How long an interrupted command may take to end by itself, and again after SIGTERM."""
ATTEMPTS_MAX: Final = 20
LINE_BYTES_MAX: Final = 4096

CONTINUE, ABORT, REPEAT, INTERRUPTED = "continue", "abort", "repeat", "interrupted"


class Interaction(Protocol):
    """Who answers: people at a terminal, or a file."""

    standard_input: int | None
    """Of the commands: None for the terminal, at which they may ask; DEVNULL where a file answers."""

    def change_actor(self, actor: str) -> None:
        """Return when this actor is at the keyboard."""

    def confirm(self, number: int) -> str:
        """Return "continue" or "abort" for a step that has been shown."""

    def repeats(self) -> bool:
        """Return whether a step that failed is to be done again."""


class TerminalInteraction:
    """People at the terminal that is standard input."""

    standard_input: int | None = None

    def __init__(self, console: Console) -> None:
        self._console = console

    def line(self, prompt: str) -> str | None:
        """Return one line without its end, or None at the end of input (Ctrl-D).

        What was typed before the prompt is discarded: nobody confirms what he has not yet seen. It is
        read without a buffer, so that what is typed later is left for the command.
        """
        with suppress(termios.error):
            termios.tcflush(0, termios.TCIFLUSH)
        self._console.out(prompt, end="", highlight=False)
        octets = os.read(0, LINE_BYTES_MAX)
        return octets.decode(errors="replace").rstrip("\r\n") if octets else None

    def change_actor(self, actor: str) -> None:
        """Wait for Enter, then clear the screen."""
        if self.line(f"\nThe next step is for {actor}. Change places, then press Enter: ") is None:
            raise KeyboardInterrupt
        self._console.clear()

    def confirm(self, number: int) -> str:  # noqa: ARG002
        """Ask until one of the two words is typed."""
        return self._choice(CONTINUE)

    def repeats(self) -> bool:
        """Ask until one of the two words is typed."""
        return self._choice(REPEAT) == REPEAT

    def _choice(self, word: str) -> str:
        """Return the word, or "abort"; that too at the end of input."""
        for _ in range(ATTEMPTS_MAX):
            answer = self.line(f"{word} / {ABORT}: ")
            if answer is None:
                return ABORT
            if answer.strip().lower() in (word, ABORT):
                return answer.strip().lower()
        return ABORT


class AnswersInteraction:
    """Answers from a file, one a step, for tests and automation."""

    standard_input: int | None = subprocess.DEVNULL

    def __init__(self, confirm: Sequence[str]) -> None:
        self._confirm = confirm

    def change_actor(self, actor: str) -> None:
        """Nobody changes places."""

    def confirm(self, number: int) -> str:
        """Return the answer; abort after the last one."""
        return self._confirm[number - 1] if number <= len(self._confirm) else ABORT

    def repeats(self) -> bool:
        """Nobody is there to set right what failed."""
        return False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a ceremony ended, and its signed transcript."""

    result: str
    reason: str
    steps_done: int
    transcript: bytes


@dataclass(slots=True)
class _Output:
    """What a command wrote, or would have."""

    exit_code: int | None = None
    text: bytearray = field(default_factory=bytearray)
    stdout: Any = field(default_factory=hashlib.sha256)
    stderr: Any = field(default_factory=hashlib.sha256)


class _StepFailed(Exception):
    """The step cannot be called done."""


class _Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP: raised once, in a guarded block only, so that no record is torn."""

    def __init__(self) -> None:
        self._arrived = False
        self._guarded = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take over the signals."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._arrive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at the first signal of this block, or before it."""
        self._guarded = True
        try:
            if self._arrived:
                raise KeyboardInterrupt
            yield
        finally:
            self._guarded = False

    def _arrive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        first, self._arrived = not self._arrived, True
        if first and self._guarded:
            raise KeyboardInterrupt


class Runner:
    """Runs one plan.

    Args:
        plan: What to do.
        steps: Its steps, filled in.
        console: Where people read; the children's output goes to the same file.
        interaction: Who answers.
    """

    def __init__(self, plan: Plan, steps: Sequence[Step], console: Console, interaction: Interaction) -> None:
        self._plan = plan
        self._steps = steps
        self._console = console
        self._interaction = interaction
        self._interrupts = _Interrupts()
        self._text_left = OUTPUT_TEXT_TOTAL_BYTES_MAX
        self._repeats_left = REPEATS_MAX
        self._repeated_length_left = FILLED_LENGTH_MAX

    def run(
        self,
        journal: Journal,
        identity: Identity,
        write: Callable[[bytes], None],
        audit_checkpoints: Callable[[], Sequence[str]],
    ) -> Outcome:
        """Do the steps until one fails for good or is not confirmed, and sign the record in any case.

        A step that failed may be done again; each time has its own entry.

        Args:
            journal: Of this ceremony; removed after the transcript has been written.
            identity: Signs.
            write: Called with the transcript, while signals wait.
            audit_checkpoints: Asks the partitions for the newest checkpoints of their audit logs.

        Raises:
            OSError: The journal cannot be written; it stays as it is.
        """
        done, result, reason, actor = 0, COMPLETED, "", ""
        with self._interrupts.handled():
            show_plan(self._console, self._plan)
            while done < len(self._steps):
                number, step = done + 1, self._steps[done]
                fields = self._step(journal, number, step, changed=bool(actor) and actor != step.actor)
                journal.append(fields)
                result, reason, actor = fields["result"], fields["reason"], step.actor
                done += result == DONE
                if result != DONE and not (result == FAILED and self._repeats(step, reason)):
                    break
            result = COMPLETED if result == DONE else result
            transcript = journal.sealed(identity, result, reason, audit_checkpoints())
            write(transcript)
            journal.remove()
        return Outcome(result, reason, done, transcript)

    def _repeats(self, step: Step, reason: str) -> bool:
        """Say why a step failed, and ask whether it is to be done again; within bounds of the record."""
        show(self._console, f"\n  failed: {reason}")
        length = sum(len(text) for text in step.texts())
        if not self._repeats_left or length > self._repeated_length_left:
            return False
        self._repeats_left -= 1
        self._repeated_length_left -= length
        try:
            with self._interrupts.guard():
                return self._interaction.repeats()
        except (KeyboardInterrupt, OSError):  # also when the terminal is gone
            return False

    def _step(self, journal: Journal, number: int, step: Step, *, changed: bool) -> dict[str, Any]:
        """Do one step and return the fields of its entry."""
        output = _Output()
        fields: dict[str, Any] = {
            "actor": step.actor,
            "action": step.action,
            "command": list(step.command),
            "expected": step.expected,
            "answer": "",
            "started": now(),
            "inputs": [],
            "outputs": [],
            "result": ABORTED,
            "reason": "",
        }
        try:
            with self._interrupts.guard():
                if changed:
                    self._interaction.change_actor(step.actor)
                if self._confirmed(number, step, fields):
                    journal.begin(number)
                    self._act(step, fields, output)
        except KeyboardInterrupt:
            answer = fields["answer"] or INTERRUPTED
            fields.update(answer=answer, result=ABORTED, reason=f"interrupted in step {number}")
        except _StepFailed as error:
            fields.update(result=FAILED, reason=f"step {number}: {error}")
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fields.update(result=FAILED, reason=f"step {number}: {where}{error.strerror or error}")
        # It will be shown; the system's error texts are not ours.
        fields["reason"] = "".join(c if c.isprintable() else "?" for c in fields["reason"])
        kept = bytes(output.text[: self._text_left])
        self._text_left -= len(kept)
        fields.update(
            exit_code=output.exit_code,
            stdout=kept.decode(errors="replace"),
            stdout_sha256=output.stdout.hexdigest(),
            stderr_sha256=output.stderr.hexdigest(),
            ended=now(),
        )
        return fields

    def _confirmed(self, number: int, step: Step, fields: dict[str, Any]) -> bool:
        show_step(self._console, number, len(self._steps), step)
        for path in step.inputs:
            fields["inputs"].append(self._evidence("input", path))
        fields["answer"] = self._interaction.confirm(number)
        if fields["answer"] != CONTINUE:
            fields["reason"] = f"aborted in step {number} by {step.actor}"
        return bool(fields["answer"] == CONTINUE)

    def _act(self, step: Step, fields: dict[str, Any], output: _Output) -> None:
        if step.command:
            self._command(step.command, output)
            if output.exit_code != step.exit_code:
                raise _StepFailed(f"exit code {output.exit_code} instead of {step.exit_code}")
            if step.expected_output not in bytes(output.text).decode(errors="replace"):
                raise _StepFailed("the command did not print what was expected")
        for path in step.outputs:
            fields["outputs"].append(self._evidence("output", path))
        for before in fields["inputs"]:
            if before["path"] not in step.outputs and evidence(before["path"]) != before:
                raise _StepFailed(f"{before['path']} changed while the step was done")
        fields["result"] = DONE

    def _evidence(self, kind: str, path: str) -> dict[str, str]:
        found = evidence(path)
        lines = (f"  {kind}: {path}", f"    SHA-256 {found['sha256']}", f"    words   {found['words']}")
        show(self._console, *lines)
        return found

    def _command(self, command: Sequence[str], output: _Output) -> None:
        """Run a command; when this returns or raises, it has ended."""
        self._console.file.flush()
        # -P: never import from the directory that people happen to stand in.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "hsm_pool.cli", *command[1:]],
            stdin=self._interaction.standard_input,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with _terminal_kept(), child, _Relay(child, output, self._console) as relay:
            try:
                if not relay.until(time.monotonic() + COMMAND_SECONDS_MAX):
                    raise _StepFailed(f"the command took more than {COMMAND_SECONDS_MAX:.0f} s")
            finally:
                # Ctrl-C reached the command too: it may end by itself, but must end.
                for number in (None, signal.SIGTERM, signal.SIGKILL):
                    if number is not None:
                        child.send_signal(number)
                    if relay.until(time.monotonic() + END_SECONDS):
                        break
                code = child.wait()
                output.exit_code = code if code >= 0 else 128 - code


class _Relay:
    """Shows and keeps what a child writes, until it ends; a daemon that it leaves is not waited for."""

    def __init__(self, child: subprocess.Popen[bytes], output: _Output, console: Console) -> None:
        self._output = output
        self._display = console.file.fileno()
        self._ended = False
        self._process = os.pidfd_open(child.pid)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process, selectors.EVENT_READ)
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                self._selector.register(stream.fileno(), selectors.EVENT_READ, stream is child.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._selector.close()
        os.close(self._process)

    def until(self, deadline: float) -> bool:
        """Relay until the child has ended; False if the deadline (monotonic seconds) comes first."""
        while not self._ended:
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return False
            self._ended = any(key.fd == self._process for key, _ in ready)
            for key in list(self._selector.get_map().values()):
                if key.fd != self._process:
                    self._pass_on(key.fd, standard_output=bool(key.data))
        return True

    def _pass_on(self, descriptor: int, *, standard_output: bool) -> None:
        """Pass on what can be read now, at most one pipe's content: the display may be slow."""
        for _ in range(16):
            try:
                octets = os.read(descriptor, OUTPUT_TEXT_BYTES_MAX)
            except BlockingIOError:
                return
            if not octets:
                self._selector.unregister(descriptor)
                return
            if standard_output:
                self._output.stdout.update(octets)
                self._output.text += octets[: OUTPUT_TEXT_BYTES_MAX - len(self._output.text)]
            else:
                self._output.stderr.update(octets)
            # The terminal may be gone: the command is still relayed to its end; the next step fails.
            with suppress(OSError):
                while octets:
                    octets = octets[os.write(self._display, octets) :]


@contextmanager
def _terminal_kept() -> Iterator[None]:
    """Restore the terminal's settings: a command that was ended at a passphrase has switched echo off."""
    settings: list[Any] | None = None
    with suppress(termios.error):
        settings = termios.tcgetattr(0)
    try:
        yield
    finally:
        if settings is not None:
            with suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, settings)


def show(console: Console, *lines: str) -> None:
    """Show lines as they are: what is read aloud is neither wrapped nor coloured."""
    for line in lines:
        console.out(line, highlight=False)


def show_plan(console: Console, plan: Plan) -> None:
    """Show what the ceremony is, with the words that everybody in the room compares."""
    lines = (plan.title, plan.purpose, f"plan: SHA-256 {plan.digest}", f"      words   {plan.words}")
    show(console, *lines)


def show_parameters(console: Console, plan: Plan, values: Mapping[str, str]) -> None:
    """Show what is asked for before the first step, by the names that an answers file uses."""
    lines = [f"  {entry.name}: {values.get(entry.name, '?')}  ({entry.prompt})" for entry in plan.parameters]
    show(console, "\nParameters", *lines)


def show_step(console: Console, number: int, steps: int, step: Step) -> None:
    """Show a step and its exact command."""
    lines = [f"\nStep {number} of {steps} - {step.actor}", f"  {step.action}"]
    lines.append(f"  $ {shlex.join(step.command)}" if step.command else "  (a check by eye: no command)")
    if step.command and step.exit_code:
        lines.append(f"  exit code: {step.exit_code}")
    lines.append(f"  expected: {step.expected}")
    lines += [f"  on record before: {path}" for path in step.inputs]
    lines += [f"  on record after: {path}" for path in step.outputs]
    show(console, *lines)
