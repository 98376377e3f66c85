"""Evidence of a patched pool where nothing of the pool is but its roots, and a copy of its repository."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from hsm_pool.cli.evidence_files import Anchors
from hsm_pool.cli.output import failure_of
from hsm_pool.enclave.verifier import Expected
from hsm_pool.errors import EvidenceRefused, FirmwareRefused
from mhsm.evidence.v1 import evidence_pb2
from tests.unit.attested import TestPool
from tests.unit.firmware.test_repository import Publisher

EXPECTED = Expected(b"n" * 16, bytes(32))


@dataclass(frozen=True)
class Elsewhere:
    """A machine with the roots of a pool and nothing else of it, and evidence by version of the firmware."""

    directory: Path
    publisher: Publisher
    evidence: dict[int, evidence_pb2.Evidence]

    def anchors(self, repository: Path | None) -> Anchors:
        roots = (self.directory / "platform.crt", self.directory / "owner.crt")
        return Anchors.load(self.directory / "no-pool", *roots, None, repository)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Elsewhere:
    pool, publisher = TestPool(tmp_path / "pool"), Publisher(tmp_path)
    (tmp_path / "platform.crt").write_bytes(pool.platform_root.certificate_pem)
    (tmp_path / "owner.crt").write_bytes(pool.owner_root.certificate_pem)
    publisher.publish(1, b"image")
    good = pool.nodes[0].attester.attest(EXPECTED.nonce, EXPECTED.report_data)
    made = {n: pool.nodes[0].changed(good, measurement=bytes([n]) * 48) for n in (1, 2)}
    return Elsewhere(tmp_path, publisher, made)


def test_the_repository_vouches_for_the_firmware_of_a_patched_pool(elsewhere: Elsewhere) -> None:
    """G5: what it does not name is refused all the same."""
    anchors = elsewhere.anchors(elsewhere.publisher.directory)
    claims = anchors.verifier.verify(elsewhere.evidence[1], EXPECTED)
    assert anchors.firmware_versions[claims.measurement] == 1
    with pytest.raises(EvidenceRefused, match=r"mhsm\.measurement"):
        anchors.verifier.verify(elsewhere.evidence[2], EXPECTED)
    assert Path(tempfile.gettempdir()).is_dir(), "whoever needs a temporary file next finds a directory"


def test_without_it_the_refusal_says_how_to_verify_another_version(elsewhere: Elsewhere) -> None:
    with pytest.raises(EvidenceRefused) as refused:
        elsewhere.anchors(None).verifier.verify(elsewhere.evidence[1], EXPECTED)
    failure = failure_of(refused.value)
    assert failure.exit_code == 6
    assert "--firmware-repository" in failure.following
    assert "--policy" in failure.following
    assert "--firmware-repository" not in failure_of(EvidenceRefused("a chain does not verify")).following


def test_a_repository_whose_metadata_was_changed_vouches_for_nothing(elsewhere: Elsewhere) -> None:
    """G5: its signatures are verified under its root, also on an auditor's machine."""
    (targets,) = (elsewhere.publisher.directory / "metadata").glob("2.targets.json")
    targets.write_text(targets.read_text().replace("01" * 48, "02" * 48))
    with pytest.raises(FirmwareRefused):
        elsewhere.anchors(elsewhere.publisher.directory)
