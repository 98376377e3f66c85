"""A store that fills up: clients are stopped before the pool, and a pool that met its quota comes back (G1).

The quota is a few MiB here, by the settings of the nodes, so that filling it takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from hsm_pool.cli.status_command import _STORE_FULL
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError, StoreFull
from mhsm.etcd.v3 import rpc_pb2, rpc_pb2_grpc
from mhsm.keys.v1 import keys_pb2
from tests.running_pool import RunningPool, TestOfficer, mhsm, until

pytestmark = pytest.mark.pool
QUOTA_BYTES = 24 * 1024 * 1024
FAT = {f"{number:02d}" + "\U0001f600" * 254: "\U0001f511" * 256 for number in range(14)}


@pytest.fixture(scope="module")
def small(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> RunningPool:
    """A pool whose members hold little."""
    pool = make_pool(attended=False)
    pool.down()
    for index in range(3):
        for name, part in (("partition.json", "store"), ("node.json", "store_member")):
            file = pool.directory / "nodes" / str(index) / name
            document = json.loads(file.read_text())
            document[part]["quota_bytes"] = QUOTA_BYTES
            file.write_text(json.dumps(document))
    pool.up()
    pool.activate(officers, 2)
    return pool


@contextlib.contextmanager
def store_channel(pool: RunningPool) -> Iterator[grpc.Channel]:
    store = pool.connection.store
    credentials = grpc.ssl_channel_credentials(
        Path(store["ca_file"]).read_bytes(),
        Path(store["key_file"]).read_bytes(),
        Path(store["certificate_file"]).read_bytes(),
    )
    with grpc.secure_channel(pool.connection.partitions[0].store_endpoint, credentials) as channel:
        yield channel


def fill(pool: RunningPool) -> None:
    """Write the same key, which is not the pool's, until etcd takes no more: all of it is history."""
    with store_channel(pool) as channel:
        stub = rpc_pb2_grpc.KVStub(channel)
        for _ in range(4 * QUOTA_BYTES // 2**20):
            try:
                stub.Put(rpc_pb2.PutRequest(key=b"/not-the-pool", value=bytes(2**20)), timeout=10)
            except grpc.RpcError as error:
                assert "space exceeded" in error.details()
                return
    raise AssertionError("the quota was not met")


def await_room(pool: RunningPool) -> None:
    """Wait until all partitions serve, and see that there is room again."""
    # A member is defragmented every half a minute at most, and a compaction may come only after the first.
    pool.await_states(["SERVING"] * 3, seconds=240)
    until(lambda: not any(pool.status(index).store_full for index in range(3)), 240, "room in the store")


@pytest.mark.full
def test_a_restart_heals_a_pool_whose_store_met_its_quota(small: RunningPool) -> None:
    """G1: nobody could renew a lease any more; compaction, defragmentation and the alarm need no write."""
    with small.client() as client:
        made = client.create_key("kept", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    with contextlib.ExitStack() as stopped:
        for index in range(3):
            stopped.enter_context(small.paused(index, "partition"))  # they would make room meanwhile
        fill(small)
        small.down()
    small.up()
    await_room(small)
    with small.client() as client:
        assert client.get_key("keys/kept").name == made.name
        client.create_key("after", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    with store_channel(small) as channel:
        status = rpc_pb2_grpc.MaintenanceStub(channel).Status(rpc_pb2.StatusRequest(), timeout=10)
    assert not list(status.errors)
    assert status.db_size < QUOTA_BYTES


@pytest.mark.full
def test_a_pool_heals_without_a_restart_too(small: RunningPool) -> None:
    with contextlib.ExitStack() as stopped:
        for index in range(3):
            stopped.enter_context(small.paused(index, "partition"))
        fill(small)
    await_room(small)
    with small.client() as client:
        client.create_key("later", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)


def test_a_flood_of_one_client_stops_himself_and_not_the_pool(small: RunningPool) -> None:
    """G8: he is refused with a typed, definite error; leases, reads, cryptography, deletions go on."""
    with small.client() as client:
        for key_id in ("flooded", "other", "steady"):
            client.create_key(key_id, key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    stop, refused, others = threading.Event(), list[StoreFull](), list[MHSMError]()

    def flood() -> None:
        with small.client(timeout_seconds=30.0) as client:
            while not stop.is_set():
                try:
                    client.update_key("keys/flooded", tags={**FAT, "more": str(uuid.uuid4())})
                except StoreFull as error:
                    refused.append(error)
                    stop.wait(0.05)
                except MHSMError as error:
                    others.append(error)

    threads = [threading.Thread(target=flood) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        shown = ("status", "--data-dir", str(small.directory))
        until(lambda: _STORE_FULL in mhsm(*shown, check=False).stdout, 120, "the status says so")
        with small.client() as client:
            client.sign("keys/steady", "ES256", bytes(32))
            assert client.get_key("keys/other").name
            until(lambda: _is_refused(client), 120, "another client's growth is refused")
            client.delete_key("keys/other")
            client.purge_deleted_key("keys/other")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert (refused[0].code, refused[0].definite) == ("RESOURCE_EXHAUSTED", True)
    assert not others
    small.await_states(["SERVING"] * 3)


def _is_refused(client: Pool) -> bool:
    try:
        client.update_key("keys/steady", tags={"a": str(uuid.uuid4())})
    except StoreFull:
        return True
    return False
