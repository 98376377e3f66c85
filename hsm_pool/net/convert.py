"""Requests of the wire to values of the core, with every bound checked, and records back."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from hsm_pool import limits
from hsm_pool.audit.record import note
from hsm_pool.core.model import (
    Curve,
    KeyOperation,
    KeyRecord,
    KeyReleasePolicy,
    KeyType,
    KeyVersionRecord,
    Retention,
    RotationPolicy,
)
from hsm_pool.errors import InvalidField
from mhsm.keys.v1 import keys_pb2

_KEY_ID = re.compile(rf"[0-9a-zA-Z-]{{1,{limits.KEY_ID_LENGTH_MAX}}}")
_VERSION_ID = re.compile(r"[0-9a-f]{32}")
_REQUEST_ID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
RELEASE_POLICY_CONTENT_TYPE = "application/json; charset=utf-8"
KeysMessage = keys_pb2.CreateKeyRequest | keys_pb2.ImportKeyRequest | keys_pb2.UpdateKeyRequest
_TIME_MS_MAX = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp()) * 1000


def key_id(value: str, field: str = "key_id") -> str:
    """Return a checked key id."""
    if not _KEY_ID.fullmatch(value):
        raise InvalidField("a key id has 1-127 characters of 0-9 a-z A-Z and hyphen", field=field)
    return value


def named_key(value: str, field: str = "key_id") -> str:
    """Return a checked key id, and note that the call is about this key."""
    checked = key_id(value, field)
    note(key_name=checked)
    return checked


def parse_name(name: str, *, version_allowed: bool = True) -> tuple[str, str]:
    """Return (key id, version id or "") of keys/{key}[/versions/{version}]."""
    parts = name.split("/")
    if len(parts) == 2 and parts[0] == "keys":
        return named_key(parts[1], "name"), ""
    if version_allowed and len(parts) == 4 and parts[0] == "keys" and parts[2] == "versions":
        if not _VERSION_ID.fullmatch(parts[3]):
            raise InvalidField("a version id has 32 hexadecimal digits", field="name")
        note(key_version=parts[3])
        return named_key(parts[1], "name"), parts[3]
    raise InvalidField("a name is keys/{key} or keys/{key}/versions/{version}", field="name")


def version_path(version: KeyVersionRecord) -> str:
    """Return keys/{key}/versions/{version}."""
    return f"keys/{version.key_id}/versions/{version.version_id}"


def request_id(value: str) -> str:
    """Return a checked request id, in lower case."""
    if not _REQUEST_ID.fullmatch(value):
        raise InvalidField("request_id is a UUID of 36 characters", field="request_id")
    return value.lower()


def key_type(value: int) -> KeyType:
    """Return a checked key type."""
    try:
        return KeyType(value)
    except ValueError:
        raise InvalidField("key_type is RSA, EC, OCT or AKP", field="key_type") from None


def curve(value: int) -> Curve:
    """Return a checked curve."""
    try:
        return Curve(value)
    except ValueError:
        raise InvalidField("curve is P256, P384, P521 or P256K", field="curve") from None


def key_operations(values: Iterable[int]) -> tuple[KeyOperation, ...]:
    """Return checked key operations, in order, without repeats."""
    try:
        return tuple(sorted({KeyOperation(value) for value in values}))
    except ValueError:
        raise InvalidField("a key operation is not known", field="key_operations") from None


def tags(values: Mapping[str, str]) -> dict[str, str]:
    """Return checked tags."""
    if len(values) > limits.TAGS_MAX:
        raise InvalidField(f"a key version has at most {limits.TAGS_MAX} tags", field="tags")
    for name, value in values.items():
        if not 1 <= len(name) <= limits.TAG_LENGTH_MAX or len(value) > limits.TAG_LENGTH_MAX:
            raise InvalidField(
                f"a tag's name and value have at most {limits.TAG_LENGTH_MAX} characters", field="tags"
            )
    return dict(values)


def time_ms(attributes: keys_pb2.KeyAttributes, field: str) -> int | None:
    """Return a timestamp of the attributes in Unix milliseconds; None when it is absent."""
    if not attributes.HasField(field):  # type: ignore[arg-type]
        return None
    timestamp: Timestamp = getattr(attributes, field)
    value = timestamp.seconds * 1000 + timestamp.nanos // 1_000_000
    if not 0 < value <= _TIME_MS_MAX or not 0 <= timestamp.nanos < 1_000_000_000:
        raise InvalidField(f"{field} is not a time between 1970 and 9999", field=f"attributes.{field}")
    return value


def refuse_output_only(attributes: keys_pb2.KeyAttributes, *, exportable_allowed: bool) -> None:
    """Refuse attributes that only the pool sets."""
    for field in ("created", "updated"):
        if attributes.HasField(field):
            raise InvalidField(f"{field} is set by the pool", field=f"attributes.{field}")
    if attributes.recovery_level or attributes.recoverable_days:
        raise InvalidField("the recovery level is set by the pool", field="attributes.recovery_level")
    if attributes.exportable and not exportable_allowed:
        raise InvalidField("exportable is fixed at creation", field="attributes.exportable")


def release_policy(message: KeysMessage) -> KeyReleasePolicy | None:
    """Return the release policy of a request; None when it has none. The core checks its grammar."""
    if not message.HasField("release_policy"):
        return None
    policy = message.release_policy
    if policy.content_type not in {"", RELEASE_POLICY_CONTENT_TYPE}:
        raise InvalidField(f"a release policy is {RELEASE_POLICY_CONTENT_TYPE}", field="release_policy")
    return KeyReleasePolicy(policy.data, policy.immutable)


def page_size(value: int) -> int:
    """Return a checked page size."""
    if value > limits.PAGE_SIZE_MAX:
        raise InvalidField(f"a page has at most {limits.PAGE_SIZE_MAX} items", field="page_size")
    return value or limits.PAGE_SIZE_MAX


def page_token(position: str) -> str:
    """Return the token of the page that begins after a position."""
    return base64.urlsafe_b64encode(position.encode()).decode()


def page_position(token: str) -> str:
    """Return the position of a page token."""
    try:
        if len(token) > 256:
            raise ValueError
        return base64.b64decode(token.encode(), b"-_", validate=True).decode("ascii")
    except ValueError:
        raise InvalidField("the page token is not valid", field="page_token") from None


def timestamp(milliseconds: int) -> Timestamp:
    """Return Unix milliseconds as a timestamp."""
    return Timestamp(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)


_LEVELS = {
    (False, False): keys_pb2.RECOVERY_LEVEL_RECOVERABLE_PURGEABLE,
    (True, False): keys_pb2.RECOVERY_LEVEL_CUSTOMIZED_RECOVERABLE_PURGEABLE,
    (False, True): keys_pb2.RECOVERY_LEVEL_RECOVERABLE,
    (True, True): keys_pb2.RECOVERY_LEVEL_CUSTOMIZED_RECOVERABLE,
}
"""By fewer days than the most, and purge protection."""


def key_message(version: KeyVersionRecord, retention: Retention) -> keys_pb2.Key:
    """Return what a client sees of a version."""
    days = retention.recoverable_days
    level = _LEVELS[days < limits.RECOVERABLE_DAYS_MAX, retention.purge_protection]
    attributes = keys_pb2.KeyAttributes(
        enabled=version.enabled,
        created=timestamp(version.created_ms),
        updated=timestamp(version.updated_ms),
        recovery_level=level,
        recoverable_days=days,
        exportable=version.exportable,
    )
    if version.not_before_ms:
        attributes.not_before.CopyFrom(timestamp(version.not_before_ms))
    if version.expires_ms:
        attributes.expires.CopyFrom(timestamp(version.expires_ms))
    return keys_pb2.Key(
        name=version_path(version),
        key_type=keys_pb2.KeyType.ValueType(version.key_type),
        curve=keys_pb2.Curve.ValueType(version.curve),
        size_bits=version.size_bits,
        public_key_der=version.public_key_der,
        key_operations=[keys_pb2.KeyOperation.ValueType(operation) for operation in version.key_operations],
        attributes=attributes,
        tags=version.tags,
        release_policy=keys_pb2.KeyReleasePolicy(
            content_type=RELEASE_POLICY_CONTENT_TYPE,
            data=version.release_policy.data,
            immutable=version.release_policy.immutable,
        )
        if version.release_policy
        else None,
    )


def deleted_key_message(
    key: KeyRecord, version: KeyVersionRecord, retention: Retention
) -> keys_pb2.DeletedKey:
    """Return what a client sees of a soft-deleted key."""
    return keys_pb2.DeletedKey(
        key=key_message(version, retention),
        deleted_time=timestamp(key.deleted_time_ms),
        scheduled_purge_time=timestamp(key.scheduled_purge_time_ms),
    )


def rotation_policy(message: keys_pb2.KeyRotationPolicy) -> RotationPolicy:
    """Return the rotation policy of a message; the core checks its durations."""
    if message.HasField("created") or message.HasField("updated"):
        raise InvalidField("created and updated are set by the pool", field="policy.created")
    if len(message.lifetime_actions) > 1:
        raise InvalidField("a policy has at most one action", field="policy.lifetime_actions")
    policy = RotationPolicy(expiry_time=_duration(message.expiry_time))
    for action in message.lifetime_actions:
        if action.action != keys_pb2.LIFETIME_ACTION_TYPE_ROTATE:
            raise InvalidField("the action of a policy is rotate", field="policy.lifetime_actions")
        match action.WhichOneof("trigger"):
            case "time_after_create" if action.time_after_create:
                policy = replace(policy, time_after_create=_duration(action.time_after_create))
            case "time_before_expiry" if action.time_before_expiry:
                policy = replace(policy, time_before_expiry=_duration(action.time_before_expiry))
            case _:
                raise InvalidField("the action has no trigger", field="policy.lifetime_actions")
    return policy


def _duration(text: str) -> str:
    if len(text) > limits.DURATION_LENGTH_MAX:
        raise InvalidField("a duration is ISO 8601 in whole days, such as P90D or P2Y", field="policy")
    return text


def rotation_policy_message(policy: RotationPolicy | None) -> keys_pb2.KeyRotationPolicy:
    """Return what a client sees of a rotation policy; without one, a message that says nothing."""
    if policy is None:
        return keys_pb2.KeyRotationPolicy()
    message = keys_pb2.KeyRotationPolicy(
        expiry_time=policy.expiry_time,
        created=timestamp(policy.created_ms),
        updated=timestamp(policy.updated_ms),
    )
    rotate = keys_pb2.LIFETIME_ACTION_TYPE_ROTATE
    if policy.time_after_create:
        message.lifetime_actions.add(action=rotate, time_after_create=policy.time_after_create)
    if policy.time_before_expiry:
        message.lifetime_actions.add(action=rotate, time_before_expiry=policy.time_before_expiry)
    return message
