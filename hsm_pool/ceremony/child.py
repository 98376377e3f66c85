"""The ceremony child: alone holds shares and the security-domain secret, and exits (G3, G4).

Run by a partition as ``python -m hsm_pool.ceremony.child`` with frames of
mhsm.ceremony.v1 on standard input and output. It opens no socket and ends when its
command is done or its partition is gone (end of input).
"""

from __future__ import annotations

import sys
from typing import IO

from hsm_pool.ceremony.frames import read_frame, write_frame
from hsm_pool.crypto.secret_memory import harden_process
from mhsm.ceremony.v1 import ceremony_pb2
from security_domain import domain, officers
from security_domain.errors import SecurityDomainError
from security_domain.recovery import Recovery


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
        if begin.WhichOneof("command") == "create":
            command = begin.create
            self._new_domain = domain.create(
                command.pool_id, command.generation, list(command.officer_certificates_der), command.required
            )
            self.file = self._new_domain.file
            self._recovery = Recovery(self.file, command.attempt_id, everyone=True)
        else:
            self.file = begin.open.security_domain_file
            self._recovery = Recovery(self.file, begin.open.attempt_id)
        # Refused now, not when the old officers have done their part.
        self._new_officers = list(begin.open.new_officer_certificates_der)
        if self._new_officers:
            officers.check_officers(self._new_officers, begin.open.new_required)

    def begun(self) -> ceremony_pb2.CeremonyResponse:
        return ceremony_pb2.CeremonyResponse(
            begin=ceremony_pb2.BeginResult(
                exchange_public_key=self._recovery.exchange_public_key,
                security_domain_file=self.file,
                required=self._recovery.needed,
            )
        )

    def submit(self, submission: bytes) -> ceremony_pb2.SubmitResult:
        progress = self._recovery.submit(submission)
        result = ceremony_pb2.SubmitResult(
            accepted=progress.accepted,
            required=progress.required,
            accepted_officers=self._recovery.accepted_officers,
        )
        if not progress.complete:
            return result
        if self._new_officers:
            required = self._open.new_required
            self.file, self._recovery = self._recovery.next_phase(self._new_officers, required)
            self._new_officers = []
            return ceremony_pb2.SubmitResult(
                required=self._recovery.needed, next_security_domain_file=self.file
            )
        result.complete = True
        pool_keys = [
            self._recovery.unseal_pool_keys(sealed, epoch)
            for epoch, sealed in enumerate(self._open.sealed_pool_keys, start=1)
        ]
        if self._open.give_keys:
            result.pool_keys_secret.extend(pool_keys)
        if self._new_domain is not None or (self._open.give_keys and not pool_keys):
            result.backup_private_key = self._recovery.backup_private_key().reveal()
        return result


def _serve(ceremony: _Ceremony, requests: IO[bytes], responses: IO[bytes]) -> None:
    write_frame(responses, ceremony.begun())
    while (request := read_frame(requests, ceremony_pb2.CeremonyRequest)) is not None:
        try:
            result = ceremony.submit(request.submit.submission)
        except SecurityDomainError as error:
            write_frame(responses, _refusal(error))
            continue
        write_frame(responses, ceremony_pb2.CeremonyResponse(submit=result))
        if result.complete:
            return


def main() -> int:
    """Serve one ceremony."""
    harden_process()
    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    request = read_frame(requests, ceremony_pb2.CeremonyRequest)
    if request is None:
        return 0
    try:
        _serve(_Ceremony(request), requests, responses)
    except SecurityDomainError as error:
        write_frame(responses, _refusal(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
