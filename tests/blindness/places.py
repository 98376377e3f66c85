"""Where the controller could have a secret: its memory, its files, all logs, and what it received."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.blindness import recording
from tests.running_pool import RunningPool
from tests.scan import Scanner, files_under


@dataclass(frozen=True, slots=True)
class Scanned:
    """One place that was scanned."""

    place: str
    moment: str
    size_bytes: int
    found: Counter[str]

    @property
    def hits(self) -> int:
        """How many occurrences there were."""
        return self.found.total()


def scan_memory(pool: RunningPool, scanner: Scanner, moment: str) -> Scanned:
    """Scan the controller's memory, arguments and environment as they are now.

    Raises:
        Unreadable: The kernel does not let this user read it: nothing is proved then.
        AssertionError: Hardly anything was readable.
    """
    process_id = pool.connection.fabric_controller["process_id"]
    found, size = scanner.scan_process(process_id)
    if size < 1024 * 1024:
        raise AssertionError(f"hardly any memory of the controller was read: {size} bytes")
    return Scanned("memory", moment, size, found)


def scan_files(pool: RunningPool, scanner: Scanner, recordings: Path, output: Path) -> list[Scanned]:
    """Scan what outlives the controller: journal, status, settings, logs, recordings, operators' output.

    Raises:
        AssertionError: One of them is missing or empty, so that its scan would prove nothing.
    """
    fabric = files_under(pool.directory / "fabric")
    logs = [path for path in files_under(pool.directory) if path.suffix == ".log" and path not in fabric]
    names = {path.name for path in [*fabric, *logs]}
    expected = {
        "journal",
        "status.json",
        "fabric.json",
        "fabric-controller.log",
        "partition.log",
        "store.log",
    }
    if not expected <= names:
        raise AssertionError(f"not there to be scanned: {expected - names}")
    groups = {
        "files": [path for path in fabric if path.suffix != ".log"],
        "logs": [path for path in fabric if path.suffix == ".log"] + logs,
        "recorded messages": recording.files(recordings),
        "operators' output": [output],
    }
    scanned = [
        _scanned(place, [(path.name, path.read_bytes()) for path in paths], scanner)
        for place, paths in groups.items()
    ]
    empty = [group.place for group in scanned if not group.size_bytes]
    if empty:
        raise AssertionError(f"nothing is in {empty}")
    return scanned


def _scanned(place: str, contents: list[tuple[str, bytes]], scanner: Scanner) -> Scanned:
    found: Counter[str] = Counter()
    for name, octets in contents:
        found += Counter({f"{hit} in {name}": count for hit, count in scanner.scan(octets).items()})
    return Scanned(place, "", sum(len(octets) for _, octets in contents), found)
