"""Child processes that die with their parent, are restarted with back-off, and log to files."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from hsm_pool.regular_files import open_own_file

_log = structlog.get_logger()
_LOGS_KEPT = 5
_STABLE_SECONDS = 10.0
_DOUBLINGS_MAX = 16
"""Beyond any pause; a power of two that grows for ever does not fit a float in the end."""


def is_running(process_id: int) -> bool:
    """Return whether a process runs; one that has exited and only awaits its parent does not."""
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def minimal_environment() -> dict[str, str]:
    """Return the few variables that a child needs."""
    kept = ("PATH", "HOME", "LANG", "PYTHONPATH", "GOMAXPROCS", "GOGC")
    return {name: os.environ[name] for name in kept if name in os.environ}


@dataclass(frozen=True, slots=True)
class RunAs:
    """The user and group, of the same number, that a process runs as, and what it keeps of root."""

    user_id: int
    capabilities: tuple[str, ...] = ()
    """Names of capabilities(7) in small letters; whoever starts it has them."""

    def options(self) -> list[str]:
        """Return options of setpriv(1)."""
        kept = ",".join(["-all", *(f"+{name}" for name in self.capabilities)])
        number = str(self.user_id)
        options = ["--reuid", number, "--regid", number, "--clear-groups", "--no-new-privs"]
        if os.geteuid() == 0:  # else they are bounded already, and it takes a privilege to bound them
            options += ["--bounding-set", kept, "--securebits", "+noroot,+noroot_locked"]
        return [*options, "--inh-caps", kept, "--ambient-caps", kept]


def dying_with_parent(command: Sequence[str], run_as: RunAs | None = None) -> list[str]:
    """Return the command so that the kernel kills it with the process that started it.

    The kernel watches the *thread* that started it: start it from the main thread.
    """
    return ["setpriv", "--pdeathsig", "KILL", *(run_as.options() if run_as else ()), "--", *command]


@dataclass(slots=True)
class Child:
    """One process that is to be running. Not thread-safe; driven by one loop.

    Args:
        name: Name of its log files.
        command: What to run.
        log_directory: Where its output goes; None inherits standard error.
        backoff_seconds: First and last pause before a restart.
        pipe_output: Keep its standard output as a pipe for the owner to read.
        run_as: Another user to run as; None for this process's own.
    """

    name: str
    command: Sequence[str]
    log_directory: Path | None
    backoff_seconds: tuple[float, float]
    pipe_output: bool = False
    run_as: RunAs | None = None
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    """How often it has ended, in a row, soon after a start."""
    exit_code: int | None = None
    """Of the last exit; a signal's number is negative."""
    start_at: float | None = field(default_factory=time.monotonic)
    """When it is to be started; None while it runs."""

    @property
    def process_id(self) -> int | None:
        """Process id while it runs."""
        return self.process.pid if self.process else None

    def start(self) -> None:
        """Start it now; if that is not possible, as on a lost disk, try again after a pause."""
        self.started_at, self.start_at = time.monotonic(), None
        try:
            self._start()
        except OSError as error:
            _log.warning("cannot be started", name=self.name, reason=error.strerror, file=error.filename)
            self._plan()

    def _start(self) -> None:
        output = self._open_log()
        try:
            self.process = subprocess.Popen(
                dying_with_parent(self.command, self.run_as),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self.pipe_output else output,
                stderr=output,
                env=minimal_environment(),
                cwd="/",
            )
        finally:
            if output is not None:
                os.close(output)

    def reap(self) -> bool:
        """Return whether it has exited since the last call; plans its restart."""
        if self.process is None or (exit_code := self.process.poll()) is None:
            return False
        self.process, self.exit_code = None, exit_code
        self._plan()
        return True

    def _plan(self) -> None:
        now = time.monotonic()
        self.failures = 0 if now - self.started_at > _STABLE_SECONDS else self.failures + 1
        first, last = self.backoff_seconds
        self.start_at = now + min(last, first * 2 ** min(_DOUBLINGS_MAX, max(0, self.failures - 1)))

    def due(self) -> bool:
        """Return whether it is to be started now."""
        return self.start_at is not None and time.monotonic() >= self.start_at

    def settle(self) -> bool:
        """Return whether it has now stayed up for so long that its failures are forgotten."""
        stable = self.process is not None and time.monotonic() - self.started_at > _STABLE_SECONDS
        if not self.failures or not stable:
            return False
        self.failures = 0
        return True

    def kill(self) -> None:
        """End it by force; it exits like one that has failed, to be reaped and restarted."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout_seconds: float) -> None:
        """End it: politely first, bounded, then by force; it is reaped."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _open_log(self) -> int | None:
        if self.log_directory is None:
            return None
        path = self.log_directory / f"{self.name}.log"
        for number in range(_LOGS_KEPT - 1, 0, -1):
            older = self.log_directory / f"{self.name}.{number}.log"
            newer = self.log_directory / f"{self.name}.{number - 1}.log" if number > 1 else path
            if newer.exists():
                newer.replace(older)
        # The directory may be the child's own: nothing that lies there is followed.
        return open_own_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def next_wait_seconds(children: Sequence[Child], longest_seconds: float) -> float:
    """Return how long a loop may wait before a child is due."""
    now = time.monotonic()
    due = [child.start_at - now for child in children if child.start_at is not None]
    return max(0.0, min([longest_seconds, *due]))


class SignalPipe:
    """Makes SIGCHLD and the stop signals readable by a selector. Main thread only."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.stopping = False
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def drain(self) -> None:
        """Forget the signals that were read."""
        try:
            while os.read(self.reader, 512):
                pass
        except BlockingIOError:
            pass
