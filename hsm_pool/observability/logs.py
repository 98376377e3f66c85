"""Log lines: JSON, one an event, redacted before they are written (G3).

The code logs no secret. This is the second wall: whatever is handed to a logger by mistake, only
plain values of harmless names come out.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final

import structlog
from structlog.typing import EventDict, WrappedLogger

REDACTED: Final = "[redacted]"
_TEXT_LENGTH_MAX = 2_000
_DEPTH_MAX = 4
_ITEMS_MAX = 64

_FORBIDDEN_WORDS: Final = frozenset(
    {
        *("authorization", "ciphertext", "digest", "kek", "material", "nonce", "passphrase", "password"),
        *("plaintext", "private", "secret", "secrets", "seed", "share", "shares", "signature", "token"),
    }
)
"""A field is redacted when one of the words of its name is among these."""
_FORBIDDEN_NAMES: Final = frozenset({"key", "keys", "key_name", "key_id", "root"})
"""Whole names of fields; others, as key_count, are harmless."""
_SECRET_TEXT = re.compile(r"PRIVATE KEY|bearer\s+\S|eyJ[\w-]{8,}\.", re.IGNORECASE)
"""Private keys in PEM (RFC 7468), bearer tokens (RFC 6750), JWTs (RFC 7519)."""


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace what must not be written; a processor of structlog."""
    return _clean_fields(event, 0)


def _clean_fields(fields: Mapping[str, Any], depth: int) -> dict[str, Any]:
    return {name: REDACTED if _forbidden(name) else _clean(value, depth) for name, value in fields.items()}


def _forbidden(name: str) -> bool:
    lowered = name.lower()
    return lowered in _FORBIDDEN_NAMES or not _FORBIDDEN_WORDS.isdisjoint(re.split(r"[^a-z0-9]+", lowered))


def _clean(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | PurePath):
        text = str(value)
        return REDACTED if _SECRET_TEXT.search(text) else text[:_TEXT_LENGTH_MAX]
    if depth < _DEPTH_MAX and isinstance(value, Mapping):
        return _clean_fields({str(name): value[name] for name in list(value)[:_ITEMS_MAX]}, depth + 1)
    if depth < _DEPTH_MAX and isinstance(value, list | tuple):
        return [_clean(entry, depth + 1) for entry in value[:_ITEMS_MAX]]
    # Octets, exceptions, secrets and everything that has a repr of its own: the type alone.
    return f"[{type(value).__name__}]"


def configure() -> None:
    """Write log lines to standard error from now on: INFO and above."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            redact,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
