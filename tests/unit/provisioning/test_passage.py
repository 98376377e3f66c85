"""G3: other users pass a closed directory to what is needed, and to nothing else; nothing changes outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hsm_pool.provisioning.passage import NoPassage, open_passage
from tests.kernel import needs_root

_PASSING = """
import json, os, pathlib, sys
from hsm_pool.provisioning.passage import open_passage
directory, passage = pathlib.Path(sys.argv[1]), sys.argv[2] == "yes"
if passage:
    open_passage([directory / "closed" / "deep" / "needed", directory / "closed" / "file"])
os.setgroups([])
os.setgid(20001)
os.setuid(20001)
reached = []
for name in ("deep/needed/content", "file", "deep/needed/own", "other", "deep"):
    path = directory / "closed" / name
    try:
        list(path.iterdir()) if path.is_dir() else path.read_text()
        reached.append(name)
    except OSError:
        pass
print(json.dumps(reached))
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with a closed one that holds a file and a directory, and more."""
    needed = tmp_path / "closed" / "deep" / "needed"
    needed.mkdir(parents=True)
    for file, mode in (
        (needed / "content", 0o644),
        (needed / "own", 0o600),
        (tmp_path / "closed" / "file", 0o644),
        (tmp_path / "closed" / "other", 0o644),
    ):
        file.write_text("content")
        file.chmod(mode)
    (tmp_path / "closed" / "deep").chmod(0o700)
    (tmp_path / "closed").chmod(0o700)
    return tmp_path


@needs_root
@pytest.mark.parametrize("passage", ["yes", "no"])
def test_what_is_needed_is_reached_and_no_more(directory: Path, passage: str) -> None:
    """Without a passage nothing is reached: the control."""
    completed = subprocess.run(
        [sys.executable, "-c", _PASSING, str(directory), passage],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if "Operation not permitted" in completed.stderr:
        pytest.skip("root may mount nothing here; status says: not separated")
    assert completed.returncode == 0, completed.stderr
    expected = ["deep/needed/content", "file"] if passage == "yes" else []
    assert json.loads(completed.stdout) == expected
    # Of the mounts nothing is seen here.
    assert (directory / "closed" / "other").read_text() == "content"
    assert (directory / "closed").stat().st_mode & 0o777 == 0o700


def test_what_its_own_mode_closes_has_no_passage(tmp_path: Path) -> None:
    """A key that only root reads is not opened; the message names it."""
    for closed in (tmp_path / "key", tmp_path / "directory"):
        if closed.name == "key":
            closed.write_text("key")
            closed.chmod(0o600)
        else:
            closed.mkdir(mode=0o700)
        with pytest.raises(NoPassage, match=str(closed)):
            open_passage([closed])
