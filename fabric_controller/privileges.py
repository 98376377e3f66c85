"""What an operator's command lets go of: root works in no directory that is the controller's.

Where users are separated, the controller owns its data directory and may put anything there, also
links to files that only root may open. Its file permissions are all that a command needs.
"""

from __future__ import annotations

import os
from pathlib import Path


def become_owner(directory: Path) -> None:
    """Become the user to whom a directory belongs, for good, if this is root and it is not root's.

    Raises:
        OSError: Root may not do that here.
    """
    if os.geteuid() != 0:
        return
    try:
        owner = directory.lstat()
    except FileNotFoundError:  # then nobody has put anything there
        return
    if owner.st_uid == 0:
        return
    os.setgroups([])
    os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
    os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
