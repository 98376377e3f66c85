"""Latencies of signatures and writes before and during a rolling patch of all partitions."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench_pool import BenchmarkPool
from benchmarks.operations import create_keys
from benchmarks.summaries import percentile
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError

ROOT = Path(__file__).resolve().parent.parent
_PATCH_SECONDS = 300.0


def _command(*arguments: str) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=_PATCH_SECONDS,
        check=False,
    )
    if completed.returncode:
        raise RuntimeError(f"{' '.join(arguments[:3])}: {completed.stderr.strip()}")


def publish(directory: Path, versions: int) -> Path:
    """Make a firmware repository with images of this tree, versions 1 and up; return its path."""
    directory.mkdir()
    repository, keys = directory / "repository", directory / "keys"
    firmware = ("hsm_pool.cli", "firmware")
    _command(*firmware, "new-repository", "--output", str(repository), "--keys-output", str(keys))
    for version in range(1, versions + 1):
        image = directory / f"{version}.zip"
        _command(
            *firmware, "build", "--version", str(version), "--security-version", "1",
            "--sources", str(ROOT), "--output", str(image),
        )  # fmt: skip
        _command(
            *firmware, "publish", "--repository", str(repository), "--image", str(image), "--keys", str(keys)
        )
    return repository


class _Caller(threading.Thread):
    """Calls without pause, one call after the other, and notes how long each took."""

    def __init__(self, pool: BenchmarkPool, call: Callable[[Pool, int], object]) -> None:
        super().__init__()
        self._pool, self._call = pool, call
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._latencies_ms: list[float] = []
        self.failed = 0

    def run(self) -> None:
        """Call until :meth:`end`."""
        with self._pool.client(timeout_seconds=30.0) as client:
            number = 0
            while not self._ended.is_set():
                number += 1
                began = time.monotonic()
                try:
                    self._call(client, number)
                except MHSMError:
                    self.failed += 1
                    continue
                with self._lock:
                    self._latencies_ms.append((time.monotonic() - began) * 1000)

    def take(self) -> list[float]:
        """Return the latencies since the last look."""
        with self._lock:
            taken, self._latencies_ms = self._latencies_ms, []
        return taken

    def end(self) -> None:
        """Stop and wait."""
        self._ended.set()
        self.join()


def roll_out(directory: Path, patches: int, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Patch a pool of its own while one client signs and another writes.

    Args:
        directory: Where the pool and its firmware repository are made.
        patches: How many versions are rolled out; all count as "during".
        seconds: How long is measured before the first.
        say: Progress.
    """
    digest = hashlib.sha256(b"to be signed").digest()
    pool = BenchmarkPool(directory / "pool", publish(directory / "firmware", patches))
    try:
        pool.activate()
        with pool.client() as client:
            create_keys(client)
        callers = {
            "sign": _Caller(pool, lambda client, _: client.sign("keys/benchmark-p256", "ES256", digest)),
            "write": _Caller(
                pool,
                lambda client, number: client.update_key(
                    "keys/benchmark-aes-256", tags={"number": str(number)}
                ),
            ),
        }
        for caller in callers.values():
            caller.start()
        try:
            time.sleep(seconds / 4)  # the warm-up
            for caller in callers.values():
                caller.take()
            time.sleep(seconds)
            before = {name: caller.take() for name, caller in callers.items()}
            began = time.monotonic()
            for version in range(1, patches + 1):
                _command("fabric_controller", "patch", str(version), "--data-dir", str(pool.directory))
                say(f"patched to version {version}")
            took = (time.monotonic() - began) / patches
            during = {name: caller.take() for name, caller in callers.items()}
        finally:
            for caller in callers.values():
                caller.end()
        pool.await_whole()
    finally:
        pool.close()
    return {
        "patches": patches,
        "patch_ms": round(took * 1000),
        "failed_calls": sum(caller.failed for caller in callers.values()),
        **{name: _compared(before[name], during[name]) for name in callers},
    }


def _compared(before: list[float], during: list[float]) -> dict[str, Any]:
    result: dict[str, Any] = {"calls_before": len(before), "calls_during": len(during)}
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        was, became = percentile(before, share), percentile(during, share)
        result |= {
            f"{name}_ms_before": round(was, 2),
            f"{name}_ms_during": round(became, 2),
            f"{name}_ratio": round(became / was, 2),
        }
    return result
