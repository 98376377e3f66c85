"""Evidence in files, and the roots and policy it is verified under; needs no pool and no network."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from cryptography.hazmat.primitives import serialization

from hsm_pool.cli.output import fail
from hsm_pool.client.connection import NoConnection, load_connection
from hsm_pool.enclave import admission
from hsm_pool.enclave.verifier import TrustAnchors, Verifier
from hsm_pool.provisioning import layout
from mhsm.evidence.v1 import evidence_pb2
from security_domain.fingerprints import words

F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def anchor_options(function: F) -> F:
    """Add --platform-root, --owner-root and --policy."""
    for option, text in (
        (
            "--policy",
            "Admission policy, JSON; by default that of the owner root, else: this very distribution.",
        ),
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

    @staticmethod
    def load(
        data_dir: Path, platform_root: Path | None, owner_root: Path | None, policy: Path | None
    ) -> Anchors:
        """Read roots and policy, from the data directory where no file is given, or end the command."""
        directory = _directory(data_dir)
        files = (
            platform_root or directory / layout.PLATFORM_ROOT,
            owner_root or directory / layout.OWNER_ROOT,
        )
        for file in files:
            if not file.is_file():
                fail(f"{file} is not there: evidence cannot be verified", "--platform-root and --owner-root")
        try:
            roots = TrustAnchors.load(*files)
        except ValueError:
            fail(f"{files[0]} or {files[1]} is not a certificate", "--platform-root and --owner-root")
        images: frozenset[bytes] = frozenset()
        if policy is None and owner_root is None:
            policy, images = directory / layout.ADMISSION_POLICY, _images(directory)
        verifier = Verifier(roots, admission.load(policy, measurements=images))
        return Anchors(verifier, _root_words(roots))


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


def _images(directory: Path) -> frozenset[bytes]:
    """Return the measurements of the firmware that a pool's nodes have verified: partitions may run it."""
    kept = list(directory.glob("nodes/*/firmware/metadata"))
    if not kept:
        return frozenset()
    from hsm_pool.firmware.update import FirmwareSource

    sources = [FirmwareSource(directory, metadata, b"") for metadata in kept]
    return frozenset(image.measurement for source in sources for image in source.known().values())


def _directory(data_dir: Path) -> Path:
    """Return the data directory, also of a connection file."""
    if data_dir.is_file():
        try:
            return Path(load_connection(data_dir).data_directory)
        except NoConnection as error:
            fail(str(error), "--platform-root and --owner-root")
    return data_dir
