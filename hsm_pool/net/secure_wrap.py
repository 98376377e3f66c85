"""Secure wrap: a new key leaves wrapped, and comes back only for an attested environment (G2, G3)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, TypeVar

from hsm_pool.audit.record import note
from hsm_pool.core import key_release, key_use, lifecycle, roles, secure_wrap
from hsm_pool.core.model import KeyOperation, KeyVersionRecord
from hsm_pool.core.state import View
from hsm_pool.crypto import algorithms, operations
from hsm_pool.crypto.algorithms import Algorithm
from hsm_pool.crypto.loaded_keys import LoadedKey
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import DecryptionFailed
from hsm_pool.net import convert
from hsm_pool.net.interceptors import current_access
from hsm_pool.net.key_release import API_VERSION, encrypted_key
from hsm_pool.partition.partition import Partition
from hsm_pool.tokens.attestation import AttestationVerifier
from mhsm.crypto.v1 import crypto_pb2
from security_domain.encoding import canonical, encode

T = TypeVar("T")

ENCRYPTION_ALGORITHM: Final = "RSA_AES_KEY_WRAP_256"
"""What an unwrapped key is encrypted to the environment with; Azure's request has no field for another."""


class SecureWraps:
    """Wraps and unwraps securely with keys of one partition."""

    def __init__(self, partition: Partition, verifier: AttestationVerifier) -> None:
        self._partition = partition
        self._verifier = verifier

    def wrap(
        self, request: crypto_pb2.SecureWrapKeyRequest, until: float
    ) -> crypto_pb2.SecureWrapKeyResponse:
        """Make a key and return it wrapped; nobody has it in any other form.

        Raises:
            OperationNotPermitted: The version does not wrap securely.
            KeyNotUsable: It is disabled, not yet valid or expired.
            AlgorithmNotSupported: The algorithm does not wrap securely, or not with this key.
            NotFresh: The freshness lease ran out.
        """

        def wrapped(
            key: LoadedKey, version: KeyVersionRecord, algorithm: Algorithm
        ) -> crypto_pb2.SecureWrapKeyResponse:
            new = SecretBytes(os.urandom(secure_wrap.WRAPPED_KEY_BYTES))
            return crypto_pb2.SecureWrapKeyResponse(
                name=convert.version_path(version),
                wrapped_key=operations.wrap_key(key, algorithm, new.reveal()),
            )

        return self._answer(request, KeyOperation.SECURE_WRAP_KEY, until, wrapped)

    def unwrap(
        self, request: crypto_pb2.SecureUnwrapKeyRequest, until: float
    ) -> crypto_pb2.SecureUnwrapKeyResponse:
        """Return what was wrapped, encrypted to the attested environment, as a JWS.

        The attestation comes before the unwrapping: whom the policy does not admit learns nothing of
        what he sent.

        Raises:
            OperationNotPermitted: The version does not unwrap securely.
            AlgorithmNotSupported: The algorithm does not wrap securely, or not with this key.
            KeyReleaseRefused: The attestation is not acceptable, or does not meet the version's policy.
            DecryptionFailed: It does not unwrap, whatever the cause.
            NotFresh: The freshness lease ran out.
        """

        def unwrapped(
            key: LoadedKey, version: KeyVersionRecord, algorithm: Algorithm
        ) -> crypto_pb2.SecureUnwrapKeyResponse:
            policy = secure_wrap.policy_of(version)
            target = self._verifier.verify(request.target_attestation_token)
            key_release.check_target(policy, target.authority, target.claims)
            material = SecretBytes(operations.unwrap_key(key, algorithm, request.wrapped_key))
            if len(material) != secure_wrap.WRAPPED_KEY_BYTES:
                raise DecryptionFailed
            name = convert.version_path(version)
            payload = {
                "request": {
                    "alg": algorithm.name,
                    "api-version": API_VERSION,
                    "kid": name,
                    "value": encode(request.wrapped_key),
                },
                "response": {"key_hsm": encrypted_key(ENCRYPTION_ALGORITHM, target, material)},
            }
            value = self._partition.attester.certify_release(canonical(payload))
            return crypto_pb2.SecureUnwrapKeyResponse(name=name, value=value)

        return self._answer(request, KeyOperation.SECURE_UNWRAP_KEY, until, unwrapped)

    def _answer(
        self,
        request: crypto_pb2.SecureWrapKeyRequest | crypto_pb2.SecureUnwrapKeyRequest,
        operation: KeyOperation,
        until: float,
        compute: Callable[[LoadedKey, KeyVersionRecord, Algorithm], T],
    ) -> T:
        """Read roles and key, compute, and answer only if nothing changed since (G2)."""
        serving = self._partition.serving()
        replica = serving.replica
        key_id, version_id = convert.parse_name(request.name)

        def decide(view: View) -> KeyVersionRecord:
            version = lifecycle.version_of(view, lifecycle.active_key(view, key_id), version_id)
            key_use.check_use(version, operation, replica.pool_time_ms)
            return version

        def answer(version: KeyVersionRecord) -> T:
            algorithm = algorithms.find(
                request.algorithm, version.key_type, version.curve, version.size_bits, operation
            )
            note(key_version=version.version_id, algorithm=algorithm.name)
            return compute(serving.load_key(version), version, algorithm)

        decision = roles.permitted(current_access(roles.key_scope(key_id)), decide)
        changing = "the key or the caller's roles kept changing while it was used"
        return replica.answer(decision, answer, until, changing)
