"""G1: an etcd that is known to lose data never carries a pool; one that misbehaves is refused in time.

The binaries are shell scripts made at test time: only what they print is of interest.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsm_pool.node_agent.processes import is_running
from hsm_pool.provisioning import etcd_binary
from hsm_pool.provisioning.etcd_binary import EtcdUnusable, check_version, find_etcd

Script = Callable[[str], str]
_TIMEOUT_SECONDS_MAX = 15


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Make an executable shell script and return its path."""

    def make(body: str) -> str:
        path = tmp_path / "etcd"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o700)
        return str(path)

    return make


def printing(version: str) -> str:
    printed = f"etcd Version: {version}\\nGit SHA: 0\\nGo Version: go1.19\\n"
    return f'[ "$*" = --version ] || exit 2\nprintf "{printed}"'


@pytest.mark.parametrize("version", ["3.5.0", "3.5.1", "3.5.2", "3.5.0-rc.1"])
def test_versions_that_lose_data_are_refused(script: Script, version: str) -> None:
    with pytest.raises(EtcdUnusable, match=rf"{version[:5]} loses data"):
        check_version(script(printing(version)))


@pytest.mark.parametrize("version", ["3.4.23", "3.4.36", "3.5.3", "3.5.10", "3.5.27", "3.6.0", "3.6.8"])
def test_versions_past_their_support_are_warned_of(script: Script, version: str) -> None:
    """3.5.10 is one of them too: versions are compared as numbers."""
    found, warning = check_version(script(printing(version)))
    assert found == version
    assert version in warning
    assert "past its support" in warning


@pytest.mark.parametrize("version", ["3.5.28", "3.5.101", "3.6.9", "3.6.10"])
def test_supported_versions_pass_in_silence(script: Script, version: str) -> None:
    assert check_version(script(printing(version))) == (version, "")


@pytest.mark.parametrize("version", ["2.3.8", "3.2.32", "3.3.27"])
def test_versions_without_the_flags_of_a_member_are_refused(script: Script, version: str) -> None:
    with pytest.raises(EtcdUnusable, match=version):
        check_version(script(printing(version)))


@pytest.mark.parametrize(
    "body",
    [
        "true",
        "echo etcd",
        "echo etcd Version: three.five",
        "echo etcd Version: 3.5",
        "echo etcd Version: 3.6.9 >&2",
        "echo etcdctl version: 3.6.9",
        "printf '\\000\\001\\002'",
        "head -c 100000 /dev/zero",
    ],
)
def test_junk_is_not_etcd(script: Script, body: str) -> None:
    with pytest.raises(EtcdUnusable, match="is not etcd"):
        check_version(script(body))


@pytest.mark.parametrize(
    "body",
    ["printf '\\377\\376'", f"echo etcd Version: 3.6.{'9' * 5000}"],
    ids=["not UTF-8", "a number of 5000 digits"],
)
def test_junk_that_is_no_text_or_no_version_is_not_etcd(script: Script, body: str) -> None:
    with pytest.raises(EtcdUnusable, match="is not etcd"):
        check_version(script(body))


@pytest.mark.parametrize("body", ["exit 1", f"{printing('3.6.9')}\nexit 3", "kill -9 $$"])
def test_a_binary_that_fails_does_not_run(script: Script, body: str) -> None:
    with pytest.raises(EtcdUnusable, match="does not run"):
        check_version(script(body))


def test_a_binary_that_hangs_is_ended_in_time(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound that the gate sets is checked, then shortened for the test."""
    run = subprocess.run

    def hurried(*arguments: Any, timeout: float, **options: Any) -> Any:
        assert 0 < timeout <= _TIMEOUT_SECONDS_MAX
        return run(*arguments, timeout=0.5, **options)

    monkeypatch.setattr(subprocess, "run", hurried)
    process_id = tmp_path / "process-id"
    with pytest.raises(EtcdUnusable, match="does not run"):
        check_version(script(f"echo $$ > {process_id}\nexec sleep 60"))
    assert not is_running(int(process_id.read_text()))


def test_what_cannot_be_executed_does_not_run(tmp_path: Path) -> None:
    no_program = tmp_path / "text"
    no_program.write_text("etcd Version: 3.6.9")
    for mode in (0o600, 0o700):
        no_program.chmod(mode)
        with pytest.raises(EtcdUnusable, match="does not run"):
            check_version(str(no_program))
    with pytest.raises(EtcdUnusable, match="does not run"):
        check_version(str(tmp_path / "absent"))


# -- finding -----------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have no etcd on PATH nor beside the project."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(etcd_binary, "_REPOSITORY_BINARY", tmp_path / "repository" / "etcd")
    return tmp_path / "repository"


@pytest.mark.usefixtures("elsewhere")
def test_what_was_configured_is_taken_or_refused_and_nothing_else(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = script("true")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_etcd(found) == found
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(EtcdUnusable, match="does not exist"):
            find_etcd(str(absent))


@pytest.mark.usefixtures("elsewhere")
def test_a_configured_path_is_made_absolute(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members are started from the root directory."""
    found = script("true")
    monkeypatch.chdir(tmp_path)
    assert find_etcd("etcd") == found


@pytest.mark.usefixtures("elsewhere")
def test_a_path_that_was_found_is_absolute(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("true")
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("PATH", tmp_path.name)
    assert Path(find_etcd(None)).is_absolute()


def test_path_comes_before_the_projects_own(
    script: Script, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EtcdUnusable, match="was not found"):
        find_etcd(None)
    elsewhere.mkdir()
    (elsewhere / "etcd").write_text("")
    assert find_etcd(None) == str(elsewhere / "etcd")
    found = script("true")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_etcd(None) == found
