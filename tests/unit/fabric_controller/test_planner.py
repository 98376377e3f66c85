"""G5: the planner against a small model of a pool, with crashes of everything at any point."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_controller.observe import Failure, Observation, Picture, State, Status, blank, observe
from fabric_controller.planner import (
    ATTEMPTS_MAX,
    INCARNATIONS_PER_ADMISSION,
    PATIENCE_MS,
    Act,
    Decision,
    Done,
    Halt,
    Idle,
    Wait,
    plan,
)
from fabric_controller.work import Attempt, Replacement, RollOut, Verb, Work, fold_all, goal_entry

STEP_MS = 500


@dataclass
class Partition:
    """A partition of the model: obeys at once, comes back some rounds after it ended."""

    incarnation: int = 1
    drained: bool = False
    away: int = 0
    """Rounds until it answers again."""

    def observed(self, serving_count: int) -> Observation:
        if self.away:
            return Failure("UNAVAILABLE")
        state = State.DRAINED if self.drained else State.SERVING
        return Status(state, not self.drained, 1, serving_count, self.incarnation)

    @property
    def serves(self) -> bool:
        return not self.away and not self.drained


@dataclass
class Pool:
    """Three partitions whose floor of two is switched off: only the planner keeps it here."""

    partitions: list[Partition] = field(default_factory=lambda: [Partition() for _ in range(3)])
    refuses_heal: bool = False
    refuses_activation: str = "OK"

    @property
    def serving_count(self) -> int:
        return sum(partition.serves for partition in self.partitions)

    def picture(self) -> Picture:
        observations = {
            index: partition.observed(self.serving_count) for index, partition in enumerate(self.partitions)
        }
        return observe(blank(range(3)), observations)[0]

    def obey(self, verb: Verb, index: int, argument: int | None = None) -> str:
        partition = self.partitions[index]
        if partition.away:
            return "UNAVAILABLE"
        match verb:
            case Verb.DRAIN:
                partition.drained = True
            case Verb.RESUME:
                partition.drained = False
            case Verb.RESTART:
                if not partition.drained:
                    return "FAILED_PRECONDITION"
                self.end(index)
            case Verb.ACTIVATE:
                return self.refuses_activation
            case Verb.HEAL if self.refuses_heal:
                return "UNAVAILABLE"
            case Verb.HEAL:
                assert argument is not None
                # It counts as drained, and comes back empty.
                self.partitions[argument].drained = True
                self.end(argument)
                self.partitions[argument].incarnation += INCARNATIONS_PER_ADMISSION
        return "OK"

    def end(self, index: int, rounds: int = 2) -> None:
        partition = self.partitions[index]
        partition.away, partition.incarnation = rounds, partition.incarnation + 1

    def time_passes(self) -> None:
        for partition in self.partitions:
            partition.away = max(0, partition.away - 1)


@dataclass
class Controller:
    """The thin shell, with a journal that survives it."""

    pool: Pool
    entries: list[dict[str, object]] = field(default_factory=list)
    now_ms: int = 1_000_000

    def note(self, **entry: object) -> None:
        self.entries.append({**entry, "time_ms": self.now_ms})

    def step(self, crash: str = "") -> Decision:
        """Take one step; crash is "" or where the controller dies: before or after sending."""
        self.now_ms += STEP_MS
        # Everything is folded anew each time: a new process knows no more than this.
        work = fold_all(self.entries, range(3))
        decision = plan(self.pool.picture(), work, self.now_ms)
        match decision:
            case Act(verb, partition, argument):
                counter = work.counter + 1
                self.note(
                    kind="command", counter=counter, verb=verb.value, partition=partition, by="controller"
                )
                if crash != "before":
                    code = self.pool.obey(verb, partition, argument)
                    if crash != "after":
                        self.note(kind="result", counter=counter, code=code)
            case Halt(reason):
                self.note(kind="halt", by="controller", reason=reason)
            case Done():
                self.note(kind="done")
        self.pool.time_passes()
        return decision


def roll_out(pool: Pool, version: int = 0) -> Controller:
    controller = Controller(pool)
    goal = RollOut((0, 1, 2), {i: p.incarnation for i, p in enumerate(pool.partitions)}, version)
    controller.note(**goal_entry(goal))
    return controller


def run(controller: Controller, steps: int = 400) -> Decision:
    decision: Decision = Idle()
    for _ in range(steps):
        decision = controller.step()
        if isinstance(decision, Done | Halt):
            break
    return decision


def test_a_rolling_restart_restarts_each_once_and_never_takes_a_second_out() -> None:
    controller = roll_out(Pool())
    fewest = 3
    for _ in range(100):
        if isinstance(controller.step(), Done):
            break
        fewest = min(fewest, controller.pool.serving_count)
    assert [partition.incarnation for partition in controller.pool.partitions] == [2, 2, 2]
    assert controller.pool.serving_count == 3
    assert fewest == 2
    sent = [(entry["verb"], entry["partition"]) for entry in controller.entries if entry["kind"] == "command"]
    assert sent == [(verb, index) for index in range(3) for verb in ("DRAIN", "RESTART", "RESUME")]
    assert isinstance(controller.step(), Idle)


FAULTS = st.lists(
    st.one_of(
        st.just(("",)),
        st.tuples(st.just("controller"), st.sampled_from(("before", "after"))),
        st.tuples(st.just("partition"), st.integers(0, 2), st.integers(1, 12)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(FAULTS)
def test_g5_no_plan_takes_a_second_partition_out(faults: list[tuple[object, ...]]) -> None:
    """Whatever crashes when: a drain or restart is sent only while two others serve; faults over, it ends.

    The model lets a drain through that the partition would refuse, so nothing but the planner is tested.
    """
    pool = Pool()
    controller = roll_out(pool)
    for fault in faults:
        before = [partition.serves for partition in pool.partitions]
        crash = ""
        if fault[0] == "partition":
            pool.end(int(fault[1]), int(fault[2]))  # type: ignore[call-overload]
            before[int(fault[1])] = False  # type: ignore[call-overload]
        elif fault[0] == "controller":
            crash = str(fault[1])
        decision = controller.step(crash)
        if isinstance(decision, Act) and decision.verb in {Verb.DRAIN, Verb.RESTART}:
            others = [serves for index, serves in enumerate(before) if index != decision.partition]
            assert sum(others) >= 2, "a second partition was taken out"
        assert sum(partition.drained for partition in pool.partitions) <= 1
    # Progress: once the faults are over it ends; an exhausted budget halts with a reason.
    decision = run(controller)
    if isinstance(decision, Halt):
        assert "in vain" in decision.reason
        controller.note(kind="continue")
        decision = run(controller)
    assert isinstance(decision, Done | Idle)
    assert pool.serving_count == 3
    assert all(partition.incarnation > 1 for partition in pool.partitions)


def test_a_partition_that_is_out_is_put_back_when_another_one_dies() -> None:
    """Capacity first: the drained partition returns to service, the work goes on later."""
    controller = roll_out(Pool())
    assert controller.step() == Act(Verb.DRAIN, 0)
    controller.pool.end(2, rounds=20)
    assert controller.step() == Act(Verb.RESUME, 0)
    assert controller.pool.serving_count == 2
    waiting = controller.step()
    assert isinstance(waiting, Wait)
    assert "fewer than two others serve: partition 2 is UNREACHABLE" in waiting.reason
    assert isinstance(run(controller), Done)


def test_it_halts_and_says_why_when_two_cannot_be_kept() -> None:
    pool = Pool()
    pool.end(2, rounds=10_000)
    controller = roll_out(pool)
    decision = run(controller, 2 * PATIENCE_MS // STEP_MS)
    assert decision == Halt(
        "partition 0 cannot be out while fewer than two others serve: partition 2 is UNREACHABLE"
    )
    assert pool.serving_count == 2
    assert isinstance(controller.step(), Idle)


def test_a_partition_that_does_not_come_back_halts_the_work() -> None:
    controller = roll_out(Pool())
    while controller.step() != Act(Verb.RESTART, 0):
        pass
    controller.pool.partitions[0].away = 10_000
    assert run(controller, 2 * PATIENCE_MS // STEP_MS) == Halt("partition 0 does not serve: UNREACHABLE")


def test_a_budget_with_back_off_ends_repeats() -> None:
    """A partition that answers a restart and does not restart is asked ever more seldom, then put back."""
    picture = Pool([Partition(drained=True), Partition(), Partition()]).picture()
    goal = RollOut((0, 1, 2), {0: 1, 1: 1, 2: 1})
    attempts: tuple[Attempt, ...] = ()
    gaps: list[int] = []
    for now_ms in range(0, 2 * PATIENCE_MS, 100):
        decision = plan(picture, Work(goal=goal, attempts=attempts, progress_ms=now_ms), now_ms)
        if decision == Act(Verb.RESUME, 0):
            break
        if isinstance(decision, Act):
            assert decision == Act(Verb.RESTART, 0)
            gaps.append(now_ms)
            attempts = (*attempts, Attempt(len(attempts), Verb.RESTART, 0, now_ms, "OK"))
    assert len(gaps) == ATTEMPTS_MAX
    pauses = [later - earlier for earlier, later in itertools.pairwise(gaps)]
    assert pauses == [3_000, 6_000, 12_000]
    work = Work(goal=goal, attempts=attempts, progress_ms=now_ms)
    halted = plan(Pool().picture(), work, now_ms)
    assert halted == Halt("RESTART was sent 4 times to partition 0 in vain (OK)")


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "FAILED_PRECONDITION"])
def test_what_cannot_be_changed_is_put_back_before_the_work_halts(code: str) -> None:
    """A refused activation costs no capacity: the partition serves again, and is not taken out anew."""
    pool = Pool()
    pool.refuses_activation = code
    controller = roll_out(pool, version=3)
    decision = run(controller, 2 * PATIENCE_MS // STEP_MS)
    assert isinstance(decision, Halt)
    assert "ACTIVATE" in decision.reason
    assert pool.serving_count == 3
    sent = [entry["verb"] for entry in controller.entries if entry["kind"] == "command"]
    assert [verb for verb in sent if verb in {"DRAIN", "RESUME", "RESTART"}] == ["DRAIN", "RESUME"]


@pytest.mark.parametrize(("by", "put_back"), [("controller", True), ("operator", False)])
def test_capacity_comes_first_also_for_halted_work(by: str, put_back: bool) -> None:
    """Unless an operator halted it: then what is out stays out, as he was told."""
    controller = roll_out(Pool())
    assert controller.step() == Act(Verb.DRAIN, 0)
    controller.note(kind="halt", by=by, reason="x")
    assert isinstance(controller.step(), Idle)
    controller.pool.end(1, rounds=1000)
    assert controller.step() == (Act(Verb.RESUME, 0) if put_back else Idle())
    assert isinstance(controller.step(), Idle)


def drained_by_operator(controller: Controller, index: int) -> None:
    """Have an operator take a partition out of service."""
    controller.note(kind="command", counter=1, verb="DRAIN", partition=index, by="operator")
    controller.pool.obey(Verb.DRAIN, index)
    controller.note(kind="result", counter=1, code="OK")


def test_halted_work_resumes_nothing_that_an_operator_drained() -> None:
    """He may look for what is wrong with it; capacity is his affair then."""
    controller = Controller(Pool())
    drained_by_operator(controller, 0)
    controller.note(**goal_entry(RollOut((0,), {0: 1})))
    controller.note(kind="halt", by="controller", reason="x")
    controller.pool.end(1, rounds=1000)
    assert isinstance(controller.step(), Idle)
    assert controller.pool.partitions[0].drained


def test_firmware_that_is_given_up_resumes_nothing_that_an_operator_drained() -> None:
    pool = Pool()
    pool.refuses_activation = "PERMISSION_DENIED"
    controller = Controller(pool)
    drained_by_operator(controller, 0)
    controller.note(**goal_entry(RollOut((0,), {0: 1}, 3)))
    assert isinstance(run(controller, 2 * PATIENCE_MS // STEP_MS), Halt)
    assert pool.partitions[0].drained


@pytest.mark.parametrize("goal", [RollOut((1,), {1: 1}), Replacement(1, 1)])
def test_a_drain_that_was_never_obeyed_leaves_nothing_out(goal: RollOut | Replacement) -> None:
    """No answer, and it serves: when the controller takes it out itself, it puts it back."""
    pool = Pool()
    controller = Controller(pool)
    controller.note(kind="command", counter=1, verb="DRAIN", partition=1, by="operator")
    controller.note(kind="result", counter=1, code="UNAVAILABLE")
    if isinstance(goal, Replacement):
        pool.end(1, rounds=1000)
    controller.note(**goal_entry(goal))
    assert isinstance(run(controller), Done)
    assert pool.serving_count == 3


@pytest.mark.parametrize("set_back_ms", [0, 10 * PATIENCE_MS])
def test_a_clock_that_was_set_back_costs_no_time(set_back_ms: int) -> None:
    pool = Pool()
    pool.end(1, rounds=10_000)
    pool.refuses_heal = True
    controller = replacement(pool, 1, 2)
    assert controller.step() == Act(Verb.HEAL, 0, 1)
    controller.now_ms -= set_back_ms
    assert isinstance(run(controller, 2 * PATIENCE_MS // STEP_MS), Halt)


def test_a_partition_that_an_operator_drained_stays_drained() -> None:
    """It is restarted, and not resumed; the others must wait, so the work halts and says so."""
    pool = Pool()
    controller = Controller(pool)
    controller.note(kind="command", counter=1, verb="DRAIN", partition=1, by="operator")
    pool.obey(Verb.DRAIN, 1)
    controller.note(kind="result", counter=1, code="OK")
    controller.note(**goal_entry(RollOut((1,), {1: 1})))
    assert isinstance(run(controller), Done)
    assert pool.partitions[1].drained
    assert pool.partitions[1].incarnation == 2
    controller.note(**goal_entry(RollOut((0,), {0: 1})))
    decision = run(controller, 2 * PATIENCE_MS // STEP_MS)
    assert isinstance(decision, Halt)
    assert "partition 1 is DRAINED" in decision.reason


def replacement(pool: Pool, partition: int, incarnation: int) -> Controller:
    controller = Controller(pool)
    controller.note(**goal_entry(Replacement(partition, incarnation)))
    return controller


def test_a_dead_partition_is_replaced_by_way_of_a_living_one() -> None:
    """Sent once when it is obeyed; the new one, with a higher incarnation, is resumed."""
    pool = Pool()
    pool.end(1, rounds=10_000)
    controller = replacement(pool, 1, 2)
    assert controller.step() == Act(Verb.HEAL, 0, 1)
    assert isinstance(controller.step(), Wait)
    assert controller.step() == Act(Verb.RESUME, 1)
    assert isinstance(run(controller), Done)
    assert pool.serving_count == 3


@pytest.mark.parametrize("moment", ["killed", "timed out", "halted and resumed"])
def test_a_half_done_replacement_is_resumed_and_not_done_again(moment: str) -> None:
    """The new one shows that it was admitted, whatever is known of the command: its disk is not put aside."""
    pool = Pool()
    pool.end(1, rounds=10_000)
    controller = replacement(pool, 1, 2)
    assert controller.step("after" if moment == "killed" else "") == Act(Verb.HEAL, 0, 1)
    if moment == "timed out":
        controller.entries[-1]["code"] = "DEADLINE_EXCEEDED"
    if moment == "halted and resumed":
        controller.note(kind="halt", by="controller", reason="x")
        controller.note(kind="continue")
        pool.partitions[1].away = 0
    decisions = [controller.step() for _ in range(20)]
    assert [decision for decision in decisions if isinstance(decision, Act)] == [Act(Verb.RESUME, 1)]
    assert pool.serving_count == 3
    assert fold_all(controller.entries, range(3)).goal is None


@pytest.mark.parametrize("state", [State.STARTING, State.HEALING, State.SERVING])
def test_a_new_partition_that_does_not_serve_yet_is_waited_for(state: State) -> None:
    """Nothing is known of what was sent, and still it is not replaced again."""
    new = Status(state, False, 0, 2, INCARNATIONS_PER_ADMISSION + 1)
    serving = Status(State.SERVING, True, 1, 2, 1)
    picture = observe(blank(range(3)), {0: serving, 1: new, 2: serving})[0]
    assert isinstance(plan(picture, Work(goal=Replacement(1, 5)), 0), Wait)


def test_an_old_partition_that_comes_back_is_not_taken_for_a_new_one() -> None:
    """Its own next start is no replacement, be it drained or serving."""
    serving = Status(State.SERVING, True, 1, 2, 1)
    back = {0: serving, 1: replace(serving, incarnation=6), 2: serving}
    picture = observe(blank(range(3)), back)[0]
    assert isinstance(plan(picture, Work(goal=Replacement(1, 5)), 0), Halt)
    drained = {**back, 1: Status(State.DRAINED, False, 1, 2, 6)}
    picture = observe(blank(range(3)), drained)[0]
    assert plan(picture, Work(goal=Replacement(1, 5)), 0) == Act(Verb.HEAL, 0, 1)


def test_a_replacement_that_fails_is_asked_of_another_one_and_halts_in_the_end() -> None:
    pool = Pool()
    pool.end(1, rounds=10_000)
    pool.refuses_heal = True
    controller = replacement(pool, 1, 2)
    asked = []
    for _ in range(400):
        decision = controller.step()
        if isinstance(decision, Act):
            asked.append(decision.partition)
        if isinstance(decision, Halt):
            break
    assert asked == [0, 2, 0, 2]
    assert decision == Halt("partition 1 was not replaced (UNAVAILABLE)")


def test_g5_nothing_is_replaced_while_it_serves_or_while_fewer_than_two_do() -> None:
    assert replacement(Pool(), 1, 1).step() == Halt("partition 1 serves: there is nothing to replace")
    pool = Pool()
    pool.end(0, rounds=10_000)
    pool.end(1, rounds=10_000)
    waiting = replacement(pool, 1, 2).step()
    assert isinstance(waiting, Wait)
    assert isinstance(run(replacement(pool, 1, 2), 400), Halt)


def test_a_plan_depends_on_nothing_but_its_inputs() -> None:
    pool = Pool()
    controller = roll_out(pool)
    generator = random.Random(1)
    for _ in range(50):
        if generator.random() < 0.2:
            pool.end(generator.randrange(3))
        work, picture = fold_all(controller.entries, range(3)), pool.picture()
        assert plan(picture, work, controller.now_ms) == plan(picture, work, controller.now_ms)
        controller.step()
