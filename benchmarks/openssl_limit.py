"""The physical limit: what ``openssl speed`` does with the same algorithms on this machine."""

from __future__ import annotations

import re
import subprocess

from benchmarks.operations import PLAINTEXT_BYTES

_EC_ROW = re.compile(r"^\s*256 bits ecdsa \(nistp256\)\s+\S+\s+\S+\s+([\d.]+)", re.MULTILINE)
_RSA_ROW = re.compile(r"^rsa\s+2048 bits\s+\S+\s+\S+\s+([\d.]+)", re.MULTILINE)
_GCM_ROW = re.compile(r"^aes-256-gcm\s+([\d.]+)k", re.MULTILINE | re.IGNORECASE)


def openssl_version() -> str:
    """Return the version of the openssl program, "" when there is none."""
    try:
        return _run("version").strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def openssl_rate(name: str, processes: int, seconds: int) -> float:
    """Return operations a second in this many processes together.

    One process is timed by its processor time, several by the clock, as openssl does it.

    Args:
        name: "ecdsap256", "rsa2048" (signatures) or "aes-256-gcm" (encryptions of 1 KiB).
        processes: How many.
        seconds: Of each measurement.

    Raises:
        RuntimeError: The output was not understood.
    """
    options = ["-seconds", str(seconds), *(["-multi", str(processes)] if processes > 1 else [])]
    if name == "aes-256-gcm":
        output = _run("speed", *options, "-bytes", str(PLAINTEXT_BYTES), "-evp", name)
        return round(_figure(_GCM_ROW, output) * 1000 / PLAINTEXT_BYTES, 1)
    return _figure(_EC_ROW if name == "ecdsap256" else _RSA_ROW, _run("speed", *options, name))


def _figure(row: re.Pattern[str], output: str) -> float:
    found = row.search(output)
    if found is None:
        raise RuntimeError("the output of openssl speed was not understood")
    return float(found[1])


def _run(*arguments: str) -> str:
    completed = subprocess.run(
        ["openssl", *arguments],  # noqa: S607 - the program of the system, from PATH
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return completed.stdout
