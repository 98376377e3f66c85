"""Activation and unlocking: what the partition does around its ceremony child (G4)."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import dataclass

from hsm_pool import limits
from hsm_pool.ceremony.parent import CeremonyChild
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.enclave.evidence import report_data
from hsm_pool.errors import AlreadyActivated, CeremonyState, InvalidField
from hsm_pool.partition.partition import Partition, PartitionState
from hsm_pool.store.replica import boot_time
from hsm_pool.store.sealing import PoolKeys
from mhsm.ceremony.v1 import ceremony_pb2
from mhsm.record.v1 import record_pb2
from security_domain.recovery import seal_pool_keys

ATTEMPT_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class BegunRecovery:
    """What officers need to submit their shares."""

    attempt_id: bytes
    exchange_public_key: bytes
    expires_at_ms: int
    generation: int
    evidence: bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an unlock attempt is."""

    accepted: int
    required: int
    unlocked: bool


@dataclass(slots=True)
class _Attempt:
    attempt_id: bytes
    child: CeremonyChild
    expires_at: float
    accepted: int = 0


class Ceremonies:
    """The ceremonies of one partition, one at a time. Thread-safe."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._attempt: _Attempt | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """End a ceremony under way."""
        with self._lock:
            self._end()

    @property
    def accepted_shares(self) -> int:
        """Shares accepted by the attempt under way."""
        attempt = self._attempt
        return attempt.accepted if attempt else 0

    def download(self, certificates_der: list[bytes], required: int, request_id: str) -> bytes:
        """Create the security domain and activate the pool.

        Raises:
            InvalidField: The officers or the quorum are not acceptable.
            AlreadyActivated: The pool is active, by another request.
            CeremonyState: Another ceremony is under way, or the child died.
            CommitUnknown: The store gave no answer in time.
        """
        digest = _request_digest(certificates_der, required, request_id)
        with self._lock:
            known = self._partition.activated_file(digest)
            if known is not None:
                return known
            if self._partition.state is not PartitionState.PROVISIONED:
                raise AlreadyActivated("the pool is active already")
            settings = self._partition.settings
            with CeremonyChild() as child:
                response = child.ask(
                    ceremony_pb2.CeremonyRequest(
                        create=ceremony_pb2.CreateCommand(
                            pool_id=settings.pool_id,
                            generation=1,
                            officer_certificates_der=certificates_der,
                            required=required,
                        )
                    )
                ).create
            keys = PoolKeys.generate(settings.pool_id)
            sealed = seal_pool_keys(
                response.recovery_public_key, settings.pool_id, 1, keys.epoch, keys.export().reveal()
            )
            header = record_pb2.PoolHeader(
                pool_id=settings.pool_id,
                generation=1,
                security_domain_file=response.security_domain_file,
                activation_request_digest=digest,
                epochs=[record_pb2.SealedEpoch(epoch=keys.epoch, sealed_pool_keys=sealed)],
                recovery_public_key=response.recovery_public_key,
            )
            return self._partition.activate(header, keys)

    def init_recovery(self) -> BegunRecovery:
        """Start an attempt to unlock the pool.

        Raises:
            CeremonyState: The pool is not locked, or an attempt is under way.
        """
        with self._lock:
            partition = self._partition
            header = partition.header
            if partition.state is not PartitionState.LOCKED or header is None:
                raise CeremonyState("the pool is not locked")
            if self._live_attempt():
                raise CeremonyState("an attempt to unlock the pool is under way; cancel it first")
            attempt_id = os.urandom(ATTEMPT_ID_BYTES)
            child = CeremonyChild()
            request = ceremony_pb2.CeremonyRequest(
                begin_recovery=ceremony_pb2.BeginRecoveryCommand(
                    security_domain_file=header.security_domain_file,
                    attempt_id=attempt_id,
                    sealed_pool_keys=[epoch.sealed_pool_keys for epoch in header.epochs],
                )
            )
            try:
                begun = child.ask(request).begin_recovery
            except BaseException:
                child.close()
                raise
            self._attempt = _Attempt(attempt_id, child, boot_time() + limits.RECOVERY_ATTEMPT_SECONDS)
            settings = partition.settings
            evidence = partition.platform.attest(
                settings.pool_id,
                settings.index,
                partition.state_directory.incarnation,
                report_data("recovery/exchange-key", attempt_id, begun.exchange_public_key),
            )
            return BegunRecovery(
                attempt_id,
                begun.exchange_public_key,
                time.time_ns() // 1_000_000 + limits.RECOVERY_ATTEMPT_SECONDS * 1000,
                header.generation,
                evidence.SerializeToString(),
            )

    def submit_share(self, attempt_id: bytes, submission: bytes) -> Progress:
        """Hand an officer's submission to the child; unlock when the quorum is complete.

        Raises:
            CeremonyState: No such attempt is under way (or its child died).
            ShareRefused: The share was refused; accepted shares stay accepted.
        """
        with self._lock:
            attempt = self._checked(attempt_id)
            try:
                result = attempt.child.ask(
                    ceremony_pb2.CeremonyRequest(submit=ceremony_pb2.SubmitCommand(submission=submission))
                ).submit
            except CeremonyState:
                if not attempt.child.alive:
                    self._end()
                raise
            attempt.accepted = result.accepted
            if not result.pool_keys_secret:
                return Progress(result.accepted, result.required, unlocked=False)
            newest = SecretBytes(result.pool_keys_secret[-1])
            self._partition.adopt(PoolKeys(self._partition.settings.pool_id, newest), "quorum")
            self._end()
            return Progress(result.accepted, result.required, unlocked=True)

    def cancel(self, attempt_id: bytes) -> None:
        """End the attempt and forget its shares.

        Raises:
            CeremonyState: No such attempt is under way.
        """
        with self._lock:
            self._checked(attempt_id)
            self._end()

    def _checked(self, attempt_id: bytes) -> _Attempt:
        if len(attempt_id) != ATTEMPT_ID_BYTES:
            raise InvalidField("attempt_id has 16 bytes", field="attempt_id")
        attempt = self._live_attempt()
        if attempt is None or attempt.attempt_id != attempt_id:
            raise CeremonyState("no such attempt to unlock the pool is under way; start one")
        return attempt

    def _live_attempt(self) -> _Attempt | None:
        attempt = self._attempt
        stale = attempt and (
            boot_time() > attempt.expires_at
            or not attempt.child.alive
            or self._partition.state is not PartitionState.LOCKED
        )
        if stale:
            self._end()
        return self._attempt

    def _end(self) -> None:
        if self._attempt:
            self._attempt.child.close()
            self._attempt = None


def _request_digest(certificates_der: list[bytes], required: int, request_id: str) -> bytes:
    digest = hashlib.sha256(b"mhsm/activation/v1\x00")
    for part in (request_id.encode(), str(required).encode(), *certificates_der):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()
