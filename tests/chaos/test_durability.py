"""G1: an acknowledged write is never lost, whatever process is killed at whatever instant.

A load of creates, updates, deletes, recoveries and purges runs while processes are killed
with SIGKILL, most of them with a write under way. A write whose outcome is unknown is
repeated with its request id until it is known. In the end every partition has to show
exactly what the acknowledged writes add up to: nothing lost, nothing done twice, nothing
done that was refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from hsm_pool.client import calls
from hsm_pool.client.pool import Pool
from hsm_pool.errors import AvailabilityError, MHSMError, PoolLocked, RequestError, StateError
from mhsm.keys.v1 import keys_pb2
from tests.chaos.faults import PARTS, await_whole, replay_command, store_leader
from tests.running_pool import RunningPool, until

pytestmark = [pytest.mark.chaos, pytest.mark.pool, pytest.mark.timeout(2400)]

Kind = Literal["partition", "store_member", "store_leader", "node_agent", "two_nodes"]
Verb = Literal["create", "update", "delete", "recover", "purge"]

KILLS: Final = 12
KILLS_FULL: Final = 100
WRITERS: Final = 4
KEYS_PER_WRITER_MAX: Final = 40
CALL_SECONDS: Final = 5.0
RESOLVE_SECONDS: Final = 120.0
PAUSE_SECONDS: Final = 0.005
"""Between two writes of a writer: the processes under test need the processors more."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the acknowledged writes say of a key."""

    public_key_der: bytes
    enabled: bool
    mark: str
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    """One write, however often it is sent."""

    verb: Verb
    key_id: str
    enabled: bool
    mark: str
    request_id: str

    def send(self, pool: Pool) -> bytes:
        """Send it; returns the public key that a create answered with."""
        name, tags = f"keys/{self.key_id}", {"mark": self.mark}
        attributes = calls.attributes(enabled=self.enabled)
        match self.verb:
            case "create":
                created = pool.create_key(
                    self.key_id,
                    key_type=keys_pb2.KEY_TYPE_EC,
                    curve=keys_pb2.CURVE_P256,
                    key_attributes=attributes,
                    tags=tags,
                    must_not_exist=True,
                    request_id=self.request_id,
                )
                return created.public_key_der
            case "update":
                pool.update_key(name, key_attributes=attributes, tags=tags, request_id=self.request_id)
            case "delete":
                pool.delete_key(name, self.request_id)
            case "recover":
                pool.recover_deleted_key(name, self.request_id)
            case "purge":
                pool.purge_deleted_key(name, self.request_id)
        return b""


@dataclass(slots=True)
class Writer:
    """The keys of one thread: nobody else writes them, so each has one expected state."""

    number: int
    generator: random.Random
    keys: dict[str, Expected] = field(default_factory=dict)
    unresolved: deque[Write] = field(default_factory=deque)
    created: int = 0

    def next(self) -> Write:
        """Draw a write that the state of its key allows."""
        draw = self.generator
        verb: Verb = "create"
        open_ids = {write.key_id for write in self.unresolved}
        known = sorted(self.keys.keys() - open_ids)
        if known and (len(self.keys) >= KEYS_PER_WRITER_MAX or draw.random() < 0.6):
            key_id = draw.choice(known)
            if self.keys[key_id].deleted:
                verb = draw.choice(["recover", "purge"])
            else:
                verb = draw.choice(["update", "update", "delete"])
        else:
            key_id = f"writer-{self.number}-{self.created}"
            self.created += 1
        request_id = str(uuid.UUID(int=draw.getrandbits(128), version=4))
        return Write(verb, key_id, draw.random() < 0.8, request_id[:8], request_id)

    def acknowledged(self, write: Write, public_key_der: bytes) -> None:
        """Note what the write has made of its key."""
        if write.verb == "create":
            self.keys[write.key_id] = Expected(public_key_der, write.enabled, write.mark)
        elif write.verb == "purge":
            del self.keys[write.key_id]
        else:
            key = self.keys[write.key_id]
            if write.verb == "update":
                key = replace(key, enabled=write.enabled, mark=write.mark)
            self.keys[write.key_id] = replace(key, deleted=write.verb == "delete")


class Load:
    """Writers over all partitions, each call pinned to one and tried once. Owns and joins its threads."""

    def __init__(self, pool: RunningPool, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self._pool = pool
        self._writers = [Writer(number, random.Random(seed + number)) for number in range(WRITERS)]
        self._in_flight: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the writers write."""
        self._stop.clear()
        clients = [self._pool.client(partition=index, timeout_seconds=CALL_SECONDS) for index in range(3)]
        threads = [
            threading.Thread(target=self._write, args=(writer, clients), name=f"writer-{writer.number}")
            for writer in self._writers
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            for client in clients:
                client.close()

    def wait(self, seconds: float) -> None:
        """Let it run for a while."""
        self._stop.wait(seconds)

    def in_flight(self) -> dict[str, int]:
        """Return the writes that are sent and not answered now: request id to partition."""
        with self._lock:
            return dict(self._in_flight)

    def expected(self) -> dict[str, Expected]:
        """Return what every partition has to show."""
        return {key_id: key for writer in self._writers for key_id, key in writer.keys.items()}

    def resolve(self) -> None:
        """Repeat every write of unknown outcome until it is known; the writers are at rest."""
        deadline = time.monotonic() + RESOLVE_SECONDS
        with self._pool.client() as client:
            for writer in self._writers:
                while writer.unresolved:
                    assert time.monotonic() < deadline, f"not resolved: {list(writer.unresolved)}"
                    self._repeat(writer, client, -1)

    def _write(self, writer: Writer, clients: list[Pool]) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            index = writer.generator.randrange(3)
            if writer.unresolved and writer.generator.random() < 0.2:
                self._repeat(writer, clients[index], index)
                continue
            write = writer.next()
            try:
                answer = self._send(write, clients[index], index)
            except MHSMError as error:
                if isinstance(error, StateError | RequestError) and not isinstance(error, PoolLocked):
                    self._violation(f"{write} was refused although its key allows it: {error!r}")
                elif error.definite:
                    self._count("refused", type(error).__name__)
                else:
                    self._count("unknown", type(error).__name__)
                    writer.unresolved.append(write)
            else:
                self._count("acknowledged", write.verb)
                writer.acknowledged(write, answer)

    def _repeat(self, writer: Writer, client: Pool, index: int) -> None:
        write = writer.unresolved.popleft()
        try:
            answer = self._send(write, client, index)
        except MHSMError as error:
            # The first try may still take effect, whatever a later one is refused for.
            writer.unresolved.append(write)
            if isinstance(error, StateError | RequestError) and not isinstance(error, PoolLocked):
                writer.unresolved.pop()
                self._violation(f"{write} was refused when it was repeated: {error!r}")
            elif not isinstance(error, AvailabilityError):
                self._count("repeats without an answer", type(error).__name__)
        else:
            self._count("resolved by a repeat", write.verb)
            writer.acknowledged(write, answer)

    def _send(self, write: Write, client: Pool, index: int) -> bytes:
        with self._lock:
            self._in_flight[write.request_id] = index
        try:
            return write.send(client)
        finally:
            with self._lock:
                del self._in_flight[write.request_id]

    def _count(self, outcome: str, detail: str) -> None:
        with self._lock:
            self.counts[outcome] += 1
            self.counts[f"{outcome}: {detail}"] += 1

    def _violation(self, text: str) -> None:
        with self._lock:
            self.violations.append(text)


@dataclass(slots=True)
class Kills:
    """What was killed, and what was under way then."""

    events: int = 0
    in_flight: int = 0
    to_the_victim: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    processes: Counter[str] = field(default_factory=Counter)

    def kill(self, load: Load, pool: RunningPool, kind: str, victims: dict[int, str]) -> None:
        """Kill processes (partition index to part) while a write is under way, if one comes soon."""
        deadline = time.monotonic() + 1.0
        wanted = set(range(3)) if kind in {"store_member", "store_leader"} else set(victims)
        while not wanted & set(load.in_flight().values()) and time.monotonic() < deadline:
            load.wait(0.001)
        before = load.in_flight()
        for index, part in victims.items():
            if pool.signal(index, part, signal.SIGKILL) is not None:
                self.processes[part] += 1
        # Under way before and after the signal: under way at the kill.
        flying = [before[request_id] for request_id in before.keys() & load.in_flight().keys()]
        self.events += 1
        self.by_kind[kind] += 1
        self.in_flight += bool(flying)
        self.to_the_victim += bool(set(flying) & set(victims))


def _plan(count: int, draw: random.Random) -> list[Kind]:
    kinds: list[Kind] = ["partition", "partition", "store_member", "store_leader", "node_agent", "two_nodes"]
    plan = [kinds[number % len(kinds)] for number in range(count)]
    draw.shuffle(plan)
    return plan


def _victims(kind: Kind, pool: RunningPool, draw: random.Random) -> dict[int, str]:
    index = draw.randrange(3)
    if kind == "store_leader":
        leader = until(lambda: {store_leader(pool)} - {None}, 30, "a leader of the store").pop()
        assert leader is not None
        return {leader: "store_member"}
    if kind == "two_nodes":
        # The third partition keeps the keys of the attended pool.
        return {index: draw.choice(PARTS), (index + draw.choice([1, 2])) % 3: draw.choice(PARTS)}
    return {index: kind}


def _differences(pool: RunningPool, expected: dict[str, Expected]) -> list[str]:
    """Compare every partition, asked by itself, with what was acknowledged; use every usable key."""
    found: list[str] = []
    for index in range(3):
        with pool.client(partition=index, timeout_seconds=20.0) as client:
            seen = {key.name.split("/")[1]: _as_expected(key) for key in client.list_keys(25)}
            for deleted in client.list_deleted_keys(25):
                seen[deleted.key.name.split("/")[1]] = replace(_as_expected(deleted.key), deleted=True)
            found += [
                f"partition {index}, {key_id}: acknowledged {expected.get(key_id)}, found {seen.get(key_id)}"
                for key_id in sorted(expected.keys() | seen.keys())
                if expected.get(key_id) != seen.get(key_id)
            ]
            for key_id, key in expected.items():
                if key.enabled and not key.deleted and seen.get(key_id) == key:
                    _check_signature(client, key_id, key.public_key_der)
    return found


def _as_expected(key: keys_pb2.Key) -> Expected:
    return Expected(key.public_key_der, key.attributes.enabled, key.tags["mark"])


def _check_signature(client: Pool, key_id: str, public_key_der: bytes) -> None:
    digest = hashlib.sha256(key_id.encode()).digest()
    raw = client.sign(f"keys/{key_id}", "ES256", digest)
    signature = utils.encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    public_key = serialization.load_der_public_key(public_key_der)
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    public_key.verify(signature, digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))


def _check_all(pool: RunningPool, load: Load, when: str) -> None:
    load.resolve()
    assert not load.violations, "\n".join(load.violations[:20])

    def one_head() -> set[tuple[int, str]]:
        statuses = [pool.status(index) for index in range(3)]
        heads = {(s.applied_sequence, s.head_digest_prefix) if s else (0, "") for s in statuses}
        return heads if len(heads) == 1 else set()

    head = until(one_head, 30, "the same head on all partitions").pop()
    expected = load.expected()
    differences = _differences(pool, expected)
    assert not differences, f"{when}: {len(differences)} differences\n" + "\n".join(differences[:20])
    deleted = sum(key.deleted for key in expected.values())
    print(f"{when}: {len(expected)} keys ({deleted} deleted) on each partition, sequence {head[0]} {head[1]}")


def test_acknowledged_writes_survive_kills(
    pool: RunningPool, full: bool, seed: int, request: pytest.FixtureRequest
) -> None:
    """G1: kill -9 of partitions, store members, leaders, node agents, then of everything, under load."""
    print(f"\nreplay: {replay_command(request)}")
    draw = random.Random(seed)
    load, kills = Load(pool, draw.getrandbits(32)), Kills()
    with load.running():
        for kind in _plan(KILLS_FULL if full else KILLS, draw):
            _await_progress(load)
            load.wait(draw.uniform(0.0, 0.3))
            victims = _victims(kind, pool, draw)
            kills.kill(load, pool, kind, victims)
            started = time.monotonic()
            await_whole(pool)
            print(f"killed {kind} {victims}: whole after {time.monotonic() - started:.1f} s")
        _await_progress(load)
    _check_all(pool, load, "after the kills")

    with load.running():
        _await_progress(load)
        before = load.in_flight()
        pool.kill_everything()
        print(f"killed everything with {len(before.keys() & load.in_flight().keys())} writes in flight")
        pool.await_states(["LOCKED"] * 3, 90)
    pool.unlock(pool.officers[:2], partition=draw.randrange(3))
    await_whole(pool)
    _check_all(pool, load, "after the unlock")

    print(f"kills: {kills.events}, by kind {dict(kills.by_kind)}, processes {dict(kills.processes)}")
    print(f"kills with a write in flight: {kills.in_flight}, to the victim: {kills.to_the_victim}")
    for outcome, count in sorted(load.counts.items()):
        print(f"{outcome}: {count}")
    assert kills.events >= (KILLS_FULL if full else KILLS)
    assert 2 * kills.in_flight >= kills.events, "too few kills hit a write in flight"


def _await_progress(load: Load) -> None:
    """Wait until some more writes were acknowledged: a pool that only recovers is not under load."""
    wanted = load.counts["acknowledged"] + 20
    until(lambda: load.counts["acknowledged"] >= wanted, 60, "twenty more acknowledged writes")
