"""Epochs of the key-encryption key: proposed, held, in force.

A new key is used only when every partition that serves holds it, and at least two do:
nobody loses what he must be able to read, whoever dies. One that was proposed and not put
in force is left behind; the next proposal has the next number.
"""

from __future__ import annotations

from dataclasses import replace

from hsm_pool.core.commands import ActivateEpoch, HoldEpoch, ProposeEpoch, ReplaceSecurityDomain
from hsm_pool.core.model import POOL, PoolRecord
from hsm_pool.core.state import Changes, View
from hsm_pool.errors import CeremonyState

HOLDERS_MIN = 2


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
            if not command.serving <= pool.holders or len(pool.holders) < HOLDERS_MIN:
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


def _check_header(pool: PoolRecord, old_header_digest: bytes) -> None:
    if pool.header_digest != old_header_digest:
        raise CeremonyState(
            "another ceremony or a rotate-kek has changed the security domain meanwhile; start again"
        )
