"""JWE to officers, the one-time key, shares as words, and the type that holds secrets (G3, G4)."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from joserfc import jwe
from joserfc.jwk import RSAKey
from shamir_mnemonic.shamir import EncryptedMasterSecret, split_ems

from security_domain import shares
from security_domain.encoding import decode, encode
from security_domain.errors import InvalidFile, InvalidShare
from security_domain.officers import parse_officer
from security_domain.secret import Secret
from security_domain.wrapping import OneTimeKey, open_payload, unwrap_by_officer, wrap_to_officer
from tests.running_pool import TestOfficer
from tests.unit.security_domain.rehearsal import everything_said, quotes

ACCEPTED: dict[str, Any] = {"alg": "RSA-OAEP-256", "enc": "A256GCM"}


@pytest.mark.filterwarnings("ignore:JWE algorithm")
@pytest.mark.parametrize(
    "changes",
    [
        {"alg": "RSA1_5"},
        {"alg": "RSA-OAEP"},
        {"enc": "A128GCM"},
        {"enc": "A192GCM"},
        {"enc": "A128CBC-HS256"},
        {"enc": "A256CBC-HS512"},
        {"zip": "DEF"},
        {"typ": "JWE"},
        {"kid": "another"},
        {"kid": None},
    ],
    ids=str,
)
def test_only_one_kind_of_jwe_opens(ten: list[TestOfficer], changes: dict[str, Any]) -> None:
    """PKCS#1 v1.5, SHA-1, other ciphers, compression and unknown headers are refused."""
    officer = parse_officer(ten[0].certificate_der)
    header = {**ACCEPTED, "kid": officer.thumbprint, **changes}
    header = {name: value for name, value in header.items() if value is not None}
    used = [str(header[name]) for name in ("alg", "enc", "zip") if name in header]
    token = jwe.encrypt_compact(header, b"{}", RSAKey.import_key(officer.public_key), algorithms=used)
    with pytest.raises(InvalidShare):
        unwrap_by_officer(ten[0].key, officer.thumbprint, token)


def test_a_short_tag_is_refused(ten: list[TestOfficer]) -> None:
    """A well-known client skips the check of a tag that has another length."""
    officer = parse_officer(ten[0].certificate_der)
    token = wrap_to_officer(officer.public_key, officer.thumbprint, b"{}")
    assert unwrap_by_officer(ten[0].key, officer.thumbprint, token) == b"{}"
    *parts, tag = token.split(".")
    for length in (0, 1, 4, 8, 12, 15):
        with pytest.raises(InvalidShare):
            unwrap_by_officer(
                ten[0].key, officer.thumbprint, ".".join([*parts, encode(decode(tag)[:length])])
            )
    with pytest.raises(InvalidShare):
        unwrap_by_officer(ten[1].key, officer.thumbprint, token)


@pytest.mark.parametrize("part", range(5))
def test_no_changed_part_of_a_jwe_opens(ten: list[TestOfficer], part: int) -> None:
    officer = parse_officer(ten[0].certificate_der)
    parts = wrap_to_officer(officer.public_key, officer.thumbprint, b"{}").split(".")
    octets = bytearray(decode(parts[part]))
    octets[-1] ^= 1
    for changed in (encode(bytes(octets)), "", "*", "W10", "MQ", "\ud800"):
        with pytest.raises(InvalidShare):
            unwrap_by_officer(
                ten[0].key, officer.thumbprint, ".".join([*parts[:part], changed, *parts[part + 1 :]])
            )
    for token in ("", ".", "a.b", "x" * 5000):
        with pytest.raises(InvalidShare):
            unwrap_by_officer(ten[0].key, officer.thumbprint, token)


def test_a_one_time_key_seals_once() -> None:
    key = OneTimeKey()
    sealed = key.seal(b"payload", b"header")
    assert open_payload(key.key, sealed, b"header") == b"payload"
    with pytest.raises(RuntimeError):
        key.seal(b"another", b"header")
    wrong = [(sealed, b"other"), (sealed[:-1], b"header"), (b"", b"header"), (sealed[:12], b"header")]
    for octets, header in wrong:
        with pytest.raises(InvalidFile):
            open_payload(key.key, octets, header)
    with pytest.raises(InvalidFile):
        open_payload(Secret(os.urandom(32)), sealed, b"header")


@pytest.mark.parametrize(
    ("secret_bytes", "exponent", "extendable", "group"),
    [
        (32, 15, True, (1, [(2, 3)])),
        (32, 1, True, (1, [(2, 3)])),
        (32, 0, False, (1, [(2, 3)])),
        (32, 0, True, (1, [(3, 3)])),
        (32, 0, True, (1, [(2, 3), (2, 3)])),
        (32, 0, True, (2, [(2, 3), (2, 3)])),
        (16, 0, True, (1, [(2, 3)])),
        (64, 0, True, (1, [(2, 3)])),
    ],
)
def test_shares_of_other_splits_are_refused_before_any_work(
    secret_bytes: int, exponent: int, extendable: bool, group: tuple[int, list[tuple[int, int]]]
) -> None:
    """G8: an exponent of 15 would run for minutes; thresholds, groups and lengths are ours or refused."""
    secret = EncryptedMasterSecret(7, extendable, exponent, os.urandom(secret_bytes))
    words = [share.mnemonic() for share in split_ems(*group, secret)[0][:2]]
    for text in words:
        with pytest.raises(InvalidShare):
            shares.parse(text, 2)
    with pytest.raises(InvalidShare):
        shares.combine(words, 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda words: [*words[:-1]],
        lambda words: [*words, "academic"],
        lambda words: ["unicorn", *words[1:]],
        lambda words: [words[1], words[0], *words[2:]] if words[0] != words[1] else words[:-1],
        lambda words: [*words[:20], "zzz" * 60, *words[21:]],
        lambda words: [*words[:20], "\u00e9", *words[21:]],
        lambda words: words[:0],
    ],
)
def test_damaged_words_are_refused_and_not_quoted(damage: Callable[[list[str]], list[str]]) -> None:
    """G3, G8: the library's own errors quote words; ours, and what hangs behind them, do not."""
    words = shares.split(Secret(os.urandom(32)), 2, 3)[0].split()
    with pytest.raises(InvalidShare) as refused:
        shares.parse(" ".join(damage(words)), 2)
    said = everything_said(refused.value)
    assert "unicorn" not in said
    assert not quotes(said, " ".join(words))


def test_shares_of_two_splits_of_one_key_do_not_mix() -> None:
    """Each split has fresh coefficients; the identifier may agree, the digest does not."""
    key = Secret(os.urandom(32))
    first, second = shares.split(key, 2, 3), shares.split(key, 2, 3)
    assert shares.combine(first[:2], 2).reveal() == shares.combine(second[1:], 2).reveal() == key.reveal()
    identifier = shares.parse(first[0], 2).identifier
    disguised = dataclasses.replace(shares.parse(second[1], 2), identifier=identifier).mnemonic()
    with pytest.raises(InvalidShare):
        shares.combine([first[0], disguised], 2)


def test_only_a_wrapping_key_is_split() -> None:
    with pytest.raises(InvalidShare):
        shares.split(Secret(os.urandom(16)), 2, 3)


def test_commitments_differ_in_everything_they_bind() -> None:
    """G4: a commitment is good for one place only."""
    base: tuple[str, int, int, str] = ("p", 1, 1, "words")
    others = [("q", 1, 1, "words"), ("p", 2, 1, "words"), ("p", 1, 2, "words"), ("p", 1, 1, "wordz")]
    shifted = [("p1", 1, 1, "words"), ("p", 11, 1, "words"), ("p", 1, 11, "words"), ("p", 1, 1, "1words")]
    values = {shares.commitment(*arguments) for arguments in [base, *others, *shifted]}
    assert len(values) == 9


def test_secrets_are_not_printed_copied_or_pickled() -> None:
    """G3."""
    secret = Secret(b"hidden octets")
    holder = {"key": secret, "list": [secret]}
    assert "hidden" not in f"{secret} {secret!r} {secret!s:>40} {holder}"
    assert "hidden" not in "%s" % secret  # noqa: UP031 - this spelling too
    assert not hasattr(secret, "__dict__")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError):
            pickle.dumps(secret, protocol)
    for duplicate in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            duplicate(secret)
    assert len(secret) == 13
    secret.wipe()
    assert secret.reveal() == bytes(13)
