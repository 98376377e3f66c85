"""The ceremony child: alone holds shares and the security-domain secret, and exits (G3, G4).

Run by a partition as ``python -m hsm_pool.ceremony.child`` with frames of
mhsm.ceremony.v1 on standard input and output. It can open no socket and no file
but Python's own, and ends when its command is done or its partition is gone (end of input).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import IO

from cryptography.hazmat.primitives import constant_time
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.protobuf.message import DecodeError

from hsm_pool.ceremony.frames import read_frame, write_frame
from hsm_pool.enclave import hardening, system_calls
from hsm_pool.enclave.hardening import Measure
from mhsm.ceremony.v1 import ceremony_pb2
from mhsm.record.v1 import record_pb2
from security_domain import domain, officers
from security_domain.azure import domain as azure_domain
from security_domain.azure import transfer_key
from security_domain.azure.recovery import AzureRecovery
from security_domain.azure.restore_blob import open_restore_blob
from security_domain.azure.submission import is_submission
from security_domain.domain import Core
from security_domain.errors import OTHER_FORMAT, InvalidFile, SecurityDomainError, SubmissionRefused
from security_domain.recovery import Recovery
from security_domain.submission import (
    ACTIVATION,
    NEW_GENERATION,
    RECOVERY,
    SHARE_ROTATION,
    VERIFICATION,
    officers_digest,
)

_CLOCK_ERROR = timedelta(minutes=5)
_TRANSFER_KEY_VALIDITY = timedelta(hours=2)


def _refusal(error: SecurityDomainError) -> ceremony_pb2.CeremonyResponse:
    return ceremony_pb2.CeremonyResponse(
        refusal=ceremony_pb2.Refusal(
            kind=type(error).__name__, message=str(error), officer=getattr(error, "officer", "") or ""
        )
    )


class _Ceremony:
    """One ceremony: a recovery that collects shares, and what is done when it has them."""

    def __init__(self, begin: ceremony_pb2.CeremonyRequest) -> None:
        self._open = begin.open
        self._new_domain: domain.NewDomain | None = None
        self._recovery: Recovery | None = None
        self._azure_recovery: AzureRecovery | None = None
        self._exchange: transfer_key.ExchangeKey | None = None
        self.azure_file = b""
        self.without_proofs = False
        if begin.WhichOneof("command") == "create":
            command = begin.create
            certificates = list(command.officer_certificates_der)
            self._new_domain = domain.create(
                command.pool_id, command.generation, certificates, command.required
            )
            self.without_proofs = command.without_proofs
            self.file = self._new_domain.file
            self.azure_file = azure_domain.make(
                self._new_domain.core, self.file, certificates, command.required
            )
            self._recovery = Recovery(
                self.file,
                command.attempt_id,
                everyone=True,
                purpose=ACTIVATION if command.generation == 1 else NEW_GENERATION,
            )
        # Refused now, not when the old officers have done their part.
        self._new_officers = list(begin.open.new_officer_certificates_der)
        self.new_thumbprints: list[str] = []
        if self._new_officers:
            checked = officers.check_officers(self._new_officers, begin.open.new_required)
            self.new_thumbprints = [officer.thumbprint for officer in checked]
        if begin.WhichOneof("command") == "open":
            self.file, self.azure_file = (
                begin.open.security_domain_file,
                begin.open.azure_security_domain_file,
            )
            purpose, detail = self._agreement()
            attempt_id, exchange_key = begin.open.attempt_id, X25519PrivateKey.generate()
            if self.file:
                self._recovery = Recovery(self.file, attempt_id, exchange_key, purpose=purpose, detail=detail)
            if self.azure_file:
                self._azure_recovery = AzureRecovery(
                    self.azure_file, attempt_id, exchange_key, purpose=purpose, detail=detail
                )
        if begin.open.transfer_key_name:
            now = datetime.now(UTC)
            self._exchange = transfer_key.make_exchange_key(
                begin.open.transfer_key_name, now - _CLOCK_ERROR, now + _TRANSFER_KEY_VALIDITY
            )

    def _agreement(self) -> tuple[str, bytes]:
        """Return what officers must have agreed to: it follows from what this child is going to do."""
        if self.new_thumbprints:
            return SHARE_ROTATION, officers_digest(self.new_thumbprints, self._open.new_required)
        return (RECOVERY if self._open.give_keys else VERIFICATION), b""

    def begun(self, measures: Iterable[Measure]) -> ceremony_pb2.CeremonyResponse:
        result = ceremony_pb2.BeginResult(
            security_domain_file=self.file,
            azure_security_domain_file=self.azure_file,
            new_officers=self.new_thumbprints,
            hardening=[measure.value for measure in measures],
        )
        taking = self._recovery or self._azure_recovery
        if taking:
            result.exchange_public_key = taking.exchange_public_key
            result.required = taking.needed
        if self._new_domain and self.without_proofs:
            result.backup_private_key = self._new_domain.backup_private_key.reveal()
        if self._exchange:
            result.transfer_key = transfer_key.transfer_key(self._exchange.certificate_der)
        return ceremony_pb2.CeremonyResponse(begin=result)

    def submit(self, submission: bytes) -> ceremony_pb2.SubmitResult:
        """Take a share of either format; shares of two formats do not go together, the first decides."""
        by_format: list[Recovery | AzureRecovery | None] = [self._recovery, self._azure_recovery]
        if is_submission(submission):
            by_format.reverse()
        taking, other = by_format
        if taking is None:
            raise SubmissionRefused(f"{OTHER_FORMAT}: it has no file of this one")
        if other and other.accepted_officers:
            raise SubmissionRefused(f"{OTHER_FORMAT}: the first share decided")
        progress = taking.submit(submission)
        result = ceremony_pb2.SubmitResult(
            accepted=progress.accepted,
            required=progress.required,
            accepted_officers=taking.accepted_officers,
        )
        if not progress.complete:
            return result
        recovery = self._opened_by(taking, result)
        if self._new_officers:
            return self._share_out(recovery)
        return self._completed(recovery, result)

    def upload(self, restore_blob: bytes) -> ceremony_pb2.SubmitResult:
        if self._exchange is None:
            raise SubmissionRefused("this ceremony takes no restore blob")
        if self._recovery is None and self._azure_recovery is not None:
            # Nothing would say that it is of the domain that was announced, and officers agreed to.
            raise SubmissionRefused(
                "this ceremony takes no restore blob: it began with a file, whose officers submit shares"
            )
        items = open_restore_blob(restore_blob, self._exchange.private_key, self._exchange.certificate_der)
        core, file = azure_domain.open_core(items)
        result = ceremony_pb2.SubmitResult()
        recovery = self._take_core(core, file, result)
        result.required = recovery.needed
        return self._completed(recovery, result)

    def _opened_by(self, taking: Recovery | AzureRecovery, result: ceremony_pb2.SubmitResult) -> Recovery:
        if isinstance(taking, Recovery):
            return taking
        return self._take_core(*taking.opened(), result)

    def _take_core(self, core: Core, file: bytes, result: ceremony_pb2.SubmitResult) -> Recovery:
        """Return the recovery of a domain whose core came with its file, in Azure's format.

        Raises:
            InvalidFile: The core is of another domain. Or, in a new pool, the file that was given is not
                the one that the quorum vouches for: nothing else has authenticated it, and its officers
                might never open it.
        """
        recovery = self._recovery
        if recovery is None:
            recovery = Recovery(file, self._open.attempt_id)
            result.uploaded_security_domain_file = file
        elif not self._open.sealed_pool_keys and file != self.file:
            raise InvalidFile("the security-domain file is not the one that the quorum has opened")
        recovery.accept(core)
        return recovery

    def _share_out(self, opened: Recovery) -> ceremony_pb2.SubmitResult:
        """Begin the second phase of a rotation."""
        certificates, required = self._new_officers, self._open.new_required
        self.file, self._recovery = opened.next_phase(certificates, required)
        self.azure_file = azure_domain.make(opened.opened(), self.file, certificates, required)
        self._new_officers, self._azure_recovery = [], None
        return ceremony_pb2.SubmitResult(
            required=self._recovery.needed,
            next_security_domain_file=self.file,
            next_azure_security_domain_file=self.azure_file,
        )

    def _completed(self, recovery: Recovery, result: ceremony_pb2.SubmitResult) -> ceremony_pb2.SubmitResult:
        result.complete = True
        pool_keys = b""
        if self._open.sealed_pool_keys:
            pool_keys = recovery.unseal_pool_keys(self._open.sealed_pool_keys, self._open.epoch)
            _require_own(pool_keys, recovery)
        if self._open.give_keys:
            result.pool_keys_secret = pool_keys
        if self._new_domain is not None or (self._open.give_keys and not pool_keys):
            result.backup_private_key = recovery.backup_private_key().reveal()
        return result


def _require_own(pool_keys: bytes, recovery: Recovery) -> None:
    """Refuse pool keys that no partition of a pool in this security domain has sealed (G3, G6).

    Anybody can seal to the public recovery key, and put keys that he knows into the store; but the
    partitions alone hold the domain's backup key, and seal it with the others.

    Raises:
        InvalidFile: They are not the pool's.
    """
    try:
        sealed = record_pb2.PoolKeysSecret.FromString(pool_keys).backup_private_keys.get(recovery.generation)
    except DecodeError:
        sealed = None
    if not sealed or not constant_time.bytes_eq(sealed, recovery.backup_private_key().reveal()):
        raise InvalidFile(
            "the keys in the store were not sealed by a partition of this security domain: somebody has "
            "changed the store; recover in a new pool"
        )


def _serve(
    ceremony: _Ceremony, measures: Iterable[Measure], requests: IO[bytes], responses: IO[bytes]
) -> None:
    write_frame(responses, ceremony.begun(measures))
    if ceremony.without_proofs:
        return
    while (request := read_frame(requests, ceremony_pb2.CeremonyRequest)) is not None:
        try:
            if request.WhichOneof("command") == "upload":
                result = ceremony.upload(request.upload.restore_blob)
            else:
                result = ceremony.submit(request.submit.submission)
        except SecurityDomainError as error:
            write_frame(responses, _refusal(error))
            continue
        write_frame(responses, ceremony_pb2.CeremonyResponse(submit=result))
        if result.complete:
            return


def main() -> int:
    """Serve one ceremony."""
    hardening.harden_process()
    hardening.filter_system_calls(system_calls.CEREMONY_CHILD)
    measures = hardening.reach_nothing()
    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    request = read_frame(requests, ceremony_pb2.CeremonyRequest)
    if request is None:
        return 0
    try:
        _serve(_Ceremony(request), measures, requests, responses)
    except SecurityDomainError as error:
        write_frame(responses, _refusal(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
