"""Admission: bounded, and fair by the work that calls really are (G8: an overload is an answer)."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hsm_pool import limits, waiting
from hsm_pool.core.admission import Admission, Bounds, Standing, Ticket
from hsm_pool.errors import Overloaded
from hsm_pool.net.admission import BOUNDS, THREADS, CallAdmission, CallKind, kind_of
from hsm_pool.net.authorization import DATA_ACTIONS, FREE_OF_DATA, Caller, Kind
from hsm_pool.net.interceptors import Gate
from hsm_pool.store.replica import boot_time

CALLER = Caller("spiffe://pool/client/greedy", Kind.CLIENT)
BOUNDS_HERE = Bounds(running=4, running_of_principal=3, waiting=6)


class Machine:
    """Admission under a clock of its own; calls of known length end when their time has come."""

    def __init__(self, bounds: Bounds = BOUNDS_HERE) -> None:
        self.admission = Admission(bounds)
        self.now = 0.0
        self.ends: dict[Ticket, float] = {}
        self.length: dict[Ticket, float] = {}
        self.served: dict[str, float] = {}

    def arrive(self, principal: str, seconds: float) -> Ticket:
        foreseen = self.admission.refuses(principal)
        ticket, changed = self.admission.arrive(principal, self.now)
        assert (ticket.standing is Standing.REFUSED) is foreseen, "known before its request is read"
        self.length[ticket] = seconds
        self.note([ticket, *changed])
        return ticket

    def note(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket.standing is Standing.RUNNING and ticket not in self.ends:
                self.ends[ticket] = self.now + self.length[ticket]

    def step(self) -> None:
        """Go on to the end of the next call."""
        ticket = min(self.ends, key=lambda entry: self.ends[entry])
        self.now = self.ends.pop(ticket)
        self.served[ticket.principal] = self.served.get(ticket.principal, 0.0) + self.length[ticket]
        self.note(self.admission.leave(ticket, self.now))


def test_the_modest_one_runs_at_once_whatever_the_greedy_one_holds() -> None:
    machine = Machine()
    greedy = [machine.arrive("greedy", 100.0) for _ in range(50)]
    assert [ticket.standing for ticket in greedy].count(Standing.RUNNING) == 3
    assert machine.arrive("modest", 1.0).standing is Standing.RUNNING


def test_a_full_queue_refuses_the_newest_of_the_greediest_only() -> None:
    machine = Machine()
    greedy = [machine.arrive("greedy", 1.0) for _ in range(20)]
    machine.arrive("third", 1.0)  # takes the place that greedy may not have
    modest = [machine.arrive("modest", 1.0) for _ in range(3)]
    assert all(ticket.standing is Standing.WAITING for ticket in modest)
    assert machine.admission.waiting == BOUNDS_HERE.waiting
    waiting = [ticket for ticket in greedy if ticket.standing is Standing.WAITING]
    assert waiting == greedy[3:6], "his own newest calls were refused, his oldest kept"
    assert machine.admission.refused == 11 + 3


def test_who_used_least_is_next_and_a_batch_counts_as_the_work_it_is() -> None:
    """Of two principals the one with calls ten times as long gets about a tenth of the calls."""
    machine = Machine(Bounds(1, 1, 6))
    counts = {"batches": 0, "single": 0}
    for name, seconds in (("batches", 1.0), ("single", 0.1)):
        machine.arrive(name, seconds)
        machine.arrive(name, seconds)
    for _ in range(400):
        before = dict(machine.served)
        machine.step()
        name = next(key for key, value in machine.served.items() if value != before.get(key))
        counts[name] += 1
        machine.arrive(name, 1.0 if name == "batches" else 0.1)
    ratio = machine.served["batches"] / machine.served["single"]
    assert 0.7 < ratio < 1.4, machine.served
    assert counts["single"] > 5 * counts["batches"]


def test_whatever_happens_the_bounds_hold_and_nobody_is_forgotten(seed: int) -> None:
    """A random history: never more than the bounds, and every call ends up run or refused."""
    chance = random.Random(seed)
    machine = Machine()
    tickets: list[Ticket] = []
    for _ in range(5_000):
        if chance.random() < 0.6:
            tickets.append(machine.arrive(chance.choice("aaaaaabcd"), chance.random()))
        elif chance.random() < 0.1 and tickets:
            chosen = chance.choice(tickets)
            if chosen.standing is Standing.WAITING:
                machine.note(machine.admission.leave(chosen, machine.now))
        elif machine.ends:
            machine.step()
        running = [ticket for ticket in machine.ends if ticket.standing is Standing.RUNNING]
        assert len(running) == machine.admission.running <= BOUNDS_HERE.running
        assert machine.admission.waiting <= BOUNDS_HERE.waiting
        for name in "abcd":
            assert sum(ticket.principal == name for ticket in running) <= BOUNDS_HERE.running_of_principal
    while machine.ends:
        machine.step()
    assert {ticket.standing for ticket in tickets} == {Standing.ENDED, Standing.REFUSED}
    assert machine.admission.waiting == machine.admission.running == 0


def test_what_is_remembered_of_principals_is_bounded() -> None:
    machine = Machine()
    for number in range(10_000):
        machine.arrive(f"principal-{number}", 0.001)
        if machine.ends:
            machine.step()
    assert len(machine.admission._used) <= 2_000


def test_the_delay_follows_the_measured_service_time() -> None:
    machine = Machine()
    for _ in range(100):
        machine.arrive("one", 2.0)
        machine.step()
    assert 1.9 < machine.admission.service_seconds < 2.1
    for _ in range(20):
        machine.arrive("one", 2.0)
    running, waiting = 3, BOUNDS_HERE.waiting
    assert machine.admission.retry_seconds() == pytest.approx((running + waiting) * 2.0 / 4, rel=0.1)


def test_a_call_that_only_waits_lets_another_one_run() -> None:
    """As many as the bound says; each runs on at once, and only its own seconds are charged."""
    admission = Admission(Bounds(1, 1, 6, paused=1))
    first, _ = admission.arrive("a", 0.0)
    second, _ = admission.arrive("a", 0.0)
    third, _ = admission.arrive("b", 0.0)
    assert admission.pause(first, 1.0) == [third], "the one who used least"
    assert admission.pause(third, 2.0) == [], "no more than the bound"
    assert (admission.running, admission.paused) == (1, 1)
    admission.resume(first, 100.0)
    assert (admission.running, admission.paused) == (2, 0), "at once"
    assert admission.leave(third, 100.0) == [], "one too many ran"
    assert admission.leave(first, 101.0) == [second]
    assert admission.pause(second, 101.0) == []
    assert admission.leave(second, 102.0) == []
    assert (admission.running, admission.paused, admission.waiting) == (0, 0, 0)
    assert first.seconds == 2.0
    admission.resume(first, 103.0)
    assert admission.running == 0, "what has ended stays so"


def test_the_store_gives_the_place_of_a_waiting_call_away() -> None:
    admission = CallAdmission()
    bounds = BOUNDS[CallKind.OPERATION]
    go_on, pausing = threading.Event(), threading.Semaphore(0)

    def call() -> None:
        with admission.call("slow", CallKind.OPERATION, boot_time() + 60), waiting.idle():
            pausing.release()
            go_on.wait(60)

    callers = [threading.Thread(target=call) for _ in range(bounds.paused)]
    for caller in callers:
        caller.start()
    for _ in callers:
        assert pausing.acquire(timeout=60), "each found a place that was given away"
    with admission.call("slow", CallKind.OPERATION, boot_time() + 60):
        assert admission.counts(CallKind.OPERATION)[0] == 1
    go_on.set()
    for caller in callers:
        caller.join(60)
    assert admission.counts(CallKind.OPERATION)[:2] == (0, 0)


# -- the shell ---------------------------------------------------------------------------


def test_calls_wait_for_their_turn_and_a_refusal_says_when_to_come_back() -> None:
    admission = CallAdmission()
    bounds = BOUNDS[CallKind.OPERATION]
    go_on, running = threading.Event(), threading.Semaphore(0)
    outcomes: list[str] = []

    def call() -> None:
        try:
            with admission.call("greedy", CallKind.OPERATION, boot_time() + 60):
                running.release()
                go_on.wait(60)
                outcomes.append("done")
        except Overloaded as refused:
            assert limits.RETRY_SECONDS_MIN <= refused.retry_seconds <= limits.RETRY_SECONDS_MAX
            assert refused.definite
            outcomes.append("refused")

    callers = [threading.Thread(target=call) for _ in range(100)]
    for caller in callers:
        caller.start()
    for _ in range(bounds.running_of_principal):
        assert running.acquire(timeout=60)
    with admission.call("modest", CallKind.OPERATION, boot_time() + 60):
        assert admission.counts(CallKind.OPERATION)[0] == bounds.running_of_principal + 1
    with admission.call("greedy", CallKind.CONTROL, boot_time() + 60):
        pass  # health, status and ceremonies are apart
    go_on.set()
    for caller in callers:
        caller.join(60)
    assert len(outcomes) == 100
    assert outcomes.count("refused") >= 100 - bounds.running_of_principal - bounds.waiting
    assert admission.counts(CallKind.OPERATION)[:2] == (0, 0)


def test_a_call_whose_time_is_over_is_not_begun() -> None:
    admission = CallAdmission()
    with pytest.raises(Overloaded), admission.call("a", CallKind.OPERATION, boot_time() - 1):
        pytest.fail("it was begun")
    assert admission.counts(CallKind.OPERATION)[:2] == (0, 0)


def test_streams_are_bounded_and_not_all_of_one_principal() -> None:
    admission = CallAdmission()
    held = [admission.stream("greedy") for _ in range(limits.STREAMS_MAX * 3 // 4)]
    for stream in held:
        stream.__enter__()
    with pytest.raises(Overloaded), admission.stream("greedy"):
        pytest.fail("too many")
    free = [admission.stream("silent", CallKind.CONTROL) for _ in range(limits.CONTROL_STREAMS_MAX * 3 // 4)]
    for stream in free:
        stream.__enter__()
    with pytest.raises(Overloaded), admission.stream("silent", CallKind.CONTROL):
        pytest.fail("too many")
    with admission.stream("modest"), admission.stream("modest", CallKind.CONTROL):
        assert admission.open_streams() == len(held) + len(free) + 2
    for stream in free:
        stream.__exit__(None, None, None)
    for stream in held:
        stream.__exit__(None, None, None)
    assert admission.open_streams() == 0


def test_a_call_that_finds_no_place_is_refused_before_its_request_is_read() -> None:
    admission = CallAdmission()
    bounds = BOUNDS[CallKind.OPERATION]
    with ExitStack() as held:
        for _ in range(bounds.running_of_principal):
            held.enter_context(admission.call("greedy", CallKind.OPERATION, boot_time() + 60))
        waiters = [threading.Thread(target=_wait_in, args=(admission,)) for _ in range(bounds.waiting)]
        for waiter in waiters:
            waiter.start()
        deadline = time.monotonic() + 60
        while admission.counts(CallKind.OPERATION)[1] < bounds.waiting and time.monotonic() < deadline:
            waiters[0].join(0.001)
        with pytest.raises(Overloaded):
            admission.check("greedy", CallKind.OPERATION)
        assert admission.counts(CallKind.OPERATION)[2] == 1, "counted"
        admission.check("modest", CallKind.OPERATION)
        admission.check("greedy", CallKind.CONTROL)
    for waiter in waiters:
        waiter.join(60)


def test_the_gate_asks_for_a_place_before_it_reads() -> None:
    """G8: whoever is refused anyway has cost neither memory nor a thread that waits for his request."""
    refuses = cast("CallAdmission", SimpleNamespace(check=_refuse))
    answers = SimpleNamespace(check=lambda _: None)
    gate = Gate(*cast("Any", (0, None, None, None, None, None, _Unread(), answers)), admission=refuses)
    with pytest.raises(Overloaded):
        gate._request(CALLER, CallKind.OPERATION, iter(()), cast("Any", None))


class _Unread:
    """Stands for the reader of requests, which must not be asked."""

    def read(self, *_: object) -> bytes:
        raise AssertionError("it was read")


def _refuse(principal: str, kind: CallKind) -> None:
    assert (principal, kind) == (CALLER.uri, CallKind.OPERATION)
    raise Overloaded("no place")


def _wait_in(admission: CallAdmission) -> None:
    with suppress(Overloaded), admission.call("greedy", CallKind.OPERATION, boot_time() + 60):
        pass


MUTATIONS = {
    *(
        "CreateKey",
        "ImportKey",
        "UpdateKey",
        "DeleteKey",
        "RecoverDeletedKey",
        "PurgeDeletedKey",
        "RestoreKey",
    ),
    *("CreateRoleDefinition", "DeleteRoleDefinition", "CreateRoleAssignment", "DeleteRoleAssignment"),
    *("StartBackup", "FinishBackup", "StartRestore", "StageRestorePart", "CommitRestore", "CancelRestore"),
    *("RestoreKeyFromPart", "RotateKey", "UpdateKeyRotationPolicy"),
}


def test_every_method_has_its_kind() -> None:
    """What waits for the store does not hold the places of what computes, and neither those of operators."""
    for method in DATA_ACTIONS:
        wanted = CallKind.MUTATION if method.rpartition("/")[2] in MUTATIONS else CallKind.OPERATION
        if "SecurityDomainService" in method:
            wanted = CallKind.CONTROL
        assert kind_of(method) is wanted, method
    for method in FREE_OF_DATA:
        assert kind_of(method) is CallKind.CONTROL


def test_a_listener_has_a_thread_for_all_that_runs_or_waits() -> None:
    most = sum(b.running + b.waiting + b.paused for kind, b in BOUNDS.items() if kind is not CallKind.RSA_KEY)
    assert most + limits.STREAMS_MAX + limits.REQUESTS_READ_MAX < THREADS
    rsa = BOUNDS[CallKind.RSA_KEY]
    assert rsa.running + rsa.waiting < BOUNDS[CallKind.MUTATION].running_of_principal, "RSA keys leave room"
