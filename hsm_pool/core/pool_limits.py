"""How much a pool holds: chosen when it is made, on the chain, so that all partitions agree."""

from __future__ import annotations

from hsm_pool import limits
from hsm_pool.core.model import POOL, PoolRecord
from hsm_pool.core.state import Changes, Overlay, View
from hsm_pool.errors import LimitExceeded


def check_keys(view: View, added: int = 1) -> None:
    """Check that there is room for more keys.

    Raises:
        LimitExceeded: There is none.
    """
    most = _pool(view).keys_max or limits.KEYS_MAX
    if view.key_count() + added > most:
        raise LimitExceeded(f"the pool holds at most {most} keys, soft-deleted ones included", limit="keys")


def versions_per_key_max(view: View) -> int:
    """Return how many versions a key of this pool has at most."""
    return _pool(view).versions_per_key_max or limits.VERSIONS_PER_KEY_MAX


def check_versions(view: View, key_id: str, versions: int) -> None:
    """Check how many versions a key is to have.

    Raises:
        LimitExceeded: More than a key of this pool has.
    """
    most = versions_per_key_max(view)
    if versions > most:
        raise LimitExceeded(
            f"key {key_id} has at most {most} versions, and a version is never removed: make another key",
            limit="versions",
        )


def check_bytes(view: View, changes: Changes) -> None:
    """Check that there is room for what changes of keys would store; what makes them smaller always is.

    Raises:
        LimitExceeded: There is none.
    """
    if _outgrows(view, changes, limits.KEYS_BYTES_MAX, "key", "version"):
        raise LimitExceeded(f"the keys of a pool take at most {limits.KEYS_BYTES_MAX >> 20} MiB: purge some")


def check_staged_bytes(view: View, changes: Changes) -> None:
    """Check the same of what a full restore stages.

    Raises:
        LimitExceeded: There is no room.
    """
    if _outgrows(view, changes, limits.STAGED_BYTES_MAX, "staged"):
        raise LimitExceeded("the backup holds more than a pool does")


def check_restored(view: View, keys: int) -> None:
    """Check how many keys a full restore would bring, in place of all there are.

    Raises:
        LimitExceeded: More than this pool holds.
    """
    check_keys(view, keys - view.key_count())


def _outgrows(view: View, changes: Changes, bytes_max: int, *kinds: str) -> bool:
    """Return whether changes make the records of these kinds larger, and larger than they may be."""
    changed = Overlay(view)
    changed.changes.update(changes)
    return changed.bytes_held(*kinds) > max(bytes_max, view.bytes_held(*kinds))


def _pool(view: View) -> PoolRecord:
    record = view.get(POOL)
    return record if isinstance(record, PoolRecord) else PoolRecord()
