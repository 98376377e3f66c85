"""G5 on a real pool: patched under load, one partition at a time; the unsigned, older and broken stay out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from hsm_pool.errors import MHSMError
from mhsm.keys.v1 import keys_pb2
from mhsm.record.v1 import record_pb2
from tests.fabric_access import Fabric, FloorWatcher
from tests.running_pool import ROOT, RunningPool, TestOfficer, make_officers, mhsm, until
from tests.store_access import StoreAccess

pytestmark = [pytest.mark.pool, pytest.mark.slow, pytest.mark.timeout(900)]

DIGEST = bytes(32)
PACKAGES = ("hsm_pool", "security_domain", "proto")


@dataclass
class Publisher:
    """A firmware repository of this test run, and what is published in it."""

    directory: Path
    repository: Path = field(init=False)
    keys: Path = field(init=False)

    def __post_init__(self) -> None:
        self.repository, self.keys = self.directory / "repository", self.directory / "keys"
        mhsm("firmware", "new-repository", "--output", str(self.repository), "--keys-output", str(self.keys))

    def publish(
        self, version: int, security_version: int = 1, change: tuple[str, str, str] | None = None
    ) -> None:
        """Publish an image of this tree; of a file (its name, old, new) something is changed on demand."""
        sources = ROOT
        if change:
            sources = self.directory / f"sources-{version}"
            ignored = shutil.ignore_patterns("__pycache__")
            for package in PACKAGES:
                shutil.copytree(ROOT / package, sources / package, ignore=ignored)
            name, old, new = change
            text = (sources / name).read_text()
            assert text.count(old) == 1
            (sources / name).write_text(text.replace(old, new))
        image = self.directory / f"{version}.zip"
        mhsm(
            "firmware", "build", "--version", str(version), "--security-version", str(security_version),
            "--sources", str(sources), "--output", str(image),
        )  # fmt: skip
        mhsm(
            "firmware", "publish", "--repository", str(self.repository), "--image", str(image),
            "--keys", str(self.keys),
        )  # fmt: skip


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    made = Publisher(tmp_path_factory.mktemp("firmware"))
    made.publish(1)
    return made


@pytest.fixture(scope="module")
def patched(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], publisher: Publisher
) -> Iterator[RunningPool]:
    """An attended pool that gets its firmware from the repository."""
    pool = make_pool(attended=True, options=("--firmware-repository", str(publisher.repository)))
    pool.activate(officers, 2)
    with pool.client() as client:
        client.create_key("signer", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    yield pool
    pool.down()


def fabric(pool: RunningPool, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run mhsm-fabric as its operator would."""
    settings = pool.directory / "fabric" / "fabric.json"
    return subprocess.run(
        [sys.executable, "-m", "fabric_controller", *arguments, "--settings", str(settings)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def versions(pool: RunningPool) -> list[int]:
    """Return the firmware version of each partition."""
    document = json.loads(fabric(pool, "status", "--json").stdout)
    return [entry["firmware_version"] for entry in document["partitions"]]


class Load:
    """Clients that sign and write while something happens."""

    def __init__(self, pool: RunningPool) -> None:
        self._pool, self._stop = pool, threading.Event()
        self.done, self.failed, self.least_serving = 0, [], 3
        self._threads = [threading.Thread(target=work) for work in (self._sign, self._write)]

    def __enter__(self) -> Self:
        self._fabric = Fabric(self._pool)
        self._watcher = FloorWatcher(self._fabric)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._watcher.close()
        self._fabric.close()
        self.least_serving = self._watcher.fewest

    def _repeat(self, call: Callable[[Any, int], object]) -> None:
        with self._pool.client(timeout_seconds=30.0) as client:
            number = 0
            while not self._stop.is_set():
                number += 1
                try:
                    call(client, number)
                    self.done += 1
                except MHSMError as error:
                    self.failed.append(error.reason)

    def _sign(self) -> None:
        self._repeat(lambda client, _: client.sign("keys/signer", "ES256", DIGEST))

    def _write(self) -> None:
        self._repeat(lambda client, number: client.update_key("keys/signer", tags={"number": str(number)}))


def test_patches_under_load(patched: RunningPool, publisher: Publisher) -> None:
    """G5: 0 failed operations, at most one partition out at a time; the security version rises and holds."""
    assert versions(patched) == [0, 0, 0]
    publisher.publish(2, security_version=2)
    for version in (1, 2):
        with Load(patched) as load:
            completed = fabric(patched, "patch", str(version))
        assert completed.returncode == 0, completed.stderr
        assert versions(patched) == [version] * 3
        assert (load.failed, load.done > 20, load.least_serving) == ([], True, 2)
    patched.await_states(["SERVING"] * 3)
    directory = str(patched.directory)
    shown = json.loads(mhsm("attest", "--json", "--data-dir", directory).stdout)
    activated = mhsm("audit", "query", "--operation", "ActivateFirmware", "--json", "--data-dir", directory)
    on_record = [json.loads(line)["properties"] for line in activated.stdout.splitlines()]
    assert {(entry["partition"], entry["firmwareVersion"]) for entry in on_record} == {
        (partition, version) for partition in range(3) for version in (1, 2)
    }
    attested = [entry["claims"]["mhsm"] for entry in shown["partitions"]]
    signer = hashlib.sha256((patched.directory / "nodes/0/firmware/root.json").read_bytes()).hexdigest()
    assert [(claims["signer"], claims["security_version"]) for claims in attested] == [(signer, 2)] * 3
    assert fabric(patched, "patch", "2").returncode == 0, "there is nothing to do"
    older = fabric(patched, "patch", "1")
    assert (older.returncode, "no partition takes older firmware" in older.stderr) == (1, True)
    unknown = fabric(patched, "patch", "7")
    assert (unknown.returncode, "refuses to STAGE version 7" in unknown.stderr) == (1, True)
    assert versions(patched) == [2, 2, 2]
    assert patched.states() == ["SERVING"] * 3


BAD_IMAGES = {
    3: (
        "hsm_pool/partition/partition.py",
        "_log = structlog.get_logger()",
        "raise RuntimeError('bad image')",
    ),
    4: (
        "hsm_pool/store/follower.py",
        "        self._loaded.set()\n        self._renew_now.set()\n        _log",
        "        __import__('os')._exit(3)\n        _log",
    ),
}
"""By version: one does not start at all, the other has the pool's keys and ends before it serves."""


@pytest.mark.parametrize("version", BAD_IMAGES)
def test_firmware_that_does_not_serve_goes_back_and_the_roll_out_stops(
    patched: RunningPool, publisher: Publisher, version: int
) -> None:
    """G5: never fewer than two serve, and all three run the version before."""
    publisher.publish(version, security_version=2, change=BAD_IMAGES[version])
    with Load(patched) as load:
        completed = fabric(patched, "patch", str(version))
    assert completed.returncode == 1
    assert f"does not start version {version} and went back to version 2" in completed.stderr
    patched.await_states(["SERVING"] * 3)
    assert (versions(patched), load.failed, load.least_serving) == ([2, 2, 2], [], 2)


def test_firmware_of_a_partition_that_serves_is_not_activated(patched: RunningPool) -> None:
    """G5: activation is decided on the chain, and only for a drained partition."""
    active = patched.directory / "nodes" / "0" / "firmware" / "active.json"
    before = active.read_bytes()
    controller = Fabric(patched)
    try:
        stamp = {**controller.stamp(), "version": 4}
        assert controller.send("ActivateFirmware", 0, **stamp) == "FAILED_PRECONDITION"
    finally:
        controller.close()
    assert active.read_bytes() == before


def test_firmware_below_the_security_version_of_the_pool_never_serves(
    patched: RunningPool,
) -> None:
    """G5: a node that starts the older image again is refused by its own floor."""
    firmware = patched.directory / "nodes" / "1" / "firmware"
    until(lambda: (firmware / "floor").exists() or None, 30, "the floor on the node's disk")
    active = json.loads((firmware / "active.json").read_bytes())
    older = {**active, "version": 1, "previous": 1, "confirmed": True}
    (firmware / "active.json").write_text(json.dumps(older))
    incarnation = patched.status(1).incarnation
    assert patched.signal(1, "partition", signal.SIGKILL)
    logged(patched, 1, "below the pool's security version")
    assert patched.states()[1] != "SERVING"
    (firmware / "active.json").write_text(json.dumps(active))
    patched.await_states(["SERVING"] * 3)
    assert patched.status(1).incarnation > incarnation
    assert versions(patched) == [2, 2, 2]


def test_a_node_on_a_new_disk_comes_to_run_what_the_pool_runs(patched: RunningPool) -> None:
    """G5: it starts what is installed, is refused by its peers for that, and takes the pool's version."""
    firmware = patched.directory / "nodes" / "1" / "firmware"
    for name in ("active.json", "floor"):
        (firmware / name).unlink()
    for name in ("images", "metadata"):
        shutil.rmtree(firmware / name)
    assert patched.signal(1, "partition", signal.SIGKILL)
    logged(patched, 1, "it refuses what runs here")
    patched.await_states(["SERVING"] * 3)
    assert versions(patched) == [2, 2, 2]
    until(lambda: json.loads((firmware / "active.json").read_bytes())["confirmed"] or None, 60, "its image")
    assert (firmware / "floor").read_text() == "2"


def logged(pool: RunningPool, index: int, text: str) -> None:
    """Wait until a partition has logged something, in its last starts."""
    logs = pool.directory / "nodes" / str(index) / "logs"

    def found() -> bool | None:
        return any(text in log.read_text() for log in logs.glob("partition*.log")) or None

    until(found, 60, f"{text!r} in the log of partition {index}")


def test_a_repository_that_was_tampered_with_is_refused(patched: RunningPool, publisher: Publisher) -> None:
    """G5: whoever holds the repository, and the controller, cannot bring in what was not signed."""
    publisher.publish(5, security_version=2)
    (image,) = (publisher.repository / "targets").glob("*firmware-5.zip")
    good = image.read_bytes()
    for bad in (good[:-1], good + b"x", b"X" + good[1:]):
        image.write_bytes(bad)
        refused = fabric(patched, "patch", "5")
        assert (refused.returncode, "refuses to STAGE version 5" in refused.stderr) == (1, True)
    assert versions(patched) == [2, 2, 2]
    image.write_bytes(good)
    assert fabric(patched, "patch", "5").returncode == 0
    assert versions(patched) == [5, 5, 5]
    patched.await_states(["SERVING"] * 3)


@dataclass(frozen=True)
class InForce:
    """What the store says of epoch and security domain at one moment."""

    epoch: int
    generation: int
    header: bytes


class EpochChanges:
    """Changes epochs at random partitions: each change is whole, or has changed nothing."""

    def __init__(self, pool: RunningPool, new: list[TestOfficer], seed: int) -> None:
        self._pool, self._new = pool, new
        self._generator = random.Random(seed)
        self._store = StoreAccess(pool.connection)
        self.outcomes: Counter[str] = Counter()

    def in_force(self) -> InForce:
        """Read it in one piece: the head is of the epoch that the header seals."""
        dump = self._store.dump()
        header = record_pb2.PoolHeader.FromString(dump["header"])
        epoch = record_pb2.Head.FromString(dump["head"]).epoch
        assert header.sealed_epoch.epoch == epoch
        return InForce(epoch, header.generation, dump["header"])

    def change(self, kind: str) -> bool:
        """Change the epoch once; return whether it was done."""
        partition, before = self._generator.randrange(3), self.in_force()
        with self._pool.client("administrator", timeout_seconds=40.0) as client:
            try:
                if kind == "rotate-kek":
                    client.rotate_key_encryption_key(partition)
                else:
                    self._new_generation(client, partition)
            except MHSMError as error:
                self.outcomes[f"{kind}: {type(error).__name__}"] += 1
                assert self.in_force() == before or not error.definite, error.reason
                return False
        after = self.in_force()
        assert after.epoch > before.epoch
        assert after.generation > before.generation or kind == "rotate-kek"
        self.outcomes[f"{kind}: done"] += 1
        return True

    def _new_generation(self, client: Any, partition: int) -> None:
        begun = client.new_generation([officer.certificate_der for officer in self._new], 2, partition)
        try:
            for officer in self._new:
                client.submit_share(partition, begun.attempt_id, self._pool.submission(officer, begun))
        except MHSMError:
            with contextlib.suppress(MHSMError):  # it may be gone with its partition
                client.cancel_ceremony(partition, begun.attempt_id)
            raise

    def some(self) -> str:
        """Draw a kind of change."""
        return self._generator.choice(EPOCH_CHANGES)

    def close(self) -> None:
        """Close the channel to the store."""
        self._store.__exit__(None, None, None)


EPOCH_CHANGES = ("rotate-kek", "new-generation")


@pytest.mark.full
def test_epochs_change_while_a_patch_rolls(
    patched: RunningPool, publisher: Publisher, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """G1, G4, G5: 0 failed operations, never fewer than two serving; a refused change is repeated.

    In the end all partitions hold the epoch in force, and the officers of the newest generation open it.
    """
    publisher.publish(6, security_version=2)
    new = make_officers(3)
    changes = EpochChanges(patched, new, seed)
    rolled: list[subprocess.CompletedProcess[str]] = []
    rolling = threading.Thread(target=lambda: rolled.append(fabric(patched, "patch", "6")))
    try:
        with Load(patched) as load:
            rolling.start()
            while rolling.is_alive():
                changes.change(changes.some())
            during = sum(changes.outcomes.values())
            for kind in EPOCH_CHANGES:
                until(lambda kind=kind: changes.change(kind), 120, kind)  # type: ignore[misc]
    finally:
        rolling.join()
    with capsys.disabled():
        print(f"\nepoch changes, {during} while the patch rolled: {dict(changes.outcomes)}")
    assert rolled[0].returncode == 0, rolled[0].stderr
    assert versions(patched) == [6, 6, 6]
    assert (load.failed, load.done > 20, load.least_serving, during > 3) == ([], True, 2, True)
    patched.await_states(["SERVING"] * 3)
    with patched.client() as client:
        client.create_key("later", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    epoch = changes.in_force().epoch
    with StoreAccess(patched.connection) as store:
        assert epoch in {record_pb2.Envelope.FromString(value).epoch for value in store.records().values()}
    changes.close()
    sign_at_each(patched)
    patched.kill_everything()
    patched.await_states(["LOCKED"] * 3)
    patched.unlock(new[1:])
    sign_at_each(patched)


def sign_at_each(pool: RunningPool) -> None:
    """Sign at each partition with a key of an early epoch and with one of the epoch in force."""
    for index in range(3):
        with pool.client(partition=index, timeout_seconds=20) as client:
            for key in ("keys/signer", "keys/later"):
                client.sign(key, "ES256", DIGEST)
