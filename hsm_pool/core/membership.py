"""Which partitions serve, decided purely: drain, resume, restart, replace, firmware, housekeeping (G5).

Each is a mutation of the chain, so of two commands at the same instant the second is
decided on the state that the first has left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hsm_pool.core.commands import (
    ActivateFirmware,
    AdmitPartition,
    CompleteAdmission,
    DrainPartition,
    RelinquishHousekeeping,
    ReportSecurityVersion,
    RestartPartition,
    ResumePartition,
)
from hsm_pool.core.model import POOL, Admission, PoolRecord
from hsm_pool.core.state import Changes, View
from hsm_pool.errors import (
    FirmwareRefused,
    FloorOfTwo,
    LimitExceeded,
    NotDrained,
    PartitionReplaced,
    PartitionServes,
)

INCARNATIONS_PER_ADMISSION = 2**20
"""More than a directory is ever started."""

ADMISSIONS_MAX = 4095
"""So that an incarnation fits 32 bits."""

ADMISSIONS_AT_ONCE = 4
"""Admissions of one index that may follow each other at once."""

ADMISSION_MS = 3600 * 1000
"""After that there is one in this time: a controller that wants nothing else needs half a year to use
them up, and what each leaves behind on a disk stays bounded meanwhile (G5)."""

SERVING_MIN = 2
"""Partitions that go on serving whatever the controller asks for (G5)."""

PARTITIONS = 3
"""Partitions of a pool (Azure Managed HSM has three)."""

MembershipCommand = (
    DrainPartition
    | ResumePartition
    | RestartPartition
    | RelinquishHousekeeping
    | AdmitPartition
    | CompleteAdmission
    | ActivateFirmware
    | ReportSecurityVersion
)


def housekeeper(preferred: int, serving: frozenset[int]) -> int | None:
    """Return who does the housekeeping: the preferred partition, or the next one that serves."""
    return min(serving, key=lambda index: (index < preferred, index), default=None)


def boot_count_min(pool: PoolRecord, index: int, renewed: int) -> int:
    """Return the least boot count that a partition's evidence may claim; it only rises.

    Args:
        pool: The pool, with its admissions.
        index: The partition.
        renewed: Incarnation of its newest renewal that was seen, 0 for none.
    """
    admission = pool.admissions.get(index)
    return max(renewed, admission.incarnation if admission else 0)


def may_be_of(pool: PoolRecord, index: int, incarnation: int) -> bool:
    """Return whether a partition can have come to an incarnation by restarts since it was admitted last."""
    admission = pool.admissions.get(index)
    number = admission.number if admission else 0
    return incarnation < (number + 1) * INCARNATIONS_PER_ADMISSION


def half_replaced(pool: PoolRecord, seen: Mapping[int, int]) -> frozenset[int]:
    """Return the partitions in whose place a new one was admitted that was not seen yet.

    Only the new one can be resumed, so their replacement has to be gone on with.

    Args:
        pool: The pool, with its admissions.
        seen: Newest incarnation of each partition that was seen.
    """
    return frozenset(
        index for index, admission in pool.admissions.items() if seen.get(index, 0) < admission.incarnation
    )


def apply(command: MembershipCommand, view: View) -> Changes:
    """Decide a command.

    Raises:
        FloorOfTwo: Too few partitions would go on serving.
        NotDrained: The partition to restart is not drained.
        PartitionServes: The partition to replace serves.
        LimitExceeded: It was replaced too often, or too often lately.
        PartitionReplaced: A new incarnation was admitted in place of the one to resume.
        FirmwareRefused: The firmware is below the pool's security version.
    """
    record = view.get(POOL)
    pool = record if isinstance(record, PoolRecord) else PoolRecord()
    match command:
        case DrainPartition():
            _check_floor(command, pool)
            return {POOL: replace(pool, drained=pool.drained | {command.index})}
        case ResumePartition():
            admission = pool.admissions.get(command.index)
            if admission and command.incarnation < admission.incarnation:
                raise PartitionReplaced("a new partition was admitted in place of this one")
            # It may have been restarted, and have lost a proposed key that it held: it says so anew.
            holders = pool.holders - {command.index}
            return {POOL: replace(pool, drained=pool.drained - {command.index}, holders=holders)}
        case RestartPartition():
            _check_drained(command, pool)
            _check_floor(command, pool)
            return {}
        case RelinquishHousekeeping():
            serving = command.serving - pool.drained
            if housekeeper(pool.housekeeper, serving) != command.index:
                return {}
            successor = housekeeper(command.index, serving - {command.index})
            if successor is None:
                raise FloorOfTwo("no other partition serves that could take the role")
            return {POOL: replace(pool, housekeeper=successor)}
        case AdmitPartition():
            return _admit(command, pool)
        case CompleteAdmission():
            return _complete(command, pool)
        case ActivateFirmware():
            _check_drained(command, pool)
            _check_security_version(command, pool)
            return {}
        case ReportSecurityVersion():
            return _report(command, pool)


def _admit(command: AdmitPartition, pool: PoolRecord) -> Changes:
    """Admit a new partition; a repeat, before the new one was seen, changes nothing.

    The index counts as drained from then on, and only the new incarnation is resumed: if the old
    one were alive after all, it would be counted as serving until its node agent ends it. So
    no other partition is drained or replaced, and no other store member goes, until the new one
    is there. New incarnations begin so high that the old directory does not get there by restarts.
    """
    if command.index in command.serving:
        raise PartitionServes("a partition that serves is not replaced")
    _check_floor(command, pool)
    last = pool.admissions.get(command.index)
    if last and (not last.ready or last.incarnation >= command.incarnation):
        return {}
    number = last.number + 1 if last else 1
    if number > ADMISSIONS_MAX:
        raise LimitExceeded(f"a partition is replaced {ADMISSIONS_MAX} times at most")
    made_up_ms = max(last.made_up_ms if last else 0, command.time_ms) + ADMISSION_MS
    if made_up_ms > command.time_ms + ADMISSIONS_AT_ONCE * ADMISSION_MS:
        raise LimitExceeded(f"a partition is replaced {ADMISSIONS_AT_ONCE} times at once, then once an hour")
    incarnation = max(command.incarnation, number * INCARNATIONS_PER_ADMISSION)
    admission = Admission(number, incarnation, command.member_id, made_up_ms=made_up_ms)
    admissions = {**pool.admissions, command.index: admission}
    return {POOL: replace(pool, admissions=admissions, drained=pool.drained | {command.index})}


def _complete(command: CompleteAdmission, pool: PoolRecord) -> Changes:
    admission = pool.admissions.get(command.index)
    if admission is None or admission.number != command.number or admission.ready:
        return {}
    ready = replace(admission, ready=True)
    return {POOL: replace(pool, admissions={**pool.admissions, command.index: ready})}


def _report(command: ReportSecurityVersion, pool: PoolRecord) -> Changes:
    """Note a security version; the floor rises when all partitions run a higher one, and never falls."""
    _check_security_version(command, pool)
    reported = {**pool.security_versions, command.index: command.security_version}
    floor = pool.security_version_floor
    if len(reported) == PARTITIONS:
        floor = max(floor, min(reported.values()))
    return {POOL: replace(pool, security_versions=reported, security_version_floor=floor)}


def _check_security_version(command: ActivateFirmware | ReportSecurityVersion, pool: PoolRecord) -> None:
    """Refuse firmware that is older than what the whole pool runs.

    Raises:
        FirmwareRefused: It is.
    """
    if command.security_version < pool.security_version_floor:
        raise FirmwareRefused("the firmware is below the pool's security version")


def _check_drained(command: RestartPartition | ActivateFirmware, pool: PoolRecord) -> None:
    """Refuse what needs a drained partition.

    Raises:
        NotDrained: It is not.
    """
    if command.index not in pool.drained:
        raise NotDrained("only a drained partition is restarted, or gets other firmware")


def _check_floor(command: DrainPartition | RestartPartition | AdmitPartition, pool: PoolRecord) -> None:
    """Refuse what would leave fewer than two serving.

    Raises:
        FloorOfTwo: It would.
    """
    remaining = command.serving - pool.drained - {command.index}
    if len(remaining) < SERVING_MIN:
        raise FloorOfTwo("fewer than two partitions would go on serving")
