"""What a pool is asked and answers, in the words of the reference model."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from hsm_pool.client import calls, tokens
from hsm_pool.client.connection import Connection
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2
from security_domain.encoding import decode, encode
from tests.model.reference import ReleaseRule, Version
from tests.role_tables import METHODS
from tests.unit.test_key_release import opened

DIGEST = hashlib.sha256(b"to be signed").digest()
ACTIONS = {method.rpartition("/")[2]: action for method, (action, _) in METHODS.items()}
"""The data action of each method, by the name of the method alone."""
METHOD_OF_OPERATION = {
    "SIGN": "Sign",
    "VERIFY": "Verify",
    "ENCRYPT": "Encrypt",
    "DECRYPT": "Decrypt",
    "WRAP_KEY": "WrapKey",
    "UNWRAP_KEY": "UnwrapKey",
}


def moment(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def numbers(operations: frozenset[str]) -> list[keys_pb2.KeyOperation.ValueType]:
    return [keys_pb2.KeyOperation.Value(f"KEY_OPERATION_{name}") for name in sorted(operations)]


def as_reference(key: keys_pb2.Key) -> Version:
    operations = (keys_pb2.KeyOperation.Name(o).removeprefix("KEY_OPERATION_") for o in key.key_operations)
    attributes = key.attributes
    assert attributes.exportable == key.HasField("release_policy")
    return Version(
        key.name.rpartition("/")[2],
        frozenset(operations),
        attributes.enabled,
        attributes.not_before.ToMilliseconds(),
        attributes.expires.ToMilliseconds(),
        dict(key.tags),
        release_rule(key.release_policy) if attributes.exportable else None,
    )


class NotTheirs(Exception):
    """The pool took something for a key's work that is not."""


def operate(client: Pool, name: str, operation: str, made: Any) -> Any:
    """Do an operation; without something made before, a failed inverse counts as done."""
    match operation:
        case "SIGN":
            return client.sign(name, "ES256", DIGEST)
        case "VERIFY":
            return _judged(client.verify_batch(name, "ES256", [(DIGEST, made)]) == [True], made)
        case "ENCRYPT":
            return client.encrypt(name, "A256GCM", DIGEST, b"data")
        case "WRAP_KEY":
            return client.wrap_key(name, "A256KW", DIGEST)
    try:
        if operation == "DECRYPT":
            done = client.decrypt(name, "A256GCM", made or crypto_pb2.Ciphertext(ciphertext=b"nothing"))
        else:
            done = client.unwrap_key(name, "A256KW", made or b"nothing")
    except MHSMError as error:
        if error.reason != "DECRYPTION_FAILED":
            raise
        return _judged(correct=False, made=made)
    return _judged(done == DIGEST, made)


def _judged(correct: bool, made: Any) -> bool:
    """What was made by the key must be right; nothing at all must be wrong."""
    if correct != bool(made):
        raise NotTheirs
    return True


# -- release -------------------------------------------------------------------------------


def release_rule(policy: keys_pb2.KeyReleasePolicy) -> ReleaseRule:
    (authority,) = json.loads(policy.data)["anyOf"]
    (condition,) = authority["anyOf"]
    return ReleaseRule(condition["equals"], policy.immutable)


class Environments:
    """Attested environments, one of each level, that an authority of the pool vouches for."""

    def __init__(self, connection: Connection, levels: tuple[int, ...]) -> None:
        self._key = rsa.generate_private_key(65_537, 2048)
        modulus = encode(self._key.public_key().public_numbers().n.to_bytes(256, "big"))
        key = {"kty": "RSA", "kid": "environment", "key_ops": ["encrypt"], "n": modulus, "e": "AQAB"}
        self._authority = tokens.development_authority(connection)
        self._tokens = {
            level: tokens.development_attestation(connection, {"level": level}, [key])["attestation_token"]
            for level in levels
        }

    def policy(self, rule: ReleaseRule) -> keys_pb2.KeyReleasePolicy:
        conditions = [{"claim": "level", "equals": rule.level}]
        document = {"version": "1.0.0", "anyOf": [{"authority": self._authority, "anyOf": conditions}]}
        return calls.release_policy(json.dumps(document).encode(), immutable=rule.immutable)

    def released(self, client: Pool, name: str, level: int) -> tuple[str, bytes]:
        """Have a key released to the environment of a level; 0: to one that nobody vouches for.

        Returns:
            The version's name, and its public key (DER); of an oct key the number of its octets.
        """
        jws = client.release_key(name, self._tokens.get(level, "no token"))
        answer = json.loads(decode(jws.split(".")[1]))
        key_hsm = json.loads(decode(answer["response"]["key"]["key"]["key_hsm"]))
        material = opened(key_hsm["header"]["enc"], self._key, decode(key_hsm["ciphertext"]))
        if answer["response"]["key"]["key"]["kty"] == "oct":
            return answer["request"]["kid"], bytes([len(material)])
        public = serialization.load_der_private_key(material, None).public_key()
        return answer["request"]["kid"], public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
