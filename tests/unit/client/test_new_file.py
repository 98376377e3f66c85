"""Files of the commands are whole or absent, on file systems of either kind (G8)."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hsm_pool.client.new_file import write_new_file

CONTENT = os.urandom(100_000)


def refuse_tmpfile(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have the kernel say that there are no files without a name."""
    real = os.open

    def fake(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", fake)


@pytest.fixture(params=["with O_TMPFILE", "EOPNOTSUPP", "EISDIR", "a real file system in user space"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on a file system with or without O_TMPFILE."""
    if hasattr(errno, request.param):
        refuse_tmpfile(monkeypatch, getattr(errno, request.param))
        yield tmp_path
    elif request.param == "with O_TMPFILE":
        yield tmp_path
    else:
        if shutil.which("bindfs") is None:
            pytest.skip("bindfs is not installed; the kernel's answer is played instead")
        behind, mounted = tmp_path / "behind", tmp_path / "mounted"
        behind.mkdir()
        mounted.mkdir()
        if subprocess.run(["bindfs", behind, mounted], check=False, capture_output=True).returncode:
            pytest.skip("bindfs may not mount here; the kernel's answer is played instead")
        try:
            with pytest.raises(OSError, match="not supported"):
                os.open(mounted, os.O_TMPFILE | os.O_WRONLY)
            yield mounted
        finally:
            subprocess.run(["fusermount", "-u", mounted], check=True)


def test_a_file_is_written_once_and_whole(place: Path) -> None:
    write_new_file(place / "file", CONTENT, 0o640)
    assert (place / "file").read_bytes() == CONTENT
    assert stat.S_IMODE((place / "file").stat().st_mode) == 0o640
    with pytest.raises(FileExistsError):
        write_new_file(place / "file", b"other")
    (place / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        write_new_file(place / "link", b"other")
    assert (place / "file").read_bytes() == CONTENT
    assert sorted(path.name for path in place.iterdir() if path.is_file()) == ["file"]


def test_a_write_that_fails_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, in the middle."""
    real, written = os.write, []

    def full(descriptor: int, octets: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(real(descriptor, octets[:10]))
        return written[0]

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_new_file(place / "file", CONTENT)
    assert not list(place.iterdir())


def test_without_hard_links_it_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT: link(2) is not permitted."""
    refuse_tmpfile(monkeypatch, errno.EOPNOTSUPP)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="no hard links"):
        write_new_file(tmp_path / "file", CONTENT)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
real = os.open
def fake(path, flags, *arguments, **options):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(95, "no", path)
    return real(path, flags, *arguments, **options)
os.open = fake
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
from hsm_pool.client.new_file import write_new_file
write_new_file(Path(sys.argv[1]), b"x" * 1000)
"""


def test_kill_9_without_o_tmpfile_leaves_at_most_a_hidden_file(tmp_path: Path) -> None:
    """The name that was asked for is free, and what is left says what it is."""
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "file"], check=False)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".file.")
    assert left.name.endswith(".partial")
    write_new_file(tmp_path / "file", CONTENT)
    assert (tmp_path / "file").read_bytes() == CONTENT
