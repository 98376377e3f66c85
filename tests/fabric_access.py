"""The enclave interface of each partition with the controller's own certificate, and its command."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc

from hsm_pool import limits
from mhsm.enclave.v1 import enclave_pb2, enclave_pb2_grpc
from tests.running_pool import RunningPool

DRAINED = enclave_pb2.PARTITION_STATE_DRAINED
SERVING = enclave_pb2.PARTITION_STATE_SERVING

# A restarted partition is seen at once, not after gRPC's own pause of a second.
_OPTIONS = tuple(
    (f"grpc.{name}_reconnect_backoff_ms", milliseconds)
    for name, milliseconds in (("initial", 20), ("min", 1000), ("max", 20))
)


class Fabric:
    """Stubs of all partitions; closed by :meth:`close`."""

    def __init__(self, pool: RunningPool) -> None:
        files = pool.connection.fabric_controller
        credentials = grpc.ssl_channel_credentials(
            Path(files["ca_file"]).read_bytes(),
            Path(files["key_file"]).read_bytes(),
            Path(files["certificate_file"]).read_bytes(),
        )
        self.channels = [
            grpc.secure_channel(entry.enclave_endpoint, credentials, options=_OPTIONS)
            for entry in pool.connection.partitions
        ]
        self.stubs = [enclave_pb2_grpc.EnclaveServiceStub(channel) for channel in self.channels]
        self._counter = 0
        self.ahead_ms = 0
        """How far the pool's clocks were moved."""

    def stamp(self) -> dict[str, int]:
        """Return counter and expiry of one more command."""
        now_ms = time.time_ns() // 1_000_000 + self.ahead_ms
        self._counter = max(self._counter + 1, now_ms)
        return {"counter": self._counter, "expires_ms": now_ms + 30_000}

    def status(self, index: int) -> enclave_pb2.GetStatusResponse:
        """Return what a partition says of itself."""
        status: enclave_pb2.GetStatusResponse = self.stubs[index].GetStatus(
            enclave_pb2.GetStatusRequest(), timeout=5
        )
        return status

    def state(self, index: int) -> int:
        """Return a partition's state."""
        return self.status(index).state

    def send(self, verb: str, index: int, /, **stamp: int) -> str:
        """Send a command; return "OK" or the status code, which must come alone."""
        request = getattr(enclave_pb2, f"{verb}Request")(**(stamp or self.stamp()))
        try:
            getattr(self.stubs[index], verb)(request, timeout=20)
        except grpc.RpcError as error:
            assert_bare(error)
            return str(error.code().name)
        return "OK"

    def drain(self, index: int) -> str:
        """Drain a partition; return "drained" or the status code."""
        return self.send("Drain", index).replace("OK", "drained")

    def resume(self, index: int) -> None:
        """Resume a partition."""
        assert self.send("Resume", index) == "OK"

    def serves(self, index: int) -> bool:
        """Return whether a partition says that it serves."""
        try:
            return self.state(index) == SERVING
        except grpc.RpcError:
            return False

    def close(self) -> None:
        """Close the channels."""
        for channel in self.channels:
            channel.close()


def assert_bare(error: grpc.RpcError) -> None:
    """An error on the fabric plane is its code alone."""
    if error.code() is not grpc.StatusCode.UNAVAILABLE:  # that may be gRPC's own, of this side
        assert not error.details()
    assert not [key for key, _ in error.trailing_metadata() or () if not key.startswith("grpc")]


def mhsm_fabric(pool: RunningPool, *arguments: str, seconds: float = 200) -> subprocess.CompletedProcess[str]:
    """Run the operator's command."""
    return subprocess.run(
        [sys.executable, "-m", "fabric_controller", *arguments, "--data-dir", str(pool.directory)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def history(pool: RunningPool) -> list[dict[str, Any]]:
    """Return the controller's journal."""
    listed = mhsm_fabric(pool, "history", "--json")
    assert listed.returncode == 0, listed.stderr
    return [json.loads(line) for line in listed.stdout.splitlines()]


class FloorWatcher:
    """Notes the fewest partitions that served at one moment, until it is closed.

    What a fresh partition says of how many hold a lease follows the one order of the store, once it has
    heard of all others; but it is the count that the commands are decided by. So what each partition says
    of its own lease counts, too. Asked one after the other, their answers are not of one moment: that two
    held no lease is believed when both say so a second time, and applied nothing between their two answers.
    Then neither was drained or resumed meanwhile, and the first answer of one lies between both answers of
    the other.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._begun: dict[tuple[int, int], float] = {}
        self.fewest = 3
        self.looks = 0
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            without_lease = set()
            for index in range(3):
                status = self._look(index)
                if status is not None:
                    without_lease.add((index, status.incarnation, status.applied_sequence))
            if len(without_lease) > 1:
                again = set()
                for index, _, _ in sorted(without_lease):
                    status = self._look(index)
                    if status is not None:
                        again.add((index, status.incarnation, status.applied_sequence))
                without_lease &= again
            self.fewest = min(self.fewest, 3 - len(without_lease))

    def _look(self, index: int) -> enclave_pb2.GetStatusResponse | None:
        """Return what a partition without a lease says; note what one that has a lease says."""
        try:
            status = self._fabric.status(index)
        except grpc.RpcError:
            return None
        if not status.fresh:
            return status
        self.looks += 1
        now = time.monotonic()
        if now - self._begun.setdefault((index, status.incarnation), now) > limits.LEASE_SECONDS:
            self.fewest = min(self.fewest, status.serving_count)
        return None
