"""G5: what the fabric controller may do to a real pool, and what the partition does not let it do."""

from __future__ import annotations

import hashlib
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError, PartitionDrained
from mhsm.crypto.v1 import crypto_pb2
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


DATA_PLANE_CALLS: dict[str, Callable[[Pool], object]] = {
    "CreateKey": lambda c: c.create_key("new", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=128),
    "ImportKey": lambda c: c.import_key("new", octets=bytes(16)),
    "GetKey": lambda c: c.get_key("keys/calls"),
    "ListKeys": lambda c: list(c.list_keys()),
    "ListKeyVersions": lambda c: list(c.list_key_versions("keys/calls")),
    "UpdateKey": lambda c: c.update_key("keys/calls", tags={}),
    "DeleteKey": lambda c: c.delete_key("keys/calls"),
    "GetDeletedKey": lambda c: c.get_deleted_key("keys/calls"),
    "ListDeletedKeys": lambda c: list(c.list_deleted_keys()),
    "RecoverDeletedKey": lambda c: c.recover_deleted_key("keys/calls"),
    "PurgeDeletedKey": lambda c: c.purge_deleted_key("keys/calls"),
    "Sign": lambda c: c.sign("keys/calls", "ES256", bytes(32)),
    "Verify": lambda c: c.verify_batch("keys/calls", "ES256", [(bytes(32), bytes(64))]),
    "Encrypt": lambda c: c.encrypt("keys/calls", "A256GCM", b""),
    "Decrypt": lambda c: c.decrypt_batch("keys/calls", "A256GCM", []),
    "WrapKey": lambda c: c.wrap_key("keys/calls", "A256KW", bytes(16)),
    "UnwrapKey": lambda c: c.unwrap_key("keys/calls", "A256KW", bytes(24)),
    "GetRandomBytes": lambda c: c.random_bytes(1),
    "BackupKey": lambda c: c.backup_key("keys/calls"),
    "RestoreKey": lambda c: c.restore_key(b"{}"),
}


def test_a_drained_partition_refuses_every_call_of_the_data_plane(pool: RunningPool, fabric: Fabric) -> None:
    """G5: with its own reason; the mutations among them have no effect."""
    with pool.client() as client:
        client.create_key("calls", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    described = [m.name for s in ("KeyService",) for m in keys_pb2.DESCRIPTOR.services_by_name[s].methods]
    described += [m.name for m in crypto_pb2.DESCRIPTOR.services_by_name["CryptoService"].methods]
    assert set(DATA_PLANE_CALLS) == set(described) - {"StreamOperations"}
    assert fabric.drain(2) == "drained"
    before = pool.status(0).applied_sequence
    with pool.client(partition=2) as drained:
        for name, call in DATA_PLANE_CALLS.items():
            with pytest.raises(MHSMError) as refused:
                call(drained)
            assert refused.value.reason == "PARTITION_DRAINED", name
        sign = crypto_pb2.SignRequest(name="keys/calls", algorithm="ES256", digests=[bytes(32)])
        requests = [crypto_pb2.StreamOperationsRequest(sign=sign)] * 2
        answers = list(drained.stream(requests, partition=2))
        assert ["PARTITION_DRAINED" in str(answer.error) for answer in answers] == [True, True]
    assert pool.status(0).applied_sequence == before


def test_clients_notice_no_error_while_partitions_are_drained_in_turn(
    pool: RunningPool, fabric: Fabric
) -> None:
    """G2, G5: a patch round over all partitions under load; every call succeeds."""
    with pool.client() as client:
        client.create_key("rolled", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    stop = threading.Event()
    failed: list[BaseException] = []
    done = [0, 0]

    def work(kind: int, call: Callable[[Pool], object]) -> None:
        with pool.client() as client:
            while not stop.is_set():
                try:
                    call(client)
                except BaseException as error:  # noqa: BLE001 - any error fails the test
                    failed.append(error)
                    return
                done[kind] += 1

    def sign(client: Pool) -> None:
        client.sign("keys/rolled", "ES256", bytes(32))

    def update(client: Pool) -> None:
        client.update_key("keys/rolled", tags={"n": uuid.uuid4().hex})

    workers = [threading.Thread(target=work, args=(0, sign)) for _ in range(2)]
    workers.append(threading.Thread(target=work, args=(1, update)))
    for worker in workers:
        worker.start()
    try:
        for index in range(3):
            assert fabric.drain(index) == "drained"
            at = list(done)
            until(lambda at=at: done[0] > at[0] + 20 and done[1] > at[1] + 5, 30, "work goes on")  # type: ignore[misc]
            fabric.resume(index)
            pool.await_states(["SERVING"] * 3)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert not failed


def test_a_drained_partition_stays_drained_when_it_is_killed(pool: RunningPool, fabric: Fabric) -> None:
    """G5: a drain is a record of the chain, so a new incarnation knows of it; nobody else can be drained."""
    assert fabric.drain(1) == "drained"
    incarnation = pool.status(1).incarnation
    pool.signal(1, "partition", signal.SIGKILL)
    until(lambda: (s := pool.status(1)) is not None and s.incarnation > incarnation, 30, "it is back")
    pool.await_states(["SERVING", "DRAINED", "SERVING"])
    assert fabric.drain(0) == "FAILED_PRECONDITION"
    fabric.resume(1)
    pool.await_states(["SERVING"] * 3)


def test_mutations_do_not_wait_for_a_drained_partition(
    pool: RunningPool, fabric: Fabric, capsys: pytest.CaptureFixture[str]
) -> None:
    """G2: a drain surrenders the lease; shown here, measured by the benchmarks."""

    def median_ms() -> float:
        took = []
        with pool.client(partition=0) as client:
            for _ in range(20):
                begun = time.monotonic()
                client.create_key("timed", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=128)
                took.append((time.monotonic() - begun) * 1000)
            client.delete_key("keys/timed")
            client.purge_deleted_key("keys/timed")
        return statistics.median(took)

    serving = median_ms()
    assert fabric.drain(2) == "drained"
    drained = median_ms()
    with capsys.disabled():
        print(f"\nmutation, median: {serving:.1f} ms with three serving, {drained:.1f} ms with one drained")


def test_two_drains_at_the_same_instant_never_both_win(pool: RunningPool, fabric: Fabric) -> None:
    """G5: five rounds, each pair of partitions; looked at from every partition."""
    for number in range(5):
        pair = [number % 3, (number + 1) % 3]
        barrier = threading.Barrier(2)
        outcomes: dict[int, str] = {}

        def drain(
            index: int, barrier: threading.Barrier = barrier, outcomes: dict[int, str] = outcomes
        ) -> None:
            barrier.wait()
            outcomes[index] = fabric.drain(index)

        threads = [threading.Thread(target=drain, args=(index,)) for index in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes.values()) == ["FAILED_PRECONDITION", "drained"]
        assert [fabric.state(index) for index in range(3)].count(DRAINED) == 1
        for index in pair:
            if outcomes[index] == "drained":
                fabric.resume(index)
        pool.await_states(["SERVING"] * 3)


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
        assert not failed.value.trailing_metadata()


def test_octets_that_are_no_message_get_a_code_alone(fabric: Fabric) -> None:
    """G5, G8: the parser's own words are not told on the fabric plane."""
    for octets in (b"\xff\xff\xff\xff", b"\x0a\x20x", b"\x08"):
        call = fabric.channels[0].unary_unary("/mhsm.enclave.v1.EnclaveService/GetStatus")
        with pytest.raises(grpc.RpcError) as failed:
            call(octets, timeout=5)
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not failed.value.details()
        assert not failed.value.trailing_metadata()


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
