"""The connection file that ``mhsm up`` writes: all that a client, a script or a chaos test needs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONNECTION_FORMAT = 1


class NoConnection(Exception):
    """The connection file is missing or not readable: the pool does not run."""


class NoClient(Exception):
    """The pool has no client of that name."""


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """Files of a client certificate, PEM."""

    certificate_file: str
    key_file: str


@dataclass(frozen=True, slots=True)
class PartitionConnection:
    """One partition: endpoints are host:port; process ids are None while a process is down."""

    index: int
    endpoint: str
    peer_endpoint: str
    enclave_endpoint: str
    node_endpoint: str
    store_endpoint: str
    data_directory: str
    log_directory: str
    process_ids: dict[str, int | None]
    metrics_endpoint: str | None = None
    """Where its metrics are scraped (Prometheus)."""
    token_endpoint: str | None = None
    """Where callers with bearer tokens are served; None when none are accepted."""
    node_agent_hardening: list[str] = field(default_factory=list)
    """What the node agent says that it is hardened with."""
    failures: dict[str, int] = field(default_factory=dict)
    """How often each of its processes, named as in process_ids, has ended in a row soon after a start."""
    store_disk_lost: bool = False
    """Whether its store member has lost its data, and stays out until the partition is replaced."""
    rest_endpoint: str | None = None
    """Where Azure's clients are served, by HTTPS; None when no tokens are accepted."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A pool's connection file."""

    pool_id: str
    data_directory: str
    attended: bool
    client_ca_file: str
    clients: dict[str, ClientIdentity]
    partitions: tuple[PartitionConnection, ...]
    store: dict[str, str]
    fabric_controller: dict[str, Any]
    supervisor_process_id: int
    token_issuer: dict[str, Any] | None = None
    """The development profile's issuer: issuer, audience and process id."""
    users: dict[str, Any] = field(default_factory=dict)
    """Whether the supervisor runs the processes as different users, and else why not."""


def default_data_directory() -> Path:
    """Return the pool's directory of this user: $XDG_STATE_HOME/mhsm or ~/.local/state/mhsm."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "mhsm"


def load_connection(path: Path) -> Connection:
    """Read a connection file, or the one in a data directory.

    Raises:
        NoConnection: It is not there or not readable.
    """
    file = path / "connection.json" if path.is_dir() else path
    try:
        value = json.loads(file.read_text())
        if value["format"] != CONNECTION_FORMAT:
            raise NoConnection(f"{file} has another format")
        return Connection(
            pool_id=value["pool_id"],
            data_directory=value["data_directory"],
            attended=value["attended"],
            client_ca_file=value["client_ca_file"],
            clients={name: ClientIdentity(**files) for name, files in value["clients"].items()},
            partitions=tuple(PartitionConnection(**entry) for entry in value["partitions"]),
            store=value["store"],
            fabric_controller=value["fabric_controller"],
            supervisor_process_id=value["supervisor"]["process_id"],
            token_issuer=value.get("token_issuer"),
            users=value.get("users", {}),
        )
    except OSError:
        raise NoConnection(f"{file} is not there: the pool does not run") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NoConnection(f"{file} is not a connection file") from None
