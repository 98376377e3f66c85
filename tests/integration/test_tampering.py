"""G6: whoever writes to the store past the partitions is noticed, live and at the next start.

The attacker has the store's client certificate and its whole history. Each case tampers
with a serving pool, sees it refuse, restarts the partitions over the tampered store,
sees them refuse again, and puts the store back, with which the pool serves again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from hsm_pool.client import calls
from hsm_pool.errors import AvailabilityError, KeyNotUsable, MHSMError, PartitionQuarantined, PoolLocked
from mhsm.keys.v1 import keys_pb2
from mhsm.record.v1 import record_pb2
from tests.running_pool import RunningPool, TestOfficer, until
from tests.store_access import StoreAccess

pytestmark = [pytest.mark.pool, pytest.mark.slow]

DIGEST = hashlib.sha256(b"to be signed").digest()
EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}

Dump = dict[str, bytes]


@dataclass
class Story:
    """A pool, what its keys are, and its store at three moments."""

    pool: RunningPool
    public_keys: dict[str, ec.EllipticCurvePublicKey] = field(default_factory=dict)
    before: Dump = field(default_factory=dict)
    """Before the key "disabled" was disabled and the key "later" was made."""
    now: Dump = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> Iterator[Story]:
    """An unattended pool: it starts again without anybody's help."""
    told = Story(make_pool(attended=False))
    told.pool.activate(officers, 2)
    tell(told)
    yield told
    told.pool.down()


def tell(told: Story) -> None:
    """Make keys, note the store, and go on."""
    with told.pool.client() as client, StoreAccess(told.pool.connection) as store:
        for name in ("first", "second", "disabled"):
            key = client.create_key(name, **EC)
            public = serialization.load_der_public_key(key.public_key_der)
            assert isinstance(public, ec.EllipticCurvePublicKey)
            told.public_keys[name] = public
        told.before = store.dump()
        client.update_key("keys/disabled", key_attributes=calls.attributes(enabled=False))
        client.create_key("later", **EC)
        told.now = store.dump()


# -- what an attacker does ----------------------------------------------------------------


def twins(dump: Dump) -> tuple[str, str]:
    """Return the keys of two records of the same size."""
    by_size: dict[int, str] = {}
    for key, value in sorted(dump.items()):
        if key.startswith("record/"):
            if len(value) in by_size:
                return by_size[len(value)], key
            by_size[len(value)] = key
    raise AssertionError("no two records of the same size")


def changed_records(told: Story) -> Dump:
    """Return older values of records that were changed since."""
    old = {
        key: value
        for key, value in told.before.items()
        if key.startswith("record/") and told.now[key] != value
    }
    assert old, "the disabled version is a changed record"
    return old


def flipped(value: bytes, position: int) -> bytes:
    return value[:position] + bytes([value[position] ^ 1]) + value[position + 1 :]


def swap(store: StoreAccess, told: Story) -> None:
    one, other = twins(told.now)
    store.write({one: told.now[other], other: told.now[one]})


def copy(store: StoreAccess, told: Story) -> None:
    one, other = twins(told.now)
    store.write({one: told.now[other]})


def replay(store: StoreAccess, told: Story) -> None:
    store.write(changed_records(told))


def roll_back(store: StoreAccess, told: Story) -> None:
    store.restore(told.before)


def roll_back_in_steps(store: StoreAccess, told: Story) -> None:
    gone = tuple(key for key in told.now if key not in told.before)
    store.write({}, gone)
    for prefix in ("record/", "log/", "head"):
        store.write({key: value for key, value in told.before.items() if key.startswith(prefix)})


def roll_back_head(store: StoreAccess, told: Story) -> None:
    store.write({"head": told.before["head"]})


def delete(store: StoreAccess, told: Story) -> None:
    store.write({}, (twins(told.now)[0],))


def delete_later(store: StoreAccess, told: Story) -> None:
    """Everything that was made later goes, but the chain stays."""
    store.write({}, tuple(key for key in told.now if key.startswith("record/") and key not in told.before))


def flip(store: StoreAccess, told: Story) -> None:
    key, _ = twins(told.now)
    store.write({key: flipped(told.now[key], len(told.now[key]) // 2)})


def garbage(store: StoreAccess, told: Story) -> None:
    store.write({twins(told.now)[0]: b"\xff" * 64})


def add(store: StoreAccess, told: Story) -> None:
    store.write({f"record/{os.urandom(32).hex()}": told.now[twins(told.now)[0]]})


def change_header(store: StoreAccess, told: Story) -> None:
    header = record_pb2.PoolHeader.FromString(told.now["header"])
    header.sealed_epoch.sealed_pool_keys = flipped(header.sealed_epoch.sealed_pool_keys, 5)
    store.write({"header": header.SerializeToString(deterministic=True)})


def change_file_in_header(store: StoreAccess, told: Story) -> None:
    header = record_pb2.PoolHeader.FromString(told.now["header"])
    header.security_domain_file = header.security_domain_file.replace(b'"required":2', b'"required":3')
    store.write({"header": header.SerializeToString(deterministic=True)})


def break_file_in_header(store: StoreAccess, told: Story) -> None:
    header = record_pb2.PoolHeader.FromString(told.now["header"])
    header.security_domain_file = header.security_domain_file[:-1]
    store.write({"header": header.SerializeToString(deterministic=True)})


def garbage_header(store: StoreAccess, told: Story) -> None:
    store.write({"header": b"\xff" * 64})


def delete_header(store: StoreAccess, told: Story) -> None:
    store.write({}, ("header",))


def forge_head(store: StoreAccess, told: Story) -> None:
    head = record_pb2.Head.FromString(told.now["head"])
    forged = record_pb2.Head(sequence=head.sequence + 1, digest=os.urandom(32), mac=head.mac)
    store.write({"head": forged.SerializeToString(deterministic=True)})


def forge_transaction(store: StoreAccess, told: Story) -> None:
    """A whole transaction that follows, but for the key of its MACs."""
    head = record_pb2.Head.FromString(told.now["head"])
    entry = record_pb2.LogEntry(
        sequence=head.sequence + 1,
        transaction_id=os.urandom(16),
        previous_digest=head.digest,
        table_digest=os.urandom(32),
        mac=os.urandom(32),
    ).SerializeToString(deterministic=True)
    forged = record_pb2.Head(
        sequence=head.sequence + 1, digest=hashlib.sha256(entry).digest(), mac=os.urandom(32)
    )
    store.write(
        {
            f"log/{head.sequence + 1:05d}": entry,
            "head": forged.SerializeToString(deterministic=True),
        }
    )


def garbage_head(store: StoreAccess, told: Story) -> None:
    store.write({"head": b"\xff" * 64})


def delete_head(store: StoreAccess, told: Story) -> None:
    store.write({}, ("head",))


def delete_log(store: StoreAccess, told: Story) -> None:
    store.write({}, (max(key for key in told.now if key.startswith("log/")),))


def garbage_renewal(store: StoreAccess, told: Story) -> None:
    for index in range(3):
        store.write({f"fresh/{index}": b"\xff" * 64})


def wipe(store: StoreAccess, told: Story) -> None:
    store.write({}, tuple(store.dump()))


def names(cases: list[Case]) -> list[str]:
    return [tamper.__name__ for tamper, _ in cases]


Case = tuple[Callable[[StoreAccess, Story], None], tuple[str, ...]]

CASES: list[Case] = [
    (swap, ("does not open under its own id",)),
    (replay, ("replayed",)),
    (roll_back, ("rolled back",)),
    (delete, ("removed",)),
    (flip, ("does not open under its own id", "not an envelope", "unknown epoch")),
    (change_header, ("pool header",)),
    (delete_header, ("pool header",)),
    (forge_head, ("the head of the chain does not carry this pool's MAC",)),
    (garbage_renewal, ("renewal",)),
]

MORE_CASES: list[Case] = [
    (copy, ("does not open under its own id",)),
    (roll_back_in_steps, ("rolled back", "changed", "does not contain", "log entry")),
    (roll_back_head, ("rolled back",)),
    (delete_later, ("removed",)),
    (garbage, ("not an envelope",)),
    (add, ("does not open under its own id",)),
    (change_file_in_header, ("pool header",)),
    (break_file_in_header, ("pool header",)),
    (garbage_header, ("pool header",)),
    (forge_transaction, ("does not carry this pool's MAC",)),
    (garbage_head, ("the head of the chain",)),
    (delete_head, ("lost the head",)),
    (delete_log, ("log entry", "does not contain the head")),
    (wipe, ("lost",)),
]
"""With --full only: variants that other checks of the same code notice."""


# -- what the pool does -------------------------------------------------------------------


class Observers:
    """Clients of every partition that note each answer which the pool must not give."""

    def __init__(self, told: Story) -> None:
        self._told = told
        self._stop = threading.Event()
        self.wrong: list[str] = []
        self.answers = 0
        self._threads = [threading.Thread(target=self._observe, args=(index,)) for index in range(3)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _observe(self, index: int) -> None:
        told = self._told
        with told.pool.client(partition=index, timeout_seconds=2.0) as client:
            while not self._stop.wait(0.05):  # so that the partitions have time for anything else
                for name in ("first", "second", "disabled"):
                    try:
                        signature = client.sign(f"keys/{name}", "ES256", DIGEST)
                    except KeyNotUsable:
                        if name != "disabled":
                            self.wrong.append(f"partition {index}: {name} is said to be disabled")
                    except (AvailabilityError, PoolLocked):
                        pass  # no answer is no wrong answer
                    except MHSMError as error:
                        if error.definite and error.code != "UNAVAILABLE":
                            self.wrong.append(f"partition {index}: {name}: {error.reason}")
                    else:
                        self.answers += 1
                        self._check(index, name, signature)

    def _check(self, index: int, name: str, signature: bytes) -> None:
        if name == "disabled":
            self.wrong.append(f"partition {index}: the disabled key signs")
            return
        half = len(signature) // 2
        der = encode_dss_signature(
            int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
        )
        try:
            self._told.public_keys[name].verify(der, DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))
        except InvalidSignature:
            self.wrong.append(f"partition {index}: {name} signs with another key")


def await_quarantine(told: Story, words: tuple[str, ...]) -> None:
    """Wait until all partitions are quarantined, say why, and refuse."""
    told.pool.await_states(["QUARANTINED"] * 3, 30)
    for index in range(3):
        reason = told.pool.status(index).state_reason
        assert any(word in reason for word in words), reason
        with told.pool.client(partition=index) as client:
            refused: list[Callable[[], object]] = [
                lambda c=client: c.sign("keys/first", "ES256", DIGEST),  # type: ignore[misc]
                lambda c=client: c.get_key("keys/first"),  # type: ignore[misc]
                lambda c=client: list(c.list_keys()),  # type: ignore[misc]
                lambda c=client: c.create_key("quarantined", **EC),  # type: ignore[misc]
            ]
            for call in refused:
                with pytest.raises(PartitionQuarantined) as error:
                    call()
                assert error.value.reason == "PARTITION_QUARANTINED"


def restart_partitions(pool: RunningPool, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Stop the partitions, do something, and kill them; their agents start them again."""
    before = [incarnation(pool, index) for index in range(3)]
    for index in range(3):
        pool.signal(index, "partition", signal.SIGSTOP)
    meanwhile()
    for index in range(3):
        pool.signal(index, "partition", signal.SIGKILL)
    for index in range(3):
        until(lambda i=index: incarnation(pool, i) > before[i], 40, f"partition {index}'s restart")  # type: ignore[misc]


def incarnation(pool: RunningPool, index: int) -> int:
    status = pool.status(index)
    return status.incarnation if status else 0


def repair(told: Story) -> None:
    """Put the store back as it was and start the partitions anew."""

    def put_back() -> None:
        with StoreAccess(told.pool.connection) as store:
            store.restore(told.now)

    restart_partitions(told.pool, put_back)
    told.pool.await_states(["SERVING"] * 3)


@pytest.mark.parametrize(("tamper", "words"), CASES, ids=names(CASES))
def test_tampering_is_noticed_live_and_at_the_next_start(
    story: Story, tamper: Callable[[StoreAccess, Story], None], words: tuple[str, ...]
) -> None:
    """G6: quarantine with the reason, typed refusals, and not one wrong answer."""
    tamper_and_repair(story, tamper, words)


@pytest.mark.full
@pytest.mark.parametrize(("tamper", "words"), MORE_CASES, ids=names(MORE_CASES))
def test_more_tampering_is_noticed_live_and_at_the_next_start(
    story: Story, tamper: Callable[[StoreAccess, Story], None], words: tuple[str, ...]
) -> None:
    """G6: the same, with more ways to tamper."""
    tamper_and_repair(story, tamper, words)


def tamper_and_repair(
    story: Story, tamper: Callable[[StoreAccess, Story], None], words: tuple[str, ...]
) -> None:
    story.pool.await_states(["SERVING"] * 3)
    try:
        with Observers(story) as observers:
            until(lambda: observers.answers > 10, 20, "signatures before")
            with StoreAccess(story.pool.connection) as store:
                tamper(store, story)
            await_quarantine(story, words)
            restart_partitions(story.pool)
            await_quarantine(story, words)
        assert not observers.wrong
    finally:
        repair(story)


def test_a_store_rolled_back_under_a_locked_pool_is_noticed_after_the_ceremony(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G6: while no partition holds the keys nobody can tell; the first one that gets them does."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    told = Story(pool)
    tell(told)
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    with StoreAccess(pool.connection) as store:
        roll_back(store, told)
    with pool.client("administrator") as client:
        begun = client.init_recovery(0)
        for officer in officers[:2]:
            client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
    with Observers(told) as observers:
        until(lambda: pool.states()[0] == "QUARANTINED", 30, "quarantine")
        assert "rolled back" in pool.status(0).state_reason
        # It gives the keys to nobody, so the others stay as they are.
        assert not {"SERVING", "DRAINED"} & set(pool.states())
    assert not observers.wrong
    assert not observers.answers
    pool.down()
