"""CryptoService: batches of operations, each result released only while it is still true (G2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.rpc import status_pb2

from hsm_pool import limits
from hsm_pool.audit import record
from hsm_pool.core import key_use, lifecycle, roles
from hsm_pool.core.model import KeyOperation, KeyType, KeyVersionRecord
from hsm_pool.core.roles import Access
from hsm_pool.core.state import View
from hsm_pool.crypto import algorithms, operations
from hsm_pool.crypto.algorithms import Algorithm
from hsm_pool.crypto.loaded_keys import LoadedKey
from hsm_pool.errors import InvalidField, NotFresh, PayloadTooLarge
from hsm_pool.net import convert
from hsm_pool.net.calls import deadline
from hsm_pool.net.interceptors import current_access, current_caller, error_status, typed
from hsm_pool.net.secure_wrap import SecureWraps
from hsm_pool.partition.partition import Partition
from hsm_pool.store.replica import boot_time
from hsm_pool.tokens.attestation import AttestationVerifier
from mhsm.crypto.v1 import crypto_pb2, crypto_pb2_grpc

I = TypeVar("I")  # noqa: E741 - an item
O = TypeVar("O")  # noqa: E741 - its result

_CALL_SECONDS_MAX = 10.0


@dataclass(frozen=True, slots=True)
class _Batch:
    """What a batch is done with."""

    name: str
    algorithm: str
    operation: KeyOperation
    until: float


class CryptoService(crypto_pb2_grpc.CryptoServiceServicer):
    """Cryptographic operations."""

    def __init__(
        self,
        partition: Partition,
        translate: Callable[[Exception], Exception],
        attestations: AttestationVerifier,
    ) -> None:
        self._partition = partition
        self._translate = translate
        self._secure_wraps = SecureWraps(partition, attestations)

    def Sign(  # noqa: N802, D102
        self, request: crypto_pb2.SignRequest, context: grpc.ServicerContext
    ) -> crypto_pb2.SignResponse:
        return self._sign(request, deadline(context, _CALL_SECONDS_MAX))

    def Verify(  # noqa: N802, D102
        self, request: crypto_pb2.VerifyRequest, context: grpc.ServicerContext
    ) -> crypto_pb2.VerifyResponse:
        return self._verify(request, deadline(context, _CALL_SECONDS_MAX))

    def Encrypt(  # noqa: N802, D102
        self, request: crypto_pb2.EncryptRequest, context: grpc.ServicerContext
    ) -> crypto_pb2.EncryptResponse:
        return self._encrypt(request, deadline(context, _CALL_SECONDS_MAX))

    def Decrypt(  # noqa: N802, D102
        self, request: crypto_pb2.DecryptRequest, context: grpc.ServicerContext
    ) -> crypto_pb2.DecryptResponse:
        return self._decrypt(request, deadline(context, _CALL_SECONDS_MAX))

    def WrapKey(  # noqa: N802, D102
        self, request: crypto_pb2.WrapKeyRequest, context: grpc.ServicerContext
    ) -> crypto_pb2.WrapKeyResponse:
        return self._wrap_key(request, deadline(context, _CALL_SECONDS_MAX))

    def UnwrapKey(  # noqa: N802, D102
        self, request: crypto_pb2.UnwrapKeyRequest, context: grpc.ServicerContext
    ) -> crypto_pb2.UnwrapKeyResponse:
        return self._unwrap_key(request, deadline(context, _CALL_SECONDS_MAX))

    def SecureWrapKey(  # noqa: N802, D102
        self, request: crypto_pb2.SecureWrapKeyRequest, context: grpc.ServicerContext
    ) -> crypto_pb2.SecureWrapKeyResponse:
        return self._secure_wraps.wrap(request, deadline(context, _CALL_SECONDS_MAX))

    def SecureUnwrapKey(  # noqa: N802, D102
        self, request: crypto_pb2.SecureUnwrapKeyRequest, context: grpc.ServicerContext
    ) -> crypto_pb2.SecureUnwrapKeyResponse:
        return self._secure_wraps.unwrap(request, deadline(context, _CALL_SECONDS_MAX))

    def GetRandomBytes(  # noqa: N802, D102
        self,
        request: crypto_pb2.GetRandomBytesRequest,
        context: grpc.ServicerContext,
    ) -> crypto_pb2.GetRandomBytesResponse:
        replica = self._partition.serving().replica
        if not 1 <= request.count <= limits.RANDOM_BYTES_MAX:
            raise InvalidField(f"count is 1-{limits.RANDOM_BYTES_MAX}", field="count")
        access = current_access()
        return replica.answer(
            lambda view: roles.check(view, access),
            lambda _: crypto_pb2.GetRandomBytesResponse(random_bytes=os.urandom(request.count)),
            deadline(context, _CALL_SECONDS_MAX),
            "the caller's roles kept changing",
        )

    def StreamOperations(  # noqa: N802, D102
        self,
        request_iterator: Iterator[crypto_pb2.StreamOperationsRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[crypto_pb2.StreamOperationsResponse]:
        for request in request_iterator:
            response = crypto_pb2.StreamOperationsResponse(correlation_id=request.correlation_id)
            try:
                self._dispatch(request, response, deadline(context, _CALL_SECONDS_MAX))
            except Exception as error:  # noqa: BLE001 - becomes the batch's answer
                refusal = typed(self._translate(error), "StreamOperations")
                operation = record.current()
                if operation:
                    operation.refused(refusal.code, refusal.reason)
                shown: status_pb2.Status = error_status(refusal)
                response.error.CopyFrom(shown)
            yield response

    def _dispatch(
        self,
        request: crypto_pb2.StreamOperationsRequest,
        response: crypto_pb2.StreamOperationsResponse,
        until: float,
    ) -> None:
        kind, operation = request.WhichOneof("operation"), record.current()
        if operation and kind:
            operation.name = record.STREAM_NAMES[kind]
        match kind:
            case "sign":
                response.sign.CopyFrom(self._sign(request.sign, until))
            case "verify":
                response.verify.CopyFrom(self._verify(request.verify, until))
            case "encrypt":
                response.encrypt.CopyFrom(self._encrypt(request.encrypt, until))
            case "decrypt":
                response.decrypt.CopyFrom(self._decrypt(request.decrypt, until))
            case "wrap_key":
                response.wrap_key.CopyFrom(self._wrap_key(request.wrap_key, until))
            case "unwrap_key":
                response.unwrap_key.CopyFrom(self._unwrap_key(request.unwrap_key, until))
            case _:
                raise InvalidField("operation is missing", field="operation")

    # -- operations ----------------------------------------------------------------------

    def _sign(self, request: crypto_pb2.SignRequest, until: float) -> crypto_pb2.SignResponse:
        batch = _Batch(request.name, request.algorithm, KeyOperation.SIGN, until)
        name, signatures = self._run(batch, request.digests, operations.sign)
        return crypto_pb2.SignResponse(name=name, signatures=signatures)

    def _verify(self, request: crypto_pb2.VerifyRequest, until: float) -> crypto_pb2.VerifyResponse:
        def verify(key: LoadedKey, algorithm: Algorithm, item: crypto_pb2.DigestSignature) -> bool:
            try:
                operations.verify(key, algorithm, item.digest, item.signature)
            except operations.InvalidSignature:
                return False
            return True

        batch = _Batch(request.name, request.algorithm, KeyOperation.VERIFY, until)
        name, valid = self._run(batch, request.items, verify)
        return crypto_pb2.VerifyResponse(name=name, valid=valid)

    def _encrypt(self, request: crypto_pb2.EncryptRequest, until: float) -> crypto_pb2.EncryptResponse:
        def encrypt(
            key: LoadedKey, algorithm: Algorithm, item: crypto_pb2.Plaintext
        ) -> crypto_pb2.Ciphertext:
            data = operations.encrypt(
                key, algorithm, item.plaintext, item.additional_data, item.initialization_vector
            )
            return crypto_pb2.Ciphertext(
                ciphertext=data.ciphertext,
                initialization_vector=data.initialization_vector,
                authentication_tag=data.authentication_tag,
                additional_data=item.additional_data,
            )

        batch = _Batch(request.name, request.algorithm, KeyOperation.ENCRYPT, until)
        name, items = self._run(batch, request.items, encrypt)
        return crypto_pb2.EncryptResponse(name=name, items=items)

    def _decrypt(self, request: crypto_pb2.DecryptRequest, until: float) -> crypto_pb2.DecryptResponse:
        def decrypt(key: LoadedKey, algorithm: Algorithm, item: crypto_pb2.Ciphertext) -> bytes:
            data = operations.EncryptedData(
                item.ciphertext, item.initialization_vector, item.authentication_tag
            )
            return operations.decrypt(key, algorithm, data, item.additional_data)

        batch = _Batch(request.name, request.algorithm, KeyOperation.DECRYPT, until)
        name, plaintexts = self._run(batch, request.items, decrypt)
        return crypto_pb2.DecryptResponse(name=name, plaintexts=plaintexts)

    def _wrap_key(self, request: crypto_pb2.WrapKeyRequest, until: float) -> crypto_pb2.WrapKeyResponse:
        batch = _Batch(request.name, request.algorithm, KeyOperation.WRAP_KEY, until)
        name, wrapped = self._run(batch, request.keys, operations.wrap_key)
        return crypto_pb2.WrapKeyResponse(name=name, wrapped_keys=wrapped)

    def _unwrap_key(self, request: crypto_pb2.UnwrapKeyRequest, until: float) -> crypto_pb2.UnwrapKeyResponse:
        batch = _Batch(request.name, request.algorithm, KeyOperation.UNWRAP_KEY, until)
        name, keys = self._run(batch, request.wrapped_keys, operations.unwrap_key)
        return crypto_pb2.UnwrapKeyResponse(name=name, keys=keys)

    def _run(
        self, batch: _Batch, items: Sequence[I], operate: Callable[[LoadedKey, Algorithm, I], O]
    ) -> tuple[str, list[O]]:
        """Do a batch: read roles and key, compute, and release only if nothing changed since (G2)."""
        serving = self._partition.serving()
        replica = serving.replica
        key_id, version_id = convert.parse_name(batch.name)
        if not items:
            raise InvalidField("the batch is empty", field="items")

        action = roles.ACTION_OF_OPERATION[batch.operation]
        access = Access(current_caller().principals, action, roles.key_scope(key_id))

        def decide(view: View) -> KeyVersionRecord:
            roles.check(view, access)
            version = lifecycle.version_of(view, lifecycle.active_key(view, key_id), version_id)
            key_use.check_use(version, batch.operation, replica.pool_time_ms)
            return version

        def answer(version: KeyVersionRecord) -> tuple[str, list[O]]:
            algorithm = algorithms.find(
                batch.algorithm, version.key_type, version.curve, version.size_bits, batch.operation
            )
            _check_batch(version, len(items))
            record.note(key_version=version.version_id, algorithm=algorithm.name, items=len(items))
            key = serving.load_key(version)
            results: list[O] = []
            for item in items:
                if boot_time() >= batch.until or not replica.lease_remaining():
                    raise NotFresh("the freshness lease or the deadline ran out within the batch")
                results.append(operate(key, algorithm, item))
            return convert.version_path(version), results

        changing = "the key or the caller's roles kept changing while it was used"
        return replica.answer(decide, answer, batch.until, changing)


def _check_batch(version: KeyVersionRecord, count: int) -> None:
    allowed = limits.BATCH_ITEMS_RSA_MAX if version.key_type is KeyType.RSA else limits.BATCH_ITEMS_MAX
    if count > allowed:
        raise PayloadTooLarge(f"a batch with this key has at most {allowed} items", field="items")
