"""AuditService: the log of the partition that answers, for administrators (G7)."""

from __future__ import annotations

import re

import grpc

from hsm_pool import limits
from hsm_pool.audit import export, query
from hsm_pool.audit.query import Filter
from hsm_pool.audit.tree import Forgotten, leaf_hash
from hsm_pool.errors import AuditRecordNotFound, InvalidField
from hsm_pool.partition.partition import Partition
from mhsm.audit.v1 import audit_pb2, audit_pb2_grpc

_TEXT = re.compile(r"[ -~]{0,200}")
_PAGE_RECORDS = 100


class AuditService(audit_pb2_grpc.AuditServiceServicer):
    """Reads; nothing here changes the log."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._trail = partition.audit

    def QueryRecords(  # noqa: N802, D102
        self,
        request: audit_pb2.QueryRecordsRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> audit_pb2.QueryRecordsResponse:
        for field in ("operation_name", "identity", "result_type", "key_name"):
            if not _TEXT.fullmatch(getattr(request, field)):
                raise InvalidField("a filter has at most 200 printable characters", field=field)
        if request.page_size > limits.AUDIT_PAGE_RECORDS_MAX:
            raise InvalidField(f"page_size is 1-{limits.AUDIT_PAGE_RECORDS_MAX}", field="page_size")
        log = self._trail.log
        wanted = Filter(
            _instant(request, "from_time"),
            _instant(request, "until_time"),
            request.operation_name,
            request.identity,
            request.result_type,
            request.key_name,
        )
        size = request.page_size or _PAGE_RECORDS
        found = query.page(log.directory, _start(request), log.size, size, wanted)
        return audit_pb2.QueryRecordsResponse(
            records=[
                audit_pb2.AuditRecord(index=index, json=record.decode(errors="replace"))
                for index, record in found.records
            ],
            next_page_token=str(found.next_index) if found.more else "",
            next_index=found.next_index,
        )

    def GetCheckpoint(  # noqa: N802, D102
        self,
        request: audit_pb2.GetCheckpointRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> audit_pb2.GetCheckpointResponse:
        trail = self._trail
        newest, signers = trail.history.newest_and_signers()
        return audit_pb2.GetCheckpointResponse(
            checkpoint=newest.text if newest else "",
            size=trail.log.size,
            lost_records=trail.log.lost,
            failure=trail.failure(),
            first_index=query.first_index(trail.log.directory),
            noted_checkpoints=self._partition.noted_checkpoints(),
            signers=[signer.message() for signer in signers],
        )

    def GetInclusionProof(  # noqa: N802, D102
        self,
        request: audit_pb2.GetInclusionProofRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> audit_pb2.GetInclusionProofResponse:
        size = self._size(request.size)
        if request.index >= size:
            raise AuditRecordNotFound("the tree of this size has no such record")
        log = self._trail.log
        try:
            proof = log.inclusion_proof(request.index, size)
            record = next(query.records_from(log.directory, request.index), None)
            if record is None or record[0] != request.index:
                raise Forgotten
            root = log.root_of(size)
        except Forgotten:
            raise AuditRecordNotFound("the record is not kept any more") from None
        return audit_pb2.GetInclusionProofResponse(
            leaf_hash=leaf_hash(record[1]), size=size, root=root, proof=proof
        )

    def GetConsistencyProof(  # noqa: N802, D102
        self,
        request: audit_pb2.GetConsistencyProofRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> audit_pb2.GetConsistencyProofResponse:
        size = self._size(request.size)
        if request.old_size > size:
            raise InvalidField("old_size is at most size", field="old_size")
        log = self._trail.log
        try:
            proof, root = log.consistency_proof(request.old_size, size), log.root_of(size)
        except Forgotten:
            raise AuditRecordNotFound("records of that size are not kept any more") from None
        return audit_pb2.GetConsistencyProofResponse(size=size, root=root, proof=proof)

    def ExportRecords(  # noqa: N802, D102
        self,
        request: audit_pb2.ExportRecordsRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> audit_pb2.ExportRecordsResponse:
        directory = self._trail.log.directory
        match request.content:
            case audit_pb2.EXPORT_CONTENT_PEERS:
                found = export.peers_page(directory, request.page_token)
            case audit_pb2.EXPORT_CONTENT_LOG:
                found = export.log_page(directory, request.page_token)
            case _:
                raise InvalidField("content is PEERS or LOG", field="content")
        return audit_pb2.ExportRecordsResponse(
            file_name=found.file_name,
            content=found.content,
            next_page_token=found.next_token,
            bytes_left=found.bytes_left,
        )

    def _size(self, size: int) -> int:
        """Return a tree size; 0 stands for the newest checkpoint's."""
        if size > self._trail.log.size:
            raise InvalidField("the log is not that large", field="size")
        newest = self._trail.history.newest
        return size or (newest.checkpoint.size if newest else 0)


def _instant(request: audit_pb2.QueryRecordsRequest, field: str) -> str:
    text: str = getattr(request, field)
    try:
        return query.instant(text) if text else ""
    except ValueError:
        raise InvalidField("a time is ISO 8601 in UTC, such as 2026-01-31T12:00:00Z", field=field) from None


def _start(request: audit_pb2.QueryRecordsRequest) -> int:
    if not request.page_token:
        return request.start_index
    if not (request.page_token.isascii() and request.page_token.isdigit() and len(request.page_token) < 20):
        raise InvalidField("the page token is not valid", field="page_token")
    return int(request.page_token)
