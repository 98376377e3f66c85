"""What comes due with keys, decided purely: rotation policies, automatic rotation, automatic purge.

Source: Azure Managed HSM, key rotation and soft delete. A policy has at most one trigger: an age of
the newest version, or a time before it expires. What is due is found by :func:`due_work`; the commands
that follow decide it again on the state they are committed on, so that two holders of the housekeeping
role, or one that failed in the middle, never do it twice (G1).

Azure does not say how long a month is: a year counts 365 days here, and a month 30.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from hsm_pool import limits
from hsm_pool.core import pool_limits
from hsm_pool.core.model import (
    RESTORE,
    KeyRecord,
    KeyVersionRecord,
    RestoreRecord,
    RotationPolicy,
    key_name,
    version_name,
)
from hsm_pool.core.state import State
from hsm_pool.errors import InvalidField

DAY_MS: Final = 24 * 3600 * 1000
_DURATION = re.compile(r"P(?:([0-9]{1,5})Y)?(?:([0-9]{1,5})M)?(?:([0-9]{1,5})W)?(?:([0-9]{1,5})D)?")
_UNIT_DAYS = (365, 30, 7, 1)


@dataclass(frozen=True, slots=True)
class PurgeDue:
    """The retention of a soft-deleted key is over."""

    key_id: str


@dataclass(frozen=True, slots=True)
class RotationDue:
    """A key's newest version is to be followed by another."""

    key_id: str
    newest: KeyVersionRecord


DueAction = PurgeDue | RotationDue


def duration_days(text: str, field: str) -> int:
    """Return the days of an ISO 8601 duration of years, months, weeks and days.

    Raises:
        InvalidField: It is none, or longer than a century.
    """
    match = _DURATION.fullmatch(text)
    numbers = match.groups() if match else ("0",) * len(_UNIT_DAYS)
    days = sum(int(number or 0) * unit for number, unit in zip(numbers, _UNIT_DAYS, strict=True))
    if not 0 < days <= limits.ROTATION_DAYS_MAX:
        raise InvalidField("a duration is ISO 8601 in whole days, such as P90D or P2Y", field=field)
    return days


def checked(policy: RotationPolicy) -> RotationPolicy | None:
    """Return a policy that keeps Azure's rules; None when it says nothing.

    Raises:
        InvalidField: It breaks one.
    """
    expiry = duration_days(policy.expiry_time, "policy.expiry_time") if policy.expiry_time else 0
    if expiry and expiry < limits.ROTATION_DAYS_MIN:
        raise InvalidField(
            f"a version lives {limits.ROTATION_DAYS_MIN} days at least before it expires",
            field="policy.expiry_time",
        )
    if policy.time_after_create and policy.time_before_expiry:
        raise InvalidField("a rotation has one trigger", field="policy.lifetime_actions")
    if policy.time_after_create:
        age = duration_days(policy.time_after_create, "policy.lifetime_actions")
        if age < limits.ROTATION_DAYS_MIN:
            raise InvalidField(
                f"a version is {limits.ROTATION_DAYS_MIN} days old at least when it is rotated",
                field="policy.lifetime_actions",
            )
    if policy.time_before_expiry:
        before = duration_days(policy.time_before_expiry, "policy.lifetime_actions")
        if before + limits.ROTATION_DAYS_MIN > expiry:
            raise InvalidField(
                f"a rotation before expiry needs versions that live {limits.ROTATION_DAYS_MIN} days longer "
                "at least",
                field="policy.lifetime_actions",
            )
    if not (policy.expiry_time or policy.time_after_create or policy.time_before_expiry):
        return None
    return policy


def expires_ms(policy: RotationPolicy | None, created_ms: int) -> int:
    """Return when a version made at a time expires by its key's policy, Unix milliseconds; 0 for never."""
    if policy is None or not policy.expiry_time:
        return 0
    return created_ms + duration_days(policy.expiry_time, "policy.expiry_time") * DAY_MS


def rotation_due(key: KeyRecord, newest: KeyVersionRecord, now_ms: int, versions_max: int) -> bool:
    """Return whether a key is to be rotated by its policy.

    A disabled version is not: its successor would be a key in use that nobody switched on. Nor is one
    that is not valid yet, or has as many successors as a key can have.
    """
    policy = key.rotation_policy
    if policy is None or key.deleted or len(key.version_ids) >= versions_max:
        return False
    if not newest.enabled or newest.not_before_ms > now_ms:
        return False
    if policy.time_after_create:
        age = duration_days(policy.time_after_create, "policy.lifetime_actions")
        return now_ms >= newest.created_ms + age * DAY_MS
    if policy.time_before_expiry and newest.expires_ms:
        before = duration_days(policy.time_before_expiry, "policy.lifetime_actions")
        return now_ms >= newest.expires_ms - before * DAY_MS
    return False


def purge_due(key: KeyRecord, now_ms: int) -> bool:
    """Return whether the retention of a soft-deleted key is over."""
    return key.deleted and now_ms >= key.scheduled_purge_time_ms


def due_work(state: State, now_ms: int, after: str = "") -> tuple[list[DueAction], str]:
    """Return what is due now among the next keys, and the key id up to which was looked.

    Args:
        state: The applied state.
        now_ms: A time that a majority of the partitions agrees on, Unix milliseconds.
        after: Where the pass before ended; "" begins anew.

    Returns:
        At most DUE_ACTIONS_PER_PASS actions, of at most DUE_KEYS_PER_PASS keys; "" for the
        position when there are no more keys.
    """
    actions: list[DueAction] = []
    under_way = state.get(RESTORE)
    if isinstance(under_way, RestoreRecord) and not under_way.phase.over:
        return actions, after
    versions_max = pool_limits.versions_per_key_max(state)
    key_ids = state.key_ids_after(after, limits.DUE_KEYS_PER_PASS)
    for key_id in key_ids:
        key = state.get(key_name(key_id))
        if not isinstance(key, KeyRecord):
            continue
        newest = state.get(version_name(key_id, key.version_ids[-1]))
        if purge_due(key, now_ms):
            actions.append(PurgeDue(key_id))
        elif isinstance(newest, KeyVersionRecord) and rotation_due(key, newest, now_ms, versions_max):
            actions.append(RotationDue(key_id, newest))
        if len(actions) == limits.DUE_ACTIONS_PER_PASS:
            return actions, key_id
    more = len(key_ids) == limits.DUE_KEYS_PER_PASS
    return actions, key_ids[-1] if more else ""
