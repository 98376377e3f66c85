"""Commands without a reader, on a full disk, interrupted, or with files that are something else (G8).

No pool is needed: each ends with a documented code and words, never with a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running_pool import until

MHSM = [sys.executable, "-m", "hsm_pool.cli"]
FABRIC = [sys.executable, "-c", "from fabric_controller.cli import main; main()"]


def ended(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which mhsm and mhsm-fabric are the commands."""
    functions = "".join(
        f'{name}() {{ {" ".join(repr(part) for part in argv)} "$@"; }}\n'
        for name, argv in (("mhsm", MHSM), ("fabric", FABRIC))
    )
    completed = subprocess.run(
        ["bash", "-o", "pipefail", "-c", functions + command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in completed.stderr, completed.stderr
    return completed


@pytest.mark.parametrize(
    "command",
    ["mhsm --help", "mhsm ceremony list", "mhsm ceremony run activation --dry-run", "fabric --help"],
)
def test_standard_output_that_nobody_reads_or_that_is_full_or_closed(command: str, tmp_path: Path) -> None:
    assert ended(f"{command} | true", tmp_path).returncode in (0, 1)
    full = ended(f"{command} >/dev/full", tmp_path)
    assert full.returncode == 1
    assert "No space left on device" in full.stderr
    closed = ended(f"{command} >&-", tmp_path)
    assert closed.returncode in (0, 1)
    assert ended(f"{command} >&- 2>&- <&-", tmp_path).returncode in (0, 1)


@pytest.mark.parametrize(
    ("command", "code", "following"),
    [
        ("mhsm status --json --data-dir none", 5, ["mhsm up --data-dir none"]),
        ("mhsm ceremony verify --json none", 1, []),
        ("mhsm key show --json", 2, []),
        ("mhsm security-domain cancel --json", 2, []),
    ],
)
def test_with_json_an_error_is_one_object(
    command: str, code: int, following: list[str], tmp_path: Path
) -> None:
    completed = ended(command, tmp_path)
    assert (completed.returncode, completed.stdout) == (code, "")
    error = json.loads(completed.stderr)["error"]
    assert (error["exit_code"], error["reason"], error["definite"]) == (code, "", True)
    assert error["message"]
    assert error["next"] == following
    assert not [line for line in error["hints"] if line.startswith("mhsm ")]


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """What is printed after standard output was closed stands in no file that the command writes."""
    made = ended("mhsm officers make --output-dir o --count 1 >&- 2>&-", tmp_path)
    assert made.returncode == 0
    for path in (tmp_path / "o").iterdir():
        assert path.read_bytes().startswith(b"-----BEGIN")
        assert b"made" not in path.read_bytes()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([*MHSM, "security-domain", "plan", "--required", "2", "--officer"], "mhsm: interrupted"),
        # Settings that are a pipe are none; the files of an identity are its own.
        ([*FABRIC, "drain", "1", "--settings", "fabric.json"], "mhsm-fabric: interrupted"),
    ],
)
def test_ctrl_c_in_the_middle_ends_with_130(command: list[str], said: str, tmp_path: Path) -> None:
    """The command waits for a file that is a pipe when it is interrupted."""
    os.mkfifo(tmp_path / "pipe")
    files = dict.fromkeys(("certificate_file", "key_file", "ca_file"), str(tmp_path / "pipe"))
    settings = {
        "pool_id": "pool",
        "partitions": [{"index": 1, "enclave_endpoint": "127.0.0.1:9"}],
        "identity": files,
        "data_directory": str(tmp_path),
    }
    (tmp_path / "fabric.json").write_text(json.dumps(settings))
    command = command if "fabric.json" in command else [*command, str(tmp_path / "pipe")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )

    def reads() -> int | None:
        try:
            return os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return None

    writer = until(reads, 60, "the command reads")

    def ended() -> bool:
        # Python notices a signal that comes just before a read when that returns: this one never does.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        return process.poll() is not None

    until(ended, 60, "the end of the command")
    out, err = process.communicate(timeout=60)
    os.close(writer)
    assert (process.returncode, out, err.strip()) == (130, "", said)


@pytest.mark.parametrize("answers", ["", "</dev/null", "<&-"])
def test_what_asks_before_it_destroys_ends_with_2_where_nobody_can_answer(
    answers: str, tmp_path: Path
) -> None:
    """Nothing is sent before the answer, so no pool is needed; the hint is the command that does not ask."""
    refused = ended(f"mhsm key purge gone {answers}", tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "without a terminal use --yes; nothing was done" in refused.stderr
    assert "next: mhsm key purge gone --yes" in refused.stderr
    another = ended("echo other | mhsm key purge gone", tmp_path)
    assert (another.returncode, another.stdout) == (1, "")
    assert "the name does not fit; nothing was done" in another.stderr
    answered = ended("echo gone | mhsm key purge gone --data-dir nowhere", tmp_path)
    assert answered.returncode == 5, "it would have been destroyed, had there been a pool"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("mhsm status --data-dir deep", 5),
        ("mhsm key list --data-dir deep", 5),
        ("mhsm up --data-dir loop", 1),
        ("mhsm up --data-dir other-format", 1),
        ("mhsm up --data-dir new --external-store junk", 1),
        ("mhsm key create x --type RSA --size -1", 2),
        ("mhsm key create x --type RSA --size 99999999999999999999", 2),
        ("mhsm security-domain plan --required 2 --officer junk", 1),
        ("mhsm security-domain plan --required 2 --officer /dev/zero", 1),
        ("mhsm ceremony run junk --dry-run", 2),
        ("mhsm ceremony run activation --dry-run --answers junk", 2),
        ("mhsm ceremony verify junk", 6),
        ("mhsm crypto decrypt --file junk --output o", 1),
        ("mhsm officers make --output-dir junk", 1),
        ("fabric status --settings junk", 1),
        ("fabric status --settings .", 2),
    ],
)
def test_files_and_values_that_are_something_else(command: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"\xff\x00junk")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "connection.json").write_text("[" * 100_000)
    (tmp_path / "other-format").mkdir()
    (tmp_path / "other-format" / "pool.json").write_text("{}")
    (tmp_path / "loop").symlink_to("loop")
    refused = ended(command, tmp_path)
    assert refused.returncode == code, refused.stderr
    assert refused.stdout == ""
    assert refused.stderr
