"""The security-domain file: a changed one never opens, junk is a typed refusal (G4, G8)."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from security_domain import container, shares
from security_domain.encoding import canonical, decode, encode
from security_domain.errors import InvalidFile, SecurityDomainError
from security_domain.officers import parse_officer
from security_domain.wrapping import open_payload, wrap_to_officer
from tests.running_pool import ROOT, TestOfficer
from tests.unit.security_domain.rehearsal import (
    create,
    everything_said,
    own_words,
    quotes,
    self_signed,
    submit_all,
)

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def file(ten: list[TestOfficer]) -> bytes:
    return create(ten[:3], 2).file


@pytest.fixture(scope="module")
def other(ten: list[TestOfficer]) -> Fields:
    """Another security domain of the same pool, officers and generation."""
    return json.loads(create(ten[:3], 2).file)


def test_a_file_is_read_as_it_was_written(file: bytes) -> None:
    parsed = container.parse(file)
    assert parsed.serialise() == file
    assert [entry.index for entry in parsed.officers] == [1, 2, 3]
    assert parsed.required == 2


@pytest.mark.parametrize(
    "name",
    ["payload", "recovery_public_key", "backup_public_key", "owner_public_key", "key_check_value"],
)
def test_a_field_of_another_domain_is_noticed(
    ten: list[TestOfficer], file: bytes, other: Fields, name: str
) -> None:
    """G4: everything but the ciphertext is authenticated by it."""
    changed = {**json.loads(file), name: other[name]}
    with pytest.raises(InvalidFile, match="was changed"):
        submit_all(canonical(changed), ten[:2])


@pytest.mark.parametrize("name", ["certificate", "thumbprint", "share_jwe", "share_commitment"])
@pytest.mark.parametrize("position", [0, 2])
def test_a_field_of_another_officer_or_domain_is_noticed(
    ten: list[TestOfficer], file: bytes, other: Fields, name: str, position: int
) -> None:
    """G4: also in the entry of an officer who submits nothing (position 2)."""
    sources = [json.loads(file)["officers"][1], other["officers"][position]]
    for source in sources:
        changed = json.loads(file)
        if changed["officers"][position][name] == source[name]:
            continue
        changed["officers"][position][name] = source[name]
        with pytest.raises(SecurityDomainError):
            submit_all(canonical(changed), ten[:2])


def put(name: str, value: object) -> Callable[[Fields], None]:
    def change(fields: Fields) -> None:
        fields[name] = value

    return change


def put_officer(name: str, value: object) -> Callable[[Fields], None]:
    def change(fields: Fields) -> None:
        fields["officers"][1][name] = value

    return change


def repeat_officer(fields: Fields) -> None:
    fields["officers"][2] = {**fields["officers"][1], "index": 3}


REFUSED_BY_PARSING: list[Callable[[Fields], object]] = [
    put("format", "mhsm-security-domain/2"),
    put("unknown", 1),
    put("pool_id", ""),
    put("pool_id", "p" * 65),
    put("pool_id", "\u00e9"),
    put("pool_id", "\ud800"),
    put("pool_id", 1),
    put("generation", 0),
    put("generation", -1),
    put("generation", 1_000_001),
    put("generation", True),
    put("generation", 1.0),
    put("generation", "1"),
    put("generation", None),
    put("required", 1),
    put("required", 4),
    put("created", "yesterday"),
    put("created", "2026-01-01T00:00:00Z\n"),
    put("owner_public_key", "AA"),
    put("recovery_public_key", encode(bytes(31))),
    put("backup_public_key", encode(bytes(33))),
    put("key_check_value", encode(bytes(15))),
    put("key_check_value", "*" * 22),
    put("payload", encode(bytes(5000))),
    put("payload", "AB"),  # not the one spelling of its octet
    put("officers", []),
    put("officers", {}),
    put("officers", [1, 2, 3]),
    put("officers", [[[[]]]] * 3),
    put_officer("index", 3),
    put_officer("index", "2"),
    put_officer("unknown", 1),
    put_officer("certificate", "AAAA"),
    put_officer("thumbprint", encode(bytes(32))),
    put_officer("share_jwe", "x" * 5000),
    put_officer("share_jwe", "\ud800"),
    put_officer("share_commitment", encode(bytes(31))),
    repeat_officer,
    lambda fields: fields.pop("created"),
    lambda fields: fields["officers"][0].pop("share_jwe"),
    lambda fields: fields["officers"].pop(),
    lambda fields: fields["officers"].reverse(),
    lambda fields: fields["officers"].extend(copy.deepcopy(fields["officers"] * 3)),
]


@pytest.mark.parametrize("change", REFUSED_BY_PARSING, ids=range(len(REFUSED_BY_PARSING)))
def test_wrong_fields_are_refused_by_parsing(file: bytes, change: Callable[[Fields], object]) -> None:
    """G8."""
    fields = json.loads(file)
    change(fields)
    with pytest.raises(InvalidFile):
        container.parse(canonical(fields))


@pytest.mark.parametrize("name", ["pool_id", "generation", "required", "created"])
def test_a_plausible_header_of_another_domain_does_not_open(
    ten: list[TestOfficer], file: bytes, name: str
) -> None:
    """G4: whoever holds a quorum of shares still sees that the header was changed."""
    plausible = {
        "pool_id": "f" * 32,
        "generation": 2,
        "required": 3,
        "created": "2000-01-01T00:00:00Z",
    }
    changed = canonical({**json.loads(file), name: plausible[name]})
    assert container.parse(changed)
    with pytest.raises(SecurityDomainError):
        submit_all(changed, ten[:3])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_changed_octet_opens(ten: list[TestOfficer], file: bytes, data: st.DataObject) -> None:
    """G4, by property: any one octet of the file."""
    at = data.draw(st.integers(0, len(file) - 1))
    changed = bytearray(file)
    changed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SecurityDomainError) as refused:
        submit_all(bytes(changed), ten[:2])
    assert not quotes(everything_said(refused.value), own_words(file, ten[0]))


def test_only_one_spelling_of_a_file_is_read(file: bytes) -> None:
    """Nobody may hide anything in white space, doubled fields or another encoding."""
    fields = json.loads(file)
    doubled = file.replace(b'"required":2', b'"required":3,"required":2')
    spellings = [
        file + b"\n",
        b" " + file,
        json.dumps(fields).encode(),
        json.dumps(fields, separators=(",", ":"), sort_keys=True, indent=0).encode(),
        file.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + file,
        doubled,
    ]
    for spelling in spellings:
        assert json.loads(spelling) == fields
        with pytest.raises(InvalidFile):
            container.parse(spelling)


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"NaN",
        b"\xff\xfe",
        b'{"format":1}',
        b"[" * 100_000,
        b'{"officers":' + b"[" * 900 + b"]" * 900 + b"}",
        b"1" * 5000,
        b" " * (container.FILE_BYTES_MAX + 1),
    ],
    ids=lambda junk: repr(junk[:12]),
)
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(InvalidFile):
        container.parse(junk)


@given(st.binary(max_size=300))
def test_any_octets_are_refused(octets: bytes) -> None:
    """G8: a typed refusal, never an accident."""
    with pytest.raises(InvalidFile):
        container.parse(octets)


def test_a_secret_text_that_is_not_json_is_not_quoted(ten: list[TestOfficer], file: bytes) -> None:
    """G3: parsers like to keep what they could not read in their errors."""
    parsed = container.parse(file)
    words = own_words(file, ten[0])
    for text in (words, '{"mnemonic":"' + words, words + "\ud800"):
        octets = text.encode(errors="surrogatepass")
        token = wrap_to_officer(ten[0].key.public_key(), parsed.officers[0].thumbprint, octets)
        changed = json.loads(file)
        changed["officers"][0]["share_jwe"] = token
        with pytest.raises(SecurityDomainError) as refused:
            own_words(canonical(changed), ten[0])
        assert not quotes(everything_said(refused.value), words)


def test_a_share_stated_to_be_another_is_refused(ten: list[TestOfficer], file: bytes) -> None:
    """G4: what the officer's share says of itself must agree with the file around it."""
    parsed = container.parse(file)
    right = {
        "pool_id": parsed.pool_id,
        "generation": 1,
        "index": 1,
        "required": 2,
        "total": 3,
        "mnemonic": own_words(file, ten[0]),
    }
    wrong: Fields = {"pool_id": "f" * 32, "generation": 2, "index": 2, "required": 3, "total": 4}
    variants = [{**right, name: value} for name, value in wrong.items()]
    variants += [{**right, "mnemonic": "\ud800"}, {**right, "unknown": 1}]
    for share, refused in [(right, False), *((variant, True) for variant in variants)]:
        changed = json.loads(file)
        changed["officers"][0]["share_jwe"] = wrap_to_officer(
            ten[0].key.public_key(), parsed.officers[0].thumbprint, canonical(share)
        )
        if refused:
            with pytest.raises(SecurityDomainError):
                own_words(canonical(changed), ten[0])
        else:
            assert own_words(canonical(changed), ten[0]) == right["mnemonic"]


IN_HEADER = {
    "key_check_value": bytes(16),
    "recovery_public_key": b"\t" + bytes(31),
    "backup_public_key": b"\t" + bytes(31),
}


@pytest.mark.parametrize("lie", [*IN_HEADER, "pool_id", "generation", "root", "nothing"])
def test_a_payload_that_contradicts_its_header_is_refused(
    ten: list[TestOfficer], file: bytes, lie: str
) -> None:
    """G3, G4: even when whoever made the file sealed the contradiction himself, with keys of his own."""
    key = shares.combine([own_words(file, officer) for officer in ten[:2]], 2)
    parsed = container.parse(file)
    payload = json.loads(open_payload(key, parsed.payload, parsed.header()))
    if lie in IN_HEADER:
        fields: Fields = {lie: IN_HEADER[lie]}
        parsed = dataclasses.replace(parsed, **fields)
    else:
        lies = {"pool_id": "f" * 32, "generation": 2, "root": encode(bytes(32)), "nothing": None}
        payload |= {lie: lies[lie]} if lies[lie] is not None else {}
    nonce = os.urandom(12)
    ciphertext = AESGCM(key.reveal()).encrypt(nonce, canonical(payload), parsed.header())
    changed = dataclasses.replace(parsed, payload=nonce + ciphertext).serialise()
    if lie == "nothing":
        assert submit_all(changed, ten[:2])
    else:
        with pytest.raises(InvalidFile):
            submit_all(changed, ten[:2])


def test_the_file_holds_no_share(ten: list[TestOfficer], file: bytes) -> None:
    """G3: neither words nor values stand in it, and officers' private keys even less."""
    for officer in ten[:3]:
        words = own_words(file, officer)
        assert not quotes(file.decode(), words)
        for entry in container.parse(file).officers:
            assert words.encode() not in entry.share_jwe.encode()
            assert all(b" ".join(words.encode().split()[4:6]) not in decode(part) for part in segments(entry))


def segments(entry: container.OfficerEntry) -> list[str]:
    return entry.share_jwe.split(".")


def test_officers_with_one_key_are_refused_in_a_file(ten: list[TestOfficer], file: bytes) -> None:
    """G4: otherwise one officer could be two of a quorum."""
    changed = json.loads(file)
    renewed = self_signed(ten[0].key, "renewed")
    changed["officers"][1].update(certificate=encode(renewed), thumbprint=parse_officer(renewed).thumbprint)
    with pytest.raises(InvalidFile, match="same key"):
        container.parse(canonical(changed))


def test_the_library_is_a_leaf() -> None:
    """Usable on an offline machine: nothing of the pool and no RPC is loaded with it."""
    program = (
        "import sys, security_domain.recovery, security_domain.domain, security_domain.submission\n"
        "walls = {'hsm_pool', 'fabric_controller', 'mhsm', 'grpc'}\n"
        "print(sorted(walls & {name.split('.')[0] for name in sys.modules}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert loaded.stdout.strip() == "[]"
