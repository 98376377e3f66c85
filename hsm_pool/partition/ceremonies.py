"""The ceremonies of a partition: what it does around its ceremony child (G4).

::

    download        every officer proves his share ──► first transaction: the pool is active
    init_recovery   quorum ──► a locked pool serves again; a new pool is in the lost pool's domain
    verify          quorum ──► nothing changes
    rotate_shares   quorum ──► new file ──► quorum of the new officers ──► the header changes
    new_generation  every new officer proves his share ──► new root and epoch, the header changes

A ceremony lives in memory, in one child of one partition. Until its last step nothing is
written anywhere, and the last step is one transaction: a crash at any point leaves the
pool as it was, and the ceremony is begun again.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import dataclass
from enum import IntEnum

from hsm_pool import limits
from hsm_pool.audit.record import note
from hsm_pool.ceremony.parent import CeremonyChild
from hsm_pool.core.commands import ReplaceSecurityDomain
from hsm_pool.core.roles import Access
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.enclave.evidence import exchange_key_report_data
from hsm_pool.errors import AlreadyActivated, CeremonyState, InvalidField
from hsm_pool.partition import epochs
from hsm_pool.partition.partition import Partition, PartitionState
from hsm_pool.store import chain
from hsm_pool.store.committer import Mutation
from hsm_pool.store.replica import boot_time
from hsm_pool.store.sealing import PoolKeys
from mhsm.ceremony.v1 import ceremony_pb2
from mhsm.evidence.v1 import evidence_pb2
from mhsm.pool.v1 import pool_pb2
from mhsm.record.v1 import record_pb2
from security_domain import container
from security_domain.azure import document as azure_document
from security_domain.azure import transfer_key
from security_domain.errors import InvalidFile

ATTEMPT_ID_BYTES = 16


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
class _Attempt:
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


class Ceremonies:
    """The ceremonies of one partition, one at a time. Thread-safe."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._attempt: _Attempt | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """End a ceremony under way."""
        with self._lock:
            timer = self._attempt.timer if self._attempt else None
            self._end()
        if timer:
            timer.join()

    @property
    def accepted_shares(self) -> int:
        """Shares accepted by the ceremony under way."""
        attempt = self._attempt
        return len(attempt.accepted_officers) if attempt else 0

    @property
    def child_hardening(self) -> tuple[pool_pb2.HardeningMeasure.ValueType, ...]:
        """What the child of the ceremony under way is hardened with."""
        attempt = self._attempt
        return attempt.hardening if attempt and not attempt.complete else ()

    def current(self) -> Ceremony | None:
        """Return the ceremony under way."""
        with self._lock:
            attempt = self._live_attempt()
            return attempt.seen() if attempt else None

    def download(self, certificates_der: list[bytes], required: int, request_id: str) -> Ceremony:
        """Create the security domain; the pool becomes active when every officer has proved his share.

        A repeat of the request returns the ceremony under way, or the completed one.

        Raises:
            InvalidField: The officers or the quorum are not acceptable.
            AlreadyActivated: The pool is active, by another request.
            CeremonyState: Another ceremony is under way, or the child died.
            CommitUnknown: The store gave no answer in time.
        """
        digest = _request_digest(certificates_der, required, request_id)
        with self._lock:
            known = self._partition.activated_by(digest)
            if known is not None:
                return _completed(known)
            if self._partition.state is not PartitionState.PROVISIONED:
                raise AlreadyActivated("the pool is active already")
            attempt = self._live_attempt()
            if attempt and attempt.request_digest == digest:
                return attempt.seen()
            attempt_id = os.urandom(ATTEMPT_ID_BYTES)
            create = ceremony_pb2.CreateCommand(
                pool_id=self._partition.settings.pool_id,
                generation=1,
                officer_certificates_der=certificates_der,
                required=required,
                attempt_id=attempt_id,
            )
            request = ceremony_pb2.CeremonyRequest(create=create)
            begun = self._begin(Purpose.ACTIVATION, attempt_id, request)
            begun.request_digest = digest
            return begun.seen()

    def init_recovery(self, file: bytes = b"") -> Ceremony:
        """Start to unlock a locked pool, or to recover a lost pool's domain in a new one.

        Args:
            file: The lost pool's security-domain file, in its own or in Azure's format; b"" in a
                locked pool, which has its own, and where a restore blob will bring it.

        Raises:
            InvalidField: The file is not a security domain, or is given where none is needed.
            CeremonyState: The pool is in another state, or a ceremony is under way.
        """
        with self._lock:
            partition = self._partition
            header = partition.header
            sealed, azure_file = record_pb2.SealedEpoch(), b""
            if partition.state is PartitionState.LOCKED and header is not None:
                if file and file != header.security_domain_file:
                    raise InvalidField("a locked pool has its own file", field="security_domain_file")
                file, azure_file = header.security_domain_file, header.azure_security_domain_file
                sealed = header.sealed_epoch
            elif partition.state is not PartitionState.PROVISIONED:
                raise CeremonyState("the pool is not locked, and not new")
            elif file:
                file, azure_file = _by_format(file)
            attempt = self._open(Purpose.RECOVERY, file, azure_file, sealed, give_keys=True)
            attempt.new_pool = partition.state is PartitionState.PROVISIONED
            return attempt.seen()

    def verify(self) -> Ceremony:
        """Start a proof that a quorum of officers can open the security domain and the pool's keys.

        Raises:
            CeremonyState: The pool does not serve, or a ceremony is under way.
        """
        with self._lock:
            header = self._header_in_force()
            file, azure_file = header.security_domain_file, header.azure_security_domain_file
            return self._open(Purpose.VERIFICATION, file, azure_file, header.sealed_epoch).seen()

    def rotate_shares(self, certificates_der: list[bytes], required: int) -> Ceremony:
        """Start to share the secret out among new officers.

        Raises:
            InvalidField: The new officers or their quorum are not acceptable.
            CeremonyState: The pool does not serve, or a ceremony is under way.
        """
        if not certificates_der:
            raise InvalidField("the new officers are missing", field="officer_certificates_der")
        with self._lock:
            header = self._header_in_force()
            attempt = self._open(
                Purpose.SHARE_ROTATION,
                header.security_domain_file,
                header.azure_security_domain_file,
                header.sealed_epoch,
                new_officers=certificates_der,
                new_required=required,
            )
            attempt.old_header_digest = chain.value_digest(epochs.header_value(header))
            return attempt.seen()

    def new_generation(self, certificates_der: list[bytes], required: int) -> Ceremony:
        """Start to replace the security domain; no old officer is needed.

        Raises:
            InvalidField: The new officers or their quorum are not acceptable.
            CeremonyState: The pool does not serve, or a ceremony is under way.
        """
        with self._lock:
            header = self._header_in_force()
            domain = container.parse(header.security_domain_file)
            attempt_id = os.urandom(ATTEMPT_ID_BYTES)
            create = ceremony_pb2.CreateCommand(
                pool_id=domain.pool_id,
                generation=domain.generation + 1,
                officer_certificates_der=certificates_der,
                required=required,
                attempt_id=attempt_id,
            )
            request = ceremony_pb2.CeremonyRequest(create=create)
            attempt = self._begin(Purpose.NEW_GENERATION, attempt_id, request)
            attempt.old_header_digest = chain.value_digest(epochs.header_value(header))
            return attempt.seen()

    def rotate_key_encryption_key(self, access: Access) -> int:
        """Replace the key-encryption key; no officer is needed. Returns the new epoch.

        Raises:
            CeremonyState: The pool does not serve, or not every serving partition took the key in time.
        """
        with self._lock:
            self._header_in_force()
        return epochs.rotate(self._partition, access)

    def submit_share(self, attempt_id: bytes, submission: bytes, access: Access) -> Ceremony:
        """Hand an officer's submission to the child; do what the ceremony is for when it has enough.

        Args:
            attempt_id: Of the ceremony.
            submission: The officer's.
            access: What the roles of whoever sends it must allow when the pool changes.

        Raises:
            CeremonyState: No such attempt is under way (or its child died).
            ShareRefused: The share was refused; accepted shares stay accepted.
            CommitUnknown: The last step gave no answer in time; the status tells.
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
            for officer in set(result.accepted_officers).difference(attempt.accepted_officers):
                note(officer=officer)
            attempt.accepted_officers = tuple(result.accepted_officers)
            attempt.required = result.required
            attempt.file = (
                result.next_security_domain_file or result.uploaded_security_domain_file or attempt.file
            )
            attempt.azure_file = result.next_azure_security_domain_file or attempt.azure_file
            attempt.new_file = attempt.new_file or bool(result.next_security_domain_file)
            return self._finished(attempt, result, access)

    def upload_restore_blob(self, attempt_id: bytes, restore_blob: bytes, access: Access) -> Ceremony:
        """Hand a restore blob of Azure's format to the child, in place of shares.

        Raises:
            CeremonyState: No such attempt is under way, it takes no blob, or its child died.
            InvalidField: The blob is none, or was made for another exchange certificate or domain.
            CommitUnknown: The last step gave no answer in time; the status tells.
        """
        with self._lock:
            attempt = self._checked(attempt_id)
            if attempt.purpose is not Purpose.RECOVERY:
                raise CeremonyState("only a recovery takes a restore blob")
            upload = ceremony_pb2.UploadCommand(restore_blob=restore_blob)
            try:
                result = attempt.child.ask(ceremony_pb2.CeremonyRequest(upload=upload)).submit
            except CeremonyState as error:
                if not attempt.child.alive:
                    self._end()
                    raise
                raise InvalidField(error.message, field="restore_blob") from None
            attempt.required = result.required
            attempt.file = result.uploaded_security_domain_file or attempt.file
            return self._finished(attempt, result, access)

    def _finished(self, attempt: _Attempt, result: ceremony_pb2.SubmitResult, access: Access) -> Ceremony:
        """Do what a ceremony is for, if it has enough."""
        if result.complete:
            attempt.complete = True
            try:
                self._complete(attempt, result, access)
            finally:
                self._end()
        return attempt.seen()

    def _transfer_key_name(self) -> str:
        return f"mhsm-{self._partition.settings.pool_id[:16]}"

    def cancel(self, attempt_id: bytes) -> None:
        """End the ceremony and forget its shares.

        Raises:
            CeremonyState: No such ceremony is under way.
        """
        with self._lock:
            self._checked(attempt_id)
            self._end()

    # -- beginning -----------------------------------------------------------------------

    def _header_in_force(self) -> record_pb2.PoolHeader:
        header = self._partition.header
        if self._partition.holding_keys() is None or header is None:
            raise CeremonyState("the pool is not active, or locked")
        return header

    def _open(
        self,
        purpose: Purpose,
        file: bytes,
        azure_file: bytes,
        sealed: record_pb2.SealedEpoch,
        *,
        give_keys: bool = False,
        new_officers: list[bytes] | None = None,
        new_required: int = 0,
    ) -> _Attempt:
        attempt_id = os.urandom(ATTEMPT_ID_BYTES)
        command = ceremony_pb2.OpenCommand(
            security_domain_file=file,
            azure_security_domain_file=azure_file,
            attempt_id=attempt_id,
            sealed_pool_keys=sealed.sealed_pool_keys,
            epoch=sealed.epoch,
            give_keys=give_keys,
            new_officer_certificates_der=new_officers or [],
            new_required=new_required,
            transfer_key_name=self._transfer_key_name() if purpose is Purpose.RECOVERY else "",
        )
        return self._begin(purpose, attempt_id, ceremony_pb2.CeremonyRequest(open=command))

    def _begin(self, purpose: Purpose, attempt_id: bytes, request: ceremony_pb2.CeremonyRequest) -> _Attempt:
        """Start a child; the caller holds the lock."""
        if self._live_attempt():
            raise CeremonyState("a ceremony is under way at this partition; finish it or cancel it first")
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
        self._attempt = _Attempt(
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
        timer = threading.Timer(limits.CEREMONY_SECONDS, self._expire, (self._attempt,))
        timer.daemon = True
        self._attempt.timer = timer
        timer.start()
        return self._attempt

    def _expire(self, attempt: _Attempt) -> None:
        with self._lock:
            if self._attempt is attempt:
                self._end()

    # -- completing ----------------------------------------------------------------------

    def _complete(self, attempt: _Attempt, result: ceremony_pb2.SubmitResult, access: Access) -> None:
        match attempt.purpose:
            case Purpose.RECOVERY if result.pool_keys_secret:
                keys = PoolKeys(self._partition.settings.pool_id, SecretBytes(result.pool_keys_secret))
                self._partition.adopt(keys, "quorum")
            case Purpose.ACTIVATION | Purpose.RECOVERY:
                self._activate(attempt, SecretBytes(result.backup_private_key))
            case Purpose.SHARE_ROTATION:
                self._replace(attempt, access)
            case Purpose.NEW_GENERATION:
                domain = container.parse(attempt.file)
                backup_key = SecretBytes(result.backup_private_key)
                new = epochs.NewDomain(attempt.file, attempt.azure_file, domain, backup_key)
                epochs.rotate(self._partition, access, attempt.old_header_digest, new)
            case Purpose.VERIFICATION:
                pass  # the child has opened the domain and the pool's keys

    def _activate(self, attempt: _Attempt, backup_private_key: SecretBytes) -> None:
        """Make the pool active in the domain that was just made or recovered."""
        pool_id = self._partition.settings.pool_id
        domain = container.parse(attempt.file)
        keys = PoolKeys.generate(pool_id, domain.generation, backup_private_key)
        header = record_pb2.PoolHeader(
            pool_id=pool_id,
            generation=domain.generation,
            security_domain_file=attempt.file,
            activation_request_digest=attempt.request_digest,
            sealed_epoch=epochs.sealed(domain, keys, keys.epoch),
            recovery_public_key=domain.recovery_public_key,
            azure_security_domain_file=attempt.azure_file,
        )
        self._partition.activate(header, keys)

    def _replace(self, attempt: _Attempt, access: Access) -> None:
        """Put the new file in force, unless another ceremony has changed the header meanwhile."""
        serving = self._partition.holding_keys()
        if serving is None:
            raise self._partition.refusal()
        header = record_pb2.PoolHeader()
        header.CopyFrom(self._header_in_force())
        header.security_domain_file = attempt.file
        header.azure_security_domain_file = attempt.azure_file
        value = epochs.header_value(header)
        command = ReplaceSecurityDomain(attempt.old_header_digest, chain.value_digest(value))
        mutation = Mutation(command, access, lambda _: b"", None, b"", 0, header=value)
        serving.committer.submit(mutation, boot_time() + limits.MUTATION_SECONDS_MAX)

    # -- attempts ------------------------------------------------------------------------

    def _checked(self, attempt_id: bytes) -> _Attempt:
        if len(attempt_id) != ATTEMPT_ID_BYTES:
            raise InvalidField("attempt_id has 16 bytes", field="attempt_id")
        attempt = self._live_attempt()
        if attempt is None or attempt.attempt_id != attempt_id:
            raise CeremonyState("this attempt has ended: it is not under way at this partition")
        return attempt

    def _live_attempt(self) -> _Attempt | None:
        attempt = self._attempt
        stale = attempt and (
            boot_time() > attempt.expires_at
            or not attempt.child.alive
            or self._partition.state not in _STATES[attempt.purpose]
        )
        if stale:
            self._end()
        return self._attempt

    def _end(self) -> None:
        if self._attempt:
            if self._attempt.timer:
                self._attempt.timer.cancel()
            self._attempt.child.close()
            self._attempt = None


def _by_format(file: bytes) -> tuple[bytes, bytes]:
    """Return (file of our own format, document of Azure's format), one of them b"".

    Raises:
        InvalidField: The file is neither.
    """
    try:
        if azure_document.is_document(file):
            azure_document.parse(file)
            return b"", file
        container.parse(file)
        return file, b""
    except InvalidFile as error:
        raise InvalidField(str(error), field="security_domain_file") from None


def _completed(header: record_pb2.PoolHeader) -> Ceremony:
    """Return the activation that this request completed before."""
    file = header.security_domain_file
    officers = container.parse(file).officers
    return Ceremony(
        b"",
        Purpose.ACTIVATION,
        b"",
        0,
        None,
        file,
        len(officers),
        len(officers),
        tuple(officer.thumbprint for officer in officers),
        complete=True,
        azure_file=header.azure_security_domain_file,
        new_file=True,
    )


def _request_digest(certificates_der: list[bytes], required: int, request_id: str) -> bytes:
    digest = hashlib.sha256(b"mhsm/activation/v1\x00")
    for part in (request_id.encode(), str(required).encode(), *certificates_der):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()
