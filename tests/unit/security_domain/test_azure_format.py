"""The vectors in FORMAT.md, section "Azure's format", read from the document and computed (G4)."""

from __future__ import annotations

import hashlib
import hmac
import re

from security_domain.azure import key_derivation, sharing
from security_domain.secret import Secret
from tests.running_pool import ROOT


def documented() -> dict[str, str]:
    """Return the lines ``name = value`` of the vectors."""
    text = (ROOT / "security_domain" / "FORMAT.md").read_text().partition("## Azure's format")[2]
    return dict(re.findall(r"^([a-z0-9-]+) = (.+)$", text, re.MULTILINE))


def numbers(name: str) -> list[int]:
    """Return a documented list of numbers."""
    return [int(number) for number in documented()[name].split()]


def by_hand(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """SP 800-108 in counter mode, one block, from its definition."""
    fixed = label + b"\0" + context + bits.to_bytes(4, "big")
    return hmac.digest(key, b"\0\0\0\1" + fixed, hashlib.sha512)[: bits // 8]


def test_key_derivation() -> None:
    vectors = documented()
    key = bytes.fromhex(vectors["kdf-key"])
    label, context = vectors["kdf-label"].encode(), vectors["kdf-context"].encode()
    expected = bytes.fromhex(vectors["kdf-256"])
    assert key_derivation.derive(key, label, context, 32) == expected == by_hand(key, label, context, 256)
    tag = vectors["item-tag"]
    expected = bytes.fromhex(vectors["item-key"])
    assert key_derivation.item_key(Secret(key), tag).reveal() == expected
    assert by_hand(key, tag.encode(), b"", 512) == expected


def test_sharing() -> None:
    coefficients = numbers("coefficients")
    values = numbers("values-1-to-5")
    shares = [sharing.make_share([coefficients] * 32, number) for number in range(1, 6)]
    assert [sharing.parse_share(share) for share in shares] == [
        (number, [value] * 32) for number, value in enumerate(values, 1)
    ]
    for quorum in (shares[:3], shares[2:], [shares[4], shares[0], shares[2]]):
        assert sharing.combine(quorum, 3).reveal() == bytes([coefficients[0]]) * 32
    by_definition = [sum(c * x**power for power, c in enumerate(coefficients)) % 257 for x in range(1, 6)]
    assert by_definition == values


def test_share_encoding() -> None:
    number, value = numbers("share-number-and-value")
    encoded = bytes.fromhex(documented()["share-bytes"])
    assert sharing.parse_share(Secret(encoded * 32)) == (number, [value] * 32)
    assert sharing.make_share([[value, 0]] * 32, number).reveal() == encoded * 32
