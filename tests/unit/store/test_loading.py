"""G6, G7: a whole table, read at a start, counts only if it is exactly what the chain says.

Whoever tampers has no key, or those of an old epoch only, unless a test says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest

from hsm_pool import limits
from hsm_pool.core.model import (
    POOL,
    KeyRecord,
    PoolRecord,
    Record,
    RecordName,
    RequestRecord,
    key_name,
    name_of,
)
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.store import chain, codec, loading
from hsm_pool.store.loading import LoadedTable, audit_records, open_as_record, read_table
from hsm_pool.store.sealing import PoolKeys, RolledBack, Tampered, seal_record
from mhsm.record.v1 import record_pb2
from tests.unit.store.test_revoked_epochs import (
    POOL_ID,
    Story,
    copy_of,
    digest_of,
    forge,
    header_of,
    pool_of,
    resigned,
)

Changes = dict[RecordName, Record | None]


def key(number: int, version: str = "a") -> Changes:
    record = KeyRecord(f"key-{number}", (version * 32,))
    return {name_of(record): record}


@pytest.fixture
def told() -> Story:
    """Five transactions: the pool, three keys, and the first of these keys once more."""
    keys = PoolKeys.generate(POOL_ID, 1, SecretBytes(bytes(32)))
    story = Story(keys, keys)
    story.commit({POOL: pool_of(1)}, header_of(1))
    for changes in (key(1), key(2), key(3), key(1, "b")):
        story.commit(changes)
    return story


def known_of(story: Story, sequence: int) -> tuple[int, bytes]:
    """Return what a partition that has applied a sequence has noted of it."""
    return sequence, digest_of(story.made[sequence - 1])


def entry_of(story: Story, sequence: int) -> bytes:
    return story.made[sequence - 1].puts[chain.log_key(sequence)]


def place(story: Story, number: int) -> str:
    return chain.record_key(story.new.opaque_id(key_name(f"key-{number}")))


def tampered(story: Story, **changes: bytes | None) -> dict[str, bytes]:
    """Return the store with some slots of the log changed, as ``log_3=value``; None removes one."""
    numbers = {chain.log_key(int(name.removeprefix("log_"))): value for name, value in changes.items()}
    merged = {**story.store, **numbers}
    return {name: value for name, value in merged.items() if value is not None}


def refused(story: Story, values: Mapping[str, bytes], known: tuple[int, bytes] | None, match: str) -> None:
    with pytest.raises(Tampered, match=match):
        read_table(story.new, values, known)


# -- the honest table ---------------------------------------------------------------------


def test_an_honest_table_is_read_whole(told: Story) -> None:
    """G1, positive control: from every head that may be known, and with none."""
    for known in (None, *(known_of(told, sequence) for sequence in range(1, 6))):
        loaded = read_table(told.new, told.store, known)
        assert loaded.head == told.head
        assert loaded.header == header_of(1)
        assert loaded.table.root() == told.table.root()
        assert loaded.state.get(key_name("key-1")) == KeyRecord("key-1", ("b" * 32,))
        assert loaded.state.key_ids(9) == ["key-1", "key-2", "key-3"]
        names = [POOL, *(key_name(f"key-{number}") for number in (1, 2, 3))]
        assert loaded.names == {told.new.opaque_id(name): name for name in names}
        first = known[0] + 1 if known else 1
        ids = {sequence: told.made[sequence - 1].transaction_id for sequence in range(first, 6)}
        assert dict(loaded.recent) == ids
    with pytest.raises(Tampered, match="lost the head"):
        read_table(told.new, {}, None)


def test_records_are_taken_in_the_order_in_which_they_were_written(told: Story) -> None:
    """The oldest answers are forgotten first, after a start too; their places in the store are random."""
    written = [RequestRecord(bytes([number]) * 32, b"d" * 32, b"r", number) for number in range(12)]
    for record in written:
        told.commit({name_of(record): record})
    as_read = dict(sorted(told.store.items()))
    assert read_table(told.new, as_read, None).state.oldest_requests(20) == written


# -- the log ------------------------------------------------------------------------------


def test_slots_of_the_log_are_not_swapped_copied_or_emptied(told: Story) -> None:
    """G6, G7: at any place, though records, head and its entry are whole."""
    for first, second in pairwise(range(1, 6)):
        early, late = entry_of(told, first), entry_of(told, second)
        copied = {f"log_{second}": early}
        swapped = {f"log_{first}": late, f"log_{second}": early}
        refused(told, tampered(told, **copied), None, "does not follow")
        refused(told, tampered(told, **swapped), None, "does not follow")
        refused(told, tampered(told, **{f"log_{first}": None}), None, f"sequence {first} is missing")
    refused(told, tampered(told, log_3=b"\xff"), None, "log entry")


def test_an_entry_that_lost_its_race_does_not_take_the_winners_place() -> None:
    """G6, G7: it is honest and fits before and after; only the audit records in it are others."""
    keys = PoolKeys.generate(POOL_ID, 1, SecretBytes(bytes(32)))
    story = Story(keys, keys)
    story.commit({POOL: pool_of(1)}, header_of(1))
    lost = []
    for _ in range(3):
        rival = chain.build_transaction(keys, 1, story.head, story.table, {}, [b"another"])
        lost.append(rival.puts[chain.log_key(rival.sequence)])
        story.commit({})
    read_table(keys, story.store, None)
    # In the middle the entry after it says so, at the end only the head.
    refused(story, tampered(story, log_3=lost[1]), None, "names another history")
    refused(story, tampered(story, log_4=lost[2]), None, "not the digest of its log entry")
    refused(story, tampered(story, log_4=lost[2]), known_of(story, 3), "not the digest of its log entry")
    refused(story, tampered(story, log_4=lost[2]), known_of(story, 4), "does not contain the head")


def test_the_head_that_was_applied_is_in_the_store(told: Story) -> None:
    """G6: a branch, a slot with another entry, or none."""
    for sequence in range(1, 6):
        other = (sequence, b"x" * 32)
        refused(told, told.store, other, f"does not contain the head of sequence {sequence} ")
        for value in (None, entry_of(told, 1 + sequence % 5)):
            values = tampered(told, **{f"log_{sequence}": value})
            refused(told, values, known_of(told, sequence), "does not contain the head")


def test_a_store_that_ends_before_the_applied_head_was_rolled_back(told: Story) -> None:
    """G6: also if the log was left as it is; a read that lags looks the same once, so it has its own type."""
    for sequence in (1, 4):
        story = Story(told.old, told.new)
        for made in told.made[:sequence]:
            story.add(made)
        log = {name: value for name, value in told.store.items() if name.startswith(chain.LOG_PREFIX)}
        read_table(told.new, story.store, None)
        for values in (story.store, {**story.store, **log}):
            with pytest.raises(RolledBack, match=f"ends at sequence {sequence}, .* applied sequence 5"):
                read_table(told.new, values, known_of(told, 5))


def test_without_a_known_head_the_newest_entries_are_checked(
    told: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6: those whose ids are remembered; the first slot of them says itself whose it is."""
    monkeypatch.setattr(loading, "RECENT_TRANSACTIONS", 2)
    loaded = read_table(told.new, tampered(told, log_1=None, log_2=None, log_3=None), None)
    assert list(loaded.recent) == [4, 5]
    assert list(read_table(told.new, told.store, known_of(told, 1)).recent) == [4, 5]
    refused(told, tampered(told, log_4=entry_of(told, 3)), None, "slot of sequence 4 holds another entry")
    refused(told, tampered(told, log_5=entry_of(told, 4)), None, "does not follow")


def test_a_partition_that_slept_longer_than_the_log_is_long(
    told: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1, G6: what is left of the log is checked; a head whose slot is still there must be in it."""
    monkeypatch.setattr(limits, "LOG_RING_ENTRIES", 4)
    story = Story(told.old, told.new)
    story.commit({POOL: pool_of(1)}, header_of(1))
    for number in range(2, 10):
        story.commit(key(number))
    assert sum(name.startswith(chain.LOG_PREFIX) for name in story.store) == 4
    for sequence in (1, 4, 5):  # its slot holds a newer entry
        loaded = read_table(told.new, story.store, known_of(story, sequence))
        assert list(loaded.recent) == [7, 8, 9]
        swapped = tampered(story, log_7=entry_of(story, 3))
        refused(story, swapped, known_of(story, sequence), "slot of sequence 7 holds another entry")
    assert list(read_table(told.new, story.store, known_of(story, 6)).recent) == [7, 8, 9]
    refused(story, story.store, (6, b"x" * 32), "does not contain the head of sequence 6 ")
    assert [one for one, _ in audit_records(told.new, story.store, story.head, 0)] == [6, 7, 8, 9]


# -- records and header -------------------------------------------------------------------


def test_records_are_those_of_the_newest_sequence(told: Story) -> None:
    """G6: put back, removed, added again, swapped, under another key."""
    first, second, third = (place(told, number) for number in (1, 2, 3))
    old = told.made[1].puts[first]
    assert old != told.store[first]
    without = {name: value for name, value in told.store.items() if name != third}
    refused(told, {**told.store, first: old}, None, "the records in the store are not those of sequence 5")
    refused(told, without, None, "the records in the store are not those of sequence 5")
    told.commit({key_name("key-3"): None})
    gone = {name: value for name, value in told.store.items() if name != third}
    read_table(told.new, gone, None)
    refused(told, told.store, None, "the records in the store are not those of sequence 6")
    swapped = {**gone, first: told.store[second], second: told.store[first]}
    refused(told, swapped, None, "does not open under its own id")
    for name in ("record/", "record/zz", f"{first}00", first[:-2]):
        refused(told, {**gone, name: gone[first]}, None, "no opaque id")


def test_a_record_that_was_sealed_under_another_records_id_is_refused(told: Story) -> None:
    """G6: by a partition that is at fault: its seal fits, and what is in it belongs elsewhere."""
    record_type, body = codec.encode(KeyRecord("key-1", ("a" * 32,)))
    own, other = (told.new.opaque_id(key_name(name)) for name in ("key-1", "key-2"))
    sealed = {one: seal_record(told.new, 1, record_type, one, 2, b"p" * 32, body) for one in (own, other)}
    sequence, name, _ = open_as_record(told.new, own, sealed[own], range(1, 2))
    assert (sequence, name) == (2, key_name("key-1"))
    with pytest.raises(Tampered, match="under another record's id"):
        open_as_record(told.new, other, sealed[other], range(1, 2))
    for kind, content in ((record_type, b"\xff"), (record_pb2.RECORD_TYPE_POOL, body)):
        value = seal_record(told.new, 1, kind, own, 2, b"p" * 32, content)
        with pytest.raises(Tampered):
            open_as_record(told.new, own, value, range(1, 2))


def test_the_header_is_the_one_that_the_pool_record_names(told: Story) -> None:
    """G4, G6: an earlier one would bring earlier officers back."""
    told.commit({POOL: PoolRecord(header_digest=chain.value_digest(b"new"))}, b"new")
    assert read_table(told.new, told.store, None).header == b"new"
    without = {name: value for name, value in told.store.items() if name != chain.HEADER_KEY}
    for values in ({**told.store, chain.HEADER_KEY: header_of(1)}, without):
        refused(told, values, None, "pool header in the store is not the one the chain knows")


# -- epochs -------------------------------------------------------------------------------


def two_epochs() -> Story:
    """Two transactions in epoch 1, two in epoch 2."""
    keys = PoolKeys.generate(POOL_ID, 1, SecretBytes(bytes(32)))
    story = Story(keys, keys.with_epoch(2))
    story.commit({POOL: pool_of(1)}, header_of(1))
    story.commit(key(1))
    story.before = dict(story.store)
    story.commit({POOL: pool_of(2)}, header_of(2))
    story.commit(key(2))
    return story


def test_the_chain_never_goes_back_to_an_old_epoch() -> None:
    """G4, G6: who has the old keys meets a partition that knows of epoch 1 only, whatever it has noted."""
    story = two_epochs()
    slept = copy_of(story.new, 1)
    values = {**story.store, **forge(story.old, story)}
    for known in (None, *(known_of(story, sequence) for sequence in (2, 3, 4))):
        assert read_table(slept, story.store, known).head.epoch == 2
        with pytest.raises(Tampered, match="of epoch 1, which epoch 2 has replaced"):
            read_table(slept, values, known)


def test_head_entry_and_pool_record_are_of_one_epoch() -> None:
    """G4, G6: who has the keys of epoch 1 writes a pool record that says 2; or one of them is at fault."""
    story = two_epochs()
    branch = Story(story.old, copy_of(story.new, 1))
    for made in story.made[:2]:
        branch.add(made)
    read_table(copy_of(story.new, 1), branch.store, None)

    opaque_id = story.old.opaque_id(POOL)
    record_type, body = codec.encode(pool_of(2))
    value = seal_record(story.old, 1, record_type, opaque_id, 3, branch.head.digest, body)
    changed = [(opaque_id, chain.value_digest(value))]

    def change(entry: record_pb2.LogEntry) -> None:
        entry.changes[0].new_digest = changed[0][1]
        entry.table_digest = branch.table.after(changed)

    honest = forge(story.old, branch, {POOL: pool_of(1)})
    puts = {**honest, chain.record_key(opaque_id): value, chain.HEADER_KEY: header_of(2)}
    pool_differs = resigned(story.old, puts, 1, change)
    head_differs = resigned(story.new, forge(story.old, branch), 2, lambda _: None)
    entry_differs = resigned(story.new, puts, 2, change)
    for puts in (pool_differs, head_differs, entry_differs):
        with pytest.raises(Tampered, match="sequence 3 is not of the epoch that is in force after it"):
            read_table(copy_of(story.new, 1), {**branch.store, **puts}, None)


# -- audit records ------------------------------------------------------------------------


def audited(table: LoadedTable, keys: PoolKeys, values: Mapping[str, bytes], recorded: int) -> list[int]:
    found = audit_records(keys, values, table.head, recorded)
    assert all(records == [b"audit"] for _, records in found)
    return [sequence for sequence, _ in found]


def test_what_is_not_on_record_yet_is_read_from_the_log(told: Story) -> None:
    """G7, positive control: each once, in order."""
    table = read_table(told.new, told.store, None)
    for recorded in range(6):
        expected = list(range(recorded + 1, 6))
        assert audited(table, told.new, told.store, recorded) == expected


def test_audit_records_of_another_entry_are_refused(told: Story) -> None:
    """G7: also where the walk over the chain did not come by, before the head that is known."""
    table = read_table(told.new, told.store, known_of(told, 5))
    for sequence in range(1, 6):
        for value in (None, entry_of(told, 1 + sequence % 5)):
            values = tampered(told, **{f"log_{sequence}": value})
            with pytest.raises(Tampered, match=f"sequence {sequence} is not the one that the chain names"):
                audit_records(told.new, values, table.head, 0)
            assert audited(table, told.new, values, sequence) == list(range(sequence + 1, 6))
