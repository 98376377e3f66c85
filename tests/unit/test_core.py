"""The pure core against small stories (G8: a refusal changes nothing)."""

from __future__ import annotations

import pytest

from hsm_pool import errors, limits
from hsm_pool.core import key_use, lifecycle, membership, pool_limits, requests
from hsm_pool.core.commands import (
    ActivateFirmware,
    AdmitPartition,
    CompleteAdmission,
    CreateKeyVersion,
    DeleteKey,
    DrainPartition,
    NoteCheckpoint,
    PurgeDeletedKey,
    RecoverDeletedKey,
    RelinquishHousekeeping,
    ReportSecurityVersion,
    RestartPartition,
    RestoreKey,
    ResumePartition,
    UpdateKeyVersion,
)
from hsm_pool.core.freshness import WAIT_SECONDS, FreshnessTracker, PeerRenewal, clock_skew_seconds
from hsm_pool.core.model import (
    POOL,
    Admission,
    CheckpointRecord,
    Curve,
    KeyOperation,
    KeyType,
    PoolRecord,
    RequestRecord,
    SealedMaterial,
    checkpoint_name,
)
from hsm_pool.core.state import Overlay, State
from hsm_pool.store import codec

_BY_THEMSELVES = {KeyOperation.IMPORT, KeyOperation.SECURE_WRAP_KEY, KeyOperation.SECURE_UNWRAP_KEY}
USES = tuple(operation for operation in KeyOperation if operation not in _BY_THEMSELVES)
MATERIAL = SealedMaterial(1, b"n" * 12, b"c" * 32)
NOW = 1_800_000_000_000
"""Unix milliseconds."""


def create(key_id: str, version: int, **changes: object) -> CreateKeyVersion:
    fields: dict[str, object] = {
        "time_ms": 1_000,
        "key_id": key_id,
        "version_id": f"{version:032x}",
        "key_type": KeyType.EC,
        "curve": Curve.P256,
        "size_bits": 256,
        "public_key_der": b"p",
        "sealed_material": MATERIAL,
        "key_operations": (KeyOperation.SIGN, KeyOperation.VERIFY),
    }
    return CreateKeyVersion(**{**fields, **changes})  # type: ignore[arg-type]


def run(state: State, command: object) -> object:
    outcome = lifecycle.apply(command, state)  # type: ignore[arg-type]
    state.apply(outcome.changes)
    return outcome.reply


def test_a_key_lives_through_its_whole_cycle() -> None:
    state = State()
    run(state, create("a", 1))
    run(state, create("a", 2))
    key = lifecycle.active_key(state, "a")
    assert lifecycle.version_of(state, key).version_id == f"{2:032x}"
    run(state, DeleteKey(2_000, "a"))
    with pytest.raises(errors.KeySoftDeleted):
        lifecycle.active_key(state, "a")
    with pytest.raises(errors.KeyExists):
        run(state, create("a", 3))
    run(state, RecoverDeletedKey(3_000, "a"))
    assert lifecycle.active_key(state, "a").version_ids == (f"{1:032x}", f"{2:032x}")
    run(state, DeleteKey(4_000, "a"))
    run(state, PurgeDeletedKey(5_000, "a"))
    assert state.names() == []
    with pytest.raises(errors.DeletedKeyNotFound):
        run(state, PurgeDeletedKey(6_000, "a"))


def test_a_refused_command_changes_nothing() -> None:
    """G8: every refusal leaves the state as it was."""
    state = State()
    run(state, create("a", 1))
    before = {name: state.get(name) for name in state.names()}
    refused = [
        (create("a", 2, must_not_exist=True), errors.KeyExists),
        (create("b", 2, not_before_ms=10, expires_ms=5), errors.InvalidField),
        (UpdateKeyVersion(1, "a", not_before_ms=10, expires_ms=10), errors.InvalidField),
        (UpdateKeyVersion(1, "a", "0" * 32), errors.KeyNotFound),
        (DeleteKey(1, "b"), errors.KeyNotFound),
        (RecoverDeletedKey(1, "a"), errors.DeletedKeyNotFound),
        (PurgeDeletedKey(1, "a"), errors.DeletedKeyNotFound),
        (DrainPartition(0, frozenset({0, 1})), errors.FloorOfTwo),
    ]
    for command, error in refused:
        with pytest.raises(error):
            run(state, command)
        assert {name: state.get(name) for name in state.names()} == before


def test_a_pool_that_was_made_smaller_holds_less() -> None:
    """The limits are on the chain, so that no partition has others; soft-deleted keys count."""
    state = State()
    state.apply({POOL: PoolRecord(keys_max=2, versions_per_key_max=2)})
    assert codec.decode(*codec.encode(lifecycle.pool_record(state))) == lifecycle.pool_record(state)
    for number in range(2):
        run(state, create("a", number))
    for command in (create("a", 2), restored("b", 3)):
        with pytest.raises(errors.LimitExceeded):
            run(state, command)
    run(state, create("b", 1))
    run(state, DeleteKey(1, "b"))
    for command in (create("c", 1), restored("c", 1)):
        with pytest.raises(errors.LimitExceeded):
            run(state, command)
    pool_limits.check_restored(state, 2)
    with pytest.raises(errors.LimitExceeded):
        pool_limits.check_restored(state, 3)
    run(state, PurgeDeletedKey(2, "b"))
    run(state, restored("c", 2))
    assert state.key_count() == 2


def restored(key_id: str, versions: int) -> RestoreKey:
    """Return the restore of a key as another pool had it."""
    elsewhere = State()
    for number in range(versions):
        run(elsewhere, create(key_id, number))
    key = lifecycle.active_key(elsewhere, key_id)
    return RestoreKey(key, tuple(lifecycle.version_of(elsewhere, key, v) for v in key.version_ids))


def test_limits_of_versions_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "VERSIONS_PER_KEY_MAX", 3)
    monkeypatch.setattr(limits, "KEYS_MAX", 2)
    state = State()
    for version in range(3):
        run(state, create("a", version))
    with pytest.raises(errors.LimitExceeded):
        run(state, create("a", 9))
    run(state, create("b", 1))
    with pytest.raises(errors.LimitExceeded):
        run(state, create("c", 1))


@pytest.mark.parametrize("operation", USES)
def test_use_of_disabled_and_expired_versions(operation: KeyOperation) -> None:
    """G2: a disabled key does nothing. Azure: decrypt, unwrap and verify go on outside of its times."""
    state = State()
    run(state, create("a", 1, key_operations=USES, not_before_ms=100, expires_ms=200))
    version = lifecycle.version_of(state, lifecycle.active_key(state, "a"))
    exempt = operation in {KeyOperation.DECRYPT, KeyOperation.UNWRAP_KEY, KeyOperation.VERIFY}
    key_use.check_use(version, operation, 150)
    for time_ms in (99, 200):
        if exempt:
            key_use.check_use(version, operation, time_ms)
        else:
            with pytest.raises(errors.KeyNotUsable, match="1970-01-01T00:00:00Z"):
                key_use.check_use(version, operation, time_ms)
    run(state, UpdateKeyVersion(3, "a", enabled=False))
    disabled = lifecycle.version_of(state, lifecycle.active_key(state, "a"))
    with pytest.raises(errors.KeyNotUsable):
        key_use.check_use(disabled, operation, 150)
    with pytest.raises(errors.OperationNotPermitted):
        other = next(o for o in USES if o is not operation)
        run(state, UpdateKeyVersion(4, "a", key_operations=(other,), enabled=True))
        key_use.check_use(lifecycle.version_of(state, lifecycle.active_key(state, "a")), operation, 150)


def test_a_restart_needs_a_drained_partition_and_two_others() -> None:
    """G5: whatever the controller asks for, two go on serving; a restart itself changes nothing."""
    everybody = frozenset({0, 1, 2})
    state = State()
    with pytest.raises(errors.NotDrained):
        run(state, RestartPartition(0, everybody))
    run(state, DrainPartition(0, everybody))
    before = state.pool()
    run(state, RestartPartition(0, frozenset({1, 2})))
    assert state.pool() == before
    for serving in ({1}, {0, 1}, {2}, set()):
        with pytest.raises(errors.FloorOfTwo):
            run(state, RestartPartition(0, frozenset(serving)))


def test_the_security_version_of_a_pool_only_rises() -> None:
    """G5: firmware below what the whole pool ran is neither activated nor reported; records keep it."""
    everybody = frozenset({0, 1, 2})
    state = State()
    run(state, DrainPartition(0, everybody))
    with pytest.raises(errors.NotDrained):
        run(state, ActivateFirmware(1, 1))
    for index, version in ((0, 3), (1, 2), (0, 3)):
        run(state, ReportSecurityVersion(index, version))
        assert state.pool().security_version_floor == 0, "until all three have reported"
        run(state, ActivateFirmware(0, 1))
    run(state, ReportSecurityVersion(2, 5))
    assert state.pool().security_version_floor == 2
    for command in (ActivateFirmware(0, 1), ReportSecurityVersion(2, 1)):
        with pytest.raises(errors.FirmwareRefused):
            run(state, command)
    run(state, ActivateFirmware(0, 2))
    run(state, ReportSecurityVersion(1, 4))
    run(state, ReportSecurityVersion(0, 3))
    assert state.pool().security_version_floor == 3
    assert codec.decode(*codec.encode(state.pool())) == state.pool()


def test_the_housekeeping_role_is_held_by_one_and_falls_to_the_next() -> None:
    everybody = frozenset({0, 1, 2})
    state = State()

    def holder(serving: frozenset[int]) -> int | None:
        return membership.housekeeper(state.pool().housekeeper, serving)

    assert [holder(everybody), holder(everybody - {0}), holder(frozenset())] == [0, 1, None]
    run(state, RelinquishHousekeeping(1, everybody))
    assert holder(everybody) == 0, "who does not hold it cannot hand it over"
    run(state, RelinquishHousekeeping(0, everybody))
    run(state, RelinquishHousekeeping(0, everybody))
    assert holder(everybody) == 1, "a repeat changes nothing"
    run(state, RelinquishHousekeeping(1, frozenset({0, 1})))
    assert holder(everybody) == 0
    with pytest.raises(errors.FloorOfTwo):
        run(state, RelinquishHousekeeping(0, frozenset({0})))


def test_the_boot_count_that_evidence_may_claim_only_rises() -> None:
    """G5, G6: neither the newest renewal that was seen nor an admission is undercut."""
    state = State()
    assert membership.boot_count_min(state.pool(), 2, 0) == 0
    assert membership.boot_count_min(state.pool(), 2, 7) == 7
    run(state, AdmitPartition(NOW, 2, 8, 77, frozenset({0, 1})))
    admitted = membership.INCARNATIONS_PER_ADMISSION
    assert [membership.boot_count_min(state.pool(), 2, seen) for seen in (7, admitted + 1)] == [
        admitted,
        admitted + 1,
    ]
    assert membership.boot_count_min(state.pool(), 1, 7) == 7


def test_only_a_dead_partition_is_replaced_and_a_repeat_goes_on_with_it() -> None:
    """G5: two others serve, the one to be replaced does not; the member that goes is named once."""
    everybody = frozenset({0, 1, 2})
    state = State()
    with pytest.raises(errors.PartitionServes):
        run(state, AdmitPartition(NOW, 2, 5, 77, everybody))
    with pytest.raises(errors.FloorOfTwo):
        run(state, AdmitPartition(NOW, 2, 5, 77, frozenset({0})))
    others = frozenset({0, 1})
    run(state, AdmitPartition(NOW, 2, 5, 77, others))
    first, second = membership.INCARNATIONS_PER_ADMISSION, 2 * membership.INCARNATIONS_PER_ADMISSION
    once = NOW + membership.ADMISSION_MS
    assert state.pool().admissions == {2: Admission(1, first, 77, made_up_ms=once)}
    with pytest.raises(errors.FloorOfTwo):
        run(state, DrainPartition(1, everybody))  # even if the old one woke up and took a lease
    for old in (4, 5, 1000):  # however often the old one was restarted
        with pytest.raises(errors.PartitionReplaced):
            run(state, ResumePartition(2, old))
    with pytest.raises(errors.FloorOfTwo):
        run(state, AdmitPartition(NOW, 1, 5, 66, frozenset({0, 2})))  # one store member at a time
    run(state, AdmitPartition(NOW, 2, 5, 0, others))  # asked again after the member was removed
    run(state, CompleteAdmission(2, 9))  # of another admission
    assert state.pool().admissions == {2: Admission(1, first, 77, made_up_ms=once)}
    run(state, CompleteAdmission(2, 1))
    run(state, CompleteAdmission(2, 1))
    run(state, AdmitPartition(NOW, 2, 900, 88, others))  # the new one was not seen yet
    assert state.pool().admissions == {2: Admission(1, first, 77, ready=True, made_up_ms=once)}
    run(state, AdmitPartition(NOW, 2, first + 1, 88, others))  # it was seen, and died as well
    assert state.pool().admissions == {2: Admission(2, second, 88, made_up_ms=once + membership.ADMISSION_MS)}
    run(state, ResumePartition(2, second))
    assert not state.pool().drained
    record_type, body = codec.encode(state.pool())
    assert codec.decode(record_type, body) == state.pool()


def test_a_partition_is_replaced_four_times_at_once_and_then_once_an_hour() -> None:
    """G5: nobody uses up the replacements of a partition, nor a disk with what they leave behind."""
    others = frozenset({0, 1})
    state = State()
    now_ms = NOW

    def replaced(index: int = 2, serving: frozenset[int] = others) -> bool:
        last = state.pool().admissions.get(index)
        incarnation = last.incarnation + 1 if last else 5
        before = state.pool()
        try:
            run(state, AdmitPartition(now_ms, index, incarnation, 77, serving))
        except errors.LimitExceeded:
            assert state.pool() == before
            return False
        admission = state.pool().admissions[index]
        run(state, CompleteAdmission(index, admission.number))
        run(state, ResumePartition(index, admission.incarnation))
        return True

    assert [replaced() for _ in range(6)] == [True] * 4 + [False] * 2
    assert replaced(1, frozenset({0, 2})), "each partition has a count of its own"
    now_ms += membership.ADMISSION_MS - 1
    assert not replaced()
    now_ms += 1
    assert [replaced(), replaced()] == [True, False]
    now_ms += 1000 * membership.ADMISSION_MS
    assert [replaced() for _ in range(6)] == [True] * 4 + [False] * 2, "waiting saves up no more than four"


def test_two_drains_cannot_both_win() -> None:
    """G5: the second drain sees the first, whatever both controllers believed."""
    state = State()
    everybody = frozenset({0, 1, 2})
    run(state, DrainPartition(0, everybody))
    with pytest.raises(errors.FloorOfTwo):
        run(state, DrainPartition(1, everybody))
    run(state, ResumePartition(0, 1))
    run(state, DrainPartition(1, everybody))


def test_request_ids_are_remembered_and_forgotten() -> None:
    state = State()
    first = RequestRecord(b"k1", b"d1", b"reply", 1_000)
    state.apply(requests.remember(state, first, room=2))
    assert requests.answered_before(state, b"k1", b"d1") == first
    with pytest.raises(errors.RequestIdReused):
        requests.answered_before(state, b"k1", b"other")
    late = RequestRecord(b"k2", b"d2", b"", 1_001 + limits.REQUEST_RETENTION_MS)
    state.apply(requests.remember(state, late, room=2))
    assert requests.answered_before(state, b"k1", b"d1") is None
    assert requests.answered_before(state, b"k2", b"d2") == late


def test_an_overlay_reads_its_own_changes_and_notes_what_was_read() -> None:
    state = State()
    run(state, create("a", 1))
    overlay = Overlay(state)
    overlay.put(lifecycle.apply(DeleteKey(2, "a"), overlay).changes)
    assert ("key", "a") in overlay.reads
    with pytest.raises(errors.KeySoftDeleted):
        lifecycle.active_key(overlay, "a")
    assert not lifecycle.active_key(state, "a").deleted
    overlay.put(lifecycle.apply(PurgeDeletedKey(3, "a"), overlay).changes)
    assert (overlay.key_count(), state.key_count()) == (0, 1)


def renewal(counter: int, applied: int, at: float, *, incarnation: int = 1, surrendered: bool = False):
    return PeerRenewal(incarnation, counter, applied, surrendered, at)


def test_a_mutation_is_stable_when_every_partition_has_shown_it() -> None:
    """G2, the waiting rule: applied everywhere."""
    tracker = FreshnessTracker(0)
    tracker.observe_renewal(1, renewal(1, 4, 10.0))
    tracker.observe_renewal(2, renewal(1, 4, 10.0))
    tracker.applied(5, (("key", "a"),), 10.1)
    assert tracker.pending_sequence(("key", "a")) == 5
    assert tracker.pending_sequence(("key", "b")) == 0
    tracker.observe_renewal(1, renewal(2, 5, 10.2))
    tracker.advance(10.2)
    assert tracker.stable_sequence < 5
    tracker.observe_renewal(2, renewal(2, 5, 10.3))
    tracker.advance(10.3)
    assert tracker.stable_sequence == 5
    assert tracker.pending_sequence(("key", "a")) == 0


def test_a_silent_partition_holds_a_mutation_until_its_lease_has_run_out() -> None:
    """G2, the waiting rule: silence costs T x (1 + rate error) + margin after its last renewal."""
    tracker = FreshnessTracker(0)
    tracker.observe_renewal(1, renewal(1, 4, 10.0))
    tracker.applied(5, (("key", "a"),), 11.0)
    # A later renewal that does not show the sequence gives no longer hold, and releases nothing.
    tracker.observe_renewal(1, renewal(2, 4, 12.0))
    assert not tracker.advance(10.0 + WAIT_SECONDS - 0.001)
    assert tracker.next_release() == pytest.approx(10.0 + WAIT_SECONDS)
    assert tracker.advance(10.0 + WAIT_SECONDS)
    assert tracker.stable_sequence == 5


def test_an_exit_notice_skips_the_wait_for_that_incarnation_only() -> None:
    tracker = FreshnessTracker(0)
    tracker.observe_renewal(1, renewal(1, 4, 10.0, incarnation=7))
    tracker.applied(5, (), 11.0)
    tracker.observe_exit(1, 6)
    tracker.observe_exit(1, 8)  # never seen: ignored
    assert not tracker.advance(11.0)
    tracker.observe_exit(1, 7)
    assert tracker.advance(11.0)
    tracker.observe_renewal(1, renewal(1, 5, 11.5, incarnation=8))
    tracker.applied(6, (), 11.6)
    assert not tracker.advance(11.7)


def test_surrendered_and_long_silent_partitions_are_not_awaited() -> None:
    tracker = FreshnessTracker(0)
    tracker.observe_renewal(1, renewal(1, 4, 10.0, surrendered=True))
    tracker.observe_renewal(2, renewal(1, 4, 10.0))
    tracker.applied(5, (), 20.0)
    assert tracker.stable_sequence == 5


def test_after_a_reload_everything_is_pending() -> None:
    """G2: what changed while the watch was broken is not known, so every record waits."""
    tracker = FreshnessTracker(0)
    tracker.observe_renewal(1, renewal(1, 4, 10.0))
    tracker.reset(9, 10.1)
    assert tracker.pending_sequence(("key", "never seen")) == 9
    tracker.observe_renewal(1, renewal(2, 9, 10.2))
    tracker.advance(10.2)
    assert tracker.pending_sequence(("key", "never seen")) == 0


def test_old_and_repeated_renewals_are_no_news() -> None:
    tracker = FreshnessTracker(0)
    assert tracker.observe_renewal(1, renewal(5, 4, 10.0))
    assert not tracker.observe_renewal(1, renewal(5, 9, 11.0))
    assert not tracker.observe_renewal(1, renewal(4, 9, 11.0))
    assert tracker.observe_renewal(1, renewal(1, 4, 11.0, incarnation=2))


def test_the_clock_of_one_is_compared_with_the_median_of_three() -> None:
    assert clock_skew_seconds({0: 100.0, 1: 100.1, 2: 250.0}, 2) == pytest.approx(149.9)
    assert clock_skew_seconds({0: 100.0, 1: 100.1, 2: 250.0}, 0) == pytest.approx(0.1)
    assert clock_skew_seconds({0: 100.0, 2: 250.0}, 2) == 0.0


def test_the_newest_checkpoint_of_a_log_is_noted() -> None:
    """G7: an older one changes nothing; a log that was begun anew counts from 1 again."""
    state = State()
    for number, text in ((3, "one\n3"), (2, "one\n2"), (3, "one\n3"), (4, "one\n4"), (1, "two\n1")):
        before = state.get(checkpoint_name(1))
        run(state, NoteCheckpoint(1, number, text))
        noted = state.get(checkpoint_name(1))
        assert isinstance(noted, CheckpointRecord)
        newer = before is None or text in {"one\n4", "two\n1"}
        assert (noted.checkpoint == text) if newer else (noted is before)
    assert state.get(checkpoint_name(0)) is None


def test_what_is_kept_of_a_log_is_noted_and_never_taken_back() -> None:
    """G7: by a note of another checkpoint neither; a log that was begun anew is whole again."""
    state = State()
    noted = []
    for command in (
        NoteCheckpoint(1, 3, "one\n3"),
        NoteCheckpoint(1, 3, "one\n3", 70, 2),
        NoteCheckpoint(1, 2, "one\n2", 90, 3),
        NoteCheckpoint(1, 4, "one\n4"),
        NoteCheckpoint(1, 4, "one\n4", 80, 3),
        NoteCheckpoint(1, 1, "two\n1"),
    ):
        run(state, command)
        record = state.get(checkpoint_name(1))
        assert isinstance(record, CheckpointRecord)
        noted.append((record.number, record.first_record, record.first_checkpoint))
    assert noted == [(3, 0, 0), (3, 70, 2), (3, 90, 3), (4, 90, 3), (4, 90, 3), (1, 0, 0)]
