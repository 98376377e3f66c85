"""What an operator is told of work under way, of half-done work, and of what to do next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fabric_controller.observe import Failure, Observation, Picture, State, Status, blank, observe
from fabric_controller.planner import INCARNATIONS_PER_ADMISSION
from fabric_controller.report import (
    drain_refusal,
    resume_refusal,
    state_cell,
    suggestions,
    work_document,
    work_line,
)
from fabric_controller.work import REFUSED, Attempt, Replacement, RollOut, Verb, Work

NEW = Status(State.SERVING, True, 1, 3, 5, firmware_version=7)
OLD = replace(NEW, incarnation=4, firmware_version=4)
DRAINED = replace(OLD, state=State.DRAINED, fresh=False)
REPLACED = replace(DRAINED, state=State.REPLACED)
SILENT = Failure("UNAVAILABLE")
PATCH = RollOut((0, 1, 2), {0: 4, 1: 4, 2: 4}, 7)


def picture(*observations: Observation) -> Picture:
    return observe(blank(range(3)), dict(enumerate(observations)))[0]


def attempts(*verbs: Verb, partition: int, code: str = "OK") -> tuple[Attempt, ...]:
    return tuple(Attempt(number, verb, partition, 0, code) for number, verb in enumerate(verbs))


RESTARTED = attempts(Verb.STAGE, Verb.DRAIN, Verb.ACTIVATE, Verb.RESTART, partition=1)


def test_halted_work_hides_no_broken_partition() -> None:
    """Else status sends in a circle: resume halts again, as long as nobody replaces it."""
    work = Work(goal=RollOut((0,), {0: 4}), halted="partition 0 does not serve: QUARANTINED")
    quarantined = replace(DRAINED, state=State.QUARANTINED)
    lines = suggestions(picture(quarantined, OLD, OLD), work)
    assert lines[1:2] == ["mhsm-fabric replace 0"]
    assert lines[-2:] == ["mhsm-fabric resume", "mhsm-fabric halt --abandon"]
    assert suggestions(picture(DRAINED, OLD, OLD), work)[:1] == [
        "remove the cause and resume, or drop the work"
    ]
    assert suggestions(picture(NEW, OLD, OLD), work) == ["nothing is left to do of it", "mhsm-fabric resume"]


def test_a_patch_under_way_shows_goal_version_and_progress() -> None:
    work = Work(goal=PATCH, attempts=RESTARTED)
    document = work_document(picture(NEW, SILENT, OLD), work, 0)
    assert document == {
        "state": "running",
        "goal": "patch",
        "version": 7,
        "partitions": [0, 1, 2],
        "done": [0],
        "step": None,
        "reason": "waiting for partition 1 to serve again after its restart",
        "drained_by_operator": [],
        "half_replaced": [],
    }
    line = f"work: patch to version 7, running, 1 of 3 done: {document['reason']}"
    assert work_line(picture(NEW, SILENT, OLD), work, 0) == line
    begun = work_document(picture(OLD, OLD, OLD), Work(goal=PATCH), 0)
    assert (begun["step"], begun["reason"], begun["done"]) == ("stage 0", "", [])
    idle = work_document(picture(OLD, OLD, OLD), Work(), 0)
    assert (idle["state"], idle["goal"], idle["version"], idle["partitions"]) == ("idle", None, None, [])
    assert work_line(picture(OLD, OLD, OLD), Work(), 0) == ""


@pytest.mark.parametrize(
    ("status", "words"),
    [(replace(OLD, fresh=False), "without a lease"), (replace(OLD, healthy=False), "unhealthy")],
)
def test_a_partition_is_never_said_not_to_serve_because_it_is_serving(status: Status, words: str) -> None:
    reason = work_document(picture(status, OLD, OLD), Work(goal=PATCH), 0)["reason"]
    assert reason == f"partition 0 does not serve: SERVING, but {words}"


def test_a_patch_that_went_back_names_versions_and_log() -> None:
    gone_back = picture(NEW, replace(OLD, incarnation=9), OLD)
    reason = work_document(gone_back, Work(goal=PATCH, attempts=RESTARTED), 0)["reason"]
    assert "partition 1 does not start version 7 and went back to version 4" in reason
    assert "nodes/1/logs/partition.1.log" in reason
    lines = suggestions(gone_back, Work(goal=PATCH, halted=reason))
    assert lines[0] == "the partitions run different firmware (1, 2: version 4; 0: version 7)"
    assert "publish a higher one and patch to it" in lines[1]
    assert lines[-2:] == ["mhsm-fabric resume", "mhsm-fabric halt --abandon"]
    # Dropped, it is no less half done.
    mixture, command = suggestions(gone_back, Work())
    assert ("different firmware" in mixture, command) == (True, "mhsm-fabric patch 7")


@pytest.mark.parametrize(("runs", "said"), [(0, True), (4, False)])
def test_a_refused_image_sends_to_the_log_and_blames_the_repository_only_if_it_may(
    runs: int, said: bool
) -> None:
    status = replace(OLD, firmware_version=runs)
    refused = Work(goal=PATCH, attempts=attempts(Verb.STAGE, partition=0, code=REFUSED))
    reason = work_document(picture(status, status, status), refused, 0)["reason"]
    assert reason.startswith("partition 0 refuses to STAGE version 7: nodes/0/logs/partition.log says why")
    assert ("--firmware-repository" in reason) is said


def test_who_drained_a_partition_shows() -> None:
    seen = picture(OLD, DRAINED, OLD)
    view = seen.view(1)
    assert state_cell(view, seen, Work()) == "DRAINED"
    assert state_cell(view, seen, Work(drained=frozenset({1}))) == "DRAINED (operator)"
    halted = Work(goal=RollOut((1,), {1: 4}), halted="x")
    assert state_cell(view, seen, halted) == "DRAINED (controller)"
    assert state_cell(view, seen, Work(begun=(Replacement(1, 4),))) == "DRAINED (half replaced)"


def test_a_half_done_replacement_shows_until_the_new_partition_is_there() -> None:
    """Its goal may be dropped: no drained partition is said to be resumable that is not (G5)."""
    work = Work(begun=(Replacement(1, 4),))
    seen = picture(OLD, DRAINED, OLD)
    assert work_document(seen, work, 0)["half_replaced"] == [1]
    assert suggestions(seen, work)[-1] == "mhsm-fabric replace 1"
    assert "replacement was begun" in resume_refusal(seen.view(1), work)
    new = replace(DRAINED, incarnation=INCARNATIONS_PER_ADMISSION + 1)
    seen = picture(OLD, new, OLD)
    assert work_document(seen, work, 0)["half_replaced"] == []
    assert suggestions(seen, work) == ["mhsm-fabric resume 1"]
    assert resume_refusal(seen.view(1), work) == ""


def test_what_stands_in_the_way_of_halted_work_is_suggested_first() -> None:
    work = Work(goal=RollOut((0, 1, 2), PATCH.incarnations), halted="x", drained=frozenset({1}))
    lines = suggestions(picture(OLD, DRAINED, OLD), work)
    assert lines[0] == "mhsm-fabric resume 1"
    assert lines[-2:] == ["mhsm-fabric resume", "mhsm-fabric halt --abandon"]


MADE = replace(OLD, state=State.PROVISIONED, fresh=False)
LOCKED = replace(OLD, state=State.LOCKED, fresh=False)
QUARANTINED = replace(OLD, state=State.QUARANTINED, fresh=False)


@pytest.mark.parametrize(
    ("observations", "command"),
    [
        ((MADE, MADE, MADE), "mhsm status"),
        ((LOCKED, LOCKED, LOCKED), "mhsm security-domain init-recovery --output attempt.json"),
        ((OLD, OLD, LOCKED), "mhsm-fabric replace 2"),
        ((OLD, OLD, QUARANTINED), "mhsm-fabric replace 2"),
        ((OLD, OLD, DRAINED), "mhsm-fabric resume 2"),
        ((OLD, OLD, REPLACED), "mhsm-fabric replace 2"),
        ((OLD, OLD, replace(OLD, state=State.HEALING)), "mhsm-fabric status --watch"),
    ],
)
def test_each_state_leads_to_what_helps(observations: tuple[Observation, ...], command: str) -> None:
    assert suggestions(picture(*observations), Work())[-1] == command


def test_an_old_partition_says_that_it_was_replaced_where_the_journal_is_gone() -> None:
    """Nobody resumes it: what was begun has to be gone on with."""
    seen = picture(OLD, OLD, REPLACED)
    assert state_cell(seen.view(2), seen, Work()) == "DRAINED (half replaced)"
    assert work_document(seen, Work(), 0)["half_replaced"] == [2]
    assert "its replacement was begun" in resume_refusal(seen.view(2), Work())


def test_a_pool_that_is_well_needs_nothing() -> None:
    assert suggestions(picture(OLD, OLD, OLD), Work()) == []
    assert "nodes/2/logs/partition.log" in suggestions(picture(OLD, OLD, SILENT), Work())[0]


def test_refusals_of_drain_and_resume_say_why() -> None:
    seen = picture(OLD, DRAINED, OLD)
    expected = "partition 2 cannot be drained while fewer than two others serve: partition 1 is DRAINED"
    assert drain_refusal(seen, 2) == expected
    assert drain_refusal(seen, 1) == "", "it is drained already"
    assert drain_refusal(picture(OLD, OLD, OLD), 2) == ""
    assert "is PROVISIONED" in drain_refusal(picture(MADE, OLD, OLD), 0)
    assert resume_refusal(seen.view(1), Work()) == ""
    assert resume_refusal(picture(MADE, OLD, OLD).view(0), Work()) == (
        "partition 0 is PROVISIONED: only a drained one is resumed"
    )
