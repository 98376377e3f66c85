"""The controller's picture of the pool: pure folding of observations."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_controller.observe import (
    Change,
    Failure,
    Observation,
    Picture,
    State,
    Status,
    as_document,
    blank,
    observe,
)

SERVING = Status(State.SERVING, True, 7, 3)


def _all_serving() -> Picture:
    return observe(blank(range(3)), dict.fromkeys(range(3), SERVING))[0]


def test_the_first_round_says_what_each_partition_is() -> None:
    picture, changes = observe(blank([1, 0]), {0: SERVING, 1: Failure("UNAVAILABLE")})
    assert changes == [
        Change(0, "state", None, State.SERVING),
        Change(0, "fresh", None, True),
        Change(0, "serving_count", None, 3),
        Change(0, "incarnation", None, 0),
        Change(0, "housekeeper", None, False),
        Change(0, "healthy", None, True),
        Change(0, "firmware_version", None, 0),
        Change(1, "failure", None, "UNAVAILABLE"),
        Change(None, "serving_count", 0, 1),
    ]
    assert (picture.serving_count, picture.answering_count) == (1, 1)


def test_nothing_new_is_no_change_and_a_moving_sequence_is_none_either() -> None:
    picture, changes = observe(_all_serving(), {0: SERVING, 1: Status(State.SERVING, True, 900, 3)})
    assert changes == []
    assert picture.partitions[1].status == Status(State.SERVING, True, 900, 3)


def test_silence_is_one_change_and_keeps_what_was_known() -> None:
    picture, changes = observe(_all_serving(), {2: Failure("DEADLINE_EXCEEDED")})
    assert changes == [
        Change(2, "failure", None, "DEADLINE_EXCEEDED"),
        Change(None, "serving_count", 3, 2),
    ]
    assert picture.partitions[2].status == SERVING
    assert not picture.partitions[2].serving


def test_the_return_of_a_partition_tells_only_what_differs() -> None:
    silent, _ = observe(_all_serving(), {2: Failure("UNAVAILABLE")})
    _, changes = observe(silent, {2: Status(State.HEALING, False, 0, 3)})
    assert changes == [
        Change(2, "failure", "UNAVAILABLE", None),
        Change(2, "state", State.SERVING, State.HEALING),
        Change(2, "fresh", True, False),
    ]


def test_a_partition_without_freshness_does_not_count_as_serving() -> None:
    picture, _ = observe(_all_serving(), {0: Status(State.SERVING, False, 7, 3)})
    assert picture.serving_count == 2


def test_an_unknown_partition_is_refused() -> None:
    with pytest.raises(ValueError, match="not partitions of this pool"):
        observe(blank(range(3)), {3: SERVING})


OBSERVATIONS: st.SearchStrategy[Observation] = st.one_of(
    st.builds(
        Status,
        st.sampled_from(State),
        st.booleans(),
        st.integers(0, 2**64 - 1),
        st.integers(0, 3),
    ),
    st.builds(Failure, st.sampled_from(["UNAVAILABLE", "DEADLINE_EXCEEDED", "REPLY_REFUSED"])),
)


@given(st.lists(st.dictionaries(st.integers(0, 2), OBSERVATIONS), max_size=6))
def test_changes_tell_the_whole_difference(rounds: list[dict[int, Observation]]) -> None:
    """Replaying the changes alone leads to the same states, failures and counts as the picture."""
    picture = blank(range(3))
    replayed: dict[tuple[int | None, str], object] = {}
    for observations in rounds:
        before = picture
        picture, changes = observe(picture, observations)
        for change in changes:
            assert change.before != change.after
            assert replayed.get((change.partition, change.what), change.before) == change.before
            replayed[change.partition, change.what] = change.after
        assert observe(picture, observations) == (picture, [])
        assert observe(before, {}) == (before, [])
    for view in picture.partitions:
        assert replayed.get((view.index, "failure")) == (view.failure and view.failure.code)
        assert replayed.get((view.index, "state")) == (view.status and view.status.state)
    assert replayed.get((None, "serving_count"), 0) == picture.serving_count
    assert json.loads(json.dumps(as_document(picture)))["serving_count"] == picture.serving_count
