"""How much a pool holds: chosen when it is made, on the chain, so that all partitions agree."""

from __future__ import annotations

from hsm_pool import limits
from hsm_pool.core.model import POOL, PoolRecord
from hsm_pool.core.state import View
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


def check_restored(view: View, keys: int) -> None:
    """Check how many keys a full restore would bring, in place of all there are.

    Raises:
        LimitExceeded: More than this pool holds.
    """
    check_keys(view, keys - view.key_count())


def _pool(view: View) -> PoolRecord:
    record = view.get(POOL)
    return record if isinstance(record, PoolRecord) else PoolRecord()
