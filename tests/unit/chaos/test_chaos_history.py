"""Recording and replay of histories."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.history import History, load
from tests.chaos.linearizability import Verdict, check
from tests.chaos.model import KEY_LIFE_CYCLE


def _history() -> History:
    return History(7, "python -m pytest tests/chaos --seed 7")


def test_outcomes() -> None:
    history = _history()
    create = history.invoke(1, "a", ("create", True))
    sign = history.invoke(2, "a", ("sign",))
    refused = history.invoke(3, "a", ("sign",))
    under_way = history.invoke(4, "a", ("get",))
    history.discard(refused)
    history.unknown(sign)
    history.complete(create, ("ok", "v1"))
    first, second, third = history.operations()
    assert (first.process, first.key, first.operation, first.result) == (
        1,
        "a",
        ("create", True),
        ("ok", "v1"),
    )
    assert first.returned_at is not None
    assert first.invoked_at <= second.invoked_at <= third.invoked_at <= first.returned_at
    assert (second.returned_at, second.result, third.returned_at) == (None, None, None)
    history.complete(under_way, ("ok", "v1", True))
    assert history.operations()[2].result == ("ok", "v1", True)


def test_a_call_ends_once() -> None:
    history = _history()
    token = history.invoke(1, "a", ("sign",))
    with pytest.raises(ValueError, match="result"):
        history.complete(token, None)
    history.unknown(token)
    for end in (history.unknown, history.discard, lambda number: history.complete(number, ("ok", "v1"))):
        with pytest.raises(ValueError, match="no call under way"):
            end(token)
    with pytest.raises(ValueError, match="no call under way"):
        history.unknown(99)


def test_many_threads() -> None:
    """A lock-protected counter is linearizable, so calls apart in time are in the order of their numbers."""
    history, lock, values = _history(), threading.Lock(), iter(range(10**6))
    together = threading.Barrier(8)

    def client(process: int) -> None:
        together.wait(10)
        for _ in range(250):
            token = history.invoke(process, "counter", ("next",))
            with lock:
                value = next(values)
            history.complete(token, value + 1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))
    operations = history.operations()
    assert sorted(operation.result for operation in operations) == list(range(1, 2001))  # type: ignore[type-var]
    # No operation returned before one with a smaller number was invoked.
    latest_invocation = 0
    for operation in sorted(operations, key=lambda operation: operation.result):  # type: ignore[return-value,arg-type]
        assert operation.returned_at is not None
        assert operation.returned_at >= latest_invocation
        latest_invocation = max(latest_invocation, operation.invoked_at)


def _record(*, stale: bool) -> History:
    history = _history()
    for operation, result in (
        (("create", True), ("ok", "v1")),
        (("update", False), ("ok", "v1")),
        (("sign",), ("ok", "v1") if stale else ("error", "KEY_NOT_USABLE")),
        (("delete",), None),
    ):
        token = history.invoke(1, "a", operation)
        if result is not None:
            history.complete(token, result)
    return history


def test_dump_and_load_keep_everything(tmp_path: Path) -> None:
    history, path = _record(stale=False), tmp_path / "history.jsonl"
    history.dump(path)
    recorded = load(path)
    assert list(recorded.operations) == history.operations()
    assert (recorded.seed, recorded.replay_command) == (7, history.replay_command)
    assert check(recorded.operations, KEY_LIFE_CYCLE).verdict is Verdict.VALID


def test_announce_prints_seed_and_replay_command() -> None:
    stream = io.StringIO()
    _history().announce(stream)
    assert stream.getvalue() == "seed: 7\nreplay: python -m pytest tests/chaos --seed 7\n"


HEADER = json.dumps({"format_version": 1, "seed": 1, "replay_command": "x"})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        HEADER.replace("1", "2", 1),
        HEADER + "\n{}",
        HEADER + '\n{"process": 1, "surprise": 2}',
        HEADER + "\n3",
        HEADER
        + '\n{"process":1,"key":"a","invoked_at":5,"returned_at":4,"operation":["get"],"result":["ok"]}',
        HEADER + '\n{"process":1,"key":"a","invoked_at":5',
    ],
)
def test_g8_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="history"):
        load(path)


@pytest.mark.parametrize(("stale", "code", "word"), [(False, 0, "valid"), (True, 1, "invalid")])
def test_replay_from_the_command_line(tmp_path: Path, stale: bool, code: int, word: str) -> None:
    path = tmp_path / "history.jsonl"
    _record(stale=stale).dump(path)
    replayed = subprocess.run(
        [sys.executable, "-m", "tests.chaos.history", str(path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert replayed.returncode == code, replayed.stderr
    assert replayed.stdout.startswith(f"verdict: {word} ")
    assert "seed: 7\nreplay: python -m pytest" in replayed.stdout
    assert ("stuck: process 1 ('sign',) -> ('ok', 'v1')" in replayed.stdout) == stale
