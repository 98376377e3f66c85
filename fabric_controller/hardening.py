"""What the controller does to itself against other processes, and against itself (G3, G5).

Each measure is optional: what this kernel or machine does not have is left out, and
:func:`in_force`, read back from the kernel, does not name it. Sources: prctl(2), getrlimit(2),
seccomp(2), landlock(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource

from fabric_controller import system_calls
from fabric_controller.confinement import confine
from fabric_controller.landlock import LandlockUnavailable
from fabric_controller.settings import FabricSettings
from fabric_controller.system_calls import FilterUnavailable

_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_GET_SECCOMP = 21
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_NO_NEW_PRIVS = 39

_FILTERED = 2
"""SECCOMP_MODE_FILTER"""

_filtered = False
"""Whether a filter of ours is loaded: a container may have one of its own."""

_libc = ctypes.CDLL(None, use_errno=True)


def harden(settings: FabricSettings) -> None:
    """Take all measures. Call it while the process has one thread: those that follow inherit them."""
    global _filtered
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Other processes of the same user then read neither memory nor environment, and cannot attach.
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with contextlib.suppress(FilterUnavailable):
        system_calls.deny(system_calls.FABRIC_CONTROLLER)
        _filtered = True
    with contextlib.suppress(LandlockUnavailable):
        confine(settings)


def in_force() -> list[str]:
    """Return the names of the measures that hold now, as the kernel says; those of ``mhsm status``.

    /proc is out of reach under Landlock, so the calling thread is asked.
    """
    found = {
        "no_core_files": resource.getrlimit(resource.RLIMIT_CORE) == (0, 0),
        "not_dumpable": _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0,
        "no_new_privileges": _libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
        "system_call_filter": _filtered and _libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) == _FILTERED,
        "landlock": _is_confined(),
    }
    return [name for name, holds in found.items() if holds]


def _is_confined() -> bool:
    """Return whether a Landlock domain holds: nothing but one closes the root directory to a process."""
    try:
        os.scandir("/").close()
    except PermissionError:
        return True
    return False
