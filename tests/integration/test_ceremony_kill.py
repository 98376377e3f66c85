"""kill -9 of the partition and of the ceremony child at every step of every ceremony (G1, G4, G8).

After each death the pool is as it was, the old attempt is over and says so, and the ceremony can
be held again. The last step is killed while it is under way: then either nothing or all of it
has happened. tests/integration/test_operator_kill.py kills the operator's command.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hsm_pool.errors import CeremonyState, MHSMError, ShareRefused
from mhsm.keys.v1 import keys_pb2
from tests.ceremony_scripts import (
    PARTITION,
    Ceremony,
    Room,
    activate,
    file_in_force,
    hold,
    lock,
    settled,
    unlocked,
)
from tests.running_pool import RunningPool, TestOfficer, changes, until
from tests.store_access import StoreAccess

pytestmark = [pytest.mark.pool, pytest.mark.slow]

EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
DIGEST = bytes(range(32))
ATTEMPTS_MAX = 5
ANSWER_SECONDS = 0.3
"""In which an answer crosses the loopback interface; waited for, never measured."""


def kill(pool: RunningPool, victim: str) -> None:
    """Kill the child, or the partition and wait for its next incarnation."""
    if victim == "child":
        child = pool.ceremony_child(PARTITION)
        assert child is not None
        os.kill(child, signal.SIGKILL)
        return
    incarnation = pool.status(PARTITION).incarnation
    assert pool.signal(PARTITION, "partition", signal.SIGKILL)
    until(
        lambda: (status := pool.status(PARTITION)) is not None and status.incarnation > incarnation,
        60,
        "a new incarnation",
    )


Some = Callable[[Sequence[int]], Sequence[int]]
"""Chooses the steps at which this run kills."""


def killed_at_every_step(room: Room, name: str, state: str, some_of: Some) -> None:
    """Hold a ceremony up to each of its steps and kill there; the pool stays in its state."""
    pool = room.pool
    number_of_steps = len(room.script(name).steps)
    for victim in ("child", "partition"):
        for killed_after in some_of(range(number_of_steps)):
            where = f"{name}: {victim} killed after {killed_after} of {number_of_steps} steps"
            script = room.script(name)
            with pool.client("administrator", timeout_seconds=30.0) as client:
                begun = now = script.begin(client)
                for step in script.steps[:killed_after]:
                    now = step(client, now)
                    assert not now.complete, where
                file = pool.file
                kill(pool, victim)
                pool.await_states([state] * 3)
                with pytest.raises(CeremonyState):
                    script.steps[killed_after](client, now)
                assert client.get_ceremony(PARTITION) is None, where
                with pytest.raises(CeremonyState):
                    client.cancel_ceremony(PARTITION, begun.attempt_id)
                again = room.script(name).begin(client)
                assert (again.accepted, again.attempt_id != begun.attempt_id) == (0, True), where
                client.cancel_ceremony(PARTITION, again.attempt_id)
            assert pool.states() == [state] * 3, where
            assert pool.file == file


def killed_in_the_last_step(room: Room, name: str, victim: str, delay_seconds: float) -> Ceremony | None:
    """Kill while the last step is under way; return the ceremony if it was answered as complete."""
    pool, script = room.pool, room.script(name)
    answers: list[Any] = []
    with pool.client("administrator", timeout_seconds=30.0) as client:
        now = script.begin(client)
        for step in script.steps[:-1]:
            now = step(client, now)

        def last() -> None:
            try:
                answers.append(script.steps[-1](client, now))
            except MHSMError as error:
                answers.append(error)

        child, partition = pool.ceremony_child(PARTITION), pool.process_id(PARTITION, "partition")
        process_id = child if victim == "child" else partition
        assert process_id is not None
        thread = threading.Thread(target=last)
        thread.start()
        time.sleep(delay_seconds)  # the fault's own time: anything may have happened by then
        try:
            os.kill(process_id, signal.SIGKILL)
        except ProcessLookupError:
            assert victim == "child", "the child has done its work and is gone"
        thread.join(60)
        assert not thread.is_alive()
    return answers[0] if isinstance(answers[0], Ceremony) else None


def test_activation(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], seed: int, some_of: Some
) -> None:
    """G1, G4: the pool is not active, or active with a file that a quorum opens; never in between."""
    draw = random.Random(seed)
    room = Room(make_pool(attended=True), officers)
    killed_at_every_step(room, "activation", "PROVISIONED", some_of)
    for victim in ("child", "partition"):
        answered = killed_in_the_last_step(room, "activation", victim, draw.uniform(0.0, 0.15))
        (state,) = set(settled(room.pool))
        assert state != "PROVISIONED" or answered is None, "an activation that was acknowledged is lost"
        if state != "PROVISIONED":
            break
    else:
        hold(room, "activation")
    # Killed right after it activated the pool, before a peer had the keys, the partition leaves it locked.
    unlocked(room)
    with room.pool.client("administrator", timeout_seconds=30.0) as client:
        proof = client.verify_security_domain(PARTITION)
        for officer in officers[1:]:
            done = client.submit_share(PARTITION, proof.attempt_id, room.pool.submission(officer, proof))
        assert done.complete, "the file that is in force opens"
    room.pool.down()


@pytest.mark.parametrize("name", ["recovery", "restore-blob"])
def test_recovery_in_a_new_pool(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], name: str, some_of: Some
) -> None:
    """G4: the new pool stays new until the last share, and takes the domain afterwards."""
    lost, found = make_pool(attended=True), make_pool(attended=True)
    azure_file = activate(lost, officers)
    lost.down()
    found.file = lost.file
    room = Room(found, officers, azure_file)
    killed_at_every_step(room, name, "PROVISIONED", some_of)
    hold(room, name)
    found.await_states(["SERVING"] * 3)
    found.down()


@pytest.mark.parametrize("name", ["unlock", "unlock-azure-shares", "restore-blob"])
def test_unlock(room: Room, seed: int, name: str, some_of: Some) -> None:
    """G1, G4: the pool stays locked until the last share; then nothing is lost."""
    draw = random.Random(seed)
    lock(room.pool)
    killed_at_every_step(room, name, "LOCKED", some_of)
    for victim in ("child", "partition"):
        lock(room.pool)
        answered = killed_in_the_last_step(room, name, victim, draw.uniform(0.0, 0.1))
        states = settled(room.pool)
        # A partition that dies right after it unlocked the pool takes the keys along if no peer healed yet.
        assert victim == "partition" or answered is None or states == ["SERVING"] * 3
    lock(room.pool)
    hold(room, name)
    room.pool.await_states(["SERVING"] * 3)


@pytest.mark.parametrize("name", ["verify", "rotate-shares", "new-generation"])
def test_ceremonies_of_a_living_pool(room: Room, name: str, some_of: Some) -> None:
    """G1, G4: keys are served all the time, and the domain in force stays in force."""
    unlocked(room)
    before = file_in_force(room)
    killed_at_every_step(room, name, "SERVING", some_of)
    assert file_in_force(room) == before
    hold(room, "verify")


# -- the last step of a change of officers ------------------------------------------------

CHILD_WORKS = "the child has not answered"
NO_MAJORITY = "the transaction waits for a majority of the store"
PROPOSED = "the new key-encryption key is proposed and not in force"
COMMITTED = "the header is committed and nobody has been told"


@dataclass(frozen=True, slots=True)
class LastStep:
    """What came of a last step in which a process was killed."""

    landed: bool
    """Whether the kill came at the moment that was meant, before the call had an answer."""
    answer: Ceremony | MHSMError
    new_officers: list[TestOfficer]
    new_file: bytes


@pytest.mark.parametrize(
    ("name", "moment", "victim"),
    [
        ("rotate-shares", CHILD_WORKS, "child"),
        ("rotate-shares", CHILD_WORKS, "partition"),
        ("rotate-shares", NO_MAJORITY, "partition"),
        ("rotate-shares", COMMITTED, "partition"),
        ("new-generation", CHILD_WORKS, "child"),
        ("new-generation", CHILD_WORKS, "partition"),
        ("new-generation", PROPOSED, "partition"),
        ("new-generation", COMMITTED, "partition"),
    ],
)
def test_the_step_that_changes_the_officers(room: Room, name: str, moment: str, victim: str) -> None:
    """G1, G4: all of it happens or nothing, the pool says which, and one set of officers opens it.

    The child dies with its last answer, before the pool is changed: no later moment can kill it.
    """
    unlocked(room)
    for _ in range(ATTEMPTS_MAX):
        kept = keep_a_key(room.pool)
        before, old_officers = file_in_force(room), room.officers
        died = killed_at(room, name, victim, moment)
        room.pool.await_states(["SERVING"] * 3)
        for index in range(3):
            with room.pool.client(partition=index, timeout_seconds=30.0) as user:
                user.verify(kept, "ES256", DIGEST, user.sign(kept, "ES256", DIGEST))
        with room.pool.client("administrator", timeout_seconds=30.0) as client:
            assert client.get_ceremony(PARTITION) is None
            until(lambda: room.pool.ceremony_child(PARTITION) is None, 10, "the end of the ceremony child")
        now = file_in_force(room)
        changed = now != before
        assert now in {before, died.new_file}
        assert opens(room, old_officers, before) is not changed
        assert opens(room, died.new_officers, died.new_file) is changed
        assert changed or not isinstance(died.answer, Ceremony), "a change that was acknowledged is lost"
        if changed:
            room.officers_are(died.new_officers)
        if died.landed:
            break
    else:
        raise AssertionError(f"no kill of {ATTEMPTS_MAX} came while {moment}")
    if moment != NO_MAJORITY:  # what waits for a majority may be committed when that is back, or not
        assert changed is (moment == COMMITTED)
    again = room.script(name).begin
    with room.pool.client("administrator", timeout_seconds=30.0) as client:
        client.cancel_ceremony(PARTITION, again(client).attempt_id)


def test_a_quorum_of_the_officers_in_force_unlocks_afterwards(room: Room) -> None:
    """G1, G4: both changes can be held to their ends, and then the pool unlocks."""
    unlocked(room)
    kept = keep_a_key(room.pool)
    for name in ("rotate-shares", "new-generation"):
        hold(room, name)
        lock(room.pool)
        hold(room, "unlock")
        room.pool.await_states(["SERVING"] * 3)
        with room.pool.client() as user:
            user.sign(kept, "ES256", DIGEST)


def killed_at(room: Room, name: str, victim: str, moment: str) -> LastStep:
    """Hold a change of officers up to its last step, and kill in that at a moment.

    The moment is held open: by a stopped child, a stopped majority of the store, or a stopped
    partition, for whose lease every acknowledgement waits. The partition itself is stopped while the
    test looks whether it has come to the moment, and not past it.
    """
    pool, script = room.pool, room.script(name)
    answers: list[Ceremony | MHSMError] = []
    with pool.client("administrator", timeout_seconds=60.0) as client, ExitStack() as stopped:
        now = script.begin(client)
        for step in script.steps[:-1]:
            now = step(client, now)
        partition, child = pool.process_id(PARTITION, "partition"), pool.ceremony_child(PARTITION)
        assert partition is not None
        assert child is not None
        header, sequence = header_of(pool), changes(pool.status(2))
        if moment == CHILD_WORKS:
            stop(child)
        elif moment == NO_MAJORITY:
            stopped.enter_context(pool.paused(1, "store_member"))
            stopped.enter_context(pool.paused(2, "store_member"))
        else:
            stopped.enter_context(pool.paused(1, "partition"))

        def reached() -> bool:
            if moment == CHILD_WORKS:
                return is_in_a_step(pool)
            if moment == NO_MAJORITY:
                status = pool.status(PARTITION)
                return status is not None and status.accepted_shares > now.accepted
            if moment == PROPOSED:
                return changes(pool.status(2)) > sequence
            return header_of(pool) != header

        def last() -> None:
            try:
                answers.append(script.steps[-1](client, now))
            except MHSMError as error:
                answers.append(error)

        thread = threading.Thread(target=last)
        thread.start()
        if moment == COMMITTED and name == "new-generation":
            stopped.enter_context(stopped_with_the_new_key(pool, sequence, answers))
        until(lambda: bool(answers) or reached(), 30, moment)
        stop(partition)
        thread.join(ANSWER_SECONDS)  # an answer that left before the stop arrives
        process_id = child if victim == "child" else partition
        landed = not answers and runs(process_id)
        if moment == PROPOSED:
            landed = landed and header_of(pool) == header
        if moment != CHILD_WORKS:
            until(lambda: not runs(child), 10, "the end of a child that has given its last answer")
        killed(victim, partition, child)
        stopped.close()
        thread.join(60)
        assert not thread.is_alive()
    if victim == "partition":
        assert not landed or isinstance(answers[0], MHSMError), "a dead partition answers nothing"
    return LastStep(landed, answers[0], script.new_officers, now.security_domain_file)


def killed(victim: str, partition: int, child: int) -> None:
    """Kill a stopped partition or child, and let the other one go on."""
    killed, other = (child, partition) if victim == "child" else (partition, child)
    with suppress(ProcessLookupError):
        os.kill(killed, signal.SIGKILL)
    until(lambda: not runs(killed), 10, f"the death of the {victim}")
    with suppress(ProcessLookupError):
        os.kill(other, signal.SIGCONT)
    if victim == "partition":
        # A stopped child notices nothing; let go, it ends by itself, with the shares it holds (G3).
        until(lambda: not runs(child), 10, "the end of the child of a dead partition")


@contextmanager
def stopped_with_the_new_key(pool: RunningPool, sequence: int, answers: Sequence[object]) -> Iterator[None]:
    """Stop partition 2 when it says that it holds the key of the new epoch, which puts that in force.

    The answer then waits for its lease. It may already have applied the activation, and said so:
    whether the kill came in time is for the caller.
    """
    partition = pool.process_id(2, "partition")
    assert partition is not None
    until(lambda: bool(answers) or changes(pool.status(2)) > sequence, 30, "the proposal")
    with StoreAccess(pool.connection) as store:
        proposal, deadline = store.head(), time.monotonic() + 30
        while not answers and store.head() == proposal and time.monotonic() < deadline:
            pass  # without a pause: this is about milliseconds
    stop(partition)
    try:
        yield
    finally:
        os.kill(partition, signal.SIGCONT)


def stop(process_id: int) -> None:
    """Stop a process, and wait until it has stopped or is gone."""
    with suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGSTOP)
    until(lambda: process_state(process_id) in {"T", "Z", "X", ""}, 10, "a stopped process")


def runs(process_id: int) -> bool:
    """Whether a process has not ended."""
    return process_state(process_id) not in {"Z", "X", ""}


def process_state(process_id: int) -> str:
    """Return the letter of a process's state (proc(5)), "" when it is gone."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_in_a_step(pool: RunningPool) -> bool:
    """Whether the partition is in a step of a ceremony: it says nothing of the ceremony until that ends."""
    with pool.client("administrator", timeout_seconds=1.0) as client:
        try:
            client.get_ceremony(PARTITION)
        except MHSMError:
            return True
    return False


def header_of(pool: RunningPool) -> bytes:
    """Return the header in the store."""
    with StoreAccess(pool.connection) as store:
        return store.dump()["header"]


def keep_a_key(pool: RunningPool) -> str:
    """Create a key; return its name."""
    with pool.client() as user:
        return str(user.create_key(f"kept-{os.urandom(4).hex()}", **EC).name)


def opens(room: Room, officers: list[TestOfficer], file: bytes) -> bool:
    """Whether a quorum of these officers, with the shares in this file, opens the domain in force."""
    with room.pool.client("administrator", timeout_seconds=30.0) as client:
        proof = client.verify_security_domain(PARTITION)
        told = Ceremony()
        told.CopyFrom(proof)
        told.security_domain_file = file
        try:
            for officer in officers[:2]:
                after = client.submit_share(PARTITION, proof.attempt_id, room.pool.submission(officer, told))
        except ShareRefused:
            client.cancel_ceremony(PARTITION, proof.attempt_id)
            return False
        return bool(after.complete)


@pytest.fixture(scope="module")
def room(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> Room:
    """An active pool with its domain in both formats."""
    pool = make_pool(attended=True)
    return Room(pool, officers, activate(pool, officers))
