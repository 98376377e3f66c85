"""G2, G3, G8: key transfer blobs (BYOK): what is one, what and who opens it, and what its key must not do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool import errors
from hsm_pool.core import key_transfer
from hsm_pool.core.commands import UpdateKeyVersion
from hsm_pool.core.model import Curve, KeyOperation, KeyType
from hsm_pool.core.roles import key_scope
from hsm_pool.core.state import State
from hsm_pool.crypto import algorithms, key_transport
from hsm_pool.crypto.key_generation import import_pkcs8
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.net.key_creation import imported_material
from mhsm.keys.v1 import keys_pb2
from security_domain.encoding import encode
from tests.unit.served import Served, called_by
from tests.unit.test_core import create, run
from tests.unit.test_key_release import newest, policy

VERSION = "0123456789abcdef" * 2
EXCHANGE = rsa.generate_private_key(65_537, 2048)


def ciphertext(
    public: rsa.RSAPublicKey, secret: bytes, hashed: Callable[[], Any] = hashes.SHA1, one_time_bytes: int = 32
) -> bytes:
    """Return what Azure's page says a BYOK tool makes, without any of the product's code."""
    one_time = os.urandom(one_time_bytes)
    pad = padding.OAEP(padding.MGF1(hashed()), hashed(), None)
    return public.encrypt(one_time, pad) + keywrap.aes_key_wrap_with_padding(one_time, secret)


def blob(name: str = f"keys/kek/versions/{VERSION}", content: bytes = b"c" * 280, **fields: Any) -> bytes:
    document: dict[str, Any] = {
        "schema_version": "1.0.0",
        "header": {"kid": name, "alg": "dir", "enc": "CKM_RSA_AES_KEY_WRAP"},
        "ciphertext": encode(content),
        "generator": "a test",
        **fields,
    }
    return json.dumps({name: value for name, value in document.items() if value is not None}).encode()


def test_a_blob_names_its_key_exchange_key() -> None:
    for name in (
        f"keys/kek/versions/{VERSION}",
        f"https://pool.managedhsm.azure.net/keys/kek/{VERSION}",
        f"https://127.0.0.1:1234/keys/kek/{VERSION}",
    ):
        parsed = key_transfer.parse(blob(name))
        assert parsed == key_transfer.KeyTransferBlob("kek", VERSION, b"c" * 280)
    assert key_transfer.parse(blob(schema_version="1.0", generator=None)).key_id == "kek"


HEADER = {"kid": f"keys/kek/versions/{VERSION}", "alg": "dir", "enc": "CKM_RSA_AES_KEY_WRAP"}


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 10_000,
        blob(schema_version=None),
        blob(schema_version="2.0"),
        blob(schema_version=1.0),
        blob(header=None),
        blob(header=[]),
        *(blob(header={**HEADER, name: value}) for name in HEADER for value in ("", None, [], "other")),
        blob("keys/kek"),
        blob("kek"),
        blob(f"keys/kek/versions/{VERSION.upper()}"),
        blob(f"http://pool/keys/kek/{VERSION}"),
        blob(f"https://pool/keys/kek/{VERSION}\n"),
        blob(f"https://pool/x/keys/kek/{VERSION}"),
        blob(ciphertext=None),
        blob(ciphertext=""),
        blob(ciphertext="AAAA="),
        blob(ciphertext="A+/A"),
        blob(ciphertext="AAAAA"),
        blob(ciphertext=["AAAA"]),
    ],
)
def test_what_is_no_blob_is_refused(document: bytes) -> None:
    """G8: typed, whatever it is."""
    with pytest.raises(errors.InvalidField):
        key_transfer.parse(document)


@given(document=st.binary(max_size=300))
def test_no_octets_do_harm(document: bytes) -> None:
    with pytest.raises(errors.InvalidField):
        key_transfer.parse(document)


@pytest.mark.parametrize("one_time_bytes", [16, 24, 32])
@pytest.mark.parametrize("size", [16, 32, 138, 2375])
def test_the_exchange_key_opens_what_a_tool_wrapped(one_time_bytes: int, size: int) -> None:
    secret = os.urandom(size)
    wrapped = ciphertext(EXCHANGE.public_key(), secret, one_time_bytes=one_time_bytes)
    assert key_transport.unwrap(EXCHANGE, wrapped).reveal() == secret


def test_every_blob_that_does_not_open_is_the_same_refusal() -> None:
    """G8: one error whatever the cause."""
    good, secret = ciphertext(EXCHANGE.public_key(), b"s" * 32), b"s" * 32
    other = rsa.generate_private_key(65_537, 2048).public_key()
    for bad in (
        b"",
        good[:200],
        good[:256],
        good[:-8],
        good[:-1],
        bytes([good[0] ^ 1]) + good[1:],
        good[:-1] + bytes([good[-1] ^ 1]),
        ciphertext(other, secret),
        ciphertext(EXCHANGE.public_key(), secret, hashes.SHA256),
        EXCHANGE.public_key().encrypt(
            b"k" * 15,
            padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None),  # noqa: S303
        )
        + good[256:],
    ):
        with pytest.raises(errors.DecryptionFailed) as refused:
            key_transport.unwrap(EXCHANGE, bad)
        assert refused.value.message == errors.DecryptionFailed().message


RSA: dict[str, Any] = {"key_type": KeyType.RSA, "curve": Curve.NONE, "size_bits": 2048}


def test_a_key_that_imports_does_nothing_else_for_ever() -> None:
    """G3: an exchange key that could be made to decrypt, or be released, would open every blob."""
    importing = (KeyOperation.IMPORT,)
    algorithms.check_key_operations(KeyType.RSA, 2048, importing)
    assert KeyOperation.IMPORT not in algorithms.default_key_operations(KeyType.RSA, 2048)
    for key_type, operations in (
        (KeyType.RSA, (KeyOperation.DECRYPT, KeyOperation.IMPORT)),
        *((key_type, importing) for key_type in (KeyType.EC, KeyType.OCT, KeyType.AKP)),
    ):
        with pytest.raises(errors.InvalidField):
            algorithms.check_key_operations(key_type, 256, operations)
    state = State()
    run(state, create("a", 1, **RSA, key_operations=importing))
    run(state, create("b", 1, **RSA, key_operations=(KeyOperation.DECRYPT,)))
    for key_id, operations in (("a", (KeyOperation.DECRYPT,)), ("b", importing)):
        with pytest.raises(errors.InvalidField):
            run(state, UpdateKeyVersion(2, key_id, key_operations=operations))
    run(state, UpdateKeyVersion(3, "a", key_operations=importing, tags={"kept": "yes"}))
    assert newest(state).key_operations == importing
    with pytest.raises(errors.InvalidField):
        run(
            state,
            create("c", 1, **RSA, key_operations=importing, exportable=True, release_policy=policy()),
        )


# -- who opens a blob, and until when -------------------------------------------------------

WHO, SECRET = "client/somebody", b"s" * 32


class Exchange:
    """A served pool with a key exchange key, and a blob for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.served = Served()
        pkcs8 = EXCHANGE.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        made = import_pkcs8(SecretBytes(pkcs8))
        version = self.served.hold("kek", made, (KeyOperation.IMPORT,))
        sent = blob(f"keys/kek/versions/{version.version_id}", ciphertext(EXCHANGE.public_key(), SECRET))
        self.request = keys_pb2.ImportKeyRequest(key_id="own")
        self.request.material.key_transfer_blob = sent
        called_by(monkeypatch, WHO, "/mhsm.keys.v1.KeyService/ImportKey")

    def imported(self) -> bytes:
        """Return what an import of the blob would bring in."""
        return imported_material(self.served.serving, self.request, self.served.until).material.reveal()


def test_the_right_to_import_is_needed_at_the_exchange_key_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: else whoever may import anywhere brings in the key of somebody else, under a name of his own."""
    exchange = Exchange(monkeypatch)
    for scope in ("", key_scope("own")):
        if scope:
            exchange.served.give(WHO, "Crypto User", scope)
        with pytest.raises(errors.PermissionDenied):
            exchange.imported()
    exchange.served.give(WHO, "Crypto Auditor", key_scope("kek"))
    with pytest.raises(errors.PermissionDenied):
        exchange.imported()
    exchange.served.give(WHO, "Crypto User", key_scope("kek"))
    assert exchange.imported() == SECRET


@pytest.mark.parametrize("change", ["disabled", "role given", "lease lost", "another key"])
def test_what_a_blob_held_comes_in_only_if_its_exchange_key_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """G2: the key is disabled, or the caller's roles change, while the blob is opened."""
    exchange = Exchange(monkeypatch)
    served, opened = exchange.served, key_transport.unwrap
    served.give(WHO, "Crypto User", "/")

    def meanwhile(*arguments: Any) -> SecretBytes:
        match change:
            case "disabled":
                served.do(UpdateKeyVersion(2, "kek", enabled=False))
            case "role given":
                served.give(WHO, "Crypto Auditor", "/")
            case "lease lost":
                served.replica._fresh_until = 0.0
            case _:
                served.do(create("another", 1))
        return opened(*arguments)

    monkeypatch.setattr(key_transport, "unwrap", meanwhile)
    if change == "another key":
        assert exchange.imported() == SECRET
    else:
        with pytest.raises(errors.NotFresh):
            exchange.imported()
