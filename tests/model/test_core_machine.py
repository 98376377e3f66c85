"""The pure core against the reference model, command by command (G2, G8)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hsm_pool import limits
from hsm_pool.core import key_use, lifecycle, requests, rotation
from hsm_pool.core.commands import (
    Command,
    CreateKeyVersion,
    DeleteKey,
    DrainPartition,
    PurgeDeletedKey,
    PurgeDueKey,
    RecoverDeletedKey,
    ResumePartition,
    RotateKey,
    UpdateKeyVersion,
    UpdateRotationPolicy,
)
from hsm_pool.core.model import (
    POOL,
    Curve,
    KeyOperation,
    KeyRecord,
    KeyType,
    KeyVersionRecord,
    PoolRecord,
    RecordName,
    RequestRecord,
    RotationPolicy,
    SealedMaterial,
    key_name,
    request_name,
    version_name,
)
from hsm_pool.core.state import Overlay, State
from hsm_pool.errors import MHSMError
from tests.model.reference import Policy, ReferencePool, Refused, Version

KEYS_MAX = 4
VERSIONS_MAX = 3
DAY_MS = 24 * 3600 * 1000
UNKNOWN_VERSION = "f" * 32
RETENTION_DAYS = 7
POLICIES: dict[RotationPolicy, Policy | None] = {
    RotationPolicy(): None,
    RotationPolicy(time_after_create="P28D"): Policy(after_ms=28 * DAY_MS),
    RotationPolicy(time_after_create="P30D", expiry_time="P28D"): Policy(30 * DAY_MS, 0, 28 * DAY_MS),
    RotationPolicy(time_before_expiry="P2D", expiry_time="P30D"): Policy(0, 2 * DAY_MS, 30 * DAY_MS),
    RotationPolicy(expiry_time="P90D"): Policy(life_ms=90 * DAY_MS),
}

keys = st.sampled_from(["a", "a", "b", "D", "e-1"])
times = st.sampled_from([0, 0, 0, 0, 500, 1_000, 1_500, 2_000, 2_500])
MOMENTS = (1, 499, 500, 501, 999, 1_000, 1_001, 1_500, 2_000, 2_001, 2_499, 2_500, 3_000)
_BY_THEMSELVES = {KeyOperation.IMPORT, KeyOperation.SECURE_WRAP_KEY, KeyOperation.SECURE_UNWRAP_KEY}
USES = tuple(operation for operation in KeyOperation if operation not in _BY_THEMSELVES)
operation_sets = st.frozensets(st.sampled_from([o.name for o in USES]), min_size=1)
tag_sets = st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(["", "1"]), max_size=2)
positions = st.integers(0, VERSIONS_MAX + 1)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


class CoreMachine(RuleBasedStateMachine):
    """Decides as the committer does: commands on an overlay, applied together later."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.overlay = Overlay(self.state)
        self.begin_pool(protected=False)
        self.made = 0
        self.now_ms = 1
        self.answers: dict[bytes, tuple[bytes, Command, int]] = {}

    def begin_pool(self, *, protected: bool) -> None:
        """Begin with an empty pool."""
        self.state.apply({POOL: PoolRecord(RETENTION_DAYS, purge_protection=protected)})
        self.reference = ReferencePool(
            KEYS_MAX, VERSIONS_MAX, retention_ms=RETENTION_DAYS * DAY_MS, protected=protected
        )

    @initialize(protected=st.booleans())
    def begin(self, protected: bool) -> None:
        """A story may go without a rule (swarm testing); without any key it would say little."""
        self.begin_pool(protected=protected)
        every = frozenset(operation.name for operation in USES)
        for key in ("a", "a", "b"):
            self.create(key, every, True, 0, 0, {"made": "first"}, False)

    # -- both sides ----------------------------------------------------------------------

    def both(self, command: Command, model: Callable[[], object]) -> lifecycle.Outcome | None:
        """Let both decide; the same refusal or none, and a refusal changes nothing."""
        changes_before = dict(self.overlay.changes)
        scratch = Overlay(self.overlay)
        reason = wanted = ""
        outcome = None
        try:
            outcome = lifecycle.apply(command, scratch)
        except MHSMError as error:
            reason = error.reason
        try:
            model()
        except Refused as refused:
            wanted = refused.reason
        assert reason == wanted, command
        assert self.overlay.changes == changes_before
        if outcome is None:
            return None
        self.overlay.put(outcome.changes)
        self._remember(command)
        return outcome

    def _remember(self, command: Command) -> None:
        """Keep the answer under a request id, as the committer does in the same transaction."""
        request_key = len(self.answers).to_bytes(4, "big")
        digest = repr(command).encode()
        record = RequestRecord(request_key, digest, b"reply" + request_key, self.now_ms)
        self.overlay.put(requests.remember(self.overlay, record, room=16))
        self.answers[request_key] = (digest, command, self.now_ms)

    def version_id(self, key: str, position: int) -> str:
        """Return a version of the key by position, "" for the newest, or one that it does not have."""
        known = list(self.reference.active.get(key, {}))
        return ["", *known, UNKNOWN_VERSION][position % (len(known) + 2)]

    # -- commands ------------------------------------------------------------------------

    @rule(
        key=keys,
        operations=operation_sets,
        enabled=st.booleans(),
        not_before_ms=times,
        expires_ms=times,
        tags=tag_sets,
        must_not_exist=st.booleans(),
    )
    def create(
        self,
        key: str,
        operations: frozenset[str],
        enabled: bool,
        not_before_ms: int,
        expires_ms: int,
        tags: dict[str, str],
        must_not_exist: bool,
    ) -> None:
        self.made += 1
        version_id = f"{self.made:032x}"
        command = CreateKeyVersion(
            time_ms=self.now_ms,
            key_id=key,
            version_id=version_id,
            key_type=KeyType.OCT,
            curve=Curve.NONE,
            size_bits=128,
            public_key_der=b"",
            sealed_material=SealedMaterial(1, version_id[:12].encode(), b"sealed"),
            key_operations=tuple(o for o in KeyOperation if o.name in operations),
            enabled=enabled,
            not_before_ms=not_before_ms,
            expires_ms=expires_ms,
            tags=tags,
            must_not_exist=must_not_exist,
        )
        version = Version(version_id, operations, enabled, not_before_ms, expires_ms, dict(tags))
        self.both(
            command,
            lambda: self.reference.create(key, version, must_not_exist=must_not_exist, now_ms=self.now_ms),
        )

    @rule(
        key=keys,
        position=positions,
        enabled=optional(st.booleans()),
        not_before_ms=optional(times),
        expires_ms=optional(times),
        operations=optional(operation_sets),
        tags=optional(tag_sets),
    )
    def update(
        self,
        key: str,
        position: int,
        enabled: bool | None,
        not_before_ms: int | None,
        expires_ms: int | None,
        operations: frozenset[str] | None,
        tags: dict[str, str] | None,
    ) -> None:
        version_id = self.version_id(key, position)
        command = UpdateKeyVersion(
            time_ms=self.now_ms,
            key_id=key,
            version_id=version_id,
            enabled=enabled,
            not_before_ms=not_before_ms,
            expires_ms=expires_ms,
            key_operations=tuple(o for o in KeyOperation if o.name in operations) if operations else None,
            tags=tags,
        )
        given = {
            "enabled": enabled,
            "not_before_ms": not_before_ms,
            "expires_ms": expires_ms,
            "operations": operations,
            "tags": tags,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        self.both(command, lambda: self.reference.update(key, version_id, **changes))

    @rule(key=keys)
    def delete(self, key: str) -> None:
        outcome = self.both(DeleteKey(self.now_ms, key), lambda: self.reference.delete(key, self.now_ms))
        if outcome:
            record = outcome.changes[key_name(key)]
            assert isinstance(record, KeyRecord)
            assert record.scheduled_purge_time_ms - record.deleted_time_ms == RETENTION_DAYS * DAY_MS

    @rule(key=keys)
    def recover(self, key: str) -> None:
        self.both(RecoverDeletedKey(self.now_ms, key), lambda: self.reference.recover(key))

    @rule(key=keys)
    def purge(self, key: str) -> None:
        self.both(PurgeDeletedKey(self.now_ms, key), lambda: self.reference.purge(key, self.now_ms))

    @rule(key=keys, policy=st.sampled_from(list(POLICIES)))
    def set_policy(self, key: str, policy: RotationPolicy) -> None:
        command = UpdateRotationPolicy(self.now_ms, key, policy)
        self.both(command, lambda: self.reference.set_policy(key, POLICIES[policy]))

    @rule(key=keys)
    def rotate(self, key: str) -> None:
        command = self.rotation(key)
        self.both(command, lambda: self.reference.rotate(key, command.version_id, self.now_ms))

    def rotation(self, key: str, replaces: str = "") -> RotateKey:
        self.made += 1
        version_id = f"{self.made:032x}"
        sealed = SealedMaterial(1, version_id[:12].encode(), b"sealed")
        return RotateKey(
            self.now_ms, key, version_id, KeyType.OCT, Curve.NONE, 128, b"", sealed, replaces=replaces
        )

    @rule(holders=st.integers(1, 3), until=st.sampled_from([0, 1, 2, 100]))
    def keep_house(self, holders: int, until: int) -> None:
        """All that is due and nothing else, once, though several find it; perhaps the first ones only."""
        self.commit()
        actions, position = rotation.due_work(self.state, self.now_ms)
        assert position == ""
        assert {action.key_id for action in actions} == self.reference.due(self.now_ms)
        for action in actions[:until]:
            done = 0
            for _ in range(holders):
                if isinstance(action, rotation.PurgeDue):
                    purge = partial(self.reference.purge, action.key_id, self.now_ms)
                    done += self.wanted(PurgeDueKey(self.now_ms, action.key_id), purge)
                else:
                    command = self.rotation(action.key_id, action.newest.version_id)
                    rotate = partial(self.reference.rotate, command.key_id, command.version_id, self.now_ms)
                    done += self.wanted(command, rotate)
            assert done == 1, action
        self.commit()

    def wanted(self, command: Command, model: Callable[[], object]) -> bool:
        """Let the core decide something due; the reference follows when it is done."""
        try:
            lifecycle.apply(command, Overlay(self.overlay))
        except MHSMError as error:
            assert error.reason in {"KEY_CHANGED", "DELETED_KEY_NOT_FOUND"}
            return False
        return self.both(command, model) is not None

    @rule(key=keys)
    def delete_and_recover(self, key: str) -> None:
        self.delete(key)
        self.recover(key)

    @rule(key=keys)
    def delete_and_purge(self, key: str) -> None:
        self.delete(key)
        self.purge(key)

    @rule(index=st.integers(0, 2), serving=st.frozensets(st.integers(0, 2), min_size=2))
    def drain(self, index: int, serving: frozenset[int]) -> None:
        command = DrainPartition(index, serving)
        self.both(command, lambda: self.reference.drain(index, set(serving)))

    @rule(index=st.integers(0, 2))
    def resume(self, index: int) -> None:
        self.both(ResumePartition(index, 1), lambda: self.reference.drained.discard(index))

    @rule()
    def commit(self) -> None:
        """Apply what was decided together."""
        self.state.apply(self.overlay.changes)
        self.overlay = Overlay(self.state)

    @rule(
        passed_ms=st.sampled_from(
            [1, 100, limits.REQUEST_RETENTION_MS + 1, 7 * DAY_MS - 1, 7 * DAY_MS, 28 * DAY_MS]
        )
    )
    def wait(self, passed_ms: int) -> None:
        self.now_ms += passed_ms

    # -- looking -------------------------------------------------------------------------

    @rule(key=keys, position=positions)
    def use(self, key: str, position: int) -> None:
        """Every operation at every moment around the bounds."""
        version_id = self.version_id(key, position)
        for operation, now_ms in itertools.product(KeyOperation, MOMENTS):
            try:
                record = lifecycle.version_of(
                    self.overlay, lifecycle.active_key(self.overlay, key), version_id
                )
                key_use.check_use(record, operation, now_ms)
                seen = record.version_id
            except MHSMError as error:
                seen = error.reason
            try:
                wanted = self.reference.use(key, operation.name, now_ms, version_id).version_id
            except Refused as refused:
                wanted = refused.reason
            assert seen == wanted

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """A request id gives its first answer for 24 hours, and none to another request."""
        if not self.answers:
            return
        request_key = data.draw(st.sampled_from(list(self.answers)))
        digest, _, answered_ms = self.answers[request_key]
        if self.now_ms - answered_ms > limits.REQUEST_RETENTION_MS:
            return
        record = requests.answered_before(self.overlay, request_key, digest)
        assert record is not None
        assert record.reply == b"reply" + request_key
        with pytest.raises(MHSMError) as refused:
            requests.answered_before(self.overlay, request_key, digest + b"x")
        assert refused.value.reason == "REQUEST_ID_REUSED"

    @invariant()
    def the_records_are_those_of_the_reference(self) -> None:
        reference, view = self.reference, self.overlay
        everything = {**reference.active, **reference.deleted}
        assert view.key_count() == len(everything)
        for key, versions in everything.items():
            record = view.get(key_name(key))
            assert isinstance(record, KeyRecord)
            assert (record.deleted, list(record.version_ids)) == (key in reference.deleted, list(versions))
            for version in versions.values():
                found = view.get(version_name(key, version.version_id))
                assert isinstance(found, KeyVersionRecord)
                assert as_reference(found) == version
                assert found.sealed_material.nonce == version.version_id[:12].encode()
        assert lifecycle.pool_record(view).drained == reference.drained
        assert len(reference.drained) <= 1, "G5: never are two partitions drained"
        if not view.changes:
            self._check_committed(everything)

    def _check_committed(self, everything: dict[str, dict[str, Version]]) -> None:
        """After a commit: no record is left over, and the order of keys is that of their names."""
        wanted: set[RecordName] = {key_name(key) for key in everything}
        wanted |= {version_name(key, version) for key, versions in everything.items() for version in versions}
        kept = {request_name(key) for key in self.answers}
        left = set(self.state.names()) - wanted - {POOL}
        assert left <= kept, "a record is left over"
        assert wanted <= set(self.state.names())
        assert self.state.request_count() == len(left)
        assert self.state.key_ids_after("", 100) == sorted(everything)
        for position in ("B", "b", "z"):
            after = [key for key in sorted(everything) if key > position]
            assert self.state.key_ids_after(position, 2) == after[:2]


def as_reference(record: KeyVersionRecord) -> Version:
    return Version(
        record.version_id,
        frozenset(operation.name for operation in record.key_operations),
        record.enabled,
        record.not_before_ms,
        record.expires_ms,
        dict(record.tags),
    )


def test_the_core_decides_as_the_reference(full: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """G2, G8: 200 stories of up to 50 commands (1,000 with --full), with limits small enough to be met."""
    monkeypatch.setattr(limits, "KEYS_MAX", KEYS_MAX)
    monkeypatch.setattr(limits, "VERSIONS_PER_KEY_MAX", VERSIONS_MAX)
    chosen = settings(
        max_examples=1_000 if full else 200,
        stateful_step_count=50,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seeded(seed)(CoreMachine), settings=chosen)
