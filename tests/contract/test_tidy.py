"""House rules that no linter knows: what may stand in this repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from hsm_pool import errors
from mhsm.error.v1 import reasons_pb2
from tests.running_pool import ROOT


def tracked_files() -> list[Path]:
    """Return the files of the repository; of a copy without git, all that are not caches."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_no_registry_host_and_no_machine_path_is_written_down() -> None:
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "deb.debian" + ".org", "registry.npmjs" + ".org"]
    paths = ["/" + "work/", "/" + "tmp/venv", "/" + "root/"]
    pattern = re.compile("|".join(re.escape(text) for text in hosts + paths))
    found = []
    for path in tracked_files():
        if path.suffix in {".pyi", ".png"}:
            continue
        text = path.read_text(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found


def test_no_lock_file_with_addresses() -> None:
    assert not [path for path in tracked_files() if path.name in {"uv.lock", "pylock.toml", "poetry.lock"}]


def test_no_private_key_is_written_down() -> None:
    """Test keys are generated at test time."""
    marker = "-----BEGIN " + "(RSA |EC |ENCRYPTED )?PRIVATE KEY"
    for path in tracked_files():
        assert not re.search(marker, path.read_text(errors="replace")), path


def test_the_store_client_never_uses_what_etcd_gets_wrong() -> None:
    """No lease, no progress notification, no automatic compaction (docs/architecture.md, Store)."""
    source = "".join(path.read_text() for path in (ROOT / "hsm_pool" / "store").glob("*.py"))
    for word in ("LeaseGrant", "LeaseKeepAlive", "progress_notify", "auto-compaction"):
        assert word not in source


def test_ranges_are_read_in_two_places_only() -> None:
    """Reads may be stale: only bulk loading (checked by the chain) and the header's poll use them."""
    source = (ROOT / "hsm_pool" / "store" / "etcd_client.py").read_text()
    assert source.count("kv.Range(") == 2


def test_errors_and_reasons_are_the_same_list() -> None:
    """One exception, one reason."""
    declared = {
        name.removeprefix("REASON_") for name, _ in reasons_pb2.Reason.items() if name != "REASON_UNSPECIFIED"
    }
    assert declared == set(errors.BY_REASON)


def test_every_error_names_a_grpc_code_and_whether_it_is_definite() -> None:
    import grpc

    for error in errors.BY_REASON.values():
        assert hasattr(grpc.StatusCode, error.code)
        assert isinstance(error.definite, bool)
    assert {e.reason for e in errors.BY_REASON.values() if not e.definite} == {"COMMIT_UNKNOWN", "INTERNAL"}
