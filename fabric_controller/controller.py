"""The controller's process: poll all partitions, plan, take one step, tell what changed.

One loop in one thread, a thin shell around :mod:`fabric_controller.planner`. What it is to
do stands in the journal; whoever wants the picture reads ``status.json`` in the data
directory, which is replaced as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import structlog

from fabric_controller.enclave_client import EnclaveClient, EnclaveError
from fabric_controller.hardening import harden, in_force
from fabric_controller.issuing import issue
from fabric_controller.journal import Journal, JournalHeld
from fabric_controller.observe import Picture, as_document, blank, observe
from fabric_controller.own_files import open_own_file
from fabric_controller.planner import Act, Done, Halt, plan
from fabric_controller.report import work_document
from fabric_controller.settings import FabricSettings
from fabric_controller.work import Issuer

POLL_SECONDS: Final = 1.0
"""Pause between two rounds."""

WORK_SECONDS: Final = 0.25
"""Pause between two rounds while there is work."""

SILENCE_SECONDS: Final = 20.0
"""A controller that has not written its status for so long does not run; a round may take 13 s."""

STATUS_BYTES_MAX: Final = 64 * 1024
"""Bytes that are read of a status file; a real one has about 3 KiB."""

_JOURNAL_SECONDS: Final = 2.0
"""How long a round waits for an operator's command; meanwhile it does not show itself."""

STATUS_FILE: Final = "status.json"
LOCK_FILE: Final = "controller.lock"
FORMAT_VERSION: Final = 3
"""Version of the object in status.json and of ``status --json``."""


class AlreadyRunningError(Exception):
    """Another controller holds the data directory."""


def status_document(pool_id: str, picture: Picture, work: dict[str, Any]) -> dict[str, Any]:
    """Return the object of status.json and ``status --json``.

    It holds format version, pool, time of the round (UTC), the partitions and the work, see
    :func:`fabric_controller.report.work_document`.
    """
    return {
        "format_version": FORMAT_VERSION,
        "pool_id": pool_id,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **as_document(picture),
        "work": work,
    }


def last_said(data_directory: Path) -> dict[str, Any]:
    """Return what the controller wrote in its last round, {} when that is not readable or not printable.

    Beside the status document it holds ``controller``: ``process_id``, in its own namespace,
    ``user_id`` and ``hardening``.
    """
    try:
        with os.fdopen(open_own_file(data_directory / STATUS_FILE, os.O_RDONLY), "rb") as file:
            said = json.loads(file.read(STATUS_BYTES_MAX))
            printable = _is_printable(said)
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) and printable else {}


def _is_printable(value: Any) -> bool:
    """Return whether no text in a JSON value steers the terminal of the operator who has it shown."""
    if isinstance(value, dict):
        return all(_is_printable(name) and _is_printable(each) for name, each in value.items())
    if isinstance(value, list):
        return all(map(_is_printable, value))
    return not isinstance(value, str) or value.isprintable()


def running_controller(data_directory: Path) -> dict[str, Any] | None:
    """Return what the controller said of itself, None when it said nothing.

    Without its process id: in a namespace of its own that names another process here. But with
    ``alive``, whether it has shown itself lately, and ``last_seen``, when it did (UTC).
    """
    document = last_said(data_directory)
    said = document.get("controller")
    if not isinstance(said, dict):
        return None
    user_id, hardening = said.get("user_id"), said.get("hardening")
    return {
        "user_id": user_id if isinstance(user_id, int) else None,
        "hardening": [name for name in hardening if isinstance(name, str)]
        if isinstance(hardening, list)
        else [],
        "alive": is_alive(data_directory),
        "last_seen": document.get("time"),
    }


def is_alive(data_directory: Path) -> bool:
    """Return whether the controller has shown itself lately: not stopped, not hung."""
    try:
        written_at = (data_directory / STATUS_FILE).stat().st_mtime
    except OSError:
        return False
    return abs(time.time() - written_at) < SILENCE_SECONDS


def write_atomically(path: Path, document: dict[str, Any]) -> None:
    """Replace a file by a JSON document, mode 0600: a reader sees the old one or the new one.

    It is not synchronised to disk: the next round writes it again.

    Raises:
        OSError: The old file is untouched and no part of the new one is left.
    """
    temporary = path.with_name(path.name + ".new")
    # A file that an earlier, killed writer left behind goes first, whatever its mode is.
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file)
            file.write("\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def sole_controller(data_directory: Path) -> Iterator[None]:
    """Hold the data directory, as the one controller that works.

    Raises:
        AlreadyRunningError: Another controller does.
    """
    descriptor = os.open(data_directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunningError(str(data_directory)) from None
        yield
    finally:
        os.close(descriptor)


def make_logger() -> Any:
    """Return a logger of JSON lines on standard error."""
    return structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
    )


def take_step(journal: Journal, client: EnclaveClient, picture: Picture, counter: int, logger: Any) -> bool:
    """Take the next step of the work; return whether one was taken.

    The journal is held from the decision until the result is in it, so that an operator's
    command comes before or after, never in between. ``counter`` is that of the newest command
    before the picture was taken: after a later one the pool is looked at again.
    """
    with journal.exclusive(_JOURNAL_SECONDS) as work:
        if work.counter != counter:
            return False
        decision = plan(picture, work, time.time_ns() // 1_000_000)
        match decision:
            case Act(verb, partition, argument):
                code = "OK"
                try:
                    issue(journal, client, verb, partition, Issuer.CONTROLLER, argument)
                except EnclaveError as error:
                    code = error.code
                logger.info("command", verb=verb.value, partition=partition, code=code)
            case Halt(reason):
                journal.append({"kind": "halt", "by": Issuer.CONTROLLER.value, "reason": reason})
                logger.warning("halted", reason=reason)
            case Done():
                journal.append({"kind": "done"})
                logger.info("done")
            case _:
                return False
    return True


def run(
    settings: FabricSettings,
    client: EnclaveClient,
    journal: Journal,
    stop: threading.Event,
    logger: Any,
) -> None:
    """Poll and work until ``stop`` is set; a round under way is finished, at most one deadline.

    A status file that cannot be written is logged once and tried again with the next round.

    Raises:
        JournalDamaged: Somebody has written into the journal.
        OSError: The journal cannot be written: without it nothing is sent.
    """
    path = Path(settings.data_directory) / STATUS_FILE
    picture = blank(settings.indexes)
    write_failure: str | None = None
    while not stop.is_set():
        counter = journal.refresh().counter
        picture, changes = observe(picture, client.get_status_of_all())
        for change in changes:
            logger.info(
                "changed",
                partition=change.partition,
                what=change.what,
                before=change.before,
                after=change.after,
            )
        work = journal.refresh()
        failure = None
        try:
            told = work_document(picture, work, time.time_ns() // 1_000_000)
            document = status_document(settings.pool_id, picture, told)
            controller = {"process_id": os.getpid(), "user_id": os.geteuid(), "hardening": in_force()}
            write_atomically(path, {**document, "controller": controller})
        except OSError as error:
            failure = errno.errorcode.get(error.errno or 0, "UNKNOWN")
        if failure != write_failure:
            logger.warning("status_file", failure=failure)
            write_failure = failure
        if work.goal is not None:
            try:
                take_step(journal, client, picture, counter, logger)
            except JournalHeld:  # by an operator's command, that may hang: the next round tries again
                logger.warning("the journal is held")
        stop.wait(WORK_SECONDS if work.running else POLL_SECONDS)


def serve(settings: FabricSettings) -> None:
    """Run the controller until SIGTERM or SIGINT. Call it from the main thread.

    Raises:
        AlreadyRunningError: Another controller holds the data directory.
        JournalDamaged: The journal holds what was not written to it.
        OSError: The data directory or the identity cannot be used.
    """
    stop = threading.Event()

    def end(_number: int, _frame: object) -> None:
        # Not stop.set() here: the handler interrupts stop.wait(), which may hold the lock that set() takes.
        threading.Thread(target=stop.set, daemon=True).start()

    logger = make_logger()
    data_directory = Path(settings.data_directory)
    data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    harden(settings)
    with (
        sole_controller(data_directory),
        contextlib.closing(Journal(data_directory, settings.indexes)) as journal,
        EnclaveClient(settings) as client,
    ):
        journal.begin_anew()
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        logger.info(
            "started", pool_id=settings.pool_id, partitions=len(settings.partitions), hardening=in_force()
        )
        run(settings, client, journal, stop, logger)
        logger.info("ended", pool_id=settings.pool_id)
