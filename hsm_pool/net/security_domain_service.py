"""SecurityDomainService: ceremonies of officers and administrators."""

from __future__ import annotations

import grpc

from hsm_pool.errors import InvalidField
from hsm_pool.net import convert
from hsm_pool.net.interceptors import current_access
from hsm_pool.partition.ceremonies import Ceremonies
from hsm_pool.partition.ceremony_attempts import Ceremony
from hsm_pool.partition.partition import Partition
from mhsm.security_domain.v1 import security_domain_pb2, security_domain_pb2_grpc
from security_domain import container
from security_domain.azure.items import DOCUMENT_BYTES_MAX
from security_domain.officers import CERTIFICATE_BYTES_MAX
from security_domain.submission import SUBMISSION_BYTES_MAX


class SecurityDomainService(security_domain_pb2_grpc.SecurityDomainServiceServicer):
    """Ceremonies."""

    def __init__(self, partition: Partition, ceremonies: Ceremonies) -> None:
        self._partition = partition
        self._ceremonies = ceremonies

    def DownloadSecurityDomain(  # noqa: N802, D102
        self,
        request: security_domain_pb2.DownloadSecurityDomainRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.DownloadSecurityDomainResponse:
        certificates = _bounded(request.officer_certificates_der)
        ceremony = self._ceremonies.download(
            certificates, request.required, convert.request_id(request.request_id)
        )
        return security_domain_pb2.DownloadSecurityDomainResponse(ceremony=self._message(ceremony))

    def InitRecovery(  # noqa: N802, D102
        self,
        request: security_domain_pb2.InitRecoveryRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.InitRecoveryResponse:
        ceremony = self._ceremonies.init_recovery(request.security_domain_file)
        return security_domain_pb2.InitRecoveryResponse(ceremony=self._message(ceremony))

    def VerifySecurityDomain(  # noqa: N802, D102
        self,
        request: security_domain_pb2.VerifySecurityDomainRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.VerifySecurityDomainResponse:
        ceremony = self._ceremonies.verify()
        return security_domain_pb2.VerifySecurityDomainResponse(ceremony=self._message(ceremony))

    def RotateShares(  # noqa: N802, D102
        self,
        request: security_domain_pb2.RotateSharesRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.RotateSharesResponse:
        certificates = _bounded(request.officer_certificates_der)
        ceremony = self._ceremonies.rotate_shares(certificates, request.required)
        return security_domain_pb2.RotateSharesResponse(ceremony=self._message(ceremony))

    def NewGeneration(  # noqa: N802, D102
        self,
        request: security_domain_pb2.NewGenerationRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.NewGenerationResponse:
        certificates = _bounded(request.officer_certificates_der)
        ceremony = self._ceremonies.new_generation(certificates, request.required)
        return security_domain_pb2.NewGenerationResponse(ceremony=self._message(ceremony))

    def RotateKeyEncryptionKey(  # noqa: N802, D102
        self,
        request: security_domain_pb2.RotateKeyEncryptionKeyRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.RotateKeyEncryptionKeyResponse:
        epoch = self._ceremonies.rotate_key_encryption_key(current_access())
        return security_domain_pb2.RotateKeyEncryptionKeyResponse(epoch=epoch)

    def SubmitShare(  # noqa: N802, D102
        self,
        request: security_domain_pb2.SubmitShareRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.SubmitShareResponse:
        if len(request.submission) > SUBMISSION_BYTES_MAX:
            raise InvalidField("the submission is too large", field="submission")
        ceremony = self._ceremonies.submit_share(request.attempt_id, request.submission, current_access())
        return security_domain_pb2.SubmitShareResponse(ceremony=self._message(ceremony))

    def UploadRestoreBlob(  # noqa: N802, D102
        self,
        request: security_domain_pb2.UploadRestoreBlobRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.UploadRestoreBlobResponse:
        if len(request.restore_blob) > DOCUMENT_BYTES_MAX:
            raise InvalidField("the restore blob is too large", field="restore_blob")
        blob = request.restore_blob
        ceremony = self._ceremonies.upload_restore_blob(request.attempt_id, blob, current_access())
        return security_domain_pb2.UploadRestoreBlobResponse(ceremony=self._message(ceremony))

    def GetCeremony(  # noqa: N802, D102
        self,
        request: security_domain_pb2.GetCeremonyRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.GetCeremonyResponse:
        ceremony = self._ceremonies.current()
        return security_domain_pb2.GetCeremonyResponse(ceremony=self._message(ceremony) if ceremony else None)

    def CancelCeremony(  # noqa: N802, D102
        self,
        request: security_domain_pb2.CancelCeremonyRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> security_domain_pb2.CancelCeremonyResponse:
        self._ceremonies.cancel(request.attempt_id)
        return security_domain_pb2.CancelCeremonyResponse()

    def _message(self, ceremony: Ceremony) -> security_domain_pb2.Ceremony:
        message = security_domain_pb2.Ceremony(
            attempt_id=ceremony.attempt_id,
            purpose=security_domain_pb2.CeremonyPurpose.ValueType(ceremony.purpose),
            exchange_public_key=ceremony.exchange_public_key,
            partition_index=self._partition.settings.index,
            expires=convert.timestamp(ceremony.expires_at_ms) if ceremony.expires_at_ms else None,
            evidence=ceremony.evidence,
            security_domain_file=ceremony.file,
            accepted=ceremony.accepted,
            required=ceremony.required,
            accepted_officers=ceremony.accepted_officers,
            complete=ceremony.complete,
            azure_security_domain_file=ceremony.azure_file,
            transfer_key=ceremony.transfer_key,
            new_officers=ceremony.new_officers,
            new_required=ceremony.new_required,
            new_file=ceremony.new_file,
            new_pool=ceremony.new_pool,
        )
        if ceremony.file:
            domain = container.parse(ceremony.file)
            message.pool_id, message.generation = domain.pool_id, domain.generation
        return message


def _bounded(certificates: object) -> list[bytes]:
    found = [bytes(certificate) for certificate in certificates]  # type: ignore[attr-defined]
    if any(len(certificate) > CERTIFICATE_BYTES_MAX for certificate in found):
        raise InvalidField("a certificate is too large", field="officer_certificates_der")
    return found
