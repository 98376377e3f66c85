"""Where backups lie: a directory and an object store behave alike (G8)."""

from __future__ import annotations

import stat
import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hsm_pool.client.locations import Location, open_location
from hsm_pool.errors import InvalidField, KeyExists


@pytest.fixture(params=["directory", "file url", "object store"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty location; the object store is fsspec's own, in memory."""
    places = {
        "directory": str(tmp_path / "a" / "b"),
        "file url": f"file://{tmp_path}/a/b",
        "object store": f"memory://{uuid.uuid4()}/a/b",
    }
    return open_location(places[request.param])


def test_objects_are_written_once_and_read_back(location: Location) -> None:
    assert location.names() == set()
    location.write("part-00000", b"first")
    location.write("manifest.json", b"{}")
    assert location.names() == {"part-00000", "manifest.json"}
    with pytest.raises(KeyExists):
        location.write("part-00000", b"second")
    assert location.read("part-00000", 5) == b"first"


def test_what_is_missing_or_too_large_is_refused(location: Location) -> None:
    with pytest.raises(InvalidField):
        location.read("manifest.json", 10)
    location.write("part-00000", b"0123456789x")
    with pytest.raises(InvalidField):
        location.read("part-00000", 10)
    assert len(location.read("part-00000", 11)) == 11


def test_an_object_that_is_not_listed_yet_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store refuses, whatever it said when it was asked before: two commands may write at once."""
    place = f"memory://{uuid.uuid4()}/a"
    open_location(place).write("part-00000", b"first")
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *_, **__: [])
    with pytest.raises(KeyExists):
        open_location(place).write("part-00000", b"second")
    assert open_location(place).read("part-00000", 10) == b"first"


def test_what_a_driver_says_is_shown_in_one_line_without_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("GET http://store/x?sig=secret refused\nmore")

    monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
    with pytest.raises(OSError, match=r"x: RuntimeError: GET http://store/x refused$"):
        open_location("memory://x").names()


@pytest.mark.parametrize("url", ["nonsense://bucket/x", "s3-not-installed://x"])
def test_an_unknown_store_is_said_in_words(url: str) -> None:
    with pytest.raises(InvalidField, match=url.partition(":")[0]):
        open_location(url)


def test_files_are_the_owners_only_and_leave_nothing_beside_them(tmp_path: Path) -> None:
    place = open_location(str(tmp_path / "backup"))
    place.write("manifest.json", b"{}")
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "backup" / "manifest.json").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "backup").iterdir()] == ["manifest.json"]
