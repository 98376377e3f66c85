"""Files and directories that other users may have laid: links, devices and pipes are not taken for them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_own_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Return a descriptor of a regular file that has no other name, else as :func:`open_regular_file`."""
    descriptor = open_regular_file(path, flags, mode)
    if os.fstat(descriptor).st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "a file with several names", str(path))


def open_regular_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Return a descriptor of a regular file; never waits, as for a pipe.

    Args:
        path: The file; the directories above it are trusted.
        flags: As of open(2).
        mode: Permissions of a file that is made.

    Raises:
        OSError: It cannot be opened, or is something else.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "no regular file", str(path))


def read_own_file(path: Path, bytes_max: int) -> bytes:
    """Return the content of a file that :func:`open_own_file` opens, of bytes_max bytes at most.

    Raises:
        OSError: It cannot be read, is something else, or is longer.
    """
    descriptor = open_own_file(path, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise OSError(errno.EFBIG, "the file is too large", str(path))
    return content


def give_directory(path: Path, mode: int, *owners: tuple[int, int]) -> None:
    """Give a directory an owner and permissions; a link at its place is refused, and never followed.

    Args:
        path: The directory; those above it are trusted.
        mode: Permissions, set while the first of the owners has it: only an owner sets them.
        owners: (user, group) one after the other; the last one keeps it.

    Raises:
        OSError: It is no directory, or not this process's to give.
    """
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # A path to what was opened, whatever lies at its place now; it needs no permission to read it.
        opened = Path(f"/proc/self/fd/{descriptor}")
        os.chown(opened, *owners[0])
        opened.chmod(mode)
        for user, group in owners[1:]:
            os.chown(opened, user, group)
    finally:
        os.close(descriptor)
