"""G5: for the floor of two counts who says that it holds a lease, and only as long as it held that one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hsm_pool import errors, limits
from hsm_pool.core import membership
from hsm_pool.core.commands import AdmitPartition, DrainPartition
from hsm_pool.core.model import POOL, PoolRecord
from hsm_pool.core.state import State
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.store import chain
from hsm_pool.store.etcd_client import KeyValue, Revision
from hsm_pool.store.replica import Replica
from hsm_pool.store.sealing import PoolKeys
from mhsm.record.v1 import record_pb2

POOL_ID = "0" * 32
EVERYBODY = frozenset({0, 1, 2})


def key_of(index: int) -> str:
    return f"{chain.FRESH_PREFIX}{index}"


class Store:
    """Three partitions that see the same renewals in the same order."""

    def __init__(self) -> None:
        keys = PoolKeys.generate(POOL_ID, 1, SecretBytes(bytes(32)))
        genesis = chain.Head(0, chain.genesis_digest(POOL_ID), b"")
        pool = PoolRecord(header_digest=chain.value_digest(b"header"))
        first = chain.build_transaction(keys, 0, genesis, chain.TableDigest(), {POOL: pool}, [b"audit"])
        self.table = {**first.puts, chain.HEADER_KEY: b"header"}
        self.head = chain.read_head(keys, self.table[chain.HEAD_KEY])
        self.keys = keys
        self.revision = 1
        self.counters = [0, 0, 0]
        self.partitions = [self.started(index) for index in range(3)]

    def started(self, index: int) -> Replica:
        """Return a partition that has loaded the table as it stands."""
        replica = Replica(self.keys, index, 1)
        replica.load(self.revision, self.table, (self.head.sequence, self.head.digest))
        return replica

    def renewal(self, index: int, clock_seconds: float = 0.0) -> record_pb2.Renewal:
        """Return a renewal that a partition sends now, by a clock that is so far ahead."""
        self.counters[index] += 1
        renewal = self.partitions[index].new_renewal(self.counters[index])
        renewal.wall_time_ms = int((time.time() + clock_seconds) * 1000)
        return renewal

    def commit(self, renewal: record_pb2.Renewal, *, to: tuple[int, ...] = (0, 1, 2)) -> None:
        """Commit a renewal and deliver it."""
        renewal.mac = b""
        renewal.mac = self.keys.mac(1, b"mhsm/renewal/v1", renewal.SerializeToString(deterministic=True))
        value = renewal.SerializeToString(deterministic=True)
        self.revision += 1
        self.table[key_of(renewal.partition_index)] = value
        for index in to:
            change = KeyValue(key_of(renewal.partition_index), value)
            self.partitions[index].apply(Revision(self.revision, (change,)))
        sender = self.partitions[renewal.partition_index]
        sender.renewal_committed(renewal.counter, self.table[chain.HEAD_KEY])

    def renew_all(self, rounds: int = 2, clocks: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        for _ in range(rounds):
            for index, clock_seconds in enumerate(clocks):
                self.commit(self.renewal(index, clock_seconds))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The boot clock of all partitions."""
    now = [1000.0]
    monkeypatch.setattr("hsm_pool.store.replica.boot_time", lambda: now[0])
    return now


def drains(partition: Replica, serving: frozenset[int]) -> bool:
    """Return whether the core lets this partition be drained."""
    try:
        membership.apply(DrainPartition(partition.index, serving), partition.state)
    except errors.FloorOfTwo:
        return False
    return True


def test_all_three_serve_and_one_may_be_drained(clock: list[float]) -> None:
    """The positive control. A first renewal gives the lease, the second one tells of it."""
    store = Store()
    store.renew_all(rounds=1)
    assert all(partition.lease_remaining() for partition in store.partitions)
    clock[0] += limits.RENEWAL_SECONDS
    store.renew_all(rounds=1)
    assert [partition.serving() for partition in store.partitions] == [EVERYBODY] * 3
    assert drains(store.partitions[0], store.partitions[0].serving())


def test_a_partition_whose_clock_is_off_does_not_count_for_the_floor(clock: list[float]) -> None:
    """It sends renewals and takes no lease: with one of the others drained, one alone would serve."""
    store = Store()
    store.renew_all()
    for _ in range(7):
        clock[0] += limits.RENEWAL_SECONDS
        store.renew_all(rounds=1, clocks=(0.0, 0.0, 3.0))
    assert [bool(partition.lease_remaining()) for partition in store.partitions] == [True, True, False]
    for partition in store.partitions[:2]:
        assert partition.serving() == {0, 1}
        assert not drains(partition, partition.serving())
        # All the same it may hold a lease, for whoever waits until none is left.
        assert partition.lease_holders() == EVERYBODY
    admit = AdmitPartition(1, 2, 2, 0, store.partitions[0].serving())
    assert 2 in membership.apply(admit, State())[POOL].admissions, "what does not serve can be replaced"


def test_it_counts_no_longer_than_the_lease_it_told_of(clock: list[float]) -> None:
    """Its clock goes off: the last lease ends, and with it the count, not another three seconds later."""
    store = Store()
    store.renew_all()
    while store.partitions[2].lease_remaining():
        assert 2 in store.partitions[0].serving()
        clock[0] += limits.RENEWAL_SECONDS
        store.renew_all(rounds=1, clocks=(0.0, 0.0, 3.0))
    assert 2 not in store.partitions[0].serving()


def test_a_partition_whose_watch_is_stuck_does_not_count_for_the_floor(clock: list[float]) -> None:
    """What it sends is committed, but it does not see it come back."""
    store = Store()
    store.renew_all()
    for _ in range(7):
        clock[0] += limits.RENEWAL_SECONDS
        store.commit(store.renewal(0))
        store.commit(store.renewal(1))
        store.commit(store.renewal(2), to=(0, 1))
    assert not store.partitions[2].lease_remaining()
    assert not drains(store.partitions[0], store.partitions[0].serving())


def test_a_renewal_of_an_unknown_time_does_not_count_for_the_floor(clock: list[float]) -> None:
    """A partition that starts finds the last words of one that may have died long ago."""
    store = Store()
    store.renew_all()
    clock[0] += 60.0
    store.partitions[0] = store.started(0)
    store.counters[0] += 1
    for _ in range(2):
        store.commit(store.renewal(0), to=(0, 1))
        store.commit(store.renewal(1), to=(0, 1))
    assert store.partitions[0].lease_holders() == EVERYBODY
    assert store.partitions[0].serving() == {0, 1}
    assert not drains(store.partitions[0], store.partitions[0].serving())


def test_a_partition_that_surrenders_counts_no_more(clock: list[float]) -> None:
    store = Store()
    store.renew_all()
    store.partitions[2]._drained = True
    renewal = store.renewal(2)
    assert renewal.surrendered
    store.commit(renewal)
    assert store.partitions[0].serving() == {0, 1}
    assert store.partitions[0].lease_holders() == {0, 1}


def test_a_partition_that_is_quarantined_surrenders_and_counts_no_more(clock: list[float]) -> None:
    """It goes on following the store; it must not be counted for that, nor waited for."""
    store = Store()
    store.renew_all()
    store.partitions[2].stop()
    renewal = store.renewal(2)
    assert renewal.surrendered
    store.commit(renewal)
    assert store.partitions[0].serving() == {0, 1}
    assert store.partitions[0].lease_holders() == {0, 1}
    assert not drains(store.partitions[0], store.partitions[0].serving())


def test_a_renewal_of_an_older_firmware_counts_as_before(clock: list[float]) -> None:
    """It says nothing of its lease: a roll-out that was begun can be ended with the next version."""
    store = Store()
    store.renew_all()
    clock[0] += 2 * limits.LEASE_SECONDS
    for _ in range(2):
        for index in range(3):
            renewal = store.renewal(index)
            if index == 2:
                renewal.ClearField("lease_remaining_ms")
            store.commit(renewal)
    assert store.partitions[0].serving() == EVERYBODY


def test_a_partition_that_has_just_started_waits_for_the_word_of_the_others(clock: list[float]) -> None:
    """Else the first command to it would be refused, although three serve."""
    store = Store()
    store.renew_all()
    store.partitions[0] = started = store.started(0)
    store.commit(store.renewal(0))
    assert (started.serving(), started.lease_holders()) == ({0}, EVERYBODY)

    with ThreadPoolExecutor(1) as waiting:
        with started.condition:  # so it waits before it hears anything
            awaited = waiting.submit(started.await_serving)
            assert not awaited.done()
        until_it_waits(started)
        for index in (1, 2):
            store.commit(store.renewal(index))
        assert awaited.result(30) == EVERYBODY


def until_it_waits(replica: Replica) -> None:
    """Return when a thread waits for news of the replica; one that does not wait at all fails the test."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with replica.condition:
            if replica.condition._waiters:  # type: ignore[attr-defined]
                return
    raise AssertionError("nobody waits")
