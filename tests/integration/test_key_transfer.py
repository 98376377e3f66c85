"""BYOK on a real pool: a key comes in under a key exchange key, and in no other way (G2, G3, G8)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hsm_pool.client import calls
from hsm_pool.client.pool import Pool
from hsm_pool.errors import (
    DecryptionFailed,
    InvalidField,
    KeyNotFound,
    KeyNotUsable,
    KeySoftDeleted,
    OperationNotPermitted,
    PermissionDenied,
)
from mhsm.keys.v1 import keys_pb2
from tests.identities import Clients
from tests.role_tables import GUIDS
from tests.running_pool import RunningPool, mhsm
from tests.unit.test_key_transfer import blob, ciphertext

pytestmark = pytest.mark.pool

SECRET = bytes(range(200, 232))
IMPORT = [keys_pb2.KEY_OPERATION_IMPORT]


@pytest.fixture(scope="module")
def client(pool: RunningPool) -> Iterator[Pool]:
    with pool.client() as made:
        yield made


def exchange_key(client: Pool, name: str) -> keys_pb2.Key:
    return client.create_key(name, key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048, key_operations=IMPORT)


def public(key: keys_pb2.Key) -> rsa.RSAPublicKey:
    found = serialization.load_der_public_key(key.public_key_der)
    assert isinstance(found, rsa.RSAPublicKey)
    return found


def transfer(key: keys_pb2.Key, secret: bytes, **options: Any) -> bytes:
    return blob(key.name, ciphertext(public(key), secret, **options))


def test_a_key_from_elsewhere_comes_in_on_every_partition(pool: RunningPool, client: Pool) -> None:
    """oct, RSA and EC keys, and the imported key is the very one that was wrapped."""
    kek = exchange_key(client, "kek")
    assert list(kek.key_operations) == IMPORT
    own = ec.generate_private_key(ec.SECP384R1())
    pkcs8 = own.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for index in range(3):
        with pool.client(partition=index) as pinned:
            made = pinned.import_key(f"oct-{index}", key_transfer_blob=transfer(kek, SECRET))
            assert (made.key_type, made.size_bits) == (keys_pb2.KEY_TYPE_OCT, 256)
            made = pinned.import_key(f"ec-{index}", key_transfer_blob=transfer(kek, pkcs8))
    spki = own.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert made.public_key_der == spki
    known = client.import_key("known", octets=SECRET)
    wrapped = client.wrap_key(known.name, "A256KW", b"k" * 16)
    assert client.unwrap_key("keys/oct-2", "A256KW", wrapped) == b"k" * 16


def test_a_blob_that_does_not_open_imports_nothing(client: Pool) -> None:
    """G8: one refusal for all of them, and no key."""
    kek, other = exchange_key(client, "careful"), exchange_key(client, "another")
    good = ciphertext(public(kek), SECRET)
    seen = set()
    for bad in (
        blob(kek.name, ciphertext(public(other), SECRET)),
        blob(other.name, good),
        blob(kek.name, good[:-8]),
        blob(kek.name, good[:-1] + bytes([good[-1] ^ 1])),
        blob(kek.name, b"c"),
    ):
        with pytest.raises(DecryptionFailed) as refused:
            client.import_key("never", key_transfer_blob=bad)
        seen.add((refused.value.message, str(refused.value.metadata)))
    assert len(seen) == 1
    for secret in (b"no key", b"s" * 33):
        with pytest.raises(InvalidField):
            client.import_key("never", key_transfer_blob=transfer(kek, secret))
    with pytest.raises(KeyNotFound):
        client.get_key("keys/never")


def test_only_a_usable_exchange_key_made_here_opens_blobs(client: Pool) -> None:
    kek = exchange_key(client, "ending")
    sent = transfer(kek, SECRET)
    signer = client.create_key("signer", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048)
    with pytest.raises(OperationNotPermitted):
        client.import_key("never", key_transfer_blob=transfer(signer, SECRET))
    with pytest.raises(OperationNotPermitted):
        client.unwrap_key(kek.name, "RSA-OAEP", ciphertext(public(kek), SECRET)[:256])
    with pytest.raises(InvalidField):
        client.update_key(kek.name, key_operations=[keys_pb2.KEY_OPERATION_UNWRAP_KEY])
    known = rsa.generate_private_key(65_537, 2048).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(InvalidField):
        client.import_key("known-elsewhere", pkcs8_der=known, key_operations=IMPORT)
    client.update_key(kek.name, key_attributes=calls.attributes(enabled=False))
    with pytest.raises(KeyNotUsable):
        client.import_key("never", key_transfer_blob=sent)
    client.delete_key("keys/ending")
    with pytest.raises(KeySoftDeleted):
        client.import_key("never", key_transfer_blob=sent)


def test_who_may_import_one_key_only_does_not_use_another_exchange_key(
    pool: RunningPool, client: Pool
) -> None:
    """A blob of somebody else must not come in under one's own name."""
    kek = exchange_key(client, "guarded")
    with pool.client("administrator") as administrator, Clients(pool).connect("thief") as thief:
        for scope in ("/keys/own", "/keys/guarded"):
            with pytest.raises(PermissionDenied):
                thief.import_key("own", key_transfer_blob=transfer(kek, SECRET))
            administrator.create_role_assignment("client/thief", GUIDS["Crypto User"], scope)
        assert thief.import_key("own", key_transfer_blob=transfer(kek, SECRET)).size_bits == 256


def test_the_commands_from_exchange_key_to_imported_key(pool: RunningPool, tmp_path: Path) -> None:
    """What docs/operations.md shows."""
    data = ("--data-dir", str(pool.directory), "--json")
    made = mhsm("key", "create", "cli-kek", "--type", "RSA", "--size", "2048", "--operation", "import", *data)
    name = json.loads(made.stdout)["key"]["name"]
    mhsm("key", "public-key", "cli-kek", "--output", "kek.pem", *data, cwd=tmp_path)
    exchange = serialization.load_pem_public_key((tmp_path / "kek.pem").read_bytes())
    assert isinstance(exchange, rsa.RSAPublicKey)
    (tmp_path / "own.byok").write_bytes(blob(name, ciphertext(exchange, SECRET)))
    done = mhsm("key", "import", "cli-own", "--byok", "own.byok", *data, cwd=tmp_path)
    assert json.loads(done.stdout)["key"]["keyType"] == "KEY_TYPE_OCT"
    both = ("--byok", "own.byok", "--file", "own.byok")
    for arguments in ((), both):
        done = mhsm("key", "import", "cli-own", *arguments, *data, cwd=tmp_path, check=False)
        assert done.returncode == 2
