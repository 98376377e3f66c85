"""Summaries of repeated measurements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any


def summary(values: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """Return minimum, median and maximum of repeated measurements, and how many there were."""
    return {
        "minimum": round(min(values), digits),
        "median": round(median(values), digits),
        "maximum": round(max(values), digits),
        "repeats": len(values),
    }


def tail(values: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """Return a summary with its 99th percentile; of fewer than 100 values that is the maximum."""
    return {**summary(values, digits), "p99": round(percentile(values, 0.99), digits)}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of all values does not exceed."""
    ordered = sorted(values)
    rank = -(-len(ordered) * share // 1)
    return ordered[max(0, min(len(ordered), int(rank)) - 1)]
