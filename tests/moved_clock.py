"""A clock that tests move: the wall clock of a pool's processes, all of them or one partition's.

Shipped code has no switch for it. A copy of this file stands on the path of the pool's processes as
``sitecustomize``, which Python loads before anything else, and adds what a file says to the clock that
the product takes pool time from (``time.time_ns``). Certificates, evidence and leases keep real time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_OWN = Path(__file__).resolve().parent
_PARTITION = re.compile(r"/nodes/(\d+)/partition\.json")


class MovedClock:
    """How far the clocks are moved, in milliseconds; 0 at the beginning. Read anew at each use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def move(self, milliseconds: int, partition: int | None = None) -> None:
        """Set the clocks of all processes, or one partition's beside that, so far ahead of real time."""
        name = "all" if partition is None else f"partition-{partition}"
        new = self._directory / f".{name}.new"
        new.write_text(str(milliseconds))
        new.rename(self._directory / name)


@contextlib.contextmanager
def moved_clock(directory: Path) -> Iterator[MovedClock]:
    """Have every pool that is started within follow the clock that is yielded."""
    directory.mkdir(mode=0o700)
    shutil.copy(__file__, directory / "sitecustomize.py")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{directory}{os.pathsep}{before}" if before else str(directory)
    try:
        yield MovedClock(directory)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def install() -> None:
    """Move the clock of this process."""
    real = time.time_ns
    found = _PARTITION.search(" ".join(sys.orig_argv))
    files = [_OWN / "all", *([_OWN / f"partition-{found[1]}"] if found else [])]

    def moved() -> int:
        ahead = 0
        for file in files:
            with contextlib.suppress(OSError, ValueError):
                ahead += int(file.read_text())
        return real() + ahead * 1_000_000

    time.time_ns = moved


if __name__ == "sitecustomize":
    install()
