"""The applied state of a pool and a read-tracking overlay over it.

Commands are decided against a :class:`View`; what they change is a mapping from
record name to new record (``None`` deletes). The same classes serve the partition
and the tests' reference model.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from hsm_pool.core.model import (
    POOL,
    KeyRecord,
    PoolRecord,
    PrincipalRecord,
    Record,
    RecordName,
    RequestRecord,
    RoleDefinitionRecord,
    RoleRecord,
    StagedRecord,
    name_of,
    stored_bytes,
)

Changes = Mapping[RecordName, Record | None]
"""New records by name; None stands for a deletion."""


class View(Protocol):
    """What a command may look at."""

    def get(self, name: RecordName) -> Record | None:
        """Return a record, or None when it does not exist."""

    def key_count(self) -> int:
        """Return the number of keys, soft-deleted ones included."""

    def oldest_requests(self, count: int) -> list[RequestRecord]:
        """Return up to count answered requests, the oldest first."""

    def request_count(self) -> int:
        """Return the number of answered requests that are kept."""

    def bytes_held(self, *kinds: str) -> int:
        """Return how many bytes the records of these kinds (first words of their names) take as stored."""

    def key_ids(self, count: int) -> list[str]:
        """Return up to count key ids, in order."""

    def staged(self, count: int) -> list[StagedRecord]:
        """Return up to count staged records, the oldest first."""

    def role_records(self) -> list[RoleRecord]:
        """Return all principals that have role assignments and all custom role definitions."""


class State:
    """All records of a pool, by name. Not thread-safe: one writer, guarded by its owner."""

    def __init__(self, records: Iterable[tuple[RecordName, Record]] = ()) -> None:
        self._records: dict[RecordName, Record] = {}
        self._bytes: Counter[str] = Counter()
        self._key_ids: list[str] = []
        self._requests: dict[RecordName, RequestRecord] = {}
        self._staged: dict[RecordName, StagedRecord] = {}
        self._role_records: dict[RecordName, RoleRecord] = {}
        for name, record in records:
            self._put(name, record)

    def get(self, name: RecordName) -> Record | None:
        """Return a record, or None when it does not exist."""
        return self._records.get(name)

    def pool(self) -> PoolRecord:
        """Return the pool's own record."""
        record = self._records.get(POOL)
        return record if isinstance(record, PoolRecord) else PoolRecord()

    def key_count(self) -> int:
        """Return the number of keys, soft-deleted ones included."""
        return len(self._key_ids)

    def key_ids_after(self, key_id: str, count: int) -> list[str]:
        """Return up to count key ids greater than key_id, in order; "" starts at the first."""
        start = bisect.bisect_right(self._key_ids, key_id) if key_id else 0
        return self._key_ids[start : start + count]

    def oldest_requests(self, count: int) -> list[RequestRecord]:
        """Return up to count answered requests, the oldest first."""
        found: list[RequestRecord] = []
        for record in self._requests.values():
            if len(found) >= count:
                break
            found.append(record)
        return found

    def request_count(self) -> int:
        """Return the number of answered requests that are kept."""
        return len(self._requests)

    def bytes_held(self, *kinds: str) -> int:
        """Return how many bytes the records of these kinds take as stored."""
        return sum(self._bytes[kind] for kind in kinds)

    def key_ids(self, count: int) -> list[str]:
        """Return up to count key ids, in order."""
        return self._key_ids[:count]

    def staged(self, count: int) -> list[StagedRecord]:
        """Return up to count staged records, the oldest first."""
        return list(itertools.islice(self._staged.values(), count))

    def role_records(self) -> list[RoleRecord]:
        """Return all principals that have role assignments and all custom role definitions."""
        return list(self._role_records.values())

    def staged_count(self) -> int:
        """Return the number of staged records."""
        return len(self._staged)

    def names(self) -> list[RecordName]:
        """Return the names of all records."""
        return list(self._records)

    def apply(self, changes: Changes) -> None:
        """Make the changes."""
        for name, record in changes.items():
            if record is None:
                self._remove(name)
            else:
                self._put(name, record)

    def _put(self, name: RecordName, record: Record) -> None:
        self._bytes[name[0]] += stored_bytes(record) - _bytes_of(self._records.get(name))
        if isinstance(record, KeyRecord) and name not in self._records:
            bisect.insort(self._key_ids, record.key_id)
        if isinstance(record, RequestRecord):
            self._requests[name] = record
        if isinstance(record, StagedRecord):
            self._staged[name] = record
        if isinstance(record, PrincipalRecord | RoleDefinitionRecord):
            self._role_records[name] = record
        self._records[name] = record

    def _remove(self, name: RecordName) -> None:
        record = self._records.pop(name, None)
        self._bytes[name[0]] -= _bytes_of(record)
        if isinstance(record, KeyRecord):
            index = bisect.bisect_left(self._key_ids, record.key_id)
            del self._key_ids[index]
        self._requests.pop(name, None)
        self._staged.pop(name, None)
        self._role_records.pop(name, None)


class Overlay:
    """A view with uncommitted changes on top, which notes every name that was read."""

    def __init__(self, base: View) -> None:
        self._base = base
        self.changes: dict[RecordName, Record | None] = {}
        self.reads: set[RecordName] = set()

    def get(self, name: RecordName) -> Record | None:
        """Return the newest record of that name."""
        self.reads.add(name)
        if name in self.changes:
            return self.changes[name]
        return self._base.get(name)

    def key_count(self) -> int:
        """Return the number of keys with the changes counted."""
        return self._base.key_count() + self._added("key")

    def oldest_requests(self, count: int) -> list[RequestRecord]:
        """Return up to count answered requests that no change touches, the oldest first."""
        extra = len(self.changes)
        kept = [
            record
            for record in self._base.oldest_requests(count + extra)
            if ("request", record.request_key.hex()) not in self.changes
        ]
        return kept[:count]

    def request_count(self) -> int:
        """Return the number of answered requests with the changes counted."""
        return self._base.request_count() + self._added("request")

    def _added(self, kind: str) -> int:
        """Return how many records of a kind the changes add."""
        return sum(
            (record is not None) - (self._base.get(name) is not None)
            for name, record in self.changes.items()
            if name[0] == kind
        )

    def bytes_held(self, *kinds: str) -> int:
        """Return how many bytes the records of these kinds take as stored, with the changes counted."""
        changed = sum(
            _bytes_of(record) - _bytes_of(self._base.get(name))
            for name, record in self.changes.items()
            if name[0] in kinds
        )
        return self._base.bytes_held(*kinds) + changed

    def key_ids(self, count: int) -> list[str]:
        """Return up to count ids of keys that no change touches, in order."""
        known = self._base.key_ids(count + len(self.changes))
        return [key_id for key_id in known if ("key", key_id) not in self.changes][:count]

    def staged(self, count: int) -> list[StagedRecord]:
        """Return up to count staged records that no change touches, the oldest first."""
        known = self._base.staged(count + len(self.changes))
        return [record for record in known if name_of(record) not in self.changes][:count]

    def role_records(self) -> list[RoleRecord]:
        """Return all principals that have role assignments and all custom role definitions."""
        found = {name_of(record): record for record in self._base.role_records()}
        for name, record in self.changes.items():
            if isinstance(record, PrincipalRecord | RoleDefinitionRecord):
                found[name] = record
            else:
                found.pop(name, None)
        return list(found.values())

    def put(self, changes: Changes) -> None:
        """Lay changes on top."""
        self.changes.update(changes)


def _bytes_of(record: Record | None) -> int:
    return stored_bytes(record) if record else 0
