"""The two kinds of JWE in Azure's format; every other is refused with one error (G4)."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from joserfc import jwe
from joserfc.jwk import OctKey, RSAKey

from security_domain.azure import tokens
from security_domain.encoding import decode, encode
from security_domain.errors import InvalidFile
from security_domain.secret import Secret
from tests.running_pool import TestOfficer
from tests.unit.security_domain.rehearsal import everything_said

PLAINTEXT = Secret(b"sixty-four bytes of a share or an item, whatever it is, 64 in all")
ITEM_KEY = Secret(bytes(range(64)))


def refused(opening: Any, *arguments: object) -> None:
    """Check that nothing opens, and that the error is always the same and holds nothing."""
    with pytest.raises(InvalidFile) as caught:
        opening(*arguments)
    assert everything_said(caught.value) == "\n".join(
        [tokens.REFUSED, repr((tokens.REFUSED,)), "{}", "", "", ""]
    )


def made(header: dict[str, Any], key: Any) -> str:
    """Make a token of any kind with a library."""
    used = [str(header[name]) for name in ("alg", "enc", "zip") if name in header]
    return jwe.encrypt_compact(header, PLAINTEXT.reveal(), key, algorithms=used)


@pytest.mark.filterwarnings("ignore:JWE algorithm")
@pytest.mark.parametrize(
    "changes",
    [
        {"alg": "RSA1_5"},
        {"alg": "RSA-OAEP"},
        {"enc": "A256GCM"},
        {"enc": "A128GCM"},
        {"enc": "A128CBC-HS256"},
        {"enc": "A192CBC-HS384"},
        {"zip": "DEF"},
        {"typ": "JWE"},
        {"kid": None},
    ],
    ids=str,
)
def test_only_one_kind_of_wrapped_key_opens(ten: list[TestOfficer], changes: dict[str, Any]) -> None:
    """PKCS#1 v1.5, SHA-1, other ciphers, compression and unknown headers are refused."""
    header = {"alg": "RSA-OAEP-256", "enc": "A256CBC-HS512", "kid": "any", **changes}
    header = {name: value for name, value in header.items() if value is not None}
    token = made(header, RSAKey.import_key(ten[0].key.public_key()))
    refused(tokens.unwrap, ten[0].key, token)


@pytest.mark.parametrize(
    "changes",
    [
        {"enc": "A256GCM"},
        {"enc": "A128CBC-HS256"},
        {"alg": "A256KW"},
        {"zip": "DEF"},
        {"typ": "JWE"},
        {"kid": None},
        {"kid": "another"},
    ],
    ids=str,
)
def test_only_one_kind_of_item_opens(changes: dict[str, Any]) -> None:
    header = {"alg": "dir", "enc": "A256CBC-HS512", "kid": "item", **changes}
    header = {name: value for name, value in header.items() if value is not None}
    length = 64 if header == {**header, "alg": "dir", "enc": "A256CBC-HS512"} else 32
    token = made(header, OctKey.import_key(ITEM_KEY.reveal()[:length]))
    refused(tokens.unseal, ITEM_KEY, token, "item")


def test_what_was_encrypted_opens_with_the_same_key_only(ten: list[TestOfficer]) -> None:
    wrapped = tokens.wrap(ten[0].key.public_key(), PLAINTEXT, "any")
    assert tokens.unwrap(ten[0].key, wrapped).reveal() == PLAINTEXT.reveal()
    refused(tokens.unwrap, ten[1].key, wrapped)
    sealed = tokens.seal(ITEM_KEY, PLAINTEXT, "item")
    assert tokens.unseal(ITEM_KEY, sealed, "item").reveal() == PLAINTEXT.reveal()
    refused(tokens.unseal, Secret(bytes(64)), sealed, "item")
    refused(tokens.unseal, Secret(bytes(32)), sealed, "item")
    refused(tokens.unseal, ITEM_KEY, wrapped, "any")
    refused(tokens.unwrap, ten[0].key, sealed)


@pytest.mark.parametrize("length", [0, 1, 8, 15, 16, 31, 33, 48, 64])
def test_a_tag_of_another_length_is_refused(ten: list[TestOfficer], length: int) -> None:
    """Azure's command line skips the check of such a tag; this library must not."""
    wrapped = tokens.wrap(ten[0].key.public_key(), PLAINTEXT, "any")
    sealed = tokens.seal(ITEM_KEY, PLAINTEXT, "item")
    for token, opening in (
        (wrapped, lambda changed: tokens.unwrap(ten[0].key, changed)),
        (sealed, lambda changed: tokens.unseal(ITEM_KEY, changed, "item")),
    ):
        *parts, tag = token.split(".")
        refused(opening, ".".join([*parts, encode((decode(tag) * 2)[:length])]))


@pytest.mark.parametrize("part", range(5))
def test_no_changed_part_opens(ten: list[TestOfficer], part: int) -> None:
    wrapped = tokens.wrap(ten[0].key.public_key(), PLAINTEXT, "any").split(".")
    sealed = tokens.seal(ITEM_KEY, PLAINTEXT, "item").split(".")
    for original in (wrapped, sealed):
        octets = bytearray(decode(original[part])) or bytearray(b"\0")
        octets[-1] ^= 1
        for changed in (encode(bytes(octets)), original[part] + "=", "*", "W10", "MQ", "\ud800", "\x00"):
            token = ".".join([*original[:part], changed, *original[part + 1 :]])
            if original is wrapped:
                refused(tokens.unwrap, ten[0].key, token)
            else:
                refused(tokens.unseal, ITEM_KEY, token, "item")


def test_large_tokens_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work for what is too large: the library that decrypts is not reached."""
    reached: list[object] = []
    monkeypatch.setattr(jwe, "decrypt_compact", lambda *arguments, **_: reached.append(arguments))
    sealed = tokens.seal(ITEM_KEY, PLAINTEXT, "item")
    padded = json.dumps({"alg": "dir", "enc": "A256CBC-HS512", "kid": "item"}) + " " * 512
    for token in (
        "A" * (tokens.ITEM_CHARACTERS_MAX + 1),
        sealed + "A" * tokens.ITEM_CHARACTERS_MAX,
        "." * 4,
        "." * 5000,
        ".".join([encode(padded.encode()), *sealed.split(".")[1:]]),
    ):
        refused(tokens.unseal, ITEM_KEY, token, "item")
    assert not reached


def test_an_item_that_is_too_large_is_refused_though_it_is_well_encrypted() -> None:
    header = {"alg": "dir", "enc": "A256CBC-HS512", "kid": "item"}
    key = OctKey.import_key(ITEM_KEY.reveal())
    token = jwe.encrypt_compact(header, bytes(40_000), key, algorithms=["dir", "A256CBC-HS512"])
    refused(tokens.unseal, ITEM_KEY, token, "item")


def test_the_largest_item_opens_and_a_larger_one_is_not_made() -> None:
    largest = Secret(os.urandom(tokens.ITEM_BYTES_MAX))
    token = tokens.seal(ITEM_KEY, largest, "x" * 64)
    assert tokens.unseal(ITEM_KEY, token, "x" * 64).reveal() == largest.reveal()
    with pytest.raises(InvalidFile):
        tokens.seal(ITEM_KEY, Secret(bytes(tokens.ITEM_BYTES_MAX + 1)), "item")
