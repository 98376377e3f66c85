"""What create and import have in common: a new version with material that was made or came in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from hsm_pool.audit.record import note
from hsm_pool.core import key_transfer, key_use, lifecycle, roles
from hsm_pool.core.commands import CreateKeyVersion
from hsm_pool.core.model import KeyOperation, KeyOrigin, KeyReleasePolicy, KeyVersionRecord
from hsm_pool.core.roles import Access, key_scope
from hsm_pool.core.state import View
from hsm_pool.crypto import algorithms, key_transport
from hsm_pool.crypto.key_generation import KeyMaterial, import_octets, import_pkcs8
from hsm_pool.crypto.loaded_keys import RSAKey
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import InvalidField, NotFresh, PayloadTooLarge
from hsm_pool.limits import IMPORT_BYTES_MAX
from hsm_pool.net import convert, mutations
from hsm_pool.net.interceptors import current_access
from hsm_pool.partition.serving import Serving
from hsm_pool.store.sealing import seal_material
from mhsm.keys.v1 import keys_pb2

R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What create and import requests have in common."""

    key_id: str
    key_operations: tuple[KeyOperation, ...]
    attributes: keys_pb2.KeyAttributes
    tags: dict[str, str]
    must_not_exist: bool
    release_policy: KeyReleasePolicy | None


def new_version(
    request: keys_pb2.CreateKeyRequest | keys_pb2.ImportKeyRequest, *, must_not_exist: bool
) -> NewVersion:
    """Return what a request says of the version to make.

    Raises:
        InvalidField: A field is out of its bounds.
    """
    convert.refuse_output_only(request.attributes, exportable_allowed=True)
    return NewVersion(
        convert.named_key(request.key_id),
        convert.key_operations(request.key_operations),
        request.attributes,
        convert.tags(request.tags),
        must_not_exist,
        convert.release_policy(request),
    )


def imported_material(serving: Serving, request: keys_pb2.ImportKeyRequest, until: float) -> KeyMaterial:
    """Return the material of an import.

    Raises:
        InvalidField: It is missing, or of a kind that the pool does not hold.
        DecryptionFailed: The key transfer blob does not open, whatever the cause.
    """
    match request.material.WhichOneof("form"):
        case "pkcs8_der":
            return import_pkcs8(SecretBytes(_bounded(request.material.pkcs8_der)))
        case "octets":
            return import_octets(SecretBytes(_bounded(request.material.octets)))
        case "key_transfer_blob":
            return _transferred(serving, _bounded(request.material.key_transfer_blob), until)
        case _:
            raise InvalidField("material is missing", field="material")


def create(
    serving: Serving,
    access: Access,
    request: keys_pb2.CreateKeyRequest | keys_pb2.ImportKeyRequest,
    new: NewVersion,
    material: KeyMaterial,
    response: type[R],
    until: float,
    origin: KeyOrigin,
) -> R:
    """Seal the material, commit the new version and return the answer."""
    version_id = os.urandom(16).hex()
    note(key_version=version_id)
    attributes = new.attributes
    command = CreateKeyVersion(
        time_ms=serving.now_ms(),
        key_id=new.key_id,
        version_id=version_id,
        key_type=material.key_type,
        curve=material.curve,
        size_bits=material.size_bits,
        public_key_der=material.public_key_der,
        sealed_material=seal_material(
            serving.keys,
            new.key_id,
            version_id,
            material.key_type,
            material.curve,
            material.size_bits,
            material.material,
        ),
        key_operations=new.key_operations
        or algorithms.default_key_operations(material.key_type, material.size_bits),
        enabled=attributes.enabled if attributes.HasField("enabled") else True,
        not_before_ms=convert.time_ms(attributes, "not_before") or 0,
        expires_ms=convert.time_ms(attributes, "expires") or 0,
        exportable=attributes.exportable,
        tags=new.tags,
        must_not_exist=new.must_not_exist,
        release_policy=new.release_policy,
        origin=origin,
    )
    return mutations.commit(serving, access, command, request, response, until)


def _transferred(serving: Serving, document: bytes, until: float) -> KeyMaterial:
    """Open a key transfer blob with its key exchange key.

    Whoever imports with it needs the right to import at that key, too: else a blob of somebody
    else could be imported under any name.
    """
    blob = key_transfer.parse(document)

    def decide(view: View) -> KeyVersionRecord:
        version = lifecycle.version_of(view, lifecycle.active_key(view, blob.key_id), blob.version_id)
        key_use.check_use(version, KeyOperation.IMPORT, serving.replica.pool_time_ms)
        return version

    decision = roles.permitted(current_access(key_scope(blob.key_id)), decide)
    consulted = serving.replica.consult(decision, until)
    key = serving.load_key(consulted.value)
    assert isinstance(key, RSAKey)
    material = key_transport.unwrap(key.private, blob.ciphertext)
    if not serving.replica.unchanged(consulted):
        raise NotFresh("the key exchange key or the caller's roles changed while it was used")
    octets = len(material) * 8 in algorithms.OCT_SIZES_BITS
    return import_octets(material) if octets else import_pkcs8(material)


def _bounded(octets: bytes) -> bytes:
    if len(octets) > IMPORT_BYTES_MAX:
        raise PayloadTooLarge(f"key material has at most {IMPORT_BYTES_MAX} bytes", field="material")
    return octets
