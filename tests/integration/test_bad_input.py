"""G8: bad input is a typed answer; no state change, no crash, no internal text."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hsm_pool import limits
from hsm_pool.client import calls
from hsm_pool.client.channels import credentials
from hsm_pool.errors import BY_REASON, DOMAIN
from hsm_pool.provisioning.pki import Authority
from mhsm.crypto.v1 import crypto_pb2, crypto_pb2_grpc
from mhsm.keys.v1 import keys_pb2, keys_pb2_grpc
from mhsm.security_domain.v1 import security_domain_pb2, security_domain_pb2_grpc
from tests.running_pool import RunningPool

pytestmark = pytest.mark.pool

DIGEST = hashlib.sha256(b"text").digest()
INTERNAL_TEXT = ("Traceback", ".py", "Exception calling", "google.protobuf", "site-packages", "object at")
NOW = datetime.now(UTC)


class Services:
    """Raw stubs of one partition."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.keys = keys_pb2_grpc.KeyServiceStub(channel)
        self.crypto = crypto_pb2_grpc.CryptoServiceStub(channel)


@pytest.fixture(scope="module")
def services(pool: RunningPool) -> Iterator[Services]:
    """Stubs as the application, with the keys that the cases use."""
    with pool.client() as client:
        client.create_key("ec", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
        client.create_key("rsa", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048)
        client.create_key("oct", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=256)
        verify_only = [keys_pb2.KEY_OPERATION_VERIFY]
        client.create_key(
            "verify-only",
            key_type=keys_pb2.KEY_TYPE_EC,
            curve=keys_pb2.CURVE_P256,
            key_operations=verify_only,
        )
        for name, attributes in (
            ("disabled", calls.attributes(enabled=False)),
            ("early", calls.attributes(not_before=NOW + timedelta(days=1))),
            ("late", calls.attributes(expires=NOW - timedelta(days=1))),
        ):
            client.create_key(
                name,
                key_type=keys_pb2.KEY_TYPE_EC,
                curve=keys_pb2.CURVE_P256,
                key_attributes=attributes,
            )
        client.create_key("gone", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=128)
        client.delete_key("keys/gone")
    connection = pool.connection
    options = [("grpc.max_send_message_length", 16 * 1024 * 1024)]
    channel = grpc.secure_channel(
        connection.partitions[0].endpoint, credentials(connection, "application"), options=options
    )
    with channel:
        yield Services(channel)


def new_id() -> str:
    return str(uuid.uuid4())


def sign(
    name: str, algorithm: str = "ES256", digests: list[bytes] | None = None
) -> Callable[[Services], Any]:
    request = crypto_pb2.SignRequest(
        name=name, algorithm=algorithm, digests=[DIGEST] if digests is None else digests
    )
    return lambda services: services.crypto.Sign(request, timeout=10)


def create(**fields: Any) -> Callable[[Services], Any]:
    base: dict[str, Any] = {
        "key_id": "never-made",
        "key_type": keys_pb2.KEY_TYPE_OCT,
        "size_bits": 256,
        "request_id": new_id(),
    }
    request = keys_pb2.CreateKeyRequest(**{**base, **fields})
    return lambda services: services.keys.CreateKey(request, timeout=10)


def get(name: str) -> Callable[[Services], Any]:
    return lambda services: services.keys.GetKey(keys_pb2.GetKeyRequest(name=name), timeout=10)


def update(name: str, **fields: Any) -> Callable[[Services], Any]:
    request = keys_pb2.UpdateKeyRequest(name=name, **{"request_id": new_id(), **fields})
    return lambda services: services.keys.UpdateKey(request, timeout=10)


def delete(name: str) -> Callable[[Services], Any]:
    request = keys_pb2.DeleteKeyRequest(name=name, request_id=new_id())
    return lambda services: services.keys.DeleteKey(request, timeout=10)


def list_keys(**fields: Any) -> Callable[[Services], Any]:
    return lambda services: services.keys.ListKeys(keys_pb2.ListKeysRequest(**fields), timeout=10)


def encrypt(name: str, algorithm: str, plaintext: bytes) -> Callable[[Services], Any]:
    request = crypto_pb2.EncryptRequest(
        name=name, algorithm=algorithm, items=[crypto_pb2.Plaintext(plaintext=plaintext)]
    )
    return lambda services: services.crypto.Encrypt(request, timeout=10)


def import_(**material: bytes) -> Callable[[Services], Any]:
    request = keys_pb2.ImportKeyRequest(
        key_id="never-imported",
        material=keys_pb2.KeyMaterialSecret(**material),
        request_id=new_id(),
    )
    return lambda services: services.keys.ImportKey(request, timeout=10)


def decrypt_junk(services: Services) -> Any:
    item = crypto_pb2.Ciphertext(
        ciphertext=b"junk", initialization_vector=bytes(12), authentication_tag=bytes(16)
    )
    request = crypto_pb2.DecryptRequest(name="keys/oct", algorithm="A256GCM", items=[item])
    return services.crypto.Decrypt(request, timeout=10)


def random_bytes(count: int) -> Callable[[Services], Any]:
    request = crypto_pb2.GetRandomBytesRequest(count=count)
    return lambda services: services.crypto.GetRandomBytes(request, timeout=10)


CASES: dict[str, tuple[Callable[[Services], Any], str]] = {
    "algorithm of another key type": (sign("keys/ec", "RS256"), "ALGORITHM_NOT_SUPPORTED"),
    "algorithm of another curve": (sign("keys/ec", "ES384", [bytes(48)]), "ALGORITHM_NOT_SUPPORTED"),
    "unknown algorithm": (sign("keys/ec", "none"), "ALGORITHM_NOT_SUPPORTED"),
    "signing algorithm to encrypt": (encrypt("keys/rsa", "RS256", b"x"), "ALGORITHM_NOT_SUPPORTED"),
    "key size of another algorithm": (encrypt("keys/oct", "A128GCM", b"x"), "ALGORITHM_NOT_SUPPORTED"),
    "operation that the key does not permit": (sign("keys/verify-only"), "OPERATION_NOT_PERMITTED"),
    "disabled key": (sign("keys/disabled"), "KEY_NOT_USABLE"),
    "key that is not valid yet": (sign("keys/early"), "KEY_NOT_USABLE"),
    "expired key": (sign("keys/late"), "KEY_NOT_USABLE"),
    "digest too short": (sign("keys/ec", digests=[bytes(31)]), "DIGEST_LENGTH"),
    "one digest of many too long": (sign("keys/ec", digests=[DIGEST, bytes(33)]), "DIGEST_LENGTH"),
    "empty batch": (sign("keys/ec", digests=[]), "INVALID_FIELD"),
    "batch too large, EC": (sign("keys/ec", digests=[DIGEST] * 257), "PAYLOAD_TOO_LARGE"),
    "batch too large, RSA": (sign("keys/rsa", "RS256", [DIGEST] * 33), "PAYLOAD_TOO_LARGE"),
    "payload too large": (
        encrypt("keys/oct", "A256GCM", bytes(limits.PAYLOAD_BYTES_MAX + 1)),
        "PAYLOAD_TOO_LARGE",
    ),
    "payload too large for RSA": (encrypt("keys/rsa", "RSA-OAEP-256", bytes(191)), "PAYLOAD_TOO_LARGE"),
    "ciphertext that is none": (decrypt_junk, "DECRYPTION_FAILED"),
    "unknown key": (sign("keys/unknown"), "KEY_NOT_FOUND"),
    "unknown version": (sign(f"keys/ec/versions/{'0' * 32}"), "KEY_NOT_FOUND"),
    "deleted key": (get("keys/gone"), "KEY_SOFT_DELETED"),
    "name without a collection": (get("ec"), "INVALID_FIELD"),
    "name with a traversal": (get("keys/../ec"), "INVALID_FIELD"),
    "empty name": (get(""), "INVALID_FIELD"),
    "name too long": (get("keys/" + "a" * 128), "INVALID_FIELD"),
    "version that is none": (get("keys/ec/versions/latest"), "INVALID_FIELD"),
    "key id with a space": (create(key_id="a b"), "INVALID_FIELD"),
    "key type missing": (create(key_type=0), "INVALID_FIELD"),
    "unknown key type": (create(key_type=99), "INVALID_FIELD"),
    "key size that does not exist": (create(size_bits=100), "INVALID_FIELD"),
    "RSA too short": (create(key_type=keys_pb2.KEY_TYPE_RSA, size_bits=1024), "INVALID_FIELD"),
    "EC without a curve": (create(key_type=keys_pb2.KEY_TYPE_EC, size_bits=0), "INVALID_FIELD"),
    "unknown curve": (create(key_type=keys_pb2.KEY_TYPE_EC, curve=77), "INVALID_FIELD"),
    "operation of another type": (create(key_operations=[keys_pb2.KEY_OPERATION_SIGN]), "INVALID_FIELD"),
    "unknown operation": (create(key_operations=[42]), "INVALID_FIELD"),
    "request id missing": (create(request_id=""), "INVALID_FIELD"),
    "request id that is none": (create(request_id="x" * 36), "INVALID_FIELD"),
    "too many tags": (create(tags={str(n): "" for n in range(16)}), "INVALID_FIELD"),
    "tag too long": (create(tags={"a": "b" * 257}), "INVALID_FIELD"),
    "expires before not_before": (
        create(attributes=calls.attributes(not_before=NOW, expires=NOW - timedelta(days=1))),
        "INVALID_FIELD",
    ),
    "time far outside": (
        create(attributes={"expires": {"seconds": 2**50}}),
        "INVALID_FIELD",
    ),
    "output-only field": (create(attributes={"created": {"seconds": 1}}), "INVALID_FIELD"),
    "existing key, new only": (
        create(key_id="oct", must_not_exist=True),
        "KEY_EXISTS",
    ),
    "deleted key made anew": (create(key_id="gone"), "KEY_EXISTS"),
    "exportable changed": (
        update("keys/ec", attributes=calls.attributes(exportable=True)),
        "INVALID_FIELD",
    ),
    "update of an unknown key": (update("keys/unknown"), "KEY_NOT_FOUND"),
    "operations of another type": (
        update("keys/ec", key_operations=[keys_pb2.KEY_OPERATION_ENCRYPT]),
        "INVALID_FIELD",
    ),
    "delete of an unknown key": (delete("keys/unknown"), "KEY_NOT_FOUND"),
    "delete of a version": (delete(f"keys/ec/versions/{'0' * 32}"), "INVALID_FIELD"),
    "delete of a deleted key": (delete("keys/gone"), "KEY_SOFT_DELETED"),
    "page too large": (list_keys(page_size=26), "INVALID_FIELD"),
    "page token that is none": (list_keys(page_token="%%%"), "INVALID_FIELD"),
    "imported junk": (import_(pkcs8_der=b"junk"), "INVALID_FIELD"),
    "imported octets of a strange length": (import_(octets=bytes(17)), "INVALID_FIELD"),
    "imported too much": (import_(octets=bytes(limits.IMPORT_BYTES_MAX + 1)), "PAYLOAD_TOO_LARGE"),
    "nothing imported": (import_(), "INVALID_FIELD"),
    "no random bytes": (random_bytes(0), "INVALID_FIELD"),
    "too many random bytes": (random_bytes(129), "INVALID_FIELD"),
}


def heads(pool: RunningPool) -> list[tuple[int, str, int]]:
    """Return what a change or a crash of any partition would change."""
    return [
        (status.applied_sequence, status.head_digest_prefix, status.incarnation)
        for status in (pool.status(index) for index in range(3))
    ]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_a_typed_error_without_effect(pool: RunningPool, services: Services, case: str) -> None:
    call, reason = CASES[case]
    before = heads(pool)
    with pytest.raises(grpc.RpcError) as failed:
        call(services)
    status = rpc_status.from_call(failed.value)
    assert status is not None
    infos = []
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            infos.append(info)
    assert [(info.reason, info.domain) for info in infos] == [(reason, DOMAIN)]
    assert failed.value.code().name == BY_REASON[reason].code
    assert infos[0].metadata["definite"] == "true"
    assert not [text for text in INTERNAL_TEXT if text in status.message]
    assert heads(pool) == before


@pytest.mark.parametrize(
    "octets", [b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f", b"\x08"], ids=["junk", "length", "cut"]
)
def test_a_malformed_message_is_refused(pool: RunningPool, services: Services, octets: bytes) -> None:
    before = heads(pool)
    call = services.channel.unary_unary("/mhsm.keys.v1.KeyService/CreateKey")
    with pytest.raises(grpc.RpcError) as failed:
        call(octets, timeout=10)
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "Traceback" not in failed.value.details()
    assert heads(pool) == before


def test_a_message_over_the_bound_is_refused(pool: RunningPool, services: Services) -> None:
    before = heads(pool)
    call = services.channel.unary_unary("/mhsm.keys.v1.KeyService/CreateKey")
    with pytest.raises(grpc.RpcError) as failed:
        call(bytes(limits.MESSAGE_BYTES_MAX + 1), timeout=10)
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert heads(pool) == before


def test_a_bad_batch_does_not_end_a_stream(services: Services) -> None:
    """Good, bad, good: three answers in order, the middle one a status."""
    good = crypto_pb2.SignRequest(name="keys/ec", algorithm="ES256", digests=[DIGEST])
    bad = crypto_pb2.SignRequest(name="keys/ec", algorithm="RS256", digests=[DIGEST])
    requests = [
        crypto_pb2.StreamOperationsRequest(correlation_id=number, sign=request)
        for number, request in enumerate((good, bad, good))
    ]
    requests.append(crypto_pb2.StreamOperationsRequest(correlation_id=9))
    answers = list(services.crypto.StreamOperations(iter(requests), timeout=10))
    assert [answer.correlation_id for answer in answers] == [0, 1, 2, 9]
    assert [answer.WhichOneof("result") for answer in answers] == ["sign", "error", "sign", "error"]


def test_a_request_id_is_good_for_one_request(pool: RunningPool, services: Services) -> None:
    """A repeat returns the first answer, on any partition; another request with that id is refused."""
    request_id = new_id()
    with pool.client(partition=0) as first, pool.client(partition=1) as second:
        fields = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256, "request_id": request_id}
        made = first.create_key("once", **fields)
        assert second.create_key("once", **fields) == made
        before = heads(pool)
        assert first.create_key("once", **fields) == made
    with pytest.raises(grpc.RpcError) as failed:
        create(key_id="twice", request_id=request_id)(services)
    assert "REQUEST_ID_REUSED" in str(rpc_status.from_call(failed.value))
    assert heads(pool) == before


def test_who_is_nobody_gets_no_answer(pool: RunningPool, tmp_path: Path) -> None:
    """No certificate, a foreign authority, plain text: the connection is refused."""
    connection = pool.connection
    endpoint = connection.partitions[0].endpoint
    ca = Path(connection.client_ca_file).read_bytes()
    foreign = Authority("foreign")
    certificate, key = foreign.issue(f"spiffe://{connection.pool_id}/client/application")
    attempts = {
        "no certificate": grpc.ssl_channel_credentials(ca),
        "foreign authority": grpc.ssl_channel_credentials(ca, key, certificate),
        "foreign server authority": grpc.ssl_channel_credentials(foreign.certificate_pem, key, certificate),
    }
    before = heads(pool)
    for name, chosen in attempts.items():
        with grpc.secure_channel(endpoint, chosen) as channel, pytest.raises(grpc.RpcError) as failed:
            get("keys/ec")(Services(channel))
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE, name
    with grpc.insecure_channel(endpoint) as channel, pytest.raises(grpc.RpcError) as failed:
        get("keys/ec")(Services(channel))
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert heads(pool) == before


def test_ceremonies_refuse_bad_input(pool: RunningPool) -> None:
    connection = pool.connection
    chosen = credentials(connection, "administrator")
    with grpc.secure_channel(connection.partitions[0].endpoint, chosen) as channel:
        stub = security_domain_pb2_grpc.SecurityDomainServiceStub(channel)
        with pytest.raises(grpc.RpcError) as failed:
            stub.InitRecovery(security_domain_pb2.InitRecoveryRequest(), timeout=10)
        assert "CEREMONY_STATE" in str(rpc_status.from_call(failed.value))
        for attempt_id in (b"", bytes(16), bytes(17)):
            request = security_domain_pb2.SubmitShareRequest(attempt_id=attempt_id, submission=b"{}")
            with pytest.raises(grpc.RpcError) as failed:
                stub.SubmitShare(request, timeout=10)
            assert failed.value.code().name in {"INVALID_ARGUMENT", "FAILED_PRECONDITION"}
        request = security_domain_pb2.DownloadSecurityDomainRequest(required=2, request_id=new_id())
        with pytest.raises(grpc.RpcError) as failed:
            stub.DownloadSecurityDomain(request, timeout=20)
        assert "ALREADY_ACTIVATED" in str(rpc_status.from_call(failed.value))
