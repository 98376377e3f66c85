"""Who owns a node's directories when partition, store member and agent run as different users.

The agent's group passes through the partition's and the member's directory, without listing them:
it reads the partition's incarnation and lock, and sees whether the member has its log. What else
lies there has modes of its own, for its owner only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hsm_pool.node_agent.processes import RunAs
from hsm_pool.regular_files import give_directory, open_own_file

CAPABILITIES = ("chown", "kill", "setgid", "setuid")
"""What an agent keeps of root: to start and end its children, and to give them new directories."""

_PASSED_BY_GROUP = 0o2710
"""With the group of the directory for what is made in it."""


@dataclass(frozen=True, slots=True)
class NodeUsers:
    """Users of a node; user and group have the same number."""

    node_agent: int
    partition: int
    store_member: int

    @property
    def partition_runs_as(self) -> RunAs:
        """How the partition is started."""
        return RunAs(self.partition)

    @property
    def member_runs_as(self) -> RunAs:
        """How the store member is started."""
        return RunAs(self.store_member)


def take(directory: Path, users: NodeUsers) -> None:
    """Let the agent, and nobody else, write in a directory of its children's, until it is given again.

    Raises:
        OSError: A link lies at its place: it is not followed.
    """
    give_directory(directory, 0o700, (users.node_agent, users.node_agent))


def take_whole(directory: Path, users: NodeUsers) -> None:
    """Let the agent remove a directory of its children's, with all directories in it.

    One after the other, from the outside: who has a directory above cannot be cheated with a link.
    """
    take(directory, users)
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            take_whole(path, users)


def give_partition_directory(directory: Path, users: NodeUsers) -> None:
    """Give a directory, with what the agent wrote into it, to the partition."""
    for name in ("incarnation", "lock"):
        file = directory / name
        if file.exists():
            give_file(file, 0o640, users.partition, users.node_agent)
    _give(directory, users.partition, users)


def give_store_directory(directory: Path, users: NodeUsers) -> None:
    """Give a directory to the store member, which does not run; before each of its starts.

    Raises:
        OSError: The member has put a link at the place of its own directory.
    """
    take(directory, users)
    member = directory / "member"
    member.mkdir(exist_ok=True)  # one that etcd makes itself is closed to the agent
    _give(member, users.store_member, users)
    _give(directory, users.store_member, users)


def give_file(file: Path, mode: int, user: int, group: int) -> None:
    """Give a file in a directory of somebody else's, without following what he may have put there.

    Raises:
        OSError: It is no regular file with one name.
    """
    descriptor = open_own_file(file, os.O_RDONLY)
    try:
        os.fchmod(descriptor, mode)  # only the owner sets it
        os.fchown(descriptor, user, group)
    finally:
        os.close(descriptor)


def make_missing(directory: Path, mode: int, user: int | None) -> bool:
    """Make a directory of a child's that is gone with its disk; return whether it was.

    Args:
        directory: In the node's directory, where only the agent makes any.
        mode: Permissions.
        user: To whom it is given, with the agent's group; None for this process's own user.
    """
    if directory.exists():
        return False
    directory.mkdir(mode=0o700)
    directory.chmod(mode)
    if user is not None:
        os.chown(directory, user, os.getgid())
    return True


def _give(directory: Path, user: int, users: NodeUsers) -> None:
    agent = users.node_agent
    give_directory(directory, _PASSED_BY_GROUP, (agent, agent), (user, agent))
