"""A dry run is the planner's own run on a model: it promises no step that the controller would not take."""

from __future__ import annotations

from fabric_controller.forecast import forecast, in_words
from fabric_controller.observe import Failure, Observation, Picture, State, Status, blank, observe
from fabric_controller.planner import Done, Halt, Wait
from fabric_controller.work import Replacement, RollOut

SERVING = Status(State.SERVING, True, 1, 3, 4, firmware_version=2)
DRAINED = Status(State.DRAINED, False, 1, 2, 4, firmware_version=2)
ALL = RollOut((0, 1, 2), {0: 4, 1: 4, 2: 4})


def picture(*observations: Observation) -> Picture:
    return observe(blank(range(3)), dict(enumerate(observations)))[0]


def told(*observations: Observation, goal: RollOut | Replacement, drained: tuple[int, ...] = ()) -> list[str]:
    """Return the steps in words; the end must be Done."""
    acts, end = forecast(picture(*observations), goal, frozenset(drained))
    assert isinstance(end, Done), end
    return [in_words(act.verb, act.partition, act.argument) for act in acts]


def test_a_healthy_pool_takes_every_step_in_turn() -> None:
    healthy = (SERVING, SERVING, SERVING)
    expected = [f"{verb} {index}" for index in range(3) for verb in ("drain", "restart", "resume")]
    assert told(*healthy, goal=ALL) == expected
    verbs = ("stage", "drain", "activate", "restart", "resume")
    expected = [f"{verb} {index}" for index in range(3) for verb in verbs]
    assert told(*healthy, goal=RollOut((0, 1, 2), ALL.incarnations, 3)) == expected
    assert told(*healthy, goal=RollOut((0, 1, 2), ALL.incarnations, 2)) == []


def test_what_an_operator_drained_is_restarted_and_not_resumed() -> None:
    goal = RollOut((1,), {1: 4})
    assert told(SERVING, DRAINED, SERVING, goal=goal, drained=(1,)) == ["restart 1"]
    assert told(SERVING, DRAINED, SERVING, goal=goal) == ["restart 1", "resume 1"]


def test_what_cannot_be_done_now_is_said_with_its_reason() -> None:
    acts, end = forecast(picture(SERVING, DRAINED, SERVING), ALL, frozenset({1}))
    reason = "partition 0 cannot be out while fewer than two others serve: partition 1 is DRAINED"
    assert (acts, end) == ((), Wait(reason))
    made = Status(State.PROVISIONED, False, 0, 0, 4)
    acts, end = forecast(picture(made, made, made), ALL, frozenset())
    assert (acts, end) == ((), Wait("partition 0 does not serve: PROVISIONED"))


def test_a_replacement_is_foreseen() -> None:
    gone = Failure("UNAVAILABLE")
    assert told(SERVING, SERVING, gone, goal=Replacement(2, 0)) == ["heal 2 by way of 0", "resume 2"]
    assert told(SERVING, SERVING, DRAINED, goal=Replacement(2, 4)) == ["heal 2 by way of 0", "resume 2"]
    acts, end = forecast(picture(SERVING, SERVING, SERVING), Replacement(2, 4), frozenset())
    assert (acts, isinstance(end, Halt)) == ((), True)
