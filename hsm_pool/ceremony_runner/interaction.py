"""Who answers in a ceremony: people at a terminal, or a file for tests and automation."""

from __future__ import annotations

import os
import subprocess
import termios
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Protocol

from rich.console import Console

ATTEMPTS_MAX: Final = 20
LINE_BYTES_MAX: Final = 4096

CONTINUE, ABORT, REPEAT = "continue", "abort", "repeat"


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
            self._console.out("type the whole word", highlight=False)
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
