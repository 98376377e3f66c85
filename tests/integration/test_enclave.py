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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from hsm_pool import limits
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError, PartitionDrained
from mhsm.crypto.v1 import crypto_pb2
from mhsm.enclave.v1 import enclave_pb2
from mhsm.keys.v1 import keys_pb2
from tests.fabric_access import DRAINED, SERVING, Fabric, assert_bare
from tests.running_pool import RunningPool, changes, until

pytestmark = pytest.mark.pool


@pytest.fixture
def fabric(pool: RunningPool):
    pool.await_states(["SERVING"] * 3)
    made = Fabric(pool)
    yield made

    def state(index: int) -> int | None:
        try:
            return made.state(index)
        except grpc.RpcError:  # a test may have used up the calls of the moment
            return None

    for index in range(3):
        if until(partial(state, index), 10, "an answer") == DRAINED:
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
    "RotateKey": lambda c: c.rotate_key("keys/calls"),
    "GetKeyRotationPolicy": lambda c: c.get_key_rotation_policy("keys/calls"),
    "UpdateKeyRotationPolicy": lambda c: c.update_key_rotation_policy("keys/calls", expiry_time="P90D"),
    "Sign": lambda c: c.sign("keys/calls", "ES256", bytes(32)),
    "Verify": lambda c: c.verify_batch("keys/calls", "ES256", [(bytes(32), bytes(64))]),
    "Encrypt": lambda c: c.encrypt("keys/calls", "A256GCM", b""),
    "Decrypt": lambda c: c.decrypt_batch("keys/calls", "A256GCM", []),
    "WrapKey": lambda c: c.wrap_key("keys/calls", "A256KW", bytes(16)),
    "UnwrapKey": lambda c: c.unwrap_key("keys/calls", "A256KW", bytes(24)),
    "SecureWrapKey": lambda c: c.secure_wrap_key("keys/calls", "A256KW"),
    "SecureUnwrapKey": lambda c: c.secure_unwrap_key("keys/calls", "A256KW", bytes(40), "x"),
    "GetRandomBytes": lambda c: c.random_bytes(1),
    "ReleaseKey": lambda c: c.release_key("keys/calls", "x"),
    "GetKeyAttestation": lambda c: c.get_key_attestation("keys/calls"),
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
    before = changes(pool.status(0))
    with pool.client(partition=2) as drained:
        for name, call in DATA_PLANE_CALLS.items():
            with pytest.raises(MHSMError) as refused:
                call(drained)
            assert refused.value.reason == "PARTITION_DRAINED", name
        sign = crypto_pb2.SignRequest(name="keys/calls", algorithm="ES256", digests=[bytes(32)])
        requests = [crypto_pb2.StreamOperationsRequest(sign=sign)] * 2
        answers = list(drained.stream(requests, partition=2))
        assert ["PARTITION_DRAINED" in str(answer.error) for answer in answers] == [True, True]
    assert changes(pool.status(0)) == before


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


VERBS = ("Drain", "Resume", "Relinquish", "Restart")
SERVICE = "/mhsm.enclave.v1.EnclaveService"


def code_of(fabric: Fabric, method: str, octets: bytes, **options: object) -> str:
    """Call with any octets; return the code, which must come alone."""
    try:
        fabric.channels[0].unary_unary(method)(octets, timeout=10, **options)
    except grpc.RpcError as error:
        assert_bare(error)
        return str(error.code().name)
    return "OK"


def test_g5_what_the_contract_does_not_name_is_refused(fabric: Fabric) -> None:
    """Unknown fields, rubbish, numbers out of their bounds, long messages: a code and nothing else."""
    good = enclave_pb2.DrainRequest(**fabric.stamp()).SerializeToString()
    for verb in VERBS:
        for octets in (
            good + b"\x7a\x04evil",
            good + b"\x78\x01",
            b"",
            b"\x08\x01",
            good * 20,
            b"\xff\xff\xff\xff",
            b"\x0a\x20x",
            b"\x08",
            enclave_pb2.DrainRequest(counter=2**60, expires_ms=2**60).SerializeToString(),
        ):
            assert code_of(fabric, f"{SERVICE}/{verb}", octets) == "INVALID_ARGUMENT", (verb, octets)
    assert code_of(fabric, f"{SERVICE}/GetStatus", b"\x0a\x04evil") == "INVALID_ARGUMENT"
    assert code_of(fabric, "/grpc.health.v1.Health/Check", b"") == "OK"
    assert code_of(fabric, "/grpc.health.v1.Health/Check", b"\x0a\x01x") == "INVALID_ARGUMENT"
    assert fabric.state(0) == SERVING


def test_g5_metadata_that_nobody_declared_is_refused(fabric: Fabric) -> None:
    method = f"{SERVICE}/GetStatus"
    assert code_of(fabric, method, b"") == "OK"
    for key, value in (("x-note", "hello"), ("x-note-bin", b"\x00\x01"), ("authorization", "Bearer x")):
        assert code_of(fabric, method, b"", metadata=((key, value),)) == "INVALID_ARGUMENT"


def test_g5_calls_that_come_too_often_are_refused(fabric: Fabric) -> None:
    method = f"{SERVICE}/GetStatus"
    codes = [code_of(fabric, method, b"") for _ in range(10 * limits.ENCLAVE_CALLS_BURST)]
    assert codes.count("RESOURCE_EXHAUSTED") > 0
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
    until(lambda: code_of(fabric, method, b"") == "OK", 10, "calls are let through again")


def test_looks_of_several_processes_do_not_shut_each_other_out(fabric: Fabric) -> None:
    """Controller and operators' commands are one caller; on a busy machine their requests take a while."""
    # At partition 1: the test before used up the calls of the moment at partition 0.
    go_on = threading.Event()

    def later() -> Iterator[bytes]:
        go_on.wait(30)
        yield b""

    call = fabric.channels[1].stream_unary(f"{SERVICE}/GetStatus")
    looks = [call.future(later(), timeout=30) for _ in range(4)]
    try:
        assert fabric.state(1) == SERVING
    finally:
        go_on.set()
    for look in looks:
        assert look.result(30)


def test_g5_a_command_is_obeyed_once_whatever_crashes(pool: RunningPool, fabric: Fabric) -> None:
    """A counter that was taken is refused for ever: at once, and by the next incarnation."""
    drain = fabric.stamp()
    assert fabric.send("Drain", 1, **drain) == "OK"
    assert fabric.send("Resume", 1) == "OK"
    until(lambda: fabric.state(1) == SERVING, 10, "it serves again")
    assert fabric.send("Drain", 1, **drain) == "ABORTED"
    incarnation = fabric.status(1).incarnation
    pool.signal(1, "partition", signal.SIGKILL)
    until(lambda: (s := pool.status(1)) is not None and s.incarnation > incarnation, 30, "it is back")
    pool.await_states(["SERVING"] * 3)
    assert fabric.send("Drain", 1, **drain) == "ABORTED"
    now_ms = time.time_ns() // 1_000_000
    assert fabric.send("Drain", 1, counter=now_ms, expires_ms=now_ms - 1) == "ABORTED"
    assert fabric.send("Drain", 1, counter=now_ms, expires_ms=now_ms + 120_000) == "ABORTED"
    assert fabric.send("Drain", 1, counter=2**53 - 1, expires_ms=now_ms + 30_000) == "ABORTED"
    assert fabric.state(1) == SERVING


def test_g5_only_a_drained_partition_is_restarted(pool: RunningPool, fabric: Fabric) -> None:
    assert fabric.send("Restart", 1) == "FAILED_PRECONDITION"
    assert fabric.drain(1) == "drained"
    incarnation = fabric.status(1).incarnation
    assert fabric.send("Restart", 1) == "OK"
    until(lambda: (s := pool.status(1)) is not None and s.incarnation > incarnation, 30, "it is back")
    pool.await_states(["SERVING", "DRAINED", "SERVING"])
    assert fabric.status(1).incarnation == incarnation + 1
    fabric.resume(1)
    pool.await_states(["SERVING"] * 3)


def holders(fabric: Fabric) -> list[int]:
    return [index for index in range(3) if fabric.status(index).housekeeper]


def test_the_housekeeping_role_is_handed_over_and_falls_to_the_next(
    pool: RunningPool, fabric: Fabric
) -> None:
    """One partition holds it; Relinquish moves it, a drain of the holder does so, too."""
    (first,) = until(lambda: len(found := holders(fabric)) == 1 and found, 10, "one holder")
    second, third = (first + 1) % 3, (first + 2) % 3
    assert fabric.send("Relinquish", first) == "OK"
    until(lambda: holders(fabric) == [second], 10, "the next one holds it")
    assert fabric.send("Relinquish", first) == "OK", "whoever does not hold it changes nothing"
    assert holders(fabric) == [second]
    assert fabric.drain(second) == "drained"
    until(lambda: holders(fabric) == [third], 10, "a drained partition keeps no house")
    fabric.resume(second)
    until(lambda: holders(fabric) == [second], 10, "it returns to whom it was handed")


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
