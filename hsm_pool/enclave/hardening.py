"""What a partition and its ceremony child do to themselves against other processes (G3).

Each measure is optional: what this kernel or machine does not have is left out, and
:func:`in_force`, read back from the kernel, does not name it. Sources: prctl(2),
getrlimit(2), seccomp(2), proc_pid_status(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path

from hsm_pool.enclave import confinement, landlock, system_calls
from hsm_pool.enclave.landlock import LandlockUnavailable
from hsm_pool.enclave.system_calls import FilterUnavailable
from mhsm.pool.v1 import pool_pb2

_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38

_FILTERED = "2"
"""SECCOMP_MODE_FILTER"""

_filtered = False
"""Whether a filter of ours is loaded: a container may have one of its own."""

_libc = ctypes.CDLL(None, use_errno=True)


class Measure(Enum):
    """A measure; the values are those of the wire."""

    NO_CORE_FILES = pool_pb2.HARDENING_MEASURE_NO_CORE_FILES
    NOT_DUMPABLE = pool_pb2.HARDENING_MEASURE_NOT_DUMPABLE
    NO_NEW_PRIVILEGES = pool_pb2.HARDENING_MEASURE_NO_NEW_PRIVILEGES
    SYSTEM_CALL_FILTER = pool_pb2.HARDENING_MEASURE_SYSTEM_CALL_FILTER
    LANDLOCK = pool_pb2.HARDENING_MEASURE_LANDLOCK


def harden_process() -> None:
    """Take the measures that hold from the start. Call it before there is a secret or a thread."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Other processes of the same user then read neither memory nor environment, and cannot attach.
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def filter_system_calls(denied: Iterable[str]) -> None:
    """Deny system calls to all threads; where that is not possible, :func:`in_force` does not name it."""
    global _filtered
    with contextlib.suppress(FilterUnavailable):
        system_calls.deny(denied)
        _filtered = True


def in_force() -> tuple[Measure, ...]:
    """Return the measures that hold now, for every thread, as the kernel says."""
    threads = list(_threads())
    found = {
        Measure.NO_CORE_FILES: resource.getrlimit(resource.RLIMIT_CORE) == (0, 0),
        Measure.NOT_DUMPABLE: _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0,
        Measure.NO_NEW_PRIVILEGES: all(thread.get("NoNewPrivs") == "1" for thread in threads),
        Measure.SYSTEM_CALL_FILTER: _filtered
        and all(thread.get("Seccomp") == _FILTERED for thread in threads),
        Measure.LANDLOCK: confinement.in_force(),
    }
    return tuple(measure for measure, holds in found.items() if holds)


def reach_nothing() -> tuple[Measure, ...]:
    """Give up all files but Python's own, TCP and signals to others; return the measures in force.

    Call it while the process has one thread. The kernel cannot be asked afterwards, because /proc
    is out of reach, too.
    """
    before = in_force()
    try:
        landlock.restrict(readable=landlock.python_directories(*confinement.PACKAGES))
    except LandlockUnavailable:
        return before
    return (*(measure for measure in before if measure is not Measure.LANDLOCK), Measure.LANDLOCK)


def _threads() -> Iterator[dict[str, str]]:
    """Give the status of each thread of this process."""
    for task in Path("/proc/self/task").iterdir():
        try:
            lines = (task / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        pairs = (line.split(":", 1) for line in lines)
        yield {name: value.strip() for name, value in pairs}
