"""Runs the fabric controller under bubblewrap, where that is installed and may be used (G5).

It gets namespaces of its own: no process but itself, no file but Python's, the controller's code and
its data directory. The network stays, because the enclave interfaces are reached over it. Source: bwrap(1).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hsm_pool.node_agent.processes import RunAs, dying_with_parent, minimal_environment

_PACKAGES = ("fabric_controller", "mhsm")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/sbin")
_CONFIGURATION = (
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/ssl/openssl.cnf",
)
_TRIAL_SECONDS = 20.0
_INFORMING = 'exec "$@" 3>&1 1>&2'
"""Standard output becomes bubblewrap's information pipe, and the controller's is its log."""


class NoSandbox(Exception):
    """The controller runs without one; the message says why."""


def sandboxed(command: Sequence[str], data_directory: Path, run_as: RunAs | None) -> list[str]:
    """Return the command under bubblewrap; what it prints to standard output is JSON with "child-pid".

    Raises:
        NoSandbox: bubblewrap is not installed, or this machine does not let it work.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise NoSandbox("bwrap is not installed")
    prefix = [program, *_options(data_directory)]
    _try([*prefix, "--", sys.executable, "-c", "import fabric_controller, grpc"], run_as)
    return ["sh", "-c", _INFORMING, "sh", *prefix, "--info-fd", "3", "--", *command]


def _options(data_directory: Path) -> list[str]:
    # As process 1 it is the one that bubblewrap names, and no other is beside it.
    options = ["--unshare-all", "--share-net", "--die-with-parent", "--new-session", "--as-pid-1"]
    options += ["--proc", "/proc", "--dev", "/dev", "--chdir", "/"]
    for directory in _SYSTEM:
        if Path(directory).is_symlink():
            options += ["--symlink", str(Path(directory).readlink()), directory]
        elif Path(directory).is_dir():
            options += ["--ro-bind", directory, directory]
    readable = [*_CONFIGURATION, sys.base_prefix, sys.prefix]
    readable += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        readable += (spec and spec.submodule_search_locations) or ()
    for path in readable:
        options += ["--ro-bind-try", path, path]
    return [*options, "--bind", str(data_directory), str(data_directory)]


def _try(command: Sequence[str], run_as: RunAs | None) -> None:
    try:
        tried = subprocess.run(
            dying_with_parent(command, run_as),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=minimal_environment(),
            cwd="/",
            timeout=_TRIAL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoSandbox("bwrap does not end") from None
    if tried.returncode:
        said = tried.stderr.decode(errors="replace").strip().splitlines() or ["it failed"]
        raise NoSandbox(f"bwrap does not work here ({said[-1][:200]})")
