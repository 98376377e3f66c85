"""The pure core of restores and of epochs: every order of commands, against simple models (G1, G2, G4)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool import limits
from hsm_pool.core import epochs, lifecycle
from hsm_pool.core.commands import (
    ActivateEpoch,
    AdvanceRestore,
    CancelRestore,
    Command,
    CommitRestore,
    CreateKeyVersion,
    DeleteKey,
    DrainPartition,
    HoldEpoch,
    ProposeEpoch,
    ReplaceSecurityDomain,
    RestoreKey,
    ResumePartition,
    StageRecords,
    StartRestore,
    UpdateKeyVersion,
)
from hsm_pool.core.model import (
    RESTORE,
    Curve,
    KeyRecord,
    KeyType,
    KeyVersionRecord,
    PoolRecord,
    RestorePhase,
    RestoreRecord,
    SealedMaterial,
    key_name,
    stored_bytes,
)
from hsm_pool.core.state import Overlay, State
from hsm_pool.errors import CeremonyState, KeyExists, LimitExceeded, MHSMError, RestoreState

SEALED = SealedMaterial(1, b"n" * 12, b"c")


def do(state: State, command: Command) -> None:
    """Decide and apply a command, within the bounds of a transaction."""
    outcome = lifecycle.apply(command, Overlay(state))
    assert len(outcome.changes) <= limits.OPERATIONS_PER_TRANSACTION_MAX - 2
    state.apply(outcome.changes)


def create(key_id: str, version_id: str = "0" * 32) -> CreateKeyVersion:
    return CreateKeyVersion(1, key_id, version_id, KeyType.OCT, Curve.NONE, 256, b"", SEALED, ())


def key(key_id: str, versions: int = 1) -> tuple[KeyRecord, tuple[KeyVersionRecord, ...]]:
    """Return a key with versions, as a backup holds it."""
    ids = tuple(f"{number:032x}" for number in range(versions))
    records = tuple(
        KeyVersionRecord(
            key_id, version, KeyType.OCT, Curve.NONE, 256, b"", (), True, 0, 0, 1, 1, False, {}, SEALED
        )
        for version in ids
    )
    return KeyRecord(key_id, ids), records


def phase(state: State) -> RestorePhase:
    record = state.get(RESTORE)
    assert isinstance(record, RestoreRecord)
    return record.phase


def finish(state: State) -> int:
    """Advance until the restore is over; return how many batches it took."""
    count = 0
    while not phase(state).over:
        do(state, AdvanceRestore("r"))
        count += 1
        assert count < 1000
    return count


@given(
    before=st.dictionaries(st.sampled_from([f"k{i}" for i in range(30)]), st.integers(1, 60), max_size=8),
    backup=st.dictionaries(st.sampled_from([f"k{i}" for i in range(30)]), st.integers(1, 60), max_size=8),
    commit=st.booleans(),
)
def test_a_restore_ends_with_one_set_of_keys_or_the_other(
    before: dict[str, int], backup: dict[str, int], commit: bool
) -> None:
    """G1: whatever was there and whatever comes, also with many versions; in bounded transactions."""
    state = State()
    for key_id, versions in before.items():
        for number in range(versions):
            do(state, create(key_id, f"{number:032x}"))
    names = set(state.names())
    do(state, StartRestore("r", b"manifest", 1))
    records = [record for key_id, versions in backup.items() for record in _records(key_id, versions)]
    for start in range(0, max(len(records), 1), 50):
        batch = tuple(records[start : start + 50])
        do(state, StageRecords("r", 0, batch, last=start + 50 >= len(records)))
        do(state, StageRecords("r", 0, batch, last=start + 50 >= len(records)))  # a repeat does no harm
    do(state, CommitRestore("r") if commit else CancelRestore("r"))
    finish(state)
    wanted = backup if commit else before
    assert set(state.key_ids(1000)) == set(wanted)
    for key_id, versions in wanted.items():
        record = state.get(key_name(key_id))
        assert isinstance(record, KeyRecord)
        assert len(record.version_ids) == versions
        assert all(lifecycle.version_of(state, record, version) for version in record.version_ids)
    assert state.staged_count() == 0
    expected = sum(1 + versions for versions in wanted.values())
    assert len([name for name in state.names() if name[0] in {"key", "version"}]) == expected
    if not commit:
        assert set(state.names()) - {RESTORE} == names


def _records(key_id: str, versions: int) -> list[KeyRecord | KeyVersionRecord]:
    record, made = key(key_id, versions)
    return [record, *made]


@given(
    st.lists(
        st.sampled_from(["start", "stage", "last", "commit", "cancel", "advance", "create"]), max_size=25
    )
)
def test_any_order_of_commands_keeps_the_rules(orders: list[str]) -> None:
    """G2: no key is made, read or removed by a client in between; a phase never goes back."""
    state = State()
    do(state, create("old"))
    commands: dict[str, Command] = {
        "start": StartRestore("r", b"m", 1),
        "stage": StageRecords("r", 0, (key("new")[0],), last=False),
        "last": StageRecords("r", 0, key("new")[1], last=True),
        "commit": CommitRestore("r"),
        "cancel": CancelRestore("r"),
        "advance": AdvanceRestore("r"),
        "create": create("made"),
    }
    furthest = RestorePhase.STAGING
    for order in orders:
        record = state.get(RESTORE)
        under_way = isinstance(record, RestoreRecord) and not record.phase.over
        restarted = order == "start" and not under_way
        if under_way:
            for refused in (create("x"), DeleteKey(1, "old"), RestoreKey(*key("y"))):
                with pytest.raises(RestoreState):
                    lifecycle.apply(refused, Overlay(state))
        try:
            do(state, commands[order])
        except RestoreState:
            continue
        if restarted:
            furthest = RestorePhase.STAGING
        elif isinstance(state.get(RESTORE), RestoreRecord):
            assert phase(state) >= furthest
            furthest = phase(state)


def test_a_commit_needs_every_part() -> None:
    state = State()
    do(state, StartRestore("r", b"m", 2))
    do(state, StageRecords("r", 1, (), last=True))
    with pytest.raises(RestoreState):
        do(state, CommitRestore("r"))
    for command in (CommitRestore("other"), CancelRestore("other"), StageRecords("other", 0, (), last=True)):
        with pytest.raises(RestoreState):
            do(state, command)
    do(state, StageRecords("r", 0, (), last=True))
    do(state, CommitRestore("r"))
    do(state, CommitRestore("r"))
    with pytest.raises(RestoreState):
        do(state, CancelRestore("r"))


def test_a_key_with_all_its_versions_is_removed_and_restored_in_one_transaction() -> None:
    """G1: the most versions that a key may have fit into one transaction."""
    state = State()
    record, versions = key("k", limits.VERSIONS_PER_KEY_MAX)
    do(state, RestoreKey(record, versions))
    with pytest.raises(KeyExists):
        do(state, RestoreKey(record, versions))
    do(state, StartRestore("r", b"m", 1))
    do(state, StageRecords("r", 0, (), last=True))
    do(state, CommitRestore("r"))
    finish(state)
    assert state.key_ids(10) == []


def test_a_key_never_grows_beyond_one_transaction() -> None:
    """G1: versions with the largest tags, made or changed, until refused; purge and restore fit."""
    tags = {f"{number:02d}" + "x" * 254: "\U0001f511" * 256 for number in range(15)}
    state = State()
    for number in range(limits.VERSIONS_PER_KEY_MAX):
        try:
            do(state, replace(create("k", f"{number:032x}"), tags=tags))
        except LimitExceeded:
            break
    else:
        raise AssertionError("nothing was refused")
    record = state.get(key_name("k"))
    assert isinstance(record, KeyRecord)
    assert 10 < len(record.version_ids) < limits.VERSIONS_PER_KEY_MAX
    small = State()
    for number in range(limits.VERSIONS_PER_KEY_MAX):
        do(small, create("k", f"{number:032x}"))
    with pytest.raises(LimitExceeded):
        for number in range(limits.VERSIONS_PER_KEY_MAX):
            do(small, UpdateKeyVersion(2, "k", f"{number:032x}", tags=tags))
    for full in (state, small):
        versions = full.get(key_name("k"))
        assert isinstance(versions, KeyRecord)
        stored = tuple(lifecycle.version_of(full, versions, version) for version in versions.version_ids)
        changes = lifecycle.apply(RestoreKey(versions, stored), State()).changes
        assert sum(stored_bytes(r) for r in changes.values() if r) < limits.TRANSACTION_BYTES_MAX


def test_every_batch_of_a_restore_fits_a_transaction() -> None:
    """G1: whatever the tags, also when what was staged in full batches is placed and dropped at once."""
    tags = {f"{number:02d}" + "x" * 254: "y" * 256 for number in range(15)}
    state = State()
    do(state, StartRestore("r", b"m", 1))
    for number in range(60):
        record, (version,) = key(f"k{number}")
        do(state, StageRecords("r", 0, (record, replace(version, tags=tags)), last=number == 59))
    do(state, CommitRestore("r"))
    while not phase(state).over:
        outcome = lifecycle.apply(AdvanceRestore("r"), Overlay(state))
        assert sum(stored_bytes(r) for r in outcome.changes.values() if r) < limits.TRANSACTION_BYTES_MAX
        state.apply(outcome.changes)
    assert len(state.key_ids(100)) == 60


def test_a_restored_key_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEYS_MAX", 1)
    state = State()
    do(state, create("only"))
    with pytest.raises(LimitExceeded):
        do(state, RestoreKey(*key("second")))


# -- epochs -------------------------------------------------------------------------------


def activate(epoch: int, serving: set[int], old: bytes = b"", new: bytes = b"h") -> ActivateEpoch:
    return ActivateEpoch(epoch, frozenset(serving), frozenset(), old, new)


@pytest.mark.parametrize("holders", [{0}, {0, 1}, {0, 2}])
def test_an_epoch_needs_every_serving_partition_and_two(holders: set[int]) -> None:
    """G1: a key that one partition alone holds is not used; nor one that a serving one lacks."""
    state = State()
    do(state, ProposeEpoch(2, 0))
    for index in holders - {0}:
        do(state, HoldEpoch(2, index))
    with pytest.raises(CeremonyState):
        do(state, activate(2, {0, 1, 2}))
    with pytest.raises(CeremonyState):
        do(state, activate(2, holders | {3}))
    with pytest.raises(CeremonyState):
        do(state, activate(2, {0}))  # the other holder is dead
    if len(holders) < 2:
        with pytest.raises(CeremonyState):
            do(state, activate(2, holders))
    else:
        do(state, activate(2, holders))
        assert (state.pool().epoch, state.pool().next_epoch, state.pool().holders) == (2, 0, frozenset())


def test_a_hold_counts_for_the_epoch_that_it_names_only() -> None:
    """G1: who holds a key that was left behind does not hold the one proposed after it."""
    state = State()
    do(state, ProposeEpoch(2, 0))
    do(state, ProposeEpoch(3, 0))
    do(state, HoldEpoch(2, 1))  # late
    do(state, HoldEpoch(4, 1))  # of nothing yet
    assert state.pool().holders == {0}
    with pytest.raises(CeremonyState, match="not every serving partition"):
        do(state, activate(3, {0, 1}))
    do(state, HoldEpoch(3, 1))
    do(state, activate(3, {0, 1}))
    assert state.pool().epoch == 3


def test_a_new_proposal_begins_with_its_proposer_alone() -> None:
    """G1: the holders of the proposal before it have another key."""
    state = State()
    do(state, ProposeEpoch(2, 0))
    do(state, HoldEpoch(2, 1))
    do(state, ProposeEpoch(3, 0))
    assert state.pool().holders == {0}
    with pytest.raises(CeremonyState, match="not every serving partition"):
        do(state, activate(3, {0, 1}))


def test_only_the_newest_proposal_is_put_in_force() -> None:
    """G1, G4: holders are counted for it alone; one that was left behind is never used."""
    state = State()
    do(state, ProposeEpoch(2, 0))
    do(state, ProposeEpoch(3, 0))
    do(state, HoldEpoch(3, 1))
    for epoch in (1, 2, 4):
        with pytest.raises(CeremonyState, match="proposed meanwhile"):
            do(state, activate(epoch, {0, 1}))
    assert state.pool().epoch == PoolRecord().epoch
    do(state, activate(3, {0, 1}))
    assert (state.pool().epoch, state.pool().next_epoch) == (3, 0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["propose", "hold", "activate"]), st.integers(2, 6), st.integers(0, 2)),
        max_size=30,
    )
)
def test_epochs_only_rise_and_are_held(steps: list[tuple[str, int, int]]) -> None:
    """G1: against a model that remembers who ever said that he holds which proposal."""
    state = State()
    held: dict[int, set[int]] = {}
    for what, epoch, index in steps:
        before = state.pool()
        try:
            match what:
                case "propose":
                    do(state, ProposeEpoch(epoch, index))
                    assert epoch not in held, "a number is never used twice"
                    held[epoch] = {index}
                case "hold":
                    do(state, HoldEpoch(epoch, index))
                    if epoch == before.next_epoch:
                        held[epoch].add(index)
                case _:
                    do(state, activate(epoch, {0, 1}, before.header_digest))
                    assert {0, 1} <= held[epoch]
                    assert state.pool().epoch == epoch > before.epoch
        except CeremonyState:
            assert state.pool() == before


def test_a_partition_that_was_drained_says_anew_that_it_holds_the_key() -> None:
    """G1, G5: it may have been restarted without it, and would end itself as soon as the key is used."""
    state = State()
    do(state, ProposeEpoch(2, 0))
    for index in (1, 2):
        do(state, HoldEpoch(2, index))
    do(state, DrainPartition(1, frozenset({0, 1, 2})))
    do(state, ResumePartition(1, 7))
    assert state.pool().holders == {0, 2}
    with pytest.raises(CeremonyState):
        do(state, activate(2, {0, 1, 2}))
    do(state, HoldEpoch(2, 1))
    do(state, activate(2, {0, 1, 2}))
    assert state.pool().epoch == 2


def test_an_epoch_is_not_activated_over_a_drain_or_a_resumption() -> None:
    """G5: who serves was asked before; the one that came back since serves, and has no such key."""
    state = State()
    do(state, DrainPartition(1, frozenset({0, 1, 2})))
    do(state, ProposeEpoch(2, 0))
    do(state, HoldEpoch(2, 2))
    command = ActivateEpoch(2, frozenset({0, 2}), frozenset({1}), b"", b"h")
    do(state, ResumePartition(1, 7))
    do(state, DrainPartition(2, frozenset({0, 1, 2})))
    with pytest.raises(CeremonyState):
        do(state, command)
    assert state.pool().epoch != 2


def test_a_proposal_is_asked_for_while_somebody_waits_for_it() -> None:
    """One that was left behind is not asked for for ever; one that a restart has lost is asked for again."""
    pool = PoolRecord(next_epoch=2, holders=frozenset({0}))
    asked = epochs.asked(epochs.Asked(), pool, 100.0)
    assert epochs.asked(asked, pool, 105.0) == asked
    late = 100.0 + limits.EPOCH_HOLD_SECONDS
    assert epochs.must_ask(asked, pool, 1, late - 0.1, holds=False)
    assert not epochs.must_ask(asked, pool, 1, late, holds=False)
    assert not epochs.must_ask(asked, pool, 0, 101.0, holds=True)
    assert epochs.must_ask(asked, pool, 0, 101.0, holds=False)
    assert epochs.must_ask(asked, pool, 1, late, holds=True), "it says so"
    later = replace(pool, next_epoch=3, holders=frozenset())
    assert epochs.must_ask(epochs.asked(asked, later, late), later, 1, late, holds=False)
    assert not epochs.must_ask(asked, PoolRecord(), 1, 101.0, holds=False)


def test_a_header_is_replaced_once() -> None:
    """G4: of two ceremonies that began with the same header, the second is refused."""
    state = State()
    do(state, ProposeEpoch(2, 0))
    do(state, HoldEpoch(2, 1))
    do(state, ReplaceSecurityDomain(b"", b"first"))
    late: list[Any] = [ReplaceSecurityDomain(b"", b"second"), activate(2, {0, 1}, b"", b"third")]
    for command in late:
        with pytest.raises(MHSMError):
            do(state, command)
    assert state.pool().header_digest == b"first"
    do(state, activate(2, {0, 1}, b"first", b"third"))
    assert state.pool().header_digest == b"third"
