"""The publisher's commands: exit codes and words, without a pool (G8)."""

from __future__ import annotations

import json
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hsm_pool.cli.main import mhsm
from hsm_pool.firmware import repository as repository_module


def firmware(*arguments: str) -> Result:
    return CliRunner().invoke(mhsm, ["firmware", *arguments])


@pytest.fixture
def of_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A repository, and the options of a command on it."""
    monkeypatch.chdir(tmp_path)
    made = firmware("new-repository", "--output", "repository", "--keys-output", "keys")
    assert made.exit_code == 0, made.output
    return ["--repository", "repository", "--keys", "keys"]


def test_a_damaged_image_is_not_published(of_repository: list[str]) -> None:
    """A word about the damage, and nothing in the repository."""
    assert firmware("build", "--version", "1", "--output", "1.zip").exit_code == 0
    image = Path("1.zip")
    with zipfile.ZipFile(image) as archive:
        entry = max(archive.infolist(), key=lambda info: info.compress_size)
    content = bytearray(image.read_bytes())
    # In the middle of the entry's compressed octets.
    content[entry.header_offset + entry.compress_size // 2] ^= 0xFF
    image.write_bytes(content)
    refused = firmware("publish", "--image", "1.zip", *of_repository)
    assert (refused.exit_code, f"the image is damaged: {entry.filename}" in refused.stderr) == (1, True)
    assert json.loads(firmware("list", "--repository", "repository", "--json").stdout)["images"] == []


def test_renewals_say_until_when_the_repository_holds(
    of_repository: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed = json.loads(firmware("renew", *of_repository, "--json").stdout)
    assert renewed["renewed"] == ["timestamp"]
    assert renewed["ends"].keys() == {"root", "targets", "snapshot", "timestamp"}
    monkeypatch.setattr(repository_module, "RENEWED_BEFORE", timedelta(days=400))
    for name in ("offline-1.key", "offline-2.key"):
        (Path("keys") / name).rename(name)
    told = firmware("renew", *of_repository)
    assert told.exit_code == 0
    assert "(renewed)" in told.stdout
    for role in ("root", "targets"):
        assert f"the {role} ends at" in told.stderr
    assert "mhsm firmware renew-root" in told.output
    refused = firmware("renew-root", *of_repository)
    assert (refused.exit_code, "do not sign the root" in refused.stderr) == (1, True)
    for name in ("offline-1.key", "offline-2.key"):
        Path(name).rename(Path("keys") / name)
    assert json.loads(firmware("renew-root", *of_repository, "--json").stdout)["renewed"] == ["root"]
    assert (Path("repository") / "metadata" / "2.root.json").is_file()
