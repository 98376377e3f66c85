"""G4, G6: who holds the keys of old epochs only can add nothing to the chain, and rewrite nothing in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from hsm_pool.core import membership
from hsm_pool.core.commands import AdmitPartition
from hsm_pool.core.freshness import PeerRenewal
from hsm_pool.core.model import POOL, Admission, KeyRecord, PoolRecord, Record, RecordName, key_name
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.store import chain
from hsm_pool.store.chain import Head, TableDigest, Transaction
from hsm_pool.store.etcd_client import KeyValue, Revision
from hsm_pool.store.replica import Replica
from hsm_pool.store.sealing import MissingEpoch, PoolKeys, RolledBack, Tampered, seal_record
from mhsm.record.v1 import record_pb2

POOL_ID = "0" * 32
MALLORY: dict[RecordName, Record | None] = {key_name("mallory"): KeyRecord("mallory", ("a" * 32,))}
Puts = dict[str, bytes]


def header_of(epoch: int) -> bytes:
    sealed = record_pb2.SealedEpoch(epoch=epoch)
    return record_pb2.PoolHeader(pool_id=POOL_ID, sealed_epoch=sealed).SerializeToString()


def pool_of(epoch: int) -> PoolRecord:
    return PoolRecord(epoch=epoch, header_digest=chain.value_digest(header_of(epoch)))


@dataclass
class Story:
    """A store in epoch 2, the keys of then and of now, and what it was before."""

    old: PoolKeys
    new: PoolKeys
    table: TableDigest = field(default_factory=TableDigest)
    head: Head = field(default_factory=lambda: Head(0, chain.genesis_digest(POOL_ID), b""))
    store: Puts = field(default_factory=dict)
    before: Puts = field(default_factory=dict)
    made: list[Transaction] = field(default_factory=list)

    def commit(self, changes: dict[RecordName, Record | None], header: bytes = b"") -> None:
        self.add(chain.build_transaction(self.new, 0, self.head, self.table, changes, [b"audit"], header))

    def add(self, made: Transaction) -> None:
        self.made.append(made)
        self.store.update(made.puts)
        records = [(k, v) for k, v in made.puts.items() if k.startswith(chain.RECORD_PREFIX)]
        self.table.update((bytes.fromhex(k.split("/")[1]), chain.value_digest(v)) for k, v in records)
        self.head = chain.read_head(self.new, made.puts[chain.HEAD_KEY])
        self.new.epoch = self.head.epoch

    def replica(self, keys: PoolKeys | None = None) -> Replica:
        """Return a replica that has applied all of it, in order."""
        replica = Replica(keys or copy_of(self.new, 1), 0, 1)
        for revision, made in enumerate(self.made, start=2):
            replica.apply(revision_of(made.puts, revision))
        return replica


def copy_of(keys: PoolKeys, epoch: int) -> PoolKeys:
    copy = PoolKeys(POOL_ID, keys.export())
    copy.epoch = epoch
    return copy


def revision_of(puts: Puts, revision: int = 100) -> Revision:
    return Revision(revision, tuple(KeyValue(key, value) for key, value in puts.items()))


@pytest.fixture
def story() -> Story:
    """Two transactions in epoch 1, the third puts epoch 2 in force, the fourth is in it."""
    old = PoolKeys.generate(POOL_ID, 1, SecretBytes(bytes(32)))
    told = Story(old, old.with_epoch(2))
    told.commit({POOL: pool_of(1)}, header_of(1))
    told.commit({key_name("before"): KeyRecord("before", ("b" * 32,))})
    told.before = dict(told.store)
    told.commit({POOL: pool_of(2)}, header_of(2))
    told.commit({key_name("after"): KeyRecord("after", ("c" * 32,))})
    return told


def forge(
    keys: PoolKeys,
    story: Story,
    changes: dict[RecordName, Record | None] | None = None,
    audit: Sequence[bytes] = (b"audit",),
    header: bytes = b"",
) -> Puts:
    """Return what the holder of these keys writes after the newest transaction."""
    made = chain.build_transaction(keys, 0, story.head, story.table, changes or MALLORY, audit, header)
    return dict(made.puts)


def resigned(keys: PoolKeys, puts: Puts, epoch: int, change: Callable[[record_pb2.LogEntry], None]) -> Puts:
    """Return a transaction with its log entry changed, and the MACs of an epoch made anew."""
    (slot,) = [key for key in puts if key.startswith(chain.LOG_PREFIX)]
    entry = record_pb2.LogEntry.FromString(puts[slot])
    change(entry)
    entry.mac = b""
    entry.mac = keys.mac(entry.epoch, b"mhsm/log/v1", entry.SerializeToString(deterministic=True))
    value = entry.SerializeToString(deterministic=True)
    digest = chain.value_digest(value)
    content = epoch.to_bytes(4, "big") + entry.sequence.to_bytes(8, "big") + digest
    mac = keys.mac(epoch, b"mhsm/head/v1", content)
    head = record_pb2.Head(sequence=entry.sequence, digest=digest, epoch=epoch, mac=mac)
    return {**puts, slot: value, chain.HEAD_KEY: head.SerializeToString(deterministic=True)}


def refuse(story: Story, puts: Puts, match: str) -> None:
    """Check that neither a replica that follows nor one that starts takes what was written."""
    replica = story.replica()
    root = replica.table.root()
    with pytest.raises(Tampered, match=match):
        replica.apply(revision_of(puts))
    assert (replica.head.sequence, replica.table.root()) == (story.head.sequence, root), "nothing was applied"
    known = (replica.head.sequence, replica.head.digest)
    for one in (replica, Replica(copy_of(story.new, 2), 0, 1)):
        with pytest.raises(Tampered):
            one.load(101, {**story.store, **puts}, known)


def test_an_honest_chain_crosses_epochs(story: Story) -> None:
    """G1, positive control: applied one by one or loaded, from any head; old records stay readable."""
    assert story.replica().head.epoch == 2
    for known in (None, *((one.sequence, digest_of(one)) for one in story.made)):
        for in_force in (1, 2):
            replica = Replica(copy_of(story.new, in_force), 0, 1)
            replica.load(7, story.store, known)
            assert replica.keys.epoch == replica.head.epoch == replica.state.pool().epoch == 2
            assert replica.state.get(key_name("before")) is not None
    honest = forge(copy_of(story.new, 2), story)
    replica = story.replica()
    replica.apply(revision_of(honest))
    assert replica.state.get(key_name("mallory")) is not None, "the same transaction under the epoch in force"


def digest_of(made: Transaction) -> bytes:
    return chain.value_digest(made.puts[chain.log_key(made.sequence)])


def test_the_transaction_that_puts_an_epoch_in_force_is_its_first(story: Story) -> None:
    """G4: head, entry, records and audit of the third transaction are under epoch 2."""
    third = story.made[2]
    assert chain.read_head(story.new, third.puts[chain.HEAD_KEY]).epoch == 2
    entry = record_pb2.LogEntry.FromString(third.puts[chain.log_key(3)])
    values = [entry.sealed_audit, *(v for k, v in third.puts.items() if k.startswith(chain.RECORD_PREFIX))]
    assert {record_pb2.Envelope.FromString(value).epoch for value in values} == {2}
    assert entry.epoch == 2


def test_a_transaction_under_an_old_epoch_is_refused(story: Story) -> None:
    """G4, G6: an old quorum with the store, with and without a pool record that says epoch 1 again."""
    refuse(story, forge(story.old, story), "epoch 2 has replaced")
    back: dict[RecordName, Record | None] = {**MALLORY, POOL: pool_of(1)}
    refuse(story, forge(story.old, story, back, header=header_of(1)), "epoch 2 has replaced")
    # Who holds the new keys, too, cannot go back either.
    refuse(story, forge(copy_of(story.new, 2), story, back, header=header_of(1)), "epoch 2 has replaced")


def test_an_old_quorum_cannot_put_an_epoch_in_force(story: Story) -> None:
    """G4: an epoch 3 of its own has no key here; nor does it end partitions that follow."""
    own = story.old.with_epoch(3)
    puts = forge(own, story, {**MALLORY, POOL: pool_of(3)}, header=header_of(3))
    replica = story.replica()
    with pytest.raises(Tampered, match="the head of the chain does not carry this pool's MAC"):
        replica.apply(revision_of(puts))
    # Such a head looks like an epoch that was slept through: who meets it gets its key from a peer or none.
    with pytest.raises(MissingEpoch):
        replica.load(101, {**story.store, **puts}, None)
    with pytest.raises(Tampered):
        replica.load(101, {**story.store, **puts, chain.HEADER_KEY: header_of(2)}, None)
    assert replica.state.get(key_name("mallory")) is None


@pytest.mark.parametrize(("head_epoch", "entry_epoch"), [(1, 2), (2, 1), (1, 1)])
def test_a_mac_under_an_old_epoch_is_refused(story: Story, head_epoch: int, entry_epoch: int) -> None:
    """G4, G6: each of head and entry by itself, even of a transaction that is honest otherwise."""

    def change(entry: record_pb2.LogEntry) -> None:
        entry.epoch = entry_epoch

    keys = copy_of(story.new, 2)
    refuse(story, resigned(keys, forge(keys, story), head_epoch, change), "epoch")


def test_a_record_sealed_under_an_old_epoch_is_refused(story: Story) -> None:
    """G4, G6: in an entry that is of the epoch in force otherwise."""
    puts = forge(copy_of(story.new, 2), story)
    (name,) = [key for key in puts if key.startswith(chain.RECORD_PREFIX)]
    opaque_id = bytes.fromhex(name.split("/")[1])
    kind = record_pb2.RECORD_TYPE_KEY
    value = seal_record(story.new, 1, kind, opaque_id, story.head.sequence + 1, story.head.digest, b"")
    table = story.table.after([(opaque_id, chain.value_digest(value))])

    def change(entry: record_pb2.LogEntry) -> None:
        entry.changes[0].new_digest = chain.value_digest(value)
        entry.table_digest = table

    puts = resigned(story.new, {**puts, name: value}, 2, change)
    with pytest.raises(Tampered, match="sealed under epoch 1, which is not in force there"):
        story.replica().apply(revision_of(puts))


@pytest.mark.parametrize("kind", ["missing", "old epoch", "of another sequence"])
def test_a_transaction_without_its_audit_records_is_refused(story: Story, kind: str) -> None:
    """G7: every transaction carries them, under its own epoch and for its own sequence."""
    keys = copy_of(story.new, 2)
    sequence, audit = story.head.sequence + 1, keys.opaque_id(("audit",))
    value = {
        "missing": b"",
        "old epoch": seal_record(
            keys, 1, record_pb2.RECORD_TYPE_AUDIT, audit, sequence, story.head.digest, b""
        ),
        "of another sequence": record_pb2.LogEntry.FromString(
            story.made[-1].puts[chain.log_key(4)]
        ).sealed_audit,
    }[kind]

    def change(entry: record_pb2.LogEntry) -> None:
        entry.sealed_audit = value

    puts = resigned(keys, forge(keys, story), 2, change)
    refuse(story, puts, "audit records|sealed under epoch 1")


def test_a_branch_from_before_the_activation_is_refused(story: Story) -> None:
    """G4, G6: also by a partition that never noted a head, if its keys say which epoch is in force."""
    table, head = TableDigest(), Head(0, chain.genesis_digest(POOL_ID), b"")
    old_records = {k: v for k, v in story.before.items() if k.startswith(chain.RECORD_PREFIX)}
    table.update((bytes.fromhex(k.split("/")[1]), chain.value_digest(v)) for k, v in old_records.items())
    head = chain.read_head(story.old, story.before[chain.HEAD_KEY])
    forged = chain.build_transaction(story.old, 0, head, table, MALLORY, [b"audit"])
    branch = {**story.before, **forged.puts}
    Replica(copy_of(story.old, 1), 0, 1).load(7, branch, None)  # the control: it knows of epoch 1 only
    with pytest.raises(RolledBack, match="epoch 2 is in force"):
        Replica(copy_of(story.new, 2), 0, 1).load(7, branch, None)
    known = (story.head.sequence, story.head.digest)
    with pytest.raises(Tampered):
        Replica(copy_of(story.new, 1), 0, 1).load(7, branch, known)


def test_a_branch_cannot_take_records_of_the_new_epoch(story: Story) -> None:
    """G4: a partition that holds the key of epoch 2 and slept before its activation mixes no epochs."""
    table, before = TableDigest(), story.before
    record = next(key for key in story.made[3].puts if key.startswith(chain.RECORD_PREFIX))
    mixed = {**before, record: story.store[record]}
    records = {k: v for k, v in mixed.items() if k.startswith(chain.RECORD_PREFIX)}
    table.update((bytes.fromhex(k.split("/")[1]), chain.value_digest(v)) for k, v in records.items())
    head = chain.read_head(story.old, before[chain.HEAD_KEY])
    forged = chain.build_transaction(story.old, 0, head, table, MALLORY, [b"audit"])
    with pytest.raises(Tampered, match="sealed under epoch 2, which is not in force there"):
        Replica(copy_of(story.new, 1), 0, 1).load(7, {**mixed, **forged.puts}, None)


def test_history_of_an_old_epoch_cannot_be_rewritten(story: Story) -> None:
    """G6, G7: a partition that puts it on record takes the entries that the newest one leads to."""

    class Log:
        sequence, refuses = 0, False
        records: dict[int, list[bytes]] = {}  # noqa: RUF012 - one log only

        def append_mutations(self, sequence: int, records: Sequence[bytes]) -> None:
            self.records[sequence] = list(records)

    replica = Replica(copy_of(story.new, 2), 0, 1)
    replica.mutation_log = Log()
    known = (story.head.sequence, story.head.digest)
    replica.load(7, story.store, known)
    assert sorted(Log.records) == [1, 2, 3, 4]

    def change(entry: record_pb2.LogEntry) -> None:
        entry.transaction_id = os.urandom(16)

    slot = chain.log_key(2)
    forged = resigned(story.old, {slot: story.store[slot]}, 1, change)[slot]
    with pytest.raises(Tampered, match="not the one that the chain names"):
        replica.load(8, {**story.store, slot: forged}, known)


def test_a_renewal_under_an_old_epoch_counts_for_nothing(story: Story) -> None:
    """G2, G4: it gives no lease, takes none, and moves no clock; its sender goes by the same rule."""
    replica = story.replica()
    told = Replica(copy_of(story.old, 1), 1, 9)
    told.mutation_log.refuses = True  # type: ignore[misc]
    forged = told.new_renewal(1 << 40)
    told.mutation_log.refuses = False  # type: ignore[misc]
    assert forged.surrendered
    honest = Replica(copy_of(story.new, 2), 1, 1).new_renewal(1)
    fresh = f"{chain.FRESH_PREFIX}1"
    replica.apply(revision_of({fresh: honest.SerializeToString()}))
    assert replica.lease_holders() == {1}
    replica.apply(revision_of({fresh: forged.SerializeToString()}, 101))
    assert replica.lease_holders() == {1}
    assert replica.peer_incarnation(1) == 1
    # Found at a start, it may have counted where it was written: its sender is waited for.
    started = Replica(copy_of(story.new, 2), 0, 2)
    store = {**story.store, fresh: forged.SerializeToString()}
    started.load(101, store, (story.head.sequence, story.head.digest))
    assert started.lease_holders() == {1}
    assert started.tracker.stable_sequence < story.head.sequence
    started.apply(revision_of({fresh: honest.SerializeToString()}, 102))
    assert started.peer_incarnation(1) == 1


def test_a_partition_takes_no_lease_from_a_renewal_that_an_activation_overtook(story: Story) -> None:
    """G2: the others leave it, so its sender must."""
    replica = Replica(copy_of(story.new, 1), 0, 1)
    for revision, made in enumerate(story.made[:2], start=2):
        replica.apply(revision_of(made.puts, revision))
    fresh, overtaken = f"{chain.FRESH_PREFIX}0", replica.new_renewal(1)
    replica.apply(revision_of(story.made[2].puts, 4))
    replica.apply(revision_of({fresh: overtaken.SerializeToString()}, 5))
    replica.renewal_committed(1, story.made[2].puts[chain.HEAD_KEY])
    assert replica.lease_remaining() == 0
    replica.apply(revision_of({fresh: replica.new_renewal(2).SerializeToString()}, 6))
    replica.renewal_committed(2, story.made[2].puts[chain.HEAD_KEY])
    assert replica.lease_remaining() > 0


def test_who_a_dead_partition_was_is_known_after_a_new_epoch(story: Story) -> None:
    """G5: one that was replaced, served and died before the epoch of now can be replaced once more.

    Its last renewal says so; but it is measured against no later one, which would end the waiting
    for a lease, and says nothing that restarts alone cannot have come to (G2, G4).
    """
    first = membership.INCARNATIONS_PER_ADMISSION
    replaced = replace(pool_of(2), admissions={2: Admission(1, first, 0, ready=True, made_up_ms=1)})
    story.commit({POOL: replaced})

    def loaded(incarnation: int) -> Replica:
        renewal = record_pb2.Renewal(partition_index=2, incarnation=incarnation, counter=5, epoch=1)
        content = renewal.SerializeToString(deterministic=True)
        renewal.mac = story.new.mac(1, b"mhsm/renewal/v1", content)
        story.store[f"{chain.FRESH_PREFIX}2"] = renewal.SerializeToString(deterministic=True)
        replica = Replica(copy_of(story.new, 2), 0, 1)
        replica.load(9, story.store, None)
        return replica

    replica = loaded(first + 3)
    assert (replica.peer_incarnation(2), replica.half_replaced()) == (first + 3, frozenset())
    assert replica.boot_count_min(2) == first + 3
    again = AdmitPartition(10**12, 2, replica.peer_incarnation(2) + 1, 0, frozenset({0, 1}))
    changed = membership.apply(again, replica.state)[POOL]
    assert isinstance(changed, PoolRecord)
    assert changed.admissions[2].number == 2
    assert replica.tracker.observe_renewal(2, PeerRenewal(first + 1, 1, 0, False, 0.0)), "a lease counts"
    assert loaded(2 * first).half_replaced() == {2}, "no partition comes to that by restarts"
