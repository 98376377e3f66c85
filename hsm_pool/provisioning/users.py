"""The users that a pool's processes run as where root starts them (G3, G5).

Nothing is added to /etc/passwd: users and groups are numbers, one after the other from the pool's
first one. The three partitions share a user, and so do agents and store members, because what
separates one partition from another is no file (peers hold the same keys). The supervisor stays
root: it starts the others, and gives each its files at every start.
"""

from __future__ import annotations

import grp
import importlib.util
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsm_pool.node_agent import ownership
from hsm_pool.node_agent.ownership import NodeUsers
from hsm_pool.node_agent.processes import RunAs, dying_with_parent
from hsm_pool.provisioning.passage import NoPassage, open_passage
from hsm_pool.regular_files import give_directory
from hsm_pool.settings import PartitionSettings

FIRST_USER_ID = 59_990
"""Of a pool that says nothing else: at the upper end of what accounts may have (Debian policy, 9.2.2)."""
FIRST_USER_ID_MIN, FIRST_USER_ID_MAX = 1_000, 2**31 - 16

_PASSED = 0o711
_OWN = 0o700
_OF_STORE_MEMBER = ("store-server", "store-peer")


@dataclass(frozen=True, slots=True)
class Users:
    """Numbers of the users, and of their groups."""

    partition: int
    store_member: int
    node_agent: int
    fabric_controller: int
    token_issuer: int

    @classmethod
    def beginning_at(cls, first: int) -> Users:
        """Return the users of a pool."""
        return cls(*range(first, first + 5))

    @property
    def node(self) -> NodeUsers:
        """Those of a node."""
        return NodeUsers(self.node_agent, self.partition, self.store_member)

    @property
    def agent_runs_as(self) -> RunAs:
        """How a node agent is started."""
        return RunAs(self.node_agent, ownership.CAPABILITIES)


class NotSeparated(Exception):
    """All processes run as the user that started the pool; the message says why."""


def separate(directory: Path, first: int, etcd: str, partitions: Sequence[PartitionSettings]) -> Users:
    """Prepare that the pool's processes run as different users; call it at the start, with one thread.

    Args:
        directory: The pool's data directory.
        first: Number of the first user.
        etcd: The store's binary; "" when the store is external.
        partitions: Settings of all partitions.

    Raises:
        NotSeparated: They cannot be.
    """
    if os.geteuid() != 0:
        raise NotSeparated("not root")
    users = Users.beginning_at(first)
    if whose := _taken(users):
        raise NotSeparated(whose)
    tried = subprocess.run(
        dying_with_parent(["true"], users.agent_runs_as), capture_output=True, cwd="/", check=False
    )
    if tried.returncode:  # a container's root may lack what it takes
        raise NotSeparated("root may not start processes of other users here")
    before = directory.stat().st_mode
    directory.chmod(_PASSED)
    try:
        outside = [path for path in _outside(etcd, partitions) if not path.is_relative_to(directory)]
        open_passage([directory, *_code(), *outside])
    except NoPassage as closed:
        directory.chmod(before)
        raise NotSeparated(f"other users do not reach {closed}") from None
    _assign(directory, users, len(partitions))
    return users


def _code() -> Iterator[Path]:
    """Give what Python runs from."""
    yield from (Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable))
    yield from map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    for package in ("hsm_pool", "security_domain", "fabric_controller", "mhsm"):
        spec = importlib.util.find_spec(package)
        yield from (Path(place).parent for place in (spec and spec.submodule_search_locations) or ())


def _outside(etcd: str, partitions: Sequence[PartitionSettings]) -> Iterator[Path]:
    """Give the files that lie where the customer has put them."""
    if etcd:
        yield Path(etcd)
    for partition in partitions:
        store = partition.store.identity
        yield from map(Path, (store.certificate_file, store.key_file, store.ca_file))
        if partition.firmware:
            yield Path(partition.firmware.repository)
        for issuer in partition.issuers:
            files = (issuer.keys, issuer.keys_ca_file)
            yield from (Path(file) for file in files if file and "://" not in file)


def _taken(users: Users) -> str:
    """Return whose one of the numbers is on this machine, "" when they are free."""
    for number in (getattr(users, name) for name in Users.__slots__):
        for kind, find in (("user", pwd.getpwuid), ("group", grp.getgrgid)):
            try:
                name = find(number)[0]
            except KeyError:
                continue
            return f"{kind} {number} is {name}"
    return ""


def _assign(directory: Path, users: Users, nodes: int) -> None:
    """Give everything in a pool's data directory to the users that need it. No process of the pool runs."""
    for passed in (directory, directory / "pki", directory / "policy", directory / "nodes"):
        if passed.is_dir():
            passed.chmod(_PASSED)
    for public in (*(directory / "pki").glob("*.crt"), *(directory / "policy").glob("admission-policy.json")):
        public.chmod(0o644)
    for index in range(nodes):
        _assign_node(directory / "nodes" / str(index), users)
    _give_tree(directory / "fabric", users.fabric_controller)
    if (directory / "token-issuer").is_dir():
        _give_tree(directory / "token-issuer", users.token_issuer)


def _assign_node(node: Path, users: Users) -> None:
    for path in node.iterdir():
        if path.is_symlink():  # the agent's own: nothing behind it is given away
            os.chown(path, users.node_agent, users.node_agent, follow_symlinks=False)
            continue
        match path.name.partition(".")[0]:
            case "partition" | "platform" | "owner" | "audit" | "firmware":
                _give_tree(path, users.partition)
            case "store":
                _give_tree(path, users.store_member)
            case "pki":
                path.chmod(_PASSED)
                for file in path.iterdir():
                    _give_tree(file, _reader(file.name, users))
            case _:
                _give_tree(path, users.node_agent)
    os.chown(node, users.node_agent, users.node_agent)
    node.chmod(_PASSED)
    # The agent reads there which ports and files its children need; no secret stands in it.
    ownership.give_file(node / "partition.json", 0o640, users.partition, users.node_agent)
    ownership.give_partition_directory(node / "partition", users.node)
    if (node / "firmware").is_dir():
        # The agent counts the starts of an image there.
        give_directory(node / "firmware", 0o2770, (users.partition, users.node_agent))


def _reader(name: str, users: Users) -> int:
    if name.startswith("agent"):
        return users.node_agent
    return users.store_member if name.startswith(_OF_STORE_MEMBER) else users.partition


def _give_tree(path: Path, user: int) -> None:
    """Give a file, or a directory with all in it; links are given themselves, never followed."""
    os.chown(path, user, user, follow_symlinks=False)
    if path.is_dir() and not path.is_symlink():
        path.chmod(_OWN)
        for directory, names, files in os.walk(path):
            for name in (*names, *files):
                os.chown(Path(directory) / name, user, user, follow_symlinks=False)
