"""The positive control: the same scanner must see every secret, in every form, where it is."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from tests.blindness.planted import Planted
from tests.canaries import holding_process
from tests.running_pool import RunningPool
from tests.scan import Scanner, Unreadable

_PADDING_BYTES = 512


class ControlFailed(Exception):
    """The scanner does not see what is there: its finding nothing would prove nothing."""


def control_process(planted: Planted, scanner: Scanner) -> int:
    """Scan a process before and after it is handed everything; return how many forms were found.

    Raises:
        ControlFailed: A form was missed, or something was found before.
        Unreadable: The kernel does not let this user read the memory of an own child.
    """
    pieces = planted.pieces()
    with holding_process() as (process_id, give):
        if scanner.scan_process(process_id)[0]:
            raise ControlFailed("something was found in a process that holds nothing")
        give(pieces)
        found = scanner.scan_process(process_id)[0]
    return _count(planted, found, "a process")


def control_file(planted: Planted, scanner: Scanner, path: Path) -> int:
    """The same with a file, every piece between random octets.

    Raises:
        ControlFailed: A form was missed.
    """
    with path.open("xb") as file:
        for number, (_, _, text) in enumerate(planted.pieces()):
            file.write(os.urandom(_PADDING_BYTES + number % 8) + text)
    found = scanner.scan_file(path)
    path.unlink()
    return _count(planted, found, "a file")


def _count(planted: Planted, found: Counter[str], where: str) -> int:
    wanted = {f"{name} ({form})" for name, form, _ in planted.pieces()}
    missed = sorted(wanted - set(found))
    if missed:
        raise ControlFailed(f"{len(missed)} forms in {where} were missed, among them {missed[:3]}")
    return len(wanted)


def partition_memory(pool: RunningPool, scanner: Scanner) -> dict[str, int]:
    """Return what stands in a partition's memory: keys in use must, on a machine where it can be read.

    Raises:
        Unreadable: Partitions are not dumpable: only root, or whoever may trace, can look.
        ControlFailed: It was read, and no imported key was found in any partition.
    """
    found: Counter[str] = Counter()
    for index in range(3):
        process_id = pool.process_id(index, "partition")
        if process_id is None:
            raise Unreadable(f"partition {index} does not run")
        found += scanner.scan_process(process_id)[0]
    keys = {hit: count for hit, count in found.items() if hit.startswith(("RSA", "EC", "oct"))}
    if not keys:
        raise ControlFailed("no imported key was found in a partition that has just used it")
    return keys
