"""The attempt at a ceremony that is under way at a partition: its child, its time, its end (G4)."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from enum import IntEnum

from hsm_pool import limits
from hsm_pool.ceremony.parent import CeremonyChild
from hsm_pool.enclave.evidence import exchange_key_report_data
from hsm_pool.errors import CeremonyState, InvalidField
from hsm_pool.partition.partition import Partition, PartitionState
from hsm_pool.store.replica import boot_time
from mhsm.ceremony.v1 import ceremony_pb2
from mhsm.evidence.v1 import evidence_pb2
from mhsm.pool.v1 import pool_pb2
from security_domain.azure import transfer_key

ATTEMPT_ID_BYTES = 16
UNDER_WAY = "a ceremony is under way at this partition; finish it or cancel it first"


class Purpose(IntEnum):
    """What a ceremony is for; numbers as in mhsm.security_domain.v1.CeremonyPurpose."""

    ACTIVATION = 1
    RECOVERY = 2
    VERIFICATION = 3
    SHARE_ROTATION = 4
    NEW_GENERATION = 5


_STATES = {
    Purpose.ACTIVATION: {PartitionState.PROVISIONED},
    Purpose.RECOVERY: {PartitionState.PROVISIONED, PartitionState.LOCKED},
    Purpose.VERIFICATION: {PartitionState.SERVING, PartitionState.DRAINED},
    Purpose.SHARE_ROTATION: {PartitionState.SERVING, PartitionState.DRAINED},
    Purpose.NEW_GENERATION: {PartitionState.SERVING},
}
"""In which states of the partition a ceremony may begin and go on."""


@dataclass(frozen=True, slots=True)
class Ceremony:
    """A ceremony as officers and administrators see it; holds no secret."""

    attempt_id: bytes
    purpose: Purpose
    exchange_public_key: bytes
    expires_at_ms: int
    evidence: evidence_pb2.Evidence | None
    file: bytes
    """The security-domain file whose officers submit now."""
    accepted: int
    required: int
    accepted_officers: tuple[str, ...]
    complete: bool
    azure_file: bytes = b""
    """The same domain in Azure's format, if it is known."""
    transfer_key: str = ""
    """JWK of the exchange certificate for restore blobs; "" when none are taken."""
    new_officers: tuple[str, ...] = ()
    """Thumbprints, in a rotation; submissions are bound to them."""
    new_required: int = 0
    new_file: bool = False
    """Whether this ceremony has made the file; else it is in force."""
    new_pool: bool = False
    """Whether a recovery brings the domain into a new pool; else it unlocks a locked one."""


@dataclass(slots=True)
class Attempt:
    """An attempt at a ceremony: its child, and what people and the last step need to know of it."""

    attempt_id: bytes
    purpose: Purpose
    child: CeremonyChild
    expires_at: float
    expires_at_ms: int
    exchange_public_key: bytes
    evidence: evidence_pb2.Evidence
    file: bytes
    required: int
    azure_file: bytes = b""
    transfer_key: str = ""
    new_officers: tuple[str, ...] = ()
    new_required: int = 0
    new_file: bool = False
    new_pool: bool = False
    request_digest: bytes = b""
    old_header_digest: bytes = b""
    hardening: tuple[pool_pb2.HardeningMeasure.ValueType, ...] = ()
    accepted_officers: tuple[str, ...] = ()
    complete: bool = False
    timer: threading.Timer | None = None
    """Ends the attempt when its time is over."""

    def seen(self) -> Ceremony:
        """Return what officers and administrators see."""
        return Ceremony(
            self.attempt_id,
            self.purpose,
            self.exchange_public_key,
            self.expires_at_ms,
            self.evidence,
            self.file,
            len(self.accepted_officers),
            self.required,
            self.accepted_officers,
            self.complete,
            self.azure_file,
            self.transfer_key,
            self.new_officers,
            self.new_required,
            self.new_file,
            self.new_pool,
        )


class Attempts:
    """The attempt of a partition, one at a time.

    Not thread-safe: whoever calls holds the lock, but for :meth:`close`.

    Args:
        partition: Whose state an attempt depends on, and which attests its exchange key.
        lock: Taken when an attempt's time is over.
    """

    def __init__(self, partition: Partition, lock: threading.Lock) -> None:
        self._partition = partition
        self._lock = lock
        self.current: Attempt | None = None
        """Read without the lock it may have ended already."""

    def close(self) -> None:
        """End the attempt under way, and wait for its timer."""
        with self._lock:
            timer = self.current.timer if self.current else None
            self.end()
        if timer:
            timer.join()

    def begin(self, purpose: Purpose, attempt_id: bytes, request: ceremony_pb2.CeremonyRequest) -> Attempt:
        """Start a child and its attempt, which ends by itself when its time is over.

        Raises:
            InvalidField: The child refuses the officers, the quorum or the file.
            CeremonyState: A ceremony is under way here, or the child died.
        """
        if self.live():
            raise CeremonyState(UNDER_WAY)
        child = CeremonyChild()
        try:
            begun = child.ask(request).begin
        except BaseException:
            child.close()
            raise
        partition = self._partition
        expires_at_ms = time.time_ns() // 1_000_000 + limits.CEREMONY_SECONDS * 1000
        certificate = transfer_key.parse_transfer_key(begun.transfer_key) if begun.transfer_key else b""
        evidence = partition.attester.attest(
            attempt_id,
            exchange_key_report_data(attempt_id, begun.exchange_public_key, certificate),
            begun.exchange_public_key,
            expires_at_ms // 1000,
        )
        attempt = Attempt(
            attempt_id,
            purpose,
            child,
            boot_time() + limits.CEREMONY_SECONDS,
            expires_at_ms,
            begun.exchange_public_key,
            evidence,
            begun.security_domain_file,
            begun.required,
            begun.azure_security_domain_file,
            begun.transfer_key,
            tuple(begun.new_officers),
            request.open.new_required,
            new_file=purpose in {Purpose.ACTIVATION, Purpose.NEW_GENERATION},
            hardening=tuple(begun.hardening),
        )
        # Shares and exchange key must not outlive the attempt, also when nobody asks for it again.
        timer = threading.Timer(limits.CEREMONY_SECONDS, self._expire, (attempt,))
        timer.daemon = True
        attempt.timer = timer
        self.current = attempt
        timer.start()
        return attempt

    def _expire(self, attempt: Attempt) -> None:
        with self._lock:
            if self.current is attempt:
                self.end()

    def live(self) -> Attempt | None:
        """Return the attempt under way, after ending one that cannot go on."""
        attempt = self.current
        stale = attempt and (
            boot_time() > attempt.expires_at
            or not attempt.child.alive
            or self._partition.state not in _STATES[attempt.purpose]
        )
        if stale:
            self.end()
        return self.current

    def named(self, attempt_id: bytes) -> Attempt:
        """Return the attempt under way by its id.

        Raises:
            InvalidField: It is no attempt id.
            CeremonyState: No such attempt is under way.
        """
        if len(attempt_id) != ATTEMPT_ID_BYTES:
            raise InvalidField("attempt_id has 16 bytes", field="attempt_id")
        attempt = self.live()
        if attempt is None or attempt.attempt_id != attempt_id:
            raise CeremonyState("this attempt has ended: it is not under way at this partition")
        return attempt

    def end(self) -> None:
        """End the attempt under way; its child and the shares are gone."""
        if self.current:
            if self.current.timer:
                self.current.timer.cancel()
            self.current.child.close()
            self.current = None
