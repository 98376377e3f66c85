"""The runner of a ceremony: one step after the other, each confirmed, each on record before the next.

A command runs as a child process: arguments as a list, never through a shell; its standard input is
the terminal itself, so that an officer agrees there, and a passphrase goes from the keyboard to the
command and never through here.
Its output is shown as it comes and goes into the record.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

from rich.console import Console

from hsm_pool.ceremony_runner import command
from hsm_pool.ceremony_runner.command import Output
from hsm_pool.ceremony_runner.display import show, show_plan, show_step
from hsm_pool.ceremony_runner.interaction import CONTINUE, Interaction
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

OUTPUT_TEXT_TOTAL_BYTES_MAX: Final = 1024 * 1024
"""Bytes of output that are recorded as text over all steps, so that a transcript stays bounded."""

INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a ceremony ended, and its signed transcript."""

    result: str
    reason: str
    steps_done: int
    transcript: bytes


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
        self._seen: dict[str, dict[str, str]] = {}
        """Evidence of the files that the steps have used and left, by path."""
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
        output = Output()
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
            found = self._evidence("input", path)
            fields["inputs"].append(found)
            if self._seen.get(path, found) != found:
                raise _StepFailed(f"{path} is another file than before in this ceremony")
        fields["answer"] = self._interaction.confirm(number)
        if fields["answer"] != CONTINUE:
            fields["reason"] = f"aborted in step {number} by {step.actor}"
        return bool(fields["answer"] == CONTINUE)

    def _act(self, step: Step, fields: dict[str, Any], output: Output) -> None:
        if step.command:
            try:
                command.run(step.command, self._interaction.standard_input, self._console, output)
            except command.TookTooLong as error:
                raise _StepFailed(str(error)) from None
            if output.exit_code != step.exit_code:
                raise _StepFailed(f"exit code {output.exit_code} instead of {step.exit_code}")
            if step.expected_output not in bytes(output.text).decode(errors="replace"):
                raise _StepFailed("the command did not print what was expected")
        for path in step.outputs:
            fields["outputs"].append(self._evidence("output", path))
        for before in fields["inputs"]:
            if before["path"] not in step.outputs and evidence(before["path"]) != before:
                raise _StepFailed(f"{before['path']} changed while the step was done")
        self._seen.update({item["path"]: item for item in (*fields["inputs"], *fields["outputs"])})
        fields["result"] = DONE

    def _evidence(self, kind: str, path: str) -> dict[str, str]:
        found = evidence(path)
        lines = (f"  {kind}: {path}", f"    SHA-256 {found['sha256']}", f"    words   {found['words']}")
        show(self._console, *lines)
        return found
