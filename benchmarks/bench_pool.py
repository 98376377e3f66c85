"""The pool under measurement: started by the mhsm command, looked at and broken like any other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from hsm_pool.client.connection import Connection, NoConnection, load_connection
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from mhsm.enclave.v1 import enclave_pb2
from mhsm.etcd.v3 import rpc_pb2, rpc_pb2_grpc
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import submission
from security_domain.officers import make_officer

PARTITIONS = 3
REQUIRED = 2
SERVING = enclave_pb2.PARTITION_STATE_SERVING
LOCKED = enclave_pb2.PARTITION_STATE_LOCKED

_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.01
_STATUS_SECONDS = 0.5
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class BenchmarkPool:
    """An attended pool of its own, quorum 2 of 3. :meth:`close` stops it."""

    def __init__(self, directory: Path, firmware_repository: Path | None = None) -> None:
        self.directory = directory
        self._pause = threading.Event()
        self._officers = [make_officer(f"officer-{number}") for number in range(1, 4)]
        self._file = b""
        firmware = ("--firmware-repository", str(firmware_repository)) if firmware_repository else ()
        self._mhsm("up", "--attended", *firmware)

    def close(self) -> None:
        """Stop the pool; no process is left."""
        self._mhsm("down")

    def activate(self) -> None:
        """Download the security domain and wait until all partitions serve."""
        certificates = [
            x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
            for pem, _ in self._officers
        ]
        with self.client("administrator") as pool:
            begun = pool.download_security_domain(certificates, REQUIRED)
            self._file = begun.security_domain_file
            for _, key in self._officers:
                self._submit(pool, begun, key)
        self.await_whole()

    def _submit(self, pool: Pool, begun: Any, key: Any) -> None:
        name = security_domain_pb2.CeremonyPurpose.Name(begun.purpose)
        purpose = name.removeprefix("CEREMONY_PURPOSE_").lower()
        submitted = submission.make_submission(
            self._file, key, begun.attempt_id, begun.exchange_public_key, purpose
        )
        pool.submit_share(begun.partition_index, begun.attempt_id, submitted)

    # -- looking -------------------------------------------------------------------------

    @property
    def connection(self) -> Connection:
        """The connection file, read anew."""
        return load_connection(self.directory)

    def client(self, name: str = "application", **options: Any) -> Pool:
        """Connect as one of the pool's clients."""
        return Pool(self.connection, name, **options)

    def status(self, index: int) -> Any:
        """Return a partition's status over a new connection, None while it does not answer."""
        try:
            with self.client("administrator", partition=index, timeout_seconds=_STATUS_SECONDS) as pool:
                return pool.partition_status(index)
        except (MHSMError, NoConnection):
            return None

    def all_fresh(self) -> bool:
        """Return whether all partitions serve and hold a lease."""
        statuses = [self.status(index) for index in range(PARTITIONS)]
        return all(status and status.state == SERVING and status.fresh for status in statuses)

    def all_locked(self) -> bool:
        """Return whether all partitions are locked."""
        statuses = [self.status(index) for index in range(PARTITIONS)]
        return all(status and status.state == LOCKED for status in statuses)

    def partition_cpu_seconds(self) -> float:
        """Return the processor time that the three partition processes have used so far."""
        ticks = 0
        for entry in self.connection.partitions:
            text = Path(f"/proc/{entry.process_ids['partition']}/stat").read_text()
            fields = text.rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
        return ticks / _TICKS_PER_SECOND

    def store_credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials with which a partition reaches the store."""
        store = self.connection.store
        return grpc.ssl_channel_credentials(
            Path(store["ca_file"]).read_bytes(),
            Path(store["key_file"]).read_bytes(),
            Path(store["certificate_file"]).read_bytes(),
        )

    def store_leader(self) -> int | None:
        """Return the index of the store member that leads; None while the three do not agree."""
        members: list[int] = []
        leaders: set[int] = set()
        credentials = self.store_credentials()
        for entry in self.connection.partitions:
            with grpc.secure_channel(entry.store_endpoint, credentials) as channel:
                stub = rpc_pb2_grpc.MaintenanceStub(channel)
                try:
                    status = stub.Status(rpc_pb2.StatusRequest(), timeout=_STATUS_SECONDS)
                except grpc.RpcError:
                    return None
            members.append(status.header.member_id)
            leaders.add(status.leader)
        leader = leaders.pop()
        return members.index(leader) if not leaders and leader in members else None

    # -- waiting and breaking ------------------------------------------------------------

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until a condition holds.

        Raises:
            RuntimeError: It did not within a minute.
        """
        deadline = time.monotonic() + _WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} within {_WAIT_SECONDS:.0f} s")
            self._pause.wait(_POLL_SECONDS)

    def await_whole(self) -> None:
        """Wait until all partitions serve and the store has one leader."""
        self.wait_for(lambda: self.all_fresh() and self.store_leader() is not None, "whole pool")

    def await_leader(self) -> int:
        """Return the index of the store member that leads, once the members agree."""
        found: list[int] = []

        def known() -> bool:
            leader = self.store_leader()
            found.extend([] if leader is None else [leader])
            return bool(found)

        self.wait_for(known, "leader of the store")
        return found[0]

    def kill(self, index: int, *parts: str) -> None:
        """Send SIGKILL to processes of one partition: partition, store_member or node_agent."""
        process_ids = self.connection.partitions[index].process_ids
        for part in parts:
            process_id = process_ids[part]
            if process_id:
                os.kill(process_id, signal.SIGKILL)

    def lock(self) -> None:
        """Kill all partitions at once and wait until the pool is locked."""
        for index in range(PARTITIONS):
            self.kill(index, "partition")
        self.wait_for(self.all_locked, "locked pool")

    def unlock(self) -> tuple[float, float]:
        """Unlock by a quorum; return the seconds until the first and until all partitions serve."""
        began = time.monotonic()
        with self.client("administrator") as pool:
            begun = pool.init_recovery(0)
            for _, key in self._officers[:REQUIRED]:
                self._submit(pool, begun, key)

        def first_serves() -> bool:
            status = self.status(0)
            return bool(status and status.fresh)

        self.wait_for(first_serves, "first partition")
        first = time.monotonic() - began
        self.wait_for(self.all_fresh, "three serving partitions")
        return first, time.monotonic() - began

    def _mhsm(self, *arguments: str) -> dict[str, Any]:
        completed = subprocess.run(
            [sys.executable, "-m", "hsm_pool.cli", *arguments, "--data-dir", str(self.directory), "--json"],
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        if completed.returncode:
            raise RuntimeError(f"mhsm {arguments[0]}: {completed.stderr.strip()}")
        result: dict[str, Any] = json.loads(completed.stdout)
        return result
