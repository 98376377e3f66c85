"""Files in the controller's directory: whoever opens one may be root, and the directory another user's.

So no link of his is followed, no pipe waited for (CWE-59). The twin of :mod:`hsm_pool.regular_files`,
which the controller may not import.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class NotOwnFile(OSError):
    """It is no regular file, or one that has other names."""


def open_own_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Return a descriptor of a regular file that has no other name.

    Args:
        path: The file; the directories above it are trusted.
        flags: As of open(2).
        mode: Permissions of a file that is made.

    Raises:
        NotOwnFile: It is something else, or has other names.
        OSError: It cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:  # 0: put aside since it was opened
        return descriptor
    os.close(descriptor)
    raise NotOwnFile(f"{path} is not a file of its own")
