"""A pool whose store is an etcd cluster that somebody else runs: here, the members of another pool."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mhsm.keys.v1 import keys_pb2
from tests.running_pool import RunningPool, TestOfficer
from tests.store_access import StoreAccess

pytestmark = pytest.mark.pool


def test_an_external_etcd_cluster_carries_a_pool(
    pool: RunningPool,
    make_pool: Callable[..., RunningPool],
    officers: list[TestOfficer],
    tmp_path: Path,
) -> None:
    """No member of its own is started, keys of two pools do not meet, and a restart finds everything."""
    connection = pool.connection
    configuration = {
        "endpoints": [entry.store_endpoint for entry in connection.partitions],
        **{name: connection.store[name] for name in ("ca_file", "certificate_file", "key_file")},
    }
    file = tmp_path / "store.json"
    file.write_text(json.dumps(configuration))
    other = make_pool(attended=False, options=("--external-store", str(file)))
    assert [other.process_id(index, "store_member") for index in range(3)] == [None] * 3
    other.activate(officers, 2)
    digest = hashlib.sha256(b"text").digest()
    with other.client() as client:
        key = client.create_key("external", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
        client.sign("keys/external", "ES256", digest)
    with pool.client() as client:
        assert "external" not in [key.name.split("/")[1] for key in client.list_keys()]
    with StoreAccess(connection) as own, StoreAccess(other.connection, index=0) as foreign:
        assert not set(own.records()) & set(foreign.records())
    other.down()
    other.up()
    other.await_states(["SERVING"] * 3)
    with other.client() as client:
        assert client.get_key("keys/external").name == key.name
    other.down()
