"""The publisher's side: an offline repository of firmware images as TUF metadata.

Root and targets are signed by two of three keys that are kept offline; snapshot and
timestamp by one online key each, so that the timestamp can be renewed often and a frozen
repository is noticed. All of them end: the timestamp after a week, the others after a year.
Source: The Update Framework specification 1.0, through python-tuf.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.exceptions import StorageError
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp

from hsm_pool.client.new_file import write_new_file
from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware.image import IMAGE_BYTES_MAX, Manifest

OFFLINE_KEYS = 3
THRESHOLD = 2
OFFLINE_VALIDITY = timedelta(days=365)
ONLINE_VALIDITY = timedelta(days=7)
RENEWED_BEFORE = timedelta(days=60)
"""How long before their end snapshot and targets are renewed with the timestamp, and a root's end is told."""
_OFFLINE_ROLES = ("root", "targets")
_ONLINE_ROLES = ("snapshot", "timestamp")
KEY_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Published:
    """An image as the targets metadata names it."""

    manifest: Manifest
    measurement: bytes
    length: int


def target_path(version: int) -> str:
    """Return the name of an image in the repository."""
    return f"firmware-{version}.zip"


def make_keys(directory: Path) -> list[Path]:
    """Make the keys of a new repository: three offline ones and one each for snapshot and timestamp.

    Raises:
        FileExistsError: One of them exists; it is untouched.
    """
    names = [f"offline-{number}.key" for number in range(1, OFFLINE_KEYS + 1)]
    paths = [directory / name for name in [*names, *(f"{role}.key" for role in _ONLINE_ROLES)]]
    for path in paths:
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_new_file(path, pem)
    return paths


def load_key(path: Path) -> CryptoSigner:
    """Read a key that :func:`make_keys` made.

    Raises:
        FirmwareRefused: It is none.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes()[:KEY_BYTES_MAX], None)
    except (ValueError, TypeError):
        raise FirmwareRefused(f"{path.name} is not a firmware key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise FirmwareRefused(f"{path.name} is not an Ed25519 key")
    return CryptoSigner(key)


class Repository:
    """A repository in a directory; every change is visible as a whole or not at all.

    ``metadata/`` holds the signed metadata and ``targets/`` the images under their digests. The
    timestamp is replaced last, and nothing that it leads to is ever replaced.
    """

    def __init__(self, directory: Path) -> None:
        self._metadata, self._targets = directory / "metadata", directory / "targets"

    @staticmethod
    def create(directory: Path, keys: Path) -> Repository:
        """Make an empty repository signed with new keys of :func:`make_keys`.

        Raises:
            FileExistsError: There is something already; it is untouched.
        """
        repository = Repository(directory)
        for path in (repository._metadata, repository._targets):
            path.mkdir(mode=0o755, parents=True, exist_ok=False)
        now = _now()
        offline = [load_key(keys / f"offline-{number}.key") for number in range(1, OFFLINE_KEYS + 1)]
        online = {role: load_key(keys / f"{role}.key") for role in _ONLINE_ROLES}
        root = Root(expires=now + OFFLINE_VALIDITY, consistent_snapshot=True)
        for role in _OFFLINE_ROLES:
            for signer in offline:
                root.add_key(signer.public_key, role)
            root.roles[role].threshold = THRESHOLD
        for role, signer in online.items():
            root.add_key(signer.public_key, role)
        repository._write("1.root.json", Metadata(root), offline[:THRESHOLD])
        repository._publish(Targets(version=1, expires=now + OFFLINE_VALIDITY), offline[:THRESHOLD], online)
        return repository

    def publish(
        self, content: bytes, published: Published, offline: Sequence[Path], snapshot: Path, timestamp: Path
    ) -> None:
        """Add an image.

        Args:
            content: The image.
            published: What the metadata is to say of it.
            offline: Two of the offline keys.
            snapshot: The snapshot key.
            timestamp: The timestamp key.

        Raises:
            FirmwareRefused: A version of this number or a newer one was published, or a higher security
                version, an image is too large, or the keys are not those of the repository.
        """
        if len(content) > IMAGE_BYTES_MAX:
            raise FirmwareRefused(f"an image has at most {IMAGE_BYTES_MAX} bytes")
        signers = [load_key(path) for path in offline]
        if len({signer.public_key.keyid for signer in signers}) < THRESHOLD:
            raise FirmwareRefused(f"{THRESHOLD} different offline keys are needed")
        targets = self._newest("targets").signed
        known = images_of(targets)
        if known and published.manifest.version <= max(known):
            raise FirmwareRefused(f"version {max(known)} is published: versions only rise")
        least = max((image.manifest.security_version for image in known.values()), default=0)
        if published.manifest.security_version < least:
            raise FirmwareRefused(f"security version {least} is published: it only rises")
        name = target_path(published.manifest.version)
        target = TargetFile.from_data(name, content, ["sha256", "sha512"])
        target.unrecognized_fields["custom"] = {
            "version": published.manifest.version,
            "security_version": published.manifest.security_version,
            "product_id": published.manifest.product_id,
            "measurement": published.measurement.hex(),
        }
        targets.targets[name] = target
        targets.version += 1
        targets.expires = _now() + OFFLINE_VALIDITY
        digest = hashlib.sha256(content).hexdigest()
        self._write_file(self._targets / f"{digest}.{name}", content)
        self._publish(targets, signers, {"snapshot": load_key(snapshot), "timestamp": load_key(timestamp)})

    def renew(self, timestamp: Path, snapshot: Path | None, offline: Sequence[Path]) -> list[str]:
        """Sign the timestamp anew, so that the repository does not look frozen, and what else ends soon.

        Args:
            timestamp: The timestamp key.
            snapshot: The snapshot key, if it is at hand.
            offline: Offline keys, as far as they are at hand.

        Returns:
            The roles whose metadata was signed: "timestamp", and "snapshot" and "targets" if they end
            within RENEWED_BEFORE and their keys are at hand.

        Raises:
            FirmwareRefused: A key is not that of the repository.
        """
        ends = self.expirations()
        ending = {role for role in ("snapshot", "targets") if ends[role] < _now() + RENEWED_BEFORE}
        online = {"timestamp": load_key(timestamp)}
        if not ending or snapshot is None:
            self._publish_timestamp(self._newest("timestamp").signed.snapshot_meta.version, online)
            return ["timestamp"]
        online["snapshot"] = load_key(snapshot)
        targets = self._newest("targets").signed
        if "targets" in ending and len(offline) >= THRESHOLD:
            targets.version += 1
            targets.expires = _now() + OFFLINE_VALIDITY
            self._publish(targets, [load_key(path) for path in offline], online)
            return ["timestamp", "snapshot", "targets"]
        self._publish_snapshot(targets.version, online)
        return ["timestamp", "snapshot"]

    def renew_root(self, offline: Sequence[Path]) -> None:
        """Sign the root anew, with the same keys in it; partitions follow from the one that they were given.

        Args:
            offline: Two of the offline keys.

        Raises:
            FirmwareRefused: They are not those of the repository.
        """
        root = self._newest("root").signed
        root.version += 1
        root.expires = _now() + OFFLINE_VALIDITY
        self._write(f"{root.version}.root.json", Metadata(root), [load_key(path) for path in offline])

    def expirations(self) -> dict[str, datetime]:
        """Return when the metadata of each role ends: from then on partitions refuse the repository."""
        return {role: self._newest(role).signed.expires for role in (*_OFFLINE_ROLES, *_ONLINE_ROLES)}

    def images(self) -> dict[int, Published]:
        """Return what is published, by version; not verified."""
        return images_of(self._newest("targets").signed)

    def root(self) -> bytes:
        """Return the first root metadata: what partitions are given to begin with."""
        return (self._metadata / "1.root.json").read_bytes()

    def _publish(
        self, targets: Targets, offline: Sequence[CryptoSigner], online: dict[str, CryptoSigner]
    ) -> None:
        self._write(f"{targets.version}.targets.json", Metadata(targets), offline)
        self._publish_snapshot(targets.version, online)

    def _publish_snapshot(self, targets_version: int, online: dict[str, CryptoSigner]) -> None:
        snapshot = Snapshot(version=1, expires=_now() + OFFLINE_VALIDITY)
        if self._published():
            snapshot.version = self._newest("snapshot").signed.version + 1
        snapshot.meta["targets.json"].version = targets_version
        self._write(f"{snapshot.version}.snapshot.json", Metadata(snapshot), [online["snapshot"]])
        self._publish_timestamp(snapshot.version, online)

    def _publish_timestamp(self, snapshot_version: int, online: dict[str, CryptoSigner]) -> None:
        stamp = Timestamp(version=1, expires=_now() + ONLINE_VALIDITY)
        if self._published():
            stamp.version = self._newest("timestamp").signed.version + 1
        stamp.snapshot_meta.version = snapshot_version
        self._replace_timestamp(Metadata(stamp), online["timestamp"])

    def _published(self) -> bool:
        return (self._metadata / "timestamp.json").exists()

    def _replace_timestamp(self, metadata: Metadata[Timestamp], signer: CryptoSigner) -> None:
        self._sign("timestamp", metadata, [signer])
        new = self._metadata / f".timestamp-{os.getpid()}-{metadata.signed.version}"
        write_new_file(new, metadata.to_bytes(), 0o644)
        new.replace(self._metadata / "timestamp.json")

    def _write(self, name: str, metadata: Metadata[Any], signers: Sequence[CryptoSigner]) -> None:
        self._sign(name.split(".")[1], metadata, signers)
        self._write_file(self._metadata / name, metadata.to_bytes())

    @staticmethod
    def _write_file(path: Path, content: bytes) -> None:
        """Write a file that no timestamp leads to yet; what an interrupted publication left is replaced."""
        path.unlink(missing_ok=True)
        write_new_file(path, content, 0o644)

    def _sign(self, role: str, metadata: Metadata[Any], signers: Sequence[Signer]) -> None:
        metadata.signatures.clear()
        for signer in signers:
            metadata.sign(signer, append=True)
        root = metadata.signed if isinstance(metadata.signed, Root) else self._newest("root").signed
        try:
            root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except RepositoryError:
            raise FirmwareRefused(f"these keys do not sign the {role} of this repository") from None

    def _newest(self, role: str) -> Metadata[Any]:
        """Return what the timestamp leads to: what is written beyond it is not published."""
        try:
            if role == "root":
                roots = [int(path.name.partition(".")[0]) for path in self._metadata.glob("*.root.json")]
                return Metadata.from_file(str(self._metadata / f"{max(roots, default=1)}.root.json"))
            stamp: Metadata[Any] = Metadata.from_file(str(self._metadata / "timestamp.json"))
            if role == "timestamp":
                return stamp
            version = stamp.signed.snapshot_meta.version
            snapshot: Metadata[Any] = Metadata.from_file(str(self._metadata / f"{version}.snapshot.json"))
            if role == "snapshot":
                return snapshot
            version = snapshot.signed.meta["targets.json"].version
            return Metadata.from_file(str(self._metadata / f"{version}.targets.json"))
        except (RepositoryError, StorageError, OSError, ValueError):
            raise FirmwareRefused("this is not a firmware repository") from None


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def images_of(targets: Targets) -> dict[int, Published]:
    """Return the images that targets metadata names, by version.

    Raises:
        FirmwareRefused: A target says something else of itself than an image does.
    """
    found: dict[int, Published] = {}
    for name, target in targets.targets.items():
        try:
            custom = target.unrecognized_fields["custom"]
            manifest = Manifest(custom["version"], custom["security_version"], custom["product_id"])
            measurement = bytes.fromhex(custom["measurement"])
        except (KeyError, TypeError, ValueError):
            raise FirmwareRefused("the metadata of an image is malformed") from None
        if name != target_path(manifest.version) or len(measurement) != 48:
            raise FirmwareRefused("the metadata of an image is malformed")
        found[manifest.version] = Published(manifest, measurement, target.length)
    return found
