"""Every ceremony as a script of steps, for tests that break off in the middle of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hsm_pool.client.pool import Pool
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import submission
from security_domain.azure import document, transfer_key
from security_domain.azure import submission as azure_submission
from security_domain.azure.restore_blob import make_restore_blob
from tests.running_pool import RunningPool, TestOfficer, make_officers, until

Ceremony = security_domain_pb2.Ceremony
Step = Callable[[Pool, Ceremony], Ceremony]
PARTITION = 0
"""Where the ceremonies are held."""


@dataclass(frozen=True, slots=True)
class Script:
    """A ceremony: how it begins, and each step after that; the last one completes it."""

    begin: Callable[[Pool], Ceremony]
    steps: list[Step]
    new_officers: list[TestOfficer] = field(default_factory=list)
    """Whose shares open the domain when the ceremony is complete, if it changes the officers."""


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

    def officers_are(self, new: list[TestOfficer]) -> None:
        """Take note of other officers and of their files, after a change of officers."""
        self.officers = self.pool.officers = new
        with self.pool.client("administrator", timeout_seconds=30.0) as client:
            proof = client.verify_security_domain(PARTITION)
            client.cancel_ceremony(PARTITION, proof.attempt_id)
        self.pool.file, self.azure_file = proof.security_domain_file, proof.azure_security_domain_file

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
                    new,
                )
            case "new-generation":
                return Script(
                    lambda client: client.new_generation(new_certificates, 2, PARTITION),
                    self.shares(new),
                    new,
                )
        raise AssertionError(name)


def hold(room: Room, name: str) -> Ceremony:
    """Hold a ceremony to its end."""
    script = room.script(name)
    with room.pool.client("administrator", timeout_seconds=30.0) as client:
        begun = now = script.begin(client)
        for step in script.steps:
            now = step(client, now)
        assert now.complete
    if script.new_officers:
        room.officers_are(script.new_officers)
    return begun


def settled(pool: RunningPool) -> list[str]:
    """Return the states when no partition is on its way to another one."""

    def same() -> list[str] | None:
        states = pool.states()
        legal = states[0] in {"PROVISIONED", "LOCKED", "SERVING"}
        return states if legal and len(set(states)) == 1 else None

    return until(same, 60, lambda: f"one legal state of all partitions, now {pool.states()}")


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
