"""Which image a node runs: the active one, the one before, and what happens if a start fails.

The partition stages and activates; the node agent starts what is active. An image that was
started three times before its partition has served with it is given up for the one that served
before, unless that one is below the security version of the pool. A start says when it waits for
others; one that neither serves nor waits hangs, and its agent ends it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structlog

from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware.image import SECURITY_VERSION, Manifest, examine, unpack

_log = structlog.get_logger()
STARTS_MAX = 3
INSTALLED = 0
"""Version of the installed distribution, which is no image."""


@dataclass(frozen=True, slots=True)
class Active:
    """What the file says: versions, and how often the active one was started unconfirmed."""

    version: int = INSTALLED
    previous: int = INSTALLED
    """The last version that served before; the active one if there is nothing to go back to."""
    confirmed: bool = True
    """Whether the active version has served."""
    starts: int = 0
    failed: int = INSTALLED
    """The version that was given up last; 0 for none."""
    previous_measurement: str = ""
    """Of what ran before, hexadecimal: peers still run it; what was installed is in no repository."""


class Slots:
    """The images of one node. The agent and its partition write at different times, never both."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / "active.json"
        self._waiting = directory / "waiting"

    def active(self) -> Active:
        """Return what is active.

        Raises:
            FirmwareRefused: The file is not readable.
        """
        try:
            return Active(**json.loads(self._file.read_bytes()))
        except FileNotFoundError:
            return Active()
        except (ValueError, TypeError):
            raise FirmwareRefused("the file of the active image is not readable") from None

    def path(self, version: int) -> Path | None:
        """Return where an image lies; None for the installed distribution."""
        return None if version == INSTALLED else self._directory / "images" / str(version)

    def staged(self, version: int) -> bool:
        """Whether an image is here."""
        path = self.path(version)
        return path is not None and path.is_dir()

    def stage(self, content: bytes, manifest: Manifest, measurement: bytes) -> None:
        """Unpack an image whose octets were verified; a repeat changes nothing.

        Raises:
            FirmwareRefused: It is not what its metadata says.
        """
        path = self.path(manifest.version)
        assert path is not None
        found = examine(path) if path.exists() else unpack(content, path)
        if found != (manifest, measurement):
            shutil.rmtree(path)
            raise FirmwareRefused("the image is not what its metadata says")

    def activate(self, version: int, measurement: bytes) -> None:
        """Let the next start run a staged image.

        Args:
            version: The image's.
            measurement: Of what runs now.

        Raises:
            FirmwareRefused: It is not staged.
        """
        if version != INSTALLED and not self.staged(version):
            raise FirmwareRefused(f"version {version} is not staged")
        now = self.active()
        if now.version == version:
            return
        if now.confirmed:
            new = Active(version, now.version, confirmed=False, previous_measurement=measurement.hex())
        else:
            # What was never seen to serve is nothing to go back to.
            new = replace(now, version=version, confirmed=version == now.previous, starts=0, failed=INSTALLED)
        self._write(new)

    def confirm(self, version: int) -> None:
        """Say that a version has served; nothing happens if another one was activated meanwhile."""
        now = self.active()
        if not now.confirmed and now.version == version:
            self._write(replace(now, confirmed=True, starts=0))

    def doubt(self) -> None:
        """Let the active image prove itself again, or be given up: its partition is a new one."""
        now = self.active()
        if now.version != now.previous:
            self._write(replace(now, confirmed=False, starts=0))

    def note_waiting(self) -> None:
        """Say that this start does not hang: it waits for a quorum, a resume or the store."""
        if not self._waiting.exists():
            self._replace(self._waiting, b"")

    def hangs(self) -> bool:
        """Whether the active image has neither served nor said that it waits; ask when it had time to."""
        return not self.active().confirmed and not self._waiting.exists()

    def starting(self) -> Path | None:
        """Count a start of the active image, give it up if it failed too often; return what to start.

        Raises:
            FirmwareRefused: A file is not readable.
        """
        now = self.active()
        self._waiting.unlink(missing_ok=True)
        if not now.confirmed:
            given_up = now.starts >= STARTS_MAX and self._can_go_back(now)
            if given_up:
                now = replace(now, version=now.previous, confirmed=True, starts=0, failed=now.version)
            else:
                now = replace(now, starts=now.starts + 1)
            self._write(now)
            if given_up:
                _log.error("firmware given up", version=now.failed, starts=STARTS_MAX, back_to=now.version)
        return self.path(now.version)

    def floor(self) -> int:
        """Return the security version below which this node starts nothing; 0 for none.

        Raises:
            FirmwareRefused: The file is not readable.
        """
        try:
            return int((self._directory / "floor").read_bytes())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise FirmwareRefused("the file of the security version is not readable") from None

    def raise_floor(self, floor: int) -> None:
        """Note a higher security version; an image below it is nothing to go back to any more.

        Called by the partition: only its user reads the images.
        """
        if floor <= self.floor():
            return
        self._replace(self._directory / "floor", str(floor).encode())
        now = self.active()
        if now.previous != INSTALLED and self._security_version(now.previous) < floor:
            self._write(replace(now, previous=now.version))

    def _security_version(self, version: int) -> int:
        """Return the security version of an image; 0 if it is not here or damaged."""
        path = self.path(version)
        assert path is not None
        try:
            return examine(path)[0].security_version
        except FirmwareRefused:
            return 0

    def _can_go_back(self, now: Active) -> bool:
        """Whether there is another version, not below the floor; what is installed is the agent's own."""
        if now.previous == INSTALLED:
            return self.floor() <= SECURITY_VERSION
        return now.previous != now.version

    def _write(self, active: Active) -> None:
        self._replace(self._file, json.dumps(asdict(active)).encode())

    def _replace(self, file: Path, content: bytes) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.unlink(missing_ok=True)  # agent and partition may be different users
        with new.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(file)
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
