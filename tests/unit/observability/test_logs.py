"""G3: whatever is handed to a logger by mistake, no secret is in the line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.observability import logs

CANARY = "canary-7f3a91"


def line(**fields: Any) -> str:
    """Return what is written for an event."""
    written = io.StringIO()
    logs.configure()
    configured = structlog.get_config()
    logger = structlog.wrap_logger(
        structlog.PrintLogger(written), configured["processors"], configured["wrapper_class"]
    )
    logger.warning("event", **fields)
    structlog.reset_defaults()
    text = written.getvalue()
    assert text.count("\n") == 1
    json.loads(text)
    return text


class Careless:
    """An object that shows what it holds."""

    def __repr__(self) -> str:
        return CANARY


@pytest.mark.parametrize(
    "name",
    [
        *(
            "secret",
            "client_secret",
            "share",
            "officer-share",
            "password",
            "token",
            "bearer_token",
            "material",
        ),
        *("private_key", "plaintext", "key_name", "key", "kek", "digest", "Authorization", "passphrase"),
    ],
)
def test_a_field_of_a_forbidden_name_is_redacted(name: str) -> None:
    written = line(**{name: CANARY}, nested={"inner": {name: CANARY}})
    assert CANARY not in written
    assert written.count(logs.REDACTED) == 2


@pytest.mark.parametrize(
    "value",
    [
        SecretBytes(CANARY.encode()),
        CANARY.encode(),
        bytearray(CANARY.encode()),
        memoryview(CANARY.encode()),
        Careless(),
        ValueError(CANARY),
        {1: {2: {3: {4: {5: {6: CANARY}}}}}},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_plain_value_shows_its_type_alone(value: Any) -> None:
    for written in (line(value=value), line(value=[value]), line(value={"inner": (value,)})):
        assert CANARY not in written


def test_texts_that_look_like_secrets_are_redacted() -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for text in (pem.decode(), f"Bearer {CANARY}", f"eyJhbGciOiJSUzI1NiJ9.{CANARY}.x"):
        written = line(reason=text)
        assert CANARY not in written
        assert "PRIVATE" not in written


def test_the_exception_under_way_is_not_written() -> None:
    try:
        raise ValueError(CANARY)
    except ValueError as error:
        assert CANARY not in line(exc_info=True, problem=error)
        assert CANARY not in line(exc_info=error)


def test_harmless_fields_are_written_as_they_are() -> None:
    fields = {
        "partition": 1,
        "fresh": True,
        "reason": "why",
        "key_count": 3,
        "hardening": ["a", "b"],
        "x": None,
    }
    written = json.loads(line(**fields, path=Path("/a")))
    assert fields.items() <= written.items()
    assert written["path"] == "/a"
    assert written["level"] == "warning"


def test_long_texts_and_lists_are_cut() -> None:
    assert len(line(reason="x" * 100_000, items=["y" * 100_000] * 1_000)) < 200_000
