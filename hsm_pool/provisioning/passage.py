"""Lets other users reach what a pool needs below directories that are closed to them, such as /root.

In a mount namespace of its own, this process covers each closed directory with an empty one that may
be passed, and binds there what is needed. Nothing changes for the rest of the machine, and the pool's
processes see less of it than before. Sources: unshare(2), mount(2), mount_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

_NEW_NAMESPACE = 0x00020000
_BIND, _RECURSIVE, _PRIVATE = 1 << 12, 1 << 14, 1 << 18
_NO_SUID, _NO_DEVICES = 1 << 1, 1 << 2
_OTHERS_PASS, _OTHERS_READ = 0o001, 0o004

_libc = ctypes.CDLL(None, use_errno=True)


class NoPassage(Exception):
    """Other users do not reach a path; the message names it."""


def open_passage(needed: Iterable[Path]) -> None:
    """Let other users reach files and directories; what they may do there, their modes say.

    Call it while the process has one thread.

    Raises:
        NoPassage: One of them is closed itself, or this machine lets root mount nothing.
    """
    paths = sorted({path.resolve() for path in needed if path.exists()})
    for path in paths:
        _check(path)
    closed: dict[Path, list[Path]] = {}
    for path in paths:
        above = next((up for up in reversed(path.parents) if not up.stat().st_mode & _OTHERS_PASS), None)
        if above is not None:
            closed.setdefault(above, []).append(path)
    if not closed:
        return
    first = next(iter(closed.values()))[0]
    if _libc.unshare(_NEW_NAMESPACE) or _libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None):
        raise NoPassage(f"{first} ({os.strerror(ctypes.get_errno())})")
    for above, below in closed.items():
        _cover(above, _outermost(below))


def _check(path: Path) -> None:
    """Refuse what its own mode closes."""
    wanted = _OTHERS_PASS if path.is_dir() else _OTHERS_READ
    if not path.stat().st_mode & wanted:
        raise NoPassage(str(path))


def _outermost(paths: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in sorted(paths):
        around = next((one for one in found if path.is_relative_to(one)), None)
        if around is None:
            found.append(path)
            continue
        for between in path.parents:
            if between == around:
                break
            _check(between)
    return found


def _cover(closed: Path, needed: Iterable[Path]) -> None:
    held = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in needed]
    try:
        _mount(b"tmpfs", closed, b"tmpfs", _NO_SUID | _NO_DEVICES, b"mode=0711,size=64k")
        for path, descriptor in held:
            path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
                path.mkdir(mode=0o711)
            else:
                path.touch()
            _mount(f"/proc/self/fd/{descriptor}".encode(), path, None, _BIND | _RECURSIVE, None)
    finally:
        for _, descriptor in held:
            os.close(descriptor)


def _mount(source: bytes, target: Path, kind: bytes | None, flags: int, data: bytes | None) -> None:
    if _libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data):
        # What was mounted before hides files that are needed: there is no way back.
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
