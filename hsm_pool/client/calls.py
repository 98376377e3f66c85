"""Requests and answers of every call, shared by the synchronous and the asyncio client."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, Self, TypeVar

from hsm_pool.client import key_names
from hsm_pool.client.errors import SignatureInvalid
from hsm_pool.client.messages import message, named_fields
from mhsm.crypto.v1 import crypto_pb2, crypto_pb2_grpc
from mhsm.evidence.v1 import evidence_pb2
from mhsm.keys.v1 import keys_pb2, keys_pb2_grpc
from mhsm.pool.v1 import pool_pb2, pool_pb2_grpc
from mhsm.security_domain.v1 import security_domain_pb2, security_domain_pb2_grpc

T = TypeVar("T")
Kind = Literal["read", "crypto", "mutation", "ceremony"]

ATTEMPT_SECONDS: dict[Kind, float] = {"read": 2.0, "crypto": 2.0, "mutation": 5.0, "ceremony": 60.0}
"""How long one try may take."""

CALL_SECONDS: dict[Kind, float] = {"read": 10.0, "crypto": 10.0, "mutation": 20.0, "ceremony": 60.0}
"""How long a call with all its tries may take."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call: which method, which request, and what of the answer is wanted."""

    stub: Callable[[Any], Any]
    method: str
    request: Any = dataclasses.field(repr=False)  # may hold key material (G3)
    kind: Kind
    answer: Callable[[Any], T]


def _key(method: str, request: Any, kind: Kind, answer: Callable[[Any], T]) -> Call[T]:
    return Call(keys_pb2_grpc.KeyServiceStub, method, request, kind, answer)


def _crypto(method: str, request: Any, answer: Callable[[Any], T]) -> Call[T]:
    return Call(crypto_pb2_grpc.CryptoServiceStub, method, request, "crypto", answer)


def attributes(
    *,
    enabled: bool | None = None,
    not_before: datetime | None = None,
    expires: datetime | None = None,
    exportable: bool = False,
) -> keys_pb2.KeyAttributes:
    """Return key attributes; what is None stays absent, and a time without a zone is UTC."""
    return message(
        keys_pb2.KeyAttributes,
        enabled=enabled,
        not_before=not_before,
        expires=expires,
        exportable=exportable,
    )


def release_policy(data: bytes, *, immutable: bool = False) -> keys_pb2.KeyReleasePolicy:
    """Return a release policy: JSON in the grammar of Azure's release policies."""
    return message(keys_pb2.KeyReleasePolicy, data=data, immutable=immutable)


def _request_id(request_id: str | None) -> str:
    return request_id or str(uuid.uuid4())


@named_fields
def create_key(
    key_id: str,
    *,
    key_type: str | int,
    curve: str | int = keys_pb2.CURVE_UNSPECIFIED,
    size_bits: int = 0,
    key_operations: Sequence[str | int] = (),
    key_attributes: keys_pb2.KeyAttributes | None = None,
    tags: Mapping[str, str] | None = None,
    must_not_exist: bool = False,
    public_exponent: int = 0,
    release_policy: keys_pb2.KeyReleasePolicy | None = None,
    request_id: str | None = None,
) -> Call[keys_pb2.Key]:
    """CreateKey."""
    request = message(
        keys_pb2.CreateKeyRequest,
        key_id=key_id,
        key_type=key_names.key_type(key_type),
        curve=key_names.curve(curve),
        size_bits=size_bits,
        key_operations=key_names.key_operations(key_operations),
        attributes=key_attributes,
        tags=tags,
        must_not_exist=must_not_exist,
        public_exponent=public_exponent,
        release_policy=release_policy,
        request_id=_request_id(request_id),
    )
    return _key("CreateKey", request, "mutation", lambda response: response.key)


@named_fields
def import_key(
    key_id: str,
    *,
    pkcs8_der: bytes | None = None,
    octets: bytes | None = None,
    key_transfer_blob: bytes | None = None,
    key_operations: Sequence[str | int] = (),
    key_attributes: keys_pb2.KeyAttributes | None = None,
    tags: Mapping[str, str] | None = None,
    release_policy: keys_pb2.KeyReleasePolicy | None = None,
    request_id: str | None = None,
) -> Call[keys_pb2.Key]:
    """ImportKey."""
    request = message(
        keys_pb2.ImportKeyRequest,
        key_id=key_id,
        material=_material(pkcs8_der, octets, key_transfer_blob),
        key_operations=key_names.key_operations(key_operations),
        attributes=key_attributes,
        tags=tags,
        release_policy=release_policy,
        request_id=_request_id(request_id),
    )
    return _key("ImportKey", request, "mutation", lambda response: response.key)


def _material(
    pkcs8_der: bytes | None, octets: bytes | None, key_transfer_blob: bytes | None
) -> keys_pb2.KeyMaterialSecret:
    if key_transfer_blob is not None:
        return message(keys_pb2.KeyMaterialSecret, key_transfer_blob=key_transfer_blob)
    if pkcs8_der is not None:
        return message(keys_pb2.KeyMaterialSecret, pkcs8_der=pkcs8_der)
    return message(keys_pb2.KeyMaterialSecret, octets=octets or b"")


def get_key(name: str) -> Call[keys_pb2.Key]:
    """GetKey."""
    return _key("GetKey", message(keys_pb2.GetKeyRequest, name=name), "read", lambda response: response.key)


def list_keys(page_size: int, page_token: str) -> Call[keys_pb2.ListKeysResponse]:
    """ListKeys, one page."""
    request = message(keys_pb2.ListKeysRequest, page_size=page_size, page_token=page_token)
    return _key("ListKeys", request, "read", lambda response: response)


def list_key_versions(name: str, page_size: int, page_token: str) -> Call[keys_pb2.ListKeyVersionsResponse]:
    """ListKeyVersions, one page."""
    request = message(keys_pb2.ListKeyVersionsRequest, name=name, page_size=page_size, page_token=page_token)
    return _key("ListKeyVersions", request, "read", lambda response: response)


def list_deleted_keys(page_size: int, page_token: str) -> Call[keys_pb2.ListDeletedKeysResponse]:
    """ListDeletedKeys, one page."""
    request = message(keys_pb2.ListDeletedKeysRequest, page_size=page_size, page_token=page_token)
    return _key("ListDeletedKeys", request, "read", lambda response: response)


@named_fields
def update_key(
    name: str,
    *,
    key_attributes: keys_pb2.KeyAttributes | None = None,
    key_operations: Sequence[str | int] = (),
    tags: Mapping[str, str] | None = None,
    clear_not_before: bool = False,
    clear_expires: bool = False,
    release_policy: keys_pb2.KeyReleasePolicy | None = None,
    request_id: str | None = None,
) -> Call[keys_pb2.Key]:
    """UpdateKey."""
    request = message(
        keys_pb2.UpdateKeyRequest,
        name=name,
        attributes=key_attributes,
        key_operations=key_names.key_operations(key_operations),
        tags=tags,
        replace_tags=tags is not None,
        clear_not_before=clear_not_before,
        clear_expires=clear_expires,
        release_policy=release_policy,
        request_id=_request_id(request_id),
    )
    return _key("UpdateKey", request, "mutation", lambda response: response.key)


def delete_key(name: str, request_id: str | None = None) -> Call[keys_pb2.DeletedKey]:
    """DeleteKey."""
    request = message(keys_pb2.DeleteKeyRequest, name=name, request_id=_request_id(request_id))
    return _key("DeleteKey", request, "mutation", lambda response: response.deleted_key)


def get_deleted_key(name: str) -> Call[keys_pb2.DeletedKey]:
    """GetDeletedKey."""
    request = message(keys_pb2.GetDeletedKeyRequest, name=name)
    return _key("GetDeletedKey", request, "read", lambda response: response.deleted_key)


def recover_deleted_key(name: str, request_id: str | None = None) -> Call[keys_pb2.Key]:
    """RecoverDeletedKey."""
    request = message(keys_pb2.RecoverDeletedKeyRequest, name=name, request_id=_request_id(request_id))
    return _key("RecoverDeletedKey", request, "mutation", lambda response: response.key)


def purge_deleted_key(name: str, request_id: str | None = None) -> Call[None]:
    """PurgeDeletedKey."""
    request = message(keys_pb2.PurgeDeletedKeyRequest, name=name, request_id=_request_id(request_id))
    return _key("PurgeDeletedKey", request, "mutation", lambda _: None)


def release_key(
    name: str, target_attestation_token: str, encryption_algorithm: str = "", nonce: str = ""
) -> Call[str]:
    """ReleaseKey."""
    request = message(
        keys_pb2.ReleaseKeyRequest,
        name=name,
        target_attestation_token=target_attestation_token,
        encryption_algorithm=encryption_algorithm,
        nonce=nonce,
    )
    return _key("ReleaseKey", request, "crypto", lambda response: response.value)


def get_key_attestation(name: str) -> Call[keys_pb2.GetKeyAttestationResponse]:
    """GetKeyAttestation."""
    request = message(keys_pb2.GetKeyAttestationRequest, name=name)
    return _key("GetKeyAttestation", request, "read", lambda response: response)


def rotate_key(name: str, request_id: str | None = None) -> Call[keys_pb2.Key]:
    """RotateKey."""
    request = message(keys_pb2.RotateKeyRequest, name=name, request_id=_request_id(request_id))
    return _key("RotateKey", request, "mutation", lambda response: response.key)


def get_key_rotation_policy(name: str) -> Call[keys_pb2.KeyRotationPolicy]:
    """GetKeyRotationPolicy."""
    request = message(keys_pb2.GetKeyRotationPolicyRequest, name=name)
    return _key("GetKeyRotationPolicy", request, "read", lambda response: response.policy)


@named_fields
def update_key_rotation_policy(
    name: str,
    *,
    time_after_create: str = "",
    time_before_expiry: str = "",
    expiry_time: str = "",
    request_id: str | None = None,
) -> Call[keys_pb2.KeyRotationPolicy]:
    """UpdateKeyRotationPolicy: ISO 8601 durations such as P90D; without any the policy is removed."""
    policy = message(keys_pb2.KeyRotationPolicy, expiry_time=expiry_time)
    rotate = keys_pb2.LIFETIME_ACTION_TYPE_ROTATE
    if time_after_create:
        policy.lifetime_actions.add(action=rotate, time_after_create=time_after_create)
    if time_before_expiry:
        policy.lifetime_actions.add(action=rotate, time_before_expiry=time_before_expiry)
    request = message(
        keys_pb2.UpdateKeyRotationPolicyRequest, name=name, policy=policy, request_id=_request_id(request_id)
    )
    return _key("UpdateKeyRotationPolicy", request, "mutation", lambda response: response.policy)


class Made(bytes):
    """What a version of a key has made: only that version can verify or unwrap it."""

    key_name: str
    """keys/NAME/VERSION, also where the call named no version (Azure: kid)."""

    def __new__(cls, octets: bytes, key_name: str) -> Self:
        """Return octets with the name of what made them."""
        made = super().__new__(cls, octets)
        made.key_name = key_name
        return made


def sign_batch(name: str, algorithm: str, digests: Sequence[bytes]) -> Call[list[Made]]:
    """Sign."""
    request = message(crypto_pb2.SignRequest, name=name, algorithm=algorithm, digests=digests)
    return _crypto("Sign", request, lambda response: _made(response.signatures, response))


def _made(all_octets: Iterable[bytes], response: Any) -> list[Made]:
    return [Made(octets, response.name) for octets in all_octets]


def verify_batch(name: str, algorithm: str, items: Sequence[tuple[bytes, bytes]]) -> Call[list[bool]]:
    """Verify (digest, signature) pairs."""
    pairs = [
        message(crypto_pb2.DigestSignature, digest=digest, signature=signature) for digest, signature in items
    ]
    request = message(crypto_pb2.VerifyRequest, name=name, algorithm=algorithm, items=pairs)
    return _crypto("Verify", request, lambda response: list(response.valid))


def verify(name: str, algorithm: str, digest: bytes, signature: bytes) -> Call[None]:
    """Verify one signature; raises SignatureInvalid."""

    def answer(response: crypto_pb2.VerifyResponse) -> None:
        if list(response.valid) != [True]:
            raise SignatureInvalid("the signature does not verify")

    batch = verify_batch(name, algorithm, [(digest, signature)])
    return Call(batch.stub, batch.method, batch.request, batch.kind, answer)


def encrypt(
    name: str, algorithm: str, plaintext: bytes, additional_data: bytes, initialization_vector: bytes
) -> Call[crypto_pb2.Ciphertext]:
    """Encrypt one plaintext; the vector is for CBC, and may be empty."""
    item = message(
        crypto_pb2.Plaintext,
        plaintext=plaintext,
        additional_data=additional_data,
        initialization_vector=initialization_vector,
    )
    request = message(crypto_pb2.EncryptRequest, name=name, algorithm=algorithm, items=[item])
    return _crypto("Encrypt", request, lambda response: response.items[0])


def encrypt_batch(
    name: str, algorithm: str, items: Sequence[tuple[bytes, bytes]]
) -> Call[list[crypto_pb2.Ciphertext]]:
    """Encrypt (plaintext, additional data) pairs."""
    pairs = [
        message(crypto_pb2.Plaintext, plaintext=plaintext, additional_data=data) for plaintext, data in items
    ]
    request = message(crypto_pb2.EncryptRequest, name=name, algorithm=algorithm, items=pairs)
    return _crypto("Encrypt", request, lambda response: list(response.items))


def decrypt_batch(name: str, algorithm: str, items: Sequence[crypto_pb2.Ciphertext]) -> Call[list[bytes]]:
    """Decrypt."""
    request = message(crypto_pb2.DecryptRequest, name=name, algorithm=algorithm, items=items)
    return _crypto("Decrypt", request, lambda response: list(response.plaintexts))


def wrap_batch(name: str, algorithm: str, keys: Sequence[bytes]) -> Call[list[Made]]:
    """WrapKey."""
    request = message(crypto_pb2.WrapKeyRequest, name=name, algorithm=algorithm, keys=keys)
    return _crypto("WrapKey", request, lambda response: _made(response.wrapped_keys, response))


def unwrap_batch(name: str, algorithm: str, wrapped_keys: Sequence[bytes]) -> Call[list[bytes]]:
    """UnwrapKey."""
    request = message(crypto_pb2.UnwrapKeyRequest, name=name, algorithm=algorithm, wrapped_keys=wrapped_keys)
    return _crypto("UnwrapKey", request, lambda response: list(response.keys))


def secure_wrap_key(name: str, algorithm: str) -> Call[Made]:
    """SecureWrapKey."""
    request = message(crypto_pb2.SecureWrapKeyRequest, name=name, algorithm=algorithm)
    return _crypto("SecureWrapKey", request, lambda response: Made(response.wrapped_key, response.name))


def secure_unwrap_key(
    name: str, algorithm: str, wrapped_key: bytes, target_attestation_token: str
) -> Call[str]:
    """SecureUnwrapKey."""
    request = message(
        crypto_pb2.SecureUnwrapKeyRequest,
        name=name,
        algorithm=algorithm,
        wrapped_key=wrapped_key,
        target_attestation_token=target_attestation_token,
    )
    return _crypto("SecureUnwrapKey", request, lambda response: response.value)


def random_bytes(count: int) -> Call[bytes]:
    """GetRandomBytes."""
    request = message(crypto_pb2.GetRandomBytesRequest, count=count)
    return _crypto("GetRandomBytes", request, lambda response: response.random_bytes)


def partition_status() -> Call[pool_pb2.GetPartitionStatusResponse]:
    """GetPartitionStatus."""
    request = pool_pb2.GetPartitionStatusRequest()
    return Call(
        pool_pb2_grpc.PoolServiceStub, "GetPartitionStatus", request, "read", lambda response: response
    )


def evidence(nonce: bytes) -> Call[evidence_pb2.Evidence]:
    """GetEvidence."""
    request = message(pool_pb2.GetEvidenceRequest, nonce=nonce)
    return Call(
        pool_pb2_grpc.PoolServiceStub, "GetEvidence", request, "read", lambda response: response.evidence
    )


def _ceremony(method: str, request: Any, answer: Callable[[Any], T]) -> Call[T]:
    stub = security_domain_pb2_grpc.SecurityDomainServiceStub
    return Call(stub, method, request, "ceremony", answer)


def download_security_domain(
    certificates_der: Sequence[bytes], required: int, request_id: str | None = None
) -> Call[security_domain_pb2.Ceremony]:
    """DownloadSecurityDomain."""
    request = message(
        security_domain_pb2.DownloadSecurityDomainRequest,
        officer_certificates_der=certificates_der,
        required=required,
        request_id=_request_id(request_id),
    )
    return _ceremony("DownloadSecurityDomain", request, lambda response: response.ceremony)


def init_recovery(file: bytes = b"") -> Call[security_domain_pb2.Ceremony]:
    """InitRecovery."""
    request = message(security_domain_pb2.InitRecoveryRequest, security_domain_file=file)
    return _ceremony("InitRecovery", request, lambda response: response.ceremony)


def verify_security_domain() -> Call[security_domain_pb2.Ceremony]:
    """VerifySecurityDomain."""
    request = security_domain_pb2.VerifySecurityDomainRequest()
    return _ceremony("VerifySecurityDomain", request, lambda response: response.ceremony)


def rotate_shares(certificates_der: Sequence[bytes], required: int) -> Call[security_domain_pb2.Ceremony]:
    """RotateShares."""
    request = message(
        security_domain_pb2.RotateSharesRequest, officer_certificates_der=certificates_der, required=required
    )
    return _ceremony("RotateShares", request, lambda response: response.ceremony)


def new_generation(certificates_der: Sequence[bytes], required: int) -> Call[security_domain_pb2.Ceremony]:
    """NewGeneration."""
    request = message(
        security_domain_pb2.NewGenerationRequest, officer_certificates_der=certificates_der, required=required
    )
    return _ceremony("NewGeneration", request, lambda response: response.ceremony)


def rotate_key_encryption_key() -> Call[int]:
    """RotateKeyEncryptionKey."""
    request = security_domain_pb2.RotateKeyEncryptionKeyRequest()
    return _ceremony("RotateKeyEncryptionKey", request, lambda response: response.epoch)


def submit_share(attempt_id: bytes, submission: bytes) -> Call[security_domain_pb2.Ceremony]:
    """SubmitShare."""
    request = message(security_domain_pb2.SubmitShareRequest, attempt_id=attempt_id, submission=submission)
    return _ceremony("SubmitShare", request, lambda response: response.ceremony)


def upload_restore_blob(attempt_id: bytes, restore_blob: bytes) -> Call[security_domain_pb2.Ceremony]:
    """UploadRestoreBlob."""
    request = message(
        security_domain_pb2.UploadRestoreBlobRequest, attempt_id=attempt_id, restore_blob=restore_blob
    )
    return _ceremony("UploadRestoreBlob", request, lambda response: response.ceremony)


def get_ceremony() -> Call[security_domain_pb2.Ceremony | None]:
    """GetCeremony."""
    return _ceremony(
        "GetCeremony",
        security_domain_pb2.GetCeremonyRequest(),
        lambda response: response.ceremony if response.HasField("ceremony") else None,
    )


def cancel_ceremony(attempt_id: bytes) -> Call[None]:
    """CancelCeremony."""
    request = message(security_domain_pb2.CancelCeremonyRequest, attempt_id=attempt_id)
    return _ceremony("CancelCeremony", request, lambda _: None)
