"""Rotation and purge that come due, as the core decides them: exactly once, and never early (G1)."""

from __future__ import annotations

import uuid
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool import errors, limits
from hsm_pool.core import lifecycle, rotation
from hsm_pool.core.commands import (
    Command,
    DeleteKey,
    PurgeDeletedKey,
    PurgeDueKey,
    RecoverDeletedKey,
    RotateKey,
    UpdateKeyVersion,
    UpdateRotationPolicy,
)
from hsm_pool.core.freshness import agreed_clock_offset
from hsm_pool.core.model import (
    POOL,
    RESTORE,
    Curve,
    KeyRecord,
    KeyReleasePolicy,
    KeyType,
    KeyVersionRecord,
    PoolRecord,
    RestorePhase,
    RestoreRecord,
    RotationPolicy,
    SealedMaterial,
    key_name,
)
from hsm_pool.core.rotation import DAY_MS, PurgeDue, RotationDue
from hsm_pool.core.state import State
from hsm_pool.net.key_service import KeyService
from hsm_pool.store import codec
from hsm_pool.store.replica import boot_time
from mhsm.keys.v1 import keys_pb2
from tests.unit.served import Served, called_by
from tests.unit.test_core import create, run

START_MS = 1_000
RELEASE_POLICY = b'{"version":"1.0.0","anyOf":[{"authority":"a","allOf":[{"claim":"c","equals":1}]}]}'


def rotate(key_id: str, version: int, time_ms: int, replaces: str = "", **changes: object) -> RotateKey:
    fields: dict[str, object] = {
        "time_ms": time_ms,
        "key_id": key_id,
        "version_id": f"{version:032x}",
        "key_type": KeyType.EC,
        "curve": Curve.P256,
        "size_bits": 256,
        "public_key_der": b"another",
        "sealed_material": SealedMaterial(1, b"m" * 12, b"d" * 32),
        "replaces": replaces,
    }
    return RotateKey(**{**fields, **changes})  # type: ignore[arg-type]


def key_of(state: State, key_id: str = "a") -> KeyRecord:
    record = state.get(key_name(key_id))
    assert isinstance(record, KeyRecord)
    return record


def newest_of(state: State, key_id: str = "a") -> KeyVersionRecord:
    return lifecycle.version_of(state, key_of(state, key_id))


def with_policy(policy: RotationPolicy, **changes: object) -> State:
    state = State()
    run(state, create("a", 1, **changes))
    run(state, UpdateRotationPolicy(START_MS, "a", policy))
    return state


def due(state: State, now_ms: int) -> list[rotation.DueAction]:
    return rotation.due_work(state, now_ms)[0]


@pytest.mark.parametrize(
    ("text", "days"),
    [("P28D", 28), ("P2Y", 730), ("P18M", 540), ("P4W", 28), ("P1Y1M1W1D", 403), ("P36525D", 36_525)],
)
def test_durations_are_counted_in_days(text: str, days: int) -> None:
    assert rotation.duration_days(text, "field") == days


@pytest.mark.parametrize(
    "policy",
    [
        RotationPolicy(time_after_create="P28D"),
        RotationPolicy(expiry_time="P28D"),
        RotationPolicy(time_before_expiry="P62D", expiry_time="P90D"),
        RotationPolicy(time_after_create="P18M", expiry_time="P2Y"),
    ],
)
def test_a_policy_is_stored_as_it_was_written(policy: RotationPolicy) -> None:
    state = with_policy(policy)
    found = key_of(state).rotation_policy
    assert found == replace(policy, created_ms=START_MS, updated_ms=START_MS)
    assert codec.decode(*codec.encode(key_of(state))) == key_of(state)
    run(state, UpdateRotationPolicy(START_MS + 5, "a", RotationPolicy(time_after_create="P1Y")))
    changed = key_of(state).rotation_policy
    assert changed == RotationPolicy("P1Y", created_ms=START_MS, updated_ms=START_MS + 5)
    run(state, UpdateRotationPolicy(START_MS + 6, "a", RotationPolicy()))
    assert key_of(state).rotation_policy is None
    with pytest.raises(errors.RotationPolicyMissing):
        run(state, rotate("a", 2, START_MS + 7))


def test_a_policy_stays_with_its_key() -> None:
    """New versions, deletion and recovery keep it; the pool's own record keeps purge protection."""
    state = with_policy(RotationPolicy(time_after_create="P28D"))
    policy = key_of(state).rotation_policy
    run(state, create("a", 2))
    run(state, DeleteKey(START_MS, "a"))
    assert key_of(state).rotation_policy == policy
    run(state, RecoverDeletedKey(START_MS, "a"))
    assert key_of(state).rotation_policy == policy
    pool = PoolRecord(7, purge_protection=True)
    assert codec.decode(*codec.encode(pool)) == pool


def test_a_rotated_key_has_the_same_parameters() -> None:
    """Kind, operations, tags and exportability; the expiry date is the policy's, not the old version's."""
    state = with_policy(
        RotationPolicy(expiry_time="P90D"),
        tags={"x": "1"},
        expires_ms=9_000,
        not_before_ms=5,
        exportable=True,
        release_policy=KeyReleasePolicy(RELEASE_POLICY),
    )
    old = newest_of(state)
    run(state, rotate("a", 2, 2_000))
    new = newest_of(state)
    assert key_of(state).version_ids == (old.version_id, new.version_id)
    assert (new.not_before_ms, new.expires_ms) == (0, 2_000 + 90 * DAY_MS)
    same = ("key_type", "curve", "size_bits", "key_operations", "enabled", "exportable", "tags")
    same += ("release_policy",)
    assert [getattr(new, name) for name in same] == [getattr(old, name) for name in same]
    assert new.public_key_der != old.public_key_der
    run(state, create("a", 3))
    assert newest_of(state).expires_ms == START_MS + 90 * DAY_MS, "the policy holds for every new version"
    run(state, create("a", 4, expires_ms=7_000))
    assert newest_of(state).expires_ms == 7_000, "unless it is given a date"


def test_a_disabled_key_is_not_switched_on_by_a_rotation() -> None:
    state = with_policy(RotationPolicy(time_after_create="P28D"))
    run(state, UpdateKeyVersion(START_MS, "a", enabled=False))
    assert due(state, START_MS + 365 * DAY_MS) == []
    run(state, rotate("a", 2, START_MS))
    assert not newest_of(state).enabled


def test_a_version_that_is_not_valid_yet_is_not_followed_by_one_that_is() -> None:
    """Its successor would be valid at once: a key in use before the date that its owner set."""
    begins_ms = START_MS + 40 * DAY_MS
    state = with_policy(RotationPolicy(time_after_create="P28D"), not_before_ms=begins_ms)
    for now_ms in (START_MS + 28 * DAY_MS, begins_ms - 1):
        assert due(state, now_ms) == []
    assert len(due(state, begins_ms)) == 1


def test_material_of_another_kind_is_refused() -> None:
    """G8: a key that got a version of another kind while the material was made."""
    state = with_policy(RotationPolicy(time_after_create="P28D"))
    before = key_of(state)
    with pytest.raises(errors.KeyChanged):
        run(state, rotate("a", 2, START_MS, key_type=KeyType.OCT, curve=Curve.NONE))
    assert key_of(state) == before


def test_a_key_has_at_most_a_hundred_versions_however_they_were_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "VERSIONS_PER_KEY_MAX", 2)
    state = with_policy(RotationPolicy(time_after_create="P28D"))
    run(state, rotate("a", 2, START_MS))
    assert due(state, START_MS + 365 * DAY_MS) == [], "a full key is not tried for ever"
    pool = state.pool()
    with monkeypatch.context() as more:
        more.setattr(limits, "VERSIONS_PER_KEY_MAX", 100)
        assert due(state, START_MS + 365 * DAY_MS)
        state.apply({POOL: replace(pool, versions_per_key_max=2)})
        assert due(state, START_MS + 365 * DAY_MS) == [], "nor one that is full by the pool's own bound"
    with pytest.raises(errors.LimitExceeded):
        run(state, rotate("a", 3, START_MS))


def test_a_rotation_is_due_at_its_date_and_once() -> None:
    """G1: two holders of the housekeeping role find the same work; one does it, the other is refused."""
    state = with_policy(RotationPolicy(time_after_create="P28D"))
    at_ms = START_MS + 28 * DAY_MS
    assert due(state, at_ms - 1) == []
    (first,) = due(state, at_ms)
    assert isinstance(first, RotationDue)
    replaces = first.newest.version_id
    run(state, rotate("a", 2, at_ms, replaces))
    assert newest_of(state).created_ms == at_ms
    with pytest.raises(errors.KeyChanged):
        run(state, rotate("a", 3, at_ms, replaces))
    assert len(key_of(state).version_ids) == 2
    assert due(state, at_ms) == []
    assert len(due(state, at_ms + 28 * DAY_MS)) == 1


def test_a_rotation_found_due_under_an_old_policy_is_refused() -> None:
    state = with_policy(RotationPolicy(time_after_create="P28D"))
    at_ms = START_MS + 28 * DAY_MS
    (found,) = due(state, at_ms)
    assert isinstance(found, RotationDue)
    run(state, UpdateRotationPolicy(START_MS, "a", RotationPolicy(time_after_create="P29D")))
    with pytest.raises(errors.KeyChanged):
        run(state, rotate("a", 2, at_ms, found.newest.version_id))
    run(state, UpdateRotationPolicy(START_MS, "a", RotationPolicy()))
    with pytest.raises(errors.RotationPolicyMissing):
        run(state, rotate("a", 2, at_ms, found.newest.version_id))
    run(state, DeleteKey(START_MS, "a"))
    with pytest.raises(errors.KeySoftDeleted):
        run(state, rotate("a", 2, at_ms, found.newest.version_id))


def test_a_rotation_before_expiry_needs_a_version_that_expires() -> None:
    state = with_policy(RotationPolicy(time_before_expiry="P30D", expiry_time="P90D"))
    assert due(state, START_MS + 365 * DAY_MS) == [], "the first version has no date"
    run(state, rotate("a", 2, START_MS))
    assert due(state, START_MS + 60 * DAY_MS - 1) == []
    assert len(due(state, START_MS + 60 * DAY_MS)) == 1


def test_a_deleted_key_is_purged_at_its_date_and_a_recovered_one_never() -> None:
    state = State()
    run(state, create("a", 1))
    run(state, DeleteKey(START_MS, "a"))
    at_ms = START_MS + 90 * DAY_MS
    assert due(state, at_ms - 1) == []
    with pytest.raises(errors.KeyChanged):
        run(state, PurgeDueKey(at_ms - 1, "a"))
    assert due(state, at_ms) == [PurgeDue("a")]
    run(state, RecoverDeletedKey(at_ms, "a"))
    with pytest.raises(errors.DeletedKeyNotFound):
        run(state, PurgeDueKey(at_ms, "a"))
    run(state, DeleteKey(at_ms, "a"))
    with pytest.raises(errors.KeyChanged):
        run(state, PurgeDueKey(at_ms, "a"))  # deleted anew, it has another date
    run(state, PurgeDueKey(at_ms + 90 * DAY_MS, "a"))
    assert state.names() == []
    with pytest.raises(errors.DeletedKeyNotFound):
        run(state, PurgeDueKey(at_ms + 90 * DAY_MS, "a"))


def test_purge_protection_refuses_a_purge_before_the_date() -> None:
    state = State([(POOL, PoolRecord(7, purge_protection=True))])
    run(state, create("a", 1))
    run(state, DeleteKey(START_MS, "a"))
    at_ms = START_MS + 7 * DAY_MS
    for time_ms in (0, START_MS, at_ms - 1):
        with pytest.raises(errors.PurgeProtected):
            run(state, PurgeDeletedKey(time_ms, "a"))
    assert key_of(state).deleted
    run(state, PurgeDeletedKey(at_ms, "a"))
    assert state.names() == [POOL]


def test_a_protected_purge_waits_for_a_time_that_a_majority_agrees_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The own clock alone never brings the date: it may be the wrong one of three."""
    served = Served()
    served.give("client/somebody", "Crypto Officer", "/")
    served.replica.state.apply({POOL: PoolRecord(7, purge_protection=True)})
    served.do(create("a", 1))
    at_ms = served.do(DeleteKey(START_MS, "a")).key.scheduled_purge_time_ms
    assert served.serving.now_ms() > at_ms, "the own clock is far beyond the date"
    called_by(monkeypatch, "client/somebody", "/mhsm.keys.v1.KeyService/PurgeDeletedKey")
    partition: Any = SimpleNamespace(serving=lambda: served.serving)
    service = KeyService(partition, *(cast("Any", None),) * 3)
    context: Any = SimpleNamespace(time_remaining=lambda: None)
    request = keys_pb2.PurgeDeletedKeyRequest(name="keys/a", request_id=str(uuid.UUID(int=4)))

    def hear(*clocks_ms: int) -> None:
        now = boot_time()
        served.replica._clocks = {
            index: (clock_ms / 1000 - now, now) for index, clock_ms in enumerate(clocks_ms)
        }

    for clocks_ms in ((), (2 * at_ms,), (at_ms - 60_000, at_ms - 60_000, 2 * at_ms)):
        hear(*clocks_ms)
        with pytest.raises(errors.PurgeProtected):
            service.PurgeDeletedKey(request, context)
    hear(at_ms + 60_000, at_ms - 60_000, at_ms + 60_000)
    service.PurgeDeletedKey(request, context)
    assert served.replica.state.get(key_name("a")) is None


def test_nothing_is_due_while_the_pool_is_restored() -> None:
    state = with_policy(RotationPolicy(time_after_create="P28D"))
    late_ms = START_MS + 365 * DAY_MS
    state.apply({RESTORE: RestoreRecord("0" * 32, RestorePhase.STAGING, b"", 1)})
    assert due(state, late_ms) == []
    state.apply({RESTORE: RestoreRecord("0" * 32, RestorePhase.DONE, b"", 1)})
    assert len(due(state, late_ms)) == 1


def test_a_pass_is_bounded_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bounds, passes one after the other find every due key once."""
    monkeypatch.setattr(limits, "DUE_KEYS_PER_PASS", 5)
    monkeypatch.setattr(limits, "DUE_ACTIONS_PER_PASS", 2)
    state = State()
    for number in range(13):
        run(state, create(f"key-{number:02}", number))
        if number % 3 == 0 or number in {4, 5}:
            run(state, DeleteKey(START_MS, f"key-{number:02}"))
    found: list[str] = []
    position = ""
    for _ in range(20):
        actions, position = rotation.due_work(state, START_MS + 90 * DAY_MS, position)
        assert len(actions) <= 2
        found += [action.key_id for action in actions]
        if not position:
            break
    assert found == [f"key-{number:02}" for number in (0, 3, 4, 5, 6, 9, 12)]


jumps = st.lists(st.integers(-40 * DAY_MS, 60 * DAY_MS), max_size=12)


@given(
    jumps=jumps,
    after=st.sampled_from(["P28D", "P1M", "P90D"]),
    holders=st.integers(1, 3),
    deleted=st.booleans(),
)
def test_whatever_the_clock_does_a_rotation_follows_its_version_by_the_policys_time(
    jumps: list[int], after: str, holders: int, deleted: bool
) -> None:
    """Several holders act on what one look found, the clock jumps to and fro: the dates hold, each once."""
    state = with_policy(RotationPolicy(time_after_create=after))
    run(state, create("b", 1))
    if deleted:
        run(state, DeleteKey(START_MS, "b"))
    now_ms, made = START_MS, 1
    for jump in jumps:
        now_ms = max(0, now_ms + jump)
        actions = due(state, now_ms)
        for action in actions * holders:
            made += 1
            command: Command = (
                PurgeDueKey(now_ms, action.key_id)
                if isinstance(action, PurgeDue)
                else rotate(action.key_id, made, now_ms, action.newest.version_id)
            )
            try:
                run(state, command)
            except (errors.KeyChanged, errors.DeletedKeyNotFound):
                continue
        assert due(state, now_ms) == []
    key = key_of(state)
    created = [lifecycle.version_of(state, key, version_id).created_ms for version_id in key.version_ids]
    wait_ms = rotation.duration_days(after, "field") * DAY_MS
    assert all(later - earlier >= wait_ms for earlier, later in pairwise(created))
    reached = max([START_MS, *_times(jumps)])
    assert (state.get(key_name("b")) is None) == (deleted and reached >= START_MS + 90 * DAY_MS)


def _times(jumps: list[int]) -> list[int]:
    times, now_ms = [], START_MS
    for jump in jumps:
        now_ms = max(0, now_ms + jump)
        times.append(now_ms)
    return times


@given(true=st.floats(0, 1e9), wrong=st.floats(-1e9, 1e9), index=st.integers(0, 2))
def test_one_wrong_clock_never_brings_a_date_forward(true: float, wrong: float, index: int) -> None:
    """The agreed time is that of the two right ones, or behind it if one of them is not heard of."""
    offsets = dict.fromkeys(range(3), true) | {index: true + wrong}
    assert agreed_clock_offset(offsets, 3) == true
    del offsets[(index + 1) % 3]
    agreed = agreed_clock_offset(offsets, 3)
    assert agreed is not None
    assert agreed <= true
    del offsets[(index + 2) % 3]
    assert agreed_clock_offset(offsets, 3) is None, "one clock alone decides nothing"
    assert agreed_clock_offset({}, 3) is None
