"""How much a pool holds: chosen when it is made, on the chain, so that all partitions agree."""

from __future__ import annotations

from hsm_pool import limits
from hsm_pool.core.model import POOL, PoolRecord, stored_bytes
from hsm_pool.core.state import Changes, View
from hsm_pool.errors import LimitExceeded


def check_keys(view: View, added: int = 1) -> None:
    """Check that there is room for more keys.

    Raises:
        LimitExceeded: There is none.
    """
    most = _pool(view).keys_max or limits.KEYS_MAX
    if view.key_count() + added > most:
        raise LimitExceeded(f"the pool holds at most {most} keys")


def check_versions(view: View, key_id: str, versions: int) -> None:
    """Check how many versions a key is to have.

    Raises:
        LimitExceeded: More than a key of this pool has.
    """
    most = _pool(view).versions_per_key_max or limits.VERSIONS_PER_KEY_MAX
    if versions > most:
        raise LimitExceeded(f"key {key_id} has at most {most} versions")


def check_bytes(view: View, changes: Changes) -> None:
    """Check that there is room for what changes of keys would store; what makes them smaller always is.

    Raises:
        LimitExceeded: There is none.
    """
    added = _added(view, changes, "key", "version")
    if added and view.bytes_held("key", "version") + added > limits.KEYS_BYTES_MAX:
        raise LimitExceeded(f"the keys of a pool take at most {limits.KEYS_BYTES_MAX >> 20} MiB: purge some")


def check_staged_bytes(view: View, changes: Changes) -> None:
    """Check the same of what a full restore stages.

    Raises:
        LimitExceeded: There is no room.
    """
    added = _added(view, changes, "staged")
    if added and view.bytes_held("staged") + added > limits.STAGED_BYTES_MAX:
        raise LimitExceeded("the backup holds more than a pool does")


def check_restored(view: View, keys: int) -> None:
    """Check how many keys a full restore would bring, in place of all there are.

    Raises:
        LimitExceeded: More than this pool holds.
    """
    check_keys(view, keys - view.key_count())


def _added(view: View, changes: Changes, *kinds: str) -> int:
    """Return how many bytes more the records of these kinds take with changes; 0 for fewer."""
    of_kinds = [(name, record) for name, record in changes.items() if name[0] in kinds]
    new = sum(stored_bytes(record) for _, record in of_kinds if record)
    old = sum(stored_bytes(record) for name, _ in of_kinds if (record := view.get(name)))
    return max(0, new - old)


def _pool(view: View) -> PoolRecord:
    record = view.get(POOL)
    return record if isinstance(record, PoolRecord) else PoolRecord()
