"""A file that appears whole or not at all, and never in place of another one."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WITHOUT_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT}
"""How open(2) says that a file system has no O_TMPFILE, or the kernel none at all."""
_WITHOUT_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def write_new_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file that must not exist; whenever the process is killed, it is there whole or not there.

    The octets go to a file without a name (O_TMPFILE), which the kernel forgets with the process, and
    are on disk before the file gets its name. On a file system without such files (many in user space
    and over a network) they go to a hidden file beside it; a kill -9 may leave that one behind.

    Args:
        path: Where; the directory must exist.
        content: All of it.
        mode: Permissions, less the umask.

    Raises:
        FileExistsError: There is a file of this name; it is untouched.
        OSError: It cannot be written.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _to_be_named(path, directory, mode) as (descriptor, source):
            octets = memoryview(content)
            while octets:
                octets = octets[os.write(descriptor, octets) :]
            os.fsync(descriptor)
            _name(source, path, directory)
        os.fsync(directory)
    finally:
        os.close(directory)


def _name(source: str, path: Path, directory: int) -> None:
    try:
        # src_dir_fd makes Python use linkat(2), the one that follows the link of /proc.
        os.link(source, path.name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=True)
    except OSError as error:
        if error.errno not in _WITHOUT_LINKS:
            raise
        text = "this file system has no hard links, so that no file is made safely; choose another directory"
        raise OSError(error.errno, text, str(path.parent)) from None


@contextmanager
def _to_be_named(path: Path, directory: int, mode: int) -> Iterator[tuple[int, str]]:
    """Yield a new file without its final name: its descriptor, and what link(2) is to start from."""
    hidden = ""
    try:
        descriptor = os.open(path.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno not in _WITHOUT_TMPFILE:
            raise
        hidden = f".{path.name[:100]}.{secrets.token_hex(8)}.partial"
        descriptor = os.open(
            hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=directory
        )
    try:
        yield descriptor, hidden or f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
        if hidden:
            os.unlink(hidden, dir_fd=directory)
