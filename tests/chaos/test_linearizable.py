"""G2: the pool behaves like one machine, whichever partitions are paused or killed meanwhile.

Clients pinned to single partitions, each call tried once, record what they called and were
answered while faults strike; the checker then looks for one order that explains it all. And
directly: what was acknowledged while a partition stood still must hold on that very partition
from its first answer on.
"""

from __future__ import annotations

import hashlib
import random
import signal
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from hsm_pool.client import calls, channels
from hsm_pool.client.errors import PoolUnreachable, from_rpc
from hsm_pool.client.pool import Pool
from hsm_pool.errors import AvailabilityError, KeyNotFound, KeyNotUsable, KeySoftDeleted, MHSMError
from mhsm.crypto.v1 import crypto_pb2, crypto_pb2_grpc
from mhsm.keys.v1 import keys_pb2
from tests.chaos.faults import await_whole, replay_command, resume
from tests.chaos.history import History
from tests.chaos.linearizability import Model, Operation, Report, Verdict, check
from tests.chaos.model import ABSENT, REASONS, KeyState, step
from tests.running_pool import RunningPool, until

pytestmark = [pytest.mark.chaos, pytest.mark.pool, pytest.mark.timeout(2400)]

DIGEST: Final = hashlib.sha256(b"G2").digest()
FAULTS: Final = (
    "pause partition",
    "pause store member",
    "pause both",
    "kill partition",
    "kill store member",
    "kill node agent",
    "pause partition, kill another",
)
ROUNDS: Final = 2
ROUNDS_FULL: Final = 12
CLIENTS: Final = 6
CLIENTS_PER_PARTITION: Final = 2
"""So that a paused partition holds up some clients and not all of them."""
KEYS: Final = 3
PAUSE_SECONDS: Final = (0.5, 5.0)
CALL_SECONDS: Final = (1.5, 8.0)
"""Deadlines of calls: some end within a pause (unknown), some outlive it."""
THINK_SECONDS: Final = 0.004
CHECK_SECONDS: Final = 20.0
UNKNOWN_SHARE_MAX: Final = 0.03
"""Of the keys' histories; more that the checker could not judge make the test inconclusive."""
REPETITIONS: Final = 3
REPETITIONS_FULL: Final = 10


def _step_or_list(
    state: KeyState, operation: tuple[Any, ...], result: tuple[Hashable, ...] | None
) -> list[KeyState]:
    """Extend the model by what a list of the active keys shows of one key."""
    if operation != ("list",):
        return step(state, operation, result)
    if result is None:
        return [state]
    if result == ("absent",):
        return [] if state.phase == "active" else [state]
    return step(state, ("get",), ("ok", *result[1:]))


MODEL: Final = Model(ABSENT, _step_or_list)


# -- histories ---------------------------------------------------------------------------


class Partitions:
    """One client for each partition and deadline; every call is tried once. Close when done."""

    def __init__(self, pool: RunningPool) -> None:
        self._stack = ExitStack()
        self.pools = [
            [
                self._stack.enter_context(pool.client(partition=index, timeout_seconds=seconds))
                for seconds in CALL_SECONDS
            ]
            for index in range(3)
        ]
        self._channels = [
            self._stack.enter_context(_open(pool, index, channels.OPTIONS)) for index in range(3)
        ]

    def close(self) -> None:
        """Close all channels."""
        self._stack.close()

    def sign(self, index: int, key_id: str, seconds: float) -> str:
        """Sign on one partition; returns the name of the version that did (the client hides it)."""
        return _sign(self._channels[index], key_id, seconds)


def _open(pool: RunningPool, index: int, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
    """Open a channel to one partition; without options it outlives any pause of the partition."""
    connection = pool.connection
    credentials = channels.credentials(connection, "application")
    return grpc.secure_channel(connection.partitions[index].endpoint, credentials, options)


def _sign(channel: grpc.Channel, key_id: str, seconds: float) -> str:
    request = crypto_pb2.SignRequest(name=f"keys/{key_id}", algorithm="ES256", digests=[DIGEST])
    try:
        response = crypto_pb2_grpc.CryptoServiceStub(channel).Sign(request, timeout=seconds)
    except grpc.RpcError as error:
        raise from_rpc(error) from None
    return str(response.name)


class Clients:
    """Threads that work on a few keys and record it. Owns and joins its threads."""

    def __init__(self, partitions: Partitions, history: History, key_ids: list[str], seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self._partitions = partitions
        self._history = history
        self._key_ids = key_ids
        self._places = [threading.Semaphore(CLIENTS_PER_PARTITION) for _ in range(3)]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(number, random.Random(seed + number)))
            for number in range(CLIENTS)
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the clients work."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def wait(self, seconds: float) -> None:
        """Let them work for a while."""
        self._stop.wait(seconds)

    def _work(self, number: int, draw: random.Random) -> None:
        index = number % 3
        while not self._stop.wait(THINK_SECONDS):
            index = (index + draw.choice([1, 2])) % 3
            while not self._places[index].acquire(blocking=False):
                index = (index + 1) % 3
            try:
                self._call(number, index, draw)
            finally:
                self._places[index].release()

    def _call(self, process: int, index: int, draw: random.Random) -> None:
        deadline = draw.randrange(2)
        client = self._partitions.pools[index][deadline]
        if draw.random() < 0.06:
            self._list(process, client)
            return
        key_id = draw.choice(self._key_ids)
        operation: tuple[Any, ...] = draw.choices(
            [
                ("sign",),
                ("get",),
                ("update", True),
                ("update", False),
                ("create", True),
                ("delete",),
                ("recover",),
                ("purge",),
            ],
            [30, 12, 10, 8, 14, 8, 10, 4],
        )[0]
        request_id = str(uuid.UUID(int=draw.getrandbits(128), version=4))
        token = self._history.invoke(process, key_id, operation)
        try:
            if operation == ("sign",):
                version = self._partitions.sign(index, key_id, CALL_SECONDS[deadline])
                result: tuple[Hashable, ...] = ("ok", version)
            else:
                result = _perform(client, key_id, operation, request_id)
        except MHSMError as error:
            self._failed(token, operation, error)
        else:
            self._history.complete(token, result)
            self._count(f"{operation[0]}: ok")

    def _list(self, process: int, client: Pool) -> None:
        tokens = {key_id: self._history.invoke(process, key_id, ("list",)) for key_id in self._key_ids}
        try:
            listed = {key.name.split("/")[1]: key for key in client.list_keys(25)}
        except MHSMError as error:
            for token in tokens.values():
                self._failed(token, ("list",), error)
            return
        for key_id, token in tokens.items():
            key = listed.get(key_id)
            seen = ("present", key.name, key.attributes.enabled) if key else ("absent",)
            self._history.complete(token, seen)
        self._count("list: ok")

    def _failed(self, token: int, operation: tuple[Any, ...], error: MHSMError) -> None:
        reads = {"sign", "get", "list"}
        if error.reason in REASONS and operation[0] != "list":
            self._history.complete(token, ("error", error.reason))
            self._count(f"{operation[0]}: {error.reason}")
        elif not error.definite:
            # A read without an answer changed nothing and told nothing.
            if operation[0] in reads:
                self._history.discard(token)
            else:
                self._history.unknown(token)
            self._count(f"unknown: {operation[0]}")
        else:
            self._history.discard(token)
            self._count(f"dropped: {type(error).__name__}")
            if not isinstance(error, AvailabilityError | PoolUnreachable):
                with self._lock:
                    self.unexpected.append(f"{operation}: {error!r}")

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1


def _perform(client: Pool, key_id: str, operation: tuple[Any, ...], request_id: str) -> tuple[Hashable, ...]:
    name = f"keys/{key_id}"
    match operation:
        case ("create", must_not_exist):
            return ("ok", _create(client, key_id, request_id, must_not_exist=must_not_exist).name)
        case ("update", enabled):
            attributes = calls.attributes(enabled=enabled)
            return ("ok", client.update_key(name, key_attributes=attributes, request_id=request_id).name)
        case ("get",):
            key = client.get_key(name)
            return ("ok", key.name, key.attributes.enabled)
        case ("delete",):
            client.delete_key(name, request_id)
        case ("recover",):
            client.recover_deleted_key(name, request_id)
        case ("purge",):
            client.purge_deleted_key(name, request_id)
    return ("ok",)


def _create(
    client: Pool, key_id: str, request_id: str | None = None, *, must_not_exist: bool = True
) -> keys_pb2.Key:
    return client.create_key(
        key_id,
        key_type=keys_pb2.KEY_TYPE_EC,
        curve=keys_pb2.CURVE_P256,
        must_not_exist=must_not_exist,
        request_id=request_id,
    )


def _strike(pool: RunningPool, clients: Clients, fault: str, draw: random.Random) -> str:
    """Let one fault come and go; returns what was done to whom."""
    index = draw.randrange(3)
    seconds = draw.uniform(*PAUSE_SECONDS)
    part = "node_agent" if fault == "kill node agent" else fault.split(" ", 1)[1].replace(" ", "_")
    if fault.startswith("kill"):
        pool.signal(index, part, signal.SIGKILL)
        return f"{fault} {index}"
    parts = {"both": ("partition", "store_member"), "store_member": ("store_member",)}.get(
        part, ("partition",)
    )
    stopped = [pid for name in parts if (pid := pool.signal(index, name, signal.SIGSTOP)) is not None]
    try:
        if "kill another" in fault:
            clients.wait(draw.uniform(0.0, 0.5))
            pool.signal((index + draw.choice([1, 2])) % 3, "partition", signal.SIGKILL)
        clients.wait(seconds)
    finally:
        # The partition goes on first: for a moment its own member is still silent.
        for process_id in stopped:
            resume([process_id])
            clients.wait(draw.uniform(0.0, 0.5))
    return f"{fault} {index} for {seconds:.1f} s"


def _judge(history: History, path: Path) -> Counter[str]:
    """Check the history of each key; a failing one is left in a file."""
    by_key: defaultdict[str, list[Operation]] = defaultdict(list)
    for operation in history.operations():
        by_key[operation.key].append(operation)
    verdicts: Counter[str] = Counter()
    for key, operations in by_key.items():
        report = check(operations, MODEL, CHECK_SECONDS)
        verdicts[report.verdict.value] += 1
        if report.verdict is Verdict.INVALID:
            history.dump(path)
            pytest.fail(f"{_explain(key, report)}\nhistory: {path}\n{history.replay_command}", pytrace=False)
        if report.verdict is Verdict.UNKNOWN:
            history.dump(path)
            print(f"could not judge {key} ({len(operations)} operations): {path}")
    return verdicts


def _explain(key: str, report: Report) -> str:
    assert report.witness is not None
    lines = [f"the history of {key} is not that of one machine; the last steps of the longest order:"]
    for title, operations in (
        ("order", report.witness.linearised[-12:]),
        ("stuck", report.witness.stuck),
    ):
        lines += [
            f"  {title}: client {one.process} [{one.invoked_at}, {one.returned_at}] "
            f"{one.operation} -> {one.result}"
            for one in operations
        ]
    return "\n".join([*lines, f"  state: {report.witness.state}"])


def test_histories_under_faults_are_linearizable(
    pool: RunningPool, full: bool, seed: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """G2: histories of key life cycles, uses and lists, while partitions are paused and killed."""
    command = replay_command(request)
    print(f"\nreplay: {command}")
    draw = random.Random(seed)
    faults = list(FAULTS) * (ROUNDS_FULL if full else ROUNDS)
    draw.shuffle(faults)
    verdicts: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    recorded = 0
    partitions = Partitions(pool)
    try:
        for number, fault in enumerate(faults):
            history = History(seed, command)
            key_ids = [f"history-{seed}-{number}-{key}" for key in range(KEYS)]
            clients = Clients(partitions, history, key_ids, draw.getrandbits(32))
            with clients.running():
                clients.wait(0.4)
                done = _strike(pool, clients, fault, draw)
                await_whole(pool)
                clients.wait(0.4)
            assert not clients.unexpected, clients.unexpected[:10]
            started = time.monotonic()
            judged = _judge(history, tmp_path / f"history-{number}.jsonl")
            count = len(history.operations())
            print(f"{done}: {count} operations, {dict(judged)} in {time.monotonic() - started:.1f} s")
            verdicts += judged
            outcomes += clients.outcomes
            recorded += count
            _remove(pool, key_ids)
    finally:
        partitions.close()
    print(f"histories: {dict(verdicts)}, operations: {recorded}")
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome}: {count}")
    assert outcomes["sign: ok"]
    assert outcomes["list: ok"]
    assert verdicts["unknown"] <= UNKNOWN_SHARE_MAX * verdicts.total(), "inconclusive"


def _remove(pool: RunningPool, key_ids: list[str]) -> None:
    """Delete the keys of a round, so that the lists of the next ones stay one page."""
    with pool.client() as client:
        for key_id in key_ids:
            try:
                client.delete_key(f"keys/{key_id}")
            except (KeyNotFound, KeySoftDeleted):
                continue


# -- directly ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a key, and how a signature shows the old state and the new one."""

    name: str
    enabled_before: bool
    make: Callable[[Pool, str, str], object]
    shows_old: str
    shows_new: str


def _enable(client: Pool, key_id: str, request_id: str, *, enabled: bool) -> object:
    attributes = calls.attributes(enabled=enabled)
    return client.update_key(f"keys/{key_id}", key_attributes=attributes, request_id=request_id)


SIGNED: Final = "signed"
NO_ANSWER: Final = "no answer"
CHANGES: Final = (
    Change("disable", True, lambda *call: _enable(*call, enabled=False), SIGNED, KeyNotUsable.reason),
    Change("enable", False, lambda *call: _enable(*call, enabled=True), KeyNotUsable.reason, SIGNED),
    Change(
        "delete",
        True,
        lambda client, key_id, request_id: client.delete_key(f"keys/{key_id}", request_id),
        SIGNED,
        KeySoftDeleted.reason,
    ),
)
HAMMERS: Final = 3
"""Threads that sign with each changed key."""
HAMMER_SECONDS: Final = 10.0


class Hammer:
    """Signs with a key on one partition from the moment its change was acknowledged."""

    def __init__(self, pool: RunningPool, index: int, key_id: str, change: Change) -> None:
        self.change = change
        self.answers: Counter[str] = Counter()
        self._pool = pool
        self._index = index
        self._key_id = key_id
        self._lock = threading.Lock()
        self._acknowledged = threading.Event()
        self._stop = threading.Event()
        self._changer = threading.Thread(target=self._change)
        channels_open = [_open(pool, index) for _ in range(HAMMERS)]
        self.before = {_answer(channel, key_id) for channel in channels_open}
        self._threads = [threading.Thread(target=self._sign, args=(channel,)) for channel in channels_open]

    def start(self) -> None:
        """Begin the change on the other partitions; the signing follows its acknowledgement."""
        for thread in (self._changer, *self._threads):
            thread.start()

    def stop(self) -> None:
        """Join all threads."""
        self._stop.set()
        self._acknowledged.set()
        for thread in (self._changer, *self._threads):
            thread.join()

    def acknowledged(self) -> bool:
        """Return whether the change was acknowledged."""
        return self._acknowledged.is_set()

    def new_state_seen(self) -> bool:
        """Return whether the partition has answered under the new state."""
        return self.answers[self.change.shows_new] > 0

    def old_state_seen(self) -> list[str]:
        """Return the answers that only the old state, or no state at all, explains."""
        return [
            f"{count} x {answer}"
            for answer, count in self.answers.items()
            if answer != self.change.shows_new and not answer.startswith(NO_ANSWER)
        ]

    def _change(self) -> None:
        request_id = str(uuid.uuid4())
        number = 0
        while not self._stop.is_set():
            number += 1
            other = (self._index + 1 + number % 2) % 3
            with self._pool.client(partition=other, timeout_seconds=8.0) as client:
                try:
                    self.change.make(client, self._key_id, request_id)
                except AvailabilityError:
                    continue  # the same request again
                except MHSMError as error:
                    if error.definite and not isinstance(error, PoolUnreachable):
                        raise
                    continue
            self._acknowledged.set()
            return

    def _sign(self, channel: grpc.Channel) -> None:
        with channel:
            self._acknowledged.wait()
            while not self._stop.is_set():
                answer = _answer(channel, self._key_id)
                with self._lock:
                    self.answers[answer] += 1


def _answer(channel: grpc.Channel, key_id: str) -> str:
    try:
        _sign(channel, key_id, HAMMER_SECONDS)
    except (AvailabilityError, PoolUnreachable) as error:
        return f"{NO_ANSWER}: {type(error).__name__}"
    except MHSMError as error:
        return error.reason if error.definite else f"{NO_ANSWER}: {type(error).__name__}"
    return SIGNED


def _restart_partition(pool: RunningPool, index: int) -> None:
    """Restart a partition: only a new one is sure to follow the store through its own member."""
    pool.signal(index, "partition", signal.SIGKILL)
    await_whole(pool)


@pytest.mark.parametrize(
    "parts", [("partition",), ("store_member",), ("partition", "store_member")], ids="+".join
)
@pytest.mark.parametrize("index", range(3))
def test_acknowledged_changes_hold_on_a_paused_partition(
    pool: RunningPool,
    index: int,
    parts: tuple[str, ...],
    full: bool,
    seed: int,
    request: pytest.FixtureRequest,
) -> None:
    """G2: disabled, enabled and deleted through another partition while this one stood still."""
    print(f"\nreplay: {replay_command(request)}")
    draw = random.Random(seed)
    answers: Counter[str] = Counter()
    for repetition in range(REPETITIONS_FULL if full else REPETITIONS):
        if "store_member" in parts:
            _restart_partition(pool, index)
        hammers = []
        with pool.client() as client:
            for change in CHANGES:
                key_id = f"paused-{seed}-{repetition}-{change.name}"
                _create(client, key_id)
                _enable(client, key_id, str(uuid.uuid4()), enabled=change.enabled_before)
                hammers.append(Hammer(pool, index, key_id, change))
        for hammer in hammers:
            assert hammer.before == {hammer.change.shows_old}, "the old state was not there"
        _pause_and_hammer(pool, index, parts, hammers, draw)
        for hammer in hammers:
            old = hammer.old_state_seen()
            assert not old, f"acknowledged {hammer.change.name}, then on partition {index}: {old}"
            answers += Counter({f"{hammer.change.name}: {a}": n for a, n in hammer.answers.items()})
    print(f"partition {index}, paused {' and '.join(parts)}: {dict(answers)}")


def _pause_and_hammer(
    pool: RunningPool, index: int, parts: tuple[str, ...], hammers: list[Hammer], draw: random.Random
) -> None:
    rest = threading.Event()
    stopped = [pid for part in parts if (pid := pool.signal(index, part, signal.SIGSTOP)) is not None]
    try:
        assert len(stopped) == len(parts)
        for hammer in hammers:
            hammer.start()
        # Each key's signatures begin with the acknowledgement of its change, the pause notwithstanding.
        until(lambda: all(hammer.acknowledged() for hammer in hammers), 40, "acknowledged changes")
        for process_id in stopped:
            # The first signatures wait in the sockets of a stopped partition; one whose member
            # still is silent answers from what it has applied.
            rest.wait(draw.uniform(0.05, 0.3))
            if process_id == stopped[-1]:
                rest.wait(0.7)
            resume([process_id])
        until(lambda: all(hammer.new_state_seen() for hammer in hammers), 40, "answers under the new state")
        rest.wait(0.3)
    finally:
        resume(stopped)
        for hammer in hammers:
            hammer.stop()
    await_whole(pool)
