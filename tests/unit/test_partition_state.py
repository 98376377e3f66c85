"""State of a partition when its keys arrive while it still looks for them."""

from __future__ import annotations

from pathlib import Path

from hsm_pool import settings
from hsm_pool.client.errors import PoolUnreachable
from hsm_pool.core.model import POOL, PoolRecord
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import DISK_IS_EMPTY, EvidenceRefused
from hsm_pool.firmware.image import SECURITY_VERSION
from hsm_pool.firmware.slots import Slots
from hsm_pool.partition.partition import Partition, PartitionState
from hsm_pool.provisioning.layout import NewPool, provision
from hsm_pool.settings import PartitionSettings
from hsm_pool.store import chain
from hsm_pool.store.chain import Head, TableDigest
from hsm_pool.store.sealing import PoolKeys
from mhsm.peer.v1 import peer_pb2
from mhsm.record.v1 import record_pb2
from tests.unit.firmware.test_repository import Publisher

HEADER = b"header"


def no_peer_cosigns(index: int, request: peer_pb2.CosignRequest) -> peer_pb2.CosignResponse:
    """Nobody else runs here."""
    raise PoolUnreachable("the peers do not run")


def test_keys_that_arrive_while_peers_are_asked_are_not_forgotten(tmp_path: Path) -> None:
    """G1: activation (or a quorum) brings the keys in one thread while another finds no peer with them."""
    directory = tmp_path / "pool"
    new = NewPool(attended=True, recoverable_days=90, etcd_binary="etcd")
    pool_id = provision(directory, new)
    chosen = settings.load(PartitionSettings, directory / "nodes/0/partition.json")
    keys = PoolKeys.generate(pool_id, 1, SecretBytes(bytes(32)))

    def peers_know_nothing_but_a_quorum_unlocks(*_: object) -> None:
        partition.adopt(keys, "quorum")

    partition = Partition(chosen, peers_know_nothing_but_a_quorum_unlocks, no_peer_cosigns)
    try:
        partition.header = record_pb2.PoolHeader(pool_id=pool_id)
        # It has looked for longer than it takes to call the pool locked.
        partition._healing_since = 0.0
        partition._step()
        assert partition.state is PartitionState.SERVING
        assert partition.holding_keys() is not None
        # The same, one moment later: the header is seen only after the keys were adopted.
        partition._step()
        assert partition.state is PartitionState.SERVING
    finally:
        partition.close()


def test_firmware_below_the_floor_never_holds_a_lease(tmp_path: Path) -> None:
    """G5: what was just loaded says that this partition must not serve; before its first renewal."""
    (tmp_path / "publisher").mkdir()
    repository = Publisher(tmp_path / "publisher").directory
    directory = tmp_path / "pool"
    new = NewPool(attended=True, recoverable_days=90, etcd_binary="etcd", firmware_repository=repository)
    pool_id = provision(directory, new)
    chosen = settings.load(PartitionSettings, directory / "nodes/0/partition.json")
    keys = PoolKeys.generate(pool_id, 1, SecretBytes(bytes(32)))
    pool = PoolRecord(header_digest=chain.value_digest(HEADER), security_version_floor=SECURITY_VERSION + 1)
    genesis = Head(0, chain.genesis_digest(pool_id), b"")
    made = chain.build_transaction(keys, 1, genesis, TableDigest(), {POOL: pool}, [b"audit"])
    table = {**made.puts, chain.HEADER_KEY: HEADER}
    partition = Partition(chosen, lambda *_: None, no_peer_cosigns)
    try:
        partition.adopt(keys, "seal")
        serving = partition.holding_keys()
        assert serving is not None
        serving.replica.on_header = lambda _: None
        serving.replica.load(1, table, None)
        assert partition.state is PartitionState.QUARANTINED
        assert "below the pool's security version" in partition.reason
        assert Slots(directory / "nodes/0/firmware").floor() == 0, "what it cannot obey it does not note"
    finally:
        partition.close()


def test_a_partition_that_is_refused_does_not_call_for_a_quorum(tmp_path: Path) -> None:
    """While others hold the keys the pool is not locked: an empty disk calls for a replacement."""
    directory = tmp_path / "pool"
    pool_id = provision(directory, NewPool(attended=True, recoverable_days=90, etcd_binary="etcd"))
    chosen = settings.load(PartitionSettings, directory / "nodes/2/partition.json")
    keys = PoolKeys.generate(pool_id, 1, SecretBytes(bytes(32)))

    def refused(*_: object) -> None:
        raise EvidenceRefused("the evidence is of an earlier start of the partition than was seen")

    def nobody_has_them(*_: object) -> None: ...

    partition = Partition(chosen, refused, no_peer_cosigns)
    try:
        partition.header = record_pb2.PoolHeader(pool_id=pool_id)
        partition._healing_since = 0.0
        partition._step()
        assert (partition.state, partition.reason) == (PartitionState.LOCKED, DISK_IS_EMPTY)
        assert "quorum" not in partition.refusal().message
        partition.state_directory.write_head(keys, 7, bytes(32))
        partition._step()
        assert "evidence" in partition.reason
        assert partition.reason != DISK_IS_EMPTY
        assert "quorum" not in partition.refusal().message
        partition._heal_from_peers = nobody_has_them
        partition._step()
        assert "a quorum must unlock it" in partition.reason
        assert "a quorum of officers" in partition.refusal().message
    finally:
        partition.close()
