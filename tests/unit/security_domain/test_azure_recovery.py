"""Azure's transfer key and restore blob: from a quorum to the exchange key and nowhere else (G4)."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from security_domain.azure import document, restore_blob, tokens, transfer_key
from security_domain.azure.items import Item, seal_all
from security_domain.azure.transfer_key import ExchangeKey
from security_domain.encoding import canonical, encode
from security_domain.errors import InvalidFile, InvalidOfficers, QuorumMissing, ShareRefused
from security_domain.secret import Secret
from tests.running_pool import TestOfficer
from tests.unit.security_domain.rehearsal import self_signed
from tests.unit.security_domain.test_azure_document import CONTENT, made, revealed

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def exchange() -> ExchangeKey:
    """The exchange key of one recovery."""
    return transfer_key.make_exchange_key("pool.example", NOW, NOW + timedelta(days=365))


@pytest.fixture(scope="module")
def blob(ten: list[TestOfficer], exchange: ExchangeKey) -> bytes:
    """A restore blob of the first two of three officers."""
    return blob_of(ten[:3], 2, ten[:2], exchange)


def pairs(officers: list[TestOfficer]) -> list[Any]:
    """Keys and certificates."""
    return [(officer.key, officer.certificate_der) for officer in officers]


def blob_of(
    officers: list[TestOfficer], required: int, present: list[TestOfficer], exchange: ExchangeKey
) -> bytes:
    """Make a document and its restore blob."""
    parsed = document.parse(made(officers, required))
    return restore_blob.make_restore_blob(parsed, pairs(present), exchange.certificate_der)


def test_the_exchange_certificate_is_as_azure_makes_it(exchange: ExchangeKey) -> None:
    certificate = x509.load_der_x509_certificate(exchange.certificate_der)
    assert certificate.subject == certificate.issuer
    assert certificate.subject.rfc4514_string() == "CN=pool.example"
    assert (certificate.not_valid_before_utc, certificate.not_valid_after_utc) == (
        NOW,
        NOW + timedelta(days=365),
    )
    assert exchange.private_key.key_size == 3072
    certificate.verify_directly_issued_by(certificate)
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert basic.critical
    assert not basic.value.ca
    assert usage.critical
    assert usage.value.key_encipherment
    assert not usage.value.digital_signature
    assert certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)


def test_the_transfer_key_is_a_jwk_of_the_certificate(exchange: ExchangeKey) -> None:
    text = transfer_key.transfer_key(exchange.certificate_der)
    fields = json.loads(text)
    assert list(fields) == ["e", "key_ops", "kid", "kty", "n", "x5c", "x5t", "x5t#S256"]
    assert fields["kty"] == "RSA"
    assert fields["key_ops"] == ["wrapKey", "verify", "encrypt"]
    assert fields["e"] == "AQAB"
    assert base64.b64decode(fields["x5c"][0]) == exchange.certificate_der
    assert transfer_key.parse_transfer_key(text) == exchange.certificate_der


@pytest.mark.parametrize(
    "changes",
    [
        {"n": "AQAB"},
        {"e": "Aw"},
        {"kty": "EC"},
        {"x5t": ""},
        {"x5t#S256": ""},
        {"x5c": []},
        {"x5c": [1]},
        {"x5c": ["AAAA"]},
        {"x5c": ["*"]},
        {"x5c": ["\ud800"]},
        {"x5c": ["A" * 60_000]},
        {"x5c": ["AAAA", "AAAA"]},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_transfer_key_that_disagrees_with_itself_is_refused(
    exchange: ExchangeKey, changes: dict[str, Any]
) -> None:
    fields = json.loads(transfer_key.transfer_key(exchange.certificate_der)) | changes
    with pytest.raises(InvalidFile):
        transfer_key.parse_transfer_key(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "\ud800", "{" * 5000, "ä"])
def test_what_is_no_transfer_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidFile):
        transfer_key.parse_transfer_key(text)


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("", NOW, NOW + timedelta(days=1)),
        ("x" * 65, NOW, NOW + timedelta(days=1)),
        ("a\nb", NOW, NOW + timedelta(days=1)),
        ("ä" * 64, NOW, NOW + timedelta(days=1)),
        ("pool", datetime(1, 1, 1, tzinfo=UTC), NOW),
        ("pool", NOW, NOW),
        ("pool", NOW.replace(tzinfo=None), NOW.replace(tzinfo=None) + timedelta(days=1)),
    ],
)
def test_names_and_validities_out_of_bounds_are_refused(name: str, start: datetime, end: datetime) -> None:
    with pytest.raises(InvalidFile):
        transfer_key.make_exchange_key(name, start, end)


def test_only_rsa_certificates_are_exchange_certificates(ten: list[TestOfficer]) -> None:
    parsed = document.parse(made(ten[:3], 2))
    for certificate in (b"", b"0", self_signed(ec.generate_private_key(ec.SECP256R1()), "ec"), bytes(40_000)):
        with pytest.raises(InvalidFile):
            restore_blob.make_restore_blob(parsed, pairs(ten[:2]), certificate)


def test_every_quorum_makes_a_blob_that_the_exchange_key_opens(
    ten: list[TestOfficer], exchange: ExchangeKey
) -> None:
    """G4: all orders of all quorums of 3 of 4; officers beyond the quorum change nothing."""
    parsed = document.parse(made(ten[:4], 3))
    for present in (*itertools.permutations(ten[:4], 3), ten[:4]):
        made_blob = restore_blob.make_restore_blob(parsed, pairs(list(present)), exchange.certificate_der)
        opened = restore_blob.open_restore_blob(made_blob, exchange.private_key, exchange.certificate_der)
        assert list(revealed(opened).items()) == list(CONTENT.items())


def test_no_blob_without_a_quorum(ten: list[TestOfficer], exchange: ExchangeKey) -> None:
    """G4: too few, foreign or repeated officers, or keys of others."""
    parsed = document.parse(made(ten[:4], 3))
    one, two, three, four, foreign = pairs(ten[:5])
    for present, error in (
        ([], QuorumMissing),
        ([one, two], QuorumMissing),
        ([one, two, foreign], InvalidOfficers),
    ):
        with pytest.raises(error):
            restore_blob.make_restore_blob(parsed, present, exchange.certificate_der)
    for at_fault, named in ((two, two), ((four[0], three[1]), three)):
        with pytest.raises(ShareRefused) as refused:
            restore_blob.make_restore_blob(parsed, [one, two, at_fault], exchange.certificate_der)
        assert refused.value.officer == transfer_key.thumbprint(named[1])


def test_a_new_master_key_for_each_blob(ten: list[TestOfficer], exchange: ExchangeKey) -> None:
    parsed = document.parse(made(ten[:3], 2))
    masters = set()
    for _ in range(2):
        made_blob = restore_blob.make_restore_blob(parsed, pairs(ten[:2]), exchange.certificate_der)
        wrapped = json.loads(made_blob)["WrappedKey"]["enc_key"]
        masters.add(tokens.unwrap(exchange.private_key, wrapped).reveal())
    assert len(masters) == 2


def test_a_blob_opens_with_its_exchange_key_only(
    ten: list[TestOfficer], exchange: ExchangeKey, blob: bytes
) -> None:
    same_key = self_signed(exchange.private_key, "another")
    for key, certificate in ((ten[0].key, ten[0].certificate_der), (exchange.private_key, same_key)):
        with pytest.raises(InvalidFile, match="another exchange certificate"):
            restore_blob.open_restore_blob(blob, key, certificate)
    with pytest.raises(InvalidFile, match=tokens.REFUSED):
        restore_blob.open_restore_blob(blob, ten[0].key, exchange.certificate_der)


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_master_key_of_another_length_is_the_same_error(
    exchange: ExchangeKey, blob: bytes, length: int
) -> None:
    fields = json.loads(blob)
    master = Secret(bytes(range(length)))
    fields["WrappedKey"]["enc_key"] = tokens.wrap(exchange.private_key.public_key(), master, "not used")
    if length:
        fields["EncData"] = seal_all(master, [Item("item", Secret(b""))])
    with pytest.raises(InvalidFile, match=tokens.REFUSED):
        restore_blob.open_restore_blob(canonical(fields), exchange.private_key, exchange.certificate_der)


@pytest.mark.parametrize(
    "changes",
    [
        {"EncData": None},
        {"WrappedKey": {}},
        {"WrappedKey": {"enc_key": "", "x5t_256": ""}},
        {"WrappedKey": {"enc_key": "....", "x5t_256": encode(bytes(32))}},
        {"version": 2},
    ],
    ids=str,
)
def test_malformed_blobs_are_refused(exchange: ExchangeKey, blob: bytes, changes: dict[str, Any]) -> None:
    octets = canonical(json.loads(blob) | changes)
    with pytest.raises(InvalidFile):
        restore_blob.open_restore_blob(octets, exchange.private_key, exchange.certificate_der)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_blob_never_raises_anything_else(
    exchange: ExchangeKey, blob: bytes, data: st.DataObject
) -> None:
    """Whatever was changed: the same items, or one error."""
    octets = bytearray(blob)
    at = data.draw(st.integers(0, len(octets) - 1))
    octets[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(InvalidFile):
        opened = restore_blob.open_restore_blob(bytes(octets), exchange.private_key, exchange.certificate_der)
        assert revealed(opened) == CONTENT
