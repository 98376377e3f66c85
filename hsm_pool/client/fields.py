"""Keywords of the calls that have many, for both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Required, TypedDict

from mhsm.keys.v1 import keys_pb2


class KeyFields(TypedDict, total=False):
    """What a version has, whether it is made or imported."""

    key_operations: Sequence[str | int]
    key_attributes: keys_pb2.KeyAttributes | None
    tags: Mapping[str, str] | None
    release_policy: keys_pb2.KeyReleasePolicy | None
    request_id: str | None


class CreateKeyFields(KeyFields, total=False):
    """Of create_key."""

    key_type: Required[str | int]
    curve: str | int
    size_bits: int
    must_not_exist: bool
    public_exponent: int


class ImportKeyFields(KeyFields, total=False):
    """Of import_key."""

    pkcs8_der: bytes | None
    octets: bytes | None
    key_transfer_blob: bytes | None


class UpdateKeyFields(KeyFields, total=False):
    """Of update_key."""

    clear_not_before: bool
    clear_expires: bool


class RotationPolicyFields(TypedDict, total=False):
    """Of update_key_rotation_policy."""

    time_after_create: str
    time_before_expiry: str
    expiry_time: str
    request_id: str | None


class RoleDefinitionFields(TypedDict, total=False):
    """Of create_role_definition."""

    not_data_actions: Sequence[str]
    description: str
    role_definition_id: str
    request_id: str | None


class RoleAssignmentFields(TypedDict, total=False):
    """Of create_role_assignment."""

    name: str
    request_id: str | None


class PoolOptions(TypedDict, total=False):
    """Of both clients."""

    token: str | None
    partition: int | None
    timeout_seconds: float | None
