"""Reading records of a log on disk, in order, with filters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hsm_pool import limits
from hsm_pool.audit import files

_TIME = re.compile(r"(\d{4}-\d\d-\d\d)(?:T(\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,3}))?)?)?Z?)?", re.ASCII)


def instant(text: str) -> str:
    """Return a time in the form that records have; what is left out of it is 0.

    Args:
        text: ISO 8601 in UTC: a day, or a time down to milliseconds, with or without Z.

    Raises:
        ValueError: It is none.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError("not a time")
    day, hour, minute, second, fraction = found.groups("")
    whole = f"{day}T{hour or '00'}:{minute or '00'}:{second or '00'}.{fraction.ljust(3, '0')}Z"
    datetime.fromisoformat(whole)
    return whole


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records are wanted; "" lets everything through. Times are in the form of :func:`instant`."""

    from_time: str = ""
    until_time: str = ""
    operation_name: str = ""
    identity: str = ""
    result_type: str = ""
    key_name: str = ""

    def admits(self, record: bytes) -> bool:
        """Return whether a record passes."""
        if self == Filter():
            return True
        fields = files.parse(record, "a line of the log")
        return (
            (not self.from_time or fields.get("time", "") >= self.from_time)
            and (not self.until_time or fields.get("time", "") < self.until_time)
            and self.operation_name in {"", fields.get("operationName")}
            and self.identity in {"", fields.get("identity")}
            and self.result_type in {"", fields.get("resultType")}
            and (not self.key_name or fields.get("properties", {}).get("keyName") == self.key_name)
        )


@dataclass(frozen=True, slots=True)
class Page:
    """Records with their numbers, and where the next page begins."""

    records: list[tuple[int, bytes]]
    next_index: int
    more: bool


def first_index(directory: Path) -> int:
    """Return the number of the oldest record that is kept."""
    existing = files.listed(directory, files.RECORDS)
    return files.read_header(existing[0]).first if existing else 0


def records_from(directory: Path, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number, record) from a number on; what was removed is left out."""
    existing = files.listed(directory, files.RECORDS)
    firsts = [files.read_header(path).first for path in existing]
    begin = max((number for number, first in enumerate(firsts) if first <= start), default=0)
    for path, first in zip(existing[begin:], firsts[begin:], strict=True):
        for index, record in enumerate(files.read_lines(path, skip_header=True), start=first):
            if index >= start:
                yield index, record


def page(directory: Path, start: int, end: int, size: int, wanted: Filter) -> Page:
    """Return the next records before end that pass; it looks at a bounded number of them."""
    found: list[tuple[int, bytes]] = []
    octets, following = 0, start
    for index, record in records_from(directory, start):
        scanned = index - start >= limits.AUDIT_SCAN_RECORDS_MAX
        if index >= end or len(found) == size or octets >= limits.AUDIT_PAGE_BYTES or scanned:
            break
        following = index + 1
        if wanted.admits(record):
            found.append((index, record))
            octets += len(record)
    return Page(found, following, following < end)
