"""Azure's security-domain document: any quorum opens it, nothing else does (G4)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from security_domain.azure import document, items, sharing, tokens
from security_domain.azure.items import Item
from security_domain.encoding import canonical, encode
from security_domain.errors import (
    InvalidFile,
    InvalidOfficers,
    InvalidShare,
    QuorumMissing,
    SecurityDomainError,
)
from security_domain.officers import parse_officer
from security_domain.secret import Secret
from tests.running_pool import TestOfficer

CONTENT = {"hsm_backup": os.urandom(4000), "base_enclave_backup": b"", "partition_enclave_backup": b"0" * 17}


def content() -> list[Item]:
    """Three items, as Azure's own documents have."""
    return [Item(tag, Secret(plaintext)) for tag, plaintext in CONTENT.items()]


def revealed(opened: list[Item]) -> dict[str, bytes]:
    """Return tags and plaintexts, in order."""
    return {item.tag: item.plaintext.reveal() for item in opened}


def made(officers: list[TestOfficer], required: int) -> bytes:
    """Make a document for these officers."""
    return document.make(content(), [officer.certificate_der for officer in officers], required)


def share_of(parsed: document.Document, officer: TestOfficer) -> Secret:
    """Open an officer's share."""
    return document.open_share(parsed, officer.key, parse_officer(officer.certificate_der).thumbprint)


def open_as(octets: bytes, officers: list[TestOfficer]) -> list[Item]:
    """Open a document from its octets, as a quorum does."""
    parsed = document.parse(octets)
    return document.open_items(parsed, [share_of(parsed, officer) for officer in officers])


@pytest.mark.parametrize(("required", "total"), [(2, 3), (3, 3), (3, 4), (2, 10), (10, 10)])
def test_every_quorum_opens_and_one_fewer_does_not(ten: list[TestOfficer], required: int, total: int) -> None:
    """G4 through the whole file: keys, tokens, shares, items, in their order."""
    parsed = document.parse(made(ten[:total], required))
    shares = [share_of(parsed, officer) for officer in ten[:total]]
    for quorum in itertools.combinations(shares, required):
        opened = document.open_items(parsed, quorum)
        assert list(revealed(opened).items()) == list(CONTENT.items())
        with pytest.raises(QuorumMissing):
            document.open_items(parsed, quorum[1:])


def test_a_document_claiming_a_smaller_quorum_does_not_open(ten: list[TestOfficer]) -> None:
    """G4: the quorum is in the polynomial, not in the field."""
    fields = json.loads(made(ten[:4], 3))
    fields["SharedKeys"]["required"] = 2
    for pair in itertools.combinations(ten[:4], 2):
        with pytest.raises(InvalidFile, match=tokens.REFUSED):
            open_as(canonical(fields), list(pair))


def test_forged_foreign_and_repeated_shares_are_refused(ten: list[TestOfficer]) -> None:
    """G4: what is wrong with a well-formed share is not told."""
    parsed, other = (document.parse(made(ten[:3], 2)) for _ in range(2))
    good, second = (share_of(parsed, officer) for officer in ten[:2])
    flipped = bytearray(second.reveal())
    flipped[0] ^= 1
    forged = [
        Secret(bytes(flipped)),
        sharing.make_share([[256, 256]] * 32, 2),
        share_of(other, ten[1]),
        sharing.split(Secret(bytes(32)), 2, 3)[2],
    ]
    for wrong in forged:
        with pytest.raises(InvalidFile) as caught:
            document.open_items(parsed, [good, wrong])
        assert str(caught.value) == tokens.REFUSED
    for malformed in (good, Secret(good.reveal()[:63]), Secret(b""), Secret(bytes(64))):
        with pytest.raises(InvalidShare):
            document.open_items(parsed, [good, malformed])


def test_every_forgery_of_one_byte_is_the_same_error(ten: list[TestOfficer]) -> None:
    """Sums that are no byte included: no error tells anything of the other officers' shares."""
    parsed = document.parse(made(ten[:3], 2))
    good, second = (share_of(parsed, officer) for officer in ten[:2])
    value = sharing.parse_share(second)[1][0]
    for change in range(1, sharing.FIELD):
        word = 2 << 9 | (value + change) % sharing.FIELD
        with pytest.raises(InvalidFile) as caught:
            document.open_items(parsed, [good, Secret(word.to_bytes(2, "little") + second.reveal()[2:])])
        assert str(caught.value) == tokens.REFUSED


def test_a_share_opens_with_its_officers_key_only(ten: list[TestOfficer]) -> None:
    parsed = document.parse(made(ten[:3], 2))
    own = parse_officer(ten[0].certificate_der).thumbprint
    with pytest.raises(InvalidFile, match=tokens.REFUSED):
        document.open_share(parsed, ten[1].key, own)
    with pytest.raises(InvalidOfficers):
        share_of(parsed, ten[3])


@pytest.mark.parametrize("plaintext", [b"", bytes(63), bytes(64), bytes(65)], ids=len)
def test_what_opens_must_be_a_share(ten: list[TestOfficer], plaintext: bytes) -> None:
    fields = json.loads(made(ten[:3], 2))
    token = tokens.wrap(ten[0].key.public_key(), Secret(plaintext), "any")
    fields["SharedKeys"]["enc_shares"][0]["enc_key"] = token
    with pytest.raises(InvalidShare):
        share_of(document.parse(canonical(fields)), ten[0])


def test_it_is_spelled_as_azure_spells_it(ten: list[TestOfficer]) -> None:
    octets = made(ten[:3], 2)
    fields = json.loads(octets)
    assert json.dumps(fields, separators=(",", ":")).encode() == octets
    assert list(fields) == ["EncData", "SharedKeys", "version"]
    assert [list(item) for item in fields["EncData"]["data"]] == [["compact_jwe", "tag"]] * 3
    assert list(fields["SharedKeys"]) == ["enc_shares", "key_algorithm", "required"]
    assert fields["version"] == 2
    for spelling in ({"indent": 2}, {}, {"sort_keys": True}):
        other = json.dumps(fields, **spelling).encode()
        assert document.parse(other) == document.parse(octets)


def test_no_two_files_are_alike(ten: list[TestOfficer]) -> None:
    one, two = (json.loads(made(ten[:3], 2)) for _ in range(2))
    for first, second in zip(one["EncData"]["data"], two["EncData"]["data"], strict=True):
        assert first["compact_jwe"].split(".")[2:] != second["compact_jwe"].split(".")[2:]
    wrapped = [share["enc_key"] for fields in (one, two) for share in fields["SharedKeys"]["enc_shares"]]
    assert len(set(wrapped)) == 6
    masters = set()
    for fields in (one, two):
        parsed = document.parse(canonical(fields))
        masters.add(sharing.combine([share_of(parsed, officer) for officer in ten[:2]], 2).reveal())
    assert len(masters) == 2


@pytest.mark.parametrize(
    "content_of",
    [
        list,
        lambda: [Item("same", Secret(b"")), Item("same", Secret(b""))],
        lambda: [Item(tag, Secret(b"")) for tag in map(str, range(items.ITEMS_MAX + 1))],
        lambda: [Item("", Secret(b""))],
        lambda: [Item("x" * 65, Secret(b""))],
        lambda: [Item("nul\0", Secret(b""))],
        lambda: [Item("line\n", Secret(b""))],
        lambda: [Item("ä", Secret(b""))],
        lambda: [Item("item", Secret(bytes(tokens.ITEM_BYTES_MAX + 1)))],
        lambda: [Item(tag, Secret(bytes(tokens.ITEM_BYTES_MAX))) for tag in "abcdefghijklmnop"],
    ],
)
def test_items_out_of_bounds_are_refused(
    ten: list[TestOfficer], content_of: Callable[[], list[Item]]
) -> None:
    with pytest.raises(InvalidFile):
        document.make(content_of(), [officer.certificate_der for officer in ten[:3]], 2)


@pytest.mark.parametrize(("total", "required"), [(2, 2), (3, 1), (3, 4), (0, 2), (11, 2)])
def test_officers_out_of_bounds_are_refused(ten: list[TestOfficer], total: int, required: int) -> None:
    certificates = [officer.certificate_der for officer in (*ten, ten[0])[:total]]
    with pytest.raises(InvalidOfficers):
        document.make(content(), certificates, required)


def _set(path: str, value: object) -> Callable[[Any], None]:
    *way, last = path.split("/")

    def change(fields: Any) -> None:
        for step in way:
            fields = fields[int(step) if step.isdigit() else step]
        fields[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", 1),
        ("version", True),
        ("version", "2"),
        ("extra", 1),
        ("EncData", []),
        ("EncData/kdf", "hkdf"),
        ("EncData/data", []),
        ("EncData/data", [{}] * 17),
        ("EncData/data/0/tag", "base_enclave_backup"),
        ("EncData/data/0/tag", 7),
        ("EncData/data/0/compact_jwe", "...."),
        ("EncData/data/0/compact_jwe", "A" * (tokens.ITEM_CHARACTERS_MAX + 1)),
        ("EncData/data/0", None),
        ("SharedKeys/required", 1),
        ("SharedKeys/required", 4),
        ("SharedKeys/required", 2.0),
        ("SharedKeys/key_algorithm", "shamir"),
        ("SharedKeys/enc_shares", []),
        ("SharedKeys/enc_shares", [{}] * 11),
        ("SharedKeys/enc_shares/0/x5t_256", "AA"),
        ("SharedKeys/enc_shares/0/x5t_256", "A" * 44),
        ("SharedKeys/enc_shares/0/enc_key", "A" * 5000),
        ("SharedKeys/enc_shares/0/enc_key", 1),
    ],
)
def test_documents_out_of_bounds_are_refused(ten: list[TestOfficer], path: str, value: object) -> None:
    fields = json.loads(made(ten[:3], 2))
    _set(path, value)(fields)
    with pytest.raises(InvalidFile):
        document.parse(canonical(fields))


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "RSA1_5", "enc": "A256CBC-HS512", "kid": "any"},
        {"alg": "RSA-OAEP", "enc": "A256CBC-HS512", "kid": "any"},
        {"alg": "RSA-OAEP-256", "enc": "A256GCM", "kid": "any"},
        {"alg": "dir", "enc": "A256CBC-HS512", "kid": "any"},
        {"alg": "RSA-OAEP-256", "enc": "A256CBC-HS512", "kid": 1},
    ],
    ids=str,
)
def test_other_algorithms_are_refused_without_any_key(
    ten: list[TestOfficer], header: dict[str, object]
) -> None:
    """Whoever checks a file needs no secret to find a share that Azure's own code would open badly."""
    fields = json.loads(made(ten[:3], 2))
    share = fields["SharedKeys"]["enc_shares"][0]
    share["enc_key"] = ".".join([encode(canonical(header)), *share["enc_key"].split(".")[1:]])
    with pytest.raises(InvalidFile):
        document.parse(canonical(fields))


def test_two_shares_for_one_certificate_and_repeated_fields_are_refused(ten: list[TestOfficer]) -> None:
    octets = made(ten[:3], 2)
    fields = json.loads(octets)
    fields["SharedKeys"]["enc_shares"][1] = fields["SharedKeys"]["enc_shares"][0]
    for wrong in (
        canonical(fields),
        octets.replace(b'"version":2', b'"version":2,"version":2'),
        octets + b" " * items.DOCUMENT_BYTES_MAX,
        b"[" * 100_000,
        b'{"version":' + b"9" * 5000 + b"}",
        b"\xff",
        b"",
        b"null",
    ):
        with pytest.raises(InvalidFile):
            document.parse(wrong)


@pytest.fixture(scope="module")
def untouched(ten: list[TestOfficer]) -> bytes:
    """A document, 2 of 3."""
    return made(ten[:3], 2)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_changed_octets_never_raise_anything_else(
    ten: list[TestOfficer], untouched: bytes, data: st.DataObject
) -> None:
    """Whatever was changed: the same items, or one of our errors."""
    octets = bytearray(untouched)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(octets) - 1))
        inserted = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b".", b"{", b"[", b"\\u0000"]))
        octets[at : at + data.draw(st.integers(0, 40))] = inserted
    with contextlib.suppress(SecurityDomainError):
        assert revealed(open_as(bytes(octets), ten[:2])) == CONTENT


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_changed_values_never_raise_anything_else(
    ten: list[TestOfficer], untouched: bytes, data: st.DataObject
) -> None:
    """As above, with any JSON in the place of any value."""
    fields: Any = json.loads(untouched)
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    at = fields
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(values)
    with contextlib.suppress(SecurityDomainError):
        assert revealed(open_as(json.dumps(fields).encode(), ten[:2])) == CONTENT
