"""G5: what the fabric controller may do to a real pool, and what the partition does not let it do."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from hsm_pool.errors import PartitionDrained
from mhsm.enclave.v1 import enclave_pb2, enclave_pb2_grpc
from mhsm.keys.v1 import keys_pb2
from tests.running_pool import RunningPool, until

pytestmark = pytest.mark.pool

DRAINED = enclave_pb2.PARTITION_STATE_DRAINED
SERVING = enclave_pb2.PARTITION_STATE_SERVING


class Fabric:
    """The enclave interface of each partition, with the controller's certificate."""

    def __init__(self, pool: RunningPool) -> None:
        files = pool.connection.fabric_controller
        credentials = grpc.ssl_channel_credentials(
            Path(files["ca_file"]).read_bytes(),
            Path(files["key_file"]).read_bytes(),
            Path(files["certificate_file"]).read_bytes(),
        )
        self.channels = [
            grpc.secure_channel(entry.enclave_endpoint, credentials) for entry in pool.connection.partitions
        ]
        self.stubs = [enclave_pb2_grpc.EnclaveServiceStub(channel) for channel in self.channels]

    def state(self, index: int) -> int:
        return self.stubs[index].GetStatus(enclave_pb2.GetStatusRequest(), timeout=5).state

    def drain(self, index: int) -> str:
        """Drain a partition; return "drained" or the status code."""
        try:
            self.stubs[index].Drain(enclave_pb2.DrainRequest(), timeout=20)
        except grpc.RpcError as error:
            assert not error.details(), "an error on the fabric plane is its code alone"
            assert not [key for key, _ in error.trailing_metadata() if not key.startswith("grpc")]
            return error.code().name
        return "drained"

    def resume(self, index: int) -> None:
        self.stubs[index].Resume(enclave_pb2.ResumeRequest(), timeout=20)

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


@pytest.fixture
def fabric(pool: RunningPool):
    pool.await_states(["SERVING"] * 3)
    made = Fabric(pool)
    yield made
    for index in range(3):
        if made.state(index) == DRAINED:
            made.resume(index)
    made.close()
    pool.await_states(["SERVING"] * 3)


def test_a_drained_partition_serves_nobody_and_the_pool_goes_on(pool: RunningPool, fabric: Fabric) -> None:
    digest = hashlib.sha256(b"text").digest()
    with pool.client() as client:
        client.create_key("drain", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    assert fabric.drain(1) == "drained"
    assert fabric.state(1) == DRAINED
    with pool.client(partition=1) as drained, pytest.raises(PartitionDrained):
        drained.sign("keys/drain", "ES256", digest)
    with pool.client() as client:
        for number in range(20):
            client.sign("keys/drain", "ES256", digest)
            client.create_key(f"drained-{number}", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=128)
    assert fabric.drain(1) == "drained", "a repeat changes nothing"
    assert fabric.drain(0) == "FAILED_PRECONDITION", "two partitions must go on serving"
    assert fabric.drain(2) == "FAILED_PRECONDITION"
    fabric.resume(1)
    until(lambda: fabric.state(1) == SERVING, 10, "partition 1 serves again")
    pool.await_states(["SERVING"] * 3)
    with pool.client(partition=1) as resumed:
        resumed.sign("keys/drain", "ES256", digest)


def test_of_drains_at_the_same_instant_one_wins(pool: RunningPool, fabric: Fabric) -> None:
    """Three controllers drain three partitions at once: never are two out of service."""
    for _ in range(4):
        barrier = threading.Barrier(3)
        outcomes: dict[int, str] = {}

        def drain(
            index: int, barrier: threading.Barrier = barrier, outcomes: dict[int, str] = outcomes
        ) -> None:
            barrier.wait()
            outcomes[index] = fabric.drain(index)

        threads = [threading.Thread(target=drain, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes.values()) == ["FAILED_PRECONDITION", "FAILED_PRECONDITION", "drained"]
        assert [fabric.state(index) for index in range(3)].count(DRAINED) == 1
        (winner,) = [index for index, outcome in outcomes.items() if outcome == "drained"]
        fabric.resume(winner)
        pool.await_states(["SERVING"] * 3)


def test_no_drain_while_another_partition_is_away(pool: RunningPool, fabric: Fabric) -> None:
    with pool.paused(2, "partition"):
        until(
            lambda: fabric.stubs[0].GetStatus(enclave_pb2.GetStatusRequest()).serving_count == 2,
            15,
            "two left",
        )
        assert fabric.drain(0) == "FAILED_PRECONDITION"
        assert fabric.drain(1) == "FAILED_PRECONDITION"
    pool.await_states(["SERVING"] * 3)


def test_unknown_fields_are_refused(fabric: Fabric) -> None:
    """A field that the contract does not know could carry anything."""
    for method in ("GetStatus", "Drain", "Resume"):
        call = fabric.channels[0].unary_unary(f"/mhsm.enclave.v1.EnclaveService/{method}")
        with pytest.raises(grpc.RpcError) as failed:
            call(b"\x0a\x04evil", timeout=5)
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not failed.value.details()


def test_the_controller_runs_and_its_command_drains(pool: RunningPool, fabric: Fabric) -> None:
    """The process of its own keeps a picture; mhsm-fabric is its operator's command."""
    directory = Path(pool.connection.fabric_controller["data_directory"])
    document = until(
        lambda: (directory / "status.json").exists() and json.loads((directory / "status.json").read_text()),
        15,
        "the controller's picture",
    )
    assert document
    command = [sys.executable, "-m", "fabric_controller"]
    settings = ["--settings", str(directory / "fabric.json")]
    drained = subprocess.run([*command, "drain", "0", *settings], capture_output=True, text=True, check=False)
    assert drained.returncode == 0, drained.stderr
    assert fabric.state(0) == DRAINED
    refused = subprocess.run([*command, "drain", "1", *settings], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    resumed = subprocess.run(
        [*command, "resume", "0", *settings], capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
