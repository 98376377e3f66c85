"""What happens to keys in a story: their life, their use and their release."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from hsm_pool.client import calls
from mhsm.keys.v1 import keys_pb2
from tests.model.pool_answers import METHOD_OF_OPERATION, as_reference, moment, numbers, operate
from tests.model.pool_story import DAY_MS, SOON, Story, callers, optional, partitions, positions
from tests.model.reference import Policy, ReleaseRule, Version

PAST = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp()) * 1000
FUTURE = int(datetime(2200, 1, 1, tzinfo=UTC).timestamp()) * 1000
EC_OPERATIONS = frozenset({"SIGN", "VERIFY"})
OCT_OPERATIONS = frozenset({"ENCRYPT", "DECRYPT", "WRAP_KEY", "UNWRAP_KEY"})
LEVELS = (1, 2)

keys = st.sampled_from(["a", "a", "b"])
times = st.sampled_from([0, 0, 0, PAST, SOON, FUTURE])
tag_sets = st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(["", "1"]), max_size=2)
release_rules = st.builds(ReleaseRule, st.sampled_from(LEVELS), st.sampled_from([False, False, True]))


class KeyRules(Story):
    """Rules about keys."""

    # -- keys ----------------------------------------------------------------------------

    @rule(
        who=callers,
        partition=partitions,
        key=keys,
        is_ec=st.booleans(),
        data=st.data(),
        enabled=st.booleans(),
        not_before_ms=times,
        expires_ms=times,
        tags=tag_sets,
        must_not_exist=st.booleans(),
        release=optional(release_rules),
    )
    def create(
        self,
        who: str,
        partition: int,
        key: str,
        is_ec: bool,
        data: st.DataObject,
        enabled: bool,
        not_before_ms: int,
        expires_ms: int,
        tags: dict[str, str],
        must_not_exist: bool,
        release: ReleaseRule | None,
    ) -> None:
        allowed = EC_OPERATIONS if is_ec else OCT_OPERATIONS
        operations = data.draw(st.frozensets(st.sampled_from(sorted(allowed))))
        begins_ms, ends_ms = self.time_ms(not_before_ms) or 0, self.time_ms(expires_ms) or 0
        wanted = Version("", operations, enabled, begins_ms, ends_ms, dict(tags))
        self.make(
            who,
            partition,
            key,
            tags,
            is_ec=is_ec,
            wanted=wanted,
            must_not_exist=must_not_exist,
            release=release,
        )

    def make(
        self,
        who: str,
        partition: int,
        key: str,
        tags: dict[str, str],
        *,
        is_ec: bool,
        wanted: Version | None = None,
        must_not_exist: bool = False,
        release: ReleaseRule | None = None,
    ) -> None:
        """Create a version; without operations it has all that fit its type."""
        wanted = replace(wanted or Version("", frozenset(), tags=tags), release=release)
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
            who,
            partition,
            "CreateKey",
            key,
            lambda client: client.create_key(
                self.prefix + key,
                **kind,
                key_operations=numbers(wanted.operations),
                key_attributes=calls.attributes(
                    enabled=wanted.enabled,
                    not_before=moment(wanted.not_before_ms),
                    expires=moment(wanted.expires_ms),
                    exportable=release is not None,
                ),
                tags=tags,
                must_not_exist=must_not_exist,
                release_policy=self.environments.policy(release) if release else None,
            ),
            model,
        )
        if answer:
            assert as_reference(answer) == modelled
            assert modelled.version_id not in self.types
            self.note(answer, is_ec=is_ec)

    def note(self, answer: keys_pb2.Key, *, is_ec: bool) -> None:
        version_id = answer.name.rpartition("/")[2]
        self.types[version_id] = is_ec
        self.public[version_id] = answer.public_key_der if is_ec else bytes([32])

    @rule(
        who=callers,
        partition=partitions,
        key=keys,
        position=positions,
        enabled=optional(st.booleans()),
        not_before_ms=optional(times),
        expires_ms=optional(times),
        tags=optional(tag_sets),
        release=optional(release_rules),
        operations=st.booleans(),
        data=st.data(),
    )
    def update(
        self,
        who: str,
        partition: int,
        key: str,
        position: int,
        enabled: bool | None,
        not_before_ms: int | None,
        expires_ms: int | None,
        tags: dict[str, str] | None,
        release: ReleaseRule | None,
        operations: bool,
        data: st.DataObject,
    ) -> None:
        version_id = self.version_id(key, position)
        not_before_ms, expires_ms = self.time_ms(not_before_ms), self.time_ms(expires_ms)
        given: dict[str, Any] = {
            "enabled": enabled,
            "not_before_ms": not_before_ms,
            "expires_ms": expires_ms,
            "tags": tags,
            "release": release,
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
            who,
            partition,
            "UpdateKey",
            key,
            lambda client: client.update_key(
                self.name(key, version_id),
                key_attributes=attributes,
                key_operations=numbers(changes.get("operations", frozenset())),
                tags=tags,
                clear_not_before=not_before_ms == 0,
                clear_expires=expires_ms == 0,
                release_policy=self.environments.policy(release) if release else None,
            ),
            lambda _: self.reference.update(key, version_id, **changes),
        )
        if answer:
            assert as_reference(answer) == modelled

    @rule(who=callers, partition=partitions, key=keys, lasting=st.booleans())
    def set_policy(self, who: str, partition: int, key: str, lasting: bool) -> None:
        self.both(
            who,
            partition,
            "UpdateKeyRotationPolicy",
            key,
            lambda client: client.update_key_rotation_policy(
                self.name(key), expiry_time="P90D" if lasting else ""
            ),
            lambda _: self.reference.set_policy(key, Policy(life_ms=90 * DAY_MS) if lasting else None),
        )

    @rule(who=callers, partition=partitions, key=keys)
    def rotate(self, who: str, partition: int, key: str) -> None:
        newest = next(reversed(self.reference.active.get(key, {"": None})))

        def model(answer: keys_pb2.Key | None) -> Version:
            made_ms = answer.attributes.created.ToMilliseconds() if answer else 0
            return self.reference.rotate(
                key, as_reference(answer).version_id if answer else "refused", made_ms
            )

        answer, modelled = self.both(
            who, partition, "RotateKey", key, lambda client: client.rotate_key(self.name(key)), model
        )
        if answer:
            assert as_reference(answer) == modelled
            self.note(answer, is_ec=self.types[newest])

    @rule(who=callers, partition=partitions, key=keys)
    def delete(self, who: str, partition: int, key: str) -> None:
        self.both(
            who,
            partition,
            "DeleteKey",
            key,
            lambda client: client.delete_key(self.name(key)),
            lambda _: self.reference.delete(key),
        )

    @rule(who=callers, partition=partitions, other=partitions, key=keys)
    def delete_and_recover(self, who: str, partition: int, other: int, key: str) -> None:
        """Whatever there was of the key is there again, on another partition."""
        self.delete(who, partition, key)
        self.recover("application", other, key)
        self.list_versions(who, partition, key)

    @rule(who=callers, partition=partitions, other=partitions, key=keys)
    def delete_and_purge(self, who: str, partition: int, other: int, key: str) -> None:
        """Nothing is left, and a key of that name has no past; only its roles stay (Azure)."""
        self.delete("application", partition, key)
        self.purge(who, other, key)
        self.list_versions("application", partition, key)

    @rule(who=callers, partition=partitions, key=keys)
    def recover(self, who: str, partition: int, key: str) -> None:
        answer, modelled = self.both(
            who,
            partition,
            "RecoverDeletedKey",
            key,
            lambda client: client.recover_deleted_key(self.name(key)),
            lambda _: self.reference.recover(key),
        )
        if answer:
            assert as_reference(answer) == modelled

    @rule(who=callers, partition=partitions, key=keys)
    def purge(self, who: str, partition: int, key: str) -> None:
        self.both(
            who,
            partition,
            "PurgeDeletedKey",
            key,
            lambda client: client.purge_deleted_key(self.name(key)),
            lambda _: self.reference.purge(key),
        )

    @rule(
        who=callers,
        partition=partitions,
        other=partitions,
        key=keys,
        position=positions,
        operation=st.sampled_from(sorted(EC_OPERATIONS | OCT_OPERATIONS)),
    )
    def use(self, who: str, partition: int, other: int, key: str, position: int, operation: str) -> None:
        """Use a version on one partition; whatever it made is taken back on another, if that is allowed."""
        version_id = self.version_id(key, position)
        name, now_ms = self.name(key, version_id), self.now_ms()
        answer, used = self.both(
            who,
            partition,
            METHOD_OF_OPERATION[operation],
            key,
            lambda client: operate(client, name, operation, b""),
            lambda _: self.reference.use(key, operation, now_ms, version_id),
        )
        inverse = {"SIGN": "VERIFY", "ENCRYPT": "DECRYPT", "WRAP_KEY": "UNWRAP_KEY"}.get(operation)
        if answer is not None and inverse:
            versioned = self.name(key, used.version_id)
            taken, _ = self.both(
                who,
                other,
                METHOD_OF_OPERATION[inverse],
                key,
                lambda client: operate(client, versioned, inverse, answer),
                lambda _: self.reference.use(key, inverse, now_ms, used.version_id),
            )
            assert taken in {None, True}

    @rule(
        who=callers, partition=partitions, key=keys, position=positions, level=st.sampled_from([0, 1, 1, 2])
    )
    def release(self, who: str, partition: int, key: str, position: int, level: int) -> None:
        """The very version comes out, and only for an environment that its policy names."""
        version_id = self.version_id(key, position)
        answer, released = self.both(
            who,
            partition,
            "ReleaseKey",
            key,
            lambda client: self.environments.released(client, self.name(key, version_id), level),
            lambda _: self.reference.release(key, level, version_id),
        )
        if answer:
            assert answer == (self.name(key, released.version_id), self.public[released.version_id])

    # -- looking -------------------------------------------------------------------------

    @rule(who=callers, partition=partitions, key=keys, position=positions)
    def get(self, who: str, partition: int, key: str, position: int) -> None:
        version_id = self.version_id(key, position)
        answer, modelled = self.both(
            who,
            partition,
            "GetKey",
            key,
            lambda client: client.get_key(self.name(key, version_id)),
            lambda _: self.reference.find(key, version_id),
        )
        if answer:
            assert as_reference(answer) == modelled

    @rule(who=callers, partition=partitions, key=keys)
    def list_versions(self, who: str, partition: int, key: str) -> None:
        answer, modelled = self.both(
            who,
            partition,
            "ListKeyVersions",
            key,
            lambda client: list(client.list_key_versions(self.name(key), page_size=2)),
            lambda _: self.reference.versions(key),
        )
        if answer:
            assert [as_reference(version) for version in answer] == list(modelled.values())

    @rule(who=callers, partition=partitions)
    def list_all(self, who: str, partition: int) -> None:
        """Both lists, by name, with the newest version of each key."""
        listed, active = self.both(
            who,
            partition,
            "ListKeys",
            "/",
            lambda client: [key for key in client.list_keys() if self.prefix in key.name],
            lambda _: self.reference.active,
        )
        deleted, gone = self.both(
            who,
            partition,
            "ListDeletedKeys",
            "/",
            lambda client: [e.key for e in client.list_deleted_keys() if self.prefix in e.key.name],
            lambda _: self.reference.deleted,
        )
        for found, kept in ((listed, active), (deleted, gone)):
            if found is None:
                continue
            assert [key.name.split("/")[1] for key in found] == [self.prefix + name for name in sorted(kept)]
            for key, name in zip(found, sorted(kept), strict=True):
                assert as_reference(key) == list(kept[name].values())[-1]
