"""What the controller knows of the pool: pure, no clock, no network, no files.

A round of polling gives one observation a partition; :func:`observe` folds it into
the picture before and says what changed. :mod:`fabric_controller.planner` plans on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """State of a partition; names as in mhsm.enclave.v1.PartitionState, without UNSPECIFIED, and one more."""

    STARTING = "STARTING"
    PROVISIONED = "PROVISIONED"
    HEALING = "HEALING"
    LOCKED = "LOCKED"
    SERVING = "SERVING"
    DRAINED = "DRAINED"
    QUARANTINED = "QUARANTINED"
    REPLACED = "REPLACED"
    """Drained for good: a new one was admitted in its place, and only that one is resumed."""


@dataclass(frozen=True, slots=True)
class Status:
    """Observation: the partition answered."""

    state: State
    fresh: bool
    applied_sequence: int
    serving_count: int
    incarnation: int = 0
    housekeeper: bool = False
    healthy: bool = True
    """What gRPC health said in the same round."""
    firmware_version: int = 0
    """Version of the firmware that runs; 0: as it was installed."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Observation: the partition did not answer; the code is a name and nothing else."""

    code: str


Observation = Status | Failure


@dataclass(frozen=True, slots=True)
class PartitionView:
    """A partition as last seen: the newest status (None: never answered) and the newest failure.

    ``failure`` is None exactly when the partition answered in the last round.
    """

    index: int
    status: Status | None = None
    failure: Failure | None = None

    @property
    def answering(self) -> bool:
        """Whether the partition answered in the last round."""
        return self.failure is None and self.status is not None

    @property
    def serving(self) -> bool:
        """Whether the partition answered in the last round, serves, is fresh and healthy."""
        return (
            self.failure is None
            and self.status is not None
            and self.status.state is State.SERVING
            and self.status.fresh
            and self.status.healthy
        )

    @property
    def state_name(self) -> str:
        """State in a word, UNREACHABLE when it did not answer."""
        return self.status.state.value if self.status and self.answering else "UNREACHABLE"

    @property
    def condition(self) -> str:
        """State in words that also hold for one that is SERVING by name and does not serve."""
        if self.status and self.answering and self.status.state is State.SERVING and not self.serving:
            return "SERVING, but unhealthy" if self.status.fresh else "SERVING, but without a lease"
        return self.state_name


@dataclass(frozen=True, slots=True)
class Picture:
    """The pool as last seen, ordered by partition index."""

    partitions: tuple[PartitionView, ...]

    def view(self, index: int) -> PartitionView:
        """Return a partition of the pool."""
        return next(view for view in self.partitions if view.index == index)

    @property
    def serving_count(self) -> int:
        """How many partitions serve."""
        return sum(view.serving for view in self.partitions)

    @property
    def answering_count(self) -> int:
        """How many partitions answered in the last round."""
        return sum(view.answering for view in self.partitions)

    @property
    def housekeeper(self) -> int | None:
        """The partition that says it holds the housekeeping role."""
        holders = [v.index for v in self.partitions if v.answering and v.status and v.status.housekeeper]
        return holders[0] if holders else None


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two pictures. ``partition`` is None for the whole pool."""

    partition: int | None
    what: str
    before: str | int | bool | None
    after: str | int | bool | None


def blank(indexes: Iterable[int]) -> Picture:
    """Return the picture before the first round."""
    return Picture(tuple(PartitionView(index) for index in sorted(indexes)))


def _view_changes(before: PartitionView, after: PartitionView) -> list[Change]:
    changes = []
    if before.failure != after.failure:
        code_before = before.failure.code if before.failure else None
        code_after = after.failure.code if after.failure else None
        changes.append(Change(after.index, "failure", code_before, code_after))
    # While a partition is silent its last status stays, so a silence alone is one change, not three.
    if after.status is not None:
        for what in (
            "state",
            "fresh",
            "serving_count",
            "incarnation",
            "housekeeper",
            "healthy",
            "firmware_version",
        ):
            old = getattr(before.status, what, None)
            new = getattr(after.status, what)
            if old != new:
                changes.append(Change(after.index, what, old, new))
    return changes


def observe(previous: Picture, observations: Mapping[int, Observation]) -> tuple[Picture, list[Change]]:
    """Fold one round of observations into the picture.

    Args:
        previous: The picture before; only its partitions may be observed.
        observations: One observation for each partition that was asked; the others stay as they were.

    Returns:
        The new picture, and what changed: by partition, then the pool's serving_count. The applied
        sequence moves all the time and is no change.

    Raises:
        ValueError: An observed partition is not part of the picture.
    """
    unknown = set(observations) - {view.index for view in previous.partitions}
    if unknown:
        raise ValueError(f"not partitions of this pool: {sorted(unknown)}")
    views = []
    changes: list[Change] = []
    for before in previous.partitions:
        observation = observations.get(before.index)
        after = before
        if isinstance(observation, Status):
            after = PartitionView(before.index, observation)
        elif isinstance(observation, Failure):
            after = replace(before, failure=observation)
        views.append(after)
        changes.extend(_view_changes(before, after))
    picture = Picture(tuple(views))
    if picture.serving_count != previous.serving_count:
        changes.append(Change(None, "serving_count", previous.serving_count, picture.serving_count))
    return picture, changes


def as_document(picture: Picture) -> dict[str, Any]:
    """Return the picture as the JSON-ready object of status.json and ``status --json``."""
    return {
        "serving_count": picture.serving_count,
        "partitions": [
            {
                "index": view.index,
                "answering": view.answering,
                "failure": view.failure.code if view.failure else None,
                "state": view.status.state.value if view.status else None,
                "fresh": view.status.fresh if view.status else None,
                "applied_sequence": view.status.applied_sequence if view.status else None,
                "serving_count": view.status.serving_count if view.status else None,
                "incarnation": view.status.incarnation if view.status else None,
                "housekeeper": view.status.housekeeper if view.status else None,
                "healthy": view.status.healthy if view.status else None,
                "firmware_version": view.status.firmware_version if view.status else None,
            }
            for view in picture.partitions
        ],
    }
