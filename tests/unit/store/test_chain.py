"""G6: the chain of transactions, the digest of the table, and what a partition keeps on its disk."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsm_pool.core.freshness import PeerRenewal
from hsm_pool.core.model import KeyRecord, PoolRecord, Record, RecordName, key_name, name_of
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import LimitExceeded, NotFresh
from hsm_pool.store import chain
from hsm_pool.store.chain import Head, TableDigest
from hsm_pool.store.etcd_client import KeyValue, Revision
from hsm_pool.store.replica import Replica, boot_time
from hsm_pool.store.sealing import PoolKeys, Tampered
from hsm_pool.store.state_file import StateDirectory
from mhsm.record.v1 import record_pb2

POOL = "0" * 32
_ids = st.binary(min_size=32, max_size=32) | st.integers(0, 3).map(lambda n: bytes([n]) * 32)
_digests = st.just(b"") | st.binary(min_size=32, max_size=32)
_changes = st.dictionaries(_ids, _digests, max_size=12)


@pytest.fixture(scope="module")
def keys() -> PoolKeys:
    return PoolKeys.generate(POOL, 1, SecretBytes(bytes(32)))


# -- the digest of the table --------------------------------------------------------------


def table_of(*steps: dict[bytes, bytes]) -> TableDigest:
    table = TableDigest()
    for step in steps:
        table.update(step.items())
    return table


@given(before=_changes, changes=_changes)
@settings(deadline=None)
def test_the_digest_after_is_the_digest_when_it_is_done(
    before: dict[bytes, bytes], changes: dict[bytes, bytes]
) -> None:
    """G6: what a log entry promises is what the table has once the entry is applied."""
    table = table_of(before)
    root = table.root()
    promised = table.after(changes.items())
    assert table.root() == root, "looking ahead changes nothing"
    table.update(changes.items())
    assert table.root() == promised


@given(first=_changes, second=_changes, seed=st.integers())
@settings(deadline=None)
def test_the_digest_depends_on_the_table_only(
    first: dict[bytes, bytes], second: dict[bytes, bytes], seed: int
) -> None:
    """G6: neither order nor history enter, and different tables have different digests."""
    merged = {key: value for key, value in {**first, **second}.items() if value}
    items = list(merged.items())
    random.Random(seed).shuffle(items)
    table = table_of(first, second)
    assert table.root() == table_of(dict(items)).root()
    assert {key: table.get(key) for key in merged} == merged
    only_first = {key: value for key, value in first.items() if value}
    assert (table.root() == table_of(first).root()) == (merged == only_first)


@given(table=_changes.filter(lambda changes: any(changes.values())), data=st.data())
@settings(deadline=None)
def test_any_single_change_shows_in_the_digest(table: dict[bytes, bytes], data: st.DataObject) -> None:
    """G6: changed, removed, added, swapped."""
    full = {key: value for key, value in table.items() if value}
    root = table_of(full).root()
    key = data.draw(st.sampled_from(sorted(full)))
    assert table_of(full, {key: b""}).root() != root
    assert table_of(full, {key: bytes([full[key][0] ^ 1]) + full[key][1:]}).root() != root
    assert table_of(full, {os.urandom(32): full[key]}).root() != root
    other = data.draw(st.sampled_from(sorted(full)))
    if full[key] != full[other]:
        assert table_of({**full, key: full[other], other: full[key]}).root() != root


# -- heads, entries, links ----------------------------------------------------------------


def genesis(pool_id: str = POOL) -> Head:
    return Head(0, chain.genesis_digest(pool_id), b"")


def history(keys: PoolKeys, length: int = 4) -> tuple[list[chain.Transaction], Replica]:
    """Return transactions that follow each other, and a replica that has applied them."""
    replica = Replica(keys, 0, 1)
    made = []
    for number in range(length):
        changes: dict[RecordName, Record | None]
        record: Record = PoolRecord() if number == 0 else KeyRecord(f"key-{number}", ("a" * 32,))
        changes = {name_of(record): record}
        transaction = chain.build_transaction(keys, 0, replica.head, replica.table, changes, [b"audit"])
        replica.apply(revision_of(transaction, number + 2))
        made.append(transaction)
    return made, replica


def revision_of(transaction: chain.Transaction, revision: int) -> Revision:
    changes = [KeyValue(key, value) for key, value in transaction.puts.items()]
    changes += [KeyValue(key, None) for key in transaction.deletes]
    return Revision(revision, tuple(changes))


def entry_of(transaction: chain.Transaction) -> bytes:
    return transaction.puts[chain.log_key(transaction.sequence)]


def test_a_transaction_follows_its_head(keys: PoolKeys) -> None:
    """G6, positive control: head, entry and link of an honest transaction."""
    made, _ = history(keys)
    position = genesis()
    for transaction in made:
        entry = chain.read_log_entry(keys, entry_of(transaction))
        chain.check_link(position, entry)
        position = chain.read_head(keys, transaction.puts[chain.HEAD_KEY])
        assert position.sequence == entry.sequence == transaction.sequence
        assert position.digest == chain.value_digest(entry_of(transaction))


def test_an_entry_links_to_nothing_but_the_entry_before_it(keys: PoolKeys) -> None:
    """G6: left out, repeated, reordered, of another branch or of another pool."""
    made, _ = history(keys)
    branch, _ = history(keys)  # the same records: only random ids and nonces differ
    heads = [genesis(), *(chain.read_head(keys, one.puts[chain.HEAD_KEY]) for one in made)]
    entries = [chain.read_log_entry(keys, entry_of(one)) for one in made]
    for row, head in enumerate(heads):
        for column, entry in enumerate(entries):
            if row == column:
                chain.check_link(head, entry)
            else:
                with pytest.raises(Tampered, match="does not follow"):
                    chain.check_link(head, entry)
    with pytest.raises(Tampered, match="another history"):
        chain.check_link(heads[2], chain.read_log_entry(keys, entry_of(branch[2])))
    with pytest.raises(Tampered, match="another history"):
        chain.check_link(genesis("1" * 32), entries[0])


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_changed_head_or_entry_is_noticed(keys: PoolKeys, data: st.DataObject) -> None:
    """G6: every byte of a head and of an entry is under their MACs."""
    made, _ = history(keys, 2)
    head, entry = made[1].puts[chain.HEAD_KEY], entry_of(made[1])
    for value, read in ((head, chain.read_head), (entry, chain.read_log_entry)):
        position = data.draw(st.integers(0, len(value) - 1))
        change = data.draw(st.integers(1, 255))
        changed = value[:position] + bytes([value[position] ^ change]) + value[position + 1 :]
        with pytest.raises(Tampered):
            read(keys, changed)


@given(value=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_what_is_no_head_or_entry_is_noticed(keys: PoolKeys, value: bytes) -> None:
    """G6, G8: any octets are Tampered, never another error."""
    for read in (chain.read_head, chain.read_log_entry):
        with pytest.raises(Tampered):
            read(keys, value)


def head_of(keys: PoolKeys, label: bytes, body: bytes, digest: bytes) -> bytes:
    mac = keys.mac(1, label, body)
    return record_pb2.Head(sequence=5, digest=digest, epoch=1, mac=mac).SerializeToString()


def test_heads_and_entries_of_another_pool_are_noticed(keys: PoolKeys) -> None:
    """G6: the keys of another pool, and a MAC that was made for something else."""
    (made, *_), _ = history(PoolKeys.generate(POOL, 1, SecretBytes(bytes(32))), 1)
    with pytest.raises(Tampered, match="the head of the chain does not carry"):
        chain.read_head(keys, made.puts[chain.HEAD_KEY])
    with pytest.raises(Tampered, match="a log entry does not carry"):
        chain.read_log_entry(keys, entry_of(made))
    digest = b"d" * 32
    body = (1).to_bytes(4, "big") + (5).to_bytes(8, "big") + digest
    assert chain.read_head(keys, head_of(keys, b"mhsm/head/v1", body, digest)).sequence == 5
    for label in (b"mhsm/log/v1", b"mhsm/renewal/v1", b"mhsm/state-file/v1", b""):
        with pytest.raises(Tampered):
            chain.read_head(keys, head_of(keys, label, body, digest))


def test_a_replica_takes_each_transaction_once_and_in_order(keys: PoolKeys) -> None:
    """G6: a lost, doubled or reordered event, and records that do not belong to it."""
    made, done = history(keys)
    for wrong in ((1,), (0, 2), (0, 1, 1), (0, 1, 0)):
        replica = Replica(keys, 0, 1)
        with pytest.raises(Tampered):
            for revision, number in enumerate(wrong, start=2):
                replica.apply(revision_of(made[number], revision))
    more, fewer = dict(made[1].puts), dict(made[1].puts)
    record = next(key for key in more if key.startswith(chain.RECORD_PREFIX))
    more[chain.record_key(b"x" * 32)] = more[record]
    del fewer[record]
    other = {**made[1].puts, record: made[2].puts[next(k for k in made[2].puts if k.startswith("record/"))]}
    for puts in (more, fewer, other):
        replica = Replica(keys, 0, 1)
        replica.apply(revision_of(made[0], 2))
        root = replica.table.root()
        with pytest.raises(Tampered):
            replica.apply(Revision(3, tuple(KeyValue(key, value) for key, value in puts.items())))
        assert (replica.head.sequence, replica.table.root()) == (1, root), "nothing was applied"
    assert done.head.sequence == 4


def test_an_answer_leaves_only_if_what_it_rests_on_still_holds(keys: PoolKeys) -> None:
    """G2: made anew when the record changed while it was computed; nothing leaves without the lease."""
    _, replica = history(keys)
    name = name_of(KeyRecord("key-3", ()))
    revision = 10

    def change() -> None:
        nonlocal revision
        changes: dict[RecordName, Record | None] = {name: KeyRecord("key-3", (f"{revision:032x}",))}
        transaction = chain.build_transaction(keys, 0, replica.head, replica.table, changes, [b"audit"])
        replica.apply(revision_of(transaction, revision))
        revision += 1

    def answered(changing: int, lease_seconds: float = 60.0) -> tuple[object, int]:
        replica._fresh_until = boot_time() + 60
        made: list[object] = []

        def compute(value: object) -> object:
            made.append(value)
            if len(made) <= changing:
                change()
            replica._fresh_until = boot_time() + lease_seconds
            return value

        answer = replica.answer(lambda view: view.get(name), compute, boot_time() + 5, "it kept changing")
        return answer, len(made)

    for changing in (0, 1, 3):
        assert answered(changing) == (replica.state.get(name), changing + 1)
    with pytest.raises(NotFresh, match="it kept changing"):
        answered(1000)
    with pytest.raises(NotFresh):
        answered(0, lease_seconds=-1.0)


def test_a_limit_is_refused_when_all_that_was_counted_is_stable(keys: PoolKeys) -> None:
    """G2: else it tells of a key that another partition, which may hold a lease, still says is not there."""
    _, replica = history(keys)

    def full(_: object) -> None:
        raise LimitExceeded("the pool holds at most 3 keys")

    for renewed, expected in ((False, LimitExceeded), (True, NotFresh)):
        if renewed:  # partition 2 holds a lease, and has not applied what comes next
            replica.tracker.observe_renewal(2, PeerRenewal(1, 1, 0, False, boot_time() + 60))
        change: dict[RecordName, Record | None] = {key_name("new"): KeyRecord("new", (f"{renewed:032x}",))}
        transaction = chain.build_transaction(keys, 0, replica.head, replica.table, change, [b"audit"])
        replica.apply(revision_of(transaction, 10 + renewed))
        replica._fresh_until = boot_time() + 60
        with pytest.raises(expected):
            replica.consult(full, boot_time() + 0.2)
        reads, refusal = {key_name("other")}, LimitExceeded("")
        assert replica.awaited(reads, refusal) == replica.head.sequence
        assert (replica.awaited(reads, refusal) <= replica.tracker.stable_sequence) is not renewed


def test_a_replica_keeps_nothing_of_a_removed_record(keys: PoolKeys) -> None:
    """Memory does not grow with keys that were made and purged; one of the same name may come again."""
    made, replica = history(keys)
    record = KeyRecord("key-3", ("a" * 32,))
    for number in range(4):
        change: dict[RecordName, Record | None] = {name_of(record): record if number % 2 else None}
        transaction = chain.build_transaction(keys, 0, replica.head, replica.table, change, [b"audit"])
        replica.apply(revision_of(transaction, 10 + number))
        assert (replica.state.get(name_of(record)) is not None) is bool(number % 2)
        assert len(replica._names) == len(made) - 1 + number % 2


@pytest.mark.parametrize(
    "value",
    [b"", b"\xff" * 64, b"x", record_pb2.Renewal(mac=b"m" * 32).SerializeToString()],
    ids=["empty", "garbage", "short", "forged"],
)
def test_a_renewal_that_is_none_is_noticed(keys: PoolKeys, value: bytes) -> None:
    """G6: whoever writes into a partition's renewals is noticed, with a reason, not with a crash."""
    _, replica = history(keys, 1)
    with pytest.raises(Tampered, match="renewal"):
        replica.apply(Revision(3, (KeyValue(f"{chain.FRESH_PREFIX}1", value),)))


# -- the state directory ------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDirectory]:
    directory = StateDirectory(tmp_path / "state")
    yield directory
    directory.close()


def test_the_last_head_comes_back(tmp_path: Path, keys: PoolKeys) -> None:
    """G6: the newest head that was noted, over any number of restarts."""
    for sequence in range(1, 8):
        directory = StateDirectory(tmp_path / "state")
        if sequence == 1:
            assert directory.read_head(keys) is None
            assert not directory.has_head()
        else:
            assert directory.read_head(keys) == (sequence - 1, bytes([sequence - 1]) * 32)
        directory.write_head(keys, sequence, bytes([sequence]) * 32)
        assert directory.read_head(keys) == (sequence, bytes([sequence]) * 32)
        assert directory.has_head()
        directory.close()


@pytest.mark.parametrize("length", [1, 2, 30, 100, 511])
def test_a_torn_write_leaves_the_head_before(tmp_path: Path, keys: PoolKeys, length: int) -> None:
    """G1, G6: a crash in the middle of writing a head loses that head only."""
    directory = StateDirectory(tmp_path / "state")
    for sequence in (1, 2):
        directory.write_head(keys, sequence, bytes([sequence]) * 32)
    directory.close()
    path = tmp_path / "state" / "head"
    content = path.read_bytes()
    path.write_bytes(os.urandom(length) + content[length:])  # the slot whose turn it is holds sequence 1
    directory = StateDirectory(tmp_path / "state")
    assert directory.read_head(keys) == (2, b"\2" * 32)
    directory.write_head(keys, 3, b"\3" * 32)
    assert directory.read_head(keys) == (3, b"\3" * 32)
    directory.close()
    content = path.read_bytes()
    path.write_bytes(os.urandom(length) + content[length:])  # now it holds sequence 3
    directory = StateDirectory(tmp_path / "state")
    assert directory.read_head(keys) == (2, b"\2" * 32)
    directory.close()


def test_a_forged_state_file_is_noticed(tmp_path: Path, keys: PoolKeys) -> None:
    """G6: slots that do not carry the pool's MAC are not the same as no slots."""
    directory = StateDirectory(tmp_path / "state")
    directory.write_head(PoolKeys.generate(POOL, 1, SecretBytes(bytes(32))), 9, b"d" * 32)
    with pytest.raises(Tampered, match="state file"):
        directory.read_head(keys)
    directory.close()
    for content in (os.urandom(1024), struct.pack(">HI", 65535, 1) + bytes(1018), b"\1", bytes(600) + b"\1"):
        (tmp_path / "state" / "head").write_bytes(content)
        directory = StateDirectory(tmp_path / "state")
        with pytest.raises(Tampered):
            directory.read_head(keys)
        directory.close()


def test_a_state_directory_has_one_owner(tmp_path: Path) -> None:
    """G2: a newer incarnation is proof that the older process is dead; the lock makes it true."""
    first = StateDirectory(tmp_path / "state")
    with pytest.raises(RuntimeError, match="alive"):
        StateDirectory(tmp_path / "state")
    first.close()
    second = StateDirectory(tmp_path / "state")
    assert second.incarnation == first.incarnation + 1, "a refused start counts no incarnation"
    second.close()


def test_the_platform_seal_opens_with_its_own_platform_and_pool_only(
    state: StateDirectory, keys: PoolKeys, tmp_path: Path
) -> None:
    """G3, G6: round trip, another platform, another pool, a changed file; nothing plain on the disk."""
    platform = SecretBytes(os.urandom(32))
    assert state.read_seal(platform, POOL) is None
    state.write_seal(platform, keys)
    opened = state.read_seal(platform, POOL)
    assert opened
    assert opened.export().equals(keys.export())
    assert state.read_seal(SecretBytes(os.urandom(32)), POOL) is None
    assert state.read_seal(platform, "1" * 32) is None
    path = tmp_path / "state" / "platform-seal"
    content = path.read_bytes()
    message = record_pb2.PoolKeysSecret.FromString(keys.export().reveal())
    assert message.name_key not in content
    assert path.stat().st_mode & 0o777 == 0o600
    for changed in (b"", content[:11], content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(changed)
        assert state.read_seal(platform, POOL) is None
