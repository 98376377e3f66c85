"""Files of one partition's audit log, as they lie on its disk and in an export.

::

    records-<first record>.jsonl          a header line, then one record a line
    checkpoints-<first checkpoint>.jsonl  checkpoints, cosignatures and signers, one a line
    peers.json                            newest checkpoints of the other partitions' logs
    peers-after.json                      the same, read after the logs; in an export only

A header states the log's id, the number of the first record and the tree's frontier
before it, so that a file can be hashed without the files before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsm_pool import limits
from hsm_pool.audit.tree import HASH_BYTES

RECORDS = "records-"
CHECKPOINTS = "checkpoints-"
PEERS = "peers.json"
PEERS_AFTER = "peers-after.json"
"""In an export: the same, read after the logs. No cosignature in them is newer."""
FORMAT = 1
_WHOLE_NUMBER_MAX = 2**63 - 1


class Unreadable(Exception):
    """A file of the log is not what this program writes. The text says what."""


@dataclass(frozen=True, slots=True)
class Header:
    """First line of a file of records."""

    log_id: str
    first: int
    frontier: tuple[bytes, ...]
    sequence: int
    """Newest sequence of the chain whose records stand before."""

    def line(self) -> bytes:
        """Return the header as a line."""
        value = {
            "format": FORMAT,
            "first": self.first,
            "frontier": [root.hex() for root in self.frontier],
            "log": self.log_id,
            "sequence": self.sequence,
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    @staticmethod
    def parse(line: bytes, name: str) -> Header:
        """Read a header.

        Raises:
            Unreadable: It is none.
        """
        try:
            value = parse_json(line)
            if value["format"] != FORMAT:
                raise Unreadable(f"{name} has another format")
            frontier = tuple(bytes.fromhex(root) for root in value["frontier"])
            first, sequence = whole_number(value["first"]), whole_number(value["sequence"])
            header = Header(str(value["log"]), first, frontier, sequence)
        except (ValueError, KeyError, TypeError):
            raise Unreadable(f"{name} does not begin with a header") from None
        if len(frontier) != first.bit_count() or any(len(root) != HASH_BYTES for root in frontier):
            raise Unreadable(f"{name}: the frontier does not fit the first record")
        return header


def parse_json(octets: bytes) -> Any:
    """Return the value of a JSON text from anybody.

    Raises:
        ValueError: It is none, or nested too deeply to be read.
    """
    try:
        return json.loads(octets)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def whole_number(value: Any) -> int:
    """Return a count or number of the log.

    Raises:
        ValueError: It is none: JSON of Python also knows Infinity, 1e999 and 1.5.
    """
    if type(value) is not int or not 0 <= value <= _WHOLE_NUMBER_MAX:
        raise ValueError("not a whole number")
    return value


def records_name(first: int) -> str:
    """Return the name of the file that begins with a record."""
    return f"{RECORDS}{first:016d}.jsonl"


def checkpoints_name(first: int) -> str:
    """Return the name of the file that begins with a checkpoint."""
    return f"{CHECKPOINTS}{first:016d}.jsonl"


def listed(directory: Path, prefix: str) -> list[Path]:
    """Return the files of one kind, the oldest first."""
    return sorted(directory.glob(f"{prefix}{'[0-9]' * 16}.jsonl"))


def read_header(path: Path) -> Header:
    """Return the header of a file of records.

    Raises:
        Unreadable: It has none.
    """
    with path.open("rb") as stream:
        return Header.parse(stream.readline(limits.AUDIT_LINE_BYTES_MAX), path.name)


def read_lines(path: Path, *, skip_header: bool = False) -> Iterator[bytes]:
    """Yield the whole lines of a file; what follows the last line's end was never acknowledged.

    Raises:
        Unreadable: A line is longer than any that is written.
    """
    with path.open("rb") as stream:
        if skip_header:
            stream.readline(limits.AUDIT_LINE_BYTES_MAX)
        while line := stream.readline(limits.AUDIT_LINE_BYTES_MAX):
            if not line.endswith(b"\n"):
                if len(line) == limits.AUDIT_LINE_BYTES_MAX:
                    raise Unreadable(f"{path.name} holds a line of more than {len(line)} bytes")
                return
            yield line[:-1]


def sequence_of(record: bytes) -> tuple[int, int]:
    """Return (sequence, records of that transaction) that a record names, (0, 0) for none."""
    # Most records have none: they are not worth parsing.
    if b'"sequence":' not in record:
        return 0, 0
    try:
        properties = parse_json(record)["properties"]
        return whole_number(properties["sequence"]), whole_number(properties["transactionRecords"])
    except (ValueError, KeyError, TypeError):
        return 0, 0


def parse(record: bytes, where: str) -> dict[str, Any]:
    """Return a record's fields.

    Raises:
        Unreadable: It is no JSON object.
    """
    try:
        value = parse_json(record)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Unreadable(f"{where} is not a record")
    return value
