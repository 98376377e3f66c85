"""Epochs of the key-encryption key: proposed, held, in force.

A new key is used only when every partition that serves holds it, and at least two do:
nobody loses what he must be able to read, whoever dies. One that was proposed and not put
in force is left behind; the next proposal has the next number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsm_pool import limits
from hsm_pool.core.commands import ActivateEpoch, HoldEpoch, ProposeEpoch, ReplaceSecurityDomain
from hsm_pool.core.model import POOL, PoolRecord
from hsm_pool.core.state import Changes, View
from hsm_pool.errors import CeremonyState

HOLDERS_MIN = 2


@dataclass(frozen=True, slots=True)
class Asked:
    """The proposal that a partition has asked its peers for, and until when it does, on its own clock."""

    epoch: int = 0
    until: float = 0.0


def asked(before: Asked, pool: PoolRecord, now: float) -> Asked:
    """Return what a partition asks for at this moment; a new proposal is asked for for a while."""
    if pool.next_epoch == before.epoch:
        return before
    return Asked(pool.next_epoch, now + limits.EPOCH_HOLD_SECONDS)


def must_ask(asked: Asked, pool: PoolRecord, index: int, now: float, *, holds: bool) -> bool:
    """Return whether a partition asks its peers for the key of the proposed epoch, or says that it holds it.

    Args:
        asked: See :func:`asked`.
        pool: The pool.
        index: The partition.
        now: On the partition's own clock, seconds.
        holds: Whether the key is here. One that said so may have been killed since, and have healed
            from a partition that had no such key yet.
    """
    if not pool.next_epoch or (holds and index in pool.holders):
        return False
    # Whoever proposed it waits no longer, either: it was left behind.
    return holds or now < asked.until


def apply(command: ProposeEpoch | HoldEpoch | ActivateEpoch | ReplaceSecurityDomain, view: View) -> Changes:
    """Decide a command.

    Raises:
        CeremonyState: Something else has changed epoch or header meanwhile, or too few hold the key.
    """
    record = view.get(POOL)
    pool = record if isinstance(record, PoolRecord) else PoolRecord()
    match command:
        case ProposeEpoch():
            if command.epoch != max(pool.epoch, pool.next_epoch) + 1:
                raise CeremonyState("another key-encryption key was proposed meanwhile; start again")
            holders = frozenset({command.holder})
            return {POOL: replace(pool, next_epoch=command.epoch, holders=holders)}
        case HoldEpoch():
            if command.epoch != pool.next_epoch:
                return {}
            return {POOL: replace(pool, holders=pool.holders | {command.holder})}
        case ActivateEpoch():
            _check_header(pool, command.old_header_digest)
            if command.epoch != pool.next_epoch:
                raise CeremonyState("another key-encryption key was proposed meanwhile; start again")
            if command.drained != pool.drained:
                # One that was resumed meanwhile may serve, and not hold it: it would end itself to heal.
                raise CeremonyState("a partition was drained or resumed meanwhile; start again")
            if not held_by_enough(command.serving, pool.holders):
                raise CeremonyState("not every serving partition holds the new key-encryption key yet")
            return {
                POOL: replace(
                    pool,
                    epoch=command.epoch,
                    next_epoch=0,
                    holders=frozenset(),
                    header_digest=command.new_header_digest,
                )
            }
        case ReplaceSecurityDomain():
            _check_header(pool, command.old_header_digest)
            return {POOL: replace(pool, header_digest=command.new_header_digest)}


def held_by_enough(serving: frozenset[int], holders: frozenset[int]) -> bool:
    """Return whether every serving partition holds a key, and at least two do; who is dead holds nothing."""
    return serving <= holders and len(serving) >= HOLDERS_MIN


def _check_header(pool: PoolRecord, old_header_digest: bytes) -> None:
    if pool.header_digest != old_header_digest:
        raise CeremonyState(
            "another ceremony or a rotate-kek has changed the security domain meanwhile; start again"
        )
