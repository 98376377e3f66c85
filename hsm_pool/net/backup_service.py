"""BackupService: backups and restores of a whole pool."""

from __future__ import annotations

import re

import grpc

from hsm_pool.core import roles
from hsm_pool.core.roles import key_scope
from hsm_pool.errors import InvalidField
from hsm_pool.limits import BACKUP_MANIFEST_BYTES_MAX, BACKUP_PART_BYTES_MAX
from hsm_pool.net import convert
from hsm_pool.net.calls import deadline
from hsm_pool.net.interceptors import current_access
from hsm_pool.net.mutations import reply_encoder, request_digest, request_key
from hsm_pool.partition.backups import Backups, RestoreStatus
from hsm_pool.partition.partition import Partition
from hsm_pool.store.committer import Mutation
from mhsm.backup.v1 import backup_pb2, backup_pb2_grpc
from mhsm.keys.v1 import keys_pb2

_ID = re.compile(r"[0-9a-f]{32}")
_STAGE_SECONDS_MAX = 60.0


class BackupService(backup_pb2_grpc.BackupServiceServicer):
    """Backups and restores."""

    def __init__(self, partition: Partition, backups: Backups) -> None:
        self._partition = partition
        self._backups = backups

    def StartBackup(  # noqa: N802, D102
        self,
        request: backup_pb2.StartBackupRequest,
        context: grpc.ServicerContext,
    ) -> backup_pb2.StartBackupResponse:
        started = self._backups.start(
            _id(request.backup_id, "backup_id"), current_access(), deadline(context)
        )
        return backup_pb2.StartBackupResponse(
            backup_id=started.backup_id,
            parts=started.parts,
            keys=started.keys,
            partition_index=self._partition.settings.index,
        )

    def ReadBackupPart(  # noqa: N802, D102
        self,
        request: backup_pb2.ReadBackupPartRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> backup_pb2.ReadBackupPartResponse:
        content = self._backups.read_part(_id(request.backup_id, "backup_id"), request.index)
        return backup_pb2.ReadBackupPartResponse(content=content)

    def FinishBackup(  # noqa: N802, D102
        self,
        request: backup_pb2.FinishBackupRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> backup_pb2.FinishBackupResponse:
        manifest = self._backups.finish(_id(request.backup_id, "backup_id"))
        return backup_pb2.FinishBackupResponse(manifest=manifest)

    def CheckRestore(  # noqa: N802, D102
        self, request: backup_pb2.CheckRestoreRequest, context: grpc.ServicerContext
    ) -> backup_pb2.CheckRestoreResponse:
        keys, replaced = self._backups.check(_manifest(request.manifest), current_access(), deadline(context))
        return backup_pb2.CheckRestoreResponse(keys=keys, keys_replaced=replaced)

    def StartRestore(  # noqa: N802, D102
        self, request: backup_pb2.StartRestoreRequest, context: grpc.ServicerContext
    ) -> backup_pb2.StartRestoreResponse:
        manifest = _manifest(request.manifest)
        key, until = request_key(request), deadline(context)
        status = self._backups.start_restore(manifest, current_access(), key, until)
        return backup_pb2.StartRestoreResponse(restore=_message(status))

    def StageRestorePart(  # noqa: N802, D102
        self, request: backup_pb2.StageRestorePartRequest, context: grpc.ServicerContext
    ) -> backup_pb2.StageRestorePartResponse:
        until = deadline(context, _STAGE_SECONDS_MAX)
        restore_id = _id(request.restore_id, "restore_id")
        content = _part(request.content)
        status = self._backups.stage(restore_id, request.index, content, current_access(), until)
        return backup_pb2.StageRestorePartResponse(restore=_message(status))

    def CommitRestore(  # noqa: N802, D102
        self, request: backup_pb2.CommitRestoreRequest, context: grpc.ServicerContext
    ) -> backup_pb2.CommitRestoreResponse:
        status = self._backups.commit(
            _id(request.restore_id, "restore_id"), current_access(), deadline(context)
        )
        return backup_pb2.CommitRestoreResponse(restore=_message(status))

    def CancelRestore(  # noqa: N802, D102
        self, request: backup_pb2.CancelRestoreRequest, context: grpc.ServicerContext
    ) -> backup_pb2.CancelRestoreResponse:
        status = self._backups.cancel(
            _id(request.restore_id, "restore_id"), current_access(), deadline(context)
        )
        return backup_pb2.CancelRestoreResponse(restore=_message(status))

    def GetRestore(  # noqa: N802, D102
        self,
        request: backup_pb2.GetRestoreRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> backup_pb2.GetRestoreResponse:
        status = self._backups.status(current_access(), deadline(context))
        return backup_pb2.GetRestoreResponse(restore=_message(status) if status else None)

    def RestoreKeyFromPart(  # noqa: N802, D102
        self, request: backup_pb2.RestoreKeyFromPartRequest, context: grpc.ServicerContext
    ) -> backup_pb2.RestoreKeyFromPartResponse:
        until, serving = deadline(context), self._partition.serving()
        key_id, _ = convert.parse_name(request.name, version_allowed=False)
        manifest, key = _manifest(request.manifest), request_key(request)
        access = current_access(key_scope(key_id))
        serving.replica.consult(lambda view: roles.check(view, access), until)
        command = self._backups.find_key(manifest, request.index, _part(request.content), key_id)
        if command is None:
            return backup_pb2.RestoreKeyFromPartResponse()
        encode = reply_encoder(keys_pb2.RestoreKeyResponse)
        mutation = Mutation(command, access, encode, key, request_digest(request), serving.now_ms())
        reply = keys_pb2.RestoreKeyResponse.FromString(serving.committer.submit(mutation, until))
        return backup_pb2.RestoreKeyFromPartResponse(key=reply.key)


def _id(value: str, name: str) -> str:
    if not _ID.fullmatch(value):
        raise InvalidField(f"{name} has 32 hexadecimal digits", field=name)
    return value


def _manifest(value: bytes) -> bytes:
    if not value or len(value) > BACKUP_MANIFEST_BYTES_MAX:
        raise InvalidField("the manifest is missing or too large", field="manifest")
    return value


def _part(value: bytes) -> bytes:
    if not value or len(value) > BACKUP_PART_BYTES_MAX:
        raise InvalidField("the part is missing or too large", field="content")
    return value


def _message(status: RestoreStatus) -> backup_pb2.Restore:
    return backup_pb2.Restore(
        restore_id=status.record.restore_id,
        phase=backup_pb2.RestorePhase.ValueType(status.record.phase),
        parts=status.record.parts,
        staged_parts=sorted(status.record.staged_parts),
        records_left=status.records_left,
        backup_id=status.backup_id,
    )
