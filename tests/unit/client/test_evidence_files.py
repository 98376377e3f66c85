"""G5: officers and `mhsm attest` hold evidence against what the pool's nodes know of its firmware."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hsm_pool.cli.evidence_files import Anchors
from hsm_pool.enclave import admission
from hsm_pool.enclave.verifier import Expected
from hsm_pool.errors import EvidenceRefused, FirmwareRefused
from hsm_pool.firmware.slots import Slots
from hsm_pool.firmware.update import FirmwareSource
from hsm_pool.provisioning import layout
from tests.unit.attested import TestPool
from tests.unit.firmware.test_repository import Publisher

EXPECTED = Expected(b"n" * 16, bytes(32))


@pytest.fixture
def pool(tmp_path: Path) -> TestPool:
    return TestPool(tmp_path / "pool")


@pytest.fixture
def directory(tmp_path: Path, pool: TestPool) -> Path:
    """A data directory whose nodes have verified versions 1 and 2, of these security versions."""
    made = tmp_path / "data"
    for name, root in ((layout.PLATFORM_ROOT, pool.platform_root), (layout.OWNER_ROOT, pool.owner_root)):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(root.certificate_pem)
    (tmp_path / "publisher").mkdir()
    publisher = Publisher(tmp_path / "publisher")
    for version in (1, 2):
        publisher.publish(version, b"image", version)
    for index in range(3):
        metadata = made / "nodes" / str(index) / "firmware" / "metadata"
        FirmwareSource(publisher.directory, metadata, publisher.root).refresh()
    return made


def admitted(pool: TestPool, anchors: Anchors) -> list[int]:
    """Return the versions that these anchors admit: their images measure as the repository's do."""
    node, found = pool.nodes[0], []
    good = node.attester.attest(EXPECTED.nonce, EXPECTED.report_data)
    for version in (1, 2):
        evidence = node.changed(good, measurement=bytes([version]) * 48, security_version=version)
        try:
            anchors.verifier.verify(evidence, EXPECTED)
        except EvidenceRefused:
            continue
        found.append(version)
    return found


def test_firmware_below_the_floor_of_any_node_is_refused(
    directory: Path, pool: TestPool, tmp_path: Path
) -> None:
    """G4, G5: shares are not given to it, also where its own node has lost its floor."""
    conditions = [{"claim": "mhsm.security_version", "greaterOrEquals": 1}]
    document = {"version": "1.0.0", "anyOf": [{"authority": admission.AUTHORITY, "allOf": conditions}]}
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(document))
    assert admitted(pool, Anchors.load(directory, None, None, None)) == [1, 2]
    Slots(directory / "nodes/2/firmware").raise_floor(2)
    for given in (None, policy):
        assert admitted(pool, Anchors.load(directory, None, None, given)) == [2]
    roots = (directory / layout.PLATFORM_ROOT, directory / layout.OWNER_ROOT)
    elsewhere = Anchors.load(tmp_path / "elsewhere", *roots, policy)
    assert admitted(pool, elsewhere) == [1, 2], "without the directory the policy says it all"


def test_a_floor_that_is_not_readable_is_said_so(directory: Path) -> None:
    (directory / "nodes/1/firmware/floor").write_text("two")
    with pytest.raises(FirmwareRefused, match="not readable"):
        Anchors.load(directory, None, None, None)
