"""A file that appears whole or not at all, and never in place of another one."""

from __future__ import annotations

import os
from pathlib import Path


def write_new_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file that must not exist; whenever the process is killed, it is there whole or not there.

    The octets go to a file without a name (O_TMPFILE), which the kernel forgets with the process, and
    are on disk before the file gets its name.

    Args:
        path: Where; the directory must exist, on a file system with O_TMPFILE (ext4, xfs, btrfs, tmpfs).
        content: All of it.
        mode: Permissions, less the umask.

    Raises:
        FileExistsError: There is a file of this name; it is untouched.
        OSError: It cannot be written.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = os.open(path.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
            # src_dir_fd makes Python use linkat(2), the one that follows the link of /proc.
            os.link(
                f"/proc/self/fd/{descriptor}",
                path.name,
                src_dir_fd=directory,
                dst_dir_fd=directory,
                follow_symlinks=True,
            )
        os.fsync(directory)
    finally:
        os.close(directory)
