"""A load of signatures, creates and deletes that remembers what was acknowledged.

Every operation ends as acknowledged, refused (a definite error: nothing changed) or
unknown (an indefinite error). The ledger of acknowledged writes is compared with the
pool afterwards: a write that is missing was lost (G1).
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from hsm_pool.client.errors import CallIndefinite
from hsm_pool.client.pool import Pool
from hsm_pool.errors import DeletedKeyNotFound, KeyNotFound, KeySoftDeleted, MHSMError
from mhsm.keys.v1 import keys_pb2


class KeyState(Enum):
    """What the ledger knows of a key."""

    ACTIVE = "active"
    DELETED = "deleted"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Ledger:
    """What was acknowledged, by key id. Thread-safe."""

    states: dict[str, tuple[KeyState, bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, key_id: str, state: KeyState, public_key_der: bytes = b"") -> None:
        """Note the newest state of a key and, when it was created, its public key."""
        with self.lock:
            self.states[key_id] = (state, public_key_der or self.states.get(key_id, (state, b""))[1])

    def lost(self, pool: Pool) -> list[str]:
        """Return the key ids whose acknowledged state is not what the pool says."""
        with self.lock:
            known = dict(self.states)
        return [
            key_id
            for key_id, (state, public_key) in sorted(known.items())
            if state is not KeyState.UNKNOWN and _observed(pool, key_id) != (state, public_key)
        ]


def _observed(pool: Pool, key_id: str) -> tuple[KeyState | None, bytes]:
    try:
        return KeyState.ACTIVE, pool.get_key(f"keys/{key_id}").public_key_der
    except KeySoftDeleted:
        pass
    except KeyNotFound:
        return None, b""
    try:
        return KeyState.DELETED, pool.get_deleted_key(f"keys/{key_id}").key.public_key_der
    except DeletedKeyNotFound:
        return None, b""


@dataclass(slots=True)
class Tally:
    """Counts and the longest time without success, since :meth:`mark`."""

    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    gap_seconds: float = 0.0
    last_success: float = field(default_factory=time.monotonic)
    refusals: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def mark(self) -> None:
        """Begin to measure the gap anew."""
        with self.lock:
            self.gap_seconds, self.last_success = 0.0, time.monotonic()

    def success(self) -> None:
        """Count an acknowledged operation."""
        with self.lock:
            now = time.monotonic()
            self.gap_seconds = max(self.gap_seconds, now - self.last_success)
            self.last_success = now
            self.acknowledged += 1

    def failure(self, error: Exception, *, definite: bool) -> None:
        """Count an operation that was not acknowledged."""
        with self.lock:
            if definite:
                self.refused += 1
            else:
                self.unknown += 1
            name = type(error).__name__
            self.refusals[name] = self.refusals.get(name, 0) + 1

    def gap_ms(self) -> int:
        """Return the longest time without success, up to now, in milliseconds."""
        with self.lock:
            return round(max(self.gap_seconds, time.monotonic() - self.last_success) * 1000)


class Workload:
    """Threads that use a pool until :meth:`stop`. Owns and joins its threads."""

    def __init__(
        self, connect: Callable[[], Pool], signing_key: str, seed: int, *, signers: int = 2, writers: int = 1
    ) -> None:
        self.crypto = Tally()
        self.writes = Tally()
        self.ledger = Ledger()
        self._connect = connect
        self._signing_key = signing_key
        self._stop = threading.Event()
        self._in_flight = 0
        self._in_flight_lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._sign, args=(seed + n,), name=f"signer-{n}") for n in range(signers)
        ] + [
            threading.Thread(target=self._write, args=(seed + 1_000 + n, n), name=f"writer-{n}")
            for n in range(writers)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop and join the threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, seconds: float) -> None:
        """Let it run for a while."""
        self._stop.wait(seconds)

    @property
    def writes_in_flight(self) -> int:
        """How many writes are sent and not answered now."""
        return self._in_flight

    def _attempt(self, tally: Tally, operation: Callable[[], object]) -> bool | None:
        """Run an operation; True acknowledged, False refused, None unknown."""
        try:
            operation()
        except CallIndefinite as error:
            tally.failure(error, definite=False)
            return None
        except MHSMError as error:
            tally.failure(error, definite=error.definite)
            return False if error.definite else None
        tally.success()
        return True

    def _sign(self, seed: int) -> None:
        generator = random.Random(seed)  # noqa: S311 - a load, not a secret
        with self._connect() as pool:
            while not self._stop.is_set():
                digest = hashlib.sha256(generator.randbytes(16)).digest()
                self._attempt(self.crypto, partial(pool.sign, self._signing_key, "ES256", digest))

    def _write(self, seed: int, number: int) -> None:
        generator = random.Random(seed)  # noqa: S311 - a load, not a secret
        alive: list[str] = []
        created = 0
        with self._connect() as pool:
            while not self._stop.is_set():
                with self._in_flight_lock:
                    self._in_flight += 1
                try:
                    if alive and generator.random() < 0.4:
                        self._delete(pool, alive.pop(generator.randrange(len(alive))))
                    else:
                        key_id = f"load-{seed}-{number}-{created}"
                        created += 1
                        if self._create(pool, key_id):
                            alive.append(key_id)
                finally:
                    with self._in_flight_lock:
                        self._in_flight -= 1

    def _create(self, pool: Pool, key_id: str) -> bool:
        made: list[keys_pb2.Key] = []
        outcome = self._attempt(
            self.writes,
            lambda: made.append(
                pool.create_key(
                    key_id, key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256, must_not_exist=True
                )
            ),
        )
        if outcome:
            self.ledger.note(key_id, KeyState.ACTIVE, made[0].public_key_der)
        elif outcome is None:
            self.ledger.note(key_id, KeyState.UNKNOWN)
        return bool(outcome)

    def _delete(self, pool: Pool, key_id: str) -> None:
        outcome = self._attempt(self.writes, lambda: pool.delete_key(f"keys/{key_id}"))
        if outcome:
            self.ledger.note(key_id, KeyState.DELETED)
        elif outcome is None:
            self.ledger.note(key_id, KeyState.UNKNOWN)
