"""The pool's processes, their users, namespaces: asked of the kernel, not believed (proc_pid_status(5))."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hsm_pool.client.connection import Connection, NoConnection, load_connection

_KINDS = {
    "supervisor": "supervisor",
    "node_agent": "node agents",
    "partition": "partitions",
    "store_member": "store members",
    "fabric_controller": "fabric controller",
    "token_issuer": "token issuer",
}

_GENERATIONS = 2
"""A partition is the child of a node agent, which is the supervisor's."""


def supervisor_process_id(directory: Path) -> int | None:
    """Return the process that holds the lock of a data directory's supervisor, None when nobody does."""
    try:
        descriptor = os.open(directory / "supervisor.lock", os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(descriptor, 32, 0)
        return int(text) if text.isdigit() else None
    else:
        return None
    finally:
        os.close(descriptor)


def running_pool(path: Path) -> Connection:
    """Read a connection file whose supervisor runs; one that was killed leaves its file behind.

    Raises:
        NoConnection: The file is not there or not readable, or the supervisor has ended.
    """
    connection = load_connection(path)
    if supervisor_process_id(Path(connection.data_directory)) is None:
        raise NoConnection("the pool does not run: its supervisor has ended")
    return connection


def signal_own(process_id: int, number: signal.Signals, connection: Connection) -> bool:
    """Signal a process if the pool's supervisor or one of its children started it; return whether it did.

    The kernel gives the id of a process that has ended to another one, which is not ours to signal.
    """
    supervisor = supervisor_process_id(Path(connection.data_directory))
    with suppress(ProcessLookupError):
        # Held before the look: if the process ends afterwards, its descriptor leads to no other one.
        descriptor = os.pidfd_open(process_id)
        try:
            if supervisor is None or supervisor not in _ancestors(process_id):
                return False
            signal.pidfd_send_signal(descriptor, number)
            return True
        finally:
            os.close(descriptor)
    return False


def _ancestors(process_id: int) -> Iterator[int]:
    """Give the parent of a process and the parent of that."""
    parent: int | None = process_id
    for _ in range(_GENERATIONS):
        parent = _status_field(parent, "PPid:", 1)
        if not parent:
            return
        yield parent


def measured(connection: Connection) -> dict[str, Any]:
    """Return ``{"separated", "reason", "user_ids"}``; user ids are lists by kind of process.

    Separated: no two kinds of process share a user. The reason is what the supervisor says of it.
    """
    found: dict[str, set[int]] = {}
    for kind, process_id in _processes(connection):
        user_id = _status_field(process_id, "Uid:", 2)
        if user_id is not None:
            found.setdefault(kind, set()).add(user_id)
    users = [user_id for user_ids in found.values() for user_id in user_ids]
    separated = len(users) == len(set(users)) and len(found) > 1
    return {
        "separated": separated,
        "reason": "" if separated else str(connection.users.get("reason", "")),
        "user_ids": {kind: sorted(user_ids) for kind, user_ids in found.items()},
    }


def in_words(users: dict[str, Any]) -> str:
    """Return the line of ``mhsm status``."""
    if not users["separated"]:
        return f"users: not separated: {users['reason'] or 'the reason is not known'}"
    parts = [f"{_KINDS[kind]} {', '.join(map(str, found))}" for kind, found in users["user_ids"].items()]
    return f"users: {'; '.join(parts)}"


def own_namespaces(process_id: int | None, other: int) -> bool:
    """Return whether a process has other process and mount namespaces than another one."""
    try:
        return all(
            Path(f"/proc/{process_id}/ns/{kind}").readlink() != Path(f"/proc/{other}/ns/{kind}").readlink()
            for kind in ("pid", "mnt")
        )
    except OSError:
        return False


def innermost_process_id(process_id: int) -> int | None:
    """Return the id that a process sees itself under, in its own namespace."""
    return _status_field(process_id, "NSpid:", -1)


def _processes(connection: Connection) -> Iterator[tuple[str, int | None]]:
    yield "supervisor", connection.supervisor_process_id
    for entry in connection.partitions:
        yield from entry.process_ids.items()
    yield "fabric_controller", connection.fabric_controller["process_id"]
    if connection.token_issuer:
        yield "token_issuer", connection.token_issuer["process_id"]


def _status_field(process_id: int | None, name: str, position: int) -> int | None:
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[position]) for line in lines if line.startswith(name)), None)
