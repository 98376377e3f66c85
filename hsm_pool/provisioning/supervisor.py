"""Runs the node agents and the fabric controller of a pool on one machine.

``python -m hsm_pool.provisioning.supervisor --data-dir D`` stands for what systemd does
on three machines: it restarts what dies and keeps connection.json true. When it is
killed, everything below it dies with it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import selectors
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from hsm_pool import settings as settings_module
from hsm_pool.node_agent.processes import Child, RunAs, SignalPipe, next_wait_seconds
from hsm_pool.observability import logs
from hsm_pool.provisioning import users as users_module
from hsm_pool.provisioning.layout import PARTITIONS, pool_settings
from hsm_pool.provisioning.sandbox import NoSandbox, sandboxed
from hsm_pool.provisioning.users import NotSeparated, Users
from hsm_pool.settings import NodeSettings, PartitionSettings, TokenSettings
from hsm_pool.store.state_file import write_atomically

CONNECTION_FORMAT = 1
_BACKOFF_SECONDS = (0.1, 5.0)
_STOP_SECONDS = 15.0
_LOOP_SECONDS = 5.0
_LINE_BYTES_MAX = 64 * 1024
_MEASURES_MAX = 32
_TEXT_LENGTH_MAX = 64

_log = structlog.get_logger()


class Told(NamedTuple):
    """What a node agent tells of its node."""

    process_ids: dict[str, int | None]
    hardening: list[str]
    failures: dict[str, int]
    store_disk_lost: bool


NOTHING_TOLD: Final = Told({}, [], {}, store_disk_lost=False)


def processes_of(line: bytes) -> Told:
    """Return what a line of a node agent's tells.

    Raises:
        ValueError: It tells something else.
    """
    try:
        event = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(event, dict) or event.get("event") != "processes":
        raise ValueError("no event of an agent")
    ids, hardening = event.get("process_ids"), event.get("hardening")
    if not isinstance(ids, dict) or not isinstance(hardening, list) or len(hardening) > _MEASURES_MAX:
        raise ValueError("an event without process ids and hardening")
    told = event.get("failures")
    if not isinstance(told, dict):
        raise ValueError("an event without failures")
    found: dict[str, int | None] = {}
    failures: dict[str, int] = {}
    for name in ("partition", "store_member"):
        process_id = ids.get(name)
        if process_id is not None and (type(process_id) is not int or not 1 < process_id < 2**31):
            raise ValueError("an event with an impossible process id")
        count = told.get(name)
        if type(count) is not int or not 0 <= count < 2**31:
            raise ValueError("an event with an impossible count of failures")
        found[name], failures[name] = process_id, count
    measures = [str(measure)[:_TEXT_LENGTH_MAX] for measure in hardening]
    return Told(found, measures, failures, event.get("store_disk_lost") is True)


class Supervisor:
    """One pool's processes on this machine. Main thread only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pool = pool_settings(directory)
        # Read once: the disk of a node may be lost while the other two serve.
        self._partitions = self._partition_settings()
        self._users, self._not_separated = self._separate()
        users = self._users
        agents_options = []
        if users:
            agents_options = [
                "--partition-user",
                str(users.partition),
                "--store-user",
                str(users.store_member),
            ]
        self._agents = [
            Child(
                f"node-agent-{index}",
                [
                    sys.executable,
                    "-m",
                    "hsm_pool.node_agent",
                    "--settings",
                    str(self._node(index) / "node.json"),
                    *agents_options,
                ],
                self._node(index) / "logs",
                _BACKOFF_SECONDS,
                pipe_output=True,
                run_as=users.agent_runs_as if users else None,
            )
            for index in range(PARTITIONS)
        ]
        self._controller, self._not_sandboxed = self._make_controller()
        self._controller_process_id: int | None = None
        self._issuer: list[Child] = []
        issuer_settings = directory / "token-issuer" / "token-issuer.json"
        if issuer_settings.is_file():
            command = [sys.executable, "-m", "hsm_pool.tokens.issuer", "--settings", str(issuer_settings)]
            runs_as = RunAs(users.token_issuer) if users else None
            logs = directory / "token-issuer"
            self._issuer = [Child("token-issuer", command, logs, _BACKOFF_SECONDS, run_as=runs_as)]
        self._told = [NOTHING_TOLD] * PARTITIONS
        self._buffers: dict[int, bytes] = {}
        self._signals = SignalPipe()
        self._selector = selectors.DefaultSelector()

    def _separate(self) -> tuple[Users | None, str]:
        """Return the users of the processes, or None and why they are all this one."""
        member = settings_module.load(NodeSettings, self._node(0) / "node.json").store_member
        first = self._pool.get("first_user_id", users_module.FIRST_USER_ID)
        binary = member.binary if member else ""
        try:
            return users_module.separate(self._directory, first, binary, self._partitions), ""
        except NotSeparated as why:
            _log.warning("users are not separated", reason=str(why))
            return None, str(why)

    def _make_controller(self) -> tuple[Child, str]:
        """Return the controller, and why it runs without a sandbox; "" if it runs in one."""
        directory = self._directory / "fabric"
        settings_file = str(directory / "fabric.json")
        command = [sys.executable, "-m", "fabric_controller", "serve", "--settings", settings_file]
        run_as = RunAs(self._users.fabric_controller) if self._users else None
        why = ""
        try:
            command = sandboxed(command, directory, run_as)
        except NoSandbox as reason:
            why = str(reason)
            _log.warning("the controller has no sandbox", reason=why)
        name = "fabric-controller"
        return Child(name, command, directory, _BACKOFF_SECONDS, pipe_output=not why, run_as=run_as), why

    def _partition_settings(self) -> list[PartitionSettings]:
        files = (self._node(index) / "partition.json" for index in range(PARTITIONS))
        return [settings_module.load(PartitionSettings, file) for file in files]

    def _node(self, index: int) -> Path:
        return self._directory / "nodes" / str(index)

    def run(self) -> None:
        """Run until SIGTERM, then end everything."""
        self._selector.register(self._signals.reader, selectors.EVENT_READ)
        children = [*self._agents, self._controller, *self._issuer]
        while not self._signals.stopping:
            changed = False
            for child in children:
                if child.process and child.process.poll() is not None:
                    self._forget(child)
                changed = child.settle() or changed
                if child.reap():
                    changed = True
                    _log.warning("exited", name=child.name)
                if child.due():
                    child.start()
                    changed = True
                    self._follow(child)
            for key, _ in self._selector.select(next_wait_seconds(children, _LOOP_SECONDS)):
                if key.fd == self._signals.reader:
                    self._signals.drain()
                else:
                    changed = self._read(key.fd, key.data) or changed
            if changed:
                self._write_connection()
        for child in children:
            if child.process:
                child.process.terminate()
        for child in children:
            child.stop(_STOP_SECONDS)
        (self._directory / "connection.json").unlink(missing_ok=True)

    def _follow(self, child: Child) -> None:
        if child.process and child.process.stdout:
            os.set_blocking(child.process.stdout.fileno(), False)
            self._selector.register(child.process.stdout, selectors.EVENT_READ, data=child)
        elif child is self._controller and child.process:
            self._controller_process_id = child.process.pid

    def _forget(self, child: Child) -> None:
        if child.process and child.process.stdout:
            descriptor = child.process.stdout.fileno()
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
            self._buffers.pop(descriptor, None)
            child.process.stdout.close()
        if child is self._controller:
            self._controller_process_id = None
        elif child in self._agents:
            index = self._agents.index(child)
            self._told[index] = self._told[index]._replace(process_ids={})

    def _read(self, descriptor: int, child: Child) -> bool:
        """Take what an agent, or the controller's sandbox, printed; return whether process ids changed."""
        try:
            octets = os.read(descriptor, _LINE_BYTES_MAX)
        except BlockingIOError:
            return False
        if not octets:
            self._selector.unregister(descriptor)
            return False
        if child is self._controller:
            return self._read_sandbox(descriptor, octets)
        index = self._agents.index(child)
        *lines, rest = (self._buffers.get(descriptor, b"") + octets).split(b"\n")
        self._buffers[descriptor] = rest[-_LINE_BYTES_MAX:]
        for line in lines:
            try:
                self._told[index] = processes_of(line)
            except ValueError as error:
                # Another user's process writes there: whatever it says ends nobody else's.
                _log.warning("an agent said what is not understood", name=child.name, reason=str(error))
        return bool(lines)

    def _read_sandbox(self, descriptor: int, octets: bytes) -> bool:
        """Take the process id within the sandbox, as this machine counts it."""
        said = (self._buffers.get(descriptor, b"") + octets)[-_LINE_BYTES_MAX:]
        self._buffers[descriptor] = said
        try:
            said_id = json.loads(said)["child-pid"]
        except (ValueError, KeyError, TypeError):  # not all of it is here yet
            return False
        self._controller_process_id = said_id if isinstance(said_id, int) else None
        return True

    def _token_issuer(self, tokens: TokenSettings | None) -> dict[str, Any] | None:
        if tokens is None or not self._issuer:
            return None
        return {
            "issuer": tokens.issuer,
            "audience": tokens.audience,
            "process_id": self._issuer[0].process_id,
        }

    def _write_connection(self) -> None:
        content = json.dumps(self._connection(), indent=2) + "\n"
        write_atomically(self._directory / "connection.json", content.encode())

    def _connection(self) -> dict[str, Any]:
        directory = self._directory
        partitions = self._partitions
        store = partitions[0].store
        return {
            "format": CONNECTION_FORMAT,
            "pool_id": self._pool["pool_id"],
            "data_directory": str(directory),
            "attended": self._pool["attended"],
            "client_ca_file": str(directory / "pki" / "client-ca.crt"),
            "clients": {
                name: {
                    "certificate_file": str(directory / "clients" / f"{name}.crt"),
                    "key_file": str(directory / "clients" / f"{name}.key"),
                }
                for name in ("administrator", "application")
            },
            "partitions": [
                {
                    "index": index,
                    "endpoint": settings.client_endpoint,
                    "peer_endpoint": settings.peer_endpoint,
                    "enclave_endpoint": settings.enclave_endpoint,
                    "node_endpoint": settings.node_endpoint,
                    "store_endpoint": settings.store.endpoints[0],
                    "metrics_endpoint": settings.metrics_endpoint,
                    "token_endpoint": settings.tokens.endpoint if settings.tokens else None,
                    "rest_endpoint": settings.rest.endpoint if settings.rest else None,
                    "data_directory": str(self._node(index)),
                    "log_directory": str(self._node(index) / "logs"),
                    "process_ids": {
                        "node_agent": self._agents[index].process_id,
                        "partition": self._told[index].process_ids.get("partition"),
                        "store_member": self._told[index].process_ids.get("store_member"),
                    },
                    "node_agent_hardening": self._told[index].hardening,
                    "failures": {"node_agent": self._agents[index].failures, **self._told[index].failures},
                    "store_disk_lost": self._told[index].store_disk_lost,
                }
                for index, settings in enumerate(partitions)
            ],
            "token_issuer": self._token_issuer(partitions[0].tokens),
            "store": {
                "ca_file": store.identity.ca_file,
                "certificate_file": store.identity.certificate_file,
                "key_file": store.identity.key_file,
                "prefix": store.prefix,
            },
            "fabric_controller": {
                "process_id": self._controller_process_id,
                "sandbox": {"bubblewrap": not self._not_sandboxed, "reason": self._not_sandboxed},
                "data_directory": str(directory / "fabric"),
                "certificate_file": str(directory / "fabric" / "controller.crt"),
                "key_file": str(directory / "fabric" / "controller.key"),
                "ca_file": str(directory / "fabric" / "controller-trusted.crt"),
            },
            "supervisor": {"process_id": os.getpid()},
            "users": {"separated": self._users is not None, "reason": self._not_separated},
        }


def main() -> int:
    """Run the supervisor; a second one of the same pool refuses to start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    directory = parser.parse_args().data_dir.absolute()
    lock = os.open(directory / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit("supervisor: this pool is running already")
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    logs.configure()
    os.umask(0o022)  # what is not for others says so itself
    Supervisor(directory).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
