"""Secure key release: a key leaves only encrypted, to an environment that its policy admits (G2, G3)."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hsm_pool import limits
from hsm_pool.audit.record import note
from hsm_pool.core import key_release, lifecycle, roles
from hsm_pool.core.model import KeyReleasePolicy, KeyVersionRecord, Retention
from hsm_pool.core.state import View
from hsm_pool.crypto import key_transport
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import InvalidField
from hsm_pool.net import convert
from hsm_pool.net.interceptors import current_access
from hsm_pool.partition.partition import Partition
from hsm_pool.tokens.attestation import AttestationVerifier, Target
from mhsm.keys.v1 import keys_pb2
from security_domain.encoding import canonical, encode

_SCHEMA_VERSION = "1.0"
API_VERSION = "mhsm.keys.v1"
"""Stands where Azure's answers have the version of its API."""

_LEVELS = {
    keys_pb2.RECOVERY_LEVEL_RECOVERABLE_PURGEABLE: "Recoverable+Purgeable",
    keys_pb2.RECOVERY_LEVEL_CUSTOMIZED_RECOVERABLE_PURGEABLE: "CustomizedRecoverable+Purgeable",
    keys_pb2.RECOVERY_LEVEL_RECOVERABLE: "Recoverable",
    keys_pb2.RECOVERY_LEVEL_CUSTOMIZED_RECOVERABLE: "CustomizedRecoverable",
}


class KeyReleases:
    """Releases keys of one partition."""

    def __init__(self, partition: Partition, verifier: AttestationVerifier) -> None:
        self._partition = partition
        self._verifier = verifier

    def release(self, request: keys_pb2.ReleaseKeyRequest, until: float) -> str:
        """Return a version, encrypted to the attested environment, as a JWS.

        Roles and key come first: who may not release a key learns nothing of its policy.

        Raises:
            OperationNotPermitted: The version is not exportable.
            KeyReleaseRefused: The attestation is not acceptable, or does not meet the version's policy.
            NotFresh: The freshness lease ran out.
        """
        serving = self._partition.serving()
        key_id, version_id = convert.parse_name(request.name)
        algorithm = request.encryption_algorithm or key_transport.CKM_RSA_AES_KEY_WRAP
        key_transport.check_encryption_algorithm(algorithm)
        if len(request.nonce) > limits.RELEASE_NONCE_LENGTH_MAX:
            raise InvalidField(
                f"a nonce has at most {limits.RELEASE_NONCE_LENGTH_MAX} characters", field="nonce"
            )

        def decide(view: View) -> tuple[KeyVersionRecord, KeyReleasePolicy, Retention]:
            version = lifecycle.version_of(view, lifecycle.active_key(view, key_id), version_id)
            policy = key_release.check_exportable(version)
            return version, policy, lifecycle.pool_record(view).retention

        def released(decided: tuple[KeyVersionRecord, KeyReleasePolicy, Retention]) -> str:
            version, policy, retention = decided
            note(key_version=version.version_id, algorithm=algorithm)
            target = self._verifier.verify(request.target_attestation_token)
            key_release.check_target(policy, target.authority, target.claims)
            encrypted = encrypted_key(algorithm, target, serving.open_material(version))
            payload = _payload(request, version, retention, encrypted, algorithm)
            return self._partition.attester.certify_release(payload)

        decision = roles.permitted(current_access(roles.key_scope(key_id)), decide)
        changing = "the key or the caller's roles kept changing while it was released"
        return serving.replica.answer(decision, released, until, changing)


def encrypted_key(algorithm: str, target: Target, material: SecretBytes) -> str:
    """Return a key encrypted to an environment: key_hsm, the form in which keys also enter a pool (BYOK)."""
    wrapped = key_transport.wrap(algorithm, target.public_key, material)
    header = {"alg": "dir", "enc": algorithm, "kid": target.key_id}
    return encode(
        canonical({"ciphertext": encode(wrapped), "header": header, "schema_version": _SCHEMA_VERSION})
    )


def _payload(
    request: keys_pb2.ReleaseKeyRequest,
    version: KeyVersionRecord,
    retention: Retention,
    key_hsm: str,
    algorithm: str,
) -> bytes:
    """Return what is signed: Azure's members, and the nonce where Azure's request has it."""
    key = convert.key_message(version, retention)
    asked = {"api-version": API_VERSION, "enc": algorithm, "kid": key.name}
    if request.nonce:
        asked["nonce"] = request.nonce
    attributes: dict[str, Any] = {
        "created": version.created_ms // 1000,
        "enabled": version.enabled,
        "exportable": version.exportable,
        "recoverableDays": retention.recoverable_days,
        "recoveryLevel": _LEVELS[key.attributes.recovery_level],
        "updated": version.updated_ms // 1000,
    }
    if version.expires_ms:
        attributes["exp"] = version.expires_ms // 1000
    if version.not_before_ms:
        attributes["nbf"] = version.not_before_ms // 1000
    policy = {
        "contentType": key.release_policy.content_type,
        "data": encode(key.release_policy.data),
        "immutable": key.release_policy.immutable,
    }
    released = {
        **_public(version),
        "key_hsm": key_hsm,
        "key_ops": [operation.azure_name for operation in version.key_operations],
        "kid": key.name,
    }
    answer = {"attributes": attributes, "key": released, "release_policy": policy}
    return canonical({"request": asked, "response": {"key": answer}})


def _public(version: KeyVersionRecord) -> dict[str, str]:
    """Return the public members of the key as a JWK (RFC 7518)."""
    if not version.public_key_der:
        return {"kty": "oct"}
    key = serialization.load_der_public_key(version.public_key_der)
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        return {"kty": "RSA", "n": _number(numbers.n), "e": _number(numbers.e)}
    assert isinstance(key, ec.EllipticCurvePublicKey)
    width, point = (key.key_size + 7) // 8, key.public_numbers()
    return {
        "kty": "EC",
        "crv": version.curve.azure_name,
        "x": encode(point.x.to_bytes(width, "big")),
        "y": encode(point.y.to_bytes(width, "big")),
    }


def _number(value: int) -> str:
    return encode(value.to_bytes((value.bit_length() + 7) // 8, "big"))
