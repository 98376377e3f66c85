"""The checker of G2 must itself be right: known histories, planted faults, and a brute-force rival."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chaos.linearizability import Model, Operation, Verdict, Witness, check
from tests.chaos.model import KEY_LIFE_CYCLE

# A register: ("write", value) -> "ok"; ("read",) -> the value, "empty" at first.


def _register_step(state: Any, operation: Any, result: Any) -> list[Any]:
    if operation[0] == "write":
        return [operation[1]] if result in (None, "ok") else []
    return [state] if result in (None, state) else []


REGISTER = Model("empty", _register_step)


def _op(
    start: int, end: int | None, operation: tuple[Any, ...], result: Any = None, key: str = "k"
) -> Operation:
    return Operation(start, key, start, end, operation, result)


def _write(start: int, end: int | None, value: str) -> Operation:
    return _op(start, end, ("write", value), None if end is None else "ok")


def _read(start: int, end: int, value: str) -> Operation:
    return _op(start, end, ("read",), value)


VALID_REGISTERS = {
    "nothing": [],
    "one after the other": [_write(0, 1, "a"), _read(2, 3, "a"), _write(4, 5, "b"), _read(6, 7, "b")],
    "a read beside a write may see either": [_write(0, 9, "a"), _read(1, 2, "empty"), _read(3, 4, "a")],
    "writes beside each other in either order": [_write(0, 9, "a"), _write(1, 8, "b"), _read(10, 11, "a")],
    "the same instant is beside": [_write(0, 5, "a"), _read(5, 6, "empty")],
    "a lost write never happened": [_write(0, None, "a"), _read(5, 6, "empty")],
    "a lost write happened late": [_write(0, None, "a"), _read(5, 6, "empty"), _read(7, 8, "a")],
    "two equal lost writes happened both": [
        _write(0, None, "a"),
        _write(1, None, "a"),
        _read(2, 3, "a"),
        _write(4, 5, "b"),
        _read(6, 7, "a"),
    ],
}

INVALID_REGISTERS = {
    "stale read": [_write(0, 1, "a"), _read(2, 3, "empty")],
    "read from nowhere": [_write(0, 1, "a"), _read(2, 3, "b")],
    "read of the future": [_read(0, 1, "a"), _write(2, 3, "a")],
    "two readers see two orders": [
        _write(0, 9, "a"),
        _write(0, 9, "b"),
        _read(10, 11, "a"),
        _read(12, 13, "b"),
    ],
    "new then old beside a write": [_write(0, 9, "a"), _read(1, 2, "a"), _read(3, 4, "empty")],
    "a lost write happened before it was sent": [_read(0, 1, "a"), _write(2, None, "a")],
    "a lost write happened twice": [
        _write(0, None, "a"),
        _read(2, 3, "a"),
        _write(4, 5, "b"),
        _read(6, 7, "a"),
    ],
    "a lost write was undone": [_write(0, None, "a"), _read(2, 3, "a"), _read(4, 5, "empty")],
}


@pytest.mark.parametrize("name", VALID_REGISTERS)
def test_g2_valid_register(name: str) -> None:
    assert check(VALID_REGISTERS[name], REGISTER).verdict is Verdict.VALID


@pytest.mark.parametrize("name", INVALID_REGISTERS)
def test_g2_invalid_register(name: str) -> None:
    assert check(INVALID_REGISTERS[name], REGISTER).verdict is Verdict.INVALID


def _call(start: int, end: int | None, operation: str, *result: Any) -> Operation:
    verb, _, argument = operation.partition(" ")
    arguments = {"": (), "yes": (True,), "no": (False,)}[argument]
    return _op(start, end, (verb, *arguments), result or None)


VALID_KEYS = {
    "a disable beside a sign": [
        _call(0, 1, "create yes", "ok", "v1"),
        _call(2, 9, "update no", "ok", "v1"),
        _call(3, 4, "sign", "error", "KEY_NOT_USABLE"),
    ],
    "the name of a lost create shows later": [
        _call(0, None, "create yes"),
        _call(1, 2, "get", "error", "KEY_NOT_FOUND"),
        _call(3, 4, "sign", "ok", "v1"),
        _call(5, 6, "create yes", "error", "KEY_EXISTS"),
        _call(7, 8, "get", "ok", "v1", True),
    ],
    "two lost creates, two names": [
        _call(0, None, "create no"),
        _call(1, None, "create no"),
        _call(2, 3, "sign", "ok", "v1"),
        _call(4, 5, "sign", "ok", "v2"),
    ],
    "a lost disable strikes late": [
        _call(0, 1, "create yes", "ok", "v1"),
        _call(2, None, "update no"),
        _call(3, 4, "sign", "ok", "v1"),
        _call(5, 6, "sign", "error", "KEY_NOT_USABLE"),
    ],
    "a lost delete and recover cross": [
        _call(0, 1, "create yes", "ok", "v1"),
        _call(2, None, "delete"),
        _call(3, 4, "sign", "error", "KEY_SOFT_DELETED"),
        _call(5, None, "recover"),
        _call(6, 7, "sign", "error", "KEY_SOFT_DELETED"),
        _call(8, 9, "sign", "ok", "v1"),
    ],
}

INVALID_KEYS = {
    "a sign after an acknowledged disable": [
        _call(0, 1, "create yes", "ok", "v1"),
        _call(2, 3, "update no", "ok", "v1"),
        _call(4, 5, "sign", "ok", "v1"),
    ],
    "a sign after an acknowledged delete": [
        _call(0, 1, "create yes", "ok", "v1"),
        _call(2, 3, "delete", "ok"),
        _call(4, 5, "sign", "ok", "v1"),
    ],
    "a sign with the old version": [
        _call(0, 1, "create yes", "ok", "v1"),
        _call(2, 3, "create no", "ok", "v2"),
        _call(4, 5, "sign", "ok", "v1"),
    ],
    "an acknowledged create is lost (G1)": [
        _call(0, 1, "create yes", "ok", "v1"),
        _call(2, 3, "get", "error", "KEY_NOT_FOUND"),
    ],
    "two creates win": [
        _call(0, 9, "create yes", "ok", "v1"),
        _call(1, 8, "create yes", "ok", "v2"),
    ],
    "a lost disable comes and goes": [
        _call(0, 1, "create yes", "ok", "v1"),
        _call(2, None, "update no"),
        _call(3, 4, "sign", "error", "KEY_NOT_USABLE"),
        _call(5, 6, "sign", "ok", "v1"),
    ],
    "one lost create, two names": [
        _call(0, None, "create no"),
        _call(2, 3, "sign", "ok", "v1"),
        _call(4, 5, "sign", "ok", "v2"),
    ],
    "a purged key returns": [
        _call(0, 1, "create yes", "ok", "v1"),
        _call(2, 3, "delete", "ok"),
        _call(4, 5, "purge", "ok"),
        _call(6, 7, "recover", "ok"),
    ],
}


@pytest.mark.parametrize("name", VALID_KEYS)
def test_g2_valid_key(name: str) -> None:
    assert check(VALID_KEYS[name], KEY_LIFE_CYCLE).verdict is Verdict.VALID


@pytest.mark.parametrize("name", INVALID_KEYS)
def test_g2_invalid_key(name: str) -> None:
    assert check(INVALID_KEYS[name], KEY_LIFE_CYCLE).verdict is Verdict.INVALID


def test_keys_are_judged_apart() -> None:
    good = [replace(operation, key="good") for operation in VALID_KEYS["a disable beside a sign"]]
    bad = INVALID_KEYS["a sign after an acknowledged disable"]
    assert check(good, KEY_LIFE_CYCLE).verdict is Verdict.VALID
    report = check([*good, *bad], KEY_LIFE_CYCLE)
    assert report.witness is not None
    assert report.witness.key == "k"


def test_the_witness_ends_at_the_first_contradiction() -> None:
    history = [
        _write(0, 1, "a"),
        _read(2, 3, "a"),
        _write(4, 5, "b"),
        _read(6, 7, "a"),
        *(_read(10 + 2 * i, 11 + 2 * i, "b") for i in range(20)),
    ]
    report = check(history, REGISTER)
    assert report.witness == Witness(
        key="k", linearised=tuple(history[:3]), state="b", stuck=(replace(history[3]),)
    )


def _hard(writers: int, key: str) -> list[Operation]:
    """Return an invalid history that only 2^writers configurations refute."""
    writes = [_write(0, 10, f"{number}") for number in range(writers)]
    return [replace(operation, key=key) for operation in (*writes, _read(20, 21, "never written"))]


def test_running_out_of_time_is_unknown_and_never_a_pass() -> None:
    started = time.monotonic()
    report = check(_hard(30, "hard"), REGISTER, limit_seconds=0.3)
    assert report.verdict is Verdict.UNKNOWN
    assert report.witness is None
    assert time.monotonic() - started < 60
    assert check([_write(0, 1, "a")], REGISTER, limit_seconds=0).verdict is Verdict.UNKNOWN
    assert check(_hard(5, "small"), REGISTER).verdict is Verdict.INVALID


def test_a_hard_key_does_not_hide_a_broken_one() -> None:
    broken = INVALID_REGISTERS["stale read"]
    assert check([*_hard(30, "hard"), *broken], REGISTER, limit_seconds=6).verdict is Verdict.INVALID
    healthy = VALID_REGISTERS["one after the other"]
    assert check([*_hard(30, "hard"), *healthy], REGISTER, limit_seconds=1).verdict is Verdict.UNKNOWN


def test_an_operation_has_a_return_and_a_result_or_neither() -> None:
    for returned_at, result in ((1, None), (None, "ok"), (-1, "ok")):
        with pytest.raises(ValueError, match="return"):
            Operation(0, "k", 0, returned_at, ("read",), result)


# Random histories of a simulated key that is linearizable by construction.


class SimulatedKey:
    """One key as plain code, written apart from the model."""

    def __init__(self) -> None:
        self.versions: list[list[Any]] = []
        self.deleted = False
        self.created = 0

    def perform(self, verb: str, argument: bool | None = None) -> tuple[Any, ...]:
        if verb == "create":
            if self.deleted or (self.versions and argument):
                return ("error", "KEY_EXISTS")
            self.created += 1
            self.versions.append([f"v{self.created}", True])
            return ("ok", self.versions[-1][0])
        if verb in ("recover", "purge"):
            if not self.deleted:
                return ("error", "DELETED_KEY_NOT_FOUND")
            self.deleted = False
            if verb == "purge":
                self.versions = []
            return ("ok",)
        if not self.versions:
            return ("error", "KEY_NOT_FOUND")
        if self.deleted:
            return ("error", "KEY_SOFT_DELETED")
        if verb == "delete":
            self.deleted = True
            return ("ok",)
        name, enabled = self.versions[-1]
        if verb == "update":
            self.versions[-1][1] = argument
        if verb == "sign" and not enabled:
            return ("error", "KEY_NOT_USABLE")
        return ("ok", name, enabled) if verb == "get" else ("ok", name)


MIXED = {
    ("create", True): 3,
    ("create", False): 2,
    ("update", False): 4,
    ("update", True): 6,
    ("delete",): 3,
    ("recover",): 4,
    ("purge",): 1,
    ("get",): 10,
    ("sign",): 25,
}
TOGGLED = {("create", True): 1, ("update", False): 4, ("update", True): 4, ("sign",): 40}


def _assert_proof(history: list[Operation], order: tuple[Operation, ...]) -> None:
    """Check an order without the checker: complete, in real time, and every answer the model's."""
    assert len(set(order)) == len(order)
    assert set(order) <= set(history)
    assert {call for call in history if call.returned_at is not None} <= set(order)
    latest_invocation = -math.inf
    states = [KEY_LIFE_CYCLE.initial]
    for call in order:
        # Whatever comes later in the order must not have returned before this one was invoked.
        assert call.returned_at is None or call.returned_at >= latest_invocation
        latest_invocation = max(latest_invocation, call.invoked_at)
        states = [
            after for state in states for after in KEY_LIFE_CYCLE.step(state, call.operation, call.result)
        ]
    assert states


@dataclass(frozen=True)
class Simulated:
    """A history with what the object would have answered just before its last few effects."""

    operations: list[Operation]
    stale: list[tuple[int, tuple[Any, ...]]]
    """(index of a completed get or sign, an answer overtaken by an acknowledged change)."""


def _simulate(
    seed: int,
    clients: int,
    count: int,
    lost: float,
    weights: dict[tuple[Any, ...], int],
) -> Simulated:
    random_ = random.Random(seed)
    free = [0.0] * clients
    calls = []
    for process in range(count):
        client = min(range(clients), key=lambda number: free[number])
        invoked = free[client] + random_.expovariate(1 / 50)
        returned = invoked + random_.uniform(1, 400)
        effect: float = random_.uniform(invoked, returned)
        if is_lost := random_.random() < lost:
            effect = math.inf if random_.random() < 0.4 else invoked + random_.uniform(0, 4000)
        free[client] = returned
        operation = random_.choices(list(weights), list(weights.values()))[0]
        calls.append(
            (effect, process, math.floor(invoked), None if is_lost else math.ceil(returned), operation)
        )
    key = SimulatedKey()
    operations: list[Operation] = []
    stale = []
    past: list[tuple[int | None, SimulatedKey]] = []
    for effect, process, invoked_at, returned_at, operation in sorted(calls, key=lambda call: call[0]):
        before = _copy(key)
        result = key.perform(*operation) if effect < math.inf else ()
        if returned_at is not None and operation[0] in ("get", "sign"):
            # The newest state that an acknowledged change had replaced before this call began.
            old = next((state for at, state in reversed(past) if at is not None and at < invoked_at), None)
            answer = _copy(old).perform(*operation) if old else result
            if answer != result:
                stale.append((len(operations), answer))
        if vars(before) != vars(key):
            past.append((returned_at, before))
        known = None if returned_at is None else result
        operations.append(Operation(process, "k", invoked_at, returned_at, operation, known))
    return Simulated(operations, stale)


def _copy(key: SimulatedKey) -> SimulatedKey:
    copied = SimulatedKey()
    copied.versions = [list(version) for version in key.versions]
    copied.deleted, copied.created = key.deleted, key.created
    return copied


@pytest.mark.parametrize("clients", [1, 3, 6])
@pytest.mark.parametrize("lost", [0.0, 0.01, 0.03])
def test_g2_simulated_histories_are_valid(clients: int, lost: float) -> None:
    for seed in range(15):
        history = _simulate(seed, clients, 200, lost, MIXED).operations
        report = check(history, KEY_LIFE_CYCLE)
        assert report.verdict is Verdict.VALID, f"seed {seed}"
        _assert_proof(history, report.orders[0])


@pytest.mark.parametrize(("clients", "least"), [(1, 1.0), (3, 0.7), (6, 0.7)])
def test_g2_planted_stale_answers_are_caught(
    clients: int, least: float, record_property: Callable[[str, object], None]
) -> None:
    """A stale answer that is not caught must be explained by operations beside it, and the order proves it.

    The floors only say that the workload is sharp enough: with one client nothing is beside.
    """
    planted = caught = 0
    for seed in range(40):
        simulated = _simulate(seed, clients, 100, 0.01 if clients > 1 else 0.0, MIXED)
        if not simulated.stale:
            continue
        index, answer = random.Random(seed).choice(simulated.stale)
        history = list(simulated.operations)
        history[index] = replace(history[index], result=answer)
        report = check(history, KEY_LIFE_CYCLE)
        assert report.verdict is not Verdict.UNKNOWN
        planted += 1
        if report.verdict is Verdict.INVALID:
            caught += 1
        else:
            _assert_proof(history, report.orders[0])
    record_property("stale_answers_caught", f"{caught}/{planted}")
    print(f"{clients} clients: {caught} of {planted} planted stale answers caught")
    assert planted >= 30
    assert caught >= least * planted


def _signs_after_disable(history: list[Operation]) -> Iterable[tuple[int, str]]:
    """Yield refused signs, with the disabled version, that no enable or create could excuse."""
    enabling = [call for call in history if call.operation in {("update", True), ("create", True)}]
    disables = [call for call in history if call.operation == ("update", False) and call.result is not None]
    for index, sign in enumerate(history):
        if sign.operation != ("sign",) or sign.result != ("error", "KEY_NOT_USABLE"):
            continue
        assert sign.returned_at is not None
        for disable in disables:
            assert disable.returned_at is not None
            excused = disable.returned_at >= sign.invoked_at or any(
                call.invoked_at <= sign.returned_at
                and (call.returned_at is None or call.returned_at >= disable.invoked_at)
                for call in enabling
            )
            if not excused and disable.result[0] == "ok":  # type: ignore[index]
                yield index, disable.result[1]  # type: ignore[index]
                break


@pytest.mark.parametrize("clients", [2, 6])
def test_g2_a_sign_after_an_acknowledged_disable_is_always_caught(clients: int) -> None:
    planted = 0
    for seed in range(60):
        history = _simulate(seed, clients, 80, 0.01, TOGGLED).operations
        found = list(_signs_after_disable(history))
        for index, version in found[-2:]:
            broken = list(history)
            broken[index] = replace(history[index], result=("ok", version))
            assert check(broken, KEY_LIFE_CYCLE).verdict is Verdict.INVALID, f"seed {seed}, operation {index}"
            planted += 1
    assert planted >= 20


def test_every_cut_of_a_valid_history_is_valid_and_the_witness_is_minimal() -> None:
    """The search for the earliest contradiction rests on this."""
    simulated = _simulate(5, 4, 60, 0.05, MIXED)
    returns = sorted(call.returned_at for call in simulated.operations if call.returned_at is not None)
    for at in returns:
        assert check(_until(simulated.operations, at), KEY_LIFE_CYCLE).verdict is Verdict.VALID
    index, answer = simulated.stale[len(simulated.stale) // 2]
    broken = list(simulated.operations)
    broken[index] = replace(broken[index], result=answer)
    verdicts = [check(_until(broken, at), KEY_LIFE_CYCLE).verdict for at in returns]
    first = verdicts.index(Verdict.INVALID)
    assert set(verdicts[first:]) == {Verdict.INVALID}
    witness = check(broken, KEY_LIFE_CYCLE).witness
    assert witness is not None
    seen = [*witness.linearised, *witness.stuck]
    assert max(call.returned_at or 0 for call in seen) == returns[first]


def _until(history: list[Operation], at: int) -> list[Operation]:
    cut = []
    for call in history:
        if call.invoked_at <= at:
            known = call.returned_at is not None and call.returned_at <= at
            cut.append(call if known else replace(call, returned_at=None, result=None))
    return cut


# The rival: all orders of all choices of unknown operations.


def _brute_force(history: list[Operation], model: Model) -> bool:
    completed = [call for call in history if call.returned_at is not None]
    unknown = [call for call in history if call.returned_at is None]
    for chosen_count in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, chosen_count):
            for order in itertools.permutations([*completed, *chosen]):
                if any(
                    later.returned_at is not None and later.returned_at < earlier.invoked_at
                    for earlier, later in itertools.combinations(order, 2)
                ):
                    continue
                states = [model.initial]
                for call in order:
                    states = [
                        after for state in states for after in model.step(state, call.operation, call.result)
                    ]
                if states:
                    return True
    return False


REGISTER_CALLS = st.one_of(
    st.tuples(st.sampled_from([("write", "a"), ("write", "b")]), st.just("ok")),
    st.tuples(st.just(("read",)), st.sampled_from(["empty", "a", "b"])),
)
NAMES = st.sampled_from(["v1", "v2"])
ERRORS = st.sampled_from(
    [("error", "KEY_NOT_FOUND"), ("error", "KEY_SOFT_DELETED"), ("error", "KEY_NOT_USABLE")]
)
KEY_CALLS = st.one_of(
    st.tuples(
        st.sampled_from([("create", True), ("create", False)]),
        st.tuples(st.just("ok"), NAMES) | st.just(("error", "KEY_EXISTS")),
    ),
    st.tuples(st.sampled_from([("update", True), ("update", False)]), st.tuples(st.just("ok"), NAMES)),
    st.tuples(st.just(("sign",)), st.tuples(st.just("ok"), NAMES) | ERRORS),
    st.tuples(st.just(("get",)), st.tuples(st.just("ok"), NAMES, st.booleans()) | ERRORS),
    st.tuples(st.just(("delete",)), st.just(("ok",)) | ERRORS),
    st.tuples(
        st.sampled_from([("recover",), ("purge",)]),
        st.sampled_from([("ok",), ("error", "DELETED_KEY_NOT_FOUND")]),
    ),
)


def _histories(calls: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Operation]]:
    def build(drawn: tuple[int, int, bool, tuple[Any, Any]]) -> Operation:
        start, length, lost, (operation, result) = drawn
        return _op(start, None if lost else start + length, operation, None if lost else result)

    # One operation in four is lost.
    lost = st.integers(0, 3).map(lambda number: number == 3)
    return st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6), lost, calls).map(build), max_size=6)


@settings(max_examples=400, deadline=None)
@given(_histories(REGISTER_CALLS))
def test_g2_agrees_with_brute_force_on_registers(history: list[Operation]) -> None:
    expected = Verdict.VALID if _brute_force(history, REGISTER) else Verdict.INVALID
    assert check(history, REGISTER).verdict is expected


@settings(max_examples=400, deadline=None)
@given(_histories(KEY_CALLS))
def test_g2_agrees_with_brute_force_on_keys(history: list[Operation]) -> None:
    expected = Verdict.VALID if _brute_force(history, KEY_LIFE_CYCLE) else Verdict.INVALID
    assert check(history, KEY_LIFE_CYCLE).verdict is expected


@given(st.integers(0, 10**6), st.integers(2, 3))
@settings(max_examples=60, deadline=None)
def test_g2_agrees_with_brute_force_on_small_simulated_histories(seed: int, clients: int) -> None:
    """Random calls are mostly invalid; these are valid, and one stale answer away from it."""
    simulated = _simulate(seed, clients, 6, 0.2, MIXED)
    assert _brute_force(simulated.operations, KEY_LIFE_CYCLE)
    assert check(simulated.operations, KEY_LIFE_CYCLE).verdict is Verdict.VALID
    for index, answer in simulated.stale:
        broken = list(simulated.operations)
        broken[index] = replace(broken[index], result=answer)
        expected = Verdict.VALID if _brute_force(broken, KEY_LIFE_CYCLE) else Verdict.INVALID
        assert check(broken, KEY_LIFE_CYCLE).verdict is expected
