"""The mhsm command as its user runs it, on a real pool: output, exit codes, files."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hsm_pool.node_agent.processes import is_running
from tests.running_pool import ROOT, RunningPool, mhsm

pytestmark = pytest.mark.pool


@pytest.fixture
def at(pool: RunningPool) -> tuple[str, str]:
    return "--data-dir", str(pool.directory)


def test_the_ceremony_by_commands(make_pool: Callable[..., RunningPool], tmp_path: Path) -> None:
    """The README's path: up, officers, download, status, lock, unlock with two officers, down."""
    pool = make_pool(attended=True)
    at = ("--data-dir", str(pool.directory))
    assert mhsm("status", *at, check=False).returncode == 3
    not_active = mhsm("key", "list", *at, check=False)
    assert not_active.returncode == 3
    assert "next: mhsm security-domain download" in not_active.stderr
    made = json.loads(mhsm("officers", "make", "--output-dir", str(tmp_path / "o"), "--json").stdout)
    certificates = [part for o in made["officers"] for part in ("--officer", o["certificate_file"])]
    for officer in made["officers"]:
        assert stat.S_IMODE(Path(officer["key_file"]).stat().st_mode) == 0o600
    domain = tmp_path / "security-domain.json"
    attempt = tmp_path / "activation.json"
    to = ("--attempt-output", str(attempt))
    download = ("security-domain", "download", "--required", "2", "--output", str(domain), *certificates)
    result = json.loads(mhsm(*download, *to, *at, "--json").stdout)
    assert not result["active"]
    assert mhsm("key", "list", *at, check=False).returncode == 3, "not active before the shares are proved"
    prove = ("security-domain", "submit-share", "--attempt", str(attempt))
    share = ("--security-domain", str(domain), "--officer-key")
    pki = pool.directory / "pki"
    roots = ("--platform-root", f"{pki}/platform-root.crt", "--owner-root", f"{pki}/owner-root.crt")
    for number, officer in enumerate(made["officers"], start=1):
        offline = ("--output", str(tmp_path / f"submission-{number}"))
        mhsm(*prove, *share, officer["key_file"], *offline, *roots, "--data-dir", str(tmp_path / "nowhere"))
        submitted = mhsm(*prove, "--submission", offline[1], *at, "--json")
        progress = json.loads(submitted.stdout)
        assert (progress["accepted"], progress["complete"]) == (number, number == 3)
    pool.await_states(["SERVING"] * 3)
    content = domain.read_bytes()
    assert mhsm(*download, *to, *at, check=False).returncode == 1, "an existing file is never overwritten"
    assert domain.read_bytes() == content
    to = ("--attempt-output", str(tmp_path / "again-attempt.json"))
    again = (*download[:5], str(tmp_path / "again.json"), *certificates, *to)
    mhsm(*again, "--request-id", result["request_id"], *at)
    assert (tmp_path / "again.json").read_bytes() == content, "a repeat returns the first answer"
    other = (*download[:5], str(tmp_path / "other.json"), *certificates, *to)
    refused = mhsm(*other, *at, check=False)
    assert refused.returncode == 1
    assert "active already" in refused.stderr
    assert not (tmp_path / "other.json").exists()

    status = json.loads(mhsm("status", *at, "--json").stdout)
    assert [row["state"] for row in status["partitions"]] == ["SERVING"] * 3
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    assert mhsm("status", *at, check=False).returncode == 3
    recovery = tmp_path / "recovery.json"
    mhsm("security-domain", "init-recovery", "--output", str(recovery), *at)
    second = mhsm("security-domain", "init-recovery", "--output", str(tmp_path / "r2"), *at, check=False)
    assert second.returncode == 1
    assert not (tmp_path / "r2").exists()
    submit = (
        "security-domain",
        "submit-share",
        "--attempt",
        str(recovery),
        "--security-domain",
        str(domain),
    )
    first = json.loads(mhsm(*submit, "--officer-key", made["officers"][0]["key_file"], *at, "--json").stdout)
    assert (first["accepted"], first["required"], first["complete"]) == (1, 2, False)
    assert first["purpose"] == "recovery"
    twice = mhsm(*submit, "--officer-key", made["officers"][0]["key_file"], *at, check=False)
    assert twice.returncode == 4
    assert "before" in twice.stderr
    last = mhsm(*submit, "--officer-key", made["officers"][2]["key_file"], *at)
    assert "2 of 2 shares: the pool is unlocked" in last.stdout
    pool.await_states(["SERVING"] * 3)
    pool.down()


def test_keys_and_files(at: tuple[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("signed text")
    mhsm("key", "create", "cli-ec", "--type", "EC", "--curve", "P-384", "--tag", "a=b", *at)
    shown = json.loads(mhsm("key", "show", "cli-ec", *at, "--json").stdout)["key"]
    assert (shown["curve"], shown["tags"]) == ("CURVE_P384", {"a": "b"})
    signature, pem = tmp_path / "text.sig", tmp_path / "key.pem"
    options = ("--algorithm", "ES384", "--file", str(text))
    mhsm("crypto", "sign", "cli-ec", *options, "--output", str(signature), "--der", *at)
    mhsm("crypto", "verify", "cli-ec", *options, "--signature", str(signature), "--der", *at)
    mhsm("key", "public-key", "cli-ec", "--output", str(pem), *at)
    openssl = ["openssl", "dgst", "-sha384", "-verify", str(pem), "-signature", str(signature), str(text)]
    subprocess.run(openssl, check=True, capture_output=True)
    text.write_text("other text")
    forged = mhsm(
        "crypto", "verify", "cli-ec", *options, "--signature", str(signature), "--der", *at, check=False
    )
    assert forged.returncode == 6
    mhsm("key", "create", "cli-oct", "--type", "oct", *at)
    sealed, opened = tmp_path / "sealed", tmp_path / "opened"
    mhsm(
        "crypto",
        "encrypt",
        "cli-oct",
        "--algorithm",
        "A256GCM",
        "--file",
        str(text),
        "--output",
        str(sealed),
        *at,
    )
    mhsm("crypto", "decrypt", "--file", str(sealed), "--output", str(opened), *at)
    assert opened.read_text() == "other text"
    assert stat.S_IMODE(opened.stat().st_mode) == 0o600
    before = opened.stat().st_mtime_ns
    assert (
        mhsm("crypto", "decrypt", "--file", str(sealed), "--output", str(opened), *at, check=False).returncode
        == 1
    )
    assert opened.stat().st_mtime_ns == before
    mhsm("key", "create", "cli-code", "--type", "oct", "--operation", "sign", "--operation", "verify", *at)
    options, code = ("--algorithm", "HS512", "--file", str(text)), str(tmp_path / "code")
    mhsm("crypto", "sign", "cli-code", *options, "--output", code, *at)
    mhsm("crypto", "verify", "cli-code", *options, "--signature", code, *at)
    wrong = ("--algorithm", "A256GCM", "--file", str(text), "--output", str(tmp_path / "none"))
    assert "HS512" in mhsm("crypto", "sign", "cli-code", *wrong, *at, check=False).stderr


def test_with_json_an_error_gives_the_pool_s_reason(at: tuple[str, str]) -> None:
    """G8: as gRPC clients get it, and whether anything can have happened."""
    failed = mhsm("key", "show", "none", *at, "--json", check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    error = json.loads(failed.stderr)["error"]
    assert (error["reason"], error["definite"], error["exit_code"]) == ("KEY_NOT_FOUND", True, 1)


def test_the_life_of_a_key_by_commands(at: tuple[str, str]) -> None:
    mhsm("key", "create", "cli-life", "--type", "EC", "--curve", "P-256", *at)
    assert mhsm("key", "create", "cli-life", "--type", "oct", "--new-only", *at, check=False).returncode == 1
    mhsm("key", "update", "cli-life", "--disable", *at)
    disabled = json.loads(mhsm("key", "show", "cli-life", *at, "--json").stdout)["key"]
    assert "enabled" not in disabled["attributes"] or disabled["attributes"]["enabled"] is False
    mhsm("key", "delete", "cli-life", *at)
    assert "cli-life" in mhsm("key", "list-deleted", *at).stdout
    assert "cli-life" not in mhsm("key", "list", *at).stdout
    mhsm("key", "recover", "cli-life", *at)
    mhsm("key", "delete", "cli-life", *at)
    assert mhsm("key", "purge", "cli-life", "--yes", *at).returncode == 0
    gone = mhsm("key", "show-deleted", "cli-life", *at, check=False)
    assert gone.returncode == 1
    assert "no soft-deleted key" in gone.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("key", "create"),
        ("key", "create", "x", "--type", "DSA"),
        ("no-such-command",),
        ("security-domain", "download", "--required", "1"),
        ("kill", "7"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    assert mhsm(*arguments, check=False).returncode == 2


def test_without_a_pool_the_next_command_is_named(tmp_path: Path) -> None:
    for arguments in (("status",), ("key", "list"), ("kill", "0")):
        ended = mhsm(*arguments, "--data-dir", str(tmp_path / "none"), check=False)
        assert ended.returncode == 5
        assert "next: mhsm up" in ended.stderr
    assert mhsm("down", "--data-dir", str(tmp_path / "none")).returncode == 0


def test_up_refuses_a_directory_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = mhsm("up", "--data-dir", str(tmp_path), check=False)
    assert ended.returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_pools_run_side_by_side_and_leave_nothing(
    make_pool: Callable[..., RunningPool], pool: RunningPool
) -> None:
    """Free ports are taken; up is idempotent; down leaves no process and no port."""
    other = make_pool(attended=False)
    process_ids = other.all_process_ids()
    assert len(process_ids) == 11
    assert other.up()["already_running"] is True
    assert other.all_process_ids() == process_ids
    assert stat.S_IMODE((other.directory / "connection.json").stat().st_mode) == 0o600
    ports = {
        int(endpoint.rpartition(":")[2])
        for made in (pool, other)
        for entry in made.connection.partitions
        for endpoint in (entry.endpoint, entry.peer_endpoint, entry.enclave_endpoint, entry.store_endpoint)
    }
    assert len(ports) == 24
    other.down()
    assert not [process_id for process_id in process_ids if is_running(process_id)]
    assert not (other.directory / "connection.json").exists()


def test_a_killed_supervisor_takes_everything_with_it(make_pool: Callable[..., RunningPool]) -> None:
    import os
    import signal

    from tests.running_pool import until

    made = make_pool(attended=False)
    process_ids = made.all_process_ids()
    os.kill(made.connection.supervisor_process_id, signal.SIGKILL)
    until(lambda: not any(is_running(p) for p in process_ids), 20, "all processes gone")
    made.up()
    made.down()


def test_the_scripts_are_thin_fronts() -> None:
    """scripts/make-officers and its siblings run the same commands."""
    for script, command in (
        ("make-officers", "officers make"),
        ("security-domain-download", "security-domain download"),
        ("security-domain-submit-share", "security-domain submit-share"),
    ):
        assert f'mhsm" {command} "$@"' in (ROOT / "scripts" / script).read_text()
        shown = subprocess.run(
            [sys.executable, "-m", "hsm_pool.cli", *command.split(), "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Usage" in shown.stdout


def test_files_that_are_something_else_are_refused_in_words(pool: RunningPool, tmp_path: Path) -> None:
    """G8: junk in any file that a ceremony command reads; never a traceback, nothing written."""
    junk, empty, output = tmp_path / "junk", tmp_path / "empty.json", tmp_path / "output"
    junk.write_bytes(b"\x00junk")
    empty.write_text("{}")
    at = ("--data-dir", str(pool.directory))
    officers = [part for _ in range(3) for part in ("--officer", str(junk))]
    submit = ("security-domain", "submit-share", "--officer-key", str(junk), "--security-domain", str(junk))
    to = ("--attempt-output", str(tmp_path / "attempt"))
    for command in (
        ("security-domain", "download", "--required", "2", "--output", str(output), *to, *officers),
        ("security-domain", "rotate-shares", "--required", "2", "--output", str(output), *officers),
        (*submit, "--attempt", str(empty)),
        (*submit, "--attempt", str(junk)),
        ("security-domain", "cancel", "--attempt", str(junk)),
        ("security-domain", "cancel", "--partition", "1"),
        ("security-domain", "fetch-file", "--output", str(output)),
        ("crypto", "decrypt", "--file", str(junk), "--output", str(output)),
        ("key", "import", "cli-junk", "--file", str(junk)),
    ):
        ended = mhsm(*command, *at, check=False)
        assert ended.returncode == 1, command
        assert "Traceback" not in ended.stderr
        assert ended.stderr.count("mhsm: ") == 1
        assert not output.exists()
