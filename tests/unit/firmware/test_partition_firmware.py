"""When a partition keeps its image, what it reports of it, and whom it admits (G5)."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hsm_pool.core.commands import ReportSecurityVersion
from hsm_pool.core.model import PoolRecord
from hsm_pool.enclave import admission
from hsm_pool.enclave.verifier import Expected
from hsm_pool.errors import EvidenceRefused, FirmwareRefused
from hsm_pool.firmware.image import Manifest, build
from hsm_pool.firmware.measurement import PACKAGES, measure
from hsm_pool.firmware.running import Running
from hsm_pool.firmware.slots import STARTS_MAX, Slots
from hsm_pool.firmware.update import FirmwareSource
from hsm_pool.partition import firmware
from hsm_pool.partition.firmware import SERVED_SECONDS, PartitionFirmware
from hsm_pool.settings import FirmwareSettings, PartitionSettings
from tests.unit.attested import Node, TestPool
from tests.unit.firmware.test_repository import Publisher
from tests.unit.provisioning.test_settings import PARTITION

NONCE, DATA = b"n" * 16, bytes(32)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    """A node on which version 2 was activated; nothing of it is read here."""
    made = Slots(tmp_path / "firmware")
    for version in (2, 3):
        (tmp_path / "firmware" / "images" / str(version)).mkdir(parents=True)
    made.activate(2, b"before")
    return made


@pytest.fixture
def settings(tmp_path: Path, slots: Slots) -> PartitionSettings:
    (tmp_path / "root.json").write_bytes(b"{}")
    made = FirmwareSettings(
        repository=str(tmp_path / "repository"),
        root_file=str(tmp_path / "root.json"),
        directory=str(tmp_path / "firmware"),
    )
    policy = str(tmp_path / "admission-policy.json")
    return replace(PARTITION, index=1, firmware=made, admission_policy_file=policy)


@pytest.fixture
def pool(tmp_path: Path) -> TestPool:
    return TestPool(tmp_path / "pool")


def runs(monkeypatch: pytest.MonkeyPatch, version: int, security_version: int) -> None:
    """Let this process be an image."""
    monkeypatch.setattr(firmware, "running", lambda: Running(version, security_version, bytes(48)))


def test_an_image_is_kept_when_it_has_served_for_a_while(
    settings: PartitionSettings, pool: TestPool, slots: Slots, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: neither a start, nor the keys, nor the first lease; until then the floor does not rise above it."""
    runs(monkeypatch, 2, 2)
    of_partition = PartitionFirmware(settings, pool.anchors, clock)
    record = PoolRecord(90)
    clock.now += 2 * SERVED_SECONDS
    assert of_partition.report(record) is None
    for _ in range(3):
        of_partition.note_serving()
        assert not slots.active().confirmed
        assert of_partition.report(record) is None
    clock.now += SERVED_SECONDS - 1
    of_partition.note_serving()
    assert not slots.active().confirmed
    clock.now += 1
    of_partition.note_serving()
    assert slots.active().confirmed
    assert of_partition.report(record) == ReportSecurityVersion(1, 2)


def test_an_image_that_was_activated_while_another_served_is_not_kept_for_that(
    settings: PartitionSettings, pool: TestPool, slots: Slots, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(monkeypatch, 2, 2)
    of_partition = PartitionFirmware(settings, pool.anchors, clock)
    of_partition.note_serving()
    slots.activate(3, b"of 2")
    clock.now += SERVED_SECONDS
    of_partition.note_serving()
    assert (slots.active().version, slots.active().confirmed) == (3, False)


def test_an_image_that_served_before_is_reported_at_once(
    settings: PartitionSettings, pool: TestPool, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(monkeypatch, 2, 2)
    slots.confirm(2)
    of_partition = PartitionFirmware(settings, pool.anchors)
    assert of_partition.report(PoolRecord(90)) == ReportSecurityVersion(1, 2)
    with pytest.raises(FirmwareRefused, match="below"):
        of_partition.report(PoolRecord(90, security_version_floor=3))


def test_a_repository_that_does_not_answer_holds_up_nobody(
    settings: PartitionSettings, pool: TestPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: a peer is healed with what was verified before, an image is refused, and other work goes on."""
    monkeypatch.setattr(firmware, "_REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(firmware, "_UNDER_WAY_SECONDS", 0.05)
    asked, put_right = threading.Event(), threading.Event()

    def hangs(_: FirmwareSource) -> None:
        asked.set()
        put_right.wait(10)

    monkeypatch.setattr(FirmwareSource, "refresh", hangs)
    of_partition = PartitionFirmware(settings, pool.anchors)
    of_partition.refresh()
    assert asked.is_set()
    of_partition.refresh()
    with pytest.raises(FirmwareRefused, match="does not answer"):
        of_partition.stage(3, 0)
    of_partition.activate(3)
    put_right.set()
    of_partition.close()


def admits(of_partition: PartitionFirmware, node: Node, security_version: int) -> bool:
    """Return whether a peer of this security version would be given the keys."""
    evidence = node.changed(node.attester.attest(NONCE, DATA), security_version=security_version)
    try:
        of_partition.verifier.verify(evidence, Expected(NONCE, DATA))
    except EvidenceRefused:
        return False
    return True


def test_the_floor_holds_for_peers_under_a_policy_of_the_owner(
    settings: PartitionSettings, pool: TestPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: from the moment the chain says it, and at the next start before anybody says it."""
    conditions = [{"claim": "mhsm.security_version", "greaterOrEquals": 1}]
    document = {"version": "1.0.0", "anyOf": [{"authority": admission.AUTHORITY, "allOf": conditions}]}
    Path(settings.admission_policy_file).write_text(json.dumps(document))
    runs(monkeypatch, 2, 2)
    of_partition = PartitionFirmware(settings, pool.anchors)
    assert admits(of_partition, pool.nodes[2], 1)
    of_partition.report(PoolRecord(90, security_version_floor=2))
    for one in (of_partition, PartitionFirmware(settings, pool.anchors)):
        assert (admits(one, pool.nodes[2], 1), admits(one, pool.nodes[2], 2)) == (False, True)


@pytest.fixture
def published(
    settings: PartitionSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PartitionSettings:
    """A node that runs version 4 of a repository with versions 3 to 5 (security versions 2, 2, 3)."""
    (tmp_path / "publisher").mkdir()
    publisher = Publisher(tmp_path / "publisher")
    roots = {package: tmp_path / "sources" / package for package in PACKAGES}
    for root in roots.values():
        root.mkdir(parents=True)
        (root / "__init__.py").write_text("")
    for version, security_version in ((3, 2), (4, 2), (5, 3)):
        manifest = Manifest(version, security_version)
        content = build(roots, manifest)
        publisher.publish(version, content, security_version, measure(roots, manifest.serialise()))
    root_file = tmp_path / "root.json"
    root_file.write_bytes(publisher.root)
    runs(monkeypatch, 4, 2)
    made = FirmwareSettings(str(publisher.directory), str(root_file), str(tmp_path / "node"))
    return replace(settings, firmware=made)


def test_an_older_version_is_neither_staged_nor_activated(
    published: PartitionSettings, pool: TestPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: signed, verified, of the same security version, and here already: it is refused all the same."""
    runs(monkeypatch, 3, 2)
    of_partition = PartitionFirmware(published, pool.anchors)
    of_partition.stage(3, 2)
    assert of_partition.security_version_of(3) == 2
    runs(monkeypatch, 4, 2)
    with pytest.raises(FirmwareRefused, match="older than the one that runs"):
        of_partition.stage(3, 2)
    with pytest.raises(FirmwareRefused, match="older than the one that runs"):
        of_partition.security_version_of(3)
    with pytest.raises(FirmwareRefused, match="not staged"):
        of_partition.security_version_of(5)
    with pytest.raises(FirmwareRefused, match="below the pool's 3"):
        of_partition.stage(4, 3)
    of_partition.stage(5, 3)
    assert of_partition.security_version_of(5) == 3


def test_a_partition_below_the_floor_does_not_serve_and_peers_below_it_are_refused(
    published: PartitionSettings, pool: TestPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: as soon as the chain says it, and at each start after that."""
    of_partition = PartitionFirmware(published, pool.anchors)
    of_partition.refresh()
    node = pool.nodes[2]
    good = node.attester.attest(NONCE, DATA)
    peer = of_partition.verifier
    known = FirmwareSource(
        Path(published.firmware.repository),
        Path(published.firmware.directory) / "metadata",
        b"",  # type: ignore[union-attr]
    ).known()
    older, newer = (
        node.changed(good, measurement=known[version].measurement, security_version=security_version)
        for version, security_version in ((4, 2), (5, 3))
    )
    for evidence in (older, newer):
        peer.verify(evidence, Expected(NONCE, DATA))
    for take in (of_partition.take_floor, of_partition.report):
        with pytest.raises(FirmwareRefused, match="below the pool's security version"):
            take(PoolRecord(90, security_version_floor=3))
    runs(monkeypatch, 5, 3)
    of_partition.take_floor(PoolRecord(90, security_version_floor=3))
    with pytest.raises(EvidenceRefused):
        peer.verify(older, Expected(NONCE, DATA))
    peer.verify(newer, Expected(NONCE, DATA))
    runs(monkeypatch, 4, 2)
    with pytest.raises(FirmwareRefused, match="below the pool's security version"):
        PartitionFirmware(published, pool.anchors)


def test_a_partition_that_is_refused_runs_what_the_pool_runs(
    published: PartitionSettings, pool: TestPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: a node on a new disk; what it takes is newer, published and verified, or nothing happens."""
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(firmware.os, "kill", lambda *sent: signals.append(sent))
    assert published.firmware is not None
    slots = Slots(Path(published.firmware.directory))
    of_partition = PartitionFirmware(published, pool.anchors)
    for version in (0, 3, 4, 6):  # what is installed, older, its own, not published
        of_partition.follow(version)
        assert (slots.active().version, signals) == (0, [])
    runs(monkeypatch, 0, 2)
    of_partition.follow(4)
    assert (slots.active().version, slots.active().confirmed) == (4, False)
    assert signals == [(os.getpid(), signal.SIGTERM)]
    for _ in range(STARTS_MAX + 1):
        slots.starting()
    of_partition.follow(4)
    assert (slots.active().version, slots.active().failed, len(signals)) == (0, 4, 1), "it was given up"
    of_partition.follow(5)
    assert (slots.active().version, len(signals)) == (5, 2)
