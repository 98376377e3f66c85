"""The controller's process: poll all partitions, keep the picture, tell what changed.

One loop in one thread. It decides nothing yet; whoever wants the picture reads
``status.json`` in the data directory, which is replaced as a whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import structlog

from fabric_controller.enclave_client import EnclaveClient
from fabric_controller.observe import Picture, as_document, blank, observe
from fabric_controller.settings import FabricSettings

POLL_SECONDS: Final = 1.0
"""Pause between two rounds."""

STATUS_FILE: Final = "status.json"
LOCK_FILE: Final = "controller.lock"
FORMAT_VERSION: Final = 1
"""Version of the object in status.json and of ``status --json``."""


class AlreadyRunningError(Exception):
    """Another controller holds the data directory."""


def status_document(pool_id: str, picture: Picture) -> dict[str, Any]:
    """Return the object of status.json: format version, pool, time of the round (UTC) and partitions."""
    return {
        "format_version": FORMAT_VERSION,
        "pool_id": pool_id,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **as_document(picture),
    }


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
def _sole_controller(data_directory: Path) -> Iterator[None]:
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


def run(settings: FabricSettings, client: EnclaveClient, stop: threading.Event, logger: Any) -> None:
    """Poll until ``stop`` is set; a round under way is finished, at most one deadline.

    A status file that cannot be written is logged once and tried again with the next round.
    """
    path = Path(settings.data_directory) / STATUS_FILE
    picture = blank(partition.index for partition in settings.partitions)
    write_failure: str | None = None
    while not stop.is_set():
        picture, changes = observe(picture, client.get_status_of_all())
        for change in changes:
            logger.info(
                "changed",
                partition=change.partition,
                what=change.what,
                before=change.before,
                after=change.after,
            )
        failure = None
        try:
            write_atomically(path, status_document(settings.pool_id, picture))
        except OSError as error:
            failure = errno.errorcode.get(error.errno or 0, "UNKNOWN")
        if failure != write_failure:
            logger.warning("status_file", failure=failure)
            write_failure = failure
        stop.wait(POLL_SECONDS)


def serve(settings: FabricSettings) -> None:
    """Run the controller until SIGTERM or SIGINT. Call it from the main thread.

    Raises:
        AlreadyRunningError: Another controller holds the data directory.
        OSError: The data directory or the identity cannot be used.
    """
    stop = threading.Event()

    def end(_number: int, _frame: object) -> None:
        # Not stop.set() here: the handler interrupts stop.wait(), which may hold the lock that set() takes.
        threading.Thread(target=stop.set, daemon=True).start()

    logger = make_logger()
    data_directory = Path(settings.data_directory)
    data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _sole_controller(data_directory), EnclaveClient(settings) as client:
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        logger.info("started", pool_id=settings.pool_id, partitions=len(settings.partitions))
        run(settings, client, stop, logger)
        logger.info("ended", pool_id=settings.pool_id)
