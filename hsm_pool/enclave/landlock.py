"""Landlock: what this process and all that it starts may reach, from now on (landlock(7)).

Files by path, TCP by port, signals and abstract sockets not at all. It holds for root, too, and
cannot be undone. The kernel numbers what it knows (ABI): files from 1 (Linux 5.13), moving them
between directories from 2, cutting them from 3, TCP from 4 (6.7), ioctl of devices from 5, signals
and abstract sockets from 6 (6.12). What an older kernel does not know stays allowed.

This file stands twice, the same, in hsm_pool.enclave and in fabric_controller: the controller
imports nothing of hsm_pool, and the partitions' measurement covers hsm_pool only.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all architectures
_GET_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE, _READ_FILE, _READ_DIRECTORY = 1 << 0, 1 << 2, 1 << 3
_OF_FILES = 1 << 0 | 1 << 1 | _READ_FILE | 1 << 14 | 1 << 15  # execute, write, read, cut, ioctl
_FILE_RIGHTS: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_FILE_RIGHTS_NEWEST: Final = (1 << 16) - 1
_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_ABSTRACT_SOCKETS, _SIGNALS = 1 << 0, 1 << 1

_libc = ctypes.CDLL(None, use_errno=True)


class LandlockUnavailable(Exception):
    """The kernel has no Landlock, or it is off; nothing is restricted."""


class _Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = (("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


class _Port(ctypes.Structure):
    """struct landlock_net_port_attr."""

    _fields_ = (("allowed", ctypes.c_uint64), ("port", ctypes.c_uint64))


def python_directories(*packages: str) -> list[Path]:
    """Return where Python, what is installed and these packages lie; libraries import late.

    A source tree that Python was told of is left out, because anything may lie in it.
    """
    installed = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    for package in packages:
        spec = importlib.util.find_spec(package)
        installed += spec.submodule_search_locations or () if spec else ()
    return [Path(directory) for directory in installed]


def restrict(
    *,
    readable: Iterable[Path] = (),
    listable: Iterable[Path] = (),
    executable: Iterable[Path] = (),
    writable: Iterable[Path] = (),
    connect_ports: Iterable[int] = (),
    bind_ports: Iterable[int] = (),
) -> int:
    """Restrict this process to these files and directories, and to TCP at these ports.

    What lies below a directory that may be read, listed, executed or written may be so, too. What is
    executable may be read, what is writable may be all.

    Call it while the process has one thread: threads that run already would not be restricted.
    Paths that do not exist are left out. Files that are open stay so.

    Returns:
        The kernel's ABI.

    Raises:
        LandlockUnavailable: Nothing is restricted.
        RuntimeError: There is more than one thread.
    """
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("landlock: more than one thread runs")
    abi = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    if abi < 1:
        raise LandlockUnavailable(os.strerror(ctypes.get_errno()))
    files = _FILE_RIGHTS.get(abi, _FILE_RIGHTS_NEWEST)
    attributes = _Ruleset(
        files,
        _BIND_TCP | _CONNECT_TCP if abi >= 4 else 0,
        _ABSTRACT_SOCKETS | _SIGNALS if abi >= 6 else 0,
    )
    # An older kernel takes the longer structure when what it does not know is 0.
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), size, 0))
    try:
        for path in readable:
            _allow_path(ruleset, path, _READ_FILE | _READ_DIRECTORY)
        for path in listable:
            _allow_path(ruleset, path, _READ_DIRECTORY)
        for path in executable:
            _allow_path(ruleset, path, _EXECUTE | _READ_FILE | _READ_DIRECTORY)
        for path in writable:
            _allow_path(ruleset, path, files)
        if abi >= 4:
            _allow_ports(ruleset, connect_ports, _CONNECT_TCP)
            _allow_ports(ruleset, bind_ports, _BIND_TCP)
        _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return int(abi)


def _allow_ports(ruleset: int, ports: Iterable[int], right: int) -> None:
    for port in ports:
        rule = _Port(right, port)
        _checked(_libc.syscall(_ADD_RULE, ruleset, _RULE_NET_PORT, ctypes.byref(rule), 0))


def _allow_path(ruleset: int, path: Path, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = _PathBeneath(rights if path.is_dir() else rights & _OF_FILES, parent)
        _checked(_libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0))
    finally:
        os.close(parent)


def _checked(result: int) -> int:
    if result < 0:
        raise LandlockUnavailable(os.strerror(ctypes.get_errno()))
    return result
