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
from security_domain import container, domain
from security_domain.errors import SecurityDomainError
from security_domain.recovery import Recovery


def _refusal(error: SecurityDomainError) -> ceremony_pb2.CeremonyResponse:
    return ceremony_pb2.CeremonyResponse(
        refusal=ceremony_pb2.Refusal(
            kind=type(error).__name__, message=str(error), officer=getattr(error, "officer", "") or ""
        )
    )


def _create(command: ceremony_pb2.CreateCommand) -> ceremony_pb2.CeremonyResponse:
    new = domain.create(
        command.pool_id, command.generation, list(command.officer_certificates_der), command.required
    )
    return ceremony_pb2.CeremonyResponse(
        create=ceremony_pb2.CreateResult(
            security_domain_file=new.file, recovery_public_key=new.recovery_public_key
        )
    )


def _recover(command: ceremony_pb2.BeginRecoveryCommand, requests: IO[bytes], responses: IO[bytes]) -> None:
    recovery = Recovery(command.security_domain_file, command.attempt_id)
    required = container.parse(command.security_domain_file).required
    begun = ceremony_pb2.BeginRecoveryResult(exchange_public_key=recovery.exchange_public_key)
    write_frame(responses, ceremony_pb2.CeremonyResponse(begin_recovery=begun))
    while (request := read_frame(requests, ceremony_pb2.CeremonyRequest)) is not None:
        try:
            progress = recovery.submit(request.submit.submission)
            result = ceremony_pb2.SubmitResult(accepted=progress.accepted, required=required)
            if progress.complete:
                result.pool_keys_secret.extend(
                    recovery.unseal_pool_keys(sealed, epoch)
                    for epoch, sealed in enumerate(command.sealed_pool_keys, start=1)
                )
            write_frame(responses, ceremony_pb2.CeremonyResponse(submit=result))
            if progress.complete:
                return
        except SecurityDomainError as error:
            write_frame(responses, _refusal(error))


def main() -> int:
    """Serve one ceremony."""
    harden_process()
    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    request = read_frame(requests, ceremony_pb2.CeremonyRequest)
    if request is None:
        return 0
    try:
        match request.WhichOneof("command"):
            case "create":
                write_frame(responses, _create(request.create))
            case "begin_recovery":
                _recover(request.begin_recovery, requests, responses)
    except SecurityDomainError as error:
        write_frame(responses, _refusal(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
