"""What this machine's kernel and libraries have for hardening, asked without the product."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes.util import find_library
from pathlib import Path

import pytest

needs_seccomp = pytest.mark.skipif(
    find_library("seccomp") is None or not Path("/proc/sys/kernel/seccomp/actions_avail").exists(),
    reason="no libseccomp, or a kernel without seccomp; status does not name the filter",
)
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root starts processes as other users; status says: not root"
)
needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None
    or subprocess.run(
        ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="bwrap is not installed, or may not be used here; status says why there is no sandbox",
)
# landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)
needs_landlock = pytest.mark.skipif(
    ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) < 6,
    reason="a kernel without Landlock of ABI 6 (Linux 6.12); status does not name it, or it holds for less",
)


def has_memfd_secret() -> bool:
    """Return whether the kernel has memfd_secret(2), and it is on."""
    descriptor = ctypes.CDLL(None).syscall(447, 0)
    if descriptor >= 0:
        os.close(descriptor)
    return bool(descriptor >= 0)
