"""The calls of AuditService, and the export of all logs of a pool."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hsm_pool.audit.files import PEERS_AFTER
from hsm_pool.client.calls import Call
from hsm_pool.client.connection import Connection
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from mhsm.audit.v1 import audit_pb2, audit_pb2_grpc

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Takes octets read, and octets still to be read from this partition."""

EXPORT_FILE = "export.json"
ROOT_FILE = "owner-root.crt"
_ANCHOR_SECONDS = 3.0


def _audit(method: str, request: Any) -> Call[Any]:
    return Call(audit_pb2_grpc.AuditServiceStub, method, request, "ceremony", lambda response: response)


def query_records(request: audit_pb2.QueryRecordsRequest) -> Call[audit_pb2.QueryRecordsResponse]:
    """QueryRecords."""
    return _audit("QueryRecords", request)


def get_checkpoint() -> Call[audit_pb2.GetCheckpointResponse]:
    """GetCheckpoint."""
    return _audit("GetCheckpoint", audit_pb2.GetCheckpointRequest())


def get_inclusion_proof(index: int, size: int = 0) -> Call[audit_pb2.GetInclusionProofResponse]:
    """GetInclusionProof."""
    return _audit("GetInclusionProof", audit_pb2.GetInclusionProofRequest(index=index, size=size))


def get_consistency_proof(old_size: int, size: int = 0) -> Call[audit_pb2.GetConsistencyProofResponse]:
    """GetConsistencyProof."""
    request = audit_pb2.GetConsistencyProofRequest(old_size=old_size, size=size)
    return _audit("GetConsistencyProof", request)


def export_records(
    content: audit_pb2.ExportContent.ValueType, page_token: str
) -> Call[audit_pb2.ExportRecordsResponse]:
    """ExportRecords."""
    return _audit("ExportRecords", audit_pb2.ExportRecordsRequest(content=content, page_token=page_token))


def newest_checkpoints(connection: Connection) -> list[str]:
    """Return the newest checkpoint of every partition that answers: anchors of the audit logs (G7)."""
    found = []
    with Pool(connection, "administrator", timeout_seconds=_ANCHOR_SECONDS) as pool:
        for entry in connection.partitions:
            with contextlib.suppress(MHSMError):
                found.append(pool.call(get_checkpoint(), entry.index).checkpoint)
    return [text for text in found if text]


def pool_notes(pool: Pool, partitions: list[int]) -> list[str]:
    """Return the checkpoints that the pool's chain has taken note of, as each partition knows them."""
    found: dict[str, None] = {}
    for partition in partitions:
        found.update(dict.fromkeys(pool.call(get_checkpoint(), partition).noted_checkpoints))
    return list(found)


def partition_directory(export: Path, partition: int) -> Path:
    """Return where an export keeps the log of a partition."""
    return export / f"partition-{partition}"


def export_pool(pool: Pool, output: Path, root_file: Path | None, progress: Progress) -> list[int]:
    """Write the logs of all partitions that answer into a new directory; return these partitions.

    What the partitions know of each other is read first: a checkpoint that one of them has
    witnessed is then never ahead of the log that is read. It is read again at last: a cosignature
    in a log is then never ahead of what its witness knows.

    Args:
        pool: As administrator.
        output: Must not exist; it appears whole or not at all.
        root_file: Root certificate of the pool's owner, if it is at hand.
        progress: Told how far it is.

    Raises:
        MHSMError: A partition that began to answer stopped to.
        OSError: The directory cannot be written.
    """
    building = output.with_name(f".{output.name}.new-{secrets.token_hex(4)}")
    building.mkdir(mode=0o700)
    try:
        partitions = [entry.index for entry in pool.connection.partitions]
        noted = pool_notes(pool, partitions)
        for content, renamed in (
            (audit_pb2.EXPORT_CONTENT_PEERS, ""),
            (audit_pb2.EXPORT_CONTENT_LOG, ""),
            (audit_pb2.EXPORT_CONTENT_PEERS, PEERS_AFTER),
        ):
            for partition in partitions:
                directory = partition_directory(building, partition)
                _export(pool, partition, content, directory, renamed, progress)
        document = {
            "format": 1,
            "pool_id": pool.connection.pool_id,
            "audit_checkpoints": noted,
        }
        (building / EXPORT_FILE).write_text(json.dumps(document) + "\n")
        if root_file and root_file.is_file():
            shutil.copyfile(root_file, building / ROOT_FILE)
        building.rename(output)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return partitions


def _export(
    pool: Pool,
    partition: int,
    content: audit_pb2.ExportContent.ValueType,
    directory: Path,
    renamed: str,
    progress: Progress,
) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    token, done = "", 0
    while True:
        page = pool.call(export_records(content, token), partition)
        if page.file_name:
            # The name comes from the pool: only its last part is used.
            name = renamed or Path(page.file_name).name
            descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(page.content)
        done += len(page.content)
        progress(done, page.bytes_left)
        token = page.next_page_token
        if not token:
            return
