"""A real pool for tests: started by the mhsm command, activated by officers, broken by signals.

Nothing here is mocked: three partitions, three etcd members, node agents, the fabric
controller and the supervisor run as processes of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from hsm_pool.client.connection import Connection, load_connection
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from mhsm.enclave.v1 import enclave_pb2
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import submission
from security_domain.officers import make_officer

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class TestOfficer:
    """An officer made for this test run."""

    __test__ = False
    certificate_der: bytes
    key: rsa.RSAPrivateKey


def make_officers(count: int) -> list[TestOfficer]:
    """Make officers with real keys."""
    made = [make_officer(f"officer-{index}") for index in range(1, count + 1)]
    return [
        TestOfficer(x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER), key)
        for pem, key in made
    ]


def mhsm(*arguments: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the mhsm command as a user would."""
    completed = subprocess.run(
        [sys.executable, "-m", "hsm_pool.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=cwd,
    )
    if check and completed.returncode:
        raise AssertionError(
            f"mhsm {' '.join(arguments)} ended with {completed.returncode}:\n"
            f"{completed.stdout}{completed.stderr}"
        )
    return completed


def until(condition: Callable[[], T | None], seconds: float, what: str | Callable[[], str]) -> T:
    """Poll until the condition gives something true, bounded; the bound is generous, never asserted on."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what if isinstance(what, str) else what()}")


def changes(status: Any) -> int:
    """Return how many changes the chain holds; every now and then it also takes note of an audit log."""
    return int(status.applied_sequence - status.audit_notes)


class RunningPool:
    """A pool of this test run."""

    def __init__(self, directory: Path, *, attended: bool = True, options: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self.attended = attended
        self.officers: list[TestOfficer] = []
        self.file = b""
        self._options = options
        self.up()

    # -- life ----------------------------------------------------------------------------

    def up(self) -> dict[str, Any]:
        """Start it; made new at the first time."""
        attended = ("--attended",) if self.attended else ()
        output = mhsm("up", *attended, *self._options, "--data-dir", str(self.directory), "--json").stdout
        result: dict[str, Any] = json.loads(output)
        return result

    def down(self) -> None:
        """Stop it, if it runs."""
        if (self.directory / "connection.json").exists():
            mhsm("down", "--data-dir", str(self.directory))

    def activate(self, officers: list[TestOfficer], required: int) -> None:
        """Download the security domain, prove every share and wait until all three partitions serve."""
        self.officers = officers
        with self.client("administrator") as pool:
            begun = pool.download_security_domain([o.certificate_der for o in officers], required)
            self.file = begun.security_domain_file
            for officer in officers:
                pool.submit_share(begun.partition_index, begun.attempt_id, self.submission(officer, begun))
        self.await_states(["SERVING"] * 3)

    def unlock(self, officers: list[TestOfficer], partition: int = 0) -> None:
        """Unlock a locked pool with these officers' shares and wait until all serve."""
        with self.client("administrator") as pool:
            begun = pool.init_recovery(partition)
            for officer in officers:
                pool.submit_share(partition, begun.attempt_id, self.submission(officer, begun))
        self.await_states(["SERVING"] * 3)

    def submission(self, officer: TestOfficer, begun: Any) -> bytes:
        """Return an officer's submission for a ceremony."""
        name = security_domain_pb2.CeremonyPurpose.Name(begun.purpose)
        purpose = name.removeprefix("CEREMONY_PURPOSE_").lower()
        detail = b""
        if purpose in submission.WITH_OFFICERS:
            detail = submission.officers_digest(begun.new_officers, begun.new_required)
        return submission.make_submission(
            begun.security_domain_file,
            officer.key,
            begun.attempt_id,
            begun.exchange_public_key,
            purpose,
            detail,
        )

    # -- looking -------------------------------------------------------------------------

    @property
    def connection(self) -> Connection:
        """The connection file, read anew."""
        return load_connection(self.directory)

    def client(self, name: str = "application", **options: Any) -> Pool:
        """Connect as one of the clients."""
        return Pool(self.connection, name, **options)

    def status(self, index: int) -> Any:
        """Return a partition's status, None while it does not answer."""
        try:
            with self.client("administrator", partition=index, timeout_seconds=2.0) as pool:
                return pool.partition_status(index)
        except (MHSMError, Exception) as error:
            if isinstance(error, AssertionError):
                raise
            return None

    def states(self) -> list[str]:
        """Return the state of each partition, "" while it does not answer."""
        names = []
        for index in range(3):
            status = self.status(index)
            name = enclave_pb2.PartitionState.Name(status.state) if status else ""
            names.append(name.removeprefix("PARTITION_STATE_"))
        return names

    def await_states(self, wanted: list[str], seconds: float = 60.0) -> None:
        """Wait until the partitions are in these states, and fresh where they serve."""

        def reached() -> bool:
            statuses = [self.status(index) for index in range(3)]
            return all(
                status is not None
                and enclave_pb2.PartitionState.Name(status.state) == f"PARTITION_STATE_{name}"
                and (status.fresh or name != "SERVING")
                for status, name in zip(statuses, wanted, strict=True)
            )

        until(reached, seconds, lambda: f"partitions {wanted}, now {self.states()}")

    def process_id(self, index: int, what: str) -> int | None:
        """Return the process id of a partition's part: partition, store_member or node_agent."""
        return self.connection.partitions[index].process_ids.get(what)

    def all_process_ids(self) -> list[int]:
        """Return the ids of all processes of the pool."""
        connection = self.connection
        found = [connection.supervisor_process_id, connection.fabric_controller["process_id"]]
        for entry in connection.partitions:
            found.extend(value for value in entry.process_ids.values())
        return [value for value in found if value]

    # -- breaking ------------------------------------------------------------------------

    def signal(self, index: int, what: str, number: signal.Signals) -> int | None:
        """Send a signal to one process of a partition; returns its id, None if it was gone."""
        process_id = self.process_id(index, what)
        if process_id is None:
            return None
        try:
            os.kill(process_id, number)
        except ProcessLookupError:
            return None
        return process_id

    @contextlib.contextmanager
    def paused(self, index: int, *parts: str) -> Iterator[None]:
        """Stop processes of a partition for a while (SIGSTOP)."""
        stopped = [
            process_id
            for part in parts
            if (process_id := self.signal(index, part, signal.SIGSTOP)) is not None
        ]
        try:
            yield
        finally:
            for process_id in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGCONT)

    def kill_everything(self) -> None:
        """Kill all three partitions and agents at once; the supervisor starts them again."""
        victims = [self.process_id(index, "node_agent") for index in range(3)]
        partitions = [self.process_id(index, "partition") for index in range(3)]
        for process_id in [*partitions, *victims]:
            if process_id:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)

    def ceremony_child(self, index: int) -> int | None:
        """Return the process id of a partition's ceremony child, None while it has none."""
        partition = self.process_id(index, "partition")
        try:
            for task in Path(f"/proc/{partition}/task").iterdir():
                for child in (task / "children").read_text().split():
                    if b"hsm_pool.ceremony.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return int(child)
        except FileNotFoundError:
            pass
        return None
