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
from collections.abc import Sequence

from hsm_pool.audit.record import note
from hsm_pool.core.roles import Access
from hsm_pool.errors import AlreadyActivated, CeremonyState, InvalidField
from hsm_pool.partition import epochs
from hsm_pool.partition.ceremony_attempts import (
    ATTEMPT_ID_BYTES,
    UNDER_WAY,
    Attempt,
    Attempts,
    Ceremony,
    Purpose,
)
from hsm_pool.partition.ceremony_completion import complete
from hsm_pool.partition.partition import Partition, PartitionState
from hsm_pool.store import chain
from mhsm.ceremony.v1 import ceremony_pb2
from mhsm.pool.v1 import pool_pb2
from mhsm.record.v1 import record_pb2
from security_domain import container
from security_domain.azure import document as azure_document
from security_domain.errors import InvalidFile


class Ceremonies:
    """The ceremonies of one partition, one at a time. Thread-safe."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._lock = threading.Lock()
        self._attempts = Attempts(partition, self._lock)

    def close(self) -> None:
        """End a ceremony under way."""
        self._attempts.close()

    @property
    def accepted_shares(self) -> int:
        """Shares accepted by the ceremony under way."""
        attempt = self._attempts.current
        return len(attempt.accepted_officers) if attempt else 0

    @property
    def child_hardening(self) -> tuple[pool_pb2.HardeningMeasure.ValueType, ...]:
        """What the child of the ceremony under way is hardened with."""
        attempt = self._attempts.current
        return attempt.hardening if attempt and not attempt.complete else ()

    def current(self) -> Ceremony | None:
        """Return the ceremony under way."""
        with self._lock:
            attempt = self._attempts.live()
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
        digest = request_digest(certificates_der, required, request_id)
        with self._lock:
            if self._partition.unconfirmed:
                raise CeremonyState(self._partition.refusal().message)
            known = self._partition.activated_by(digest)
            if known is not None:
                return _completed(known)
            if self._partition.state is not PartitionState.PROVISIONED:
                raise AlreadyActivated("the pool is active already")
            attempt = self._attempts.live()
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
            begun = self._attempts.begin(Purpose.ACTIVATION, attempt_id, request)
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
            elif partition.state is not PartitionState.PROVISIONED or partition.unconfirmed:
                raise CeremonyState("the pool is not locked, and not new")
            elif file:
                file, azure_file = _by_format(file)
            attempt = self._open(Purpose.RECOVERY, file, azure_file, sealed, give_keys=True)
            attempt.new_pool = partition.state is PartitionState.PROVISIONED
            return attempt.seen()

    def verify(self) -> Ceremony:
        """Start a proof that a quorum of officers can open the security domain and the pool's keys.

        Raises:
            MHSMError: The pool is not active, or locked.
            CeremonyState: A ceremony is under way.
        """
        with self._lock:
            header = epochs.header_in_force(self._partition)
            file, azure_file = header.security_domain_file, header.azure_security_domain_file
            return self._open(Purpose.VERIFICATION, file, azure_file, header.sealed_epoch).seen()

    def rotate_shares(self, certificates_der: list[bytes], required: int) -> Ceremony:
        """Start to share the secret out among new officers.

        Raises:
            InvalidField: The new officers or their quorum are not acceptable.
            MHSMError: The pool is not active, or locked.
            CeremonyState: A ceremony is under way.
        """
        if not certificates_der:
            raise InvalidField("the new officers are missing", field="officer_certificates_der")
        with self._lock:
            header = epochs.header_in_force(self._partition)
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
            MHSMError: The pool is not active, or locked.
            CeremonyState: A ceremony is under way.
        """
        with self._lock:
            header = epochs.header_in_force(self._partition)
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
            attempt = self._attempts.begin(Purpose.NEW_GENERATION, attempt_id, request)
            attempt.old_header_digest = chain.value_digest(epochs.header_value(header))
            return attempt.seen()

    def rotate_key_encryption_key(self, access: Access) -> int:
        """Replace the key-encryption key; no officer is needed. Returns the new epoch.

        Raises:
            MHSMError: The pool is not active, or locked.
            CeremonyState: A ceremony is under way here, or not every serving partition took the key in
                time.
        """
        with self._lock:
            epochs.header_in_force(self._partition)
            if self._attempts.live():
                # The new key changes the header; the ceremony's last share would be refused for it.
                raise CeremonyState(UNDER_WAY)
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
            attempt = self._attempts.named(attempt_id)
            try:
                result = attempt.child.ask(
                    ceremony_pb2.CeremonyRequest(submit=ceremony_pb2.SubmitCommand(submission=submission))
                ).submit
            except CeremonyState:
                if not attempt.child.alive:
                    self._attempts.end()
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
            attempt = self._attempts.named(attempt_id)
            if attempt.purpose is not Purpose.RECOVERY:
                raise CeremonyState("only a recovery takes a restore blob")
            upload = ceremony_pb2.UploadCommand(restore_blob=restore_blob)
            try:
                result = attempt.child.ask(ceremony_pb2.CeremonyRequest(upload=upload)).submit
            except CeremonyState as error:
                if not attempt.child.alive:
                    self._attempts.end()
                    raise
                raise InvalidField(error.message, field="restore_blob") from None
            attempt.required = result.required
            attempt.file = result.uploaded_security_domain_file or attempt.file
            return self._finished(attempt, result, access)

    def _finished(self, attempt: Attempt, result: ceremony_pb2.SubmitResult, access: Access) -> Ceremony:
        """Do what a ceremony is for, if it has enough."""
        if result.complete:
            attempt.complete = True
            try:
                complete(self._partition, attempt, result, access)
            finally:
                self._attempts.end()
        return attempt.seen()

    def _transfer_key_name(self) -> str:
        return f"mhsm-{self._partition.settings.pool_id[:16]}"

    def cancel(self, attempt_id: bytes) -> None:
        """End the ceremony and forget its shares.

        Raises:
            CeremonyState: No such ceremony is under way.
        """
        with self._lock:
            self._attempts.named(attempt_id)
            self._attempts.end()

    # -- beginning -----------------------------------------------------------------------

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
    ) -> Attempt:
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
        return self._attempts.begin(purpose, attempt_id, ceremony_pb2.CeremonyRequest(open=command))


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


def request_digest(certificates_der: Sequence[bytes], required: int, request_id: str) -> bytes:
    """Return what tells a download from another one, 32 bytes."""
    digest = hashlib.sha256(b"mhsm/activation/v1\x00")
    for part in (request_id.encode(), str(required).encode(), *certificates_der):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()
