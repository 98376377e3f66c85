"""G2: clocks are compared by renewals that arrive, not by those of partitions that died long ago."""

from __future__ import annotations

import time

from hsm_pool.core.model import POOL, PoolRecord
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.store import chain
from hsm_pool.store.etcd_client import KeyValue, Revision
from hsm_pool.store.replica import Replica
from hsm_pool.store.sealing import PoolKeys

POOL_ID = "0" * 32
AGE_MS = 60_000


def _fresh_key(index: int) -> str:
    return f"{chain.FRESH_PREFIX}{index}"


def _renewal(keys: PoolKeys, index: int, counter: int, age_ms: int) -> bytes:
    """Return a renewal as another partition wrote it a while ago."""
    renewal = Replica(keys, index, 1).new_renewal(counter)
    renewal.wall_time_ms = time.time_ns() // 1_000_000 - age_ms
    renewal.mac = b""
    renewal.mac = keys.mac(1, b"mhsm/renewal/v1", renewal.SerializeToString(deterministic=True))
    return renewal.SerializeToString(deterministic=True)


def test_a_pool_that_lay_locked_for_long_becomes_fresh_again() -> None:
    """The first partition after an unlock finds only old renewals; its own clock is not wrong for that."""
    keys = PoolKeys.generate(POOL_ID, 1, SecretBytes(bytes(32)))
    genesis = chain.Head(0, chain.genesis_digest(POOL_ID), b"")
    pool = PoolRecord(header_digest=chain.value_digest(b"header"))
    first = chain.build_transaction(keys, 0, genesis, chain.TableDigest(), {POOL: pool}, [b"audit"])
    table = dict(first.puts)
    table[chain.HEADER_KEY] = b"header"
    for index in range(3):
        table[_fresh_key(index)] = _renewal(keys, index, 7, AGE_MS)
    replica = Replica(keys, 0, 2)
    head = chain.read_head(keys, table[chain.HEAD_KEY])
    replica.load(1, table, (head.sequence, head.digest))
    own = replica.new_renewal(1).SerializeToString(deterministic=True)
    replica.apply(Revision(2, (KeyValue(_fresh_key(0), own),)))
    replica.renewal_committed(1, table[chain.HEAD_KEY])
    assert replica.lease_remaining() > 0


def test_a_clock_that_runs_apart_from_two_others_is_not_fresh() -> None:
    """The positive control: two living partitions agree, and the own clock is a minute ahead of them."""
    keys = PoolKeys.generate(POOL_ID, 1, SecretBytes(bytes(32)))
    genesis = chain.Head(0, chain.genesis_digest(POOL_ID), b"")
    pool = PoolRecord(header_digest=chain.value_digest(b"header"))
    first = chain.build_transaction(keys, 0, genesis, chain.TableDigest(), {POOL: pool}, [b"audit"])
    table = dict(first.puts)
    table[chain.HEADER_KEY] = b"header"
    replica = Replica(keys, 0, 2)
    replica.load(1, table, None)
    for index in (1, 2):
        value = _renewal(keys, index, 7, AGE_MS)
        replica.apply(Revision(1 + index, (KeyValue(_fresh_key(index), value),)))
    own = replica.new_renewal(1).SerializeToString(deterministic=True)
    replica.apply(Revision(4, (KeyValue(_fresh_key(0), own),)))
    replica.renewal_committed(1, table[chain.HEAD_KEY])
    assert replica.lease_remaining() == 0
    assert replica.pool_time_ms <= time.time_ns() // 1_000_000 - AGE_MS, "nor does it move the pool's time"
