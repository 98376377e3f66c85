"""Items: what a security domain carries, each under a key derived from the master key by its tag."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from security_domain.azure import key_derivation, tokens
from security_domain.encoding import check_object
from security_domain.errors import InvalidFile
from security_domain.secret import Secret

ITEMS_MAX = 16
DOCUMENT_BYTES_MAX = 512 * 1024
"""Of a security-domain document and of a restore blob."""
_TAG = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Item:
    """Something that a quorum opens."""

    tag: str
    plaintext: Secret


@dataclass(frozen=True, slots=True)
class SealedItem:
    """An item as it stands in a file."""

    tag: str
    token: str


def seal_all(master: Secret, items: Sequence[Item]) -> dict[str, Any]:
    """Return the ``EncData`` of these items.

    Raises:
        InvalidFile: They are none, too many or too large, or their tags are malformed or repeated.
    """
    _check_tags([item.tag for item in items])
    data = [
        {
            "compact_jwe": tokens.seal(key_derivation.item_key(master, item.tag), item.plaintext, item.tag),
            "tag": item.tag,
        }
        for item in items
    ]
    return {"data": data, "kdf": key_derivation.NAME}


def parse_all(value: object) -> tuple[SealedItem, ...]:
    """Parse an ``EncData``.

    Raises:
        InvalidFile: It is something else.
    """
    fields = check_object(value, {"data": list, "kdf": str})
    if fields["kdf"] != key_derivation.NAME:
        raise InvalidFile("the key derivation is not known")
    checked = [check_object(item, {"compact_jwe": str, "tag": str}) for item in fields["data"]]
    _check_tags([item["tag"] for item in checked])
    for item in checked:
        tokens.check_form(item["compact_jwe"], "dir", tokens.ITEM_CHARACTERS_MAX)
    return tuple(SealedItem(item["tag"], item["compact_jwe"]) for item in checked)


def open_all(master: Secret, sealed: Sequence[SealedItem]) -> list[Item]:
    """Open all items, or none.

    Raises:
        InvalidFile: One does not open.
    """
    return [
        Item(item.tag, tokens.unseal(key_derivation.item_key(master, item.tag), item.token, item.tag))
        for item in sealed
    ]


def parse_json(octets: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    """Parse a JSON object of any spelling with exactly these fields of these types, none twice.

    Azure's clients write with other white space and order than its service, so spelling is free.

    Raises:
        InvalidFile: It is something else, or too large.
    """
    if len(octets) > DOCUMENT_BYTES_MAX:
        raise InvalidFile(f"more than {DOCUMENT_BYTES_MAX} bytes")
    try:
        value = json.loads(octets.decode("ascii"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError):
        value = None  # not chained: the parser's error would carry the text
    return check_object(value, fields)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a field stands twice")
    return dict(pairs)


def _check_tags(tags: Sequence[str]) -> None:
    if not 1 <= len(tags) <= ITEMS_MAX:
        raise InvalidFile(f"there are 1 to {ITEMS_MAX} items")
    if len(set(tags)) != len(tags) or not all(_TAG.fullmatch(tag) for tag in tags):
        raise InvalidFile("the tag of an item is malformed or repeated")
