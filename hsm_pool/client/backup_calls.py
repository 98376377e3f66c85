"""The calls of BackupService and of single keys' backups."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from hsm_pool.client.calls import Call, Kind
from hsm_pool.client.messages import message
from mhsm.backup.v1 import backup_pb2, backup_pb2_grpc
from mhsm.keys.v1 import keys_pb2, keys_pb2_grpc

T = TypeVar("T")


def _backup(method: str, request: Any, kind: Kind, answer: Callable[[Any], T]) -> Call[T]:
    return Call(backup_pb2_grpc.BackupServiceStub, method, request, kind, answer)


def _restore(method: str, request: Any, kind: Kind = "ceremony") -> Call[backup_pb2.Restore]:
    return _backup(method, request, kind, lambda response: response.restore)


def start_backup(backup_id: str) -> Call[backup_pb2.StartBackupResponse]:
    """StartBackup."""
    request = message(backup_pb2.StartBackupRequest, backup_id=backup_id)
    return _backup("StartBackup", request, "ceremony", lambda response: response)


def read_backup_part(backup_id: str, index: int) -> Call[bytes]:
    """ReadBackupPart."""
    request = message(backup_pb2.ReadBackupPartRequest, backup_id=backup_id, index=index)
    return _backup("ReadBackupPart", request, "ceremony", lambda response: response.content)


def finish_backup(backup_id: str) -> Call[bytes]:
    """FinishBackup."""
    request = message(backup_pb2.FinishBackupRequest, backup_id=backup_id)
    return _backup("FinishBackup", request, "ceremony", lambda response: response.manifest)


def check_restore(manifest: bytes) -> Call[backup_pb2.CheckRestoreResponse]:
    """CheckRestore."""
    request = message(backup_pb2.CheckRestoreRequest, manifest=manifest)
    return _backup("CheckRestore", request, "read", lambda response: response)


def start_restore(manifest: bytes, request_id: str | None = None) -> Call[backup_pb2.Restore]:
    """StartRestore."""
    request = message(
        backup_pb2.StartRestoreRequest, manifest=manifest, request_id=request_id or str(uuid.uuid4())
    )
    return _restore("StartRestore", request, "mutation")


def stage_restore_part(restore_id: str, index: int, content: bytes) -> Call[backup_pb2.Restore]:
    """StageRestorePart; a repeat does no harm."""
    request = message(backup_pb2.StageRestorePartRequest, restore_id=restore_id, index=index, content=content)
    return _restore("StageRestorePart", request)


def commit_restore(restore_id: str) -> Call[backup_pb2.Restore]:
    """CommitRestore; a repeat does no harm."""
    return _restore(
        "CommitRestore", message(backup_pb2.CommitRestoreRequest, restore_id=restore_id), "mutation"
    )


def cancel_restore(restore_id: str) -> Call[backup_pb2.Restore]:
    """CancelRestore; a repeat does no harm."""
    return _restore(
        "CancelRestore", message(backup_pb2.CancelRestoreRequest, restore_id=restore_id), "mutation"
    )


def get_restore() -> Call[backup_pb2.Restore | None]:
    """GetRestore."""
    return _backup(
        "GetRestore",
        backup_pb2.GetRestoreRequest(),
        "read",
        lambda response: response.restore if response.HasField("restore") else None,
    )


def restore_key_from_part(
    manifest: bytes, index: int, content: bytes, name: str, request_id: str
) -> Call[keys_pb2.Key | None]:
    """RestoreKeyFromPart."""
    request = message(
        backup_pb2.RestoreKeyFromPartRequest,
        manifest=manifest,
        index=index,
        content=content,
        name=name,
        request_id=request_id,
    )
    return _backup(
        "RestoreKeyFromPart",
        request,
        "mutation",
        lambda response: response.key if response.HasField("key") else None,
    )


def backup_key(name: str) -> Call[bytes]:
    """BackupKey."""
    request = message(keys_pb2.BackupKeyRequest, name=name)
    stub = keys_pb2_grpc.KeyServiceStub
    return Call(stub, "BackupKey", request, "read", lambda response: response.backup)


def restore_key(backup: bytes, request_id: str | None = None) -> Call[keys_pb2.Key]:
    """RestoreKey."""
    request = message(keys_pb2.RestoreKeyRequest, backup=backup, request_id=request_id or str(uuid.uuid4()))
    stub = keys_pb2_grpc.KeyServiceStub
    return Call(stub, "RestoreKey", request, "mutation", lambda response: response.key)
