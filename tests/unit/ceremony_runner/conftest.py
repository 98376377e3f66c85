"""An administrator for each test session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.ceremony_runner.rehearsal import Administrator, made_transcript, make_administrator


@pytest.fixture(scope="session")
def administrator(tmp_path_factory: pytest.TempPathFactory) -> Administrator:
    """Certificate, key and connection file of an administrator; no pool."""
    return make_administrator(tmp_path_factory.mktemp("administrator") / "data")


@pytest.fixture(scope="session")
def signed(administrator: Administrator, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A completed transcript of three steps."""
    return made_transcript(tmp_path_factory.mktemp("signed") / "t.json", administrator.identity)


@pytest.fixture
def ca(administrator: Administrator) -> bytes:
    """The authority's certificate."""
    return Path(administrator.ca_file).read_bytes()
