"""The asyncio client of a pool: same methods as :class:`hsm_pool.client.pool.Pool`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hsm_pool.client import backup_calls, calls, channels, role_calls
from hsm_pool.client.calls import ATTEMPT_SECONDS, CALL_SECONDS, Call, Made
from hsm_pool.client.connection import Connection, load_connection
from hsm_pool.client.errors import CallIndefinite, PoolClosed, PoolUnreachable, from_rpc
from hsm_pool.client.fields import (
    CreateKeyFields,
    ImportKeyFields,
    PoolOptions,
    RoleAssignmentFields,
    RoleDefinitionFields,
    RotationPolicyFields,
    UpdateKeyFields,
)
from hsm_pool.client.retry import Attempts, RetryCounts, Rotation
from hsm_pool.errors import MHSMError
from mhsm.crypto.v1 import crypto_pb2, crypto_pb2_grpc
from mhsm.evidence.v1 import evidence_pb2
from mhsm.keys.v1 import keys_pb2
from mhsm.pool.v1 import pool_pb2
from mhsm.roles.v1 import roles_pb2
from mhsm.security_domain.v1 import security_domain_pb2

T = TypeVar("T")
_HEALTH_SECONDS = 0.3


class AsyncPool:
    """A pool as one machine. Use within one event loop; arguments as for Pool."""

    def __init__(
        self,
        connection: Connection,
        client: str = "application",
        *,
        token: str | None = None,
        partition: int | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        self.connection = connection
        self._pinned = partition
        self._timeout_seconds = timeout_seconds
        self._channels = channels.open_channels(connection, client, token, grpc.aio.secure_channel)
        self._rotation = Rotation(len(self._channels))
        self.retry_counts = RetryCounts()
        """What this client met so far."""
        self._closed = False

    @staticmethod
    def connect(path: Path | str, client: str = "application", **options: Unpack[PoolOptions]) -> AsyncPool:
        """Connect by a connection file or a data directory.

        Raises:
            NoConnection: It is not there: the pool does not run.
        """
        return AsyncPool(load_connection(Path(path)), client, **options)

    async def close(self) -> None:
        """Close all channels: later calls are PoolClosed, mutations under way end as CallIndefinite."""
        self._closed = True
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def create_key(self, key_id: str, **fields: Unpack[CreateKeyFields]) -> keys_pb2.Key:
        """Create a key or a version."""
        return await self._run(calls.create_key(key_id, **fields))

    async def import_key(self, key_id: str, **fields: Unpack[ImportKeyFields]) -> keys_pb2.Key:
        """Import key material."""
        return await self._run(calls.import_key(key_id, **fields))

    async def get_key(self, name: str) -> keys_pb2.Key:
        """Read a version, or the newest of a key."""
        return await self._run(calls.get_key(name))

    async def list_keys(self, page_size: int = 0) -> AsyncIterator[keys_pb2.Key]:
        """Yield the newest version of each key, by name."""
        token = ""
        while True:
            page = await self._run(calls.list_keys(page_size, token))
            for key in page.keys:
                yield key
            token = page.next_page_token
            if not token:
                return

    async def list_key_versions(self, name: str, page_size: int = 0) -> AsyncIterator[keys_pb2.Key]:
        """Yield all versions of a key, oldest first."""
        token = ""
        while True:
            page = await self._run(calls.list_key_versions(name, page_size, token))
            for key in page.keys:
                yield key
            token = page.next_page_token
            if not token:
                return

    async def list_deleted_keys(self, page_size: int = 0) -> AsyncIterator[keys_pb2.DeletedKey]:
        """Yield soft-deleted keys, by name."""
        token = ""
        while True:
            page = await self._run(calls.list_deleted_keys(page_size, token))
            for key in page.deleted_keys:
                yield key
            token = page.next_page_token
            if not token:
                return

    async def update_key(self, name: str, **fields: Unpack[UpdateKeyFields]) -> keys_pb2.Key:
        """Change a version."""
        return await self._run(calls.update_key(name, **fields))

    async def delete_key(self, name: str, request_id: str | None = None) -> keys_pb2.DeletedKey:
        """Soft-delete a key."""
        return await self._run(calls.delete_key(name, request_id))

    async def get_deleted_key(self, name: str) -> keys_pb2.DeletedKey:
        """Read a soft-deleted key."""
        return await self._run(calls.get_deleted_key(name))

    async def recover_deleted_key(self, name: str, request_id: str | None = None) -> keys_pb2.Key:
        """Recover a soft-deleted key."""
        return await self._run(calls.recover_deleted_key(name, request_id))

    async def purge_deleted_key(self, name: str, request_id: str | None = None) -> None:
        """Destroy a soft-deleted key."""
        await self._run(calls.purge_deleted_key(name, request_id))

    async def release_key(
        self, name: str, target_attestation_token: str, encryption_algorithm: str = "", nonce: str = ""
    ) -> str:
        """Release an exportable version to an attested environment; returns a JWS."""
        return await self._run(calls.release_key(name, target_attestation_token, encryption_algorithm, nonce))

    async def get_key_attestation(self, name: str) -> keys_pb2.GetKeyAttestationResponse:
        """Read a version with its attestation, which is not verified here."""
        return await self._run(calls.get_key_attestation(name))

    async def rotate_key(self, name: str, request_id: str | None = None) -> keys_pb2.Key:
        """Make a new version of the same kind; the key must have a rotation policy."""
        return await self._run(calls.rotate_key(name, request_id))

    async def get_key_rotation_policy(self, name: str) -> keys_pb2.KeyRotationPolicy:
        """Read a key's rotation policy; one that says nothing when it has none."""
        return await self._run(calls.get_key_rotation_policy(name))

    async def update_key_rotation_policy(
        self, name: str, **fields: Unpack[RotationPolicyFields]
    ) -> keys_pb2.KeyRotationPolicy:
        """Set a policy."""
        return await self._run(calls.update_key_rotation_policy(name, **fields))

    async def sign(self, name: str, algorithm: str, digest: bytes) -> Made:
        """Sign a digest."""
        return (await self._run(calls.sign_batch(name, algorithm, [digest])))[0]

    async def sign_batch(self, name: str, algorithm: str, digests: Sequence[bytes]) -> list[Made]:
        """Sign digests."""
        return await self._run(calls.sign_batch(name, algorithm, digests))

    async def verify(self, name: str, algorithm: str, digest: bytes, signature: bytes) -> None:
        """Verify a signature; raises SignatureInvalid."""
        await self._run(calls.verify(name, algorithm, digest, signature))

    async def verify_batch(
        self, name: str, algorithm: str, items: Sequence[tuple[bytes, bytes]]
    ) -> list[bool]:
        """Verify (digest, signature) pairs."""
        return await self._run(calls.verify_batch(name, algorithm, items))

    async def encrypt(
        self,
        name: str,
        algorithm: str,
        plaintext: bytes,
        additional_data: bytes = b"",
        initialization_vector: bytes = b"",
    ) -> crypto_pb2.Ciphertext:
        """Encrypt; a vector of 16 bytes may be given for CBC, for other algorithms the pool makes it."""
        return await self._run(
            calls.encrypt(name, algorithm, plaintext, additional_data, initialization_vector)
        )

    async def encrypt_batch(
        self, name: str, algorithm: str, items: Sequence[tuple[bytes, bytes]]
    ) -> list[crypto_pb2.Ciphertext]:
        """Encrypt (plaintext, additional data) pairs."""
        return await self._run(calls.encrypt_batch(name, algorithm, items))

    async def decrypt(self, name: str, algorithm: str, ciphertext: crypto_pb2.Ciphertext) -> bytes:
        """Decrypt."""
        return (await self._run(calls.decrypt_batch(name, algorithm, [ciphertext])))[0]

    async def decrypt_batch(
        self, name: str, algorithm: str, items: Sequence[crypto_pb2.Ciphertext]
    ) -> list[bytes]:
        """Decrypt several."""
        return await self._run(calls.decrypt_batch(name, algorithm, items))

    async def wrap_key(self, name: str, algorithm: str, key: bytes) -> Made:
        """Wrap a key."""
        return (await self._run(calls.wrap_batch(name, algorithm, [key])))[0]

    async def unwrap_key(self, name: str, algorithm: str, wrapped_key: bytes) -> bytes:
        """Unwrap a key."""
        return (await self._run(calls.unwrap_batch(name, algorithm, [wrapped_key])))[0]

    async def wrap_key_batch(self, name: str, algorithm: str, keys: Sequence[bytes]) -> list[Made]:
        """Wrap several keys."""
        return await self._run(calls.wrap_batch(name, algorithm, keys))

    async def unwrap_key_batch(self, name: str, algorithm: str, wrapped_keys: Sequence[bytes]) -> list[bytes]:
        """Unwrap several keys."""
        return await self._run(calls.unwrap_batch(name, algorithm, wrapped_keys))

    async def secure_wrap_key(self, name: str, algorithm: str) -> Made:
        """Make an AES key of 256 bits and return it wrapped; nobody has it in any other form."""
        return await self._run(calls.secure_wrap_key(name, algorithm))

    async def secure_unwrap_key(
        self, name: str, algorithm: str, wrapped_key: bytes, target_attestation_token: str
    ) -> str:
        """Unwrap what secure_wrap_key wrapped, for an attested environment; returns a JWS."""
        return await self._run(
            calls.secure_unwrap_key(name, algorithm, wrapped_key, target_attestation_token)
        )

    async def random_bytes(self, count: int) -> bytes:
        """Return random bytes, 1-128."""
        return await self._run(calls.random_bytes(count))

    async def stream(
        self, requests: Iterable[crypto_pb2.StreamOperationsRequest], partition: int | None = None
    ) -> AsyncIterator[crypto_pb2.StreamOperationsResponse]:
        """Send batches on one stream to one partition and yield the answers, in order."""
        index = partition if partition is not None else self._pinned or 0
        stream = self._stub(crypto_pb2_grpc.CryptoServiceStub, index).StreamOperations(iter(requests))
        try:
            async for response in stream:
                yield response
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        except asyncio.CancelledError:
            if self._ended_by_close():
                raise CallIndefinite("the client was closed; the outcome is not known") from None
            raise
        finally:
            stream.cancel()

    async def create_role_definition(
        self, role_name: str, data_actions: Sequence[str], **fields: Unpack[RoleDefinitionFields]
    ) -> roles_pb2.RoleDefinition:
        """Make a custom role; fields as in :func:`hsm_pool.client.role_calls.create_role_definition`."""
        return await self._run(role_calls.create_role_definition(role_name, data_actions, **fields))

    async def get_role_definition(self, role_definition_id: str) -> roles_pb2.RoleDefinition:
        """Read a role."""
        return await self._run(role_calls.get_role_definition(role_definition_id))

    async def list_role_definitions(self, page_size: int = 0) -> AsyncIterator[roles_pb2.RoleDefinition]:
        """Yield all roles, the built-in ones first."""
        token = ""
        while True:
            page = await self._run(role_calls.list_role_definitions(page_size, token))
            for definition in page.role_definitions:
                yield definition
            token = page.next_page_token
            if not token:
                return

    async def delete_role_definition(
        self, role_definition_id: str, request_id: str | None = None
    ) -> roles_pb2.RoleDefinition:
        """Delete a custom role; its assignments stay and allow nothing."""
        return await self._run(role_calls.delete_role_definition(role_definition_id, request_id))

    async def create_role_assignment(
        self,
        principal_id: str,
        role_definition_id: str,
        scope: str = "/",
        **fields: Unpack[RoleAssignmentFields],
    ) -> roles_pb2.RoleAssignment:
        """Give a role to a principal."""
        return await self._run(
            role_calls.create_role_assignment(principal_id, role_definition_id, scope, **fields)
        )

    async def get_role_assignment(self, name: str, scope: str = "/") -> roles_pb2.RoleAssignment:
        """Read a role assignment."""
        return await self._run(role_calls.get_role_assignment(name, scope))

    async def list_role_assignments(
        self, scope: str = "/", principal_id: str = "", page_size: int = 0
    ) -> AsyncIterator[roles_pb2.RoleAssignment]:
        """Yield the role assignments at a scope, or with "" at all, of one principal or of all."""
        token = ""
        while True:
            page = await self._run(role_calls.list_role_assignments(scope, principal_id, page_size, token))
            for assignment in page.role_assignments:
                yield assignment
            token = page.next_page_token
            if not token:
                return

    async def delete_role_assignment(
        self, name: str, scope: str = "/", request_id: str | None = None
    ) -> roles_pb2.RoleAssignment:
        """Take a role from a principal; no partition uses it afterwards."""
        return await self._run(role_calls.delete_role_assignment(name, scope, request_id))

    async def backup_key(self, name: str) -> bytes:
        """Return a key with all its versions, encrypted to the security domain."""
        return await self._run(backup_calls.backup_key(name))

    async def restore_key(self, backup: bytes, request_id: str | None = None) -> keys_pb2.Key:
        """Restore a backed-up key, which must not exist."""
        return await self._run(backup_calls.restore_key(backup, request_id))

    async def call(self, call: Call[T], partition: int | None = None) -> T:
        """Make any call of :mod:`hsm_pool.client.backup_calls`; at one partition, or wherever it succeeds."""
        if partition is None:
            return await self._run(call)
        return await self._at(call, partition)

    async def partition_status(self, index: int) -> pool_pb2.GetPartitionStatusResponse:
        """Return the status of one partition."""
        return await self._at(calls.partition_status(), index)

    async def evidence(self, index: int, nonce: bytes) -> evidence_pb2.Evidence:
        """Return fresh evidence of one partition for a nonce of 16-64 bytes; it is not verified here."""
        return await self._at(calls.evidence(nonce), index)

    async def download_security_domain(
        self,
        certificates_der: Sequence[bytes],
        required: int,
        request_id: str | None = None,
        partition: int | None = None,
    ) -> security_domain_pb2.Ceremony:
        """Create the security domain; the pool is active when every officer has submitted his share."""
        call = calls.download_security_domain(certificates_der, required, request_id)
        return await self._at(call, partition)

    async def init_recovery(
        self, partition: int | None = None, file: bytes = b""
    ) -> security_domain_pb2.Ceremony:
        """Start to unlock a locked pool, or to recover a lost pool's domain (its file) in a new pool."""
        return await self._at(calls.init_recovery(file), partition)

    async def verify_security_domain(self, partition: int | None = None) -> security_domain_pb2.Ceremony:
        """Start a proof that a quorum of officers can open the security domain."""
        return await self._at(calls.verify_security_domain(), partition)

    async def rotate_shares(
        self, certificates_der: Sequence[bytes], required: int, partition: int | None = None
    ) -> security_domain_pb2.Ceremony:
        """Start to share the secret out among new officers."""
        return await self._at(calls.rotate_shares(certificates_der, required), partition)

    async def new_generation(
        self, certificates_der: Sequence[bytes], required: int, partition: int | None = None
    ) -> security_domain_pb2.Ceremony:
        """Start to replace the security domain, which revokes the old one for what is written later."""
        return await self._at(calls.new_generation(certificates_der, required), partition)

    async def rotate_key_encryption_key(self, partition: int | None = None) -> int:
        """Replace the key-encryption key; return its epoch."""
        return await self._at(calls.rotate_key_encryption_key(), partition)

    async def submit_share(
        self, partition: int, attempt_id: bytes, submission: bytes
    ) -> security_domain_pb2.Ceremony:
        """Submit one officer's share to the partition that runs the ceremony."""
        return await self._at(calls.submit_share(attempt_id, submission), partition)

    async def upload_restore_blob(
        self, partition: int, attempt_id: bytes, restore_blob: bytes
    ) -> security_domain_pb2.Ceremony:
        """Complete a recovery with a restore blob of Azure's format."""
        return await self._at(calls.upload_restore_blob(attempt_id, restore_blob), partition)

    async def get_ceremony(self, partition: int | None = None) -> security_domain_pb2.Ceremony | None:
        """Return the ceremony under way at a partition."""
        return await self._at(calls.get_ceremony(), partition)

    async def cancel_ceremony(self, partition: int, attempt_id: bytes) -> None:
        """End a ceremony; its shares are forgotten."""
        await self._at(calls.cancel_ceremony(attempt_id), partition)

    async def _run(self, call: Call[T]) -> T:
        total = self._timeout_seconds or CALL_SECONDS[call.kind]
        if self._pinned is not None:
            return await self._once(call, self._pinned, total)
        attempts = Attempts(time.monotonic() + total, call.kind == "mutation", self.retry_counts)
        while True:
            now = time.monotonic()
            index, probe = self._rotation.choose(attempts.tried, now)
            try:
                if probe:
                    await self._check_health(index)
                left = attempts.deadline - time.monotonic()
                seconds = min(ATTEMPT_SECONDS[call.kind], max(0.05, left))
                answer = await self._once(call, index, seconds)
            except MHSMError as error:
                now = time.monotonic()
                if not error.definite or isinstance(error, PoolUnreachable):
                    self._rotation.unhealthy(index, now)
                else:
                    self._rotation.healthy(index)
                await asyncio.sleep(attempts.backoff(error, index, len(self._channels), now))
            else:
                self._rotation.healthy(index)
                return answer

    async def _at(self, call: Call[T], index: int | None) -> T:
        at = index if index is not None else self._pinned or 0
        return await self._once(call, at, self._timeout_seconds or ATTEMPT_SECONDS[call.kind])

    async def _once(self, call: Call[T], index: int, seconds: float) -> T:
        method = getattr(self._stub(call.stub, index), call.method)
        try:
            response = await method(call.request, timeout=seconds)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        except asyncio.CancelledError:
            if self._ended_by_close():
                raise CallIndefinite("the client was closed; the outcome is not known") from None
            raise
        return call.answer(response)

    def _stub(self, kind: Callable[[Any], Any], index: int) -> Any:
        if self._closed:
            raise PoolClosed
        return kind(self._channels[index])

    def _ended_by_close(self) -> bool:
        # grpc tells both in the same way: that close() ended a call, and that its task was cancelled.
        task = asyncio.current_task()
        return self._closed and not (task and task.cancelling())

    async def _check_health(self, index: int) -> None:
        stub = self._stub(health_pb2_grpc.HealthStub, index)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
        except grpc.RpcError:
            raise PoolUnreachable(f"partition {index} does not answer") from None
