"""Keys and cryptography as a client sees them, on a real pool, with both clients."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hsm_pool import errors
from hsm_pool.client import calls
from hsm_pool.client.aio import AsyncPool
from hsm_pool.client.errors import SignatureInvalid
from hsm_pool.client.pool import Pool
from hsm_pool.core import secure_wrap
from hsm_pool.core.model import Curve, KeyOperation, KeyType
from hsm_pool.crypto.algorithms import ALGORITHMS, Algorithm, Scheme
from hsm_pool.errors import MHSMError
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2
from tests.identities import Clients
from tests.role_tables import GUIDS
from tests.running_pool import ROOT, RunningPool, changes, until

pytestmark = pytest.mark.pool

DIGEST = hashlib.sha256(b"to be signed").digest()
EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
OCT = {"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": 128}
OCTETS = {128: bytes(range(16)), 192: bytes(range(24)), 256: bytes(range(32))}
"""Imported keys: what the pool does with them can be done again outside."""


@pytest.fixture(scope="module")
def client(pool: RunningPool) -> Iterator[Pool]:
    """A client of the whole pool."""
    with pool.client() as made:
        yield made


@pytest.fixture(scope="module")
def each(pool: RunningPool) -> Iterator[list[Pool]]:
    """One client a partition."""
    made = [pool.client(partition=index, timeout_seconds=20) for index in range(3)]
    yield made
    for one in made:
        one.close()


def request_id() -> str:
    return str(uuid.uuid4())


# -- algorithms --------------------------------------------------------------------------

BEGIN = {KeyOperation.ENCRYPT, KeyOperation.SIGN, KeyOperation.WRAP_KEY}


UNPROTECTED = {Scheme.AES_CBC, Scheme.AES_CBC_PADDED, Scheme.RSA_PKCS1V15_ENCRYPTION}
"""Their ciphertexts are not protected from changes (docs/algorithms.md)."""


def nothing_or_other(decrypt: Callable[[], bytes], original: bytes) -> bool:
    """Return whether a changed ciphertext does not give the original."""
    try:
        return decrypt() != original
    except errors.DecryptionFailed:
        return True


def key_of(client: Pool, row: Algorithm) -> str:
    """Return the name of a key that fits; the RSA key is made once."""
    curve = keys_pb2.Curve.ValueType(row.curve)
    fields: dict[str, Any] = {
        KeyType.RSA: {"key_type": keys_pb2.KEY_TYPE_RSA, "size_bits": 2048},
        KeyType.EC: {"key_type": keys_pb2.KEY_TYPE_EC, "curve": curve},
        KeyType.OCT: {
            "key_type": keys_pb2.KEY_TYPE_OCT,
            "size_bits": row.size_bits or 256,
            "key_operations": [
                keys_pb2.KeyOperation.ValueType(value)
                for value in sorted(row.operations - secure_wrap.OPERATIONS)
            ],
        },
        KeyType.AKP: {"key_type": keys_pb2.KEY_TYPE_AKP, "size_bits": row.size_bits},
    }[row.key_type]
    key_id = "rsa-of-rows" if row.key_type is KeyType.RSA else f"of-{row.name.replace('_', '-')}"
    try:
        client.get_key(f"keys/{key_id}")
    except errors.KeyNotFound:
        client.create_key(key_id, **fields)
    return f"keys/{key_id}"


def openssl_verifies(row: Algorithm, key: keys_pb2.Key, digest: bytes, signature: bytes, at: Path) -> bool:
    """Let the openssl program verify a signature against the exported public key."""
    public = serialization.load_der_public_key(key.public_key_der)
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    options = ["-pkeyopt", f"digest:{row.hash.name}"] if row.hash else []
    if row.scheme is Scheme.ECDSA:
        half = len(signature) // 2
        r, s = (int.from_bytes(part, "big") for part in (signature[:half], signature[half:]))
        signature = utils.encode_dss_signature(r, s)
    elif row.scheme is Scheme.RSA_PSS:
        options += ["-pkeyopt", "rsa_padding_mode:pss", "-pkeyopt", "rsa_pss_saltlen:digest"]
    for name, content in (("public.pem", public.public_bytes(*pem)), ("digest", digest), ("sig", signature)):
        (at / name).write_bytes(content)
    files = ["-inkey", str(at / "public.pem"), "-in", str(at / "digest"), "-sigfile", str(at / "sig")]
    command = ["openssl", "pkeyutl", "-verify", "-pubin", *files, *options]
    completed = subprocess.run(command, capture_output=True, timeout=20, check=False)
    return completed.returncode == 0


@pytest.mark.parametrize(
    "row", [r for r in ALGORITHMS if KeyOperation.SIGN in r.operations], ids=lambda r: r.name
)
def test_a_signature_verifies_everywhere(
    client: Pool, each: list[Pool], row: Algorithm, tmp_path: Path
) -> None:
    """Signed on each partition, verified on the next and by openssl; a changed one on none."""
    name = key_of(client, row)
    key = client.get_key(name)
    digest = os.urandom(row.digest_bytes or 20)
    for index in range(3):
        signature = each[index].sign(name, row.name, digest)
        changed = bytes([signature[0] ^ 1]) + signature[1:]
        items = [(digest, signature), (digest, changed), (digest[::-1], signature), (digest, b"")]
        assert each[(index + 1) % 3].verify_batch(name, row.name, items) == [True, False, False, False]
        if row.scheme in {Scheme.HMAC, Scheme.ML_DSA}:
            continue  # nobody else has the key, or the algorithm; tests/vectors compares with published ones
        assert openssl_verifies(row, key, digest, signature, tmp_path)
        assert not openssl_verifies(row, key, digest[::-1], signature, tmp_path)
    with pytest.raises(SignatureInvalid):
        client.verify(name, row.name, digest, changed)


@pytest.mark.parametrize(
    "row", [r for r in ALGORITHMS if KeyOperation.ENCRYPT in r.operations], ids=lambda r: r.name
)
def test_a_ciphertext_opens_everywhere(client: Pool, each: list[Pool], row: Algorithm) -> None:
    """Encrypted on each partition, decrypted on the next; a changed one on none."""
    name, data = key_of(client, row), b"data" if row.scheme is Scheme.AES_GCM else b""
    longest = 190 if row.key_type is KeyType.RSA else 64 * 1024
    for index, size in itertools.product(range(3), (0, 1, longest)):
        if row.scheme is Scheme.AES_CBC and size == 0:
            continue
        plaintext = os.urandom(size)
        sealed = each[index].encrypt(name, row.name, plaintext, data)
        opened = each[(index + 1) % 3].decrypt(name, row.name, sealed)
        zeros = bytes(-size % 16) if row.scheme is Scheme.AES_CBC else b""
        assert opened == plaintext + zeros
        assert plaintext not in sealed.ciphertext or size < 2
        fields = ["ciphertext"] if size else []
        if row.scheme is Scheme.AES_GCM:
            fields += ["initialization_vector", "authentication_tag", "additional_data"]
        for field in fields:
            changed = crypto_pb2.Ciphertext()
            changed.CopyFrom(sealed)
            octets = getattr(sealed, field)
            setattr(changed, field, octets[:-1] + bytes([octets[-1] ^ 1]))
            if row.scheme in UNPROTECTED:
                assert nothing_or_other(lambda m=changed: client.decrypt(name, row.name, m), opened)
                continue
            with pytest.raises(errors.DecryptionFailed):
                each[(index + 2) % 3].decrypt(name, row.name, changed)


@pytest.mark.parametrize(
    "row", [r for r in ALGORITHMS if KeyOperation.WRAP_KEY in r.operations], ids=lambda r: r.name
)
def test_a_wrapped_key_opens_everywhere(client: Pool, each: list[Pool], row: Algorithm) -> None:
    """Wrapped on each partition, unwrapped on the next; a changed one on none."""
    name = key_of(client, row)
    for index, size in itertools.product(range(3), (16, 24, 64)):
        target = os.urandom(size)
        wrapped = each[index].wrap_key(name, row.name, target)
        assert each[(index + 1) % 3].unwrap_key(name, row.name, wrapped) == target
        changed = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
        if row.scheme in UNPROTECTED:
            assert nothing_or_other(lambda w=changed: client.unwrap_key(name, row.name, w), target)
            continue
        with pytest.raises(errors.DecryptionFailed):
            each[(index + 2) % 3].unwrap_key(name, row.name, changed)


def test_every_row_of_the_table_begins_a_round_trip() -> None:
    """The three tests above, and the one of secure wraps with test_key_release, leave no algorithm out."""
    assert all(row.operations & {*BEGIN, KeyOperation.SECURE_WRAP_KEY} for row in ALGORITHMS)


@pytest.mark.parametrize("size_bits", [128, 192, 256])
def test_an_imported_oct_key_does_what_the_same_key_does_outside(client: Pool, size_bits: int) -> None:
    octets = OCTETS[size_bits]
    key = client.import_key(f"known-{size_bits}", octets=octets)
    assert (key.size_bits, key.public_key_der) == (size_bits, b"")
    sealed = client.encrypt(f"keys/known-{size_bits}", f"A{size_bits}GCM", b"plaintext", b"data")
    whole = sealed.ciphertext + sealed.authentication_tag
    assert AESGCM(octets).decrypt(sealed.initialization_vector, whole, b"data") == b"plaintext"
    wrapped = client.wrap_key(f"keys/known-{size_bits}", f"A{size_bits}KW", bytes(32))
    assert keywrap.aes_key_unwrap(octets, wrapped) == bytes(32)


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1()], ids=lambda c: c.name
)
def test_an_imported_ec_key_keeps_its_public_key(client: Pool, curve: ec.EllipticCurve) -> None:
    made = ec.generate_private_key(curve)
    assert_imported(client, made, f"imported-{curve.name}")


def test_an_imported_rsa_key_keeps_its_public_key(client: Pool) -> None:
    assert_imported(client, rsa.generate_private_key(65537, 2048), "imported-rsa")


def assert_imported(client: Pool, made: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, key_id: str) -> None:
    form, encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    der = made.private_bytes(serialization.Encoding.DER, form, encryption)
    key = client.import_key(key_id, pkcs8_der=der, tags={"from": "outside"})
    public = made.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert key.public_key_der == public
    assert client.get_key(f"keys/{key_id}") == key


def test_the_largest_batches_are_done(client: Pool) -> None:
    """256 items with an EC key, 32 with an RSA key; each answer stands at its place."""
    client.create_key("batch", **EC)
    rsa_name = key_of(client, ALGORITHMS[0])
    for name, algorithm, count in (("keys/batch", "ES256", 256), (rsa_name, "RS256", 32)):
        digests = [hashlib.sha256(str(number).encode()).digest() for number in range(count)]
        signatures = client.sign_batch(name, algorithm, digests)
        assert len(signatures) == count
        pairs = list(zip(digests, signatures, strict=True))
        assert client.verify_batch(name, algorithm, pairs) == [True] * count
        rotated = list(zip(digests, signatures[1:] + signatures[:1], strict=True))
        assert client.verify_batch(name, algorithm, rotated) == [False] * count


def test_random_bytes_at_their_bounds(client: Pool, each: list[Pool]) -> None:
    for count in (1, 2, 127, 128):
        assert len(client.random_bytes(count)) == count
    drawn = {one.random_bytes(32) for one in each for _ in range(20)}
    assert len(drawn) == 60
    for count in (0, 129):
        with pytest.raises(errors.InvalidField):
            client.random_bytes(count)


# -- streams -----------------------------------------------------------------------------


def stream_of_good_and_bad() -> tuple[list[crypto_pb2.StreamOperationsRequest], list[str]]:
    """Return requests, and of each the field that answers it or the reason of its refusal."""
    request = crypto_pb2.StreamOperationsRequest
    sign, item = crypto_pb2.SignRequest, crypto_pb2.Plaintext(plaintext=b"p")
    good = sign(name="keys/stream", algorithm="ES256", digests=[DIGEST] * 3)
    pattern: list[tuple[crypto_pb2.StreamOperationsRequest, str]] = [
        (request(sign=good), "sign"),
        (request(sign=sign(name="keys/nothing", algorithm="ES256", digests=[DIGEST])), "KEY_NOT_FOUND"),
        (
            request(
                encrypt=crypto_pb2.EncryptRequest(name="keys/stream-oct", algorithm="A128GCM", items=[item])
            ),
            "encrypt",
        ),
        (request(), "INVALID_FIELD"),
        (
            request(
                wrap_key=crypto_pb2.WrapKeyRequest(
                    name="keys/stream-oct", algorithm="A128KW", keys=[bytes(16)]
                )
            ),
            "wrap_key",
        ),
        (request(sign=sign(name="keys/stream", algorithm="ES256", digests=[b"short"])), "DIGEST_LENGTH"),
        (
            request(
                unwrap_key=crypto_pb2.UnwrapKeyRequest(
                    name="keys/stream-oct", algorithm="A128KW", wrapped_keys=[bytes(24)]
                )
            ),
            "DECRYPTION_FAILED",
        ),
        (
            request(sign=sign(name="keys/stream", algorithm="RS256", digests=[DIGEST])),
            "ALGORITHM_NOT_SUPPORTED",
        ),
    ]
    requests, expected = [], []
    for number, (template, answer) in enumerate(pattern * 10):
        message = crypto_pb2.StreamOperationsRequest()
        message.CopyFrom(template)
        message.correlation_id = 1_000 + number
        requests.append(message)
        expected.append(answer)
    return requests, expected


def answer_of(response: crypto_pb2.StreamOperationsResponse) -> str:
    from google.rpc import error_details_pb2

    kind = response.WhichOneof("result")
    if kind != "error":
        return str(kind)
    info = error_details_pb2.ErrorInfo()
    assert len(response.error.details) == 1
    assert response.error.details[0].Unpack(info)
    return info.reason


def test_a_stream_of_good_and_bad_batches(pool: RunningPool, client: Pool) -> None:
    """G8: answers in order, refusals among them, the same through both clients."""
    client.create_key("stream", **EC)
    client.create_key("stream-oct", **OCT)
    requests, expected = stream_of_good_and_bad()

    async def collect() -> list[crypto_pb2.StreamOperationsResponse]:
        async with AsyncPool(pool.connection) as other:
            return [response async for response in other.stream(requests, partition=1)]

    for answers in (list(client.stream(requests, partition=2)), asyncio.run(collect())):
        assert [answer.correlation_id for answer in answers] == [r.correlation_id for r in requests]
        assert [answer_of(answer) for answer in answers] == expected
        signed = [answer.sign.signatures for answer in answers if answer.HasField("sign")]
        pairs = [(DIGEST, signature) for signatures in signed for signature in signatures]
        assert all(client.verify_batch("keys/stream", "ES256", pairs))


# -- keys --------------------------------------------------------------------------------


def test_lists_come_in_pages(client: Pool, each: list[Pool]) -> None:
    """35 keys, some deleted: by name, without a gap or a repeat, on every partition, whatever the page."""
    names = [f"page-{number:02}" for number in range(35)]
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda name: client.create_key(name, **OCT), names))
        list(executor.map(lambda name: client.delete_key(f"keys/{name}"), names[::5]))
    deleted = names[::5]
    active = [name for name in names if name not in deleted]
    for one, size in itertools.product(each, (0, 1, 7, 25)):
        listed = [key.name.split("/")[1] for key in one.list_keys(size)]
        assert [name for name in listed if name.startswith("page-")] == active
        assert listed == sorted(set(listed))
        gone = [entry.key.name.split("/")[1] for entry in one.list_deleted_keys(size)]
        assert [name for name in gone if name.startswith("page-")] == deleted


def test_versions(client: Pool, each: list[Pool]) -> None:
    """27 versions, oldest first; the newest is meant unless another is named; old ones keep working."""
    made = [client.create_key("versions", **EC, tags={"n": str(number)}) for number in range(27)]
    for one, size in itertools.product(each, (0, 1, 26 - 1, 10)):
        assert list(one.list_key_versions("keys/versions", size)) == made
    assert each[2].get_key("keys/versions") == made[-1]
    signature = client.sign(made[0].name, "ES256", DIGEST)
    client.verify(made[0].name, "ES256", DIGEST, signature)
    with pytest.raises(SignatureInvalid):
        client.verify("keys/versions", "ES256", DIGEST, signature)
    client.update_key(made[0].name, key_attributes=calls.attributes(enabled=False))
    with pytest.raises(errors.KeyNotUsable):
        client.sign(made[0].name, "ES256", DIGEST)
    client.sign("keys/versions", "ES256", DIGEST)
    assert client.get_key(made[1].name) == made[1]


def refusal(operation: Callable[[], object]) -> str:
    try:
        operation()
    except MHSMError as error:
        return error.reason
    return "done"


def test_soft_delete_recover_and_purge(client: Pool, each: list[Pool]) -> None:
    """A deleted key does nothing but wait; recovered it is as before; purged it is gone for good."""
    old = client.create_key("doomed", **EC, tags={"a": "1"})
    new = client.create_key("doomed", **EC)
    signature = client.sign(new.name, "ES256", DIGEST)
    deleted = client.delete_key("keys/doomed")
    assert deleted.key == new
    kept = deleted.scheduled_purge_time.ToDatetime() - deleted.deleted_time.ToDatetime()
    assert kept == timedelta(days=deleted.key.attributes.recoverable_days)
    for one in each:
        assert one.get_deleted_key("keys/doomed") == deleted
        for operation in (
            lambda one=one: one.get_key("keys/doomed"),
            lambda one=one: one.get_key(old.name),
            lambda one=one: list(one.list_key_versions("keys/doomed")),
            lambda one=one: one.sign("keys/doomed", "ES256", DIGEST),
            lambda one=one: one.verify(new.name, "ES256", DIGEST, signature),
            lambda one=one: one.update_key("keys/doomed"),
            lambda one=one: one.delete_key("keys/doomed"),
        ):
            assert refusal(operation) == "KEY_SOFT_DELETED"
        assert refusal(lambda one=one: one.create_key("doomed", **EC)) == "KEY_EXISTS"
    assert each[1].recover_deleted_key("keys/doomed") == new
    for one in each:
        assert list(one.list_key_versions("keys/doomed")) == [old, new]
        one.verify(new.name, "ES256", DIGEST, signature)
        assert refusal(lambda one=one: one.get_deleted_key("keys/doomed")) == "DELETED_KEY_NOT_FOUND"
        assert refusal(lambda one=one: one.purge_deleted_key("keys/doomed")) == "DELETED_KEY_NOT_FOUND"
    client.delete_key("keys/doomed")
    each[2].purge_deleted_key("keys/doomed")
    for one in each:
        assert refusal(lambda one=one: one.get_key(old.name)) == "KEY_NOT_FOUND"
        assert refusal(lambda one=one: one.recover_deleted_key("keys/doomed")) == "DELETED_KEY_NOT_FOUND"
    again = each[0].create_key("doomed", **EC)
    assert list(each[1].list_key_versions("keys/doomed")) == [again]
    assert refusal(lambda: client.get_key(old.name)) == "KEY_NOT_FOUND"


def test_updates_change_what_is_given_and_clear_what_is_asked(client: Pool, each: list[Pool]) -> None:
    begin, end = datetime(2020, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
    made = client.create_key("updated", **EC, tags={"a": "1", "b": "2"})
    timed = client.update_key(
        "keys/updated", key_attributes=calls.attributes(not_before=begin, expires=end, enabled=False)
    )
    assert timed.attributes.not_before.ToDatetime(UTC) == begin
    assert timed.attributes.expires.ToDatetime(UTC) == end
    assert not timed.attributes.enabled
    assert (dict(timed.tags), timed.key_operations) == ({"a": "1", "b": "2"}, made.key_operations)
    cleared = each[1].update_key("keys/updated", clear_expires=True)
    assert not cleared.attributes.HasField("expires")
    assert cleared.attributes.HasField("not_before")
    assert not cleared.attributes.enabled
    cleared = each[2].update_key("keys/updated", clear_not_before=True, tags={})
    assert not cleared.attributes.HasField("not_before")
    assert dict(cleared.tags) == {}
    only = each[0].update_key(
        made.name,
        key_operations=[keys_pb2.KEY_OPERATION_VERIFY],
        key_attributes=calls.attributes(enabled=True),
        tags={"c": "3"},
    )
    assert list(only.key_operations) == [keys_pb2.KEY_OPERATION_VERIFY]
    assert dict(only.tags) == {"c": "3"}
    assert refusal(lambda: each[1].sign("keys/updated", "ES256", DIGEST)) == "OPERATION_NOT_PERMITTED"
    assert only.attributes.created == made.attributes.created
    assert only.attributes.updated.ToMilliseconds() >= made.attributes.updated.ToMilliseconds()
    assert [one.get_key("keys/updated") for one in each] == [only] * 3


# -- request ids -------------------------------------------------------------------------


def mutations(key_id: str) -> list[tuple[str, Callable[[Pool, str], Any]]]:
    """Return one mutation of each kind, in an order in which each succeeds once only."""
    name = f"keys/{key_id}"
    sign_only = [keys_pb2.KEY_OPERATION_SIGN]
    return [
        ("create", lambda c, i: c.create_key(key_id, **EC, must_not_exist=True, request_id=i)),
        ("import", lambda c, i: c.import_key(f"{key_id}-imported", octets=bytes(16), request_id=i)),
        ("update", lambda c, i: c.update_key(name, tags={"a": "1"}, request_id=i)),
        ("operations", lambda c, i: c.update_key(name, key_operations=sign_only, request_id=i)),
        ("policy", lambda c, i: c.update_key_rotation_policy(name, expiry_time="P90D", request_id=i)),
        ("rotate", lambda c, i: c.rotate_key(name, request_id=i)),
        ("delete", lambda c, i: c.delete_key(name, request_id=i)),
        ("recover", lambda c, i: c.recover_deleted_key(name, request_id=i)),
        ("delete again", lambda c, i: c.delete_key(name, request_id=i)),
        ("purge", lambda c, i: c.purge_deleted_key(name, request_id=i)),
    ]


def test_a_repeat_returns_the_first_answer(pool: RunningPool, each: list[Pool]) -> None:
    """G1, G2: on any partition, after everything that came later, and after the first answerer was killed."""
    answers: list[tuple[str, str, Callable[[Pool, str], Any], Any]] = []
    for what, mutate in mutations("repeated"):
        chosen = request_id()
        first = mutate(each[0], chosen)
        assert mutate(each[1], chosen) == first, what
        answers.append((what, chosen, mutate, first))

    def check(partition: int) -> None:
        for what, chosen, mutate, first in answers:
            assert mutate(each[partition], chosen) == first, what

    sequence = changes(pool.status(0))
    for partition in range(3):
        check(partition)
    incarnation = pool.status(0).incarnation
    pool.signal(0, "partition", signal.SIGKILL)
    check(1)
    check(2)
    until(lambda: (s := pool.status(0)) is not None and s.incarnation > incarnation, 30, "a new incarnation")
    pool.await_states(["SERVING"] * 3)
    check(0)
    assert changes(pool.status(0)) == sequence, "a repeat changes nothing"
    with pytest.raises(errors.RequestIdReused):
        each[2].create_key("another", **EC, request_id=answers[0][1])


def test_request_ids_of_different_callers_never_meet(pool: RunningPool, client: Pool) -> None:
    """Another application may use the same request id for a request of its own."""
    chosen = request_id()
    client.create_key("of-application", **OCT, request_id=chosen)
    with pool.client("administrator") as administrator:
        administrator.create_role_assignment("client/reports", GUIDS["Crypto User"])
    with Clients(pool).connect("reports") as reports:
        made = reports.create_key("of-reports", **OCT, request_id=chosen)
    assert made.name.startswith("keys/of-reports/")


def test_many_repeats_at_once_make_one_version(each: list[Pool]) -> None:
    """G2: the same create on three partitions at the same time is one mutation."""
    for number in range(5):
        chosen = request_id()
        with ThreadPoolExecutor(9) as executor:
            futures = [
                executor.submit(one.create_key, f"raced-{number}", **EC, request_id=chosen)
                for one in each * 3
            ]
            answers = [future.result() for future in futures]
        assert all(answer == answers[0] for answer in answers)
        assert list(each[0].list_key_versions(f"keys/raced-{number}")) == [answers[0]]


# -- two clients -------------------------------------------------------------------------


def test_both_clients_see_the_same(pool: RunningPool, client: Pool) -> None:
    """The asyncio client gives the same answers, the same errors and takes what the other made."""
    made = client.create_key("shared", **EC, tags={"a": "1"})
    client.create_key("shared-oct", **OCT)
    signature = client.sign("keys/shared", "ES256", DIGEST)
    sealed = client.encrypt("keys/shared-oct", "A128GCM", b"plaintext", b"data")
    wrapped = client.wrap_key("keys/shared-oct", "A128KW", bytes(16))
    calls_of_both: list[Callable[[Any], Any]] = [
        lambda c: c.get_key("keys/shared"),
        lambda c: c.get_key(made.name),
        lambda c: c.verify_batch("keys/shared", "ES256", [(DIGEST, signature), (DIGEST, b"")]),
        lambda c: c.decrypt("keys/shared-oct", "A128GCM", sealed),
        lambda c: c.decrypt_batch("keys/shared-oct", "A128GCM", [sealed, sealed]),
        lambda c: c.unwrap_key("keys/shared-oct", "A128KW", wrapped),
        lambda c: c.verify("keys/shared", "ES256", DIGEST, signature),
        lambda c: c.verify("keys/shared", "ES256", DIGEST[::-1], signature),
        lambda c: c.get_key("keys/nothing"),
        lambda c: c.sign("keys/shared", "RS256", DIGEST),
        lambda c: c.sign("keys/shared", "ES256", b"short"),
        lambda c: c.create_key("shared", **EC, must_not_exist=True),
        lambda c: c.random_bytes(0),
        lambda c: c.get_deleted_key("keys/shared"),
        lambda c: c.purge_deleted_key("keys/shared"),
        lambda c: c.import_key("shared", octets=b"short"),
        lambda c: c.init_recovery(),
    ]

    def shown(error: MHSMError) -> tuple[Any, ...]:
        return type(error), error.message, error.metadata, error.definite

    def outcome(call: Callable[[Any], Any]) -> Any:
        try:
            return call(client)
        except MHSMError as error:
            return shown(error)

    async def compare() -> None:
        async with AsyncPool(pool.connection) as other:
            for number, call in enumerate(calls_of_both):
                try:
                    answer = await call(other)
                except MHSMError as error:
                    answer = shown(error)
                assert answer == outcome(call), f"call {number}"
            for listing in ("list_keys", "list_deleted_keys"):
                found = [item async for item in getattr(other, listing)(7)]
                assert found == list(getattr(client, listing)(7))
            found = [item async for item in other.list_key_versions("keys/shared", 1)]
            assert found == list(client.list_key_versions("keys/shared"))
            own = await other.create_key("made-by-asyncio", **EC)
            signed = await other.sign(own.name, "ES256", DIGEST)
            client.verify(own.name, "ES256", DIGEST, signed)
            updated = await other.update_key(own.name, tags={"b": "2"})
            assert client.get_key(own.name) == updated
            policy = await other.update_key_rotation_policy(
                "keys/made-by-asyncio", time_before_expiry="P30D", expiry_time="P90D"
            )
            assert await other.get_key_rotation_policy("keys/made-by-asyncio") == policy
            assert client.get_key_rotation_policy("keys/made-by-asyncio") == policy
            updated = await other.rotate_key("keys/made-by-asyncio")
            assert client.get_key("keys/made-by-asyncio") == updated
            deleted = await other.delete_key("keys/made-by-asyncio")
            assert client.get_deleted_key("keys/made-by-asyncio") == deleted
            assert await other.recover_deleted_key("keys/made-by-asyncio") == updated

    asyncio.run(compare())


def test_curves_of_the_table_are_all_that_exist() -> None:
    """Each curve of an EC key has its one algorithm."""
    assert {row.curve for row in ALGORITHMS if row.key_type is KeyType.EC} == set(Curve) - {Curve.NONE}


def test_what_a_version_made_names_it(pool: RunningPool) -> None:
    """After a rotation the newest version is another one: only the name that came back still opens it."""
    with pool.client() as client:
        client.create_key("named", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=256)
        wrapped = client.wrap_key("keys/named", "A256KW", bytes(32))
        client.create_key("named", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=256)
        with pytest.raises(errors.DecryptionFailed):
            client.unwrap_key("keys/named", "A256KW", wrapped)
        assert client.unwrap_key(wrapped.key_name, "A256KW", wrapped) == bytes(32)
        client.create_key("signed", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
        signature = client.sign("keys/signed", "ES256", bytes(32))
        client.create_key("signed", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
        with pytest.raises(SignatureInvalid):
            client.verify("keys/signed", "ES256", bytes(32), signature)
        client.verify(signature.key_name, "ES256", bytes(32), signature)


def test_the_code_of_the_python_page_runs(pool: RunningPool, tmp_path: Path) -> None:
    """docs/python.md: its blocks, one after the other, as one program of a user; and README's."""
    page = (ROOT / "docs/python.md").read_text()
    (from_readme,) = blocks((ROOT / "README.md").read_text())
    assert len(blocks(page)) == page.count("```python") > 8
    program = "\n\n".join([*blocks(page), from_readme]).replace("/path/to/data-dir", str(pool.directory))
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "another version made it" in done.stdout
    assert "KEY_NOT_FOUND" in done.stdout
    with pool.client() as client:
        assert len(list(client.list_key_versions("keys/signer"))) == 2


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
