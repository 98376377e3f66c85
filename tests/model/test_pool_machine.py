"""A real pool against the reference model, each call on any partition (G2: one pool, not three)."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from hsm_pool.client import calls
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2
from tests.model.reference import Policy, ReferencePool, Refused, Version
from tests.running_pool import RunningPool

pytestmark = pytest.mark.pool

DIGEST = hashlib.sha256(b"to be signed").digest()
UNKNOWN_VERSION = "f" * 32
PAST = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp()) * 1000
FUTURE = int(datetime(2200, 1, 1, tzinfo=UTC).timestamp()) * 1000

DAY_MS = 24 * 3600 * 1000
EC_OPERATIONS = frozenset({"SIGN", "VERIFY"})
OCT_OPERATIONS = frozenset({"ENCRYPT", "DECRYPT", "WRAP_KEY", "UNWRAP_KEY"})

keys = st.sampled_from(["a", "b"])
partitions = st.integers(0, 2)
times = st.sampled_from([0, 0, 0, PAST, FUTURE])
tag_sets = st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(["", "1"]), max_size=2)
positions = st.integers(0, 3)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def moment(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def numbers(operations: frozenset[str]) -> list[keys_pb2.KeyOperation.ValueType]:
    return [keys_pb2.KeyOperation.Value(f"KEY_OPERATION_{name}") for name in sorted(operations)]


def as_reference(key: keys_pb2.Key) -> Version:
    operations = (keys_pb2.KeyOperation.Name(o).removeprefix("KEY_OPERATION_") for o in key.key_operations)
    attributes = key.attributes
    return Version(
        key.name.rpartition("/")[2],
        frozenset(operations),
        attributes.enabled,
        attributes.not_before.ToMilliseconds(),
        attributes.expires.ToMilliseconds(),
        dict(key.tags),
    )


class PoolMachine(RuleBasedStateMachine):
    """The same story told to a pool, each sentence to another partition, and to the reference."""

    clients: ClassVar[list[Pool]] = []

    @initialize()
    def begin(self) -> None:
        self.prefix = f"m{uuid.uuid4().hex[:12]}-"
        self.reference = ReferencePool()
        self.types: dict[str, bool] = {}
        """Whether a version is an EC key, by its id."""
        # A story may go without a rule (swarm testing); without any key it would say little.
        for key, is_ec, tags in (("a", True, {"n": "1"}), ("a", False, {"n": "2"}), ("b", True, {})):
            self.make(0, key, tags, is_ec=is_ec)

    def name(self, key: str, version_id: str = "") -> str:
        return f"keys/{self.prefix}{key}" + (f"/versions/{version_id}" if version_id else "")

    def version_id(self, key: str, position: int) -> str:
        """Return a version of the key by position, "" for the newest, or one that it does not have."""
        known = list(self.reference.active.get(key, {}))
        return ["", *known, UNKNOWN_VERSION][position % (len(known) + 2)]

    def both(self, real: Callable[[], Any], model: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Let both answer: the same refusal, or (answer, the model's answer); the model sees the answer."""
        answer, reason, wanted, modelled = None, "", "", None
        try:
            answer = real()
        except MHSMError as error:
            reason = error.reason
        try:
            modelled = model(answer)
        except Refused as refused:
            wanted = refused.reason
        assert reason == wanted
        return answer, modelled

    # -- mutations -----------------------------------------------------------------------

    @rule(
        partition=partitions,
        key=keys,
        is_ec=st.booleans(),
        data=st.data(),
        enabled=st.booleans(),
        not_before_ms=times,
        expires_ms=times,
        tags=tag_sets,
        must_not_exist=st.booleans(),
    )
    def create(
        self,
        partition: int,
        key: str,
        is_ec: bool,
        data: st.DataObject,
        enabled: bool,
        not_before_ms: int,
        expires_ms: int,
        tags: dict[str, str],
        must_not_exist: bool,
    ) -> None:
        allowed = EC_OPERATIONS if is_ec else OCT_OPERATIONS
        operations = data.draw(st.frozensets(st.sampled_from(sorted(allowed))))
        wanted = Version("", operations, enabled, not_before_ms, expires_ms, dict(tags))
        self.make(partition, key, tags, is_ec=is_ec, wanted=wanted, must_not_exist=must_not_exist)

    def make(
        self,
        partition: int,
        key: str,
        tags: dict[str, str],
        *,
        is_ec: bool,
        wanted: Version | None = None,
        must_not_exist: bool = False,
    ) -> None:
        """Create a version; without operations it has all that fit its type."""
        wanted = wanted or Version("", frozenset(), tags=tags)
        kind: dict[str, Any] = (
            {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
            if is_ec
            else {"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": 256}
        )

        def model(answer: keys_pb2.Key | None) -> Version:
            version_id = answer.name.rpartition("/")[2] if answer else "refused"
            operations = wanted.operations or (EC_OPERATIONS if is_ec else OCT_OPERATIONS)
            version = replace(wanted, version_id=version_id, operations=operations)
            now_ms = answer.attributes.created.ToMilliseconds() if answer else 0
            return self.reference.create(key, version, must_not_exist=must_not_exist, now_ms=now_ms)

        answer, modelled = self.both(
            lambda: self.clients[partition].create_key(
                self.prefix + key,
                **kind,
                key_operations=numbers(wanted.operations),
                key_attributes=calls.attributes(
                    enabled=wanted.enabled,
                    not_before=moment(wanted.not_before_ms),
                    expires=moment(wanted.expires_ms),
                ),
                tags=tags,
                must_not_exist=must_not_exist,
            ),
            model,
        )
        if answer:
            assert as_reference(answer) == modelled
            assert modelled.version_id not in self.types
            self.types[modelled.version_id] = is_ec

    @rule(
        partition=partitions,
        key=keys,
        position=positions,
        enabled=optional(st.booleans()),
        not_before_ms=optional(times),
        expires_ms=optional(times),
        tags=optional(tag_sets),
        operations=st.booleans(),
        data=st.data(),
    )
    def update(
        self,
        partition: int,
        key: str,
        position: int,
        enabled: bool | None,
        not_before_ms: int | None,
        expires_ms: int | None,
        tags: dict[str, str] | None,
        operations: bool,
        data: st.DataObject,
    ) -> None:
        version_id = self.version_id(key, position)
        given: dict[str, Any] = {
            "enabled": enabled,
            "not_before_ms": not_before_ms,
            "expires_ms": expires_ms,
            "tags": tags,
        }
        if operations:
            newest = version_id or next(reversed(self.reference.active.get(key, {"": None})))
            allowed = EC_OPERATIONS if self.types.get(newest, True) else OCT_OPERATIONS
            given["operations"] = data.draw(st.frozensets(st.sampled_from(sorted(allowed)), min_size=1))
        changes = {name: value for name, value in given.items() if value is not None}
        attributes = calls.attributes(
            enabled=enabled, not_before=moment(not_before_ms), expires=moment(expires_ms)
        )
        answer, modelled = self.both(
            lambda: self.clients[partition].update_key(
                self.name(key, version_id),
                key_attributes=attributes,
                key_operations=numbers(changes.get("operations", frozenset())),
                tags=tags,
                clear_not_before=not_before_ms == 0,
                clear_expires=expires_ms == 0,
            ),
            lambda _: self.reference.update(key, version_id, **changes),
        )
        if answer:
            assert as_reference(answer) == modelled

    @rule(partition=partitions, key=keys, lasting=st.booleans())
    def set_policy(self, partition: int, key: str, lasting: bool) -> None:
        self.both(
            lambda: self.clients[partition].update_key_rotation_policy(
                self.name(key), expiry_time="P90D" if lasting else ""
            ),
            lambda _: self.reference.set_policy(key, Policy(life_ms=90 * DAY_MS) if lasting else None),
        )

    @rule(partition=partitions, key=keys)
    def rotate(self, partition: int, key: str) -> None:
        newest = next(reversed(self.reference.active.get(key, {"": None})))

        def model(answer: keys_pb2.Key | None) -> Version:
            made_ms = answer.attributes.created.ToMilliseconds() if answer else 0
            return self.reference.rotate(
                key, as_reference(answer).version_id if answer else "refused", made_ms
            )

        answer, modelled = self.both(lambda: self.clients[partition].rotate_key(self.name(key)), model)
        if answer:
            assert as_reference(answer) == modelled
            self.types[modelled.version_id] = self.types[newest]

    @rule(partition=partitions, key=keys)
    def delete(self, partition: int, key: str) -> None:
        self.both(
            lambda: self.clients[partition].delete_key(self.name(key)), lambda _: self.reference.delete(key)
        )

    @rule(partition=partitions, other=partitions, key=keys)
    def delete_and_recover(self, partition: int, other: int, key: str) -> None:
        """Whatever there was of the key is there again, on another partition."""
        self.delete(partition, key)
        self.recover(other, key)
        self.list_versions(partition, key)

    @rule(partition=partitions, other=partitions, key=keys)
    def delete_and_purge(self, partition: int, other: int, key: str) -> None:
        """Nothing is left, and a key of that name has no past."""
        self.delete(partition, key)
        self.purge(other, key)
        self.list_versions(partition, key)

    @rule(partition=partitions, key=keys)
    def recover(self, partition: int, key: str) -> None:
        answer, modelled = self.both(
            lambda: self.clients[partition].recover_deleted_key(self.name(key)),
            lambda _: self.reference.recover(key),
        )
        if answer:
            assert as_reference(answer) == modelled

    @rule(partition=partitions, key=keys)
    def purge(self, partition: int, key: str) -> None:
        self.both(
            lambda: self.clients[partition].purge_deleted_key(self.name(key)),
            lambda _: self.reference.purge(key),
        )

    # -- looking -------------------------------------------------------------------------

    @rule(partition=partitions, key=keys, position=positions)
    def get(self, partition: int, key: str, position: int) -> None:
        version_id = self.version_id(key, position)
        answer, modelled = self.both(
            lambda: self.clients[partition].get_key(self.name(key, version_id)),
            lambda _: self.reference.find(key, version_id),
        )
        if answer:
            assert as_reference(answer) == modelled

    @rule(partition=partitions, key=keys)
    def list_versions(self, partition: int, key: str) -> None:
        answer, modelled = self.both(
            lambda: list(self.clients[partition].list_key_versions(self.name(key), page_size=2)),
            lambda _: self.reference.versions(key),
        )
        if answer:
            assert [as_reference(version) for version in answer] == list(modelled.values())

    @rule(partition=partitions)
    def list_all(self, partition: int) -> None:
        """Both lists, by name, with the newest version of each key."""
        client = self.clients[partition]
        listed = [key for key in client.list_keys() if self.prefix in key.name]
        deleted = [entry.key for entry in client.list_deleted_keys() if self.prefix in entry.key.name]
        for found, kept in ((listed, self.reference.active), (deleted, self.reference.deleted)):
            assert [key.name.split("/")[1] for key in found] == [self.prefix + name for name in sorted(kept)]
            for key, name in zip(found, sorted(kept), strict=True):
                assert as_reference(key) == list(kept[name].values())[-1]

    def teardown(self) -> None:
        """At the end of a story every partition tells the same."""
        for partition in range(3):
            self.list_all(partition)
            for key in ("a", "b"):
                self.list_versions(partition, key)

    @rule(
        partition=partitions,
        other=partitions,
        key=keys,
        position=positions,
        operation=st.sampled_from(sorted(EC_OPERATIONS | OCT_OPERATIONS)),
    )
    def use(self, partition: int, other: int, key: str, position: int, operation: str) -> None:
        """Use a version on one partition; whatever it made is taken back on another, if that is allowed."""
        version_id = self.version_id(key, position)
        name, now_ms = self.name(key, version_id), time.time_ns() // 1_000_000
        answer, used = self.both(
            lambda: operate(self.clients[partition], name, operation, b""),
            lambda _: self.reference.use(key, operation, now_ms, version_id),
        )
        inverse = {"SIGN": "VERIFY", "ENCRYPT": "DECRYPT", "WRAP_KEY": "UNWRAP_KEY"}.get(operation)
        if answer is not None and inverse:
            versioned = self.name(key, used.version_id)
            taken, _ = self.both(
                lambda: operate(self.clients[other], versioned, inverse, answer),
                lambda _: self.reference.use(key, inverse, now_ms, used.version_id),
            )
            assert taken in {None, True}


class NotTheirs(Exception):
    """The pool took something for a key's work that is not."""


def operate(client: Pool, name: str, operation: str, made: Any) -> Any:
    """Do an operation; without something made before, a failed inverse counts as done."""
    match operation:
        case "SIGN":
            return client.sign(name, "ES256", DIGEST)
        case "VERIFY":
            return _judged(client.verify_batch(name, "ES256", [(DIGEST, made)]) == [True], made)
        case "ENCRYPT":
            return client.encrypt(name, "A256GCM", DIGEST, b"data")
        case "WRAP_KEY":
            return client.wrap_key(name, "A256KW", DIGEST)
    try:
        if operation == "DECRYPT":
            done = client.decrypt(name, "A256GCM", made or crypto_pb2.Ciphertext(ciphertext=b"nothing"))
        else:
            done = client.unwrap_key(name, "A256KW", made or b"nothing")
    except MHSMError as error:
        if error.reason != "DECRYPTION_FAILED":
            raise
        return _judged(correct=False, made=made)
    return _judged(done == DIGEST, made)


def _judged(correct: bool, made: Any) -> bool:
    """What was made by the key must be right; nothing at all must be wrong."""
    if correct != bool(made):
        raise NotTheirs
    return True


def test_a_pool_answers_as_the_reference(pool: RunningPool, full: bool, seed: int) -> None:
    """G2, G8: 15 stories of up to 25 calls (60 of 40 with --full), each call on any partition."""
    clients = [pool.client(partition=index, timeout_seconds=20) for index in range(3)]

    class Machine(PoolMachine):
        pass

    Machine.clients = clients
    chosen = settings(
        max_examples=60 if full else 15,
        stateful_step_count=40 if full else 25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seeded(seed)(Machine), settings=chosen)
    finally:
        for client in clients:
            client.close()
    pool.await_states(["SERVING"] * 3)
