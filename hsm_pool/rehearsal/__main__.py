"""Rehearse the loss of a pool: ``python -m hsm_pool.rehearsal [--keys N] [--seed N] [--keep DIR]``."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hsm_pool.client.connection import load_connection
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from hsm_pool.limits import KEYS_MAX
from hsm_pool.rehearsal import keys, roles
from mhsm.enclave.v1 import enclave_pb2

INTERRUPTED = 130
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_STATE_SECONDS = 60.0
_POLL_SECONDS = 0.05
_REPORT_SECONDS = 2.0


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


def _stop(_number: int, _frame: FrameType | None) -> None:
    # Once: what is done after it, stopping the pools, is not interrupted.
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


class Rehearsal:
    """One rehearsal in a directory of its own."""

    def __init__(self, directory: Path, count: int, seed: int, *, quiet: bool) -> None:
        self._directory = directory
        self._count = count
        self._seed = seed
        self._quiet = quiet
        self._started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line of progress."""
        if not self._quiet:
            print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    def mhsm(self, *arguments: str) -> dict[str, Any]:
        """Run the mhsm command as an operator does, and return its JSON."""
        # In its own group: Ctrl-C is for the rehearsal, which lets a command end and then stops the pools.
        with subprocess.Popen(
            [sys.executable, "-m", "hsm_pool.cli", *arguments, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        ) as command:
            output, errors = command.communicate()
        if command.returncode:
            raise RuntimeError(f"mhsm {' '.join(arguments[:2])}: {errors.strip()}")
        result: dict[str, Any] = json.loads(output)
        return result

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        """Time a step."""
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 3)
        self.say(f"{what} ({self.seconds[name]:.1f} s)")

    def counting(self, what: str) -> Callable[[int], None]:
        """Return a function that reports progress every other second."""
        last = time.monotonic()

        def progress(done: int) -> None:
            nonlocal last
            if time.monotonic() - last > _REPORT_SECONDS:
                last = time.monotonic()
                self.say(f"  {done} of {self._count} keys {what}")

        return progress

    def run(self) -> dict[str, Any]:
        """Do everything; return the summary."""
        lost, found = self._directory / "pool-a", self._directory / "pool-b"
        place = str(self._directory / "backup")
        try:
            officers, domain_file = self._activate(lost)
            with Pool.connect(lost) as pool:
                with self.step("fill", f"made {self._count} keys of every kind, with versions and deletions"):
                    keys.make(pool, self._count, self._seed, self.counting("made"))
                with self.step("record", "wrote down every version; signed and encrypted with every key"):
                    before = keys.record(pool, self.counting("recorded"), use=True)
            what = "made custom roles and role assignments, at the pool and at keys"
            with self.step("roles", what), Pool.connect(lost, "administrator") as administrator:
                roles.make(administrator)
                roles_before = roles.record(administrator)
            self._lock_and_unlock(lost, officers, domain_file)
            with self.step("backup", "took a backup that its taker cannot read"):
                self.mhsm("backup", "create", "--output", place, "--data-dir", str(lost))
        finally:
            self._end(lost)
        shutil.rmtree(lost)
        self.say("pool A is lost: its processes are stopped and its data directories are deleted")
        try:
            self._recover(found, officers, domain_file)
            with self.step("restore", "restored the backup in pool B"):
                self.mhsm("backup", "restore", "--yes", "--from", place, "--data-dir", str(found))
            what = "compared every key, version, attribute, signature, ciphertext and role"
            with self.step("compare", what), Pool.connect(found) as pool:
                wrong = keys.mismatches(before, pool, self.counting("compared"))
                with Pool.connect(found, "administrator") as administrator:
                    wrong += roles.mismatches(roles_before, administrator)
        finally:
            self._end(found)
        for text in wrong[:20]:
            self.say(f"MISMATCH: {text}")
        parts = ("new_pool", "recover_domain", "restore")
        self.seconds["recovery_total"] = round(sum(self.seconds[part] for part in parts), 3)
        self.say(f"{len(before.keys)} keys compared, {len(wrong)} mismatches; {len(roles_before)} roles")
        return {
            "ok": not wrong and len(before.keys) == self._count,
            "keys": len(before.keys),
            "roles": len(roles_before),
            "mismatches": len(wrong),
            "seconds": self.seconds,
        }

    def _activate(self, data: Path) -> tuple[list[dict[str, str]], Path]:
        at = ("--data-dir", str(data))
        with self.step("first_pool", "pool A runs (attended)"):
            self.mhsm("up", "--attended", *at)
        made = self.mhsm("officers", "make", "--output-dir", str(self._directory / "officers"))
        officers: list[dict[str, str]] = made["officers"]
        domain_file, attempt = self._directory / "security-domain.json", self._directory / "activation.json"
        certificates = [part for officer in officers for part in ("--officer", officer["certificate_file"])]
        with self.step("download", "three officers proved their shares, two open the domain; A is active"):
            self.mhsm(
                "security-domain", "download", "--required", "2", "--output", str(domain_file),
                "--attempt-output", str(attempt), *certificates, *at,
            )  # fmt: skip
            self._submit(officers, attempt, domain_file, at)
            self._await(data, enclave_pb2.PARTITION_STATE_SERVING)
        return officers, domain_file

    def _lock_and_unlock(self, data: Path, officers: list[dict[str, str]], domain_file: Path) -> None:
        """Kill all partitions and unlock the pool: its keys come back without a backup."""
        at, attempt = ("--data-dir", str(data)), self._directory / "unlock.json"
        # All at once: one that is left would heal the others.
        for entry in load_connection(data).partitions:
            process_id = entry.process_ids["partition"]
            if process_id:
                os.kill(process_id, signal.SIGKILL)
        self._await(data, enclave_pb2.PARTITION_STATE_LOCKED)
        with self.step("unlock", "kill -9 of all three partitions; two officers unlocked the pool"):
            self.mhsm("security-domain", "init-recovery", "--output", str(attempt), *at)
            self._submit(officers[1:], attempt, domain_file, at)
            self._await(data, enclave_pb2.PARTITION_STATE_SERVING)

    def _recover(self, data: Path, officers: list[dict[str, str]], domain_file: Path) -> None:
        at = ("--data-dir", str(data))
        with self.step("new_pool", "pool B runs: new, empty, with keys of its own"):
            self.mhsm("up", "--attended", *at)
        attempt = self._directory / "recovery.json"
        with self.step("recover_domain", "two officers brought A's security domain into B"):
            self.mhsm(
                "security-domain", "init-recovery", "--security-domain", str(domain_file),
                "--output", str(attempt), *at,
            )  # fmt: skip
            self._submit([officers[0], officers[2]], attempt, domain_file, at)
            self._await(data, enclave_pb2.PARTITION_STATE_SERVING)

    def _submit(
        self, officers: list[dict[str, str]], attempt: Path, domain_file: Path, at: tuple[str, str]
    ) -> None:
        for officer in officers:
            self.mhsm(
                "security-domain", "submit-share", "--yes", "--attempt", str(attempt), "--security-domain",
                str(domain_file), "--officer-key", officer["key_file"], *at,
            )  # fmt: skip

    def _await(self, data: Path, state: enclave_pb2.PartitionState.ValueType) -> None:
        deadline = time.monotonic() + _STATE_SECONDS
        while not all(self._is(data, index, state) for index in range(3)):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"not within {_STATE_SECONDS:.0f} s: {enclave_pb2.PartitionState.Name(state)}"
                )
            time.sleep(_POLL_SECONDS)

    @staticmethod
    def _is(data: Path, index: int, state: enclave_pb2.PartitionState.ValueType) -> bool:
        try:
            with Pool.connect(data, "administrator", partition=index, timeout_seconds=2.0) as pool:
                status = pool.partition_status(index)
        except MHSMError:
            return False
        serving = enclave_pb2.PARTITION_STATE_SERVING
        return status.state == state and (status.fresh or state != serving)

    def _end(self, data: Path) -> None:
        # Not only if it is connected: it may have been stopped while it came up.
        if data.exists():
            self.mhsm("down", "--data-dir", str(data))


def main() -> int:
    """Run the rehearsal; the last line of the output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=2000, help="how many keys pool A has (default 2000)")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    parser.add_argument("--seed", type=int, default=None, help="repeat a mixture of keys")
    parser.add_argument("--keep", type=Path, default=None, help="a new directory to keep everything in")
    arguments = parser.parse_args()
    if not 1 <= arguments.keys <= KEYS_MAX:
        parser.error(f"--keys is 1 to {KEYS_MAX}")
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="mhsm-rehearsal-") as temporary:
        directory = Path(temporary)
        if arguments.keep:
            directory = arguments.keep.absolute()
            directory.mkdir(mode=0o700, parents=True)
        rehearsal = Rehearsal(directory, arguments.keys, seed, quiet=arguments.json)
        for number in _STOPPING:
            signal.signal(number, _stop)
        try:
            summary = rehearsal.run()
        except Stopped:
            kept = "is kept" if arguments.keep else "is deleted"
            print(f"rehearsal: stopped, and so are its pools; {directory} {kept}", file=sys.stderr)
            return INTERRUPTED
        except (RuntimeError, MHSMError) as error:
            print(f"rehearsal: {error} (seed {seed})", file=sys.stderr)
            summary = {"ok": False, "keys": 0, "mismatches": 0, "seconds": rehearsal.seconds}
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
