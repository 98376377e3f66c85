"""Run the main job: ``python -m hsm_pool.demo [--json] [--seed N] [--seconds N] [--keep DIR]``."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hsm_pool.client.connection import load_connection
from hsm_pool.client.pool import Pool
from hsm_pool.demo import files
from hsm_pool.demo.workload import Workload
from hsm_pool.errors import MHSMError, PoolLocked
from hsm_pool.node_agent.processes import is_running
from mhsm.enclave.v1 import enclave_pb2
from mhsm.keys.v1 import keys_pb2

_WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.02
_SERVING = enclave_pb2.PARTITION_STATE_SERVING
_LOCKED = enclave_pb2.PARTITION_STATE_LOCKED


class Demo:
    """The main job on a pool of its own."""

    def __init__(self, directory: Path, seed: int, seconds: float, *, quiet: bool) -> None:
        self._directory = directory
        self._data = directory / "pool"
        self._seed = seed
        self._seconds = seconds
        self._quiet = quiet
        self._started = time.monotonic()
        self._pause = threading.Event()

    def say(self, text: str) -> None:
        """Print a line of progress."""
        if not self._quiet:
            print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    def mhsm(self, *arguments: str) -> dict[str, Any]:
        """Run the mhsm command as an operator does, and return its JSON."""
        completed = subprocess.run(
            [sys.executable, "-m", "hsm_pool.cli", *arguments, "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        if completed.returncode:
            raise RuntimeError(f"mhsm {' '.join(arguments[:2])}: {completed.stderr.strip()}")
        result: dict[str, Any] = json.loads(completed.stdout)
        return result

    def run(self) -> dict[str, Any]:
        """Do everything; return the summary."""
        at = ("--data-dir", str(self._data))
        self.mhsm("up", "--attended", *at)
        self.say("an attended pool runs: three partitions, three store members, the fabric controller")
        process_ids = self._process_ids()
        try:
            return self._main_job(at)
        finally:
            process_ids += self._process_ids()
            self.mhsm("down", *at)
            left = [process_id for process_id in set(process_ids) if is_running(process_id)]
            if left:
                raise RuntimeError(f"processes are left behind: {left}")
            self.say("the pool is stopped; no process is left")

    def _main_job(self, at: tuple[str, str]) -> dict[str, Any]:
        officers, domain_file = self._activate(at)
        with Pool.connect(self._data) as pool:
            rsa = pool.create_key("signing-rsa", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=3072)
            pool.create_key("signing-ec", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
            pool.create_key("wrapping-aes", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=256)
            self.say("made an RSA-3072, an EC P-256 and an AES-256 key")
            wheel = files.build_wheel(self._directory)
            digest = files.sha256(wheel)
            signature = pool.sign(rsa.name, "RS256", digest)
            files.verify_with_openssl(rsa.public_key_der, signature, wheel, self._directory)
            self.say(f"signed {wheel.name}; the openssl program verifies it with the exported public key")
            plain, sealed = self._directory / "large-file", self._directory / "large-file.sealed"
            files.make_large_file(plain)
            data_key = os.urandom(32)
            wrapped = pool.wrap_key("keys/wrapping-aes", "A256KW", data_key)
            files.encrypt_file(plain, sealed, data_key)
            del data_key
            self._check_file(pool, wrapped, plain, sealed)
            self.say("envelope-encrypted a file of 10 MiB under a wrapped data key and got it back")
        workload = Workload(
            lambda: Pool.connect(self._data), "keys/signing-ec", self._seed, signers=2, writers=2
        )
        workload.start()
        try:
            figures = self._kill_one(workload)
        finally:
            workload.stop()
        self._report_load(workload)
        unlock_ms = self._lose_all(at, officers, domain_file)
        with Pool.connect(self._data) as pool:
            lost = workload.ledger.lost(pool)
            pool.verify(rsa.name, "RS256", digest, signature)
            self._check_file(pool, wrapped, plain, sealed)
        if lost:
            self.say(f"LOST: {', '.join(lost)}")
        self.say(
            f"{len(workload.ledger.states)} keys of the load compared: {len(lost)} acknowledged writes lost; "
            "the old signature verifies, the file decrypts"
        )
        return {
            "ok": not lost,
            "operations_acknowledged": workload.crypto.acknowledged + workload.writes.acknowledged,
            "operations_refused": workload.crypto.refused + workload.writes.refused,
            "operations_unknown": workload.crypto.unknown + workload.writes.unknown,
            "acknowledged_writes_lost": len(lost),
            **figures,
            "unlock_ms": unlock_ms,
            "seed": self._seed,
        }

    def _activate(self, at: tuple[str, str]) -> tuple[list[dict[str, str]], Path]:
        made = self.mhsm(
            "officers", "make", "--count", "3", "--output-dir", str(self._directory / "officers")
        )
        officers: list[dict[str, str]] = made["officers"]
        domain_file = self._directory / "security-domain.json"
        attempt = self._directory / "activation.json"
        certificates = [part for officer in officers for part in ("--officer", officer["certificate_file"])]
        self.mhsm(
            "security-domain",
            "download",
            "--required",
            "2",
            "--output",
            str(domain_file),
            "--attempt-output",
            str(attempt),
            *certificates,
            *at,
        )
        for officer in officers:
            progress = self._submit_share(attempt, domain_file, officer, at)
            self.say(f"an officer proved his share: {progress['accepted']} of {progress['required']}")
        self._await(lambda: self._all_in(_SERVING), "three serving partitions")
        self.say("three officers hold shares of the security domain, any two open it; the pool is active")
        return officers, domain_file

    def _submit_share(
        self, attempt: Path, domain_file: Path, officer: dict[str, str], at: tuple[str, str]
    ) -> dict[str, Any]:
        return self.mhsm(
            "security-domain",
            "submit-share",
            "--yes",
            "--attempt",
            str(attempt),
            "--security-domain",
            str(domain_file),
            "--officer-key",
            officer["key_file"],
            *at,
        )

    def _check_file(self, pool: Pool, wrapped: bytes, plain: Path, sealed: Path) -> None:
        data_key = pool.unwrap_key("keys/wrapping-aes", "A256KW", wrapped)
        if files.decrypt_file(sealed, data_key) != plain.read_bytes():
            raise RuntimeError("the file did not come back")

    def _kill_one(self, workload: Workload) -> dict[str, int]:
        """Kill one partition and its store member under load; measure gaps and healing."""
        self._pause.wait(self._seconds / 2)
        victim = random.Random(self._seed).randrange(3)  # noqa: S311 - a choice, not a secret
        before = self._incarnation(victim)
        self._await(lambda: workload.writes_in_flight > 0, "a write in flight")
        workload.crypto.mark()
        workload.writes.mark()
        killed_at = time.monotonic()
        self._kill(victim, "store_member")
        self._kill(victim, "partition")
        self.say(f"kill -9 of partition {victim} and its store member, under load")
        self._await(lambda: self._healed(victim, before), "the partition healed")
        heal_ms = round((time.monotonic() - killed_at) * 1000)
        self._pause.wait(self._seconds / 2)
        figures = {
            "crypto_gap_ms": workload.crypto.gap_ms(),
            "write_gap_ms": workload.writes.gap_ms(),
            "heal_ms": heal_ms,
        }
        self.say(
            f"load went on: longest gap {figures['crypto_gap_ms']} ms for signatures, "
            f"{figures['write_gap_ms']} ms for writes; partition {victim} healed after {heal_ms} ms"
        )
        return figures

    def _report_load(self, workload: Workload) -> None:
        for name, tally in (("signatures", workload.crypto), ("writes", workload.writes)):
            detail = f" {tally.refusals}" if tally.refusals else ""
            self.say(
                f"{name}: {tally.acknowledged} acknowledged, {tally.refused} refused, "
                f"{tally.unknown} unknown{detail}"
            )

    def _lose_all(self, at: tuple[str, str], officers: list[dict[str, str]], domain_file: Path) -> int:
        """Kill all partitions, see that the pool is locked, and unlock it with two officers."""
        for index in range(3):
            self._kill(index, "partition")
        self._await(lambda: self._all_in(_LOCKED), "a locked pool")
        try:
            with Pool.connect(self._data) as pool:
                pool.get_key("keys/signing-ec")
        except PoolLocked as error:
            self.say(f"kill -9 of all three partitions; a client is told: {error.message}")
        else:
            raise RuntimeError("a locked pool answered")
        began = time.monotonic()
        attempt = self._directory / "recovery.json"
        self.mhsm("security-domain", "init-recovery", "--output", str(attempt), *at)
        for officer in (officers[0], officers[2]):
            progress = self._submit_share(attempt, domain_file, officer, at)
            self.say(f"an officer submitted his share: {progress['accepted']} of {progress['required']}")
        self._await(lambda: self._all_in(_SERVING), "three serving partitions")
        return round((time.monotonic() - began) * 1000)

    # -- processes -----------------------------------------------------------------------

    def _process_ids(self) -> list[int]:
        connection = load_connection(self._data)
        found = [connection.supervisor_process_id, connection.fabric_controller["process_id"]]
        for entry in connection.partitions:
            found.extend(entry.process_ids.values())
        return [process_id for process_id in found if process_id]

    def _kill(self, index: int, what: str) -> None:
        process_id = load_connection(self._data).partitions[index].process_ids[what]
        if process_id:
            os.kill(process_id, signal.SIGKILL)

    def _status(self, index: int) -> Any:
        try:
            with Pool.connect(self._data, "administrator", partition=index, timeout_seconds=1.0) as pool:
                return pool.partition_status(index)
        except MHSMError:
            return None

    def _incarnation(self, index: int) -> int:
        status = self._status(index)
        return status.incarnation if status else 0

    def _healed(self, index: int, incarnation: int) -> bool:
        status = self._status(index)
        return bool(status and status.incarnation > incarnation and status.fresh)

    def _all_in(self, state: int) -> bool:
        statuses = [self._status(index) for index in range(3)]
        return all(
            status and status.state == state and (status.fresh or state != _SERVING) for status in statuses
        )

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} within {_WAIT_SECONDS:.0f} s")
            self._pause.wait(_POLL_SECONDS)


def main() -> int:
    """Run the demo; the last line of the output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the last line only")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run")
    parser.add_argument("--seconds", type=float, default=8.0, help="load before and after the kill, together")
    parser.add_argument("--keep", type=Path, default=None, help="a new directory to keep everything in")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="mhsm-demo-") as temporary:
        directory = Path(temporary)
        if arguments.keep:
            directory = arguments.keep.absolute()
            directory.mkdir(mode=0o700, parents=True)
        demo = Demo(directory, seed, arguments.seconds, quiet=arguments.json)
        try:
            summary = demo.run()
        except (RuntimeError, MHSMError) as error:
            print(f"demo: {error} (seed {seed})", file=sys.stderr)
            summary = {"ok": False, "seed": seed}
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
