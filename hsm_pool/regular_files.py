"""Files in directories of other users: neither links nor devices nor pipes are taken for them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_regular_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Return a descriptor of a regular file that has no other name; never waits, as for a pipe.

    Args:
        path: The file; the directories above it are trusted.
        flags: As of open(2).
        mode: Permissions of a file that is made.

    Raises:
        OSError: It cannot be opened, or is something else.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "no regular file, or one with several names", str(path))


def read_regular_file(path: Path, bytes_max: int) -> bytes:
    """Return the content of such a file, of bytes_max bytes at most.

    Raises:
        OSError: It cannot be read, is something else, or is longer.
    """
    descriptor = open_regular_file(path, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise OSError(errno.EFBIG, "the file is too large", str(path))
    return content
