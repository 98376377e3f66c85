"""Canonical JSON, base64url and labels: how everything here becomes octets."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from security_domain.errors import InvalidFile


def canonical(value: Mapping[str, Any]) -> bytes:
    """Return JSON with sorted keys, no white space, ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def encode(octets: bytes) -> str:
    """Return base64url without padding (RFC 4648 section 5)."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def decode(text: str, length: int | None = None) -> bytes:
    """Return the octets of base64url without padding.

    Raises:
        InvalidFile: It is not base64url, or not as long as it must be.
    """
    try:
        octets = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        raise InvalidFile("a field is not base64url") from None
    if encode(octets) != text or (length is not None and len(octets) != length):
        raise InvalidFile("a field has a wrong length or encoding")
    return octets


def parse_object(octets: bytes, size_max: int, fields: Mapping[str, type]) -> dict[str, Any]:
    """Parse a canonical JSON object with exactly these fields of these types.

    Raises:
        InvalidFile: It is something else.
    """
    if len(octets) > size_max:
        raise InvalidFile(f"more than {size_max} bytes")
    value: Any = None
    spelled = b""
    # Suppressed, not chained: the parser's error would carry the whole text, which may be secret.
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(octets)
        spelled = canonical(value)
    if spelled != octets:
        raise InvalidFile("not canonical JSON")
    return check_object(value, fields)


def check_object(value: object, fields: Mapping[str, type]) -> dict[str, Any]:
    """Check that a parsed value is an object with exactly these fields of these types, text in ASCII.

    Raises:
        InvalidFile: It is something else.
    """
    if not isinstance(value, dict) or set(value) != set(fields):
        raise InvalidFile("fields are missing or unknown")
    for name, kind in fields.items():
        if not isinstance(value[name], kind) or (kind is int and isinstance(value[name], bool)):
            raise InvalidFile(f"field {name} is not of the right type")
        if kind is str and not value[name].isascii():
            raise InvalidFile(f"field {name} is not ASCII")
    return value


def bind(label: str, *parts: bytes | str | int) -> bytes:
    """Return an unambiguous encoding of a label and parts, for hashes, HKDF info and HPKE info."""
    encoded = bytearray(label.encode() + b"\x00")
    for part in parts:
        octets = (
            str(part).encode() if isinstance(part, int) else part.encode() if isinstance(part, str) else part
        )
        encoded += len(octets).to_bytes(4, "big") + octets
    return bytes(encoded)
