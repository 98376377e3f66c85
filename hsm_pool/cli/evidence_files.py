"""Evidence in files, and the roots and policy it is verified under; needs no pool and no network."""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
from cryptography.hazmat.primitives import serialization

from hsm_pool.cli.output import fail
from hsm_pool.client.connection import NoConnection, load_connection
from hsm_pool.enclave import admission
from hsm_pool.enclave.claims import Claims
from hsm_pool.enclave.verifier import Expected, TrustAnchors, Verifier, claimed_pool_id
from hsm_pool.errors import EvidenceRefused
from hsm_pool.firmware.slots import Slots
from hsm_pool.provisioning import layout
from mhsm.evidence.v1 import evidence_pb2
from security_domain.fingerprints import words

F = TypeVar("F", bound=Callable[..., Any])
_ROOT_NAME = re.compile(r"CN=pool ([0-9a-f]{8}) ")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


def anchor_options(function: F) -> F:
    """Add --platform-root, --owner-root, --policy and --firmware-repository."""
    text = "A copy of the repository, from its publisher: what it vouches for is admitted, too."
    function = click.option("--firmware-repository", type=_DIRECTORY, default=None, help=text)(function)
    text = "Admission policy, JSON; by default that of the owner root, else: this very distribution."
    return root_options(click.option("--policy", type=_FILE, default=None, help=text)(function))


def root_options(function: F) -> F:
    """Add --platform-root and --owner-root."""
    for option, text in (
        ("--owner-root", "The pool owner's root, PEM; by default the data directory's."),
        ("--platform-root", "The platform's root, PEM; by default the data directory's."),
    ):
        function = click.option(option, type=_FILE, default=None, help=text)(function)
    return function


@dataclass(frozen=True, slots=True)
class Anchors:
    """What this machine verifies evidence with."""

    verifier: Verifier
    words: dict[str, str]
    """Words of the roots, by "platform" and "owner"."""
    pool_id: str
    """Pool of the roots: its id, or of roots given as files the beginning of it; "" if they do not say."""
    swapped: Verifier
    """Takes each root for the other; says nothing but that somebody has confused them."""
    firmware_versions: dict[bytes, int] = field(default_factory=dict)
    """Version of each measurement that the firmware repository given vouches for."""

    def verify(self, source: Path, evidence: evidence_pb2.Evidence, expected: Expected) -> Claims:
        """Return the claims of evidence from a file.

        Raises:
            EvidenceRefused: As the verifier; it says so if the file is of another pool than the roots,
                or the roots are swapped.
        """
        try:
            return self.verifier.verify(evidence, expected)
        except EvidenceRefused as refused:
            raise EvidenceRefused(f"{refused.message}{self._confused(source, evidence, expected)}") from None

    def _confused(self, source: Path, evidence: evidence_pb2.Evidence, expected: Expected) -> str:
        claimed = claimed_pool_id(evidence)
        if claimed and self.pool_id and not claimed.startswith(self.pool_id):
            return f"\n{source} says pool {claimed}, the roots are of pool {self.pool_id}: --data-dir?"
        try:
            self.swapped.verify(evidence, expected)
        except EvidenceRefused:
            return ""
        return "\nthe roots may be swapped: --platform-root and --owner-root?"

    @staticmethod
    def load(
        data_dir: Path,
        platform_root: Path | None,
        owner_root: Path | None,
        policy: Path | None,
        firmware_repository: Path | None = None,
    ) -> Anchors:
        """Read roots and policy, from the data directory where no file is given, or end the command."""
        directory, roots = _directory(data_dir), load_roots(data_dir, platform_root, owner_root)
        images: frozenset[bytes] = frozenset()
        floor = 0
        if owner_root is None:
            floor = security_version_floor(directory)
            if policy is None:
                policy, images = directory / layout.ADMISSION_POLICY, _images(directory, floor)
        versions = _published(firmware_repository) if firmware_repository else {}
        loaded = admission.load(policy, measurements=images.union(versions))
        verifier = Verifier(roots, loaded, security_version_floor=floor)
        swapped = Verifier(TrustAnchors(roots.owner_root, roots.platform_root), loaded)
        pool_id = _pool_of(roots) if platform_root or owner_root else _pool_id(directory)
        return Anchors(verifier, _root_words(roots), pool_id, swapped, versions)


def load_roots(data_dir: Path, platform_root: Path | None, owner_root: Path | None) -> TrustAnchors:
    """Read the roots, from the data directory where no file is given, or end the command."""
    directory = _directory(data_dir)
    files = (
        platform_root or directory / layout.PLATFORM_ROOT,
        owner_root or directory / layout.OWNER_ROOT,
    )
    for file in files:
        if not file.is_file():
            fail(f"{file} is not there: evidence cannot be verified", "--platform-root and --owner-root")
    try:
        return TrustAnchors.load(*files)
    except ValueError:
        fail(f"{files[0]} or {files[1]} is not a certificate", "--platform-root and --owner-root")


def root_words(data_dir: Path) -> dict[str, str]:
    """Return the words of the roots in a data directory; empty if they are not there."""
    directory = _directory(data_dir)
    try:
        return _root_words(TrustAnchors.load(directory / layout.PLATFORM_ROOT, directory / layout.OWNER_ROOT))
    except (OSError, ValueError):
        return {}


def encode(evidence: evidence_pb2.Evidence) -> dict[str, str]:
    """Return evidence as it stands in files."""
    return {
        "platform_token": base64.b64encode(evidence.platform_token).decode(),
        "owner_token": base64.b64encode(evidence.owner_token).decode(),
    }


def decode(content: Any) -> evidence_pb2.Evidence:
    """Return evidence of a file.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    return evidence_pb2.Evidence(
        platform_token=base64.b64decode(content["platform_token"], validate=True),
        owner_token=base64.b64decode(content["owner_token"], validate=True),
    )


def _root_words(roots: TrustAnchors) -> dict[str, str]:
    named = {"platform": roots.platform_root, "owner": roots.owner_root}
    return {name: words(root.public_bytes(serialization.Encoding.DER)) for name, root in named.items()}


def _pool_id(directory: Path) -> str:
    try:
        return str(layout.pool_settings(directory)["pool_id"])
    except (OSError, ValueError, KeyError, layout.DirectoryRefused):
        return ""


def _pool_of(roots: TrustAnchors) -> str:
    """Return the beginning of the pool id that both roots name; "" if they do not."""
    found = {
        _ROOT_NAME.search(root.subject.rfc4514_string()) for root in (roots.platform_root, roots.owner_root)
    }
    named = {match[1] for match in found if match}
    return named.pop() if None not in found and len(named) == 1 else ""


def security_version_floor(directory: Path) -> int:
    """Return the highest security version below which a node of the pool starts nothing; 0 for none.

    Raises:
        FirmwareRefused: A node's file is not readable.
    """
    nodes = directory.glob("nodes/*/firmware")
    return max((Slots(node).floor() for node in nodes), default=0)


def _images(directory: Path, floor: int) -> frozenset[bytes]:
    """Return the measurements of what partitions may run: verified firmware, not below the floor."""
    kept = list(directory.glob("nodes/*/firmware/metadata"))
    if not kept:
        return frozenset()
    from hsm_pool.firmware.update import FirmwareSource

    sources = [FirmwareSource(directory, metadata, b"") for metadata in kept]
    known = [image for source in sources for image in source.known().values()]
    return frozenset(image.measurement for image in known if image.manifest.security_version >= floor)


def _published(repository: Path) -> dict[bytes, int]:
    """Return the version of each measurement in a repository, verified under the root that lies there.

    Raises:
        FirmwareRefused: It does not verify, or is not fresh.
    """
    from hsm_pool.firmware.repository import Repository
    from hsm_pool.firmware.update import FirmwareSource

    before = tempfile.tempdir
    try:
        with tempfile.TemporaryDirectory() as state:
            source = FirmwareSource(repository, Path(state), Repository(repository).root())
            source.refresh()
            return {image.measurement: version for version, image in source.known().items()}
    finally:
        tempfile.tempdir = before  # the source has its own, which is gone now


def _directory(data_dir: Path) -> Path:
    """Return the data directory, also of a connection file."""
    if data_dir.is_file():
        try:
            return Path(load_connection(data_dir).data_directory)
        except NoConnection as error:
            fail(str(error), "--platform-root and --owner-root")
    return data_dir
