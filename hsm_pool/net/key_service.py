"""KeyService: requests to commands of the core, records to answers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from hsm_pool.audit.record import note
from hsm_pool.core import lifecycle, restore, roles, secure_wrap
from hsm_pool.core.commands import (
    DeleteKey,
    PurgeDeletedKey,
    RecoverDeletedKey,
    UpdateKeyVersion,
    UpdateRotationPolicy,
)
from hsm_pool.core.model import (
    KeyOperation,
    KeyOrigin,
    KeyRecord,
    KeyType,
    KeyVersionRecord,
    Retention,
    key_name,
)
from hsm_pool.core.roles import key_scope
from hsm_pool.core.state import State, View
from hsm_pool.crypto import algorithms
from hsm_pool.enclave import key_attestation
from hsm_pool.errors import InvalidField
from hsm_pool.net import convert, mutations
from hsm_pool.net.admission import CallAdmission, CallKind
from hsm_pool.net.calls import deadline
from hsm_pool.net.interceptors import current_access, current_caller
from hsm_pool.net.key_creation import create, imported_material, new_version
from hsm_pool.net.key_release import KeyReleases
from hsm_pool.partition import due_work
from hsm_pool.partition.backups import Backups
from hsm_pool.partition.partition import Partition
from hsm_pool.store.replica import boot_time
from hsm_pool.tokens.attestation import AttestationVerifier
from mhsm.keys.v1 import keys_pb2, keys_pb2_grpc

R = TypeVar("R", bound=Message)

_UPDATED = ("enabled", "not_before_ms", "expires_ms", "key_operations", "tags", "release_policy")
"""What an update may change; the audit log says which of it was asked for, and no value."""
_MADE_IN_THE_POOL = frozenset({KeyOperation.IMPORT, *secure_wrap.OPERATIONS})
"""Whoever knew such a key from elsewhere could open what is only for the pool or for an environment."""


class KeyService(keys_pb2_grpc.KeyServiceServicer):
    """Life cycle of keys."""

    def __init__(
        self,
        partition: Partition,
        backups: Backups,
        admission: CallAdmission,
        attestations: AttestationVerifier,
    ) -> None:
        self._partition = partition
        self._backups = backups
        self._admission = admission
        self._releases = KeyReleases(partition, attestations)

    def CreateKey(  # noqa: N802, D102
        self, request: keys_pb2.CreateKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.CreateKeyResponse:
        until = deadline(context)
        serving = self._partition.serving()
        new = new_version(request, must_not_exist=request.must_not_exist)
        key_type, curve = convert.key_type(request.key_type), convert.curve(request.curve)
        algorithms.check_key_size(key_type, curve, request.size_bits)
        algorithms.check_public_exponent(key_type, request.public_exponent)
        operations = new.key_operations or algorithms.default_key_operations(key_type, request.size_bits)
        algorithms.check_key_operations(key_type, request.size_bits, operations)
        access = current_access(key_scope(new.key_id))
        answered = mutations.answered(serving, access, request, keys_pb2.CreateKeyResponse, until)
        if answered is not None:
            return answered
        with self._place(key_type, until):
            material = self._partition.key_generator.generate(
                key_type,
                curve,
                request.size_bits,
                timeout_seconds=max(0.1, until - boot_time()),
                public_exponent=request.public_exponent,
            )
        made = KeyOrigin.GENERATED
        return create(serving, access, request, new, material, keys_pb2.CreateKeyResponse, until, made)

    def _place(self, key_type: KeyType, until: float) -> AbstractContextManager[None]:
        """Hold a place at the generator of RSA keys, which takes long; other keys need none."""
        if key_type is not KeyType.RSA:
            return nullcontext()
        return self._admission.call(current_caller().uri, CallKind.RSA_KEY, until)

    def ImportKey(  # noqa: N802, D102
        self, request: keys_pb2.ImportKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.ImportKeyResponse:
        until = deadline(context)
        serving = self._partition.serving()
        new = new_version(request, must_not_exist=False)
        access = current_access(key_scope(new.key_id))
        answered = mutations.answered(serving, access, request, keys_pb2.ImportKeyResponse, until)
        if answered is not None:
            return answered
        material = imported_material(serving, request, until)
        kind = material.key_type, material.size_bits
        operations = new.key_operations or algorithms.default_key_operations(*kind)
        algorithms.check_key_operations(*kind, operations)
        if not _MADE_IN_THE_POOL.isdisjoint(operations):
            raise InvalidField(
                "a key that imports or wraps securely is made in the pool", field="key_operations"
            )
        came = KeyOrigin.IMPORTED
        return create(serving, access, request, new, material, keys_pb2.ImportKeyResponse, until, came)

    def GetKey(  # noqa: N802, D102
        self, request: keys_pb2.GetKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.GetKeyResponse:
        key_id, version_id = convert.parse_name(request.name)

        def decide(view: View) -> keys_pb2.Key:
            key = lifecycle.active_key(view, key_id)
            version = lifecycle.version_of(view, key, version_id)
            return convert.key_message(version, lifecycle.pool_record(view).retention)

        decision = roles.permitted(current_access(key_scope(key_id)), decide)
        consulted = self._partition.serving().replica.consult(decision, deadline(context))
        return keys_pb2.GetKeyResponse(key=consulted.value)

    def ListKeys(  # noqa: N802, D102
        self, request: keys_pb2.ListKeysRequest, context: grpc.ServicerContext
    ) -> keys_pb2.ListKeysResponse:
        keys, token = self._page(request.page_size, request.page_token, deadline(context), deleted=False)
        response = keys_pb2.ListKeysResponse(next_page_token=token)
        response.keys.extend(convert.key_message(version, retention) for _, version, retention in keys)
        return response

    def ListDeletedKeys(  # noqa: N802, D102
        self, request: keys_pb2.ListDeletedKeysRequest, context: grpc.ServicerContext
    ) -> keys_pb2.ListDeletedKeysResponse:
        keys, token = self._page(request.page_size, request.page_token, deadline(context), deleted=True)
        response = keys_pb2.ListDeletedKeysResponse(next_page_token=token)
        response.deleted_keys.extend(convert.deleted_key_message(*found) for found in keys)
        return response

    def ListKeyVersions(  # noqa: N802, D102
        self, request: keys_pb2.ListKeyVersionsRequest, context: grpc.ServicerContext
    ) -> keys_pb2.ListKeyVersionsResponse:
        key_id, _ = convert.parse_name(request.name, version_allowed=False)
        size, after = convert.page_size(request.page_size), _position(request.page_token)

        def decide(view: View) -> tuple[list[keys_pb2.Key], str]:
            key = lifecycle.active_key(view, key_id)
            if after and after not in key.version_ids:
                raise InvalidField("the page token is not valid", field="page_token")
            start = key.version_ids.index(after) + 1 if after else 0
            page = key.version_ids[start : start + size]
            retention = lifecycle.pool_record(view).retention
            messages = [convert.key_message(lifecycle.version_of(view, key, v), retention) for v in page]
            more = start + size < len(key.version_ids)
            return messages, convert.page_token(page[-1]) if more else ""

        decision = roles.permitted(current_access(key_scope(key_id)), decide)
        keys, token = self._partition.serving().replica.consult(decision, deadline(context)).value
        return keys_pb2.ListKeyVersionsResponse(keys=keys, next_page_token=token)

    def UpdateKey(  # noqa: N802, D102
        self, request: keys_pb2.UpdateKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.UpdateKeyResponse:
        key_id, version_id = convert.parse_name(request.name)
        attributes = request.attributes
        convert.refuse_output_only(attributes, exportable_allowed=False)
        operations = convert.key_operations(request.key_operations)
        until, serving = deadline(context), self._partition.serving()
        access = current_access(key_scope(key_id))
        answered = mutations.answered(serving, access, request, keys_pb2.UpdateKeyResponse, until)
        if answered is not None:
            return answered
        if operations:

            def find(view: View) -> KeyVersionRecord:
                return lifecycle.version_of(view, lifecycle.active_key(view, key_id), version_id)

            version = serving.replica.consult(roles.permitted(access, find), until).value
            algorithms.check_key_operations(version.key_type, version.size_bits, operations)
        command = UpdateKeyVersion(
            time_ms=serving.now_ms(),
            key_id=key_id,
            version_id=version_id,
            enabled=attributes.enabled if attributes.HasField("enabled") else None,
            not_before_ms=0 if request.clear_not_before else convert.time_ms(attributes, "not_before"),
            expires_ms=0 if request.clear_expires else convert.time_ms(attributes, "expires"),
            key_operations=operations or None,
            tags=convert.tags(request.tags) if request.replace_tags else None,
            release_policy=convert.release_policy(request),
        )
        note(changed=tuple(name for name in _UPDATED if getattr(command, name) is not None))
        return mutations.commit(serving, access, command, request, keys_pb2.UpdateKeyResponse, until)

    def DeleteKey(  # noqa: N802, D102
        self, request: keys_pb2.DeleteKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.DeleteKeyResponse:
        key_id, _ = convert.parse_name(request.name, version_allowed=False)
        serving = self._partition.serving()
        command = DeleteKey(serving.now_ms(), key_id)
        access = current_access(key_scope(key_id))
        return mutations.commit(
            serving, access, command, request, keys_pb2.DeleteKeyResponse, deadline(context)
        )

    def GetDeletedKey(  # noqa: N802, D102
        self, request: keys_pb2.GetDeletedKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.GetDeletedKeyResponse:
        key_id, _ = convert.parse_name(request.name, version_allowed=False)

        def decide(view: View) -> keys_pb2.DeletedKey:
            key = lifecycle.deleted_key(view, key_id)
            retention = lifecycle.pool_record(view).retention
            return convert.deleted_key_message(key, lifecycle.version_of(view, key), retention)

        decision = roles.permitted(current_access(key_scope(key_id)), decide)
        consulted = self._partition.serving().replica.consult(decision, deadline(context))
        return keys_pb2.GetDeletedKeyResponse(deleted_key=consulted.value)

    def RecoverDeletedKey(  # noqa: N802, D102
        self, request: keys_pb2.RecoverDeletedKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.RecoverDeletedKeyResponse:
        key_id, _ = convert.parse_name(request.name, version_allowed=False)
        serving = self._partition.serving()
        command = RecoverDeletedKey(serving.now_ms(), key_id)
        access = current_access(key_scope(key_id))
        return mutations.commit(
            serving, access, command, request, keys_pb2.RecoverDeletedKeyResponse, deadline(context)
        )

    def PurgeDeletedKey(  # noqa: N802, D102
        self, request: keys_pb2.PurgeDeletedKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.PurgeDeletedKeyResponse:
        key_id, _ = convert.parse_name(request.name, version_allowed=False)
        serving = self._partition.serving()
        # Without a time that a majority agrees on, no date has come.
        command = PurgeDeletedKey(serving.replica.agreed_time_ms() or 0, key_id)
        access = current_access(key_scope(key_id))
        return mutations.commit(
            serving, access, command, request, keys_pb2.PurgeDeletedKeyResponse, deadline(context)
        )

    def RotateKey(  # noqa: N802, D102
        self, request: keys_pb2.RotateKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.RotateKeyResponse:
        key_id, _ = convert.parse_name(request.name, version_allowed=False)
        until, serving = deadline(context), self._partition.serving()
        access = current_access(key_scope(key_id))
        answered = mutations.answered(serving, access, request, keys_pb2.RotateKeyResponse, until)
        if answered is not None:
            return answered

        def find(view: View) -> KeyVersionRecord:
            return lifecycle.rotatable_version(view, key_id)

        newest = serving.replica.consult(roles.permitted(access, find), until).value
        with self._place(newest.key_type, until):
            remaining = max(0.1, until - boot_time())
            command = due_work.rotation(
                serving.keys, self._partition.key_generator, newest, serving.now_ms(), remaining
            )
        note(key_version=command.version_id)
        return mutations.commit(serving, access, command, request, keys_pb2.RotateKeyResponse, until)

    def GetKeyRotationPolicy(  # noqa: N802, D102
        self, request: keys_pb2.GetKeyRotationPolicyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.GetKeyRotationPolicyResponse:
        key_id, _ = convert.parse_name(request.name, version_allowed=False)

        def decide(view: View) -> keys_pb2.KeyRotationPolicy:
            return convert.rotation_policy_message(lifecycle.active_key(view, key_id).rotation_policy)

        decision = roles.permitted(current_access(key_scope(key_id)), decide)
        consulted = self._partition.serving().replica.consult(decision, deadline(context))
        return keys_pb2.GetKeyRotationPolicyResponse(policy=consulted.value)

    def UpdateKeyRotationPolicy(  # noqa: N802, D102
        self, request: keys_pb2.UpdateKeyRotationPolicyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.UpdateKeyRotationPolicyResponse:
        key_id, _ = convert.parse_name(request.name, version_allowed=False)
        policy = convert.rotation_policy(request.policy)
        serving = self._partition.serving()
        command = UpdateRotationPolicy(serving.now_ms(), key_id, policy)
        access = current_access(key_scope(key_id))
        return mutations.commit(
            serving, access, command, request, keys_pb2.UpdateKeyRotationPolicyResponse, deadline(context)
        )

    def ReleaseKey(  # noqa: N802, D102
        self, request: keys_pb2.ReleaseKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.ReleaseKeyResponse:
        return keys_pb2.ReleaseKeyResponse(value=self._releases.release(request, deadline(context)))

    def GetKeyAttestation(  # noqa: N802, D102
        self, request: keys_pb2.GetKeyAttestationRequest, context: grpc.ServicerContext
    ) -> keys_pb2.GetKeyAttestationResponse:
        key_id, version_id = convert.parse_name(request.name)

        def decide(view: View) -> tuple[KeyVersionRecord, Retention]:
            version = lifecycle.version_of(view, lifecycle.active_key(view, key_id), version_id)
            return version, lifecycle.pool_record(view).retention

        decision = roles.permitted(current_access(key_scope(key_id)), decide)
        version, retention = self._partition.serving().replica.consult(decision, deadline(context)).value
        # What is attested of a version never changes, so the signatures need no lease of their own.
        made = key_attestation.attest(version, self._partition.attester)
        return keys_pb2.GetKeyAttestationResponse(
            key=convert.key_message(version, retention),
            attestation=keys_pb2.KeyAttestation(
                certificates_pem=made.certificates_pem,
                private_key_attestation=made.private_key,
                public_key_attestation=made.public_key,
                version=made.version,
            ),
        )

    def BackupKey(  # noqa: N802, D102
        self, request: keys_pb2.BackupKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.BackupKeyResponse:
        key_id, _ = convert.parse_name(request.name, version_allowed=False)
        access = current_access(key_scope(key_id))
        return keys_pb2.BackupKeyResponse(backup=self._backups.backup_key(key_id, access, deadline(context)))

    def RestoreKey(  # noqa: N802, D102
        self, request: keys_pb2.RestoreKeyRequest, context: grpc.ServicerContext
    ) -> keys_pb2.RestoreKeyResponse:
        until, serving = deadline(context), self._partition.serving()
        access = current_access()
        answered = mutations.answered(serving, access, request, keys_pb2.RestoreKeyResponse, until)
        if answered is not None:
            return answered
        command = self._backups.open_key_backup(request.backup)
        note(key_name=command.key.key_id)
        return mutations.commit(serving, access, command, request, keys_pb2.RestoreKeyResponse, until)

    # -- shared --------------------------------------------------------------------------

    def _page(
        self, requested_size: int, token: str, until: float, *, deleted: bool
    ) -> tuple[list[tuple[KeyRecord, KeyVersionRecord, Retention]], str]:
        size, after = convert.page_size(requested_size), _position(token)

        def decide(state: State) -> tuple[list[tuple[KeyRecord, KeyVersionRecord, Retention]], str]:
            restore.refuse_while_restoring(state)
            page: list[tuple[KeyRecord, KeyVersionRecord, Retention]] = []
            retention, position = state.pool().retention, after
            while ids := state.key_ids_after(position, 100):
                for position in ids:
                    key = state.get(key_name(position))
                    if not isinstance(key, KeyRecord) or key.deleted != deleted:
                        continue
                    if len(page) == size:
                        return page, convert.page_token(page[-1][0].key_id)
                    page.append((key, lifecycle.version_of(state, key), retention))
            return page, ""

        return self._partition.serving().replica.consult_all(roles.permitted(current_access(), decide), until)


def _position(token: str) -> str:
    """Return the key id or version id, which has the same form, that a page token stands for."""
    if not token:
        return ""
    try:
        return convert.key_id(convert.page_position(token))
    except InvalidField:
        raise InvalidField("the page token is not valid", field="page_token") from None
