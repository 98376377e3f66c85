"""What a pool keeps is weighed, and a store that fills up refuses clients before the pool (G1, G8)."""

from __future__ import annotations

import random
import typing

import pytest

from hsm_pool import errors, limits
from hsm_pool.audit.record import Operation
from hsm_pool.core import lifecycle, requests, store_room
from hsm_pool.core.commands import (
    Command,
    CommitRestore,
    CreateKeyVersion,
    DeleteKey,
    PurgeDeletedKey,
    RestoreKey,
    RotateKey,
    StageRecords,
    StartRestore,
    UpdateKeyVersion,
    UpdateRotationPolicy,
)
from hsm_pool.core.model import (
    Curve,
    KeyRecord,
    KeyReleasePolicy,
    KeyType,
    KeyVersionRecord,
    Record,
    RequestRecord,
    RotationPolicy,
    SealedMaterial,
    StagedRecord,
    name_of,
    request_name,
    stored_bytes,
)
from hsm_pool.core.state import Overlay, State
from hsm_pool.core.store_room import StoreRoom
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.store import codec
from hsm_pool.store.committer import Committer, Mutation, _Submission
from hsm_pool.store.replica import Replica, boot_time
from hsm_pool.store.sealing import PoolKeys, seal_record

SEALED = SealedMaterial(1, b"n" * 12, b"c")
ROOM = limits.OPERATIONS_PER_TRANSACTION_MAX - 6
"""What a mutation of a key or two leaves."""
FAT = {f"{number:02d}" + "\U0001f600" * 254: "\U0001f511" * 256 for number in range(limits.TAGS_MAX)}


def answer(number: int, size: int) -> RequestRecord:
    return RequestRecord(number.to_bytes(32, "big"), b"d" * 32, bytes(size), number)


def create(key_id: str, number: int = 0, tags: dict[str, str] | None = None) -> CreateKeyVersion:
    return CreateKeyVersion(
        1, key_id, f"{number:032x}", KeyType.OCT, Curve.NONE, 256, b"", SEALED, (), tags=tags
    )


def run(state: State, command: Command) -> None:
    state.apply(lifecycle.apply(command, Overlay(state)).changes)


def kept(state: State) -> list[RequestRecord]:
    return state.oldest_requests(limits.REQUESTS_MAX + 1)


# -- answered requests ---------------------------------------------------------------------


def test_kept_answers_never_weigh_more_than_their_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """G1: whatever answers come, in whatever batches; the newest that fit are all answered again."""
    monkeypatch.setattr(limits, "REQUESTS_BYTES_MAX", 500_000)
    chosen = random.Random(seed)
    for _ in range(30):
        state = State()
        fat = chosen.random()
        answers = [
            answer(number, chosen.randrange(50_000) if chosen.random() < fat else chosen.randrange(200))
            for number in range(150)
        ]
        batch = chosen.randrange(1, 9)
        for start in range(0, len(answers), batch):
            overlay = Overlay(state)
            for record in answers[start : start + batch]:
                scratch = Overlay(overlay)
                scratch.put(requests.remember(scratch, record, ROOM))
                overlay.put(scratch.changes)
                assert overlay.bytes_held("request") <= 500_000
            state.apply(overlay.changes)
            left = kept(state)
            assert state.bytes_held("request") == sum(map(stored_bytes, left))
            assert left == answers[: start + batch][-len(left) :], "the oldest go, and no others"
            before = answers[: start + batch][: -len(left)]
            if before:
                assert sum(map(stored_bytes, [*before[-1:], *left])) > 500_000 - batch * stored_bytes(
                    answer(0, 50_000)
                ), "what has room is not forgotten"
            for record in left:
                assert requests.answered_before(state, record.request_key, record.request_digest) == record


def test_kept_answers_are_counted_within_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUESTS_MAX", 10)
    state = State()
    for start in range(0, 40, 4):
        overlay = Overlay(state)
        for number in range(start, start + 4):
            overlay.put(requests.remember(overlay, answer(number, 1), ROOM))
        state.apply(overlay.changes)
        assert state.request_count() <= 10
    assert [record.answered_ms for record in kept(state)] == list(range(30, 40))


def test_a_mutation_without_room_to_forget_leaves_it_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key restored with a hundred versions leaves few operations of its transaction."""
    monkeypatch.setattr(limits, "REQUESTS_BYTES_MAX", 200_000)
    state = State()
    for number in range(200):
        state.apply(requests.remember(state, answer(number, 1), ROOM))
    least = limits.OPERATIONS_PER_TRANSACTION_MAX - 3 - (limits.VERSIONS_PER_KEY_MAX + 1)
    for number in range(200, 300):
        changes = requests.remember(state, answer(number, 48_000), least)
        assert len(changes) <= 1 + least
        state.apply(changes)
        assert state.bytes_held("request") <= 4 * limits.REQUESTS_BYTES_MAX
    assert state.bytes_held("request") <= limits.REQUESTS_BYTES_MAX


def test_the_weight_of_a_record_is_not_less_than_what_is_stored() -> None:
    """Else the bounds would be none: keys and answers of the greatest size, and of the smallest."""
    keys = PoolKeys.generate("0" * 32, 1, SecretBytes(bytes(32)))
    policy = KeyReleasePolicy(bytes(limits.RELEASE_POLICY_BYTES_MAX))

    def version(tags: dict[str, str], policy: KeyReleasePolicy | None, public: bytes) -> KeyVersionRecord:
        sealed = SealedMaterial(1, b"n" * 12, bytes(4 * len(public)))
        return KeyVersionRecord(
            "k" * 127, "0" * 32, KeyType.RSA, Curve.NONE, 4096, public, (), True, 1, 1, 1, 1, True, tags,
            sealed, policy,
        )  # fmt: skip

    records: list[Record] = [
        *(answer(1, size) for size in (0, 1, 200, 1_000, 3_500, 4_000, 9_000, 48_000)),
        KeyRecord("k", ("0" * 32,)),
        KeyRecord("k" * 127, tuple(f"{number:032x}" for number in range(limits.VERSIONS_PER_KEY_MAX))),
        version({}, None, b""),
        version(FAT, policy, bytes(550)),
        StagedRecord(version(FAT, policy, bytes(550))),
    ]
    for record in records:
        kind, body = codec.encode(record)
        sealed = seal_record(keys, 1, kind, keys.opaque_id(name_of(record)), 2**40, bytes(32), body)
        key = len("/mhsm//record/") + 2 * 32 + 32
        assert len(sealed) + key <= stored_bytes(record)


# -- keys ----------------------------------------------------------------------------------


def filled(monkeypatch: pytest.MonkeyPatch, keys: int = 4) -> State:
    """Return a pool with keys, whose bound has room for nothing more."""
    state = State()
    for number in range(keys):
        run(state, create(f"k{number}", tags={"a": "b" * 200}))
    run(state, UpdateRotationPolicy(1, "k0", RotationPolicy(time_after_create="P28D")))
    monkeypatch.setattr(limits, "KEYS_BYTES_MAX", state.bytes_held("key", "version") + 100)
    return state


def test_all_keys_together_have_a_bound_and_what_makes_them_smaller_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = filled(monkeypatch)
    before = {name: state.get(name) for name in state.names()}
    version = before["version", "k0", "0" * 32]
    assert isinstance(version, KeyVersionRecord)
    restored = KeyVersionRecord(
        "r", "0" * 32, KeyType.OCT, Curve.NONE, 256, b"", (), True, 0, 0, 1, 1, False, {}, SEALED
    )
    growing: list[Command] = [
        create("new"),
        create("k1", 1),
        UpdateKeyVersion(2, "k1", tags=FAT),
        RotateKey(2, "k0", "1" * 32, KeyType.OCT, Curve.NONE, 256, b"", SEALED),
        RestoreKey(KeyRecord("r", ("0" * 32,)), (restored,)),
    ]
    for command in growing:
        with pytest.raises(errors.LimitExceeded):
            run(state, command)
        assert {name: state.get(name) for name in state.names()} == before
    run(state, UpdateKeyVersion(2, "k1", enabled=False))
    monkeypatch.setattr(limits, "KEYS_BYTES_MAX", 1)  # a pool that was filled under another bound
    run(state, UpdateKeyVersion(2, "k1", enabled=True))
    run(state, UpdateKeyVersion(2, "k1", tags={}))
    run(state, DeleteKey(3, "k1"))
    run(state, PurgeDeletedKey(4, "k1"))
    assert state.key_count() == 3


def test_no_order_of_commands_stores_more_than_the_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when many are decided on an overlay before any of them is applied."""
    monkeypatch.setattr(limits, "KEYS_BYTES_MAX", 30_000)
    chosen = random.Random(seed)
    refused = 0
    for story in range(30):
        state = State()
        for number in range(60):
            overlay = Overlay(state)
            for step in range(chosen.randrange(1, 4)):
                key_id = f"k{chosen.randrange(4)}"
                tags = {"t": "x" * chosen.randrange(3_000)}
                commands: list[Command] = [
                    create(key_id, 4 * number + step, tags),
                    UpdateKeyVersion(1, key_id, tags=tags),
                    DeleteKey(1, key_id),
                    PurgeDeletedKey(1, key_id),
                ]
                weights = (8, 4, 1, 1) if story % 2 else (1, 1, 1, 1)
                (command,) = chosen.choices(commands, weights)
                try:
                    overlay.put(lifecycle.apply(command, Overlay(overlay)).changes)
                except errors.LimitExceeded:
                    refused += 1
                except errors.MHSMError:
                    continue
            state.apply(overlay.changes)
            weighed = sum(stored_bytes(record) for name in state.names() if (record := state.get(name)))
            assert state.bytes_held("key", "version") == weighed <= 30_000
    assert refused, "the bound was met"


def test_what_a_restore_stages_has_a_bound_and_a_full_pool_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    state = filled(monkeypatch)
    full = state.bytes_held("key", "version")
    monkeypatch.setattr(limits, "STAGED_BYTES_MAX", full + full // 8)
    backup = [record for name in state.names() if (record := state.get(name))]
    run(state, StartRestore("r", b"m", 1))
    run(state, StageRecords("r", 0, tuple(backup), last=True))  # type: ignore[arg-type]
    run(state, StageRecords("r", 0, tuple(backup), last=True))  # type: ignore[arg-type]
    more = KeyRecord("more", tuple(f"{number:032x}" for number in range(90)))
    with pytest.raises(errors.LimitExceeded):
        run(state, StageRecords("r", 0, (more,), last=True))
    run(state, CommitRestore("r"))


# -- the store -----------------------------------------------------------------------------


def test_a_pool_at_all_its_bounds_does_not_fill_the_store() -> None:
    """The numbers of limits.py fit each other."""
    held = (
        limits.KEYS_BYTES_MAX
        + limits.STAGED_BYTES_MAX
        + 4 * limits.REQUESTS_BYTES_MAX
        + limits.LOG_RING_ENTRIES * limits.LOG_ENTRY_BYTES
    )
    since_compaction = 2 * limits.STORE_COMPACT_SHARE * limits.STORE_QUOTA_BYTES
    assert held + since_compaction <= limits.STORE_FULL_SHARE * limits.STORE_QUOTA_BYTES
    assert limits.STORE_FULL_SHARE < limits.STORE_FILE_SHARE - limits.STORE_COMPACT_SHARE
    assert limits.STORE_QUOTA_BYTES <= limits.STORE_QUOTA_BYTES_MAX


@pytest.mark.parametrize(
    ("size", "in_use", "full", "helps"),
    [
        (0, 0, False, False),
        (699, 699, False, False),
        (700, 700, True, False),
        (899, 10, False, False),
        (900, 10, True, True),
        (900, 868, True, True),
        (900, 869, True, False),
        (1_000, 1_000, True, False),
    ],
)
def test_when_a_member_is_full_and_when_defragmenting_it_helps(
    size: int, in_use: int, full: bool, helps: bool
) -> None:
    room = StoreRoom(size, in_use, 1_000)
    assert (room.full, room.defragmentation_helps) == (full, helps)
    if helps:  # what is left is no reason to do it again
        assert not StoreRoom(in_use, in_use, 1_000).file_full


def test_a_compaction_is_due_by_what_was_written() -> None:
    assert not StoreRoom(0, 131, 1_000).compaction_due(100)
    assert StoreRoom(0, 132, 1_000).compaction_due(100)


def test_every_command_is_known_to_make_a_pool_larger_or_not() -> None:
    """A new one must not fill the store by being forgotten."""
    goes_on = {
        "DeleteKey", "PurgeDeletedKey", "PurgeDueKey", "DeleteRoleDefinition", "DeleteRoleAssignment",
        "DrainPartition", "ResumePartition", "RestartPartition", "RelinquishHousekeeping", "AdmitPartition",
        "CompleteAdmission", "ActivateFirmware", "ReportSecurityVersion", "ReplaceSecurityDomain",
        "ProposeEpoch", "HoldEpoch", "ActivateEpoch", "CommitRestore", "CancelRestore", "AdvanceRestore",
        "NoteCheckpoint",
    }  # fmt: skip
    growing = {command.__name__ for command in store_room.GROWING}
    assert not growing & goes_on
    assert growing | goes_on == {command.__name__ for command in typing.get_args(Command)}


def test_a_full_store_refuses_what_grows_answers_repeats_and_takes_deletions() -> None:
    """G8, G1: a typed, definite refusal that changes nothing; what was acknowledged is answered again."""
    keys = PoolKeys.generate("0" * 32, 1, SecretBytes(bytes(32)))
    replica = Replica(keys, 0, 1)
    replica._fresh_until = boot_time() + 60
    committer = Committer(None, replica)  # type: ignore[arg-type]  # nothing is sent here

    def decided(command: Command, key: bytes) -> _Submission:
        mutation = Mutation(command, None, lambda _: key, key, b"digest", 1)
        submission = _Submission(mutation, Operation("KeyCreate", "spiffe://pool/client/one"))
        accepted, later, changes = committer._decide([submission])
        assert not later
        assert bool(accepted) == bool(changes)
        replica.state.apply(changes)
        return submission

    try:
        assert decided(create("a"), b"1").proposed
        committer.room = StoreRoom(1_000, 699, 1_200)
        assert decided(create("b"), b"2").proposed
        committer.room = StoreRoom(1_000, 840, 1_200)
        before = replica.state.names()
        growing: list[Command] = [create("c"), create("a", 1), UpdateKeyVersion(1, "a", tags=FAT)]
        for number, command in enumerate(growing):
            refused = decided(command, bytes([number]))
            assert not refused.proposed
            assert isinstance(refused.error, errors.StoreFull)
            assert refused.error.definite
        assert replica.state.names() == before
        repeated = decided(create("a"), b"1")
        assert (repeated.proposed, repeated.error, repeated.reply) == (False, None, b"1")
        assert decided(DeleteKey(1, "a"), b"3").proposed
        assert decided(PurgeDeletedKey(2, "a"), b"4").proposed
        committer.room = StoreRoom(1_000, 100, 1_200)
        assert decided(create("c"), b"5").proposed
        assert {name for name in replica.state.names() if name[0] == "key"} == {("key", "b"), ("key", "c")}
    finally:
        committer.close()


def test_a_large_answer_forgets_no_more_than_a_transaction_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """G1, G8: etcd refuses a longer one, as often as it is sent: no answer of that size would be given."""
    monkeypatch.setattr(limits, "REQUESTS_BYTES_MAX", 400_000)
    replica = Replica(PoolKeys.generate("0" * 32, 1, SecretBytes(bytes(32))), 0, 1)
    committer = Committer(None, replica)  # type: ignore[arg-type]  # nothing is sent here
    longest = 0
    try:
        run(replica.state, create("a"))
        for number in range(904):
            octets = bytes(100 if number < 900 else 300_000)
            command = UpdateKeyVersion(1, "a", tags={"n": str(number)})
            request = number.to_bytes(2, "big")
            mutation = Mutation(command, None, lambda _, octets=octets: octets, request, b"d", number)  # type: ignore[misc]
            submission = _Submission(mutation, Operation("KeyUpdate", "spiffe://pool/client/one"))
            accepted, _, changes = committer._decide([submission])
            assert accepted
            longest = max(longest, len(changes) + 2)
            replica.state.apply(changes)
        assert 100 < longest <= limits.OPERATIONS_PER_TRANSACTION_MAX, "it is the bound that was met"
    finally:
        committer.close()


def test_the_committer_weighs_the_answers_that_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of fat answers through the committer's own batches stays below the bound."""
    monkeypatch.setattr(limits, "REQUESTS_BYTES_MAX", 400_000)
    replica = Replica(PoolKeys.generate("0" * 32, 1, SecretBytes(bytes(32))), 0, 1)
    committer = Committer(None, replica)  # type: ignore[arg-type]  # nothing is sent here
    try:
        run(replica.state, create("a"))
        for start in range(0, 60, 6):
            batch = []
            for number in range(start, start + 6):
                command = UpdateKeyVersion(1, "a", tags={"n": str(number)})
                mutation = Mutation(command, None, lambda _: bytes(48_000), bytes([number]), b"d", number)
                batch.append(_Submission(mutation, Operation("KeyUpdate", "spiffe://pool/client/one")))
            while batch:
                accepted, batch, changes = committer._decide(batch)
                assert len(changes) + 2 <= limits.OPERATIONS_PER_TRANSACTION_MAX
                assert accepted
                size = sum(stored_bytes(record) for record in changes.values() if record)
                assert len(accepted) == 1 or size <= limits.GROUP_BYTES_MAX, "etcd keeps it in memory"
                replica.state.apply(changes)
                assert replica.state.bytes_held("request") <= 400_000
        assert replica.state.get(request_name(bytes([59])))
        assert replica.state.get(request_name(bytes([0]))) is None
    finally:
        committer.close()
