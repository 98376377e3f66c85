"""The command of a step, as a child process: shown as it comes, kept for the record, always ended."""

from __future__ import annotations

import hashlib
import os
import selectors
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

from rich.console import Console

OUTPUT_TEXT_BYTES_MAX: Final = 64 * 1024
"""Bytes of a command's standard output that are recorded as text; the digest is of all."""
COMMAND_SECONDS_MAX: Final = 3600.0
"""How long a command may take; officers may have to fetch a key from a safe."""
END_SECONDS: Final = 5.0
"""How long an interrupted command may take to end by itself, and again after SIGTERM."""


class TookTooLong(Exception):
    """The command was ended."""


@dataclass(slots=True)
class Output:
    """What a command wrote, or would have."""

    exit_code: int | None = None
    text: bytearray = field(default_factory=bytearray)
    stdout: Any = field(default_factory=hashlib.sha256)
    stderr: Any = field(default_factory=hashlib.sha256)


def run(command: Sequence[str], standard_input: int | None, console: Console, output: Output) -> None:
    """Run a command; when this returns or raises, it has ended.

    Args:
        command: mhsm and its arguments, never through a shell.
        standard_input: As subprocess takes it; None for the terminal itself.
        console: Where its output is shown.
        output: Gets what it writes, and its exit code; 128 and the number for a signal.

    Raises:
        TookTooLong: It did not end within COMMAND_SECONDS_MAX.
        OSError: It cannot be started.
    """
    console.file.flush()
    # -P: never import from the directory that people happen to stand in.
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "hsm_pool.cli", *command[1:]],
        stdin=standard_input,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with _terminal_kept(), child, _Relay(child, output, console) as relay:
        try:
            if not relay.until(time.monotonic() + COMMAND_SECONDS_MAX):
                raise TookTooLong(f"the command took more than {COMMAND_SECONDS_MAX:.0f} s")
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

    def __init__(self, child: subprocess.Popen[bytes], output: Output, console: Console) -> None:
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
