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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from hsm_pool.client.pool import Pool
from hsm_pool.errors import CeremonyState, MHSMError
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import submission
from security_domain.azure import document, transfer_key
from security_domain.azure import submission as azure_submission
from security_domain.azure.restore_blob import make_restore_blob
from tests.running_pool import RunningPool, TestOfficer, make_officers, until

pytestmark = [pytest.mark.pool, pytest.mark.slow]

Ceremony = security_domain_pb2.Ceremony
Step = Callable[[Pool, Ceremony], Ceremony]
PARTITION = 0


@dataclass(frozen=True, slots=True)
class Script:
    """A ceremony: how it begins, and each step after that; the last one completes it."""

    begin: Callable[[Pool], Ceremony]
    steps: list[Step]


@dataclass(slots=True)
class Room:
    """A pool and who stands around it."""

    pool: RunningPool
    officers: list[TestOfficer]
    azure_file: bytes = b""

    def shares(self, officers: list[TestOfficer]) -> list[Step]:
        """Return the steps in which these officers submit their shares."""

        def step(officer: TestOfficer) -> Step:
            return lambda client, begun: client.submit_share(
                PARTITION, begun.attempt_id, self.pool.submission(officer, begun)
            )

        return [step(officer) for officer in officers]

    def azure_shares(self, officers: list[TestOfficer]) -> list[Step]:
        """Return the steps in which these officers submit their shares of Azure's format."""

        def step(officer: TestOfficer) -> Step:
            return lambda client, begun: client.submit_share(
                PARTITION,
                begun.attempt_id,
                azure_submission.make_submission(
                    document.parse(self.azure_file),
                    officer.key,
                    officer.certificate_der,
                    begun.attempt_id,
                    begun.exchange_public_key,
                    submission.RECOVERY,
                ),
            )

        return [step(officer) for officer in officers]

    def blob(self, client: Pool, begun: Ceremony) -> Ceremony:
        """Upload a restore blob."""
        pairs = [(officer.key, officer.certificate_der) for officer in self.officers[:2]]
        certificate = transfer_key.parse_transfer_key(begun.transfer_key)
        made = make_restore_blob(document.parse(self.azure_file), pairs, certificate)
        return client.upload_restore_blob(PARTITION, begun.attempt_id, made)

    def script(self, name: str) -> Script:
        """Return a ceremony by its name."""
        certificates = [officer.certificate_der for officer in self.officers]
        new = make_officers(3) if name in {"rotate-shares", "new-generation"} else []
        new_certificates = [officer.certificate_der for officer in new]
        quorum = self.shares(self.officers[:2])
        match name:
            case "activation":
                return Script(
                    lambda client: client.download_security_domain(certificates, 2, partition=PARTITION),
                    self.shares(self.officers),
                )
            case "recovery":
                return Script(lambda client: client.init_recovery(PARTITION, self.pool.file), quorum)
            case "unlock":
                return Script(lambda client: client.init_recovery(PARTITION), quorum)
            case "unlock-azure-shares":
                return Script(
                    lambda client: client.init_recovery(PARTITION), self.azure_shares(self.officers[1:])
                )
            case "restore-blob":
                return Script(lambda client: client.init_recovery(PARTITION), [self.blob])
            case "verify":
                return Script(lambda client: client.verify_security_domain(PARTITION), quorum)
            case "rotate-shares":
                return Script(
                    lambda client: client.rotate_shares(new_certificates, 2, PARTITION),
                    [*quorum, *self.shares(new[1:])],
                )
            case "new-generation":
                return Script(
                    lambda client: client.new_generation(new_certificates, 2, PARTITION), self.shares(new)
                )
        raise AssertionError(name)


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


def killed_at_every_step(room: Room, name: str, state: str) -> None:
    """Hold a ceremony up to each of its steps and kill there; the pool stays in its state."""
    pool = room.pool
    number_of_steps = len(room.script(name).steps)
    for victim in ("child", "partition"):
        for killed_after in range(number_of_steps):
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


def hold(room: Room, name: str) -> Ceremony:
    """Hold a ceremony to its end."""
    script = room.script(name)
    with room.pool.client("administrator", timeout_seconds=30.0) as client:
        begun = now = script.begin(client)
        for step in script.steps:
            now = step(client, now)
        assert now.complete
    return begun


def settled(pool: RunningPool) -> list[str]:
    """Return the states when no partition is on its way to another one."""

    def same() -> list[str] | None:
        states = pool.states()
        legal = states[0] in {"PROVISIONED", "LOCKED", "SERVING"}
        return states if legal and len(set(states)) == 1 else None

    return until(same, 60, lambda: f"one legal state of all partitions, now {pool.states()}")


def test_activation(make_pool: Callable[..., RunningPool], officers: list[TestOfficer], seed: int) -> None:
    """G1, G4: the pool is not active, or active with a file that a quorum opens; never in between."""
    draw = random.Random(seed)
    room = Room(make_pool(attended=True), officers)
    killed_at_every_step(room, "activation", "PROVISIONED")
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
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], name: str
) -> None:
    """G4: the new pool stays new until the last share, and takes the domain afterwards."""
    lost, found = make_pool(attended=True), make_pool(attended=True)
    azure_file = activate(lost, officers)
    lost.down()
    found.file = lost.file
    room = Room(found, officers, azure_file)
    killed_at_every_step(room, name, "PROVISIONED")
    hold(room, name)
    found.await_states(["SERVING"] * 3)
    found.down()


@pytest.mark.parametrize("name", ["unlock", "unlock-azure-shares", "restore-blob"])
def test_unlock(room: Room, seed: int, name: str) -> None:
    """G1, G4: the pool stays locked until the last share; then nothing is lost."""
    draw = random.Random(seed)
    lock(room.pool)
    killed_at_every_step(room, name, "LOCKED")
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
def test_ceremonies_of_a_living_pool(room: Room, name: str) -> None:
    """G1, G4: keys are served all the time, and the domain in force stays in force."""
    unlocked(room)
    before = file_in_force(room)
    killed_at_every_step(room, name, "SERVING")
    assert file_in_force(room) == before
    hold(room, "verify")


@pytest.fixture(scope="module")
def room(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> Room:
    """An active pool with its domain in both formats."""
    pool = make_pool(attended=True)
    return Room(pool, officers, activate(pool, officers))


def activate(pool: RunningPool, officers: list[TestOfficer]) -> bytes:
    """Activate a pool; return its security domain in Azure's format."""
    pool.activate(officers, 2)
    with pool.client("administrator", timeout_seconds=30.0) as client:
        proof = client.verify_security_domain(PARTITION)
        client.cancel_ceremony(PARTITION, proof.attempt_id)
    return proof.azure_security_domain_file


def file_in_force(room: Room) -> bytes:
    """Return the security-domain file of the pool."""
    with room.pool.client("administrator", timeout_seconds=30.0) as client:
        proof = client.verify_security_domain(PARTITION)
        client.cancel_ceremony(PARTITION, proof.attempt_id)
    return proof.security_domain_file


def lock(pool: RunningPool) -> None:
    """Bring the pool to LOCKED, whatever it is now."""
    if settled(pool) != ["LOCKED"] * 3:
        pool.kill_everything()
        pool.await_states(["LOCKED"] * 3)


def unlocked(room: Room) -> None:
    """Bring an active pool to SERVING."""
    if settled(room.pool) == ["LOCKED"] * 3:
        hold(room, "unlock")
    room.pool.await_states(["SERVING"] * 3)
