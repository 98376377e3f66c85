"""G8: bad input is a typed answer; nothing changes, nothing crashes, nothing internal is told."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hsm_pool import errors, limits
from hsm_pool.client import calls
from hsm_pool.client.channels import credentials
from hsm_pool.client.errors import CallRefused, PoolUnreachable, from_rpc
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from hsm_pool.provisioning.pki import Authority
from mhsm.crypto.v1 import crypto_pb2, crypto_pb2_grpc
from mhsm.keys.v1 import keys_pb2
from mhsm.peer.v1 import peer_pb2
from mhsm.security_domain.v1 import security_domain_pb2
from tests.running_pool import RunningPool, TestOfficer, changes

pytestmark = pytest.mark.pool

DIGEST = hashlib.sha256(b"to be signed").digest()
EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
OCT = {"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": 256}
USED_REQUEST_ID = "7d1f0c52-5a3e-4d0b-9c64-0f3b2c8e1a77"
SOME_UUID = "0e6a4b0f-1c2d-4e3f-8a9b-5c6d7e8f9012"
NO_VERSION = "0" * 32
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
INTERNAL_TEXT = re.compile(
    r"Traceback|\.py\b|Exception |hsm_pool|object at 0x|(^|[\s\"'(])/[a-z]+/|Error\("
    r"|cryptography|site-packages|google\.protobuf"
)
KEYS = "/mhsm.keys.v1.KeyService/"
CRYPTO = "/mhsm.crypto.v1.CryptoService/"
CEREMONIES = "/mhsm.security_domain.v1.SecurityDomainService/"


@dataclass(frozen=True)
class Case:
    """A request that must be refused; a callable makes it when the test runs."""

    name: str
    method: str
    request: Message | bytes | Callable[[], Message]
    error: type[MHSMError]

    def octets(self) -> bytes:
        request = self.request() if callable(self.request) else self.request
        return request if isinstance(request, bytes) else request.SerializeToString()


def request_id() -> str:
    return str(uuid.uuid4())


# -- what is looked at before and after every case ---------------------------------------


class Watched:
    """A pool with keys of every state, and raw calls to its first partition."""

    def __init__(self, pool: RunningPool) -> None:
        self.pool = pool
        self._operator = pool.client("administrator")
        self.channels = {
            name: self.channel(Path(identity.certificate_file), Path(identity.key_file))
            for name, identity in pool.connection.clients.items()
        }

    def channel(self, certificate: Path, key: Path) -> grpc.Channel:
        connection = self.pool.connection
        credentials = grpc.ssl_channel_credentials(
            Path(connection.client_ca_file).read_bytes(), key.read_bytes(), certificate.read_bytes()
        )
        return grpc.secure_channel(connection.partitions[0].endpoint, credentials, options=UNLIMITED)

    def snapshot(self) -> list[tuple[object, ...]]:
        """Return changes of the chain, incarnation and state of each partition, and all process ids."""
        statuses = [self._operator.partition_status(index) for index in range(3)]
        return [
            *((changes(s), s.incarnation, s.state) for s in statuses),
            tuple(self.pool.all_process_ids()),
        ]

    def close(self) -> None:
        self._operator.close()
        for channel in self.channels.values():
            channel.close()


def time_of(year: int) -> datetime:
    return datetime(year, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def watched(pool: RunningPool) -> Iterator[Watched]:
    attributes = calls.attributes
    with pool.client() as client:
        client.create_key("ec", **EC, request_id=USED_REQUEST_ID)
        client.create_key("p384", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P384)
        client.create_key("rsa", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048)
        client.create_key("oct", **OCT)
        client.create_key("verifier", **EC, key_operations=[keys_pb2.KEY_OPERATION_VERIFY])
        client.create_key("decrypter", **OCT, key_operations=[keys_pb2.KEY_OPERATION_DECRYPT])
        client.create_key("disabled", **EC, key_attributes=attributes(enabled=False))
        client.create_key("disabled-oct", **OCT, key_attributes=attributes(enabled=False))
        client.create_key("early", **EC, key_attributes=attributes(not_before=time_of(2200)))
        client.create_key("early-oct", **OCT, key_attributes=attributes(not_before=time_of(2200)))
        client.create_key("expired", **EC, key_attributes=attributes(expires=time_of(2020)))
        client.create_key("expired-oct", **OCT, key_attributes=attributes(expires=time_of(2020)))
        client.create_key("deleted", **EC)
        client.delete_key("keys/deleted")
    made = Watched(pool)
    yield made
    made.close()


# -- what a refusal looks like -----------------------------------------------------------


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def check_texts(error: Any) -> None:
    """Assert that neither the message nor a trailer tells anything internal."""
    texts = [error.details() or ""]
    for _, value in error.trailing_metadata() or ():
        texts.append(value.decode("latin-1") if isinstance(value, bytes) else value)
    for text in texts:
        assert not INTERNAL_TEXT.search(text), f"internal text is shown: {text!r}"


def check_status(status: status_pb2.Status | None, expected: type[MHSMError]) -> None:
    """Assert google.rpc.Status with exactly one detail: the ErrorInfo of the expected error."""
    assert status is not None, "there is no google.rpc.Status"
    assert len(status.details) == 1
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("mhsm", expected.reason)
    assert info.metadata["definite"] == ("true" if expected.definite else "false")
    assert status.message


def check_error(error: Any, expected: type[MHSMError]) -> None:
    """Assert code, the one ErrorInfo, its domain and reason, and the class the client makes of it."""
    assert error.code().name == expected.code, error
    check_status(rpc_status.from_call(error), expected)
    check_texts(error)
    assert type(from_rpc(error)) is expected


def raw(channel: grpc.Channel, method: str, octets: bytes) -> object:
    """Call with these very octets."""
    if method.endswith("/StreamOperations"):
        return list(channel.stream_stream(method)(iter([octets]), timeout=10))
    return channel.unary_unary(method)(octets, timeout=10)


# -- cases -------------------------------------------------------------------------------


def sign(name: str = "keys/ec", algorithm: str = "ES256", digests: tuple[bytes, ...] = (DIGEST,)) -> Message:
    return crypto_pb2.SignRequest(name=name, algorithm=algorithm, digests=digests)


def verify(name: str, algorithm: str, digest: bytes) -> Message:
    item = crypto_pb2.DigestSignature(digest=digest, signature=bytes(64))
    return crypto_pb2.VerifyRequest(name=name, algorithm=algorithm, items=[item])


def encrypt(name: str, algorithm: str, plaintext: bytes, additional_data: bytes = b"") -> Message:
    item = crypto_pb2.Plaintext(plaintext=plaintext, additional_data=additional_data)
    return crypto_pb2.EncryptRequest(name=name, algorithm=algorithm, items=[item])


def decrypt(name: str, algorithm: str, ciphertext: bytes, nonce: int = 12, tag: int = 16) -> Message:
    item = crypto_pb2.Ciphertext(
        ciphertext=ciphertext, initialization_vector=bytes(nonce), authentication_tag=bytes(tag)
    )
    return crypto_pb2.DecryptRequest(name=name, algorithm=algorithm, items=[item])


def wrap(name: str, algorithm: str, *keys: bytes) -> Message:
    return crypto_pb2.WrapKeyRequest(name=name, algorithm=algorithm, keys=keys)


def unwrap(name: str, algorithm: str, *wrapped: bytes) -> Message:
    return crypto_pb2.UnwrapKeyRequest(name=name, algorithm=algorithm, wrapped_keys=wrapped)


def create(**fields: Any) -> Message:
    chosen = {"key_id": "new", **EC, "request_id": request_id(), **fields}
    return keys_pb2.CreateKeyRequest(**chosen)


def update(name: str = "keys/ec", **fields: Any) -> Message:
    return keys_pb2.UpdateKeyRequest(**{"name": name, "request_id": request_id(), **fields})


def attributes(**fields: Any) -> keys_pb2.KeyAttributes:
    return keys_pb2.KeyAttributes(**fields)


def imported(key: Any, encryption: Any = None) -> Message:
    material = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )
    return import_request(pkcs8_der=material)


def import_request(**form: bytes) -> Message:
    material = keys_pb2.KeyMaterialSecret(**form)
    return keys_pb2.ImportKeyRequest(key_id="new", material=material, request_id=request_id())


def padded_cases() -> Iterator[Case]:
    invalid, failed, length = errors.InvalidField, errors.DecryptionFailed, errors.DigestLength
    cbc, padded, wrapped = "A256CBC", "A256CBCPAD", "CKM_AES_KEY_WRAP_PAD"
    yield Case("encrypt: CBC, data", "Encrypt", encrypt("keys/oct", cbc, b"x", b"data"), invalid)
    yield Case("encrypt: CBC, nothing", "Encrypt", encrypt("keys/oct", cbc, b""), invalid)
    yield Case("decrypt: CBC, tag", "Decrypt", decrypt("keys/oct", padded, bytes(16), 16), invalid)
    yield Case("decrypt: CBC, padding", "Decrypt", decrypt("keys/oct", padded, bytes(16), 16, 0), failed)
    yield Case("decrypt: CBC, part of a block", "Decrypt", decrypt("keys/oct", cbc, b"x", 16, 0), failed)
    yield Case("decrypt: CBC, vector", "Decrypt", decrypt("keys/oct", cbc, bytes(16), 12, 0), failed)
    yield Case("decrypt: RSA1_5, short", "Decrypt", decrypt("keys/rsa", "RSA1_5", b"x" * 255), failed)
    yield Case("sign: RSNULL, nothing", "Sign", sign("keys/rsa", "RSNULL", (b"",)), length)
    yield Case("sign: RSNULL, too long", "Sign", sign("keys/rsa", "RSNULL", (bytes(246),)), length)
    yield Case("unwrap: with padding", "UnwrapKey", unwrap("keys/oct", wrapped, bytes(24)), failed)


def crypto_cases() -> Iterator[Case]:
    algorithm, not_usable = errors.AlgorithmNotSupported, errors.KeyNotUsable
    invalid, large, length = errors.InvalidField, errors.PayloadTooLarge, errors.DigestLength
    failed, not_permitted = errors.DecryptionFailed, errors.OperationNotPermitted
    for name, key, asked in (
        ("of another type", "keys/ec", "RS256"),
        ("of another type, RSA", "keys/rsa", "ES256"),
        ("of another curve", "keys/ec", "ES384"),
        ("of another curve, P-384", "keys/p384", "ES256"),
        ("that does not sign", "keys/rsa", "RSA-OAEP-256"),
        ("unknown", "keys/ec", "none"),
        ("in lower case", "keys/ec", "es256"),
        ("missing", "keys/ec", ""),
        ("very long", "keys/ec", "A" * 100_000),
    ):
        yield Case(f"sign: algorithm {name}", "Sign", sign(key, asked), algorithm)
    yield Case("encrypt: algorithm that signs", "Encrypt", encrypt("keys/rsa", "RS256", b"x"), algorithm)
    yield Case(
        "encrypt: algorithm of another size", "Encrypt", encrypt("keys/oct", "A128GCM", b""), algorithm
    )
    yield Case("encrypt: algorithm that wraps", "Encrypt", encrypt("keys/oct", "A256KW", b""), algorithm)
    yield Case("wrap: algorithm that encrypts", "WrapKey", wrap("keys/oct", "A256GCM", bytes(32)), algorithm)
    yield Case("sign: not permitted", "Sign", sign("keys/verifier"), not_permitted)
    yield Case("sign: an oct key", "Sign", sign("keys/oct"), not_permitted)
    yield Case("encrypt: not permitted", "Encrypt", encrypt("keys/decrypter", "A256GCM", b""), not_permitted)
    yield Case("wrap: not permitted", "WrapKey", wrap("keys/decrypter", "A256KW", bytes(32)), not_permitted)
    for state in ("disabled", "early", "expired"):
        yield Case(f"sign: {state}", "Sign", sign(f"keys/{state}"), not_usable)
        oct_name = f"keys/{state}-oct"
        yield Case(f"encrypt: {state}", "Encrypt", encrypt(oct_name, "A256GCM", b""), not_usable)
        yield Case(f"wrap: {state}", "WrapKey", wrap(oct_name, "A256KW", bytes(32)), not_usable)
    for size in (0, 31, 33, 64, 70_000):
        yield Case(f"sign: digest of {size}", "Sign", sign(digests=(bytes(size),)), length)
        yield Case(f"verify: digest of {size}", "Verify", verify("keys/ec", "ES256", bytes(size)), length)
    yield Case("sign: one of many digests", "Sign", sign(digests=(DIGEST,) * 9 + (b"short",)), length)
    yield Case("sign: RSA digest", "Sign", sign("keys/rsa", "PS512"), length)
    over = bytes(limits.PAYLOAD_BYTES_MAX + 1)
    yield Case("encrypt: plaintext", "Encrypt", encrypt("keys/oct", "A256GCM", over), large)
    yield Case("encrypt: additional data", "Encrypt", encrypt("keys/oct", "A256GCM", b"", over), large)
    yield Case("decrypt: ciphertext", "Decrypt", decrypt("keys/oct", "A256GCM", over), large)
    yield Case("encrypt: RSA", "Encrypt", encrypt("keys/rsa", "RSA-OAEP-256", bytes(191)), large)
    yield Case("encrypt: RSA, data", "Encrypt", encrypt("keys/rsa", "RSA-OAEP-256", b"", b"x"), invalid)
    yield Case("wrap: RSA", "WrapKey", wrap("keys/rsa", "RSA-OAEP-256", bytes(191)), large)
    yield Case("wrap: too long", "WrapKey", wrap("keys/oct", "A256KW", bytes(1032)), large)
    for size in (0, 8, 15, 17, 31):
        yield Case(f"wrap: {size} bytes", "WrapKey", wrap("keys/oct", "A256KW", bytes(size)), invalid)
    yield Case("sign: batch of 257", "Sign", sign(digests=(DIGEST,) * 257), large)
    yield Case("sign: RSA batch of 33", "Sign", sign("keys/rsa", "RS256", (DIGEST,) * 33), large)
    yield Case("wrap: batch of 257", "WrapKey", wrap("keys/oct", "A256KW", *[bytes(32)] * 257), large)
    yield Case("wrap: RSA batch of 33", "WrapKey", wrap("keys/rsa", "RSA-OAEP-256", *[b"k"] * 33), large)
    yield Case("sign: empty batch", "Sign", sign(digests=()), invalid)
    yield Case("verify: empty batch", "Verify", crypto_pb2.VerifyRequest(name="keys/ec"), invalid)
    yield Case("encrypt: empty batch", "Encrypt", crypto_pb2.EncryptRequest(name="keys/oct"), invalid)
    yield Case("decrypt: empty batch", "Decrypt", crypto_pb2.DecryptRequest(name="keys/oct"), invalid)
    yield Case("wrap: empty batch", "WrapKey", wrap("keys/oct", "A256KW"), invalid)
    yield Case("unwrap: empty batch", "UnwrapKey", unwrap("keys/oct", "A256KW"), invalid)
    yield from padded_cases()
    yield Case("decrypt: forged", "Decrypt", decrypt("keys/oct", "A256GCM", b"x" * 32), failed)
    yield Case("decrypt: nothing", "Decrypt", decrypt("keys/oct", "A256GCM", b"", 0, 0), failed)
    yield Case("decrypt: long nonce", "Decrypt", decrypt("keys/oct", "A256GCM", b"x", 13), failed)
    yield Case("decrypt: short tag", "Decrypt", decrypt("keys/oct", "A256GCM", b"x", 12, 15), failed)
    yield Case("decrypt: RSA", "Decrypt", decrypt("keys/rsa", "RSA-OAEP-256", b"x" * 256), failed)
    yield Case("decrypt: short RSA", "Decrypt", decrypt("keys/rsa", "RSA-OAEP-256", b""), failed)
    for size in (0, 7, 16, 40, 41, 5_000):
        yield Case(f"unwrap: {size} bytes", "UnwrapKey", unwrap("keys/oct", "A256KW", b"x" * size), failed)
    yield Case("unwrap: RSA", "UnwrapKey", unwrap("keys/rsa", "RSA-OAEP-256", b"x" * 255), failed)
    for count in (0, 129, 2**32 - 1):
        random = crypto_pb2.GetRandomBytesRequest(count=count)
        yield Case(f"random bytes: {count}", "GetRandomBytes", random, invalid)
    for state, error in (("nothing", errors.KeyNotFound), ("deleted", errors.KeySoftDeleted)):
        yield Case(f"sign: {state}", "Sign", sign(f"keys/{state}"), error)
        yield Case(f"decrypt: {state}", "Decrypt", decrypt(f"keys/{state}", "A256GCM", b""), error)
    yield Case("sign: no version", "Sign", sign(f"keys/ec/versions/{NO_VERSION}"), errors.KeyNotFound)


BAD_NAMES = (
    "",
    "ec",
    "keys",
    "keys/",
    "/keys/ec",
    "keys/ec/",
    "keys//ec",
    "KEYS/ec",
    "secrets/ec",
    "keys/ec/versions",
    "keys/ec/versions/",
    "keys/ec/versions/latest",
    f"keys/ec/versions/{'0' * 31}",
    f"keys/ec/versions/{'0' * 33}",
    f"keys/ec/versions/{'A' * 32}",
    f"keys/ec/versions/{'0' * 32}/x",
    "keys/../ec",
    "keys/ec\n",
    "keys/ec\x00",
    "keys/e c",
    "keys/\u00e9c",
    "keys/\u0665",
    f"keys/{'a' * 128}",
    "keys/" + "a" * 1_000_000,
)
BAD_KEY_IDS = ("", "a/b", "a.b", "a_b", " a", "a\n", "a\x00", "\u00e4", "\u0661", "a" * 128)
BAD_REQUEST_IDS = (
    "",
    "x" * 36,
    SOME_UUID[:-1],
    SOME_UUID + "0",
    SOME_UUID.replace("-", ""),
    "{" + SOME_UUID.replace("-", "") + "}--",
    "0x" + SOME_UUID.replace("-", "")[2:] + "----",
    "1_2" * 8 + "12345678----",
    "\u0661" * 36,
)
BAD_TIMES = {
    "zero": Timestamp(),
    "before 1970": Timestamp(seconds=-1),
    "in year 10000": Timestamp(seconds=253_402_300_800),
    "largest": Timestamp(seconds=2**63 - 1),
    "smallest": Timestamp(seconds=-(2**63)),
    "with negative nanoseconds": Timestamp(seconds=5_000, nanos=-1),
    "with too many nanoseconds": Timestamp(seconds=5_000, nanos=1_000_000_000),
}
BAD_TOKENS = {
    "no base64": "***",
    "blanks": "    ",
    "no octets": "====",
    "cut": base64.urlsafe_b64encode(b"ec")[:-2].decode() + "=",
    "not ASCII": base64.urlsafe_b64encode("\u00e9c".encode()).decode(),
    "not ASCII itself": "\u00e9\u00e9\u00e9\u00e9",
    "no position": base64.urlsafe_b64encode(b"../../x").decode(),
    "control characters": base64.urlsafe_b64encode(b"ec\x00").decode(),
    "too long": base64.urlsafe_b64encode(b"a" * 300).decode(),
}


def policy(**fields: Any) -> keys_pb2.UpdateKeyRotationPolicyRequest:
    name = fields.pop("name", "keys/ec")
    message = keys_pb2.KeyRotationPolicy(**fields)
    return keys_pb2.UpdateKeyRotationPolicyRequest(name=name, policy=message, request_id=request_id())


def action(**fields: Any) -> list[keys_pb2.LifetimeAction]:
    return [keys_pb2.LifetimeAction(**{"action": keys_pb2.LIFETIME_ACTION_TYPE_ROTATE, **fields})]


BAD_POLICIES: dict[str, dict[str, Any]] = {
    "no trigger": {"lifetime_actions": action()},
    "empty trigger": {"lifetime_actions": action(time_after_create="")},
    "no action": {"lifetime_actions": action(action=0, time_after_create="P90D")},
    "unknown action": {"lifetime_actions": action(action=9, time_after_create="P90D")},
    "notify": {
        "lifetime_actions": action(action=keys_pb2.LIFETIME_ACTION_TYPE_NOTIFY, time_before_expiry="P30D"),
        "expiry_time": "P1Y",
    },
    "two actions": {"lifetime_actions": action(time_after_create="P90D") * 2},
    "27 days": {"lifetime_actions": action(time_after_create="P27D")},
    "expiry of 27 days": {"expiry_time": "P27D"},
    "before expiry without expiry": {"lifetime_actions": action(time_before_expiry="P30D")},
    "before expiry 27 days after creation": {
        "lifetime_actions": action(time_before_expiry="P63D"),
        "expiry_time": "P90D",
    },
    "created": {"created": Timestamp(seconds=1)},
    "updated": {"updated": Timestamp(seconds=1)},
    **{
        f"duration {text[:12]!r}": {"lifetime_actions": action(time_after_create=text)}
        for text in (
            "P",
            "90",
            "P90",
            "PD",
            "-P90D",
            "P-90D",
            "P0D",
            "P90D ",
            "p90d",
            "PT720H",
            "P1DT1H",
            "P1.5Y",
            "P101Y",
            "P99999Y",
            "P\u0663\u0660D",
            "P1Y" * 500,
        )
    },
}


def rotation_cases() -> Iterator[Case]:
    invalid, missing = errors.InvalidField, errors.KeyNotFound
    for what, fields in BAD_POLICIES.items():
        yield Case(f"policy: {what}", "UpdateKeyRotationPolicy", policy(**fields), invalid)
    for name, error in (
        ("keys/nothing", missing),
        ("keys/deleted", errors.KeySoftDeleted),
        (f"keys/ec/versions/{NO_VERSION}", invalid),
    ):
        rotate = keys_pb2.RotateKeyRequest(name=name, request_id=request_id())
        yield Case(f"rotate: {name}", "RotateKey", rotate, error)
        show = keys_pb2.GetKeyRotationPolicyRequest(name=name)
        yield Case(f"show policy: {name}", "GetKeyRotationPolicy", show, error)
        update = policy(name=name, expiry_time="P90D")
        yield Case(f"update policy: {name}", "UpdateKeyRotationPolicy", update, error)
    unruled = keys_pb2.RotateKeyRequest(name="keys/ec", request_id=request_id())
    yield Case("rotate: no policy", "RotateKey", unruled, errors.RotationPolicyMissing)
    for bad in BAD_REQUEST_IDS:
        rotate = keys_pb2.RotateKeyRequest(name="keys/ec", request_id=bad)
        yield Case(f"rotate: request_id {bad!r}", "RotateKey", rotate, invalid)


def release_policy(document: bytes = b"{}", **fields: Any) -> keys_pb2.KeyReleasePolicy:
    return keys_pb2.KeyReleasePolicy(data=document, **fields)


def release_cases() -> Iterator[Case]:
    invalid = errors.InvalidField
    exportable = keys_pb2.KeyAttributes(exportable=True)
    good = b'{"version":"1.0.0","anyOf":[{"authority":"a","allOf":[{"claim":"c","equals":1}]}]}'
    for what, fields in {
        "exportable without a policy": {"attributes": exportable},
        "a policy without exportable": {"release_policy": release_policy(good)},
        "a policy that is none": {"attributes": exportable, "release_policy": release_policy()},
        "a policy of another version": {
            "attributes": exportable,
            "release_policy": release_policy(good.replace(b"1.0.0", b"1.0.1")),
        },
        "a policy with greaterOrEquals": {
            "attributes": exportable,
            "release_policy": release_policy(good.replace(b"equals", b"greaterOrEquals")),
        },
        "a policy of 16 KiB and more": {
            "attributes": exportable,
            "release_policy": release_policy(good + b" " * limits.RELEASE_POLICY_BYTES_MAX),
        },
        "a policy of another content type": {
            "attributes": exportable,
            "release_policy": release_policy(good, content_type="text/plain"),
        },
    }.items():
        yield Case(f"create: {what}", "CreateKey", create(**fields), invalid)
    changed = update("keys/ec", release_policy=release_policy(good))
    yield Case("update: a policy for a key that is not exportable", "UpdateKey", changed, invalid)
    for what, document in {
        "no JSON": b"blob",
        "no members": b"{}",
        "a huge blob": b"{" * (limits.IMPORT_BYTES_MAX + 1),
    }.items():
        material = keys_pb2.KeyMaterialSecret(key_transfer_blob=document)
        request = keys_pb2.ImportKeyRequest(key_id="new", material=material, request_id=request_id())
        error = errors.PayloadTooLarge if len(document) > limits.IMPORT_BYTES_MAX else invalid
        yield Case(f"import: {what} for a key transfer blob", "ImportKey", request, error)
    importing = {"key_operations": [keys_pb2.KEY_OPERATION_IMPORT]}
    yield Case("create: an EC key that imports", "CreateKey", create(**importing), invalid)
    for what, fields, error in (
        ("no key", {"name": "keys/nothing"}, errors.KeyNotFound),
        ("deleted", {"name": "keys/deleted"}, errors.KeySoftDeleted),
        ("not exportable", {}, errors.OperationNotPermitted),
        ("unknown algorithm", {"encryption_algorithm": "RSA1_5"}, errors.AlgorithmNotSupported),
        ("long nonce", {"nonce": "n" * (limits.RELEASE_NONCE_LENGTH_MAX + 1)}, invalid),
    ):
        request = keys_pb2.ReleaseKeyRequest(
            **{"name": "keys/ec", "target_attestation_token": "a.b.c", **fields}
        )
        yield Case(f"release: {what}", "ReleaseKey", request, error)


def secure_wrap_keys() -> Iterator[Case]:
    good = b'{"version":"1.0.0","anyOf":[{"authority":"a","allOf":[{"claim":"c","equals":1}]}]}'
    invalid, operations = errors.InvalidField, keys_pb2.KeyOperation
    secure = [operations.KEY_OPERATION_SECURE_WRAP_KEY, operations.KEY_OPERATION_SECURE_UNWRAP_KEY]
    decrypting = [*secure, operations.KEY_OPERATION_DECRYPT]
    policy = release_policy(good)
    for what, fields in {
        "without a policy": {"key_operations": secure},
        "that decrypts": {"key_operations": decrypting, "release_policy": policy},
        "that is exportable": {
            "key_operations": secure,
            "release_policy": policy,
            "attributes": keys_pb2.KeyAttributes(exportable=True),
        },
    }.items():
        request = keys_pb2.CreateKeyRequest(key_id="new", request_id=request_id(), **OCT, **fields)
        yield Case(f"create: a secure wrap key {what}", "CreateKey", request, invalid)
    on_ec = create(key_operations=secure, release_policy=policy)
    yield Case("create: a secure wrap key of type EC", "CreateKey", on_ec, invalid)
    imported = keys_pb2.ImportKeyRequest(
        key_id="new",
        material=keys_pb2.KeyMaterialSecret(octets=bytes(32)),
        key_operations=secure,
        release_policy=policy,
        request_id=request_id(),
    )
    yield Case("import: a secure wrap key", "ImportKey", imported, invalid)
    changed = update("keys/oct", key_operations=secure)
    yield Case("update: to a secure wrap key", "UpdateKey", changed, invalid)


def secure_wrap_cases() -> Iterator[Case]:
    for name, error in (
        ("keys/nothing", errors.KeyNotFound),
        ("keys/deleted", errors.KeySoftDeleted),
        ("keys/oct", errors.OperationNotPermitted),
        ("oct", errors.InvalidField),
    ):
        wrapping = crypto_pb2.SecureWrapKeyRequest(name=name, algorithm="A256KW")
        yield Case(f"secure wrap: {name}", "SecureWrapKey", wrapping, error)
        unwrapping = crypto_pb2.SecureUnwrapKeyRequest(
            name=name, algorithm="A256KW", wrapped_key=bytes(40), target_attestation_token="a.b.c"
        )
        yield Case(f"secure unwrap: {name}", "SecureUnwrapKey", unwrapping, error)


def key_cases() -> Iterator[Case]:
    invalid, missing = errors.InvalidField, errors.KeyNotFound
    deleted, no_deleted = errors.KeySoftDeleted, errors.DeletedKeyNotFound
    for number, name in enumerate(BAD_NAMES):
        shown = repr(name if len(name) < 60 else f"{name[:20]}... of {len(name)}")
        yield Case(f"get: name {shown}", "GetKey", keys_pb2.GetKeyRequest(name=name), invalid)
        if number % 4:
            continue
        yield Case(f"update: name {shown}", "UpdateKey", update(name), invalid)
        request = keys_pb2.DeleteKeyRequest(name=name, request_id=request_id())
        yield Case(f"delete: name {shown}", "DeleteKey", request, invalid)
    with_version = f"keys/ec/versions/{NO_VERSION}"
    for method, kind in (
        ("DeleteKey", keys_pb2.DeleteKeyRequest),
        ("RecoverDeletedKey", keys_pb2.RecoverDeletedKeyRequest),
        ("PurgeDeletedKey", keys_pb2.PurgeDeletedKeyRequest),
    ):
        request = kind(name=with_version, request_id=request_id())
        yield Case(f"{method}: a version", method, request, invalid)
        for bad in BAD_REQUEST_IDS:
            request = kind(name="keys/ec", request_id=bad)
            yield Case(f"{method}: request_id {bad!r}", method, request, invalid)
        request = kind(name="keys/ec", request_id=USED_REQUEST_ID)
        yield Case(f"{method}: reused request_id", method, request, errors.RequestIdReused)
        request = kind(name="keys/nothing", request_id=request_id())
        yield Case(f"{method}: no key", method, request, missing if method == "DeleteKey" else no_deleted)
    delete = keys_pb2.DeleteKeyRequest(name="keys/deleted", request_id=request_id())
    yield Case("delete: deleted", "DeleteKey", delete, deleted)
    recover = keys_pb2.RecoverDeletedKeyRequest(name="keys/ec", request_id=request_id())
    yield Case("recover: active", "RecoverDeletedKey", recover, no_deleted)
    purge = keys_pb2.PurgeDeletedKeyRequest(name="keys/ec", request_id=request_id())
    yield Case("purge: active", "PurgeDeletedKey", purge, no_deleted)
    for name, error in (("keys/nothing", missing), ("keys/deleted", deleted), ("ec", invalid)):
        request = keys_pb2.GetKeyAttestationRequest(name=name)
        yield Case(f"attestation: {name}", "GetKeyAttestation", request, error)
    yield from rotation_cases()
    yield from release_cases()
    for method, kind in (
        ("GetDeletedKey", keys_pb2.GetDeletedKeyRequest),
        ("ListKeyVersions", keys_pb2.ListKeyVersionsRequest),
    ):
        yield Case(f"{method}: a version", method, kind(name=with_version), invalid)
        listing = method == "ListKeyVersions"
        yield Case(f"{method}: no key", method, kind(name="keys/nothing"), missing if listing else no_deleted)
    yield Case("versions: deleted", "ListKeyVersions", kind(name="keys/deleted"), deleted)
    yield Case(
        "get deleted: active", "GetDeletedKey", keys_pb2.GetDeletedKeyRequest(name="keys/ec"), no_deleted
    )
    yield Case("get: no key", "GetKey", keys_pb2.GetKeyRequest(name="keys/nothing"), missing)
    yield Case("get: no version", "GetKey", keys_pb2.GetKeyRequest(name=with_version), missing)
    yield Case("get: deleted", "GetKey", keys_pb2.GetKeyRequest(name="keys/deleted"), deleted)
    yield from list_cases()


def list_cases() -> Iterator[Case]:
    invalid = errors.InvalidField
    for method, kind in (
        ("ListKeys", keys_pb2.ListKeysRequest),
        ("ListDeletedKeys", keys_pb2.ListDeletedKeysRequest),
        ("ListKeyVersions", keys_pb2.ListKeyVersionsRequest),
    ):
        fields = {"name": "keys/ec"} if method == "ListKeyVersions" else {}
        for size in (26, 2**32 - 1):
            yield Case(f"{method}: page of {size}", method, kind(**fields, page_size=size), invalid)
        for what, token in BAD_TOKENS.items():
            yield Case(f"{method}: token {what}", method, kind(**fields, page_token=token), invalid)
    of_another = base64.urlsafe_b64encode(NO_VERSION.encode()).decode()
    request = keys_pb2.ListKeyVersionsRequest(name="keys/ec", page_token=of_another)
    yield Case("ListKeyVersions: token of another key", "ListKeyVersions", request, invalid)


def create_cases() -> Iterator[Case]:
    invalid, rsa_type, oct_type = errors.InvalidField, keys_pb2.KEY_TYPE_RSA, keys_pb2.KEY_TYPE_OCT
    for key_id in BAD_KEY_IDS:
        yield Case(f"create: key id {key_id[:20]!r}", "CreateKey", create(key_id=key_id), invalid)
    for bad in BAD_REQUEST_IDS:
        yield Case(f"create: request_id {bad!r}", "CreateKey", create(request_id=bad), invalid)
    reused = errors.RequestIdReused
    yield Case("create: reused request_id", "CreateKey", create(request_id=USED_REQUEST_ID), reused)
    yield Case("update: reused request_id", "UpdateKey", update(request_id=USED_REQUEST_ID), reused)
    for what, fields in {
        "no type": {"key_type": 0},
        "unknown type": {"key_type": 99},
        "negative type": {"key_type": -1},
        "no curve": {"curve": 0},
        "unknown curve": {"curve": 99},
        "size of another curve": {"size_bits": 384},
        "RSA with a curve": {"key_type": rsa_type, "size_bits": 2048},
        "RSA without a size": {"key_type": rsa_type, "curve": 0},
        "RSA of 1024 bits": {"key_type": rsa_type, "curve": 0, "size_bits": 1024},
        "RSA of 2049 bits": {"key_type": rsa_type, "curve": 0, "size_bits": 2049},
        "RSA of 2^32-1 bits": {"key_type": rsa_type, "curve": 0, "size_bits": 2**32 - 1},
        "RSA with an even exponent": {
            "key_type": rsa_type,
            "curve": 0,
            "size_bits": 2048,
            "public_exponent": 4,
        },
        "EC with an exponent": {"public_exponent": 65_537},
        "ML-DSA of an RSA size": {"key_type": keys_pb2.KEY_TYPE_AKP, "curve": 0, "size_bits": 2048},
        "ML-DSA with a curve": {"key_type": keys_pb2.KEY_TYPE_AKP, "size_bits": 10_496},
        "ML-KEM that signs": {
            "key_type": keys_pb2.KEY_TYPE_AKP,
            "curve": 0,
            "size_bits": 9_472,
            "key_operations": [keys_pb2.KEY_OPERATION_SIGN],
        },
        "ML-DSA that wraps": {
            "key_type": keys_pb2.KEY_TYPE_AKP,
            "curve": 0,
            "size_bits": 10_496,
            "key_operations": [keys_pb2.KEY_OPERATION_WRAP_KEY],
        },
        "oct of 64 bits": {"key_type": oct_type, "curve": 0, "size_bits": 64},
        "oct with a curve": {"key_type": oct_type, "size_bits": 256},
        "unspecified operation": {"key_operations": [0]},
        "unknown operation": {"key_operations": [3, 99]},
        "operation of another type": {"key_operations": [keys_pb2.KEY_OPERATION_ENCRYPT]},
        "16 tags": {"tags": {str(number): "x" for number in range(16)}},
        "long tag name": {"tags": {"n" * 257: "x"}},
        "empty tag name": {"tags": {"": "x"}},
        "long tag value": {"tags": {"n": "x" * 257}},
        "created": {"attributes": attributes(created=Timestamp(seconds=1))},
        "updated": {"attributes": attributes(updated=Timestamp(seconds=1))},
        "recovery level": {"attributes": attributes(recovery_level=1)},
        "unknown recovery level": {"attributes": attributes(recovery_level=99)},
        "recoverable days": {"attributes": attributes(recoverable_days=90)},
        "expires first": {
            "attributes": attributes(not_before=Timestamp(seconds=20), expires=Timestamp(seconds=10))
        },
        "expires at once": {
            "attributes": attributes(not_before=Timestamp(seconds=20), expires=Timestamp(seconds=20))
        },
    }.items():
        yield Case(f"create: {what}", "CreateKey", create(**fields), invalid)
    for what, time in BAD_TIMES.items():
        for field in ("not_before", "expires"):
            timed = attributes(**{field: time})
            yield Case(f"create: {field} {what}", "CreateKey", create(attributes=timed), invalid)
            yield Case(f"update: {field} {what}", "UpdateKey", update(attributes=timed), invalid)
    exists = errors.KeyExists
    yield Case("create: exists", "CreateKey", create(key_id="ec", must_not_exist=True), exists)
    yield Case("create: deleted", "CreateKey", create(key_id="deleted"), exists)


def update_cases() -> Iterator[Case]:
    invalid = errors.InvalidField
    for what, fields in {
        "exportable": {"attributes": attributes(exportable=True)},
        "created": {"attributes": attributes(created=Timestamp(seconds=1))},
        "unknown operation": {"key_operations": [99]},
        "operation of another type": {"key_operations": [keys_pb2.KEY_OPERATION_WRAP_KEY]},
        "16 tags": {"tags": {str(number): "x" for number in range(16)}, "replace_tags": True},
        "long tag value": {"tags": {"n": "x" * 257}, "replace_tags": True},
    }.items():
        yield Case(f"update: {what}", "UpdateKey", update(**fields), invalid)
    for bad in BAD_REQUEST_IDS:
        yield Case(f"update: request_id {bad!r}", "UpdateKey", update(request_id=bad), invalid)
    before = attributes(not_before=Timestamp(seconds=int(time_of(2021).timestamp())))
    yield Case(
        "update: begins after its end", "UpdateKey", update("keys/expired", attributes=before), invalid
    )
    yield Case("update: no key", "UpdateKey", update("keys/nothing"), errors.KeyNotFound)
    yield Case("update: deleted", "UpdateKey", update("keys/deleted"), errors.KeySoftDeleted)
    operations = update("keys/deleted", key_operations=[keys_pb2.KEY_OPERATION_SIGN])
    yield Case("update: deleted, operations", "UpdateKey", operations, errors.KeySoftDeleted)
    no_version = update(f"keys/ec/versions/{NO_VERSION}")
    yield Case("update: no version", "UpdateKey", no_version, errors.KeyNotFound)


def import_cases() -> Iterator[Case]:
    invalid = errors.InvalidField
    over = bytes(limits.IMPORT_BYTES_MAX + 1)
    password = serialization.BestAvailableEncryption(b"password")
    for what, request in {
        "no material": import_request,
        "empty octets": lambda: import_request(octets=b""),
        "15 octets": lambda: import_request(octets=bytes(15)),
        "33 octets": lambda: import_request(octets=bytes(33)),
        "empty PKCS#8": lambda: import_request(pkcs8_der=b""),
        "no PKCS#8": lambda: import_request(pkcs8_der=os.urandom(200)),
        "encrypted PKCS#8": lambda: imported(ec.generate_private_key(ec.SECP256R1()), password),
        "Ed25519": lambda: imported(ed25519.Ed25519PrivateKey.generate()),
        "another curve": lambda: imported(ec.generate_private_key(ec.BrainpoolP256R1())),
        "RSA of 1024 bits": lambda: imported(rsa.generate_private_key(65537, 1024)),
        "RSA with exponent 3": lambda: imported(rsa.generate_private_key(3, 2048)),
    }.items():
        yield Case(f"import: {what}", "ImportKey", request, invalid)
    large = errors.PayloadTooLarge
    yield Case("import: large octets", "ImportKey", lambda: import_request(octets=over), large)
    yield Case("import: large PKCS#8", "ImportKey", lambda: import_request(pkcs8_der=over), large)


def ceremony_cases() -> Iterator[Case]:
    invalid, state = errors.InvalidField, errors.CeremonyState
    domain = security_domain_pb2
    download = domain.DownloadSecurityDomainRequest
    for bad in BAD_REQUEST_IDS:
        request = download(required=2, request_id=bad)
        yield Case(f"download: request_id {bad!r}", "DownloadSecurityDomain", request, invalid)
    large = download(officer_certificates_der=[bytes(17_000)], required=2, request_id=request_id())
    yield Case("download: large certificate", "DownloadSecurityDomain", large, invalid)
    again = download(required=2, request_id=request_id())
    yield Case("download: active", "DownloadSecurityDomain", again, errors.AlreadyActivated)
    yield Case("init recovery: not locked", "InitRecovery", domain.InitRecoveryRequest(), state)
    given = domain.InitRecoveryRequest(security_domain_file=b"{}")
    yield Case("init recovery: not new", "InitRecovery", given, state)
    yield Case("rotate shares: nobody", "RotateShares", domain.RotateSharesRequest(required=2), invalid)
    some = domain.RotateSharesRequest(officer_certificates_der=[b"x"] * 3, required=2)
    yield Case("rotate shares: no certificates", "RotateShares", some, invalid)
    many = domain.RotateSharesRequest(officer_certificates_der=[bytes(9_000)] * 3, required=2)
    yield Case("rotate shares: large certificate", "RotateShares", many, invalid)
    for size in (0, 15, 17, 70_000):
        submit = domain.SubmitShareRequest(attempt_id=bytes(size), submission=b"{}")
        yield Case(f"submit: attempt of {size}", "SubmitShare", submit, invalid)
        cancel = domain.CancelCeremonyRequest(attempt_id=bytes(size))
        yield Case(f"cancel: attempt of {size}", "CancelCeremony", cancel, invalid)
    submit = domain.SubmitShareRequest(attempt_id=bytes(16), submission=b"{}")
    yield Case("submit: no attempt", "SubmitShare", submit, state)
    submit = domain.SubmitShareRequest(attempt_id=bytes(16), submission=bytes(17_000))
    yield Case("submit: large", "SubmitShare", submit, invalid)
    cancel = domain.CancelCeremonyRequest(attempt_id=bytes(16))
    yield Case("cancel: no attempt", "CancelCeremony", cancel, state)


MALFORMED = {
    "no field": b"\xff\xff\xff\xff",
    "cut": b"\x0a\x20abc",
    "not UTF-8": b"\x0a\x04\xff\xfe\xfd\xfc",
    "endless number": b"\x08" + b"\xff" * 12,
    "open group": b"\x0b" * 200,
}


def client_plane_methods() -> list[str]:
    from mhsm.pool.v1 import pool_pb2

    files = (keys_pb2, crypto_pb2, security_domain_pb2, pool_pb2)
    return [
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


def malformed_cases() -> Iterator[Case]:
    for method in client_plane_methods():
        for what, octets in MALFORMED.items():
            # A message without fields keeps any field it does not know, so only broken octets count.
            if what == "not UTF-8" and method.rpartition("/")[2] not in {"Sign", "GetKey", "CreateKey"}:
                continue
            yield Case(f"{method}: {what}", method, octets, errors.InvalidField)


CASES = [
    *(
        Case(case.name, prefix + case.method, case.request, case.error)
        for prefix, group in (
            (CRYPTO, crypto_cases()),
            (CRYPTO, secure_wrap_cases()),
            (KEYS, secure_wrap_keys()),
            (KEYS, key_cases()),
            (KEYS, create_cases()),
            (KEYS, update_cases()),
            (KEYS, import_cases()),
            (CEREMONIES, ceremony_cases()),
        )
        for case in group
    ),
    *malformed_cases(),
]


def identity_of(method: str) -> str:
    return "administrator" if method.startswith((CEREMONIES, "/mhsm.pool.")) else "application"


@pytest.mark.parametrize("case", CASES, ids=[case.name.encode("unicode_escape").decode() for case in CASES])
def test_a_bad_request_is_refused_and_changes_nothing(watched: Watched, case: Case) -> None:
    """G8, with the very octets on the wire."""
    before = watched.snapshot()
    error = refused(lambda: raw(watched.channels[identity_of(case.method)], case.method, case.octets()))
    check_error(error, case.error)
    assert watched.snapshot() == before


@pytest.mark.parametrize("state", ["disabled", "early", "expired"])
def test_a_version_out_of_time_still_verifies_decrypts_and_unwraps(watched: Watched, state: str) -> None:
    """Azure's exemptions: what was signed, encrypted or wrapped stays usable; a disabled key does not."""
    name, oct_name = f"was-{state}", f"was-{state}-oct"
    out_of_use = {
        "disabled": calls.attributes(enabled=False),
        "early": calls.attributes(not_before=time_of(2200)),
        "expired": calls.attributes(expires=time_of(2020)),
    }[state]
    with watched.pool.client() as client:
        for key_id, fields in ((name, EC), (oct_name, OCT)):
            client.create_key(key_id, **fields)
        signature = client.sign(f"keys/{name}", "ES256", DIGEST)
        sealed = client.encrypt(f"keys/{oct_name}", "A256GCM", b"plaintext", b"data")
        wrapped = client.wrap_key(f"keys/{oct_name}", "A256KW", bytes(32))
        for key_id in (name, oct_name):
            client.update_key(f"keys/{key_id}", key_attributes=out_of_use)
        with pytest.raises(errors.KeyNotUsable):
            client.sign(f"keys/{name}", "ES256", DIGEST)

        def allowed() -> Any:
            return pytest.raises(errors.KeyNotUsable) if state == "disabled" else nullcontext()

        with allowed():
            client.verify(f"keys/{name}", "ES256", DIGEST, signature)
        with allowed():
            assert client.decrypt(f"keys/{oct_name}", "A256GCM", sealed) == b"plaintext"
        with allowed():
            assert client.unwrap_key(f"keys/{oct_name}", "A256KW", wrapped) == bytes(32)


CLIENT_CALLS: dict[str, tuple[Callable[[Pool], object], type[MHSMError]]] = {
    "algorithm": (lambda c: c.sign("keys/ec", "RS256", DIGEST), errors.AlgorithmNotSupported),
    "operation": (lambda c: c.sign("keys/verifier", "ES256", DIGEST), errors.OperationNotPermitted),
    "disabled": (lambda c: c.sign("keys/disabled", "ES256", DIGEST), errors.KeyNotUsable),
    "digest": (lambda c: c.sign("keys/ec", "ES256", b"short"), errors.DigestLength),
    "batch": (lambda c: c.sign_batch("keys/ec", "ES256", [DIGEST] * 257), errors.PayloadTooLarge),
    "RSA batch": (lambda c: c.sign_batch("keys/rsa", "RS256", [DIGEST] * 33), errors.PayloadTooLarge),
    "empty batch": (lambda c: c.sign_batch("keys/ec", "ES256", []), errors.InvalidField),
    "key": (lambda c: c.get_key("keys/nothing"), errors.KeyNotFound),
    "soft-deleted": (lambda c: c.get_key("keys/deleted"), errors.KeySoftDeleted),
    "name": (lambda c: c.get_key("nonsense"), errors.InvalidField),
    "payload": (lambda c: c.encrypt("keys/oct", "A256GCM", bytes(70_000)), errors.PayloadTooLarge),
    "unwrap": (lambda c: c.unwrap_key("keys/oct", "A256KW", bytes(40)), errors.DecryptionFailed),
    "random": (lambda c: c.random_bytes(129), errors.InvalidField),
    "page": (lambda c: list(c.list_keys(26)), errors.InvalidField),
    "tags": (lambda c: c.create_key("new", **EC, tags={"n": "x" * 257}), errors.InvalidField),
    "type": (lambda c: c.create_key("new", key_type=99), errors.InvalidField),  # type: ignore[arg-type]
    "exists": (lambda c: c.create_key("ec", **EC, must_not_exist=True), errors.KeyExists),
    "reused": (lambda c: c.delete_key("keys/ec", USED_REQUEST_ID), errors.RequestIdReused),
    "purge": (lambda c: c.purge_deleted_key("keys/ec"), errors.DeletedKeyNotFound),
    "import": (lambda c: c.import_key("new", pkcs8_der=b"nonsense"), errors.InvalidField),
    "permission": (lambda c: c.init_recovery(), errors.PermissionDenied),
    "over 4 MiB": (lambda c: c.sign_batch("keys/ec", "ES256", [bytes(1 << 20)] * 5), CallRefused),
}


@pytest.mark.parametrize("name", CLIENT_CALLS)
def test_the_client_raises_the_typed_error(watched: Watched, name: str) -> None:
    """G8 through the client: one class a reason, never a gRPC error, no second try."""
    call, expected = CLIENT_CALLS[name]
    before = watched.snapshot()
    with watched.pool.client() as client, pytest.raises(MHSMError) as caught:
        call(client)
    assert type(caught.value) is expected
    assert caught.value.definite
    if expected in {errors.InvalidField, errors.PayloadTooLarge, errors.DigestLength}:
        assert caught.value.metadata.keys() == {"field"}
    assert not INTERNAL_TEXT.search(str(caught.value))
    assert watched.snapshot() == before


def test_a_message_over_4_mib_is_refused_by_the_transport(watched: Watched) -> None:
    """G8: it is refused before it is read, so there is a code and no ErrorInfo."""
    before = watched.snapshot()
    octets = sign(digests=(bytes(limits.MESSAGE_BYTES_MAX),)).SerializeToString()
    error: Any = refused(lambda: raw(watched.channels["application"], f"{CRYPTO}Sign", octets))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    check_texts(error)
    assert isinstance(from_rpc(error), CallRefused)
    assert watched.snapshot() == before


def test_a_method_that_does_not_exist_is_unimplemented(watched: Watched) -> None:
    """G8: and it tells nothing."""
    for method in (f"{KEYS}ExportKey", "/mhsm.keys.v1.Nothing/GetKey", "/nonsense"):
        error: Any = refused(lambda method=method: raw(watched.channels["application"], method, b""))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        check_texts(error)


def stream_answers(watched: Watched, messages: list[bytes]) -> tuple[list[Any], grpc.RpcError | None]:
    """Send octets on one stream; return the answers and the error that ended it, if one did."""
    stream = watched.channels["application"].stream_stream(
        f"{CRYPTO}StreamOperations",
        response_deserializer=crypto_pb2.StreamOperationsResponse.FromString,
    )
    answers: list[Any] = []
    try:
        answers.extend(stream(iter(messages), timeout=10))
    except grpc.RpcError as error:
        return answers, error
    return answers, None


def test_bad_messages_on_a_stream(watched: Watched) -> None:
    """G8: a bad batch is answered and the stream goes on; octets that are no message end it, typed."""
    request = crypto_pb2.StreamOperationsRequest
    messages = [
        request(correlation_id=1),
        request(correlation_id=2, sign=sign("keys/nothing")),
        request(correlation_id=3, sign=sign(digests=(b"short",))),
        request(correlation_id=2**64 - 1, sign=sign()),
    ]
    expected = [errors.InvalidField, errors.KeyNotFound, errors.DigestLength]
    before = watched.snapshot()
    answers, error = stream_answers(watched, [message.SerializeToString() for message in messages])
    assert error is None
    assert [answer.correlation_id for answer in answers] == [1, 2, 3, 2**64 - 1]
    for answer, kind in zip(answers, expected, strict=False):
        check_status(answer.error, kind)
        assert not INTERNAL_TEXT.search(str(answer.error))
    assert len(answers[3].sign.signatures) == 1
    good = messages[3].SerializeToString()
    answers, error = stream_answers(watched, [good, b"\xff\xff\xff\xff", good])
    assert error is not None
    check_error(error, errors.InvalidField)
    assert len(answers) <= 1
    assert watched.snapshot() == before


def test_a_request_id_is_good_for_one_request(watched: Watched) -> None:
    """A repeat returns the first answer, on any partition, and is no second change."""
    pool, chosen = watched.pool, request_id()
    with pool.client(partition=0) as first, pool.client(partition=1) as second:
        made = first.create_key("once", **EC, request_id=chosen)
        before = watched.snapshot()
        assert second.create_key("once", **EC, request_id=chosen) == made
        assert first.create_key("once", **EC, request_id=chosen) == made
        assert first.create_key("once", **EC, request_id=chosen.upper()) == made
        with pytest.raises(errors.RequestIdReused):
            second.create_key("twice", **EC, request_id=chosen)
        assert watched.snapshot() == before


# -- the transport -----------------------------------------------------------------------


def expired_certificate(directory: Path, uri: str) -> tuple[bytes, bytes]:
    """Issue a certificate that ended an hour ago, with the customer's own authority."""
    authority = x509.load_pem_x509_certificate((directory / "pki/client-ca.crt").read_bytes())
    authority_key = serialization.load_pem_private_key((directory / "pki/client-ca.key").read_bytes(), None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=2))
        .not_valid_after(now - timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form, encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return certificate.public_bytes(pem), key.private_bytes(pem, form, encryption)


def transport_credentials(pool: RunningPool, kind: str) -> grpc.ChannelCredentials | None:
    """Return what a caller presents; None for a connection without TLS."""
    connection = pool.connection
    roots = Path(connection.client_ca_file).read_bytes()
    uri = f"spiffe://{connection.pool_id}/client/application"
    if kind == "plaintext":
        return None
    if kind == "no certificate":
        return grpc.ssl_channel_credentials(roots)
    if kind == "expired":
        certificate, key = expired_certificate(pool.directory, uri)
    elif kind == "foreign authority":
        certificate, key = Authority("foreign").issue(uri)
    else:
        plane = pool.directory / "nodes/0/pki" / kind
        certificate, key = (plane.with_suffix(suffix).read_bytes() for suffix in (".crt", ".key"))
    return grpc.ssl_channel_credentials(roots, key, certificate)


@pytest.mark.parametrize(
    "kind",
    ["no certificate", "expired", "foreign authority", "plaintext", "peer", "fabric", "node", "store-client"],
)
def test_a_bad_transport_reaches_no_service(watched: Watched, kind: str) -> None:
    """G8: such a caller is stopped in the handshake, and the client says that nothing was sent."""
    before = watched.snapshot()
    endpoint = watched.pool.connection.partitions[0].endpoint
    credentials = transport_credentials(watched.pool, kind)
    with (
        grpc.secure_channel(endpoint, credentials) if credentials else grpc.insecure_channel(endpoint)
    ) as channel:
        octets = create().SerializeToString()
        error: Any = refused(lambda: raw(channel, f"{KEYS}CreateKey", octets))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    shown = from_rpc(error)
    assert type(shown) is PoolUnreachable
    assert shown.definite
    assert not INTERNAL_TEXT.search(str(shown))
    assert watched.snapshot() == before


def test_a_client_refuses_a_server_of_another_authority(watched: Watched) -> None:
    """G8: a server that only pretends to be the pool gets no request."""
    identity = watched.pool.connection.clients["application"]
    credentials = grpc.ssl_channel_credentials(
        Authority("foreign").certificate_pem,
        Path(identity.key_file).read_bytes(),
        Path(identity.certificate_file).read_bytes(),
    )
    with grpc.secure_channel(watched.pool.connection.partitions[0].endpoint, credentials) as channel:
        error = refused(lambda: raw(channel, f"{KEYS}GetKey", b""))
    assert type(from_rpc(error)) is PoolUnreachable


@pytest.mark.parametrize(
    ("plane", "identity", "method", "octets", "expected"),
    [
        (
            "peer",
            "nodes/1/pki/peer",
            "/mhsm.peer.v1.PeerService/Heal",
            b"\xff\xff\xff\xff",
            errors.InvalidField,
        ),
        (
            "peer",
            "nodes/1/pki/peer",
            "/mhsm.peer.v1.PeerService/Heal",
            peer_pb2.HealRequest(nonce=bytes(32), hpke_public_key=b"short").SerializeToString(),
            errors.EvidenceRefused,
        ),
        (
            "node",
            "nodes/1/pki/agent",
            "/mhsm.node.v1.NodeService/NotifyExit",
            b"\xff\xff\xff\xff",
            errors.InvalidField,
        ),
    ],
    ids=["heal: malformed", "heal: no such nonce", "exit notice: malformed"],
)
def test_bad_input_on_the_inner_planes(
    watched: Watched, plane: str, identity: str, method: str, octets: bytes, expected: type[MHSMError]
) -> None:
    """G8 holds for partitions and node agents too."""
    before = watched.snapshot()
    files = watched.pool.directory / identity
    credentials = grpc.ssl_channel_credentials(
        Path(f"{files}-trusted.crt").read_bytes(),
        files.with_suffix(".key").read_bytes(),
        files.with_suffix(".crt").read_bytes(),
    )
    endpoint = getattr(watched.pool.connection.partitions[0], f"{plane}_endpoint")
    with grpc.secure_channel(endpoint, credentials) as channel:
        check_error(refused(lambda: raw(channel, method, octets)), expected)
    assert watched.snapshot() == before


# -- ceremonies --------------------------------------------------------------------------


def bad_downloads(officers: list[TestOfficer]) -> dict[str, tuple[list[bytes], int]]:
    good = [officer.certificate_der for officer in officers]
    return {
        "no officers": ([], 2),
        "two officers": (good[:2], 2),
        "eleven officers": ((good * 4)[:11], 2),
        "an officer twice": ([*good[:2], good[0]], 2),
        "no certificate": ([*good[:2], b"nonsense"], 2),
        "an empty certificate": ([*good[:2], b""], 2),
        "a cut certificate": ([*good[:2], good[2][:-1]], 2),
        "a certificate with a tail": ([*good[:2], good[2] + b"x"], 2),
        "an EC certificate": ([*good[:2], _ec_certificate()], 2),
        "quorum of none": (good, 0),
        "quorum of one": (good, 1),
        "quorum of more than all": (good, 4),
        "quorum of 2^32-1": (good, 2**32 - 1),
    }


def _ec_certificate() -> bytes:
    certificate = x509.load_pem_x509_certificate(Authority("officer").certificate_pem)
    return certificate.public_bytes(serialization.Encoding.DER)


def bad_submissions(good: bytes, stale: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "zeroes": bytes(64),
        "binary": bytes(range(256)) * 8,
        "not UTF-8": b'{"\xff": 1}',
        "null": b"null",
        "list": b"[]",
        "number": b"1" * 10_000,
        "empty object": b"{}",
        "not a number": b'{"format": NaN}',
        "deeply nested lists": b"[" * 16_000,
        "deeply nested objects": b'{"a":' * 3_000,
        "cut": good[:-1],
        "with a tail": good + b"x",
        "doubled": good + good,
        "changed": good.replace(b"A", b"B", 1) if b"A" in good else good[:-5] + b"xxxxx",
        "of another attempt": stale,
        "with a mark": b"\xef\xbb\xbf" + good,
    }


def test_bad_input_to_ceremonies(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> None:
    """G4, G8: before activation and in an unlock; the pool's next right step still works."""
    pool = make_pool(attended=True)
    with pool.client("administrator", partition=0, timeout_seconds=60) as client:
        for what, (certificates, required) in bad_downloads(officers).items():
            with pytest.raises(MHSMError) as caught:
                client.download_security_domain(certificates, required)
            assert type(caught.value) is errors.InvalidField, what
            assert not INTERNAL_TEXT.search(caught.value.message), what
        assert pool.states() == ["PROVISIONED"] * 3
        pool.activate(officers, 2)
        with pool.client() as user:
            user.create_key("kept", **EC)
        pool.kill_everything()
        pool.await_states(["LOCKED"] * 3)
        first = client.init_recovery(0)
        stale = pool.submission(officers[0], first)
        with pytest.raises(errors.CeremonyState):
            client.init_recovery(0)
        client.cancel_ceremony(0, first.attempt_id)
        begun = client.init_recovery(0)
        process_ids = pool.all_process_ids()
        for what, submission in bad_submissions(pool.submission(officers[0], begun), stale).items():
            with pytest.raises(MHSMError) as caught:
                client.submit_share(0, begun.attempt_id, submission)
            assert type(caught.value) is errors.ShareRefused, (what, caught.value)
            assert not INTERNAL_TEXT.search(caught.value.message), what
            assert client.partition_status(0).accepted_shares == 0, what
        assert pool.all_process_ids() == process_ids
        for officer in officers[1:]:
            progress = client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
        assert progress.complete
    pool.await_states(["SERVING"] * 3)
    with pool.client() as user:
        user.sign("keys/kept", "ES256", DIGEST)
    pool.down()


def test_many_large_writes_at_once_fit_the_store(pool: RunningPool) -> None:
    """G1, G8: a batch is bounded in bytes, too; the largest tags that are allowed, thirty at a time."""
    tags = {f"{number:02d}" + "\U0001f511" * 254: "\U0001f511" * 256 for number in range(15)}
    with pool.client(timeout_seconds=30) as client, ThreadPoolExecutor(30) as threads:
        made = [threads.submit(client.create_key, f"large-{number}", **EC, tags=tags) for number in range(30)]
        assert {future.result().key_type for future in made} == {keys_pb2.KEY_TYPE_EC}
        for number in range(30):
            client.delete_key(f"keys/large-{number}")


def test_idle_streams_do_not_starve_the_partition(pool: RunningPool) -> None:
    """G8: streams beyond the bound of a principal are refused as overloaded; other calls go on."""
    import queue

    connection = pool.connection
    endless: queue.Queue[crypto_pb2.StreamOperationsRequest] = queue.Queue()
    with grpc.secure_channel(
        connection.partitions[0].endpoint, credentials(connection, "application")
    ) as channel:
        stub = crypto_pb2_grpc.CryptoServiceStub(channel)
        most = limits.STREAMS_MAX * 3 // 4
        opened = [stub.StreamOperations(iter(endless.get, None)) for _ in range(most + 40)]
        ended: queue.Queue[grpc.StatusCode] = queue.Queue()
        for stream in opened:
            stream.add_done_callback(lambda call: ended.put(call.code()))
        try:
            # The server's threads decide which streams come first, so any 40 of them are refused.
            refused = [ended.get(timeout=60) for _ in range(40)]
            assert set(refused) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert sum(stream.is_active() for stream in opened) == most
            with pool.client(partition=0) as client:
                assert len(client.random_bytes(8)) == 8
        finally:
            for stream in opened:
                stream.cancel()
            for _ in opened:
                endless.put(None)  # type: ignore[arg-type]
