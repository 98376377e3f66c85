"""What root opens in a directory of another user is a regular file with one name (G3)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hsm_pool.regular_files import give_directory, open_own_file, read_own_file

_FLAGS = (
    os.O_RDONLY,
    os.O_WRONLY | os.O_APPEND,
    os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    os.O_RDWR | os.O_CREAT,
)


def test_a_regular_file_is_opened_made_and_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    descriptor = open_own_file(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    os.write(descriptor, b"content")
    os.close(descriptor)
    assert file.stat().st_mode & 0o777 == 0o640
    assert read_own_file(file, 7) == b"content"
    with pytest.raises(OSError, match="too large"):
        read_own_file(file, 6)


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "pipe", "directory", "device"])
@pytest.mark.parametrize("flags", _FLAGS)
def test_nothing_else_is_opened_changed_or_waited_for(tmp_path: Path, kind: str, flags: int) -> None:
    target, file = tmp_path / "target", tmp_path / "file"
    if kind != "dangling link":
        target.write_bytes(b"secret")
    match kind:
        case "link" | "dangling link":
            file.symlink_to(target)
        case "second name":
            file.hardlink_to(target)
        case "pipe":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "device":
            file = Path(os.devnull)
    before = _descriptors()
    with pytest.raises(OSError):
        open_own_file(file, flags)
    assert _descriptors() == before
    assert target.exists() is (kind != "dangling link")


def test_a_directory_is_given_and_a_link_at_its_place_is_not(tmp_path: Path) -> None:
    """G3: who may lay a link there would own what it leads to."""
    me = (os.geteuid(), os.getegid())
    own, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    for directory in (own, elsewhere):
        directory.mkdir(mode=0o755)
    give_directory(own, 0o710, me, me)
    assert stat.S_IMODE(own.stat().st_mode) == 0o710
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "file").touch(mode=0o644)
    for other in ("link", "file", "nothing"):
        with pytest.raises(OSError):
            give_directory(tmp_path / other, 0o710, me, me)
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
