"""The firmware of a partition: it fetches, verifies and activates images itself (G5).

The fabric controller names a version, and nothing else of it is believed. The security version
of the pool is a floor in the chain that only rises: when all partitions run a higher one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from hsm_pool.core.commands import ReportSecurityVersion
from hsm_pool.core.model import PoolRecord
from hsm_pool.core.release_policy import ReleasePolicy
from hsm_pool.enclave import admission
from hsm_pool.enclave.verifier import TrustAnchors, Verifier
from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware.bounded_reads import BoundedReads
from hsm_pool.firmware.repository import Published
from hsm_pool.firmware.running import running
from hsm_pool.firmware.slots import Slots
from hsm_pool.firmware.update import FirmwareSource
from hsm_pool.settings import PartitionSettings
from hsm_pool.store.replica import boot_time

_log = structlog.get_logger()
SERVED_SECONDS = 10.0
"""How long an image must have served, so that it is not given up any more."""
_REFRESH_SECONDS = 1.0
"""A peer waits meanwhile for the keys; it asks again."""
_FETCH_SECONDS = 6.0
"""With the wait for a read that is under way: within the ten seconds of the controller's call."""
_UNDER_WAY_SECONDS = 2.0
_BELOW = "this partition runs firmware below the pool's security version"


class PartitionFirmware:
    """Images of one partition, and which of them its peers may run. Thread-safe."""

    def __init__(
        self,
        settings: PartitionSettings,
        anchors: TrustAnchors,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        """Read what is here.

        Raises:
            FirmwareRefused: What runs is below the security version that this node has seen.
            InvalidField: The pool's admission policy is none.
        """
        self._index = settings.index
        self._own_policy = admission.own_policy(Path(settings.admission_policy_file))
        self._clock = clock
        self._confirmed = True
        self._served_since: float | None = None
        self._lock = threading.Lock()
        self._reads = BoundedReads()
        self._floor = 0
        self._source: FirmwareSource | None = None
        self._slots: Slots | None = None
        if settings.firmware:
            directory = Path(settings.firmware.directory)
            root = Path(settings.firmware.root_file).read_bytes()
            self._source = FirmwareSource(Path(settings.firmware.repository), directory / "metadata", root)
            self._slots = Slots(directory)
            self._confirmed = self._slots.active().confirmed
            self._floor = self._slots.floor()
            if running().security_version < self._floor:
                raise FirmwareRefused(_BELOW)
        self.verifier = Verifier(anchors, self._policy(), security_version_floor=self._floor)

    def stage(self, version: int, floor: int) -> None:
        """Fetch a version from the repository and keep it; a repeat changes nothing.

        Args:
            version: Number of the image.
            floor: Security version of the pool.

        Raises:
            FirmwareRefused: There is no repository, it or the image does not verify, or the image is
                older than what runs, or below the floor.
        """
        with self._lock:
            source, slots = self._parts()
            if version < running().version:
                raise FirmwareRefused(f"version {version} is older than the one that runs")
        published, content = self._reads.run(
            lambda: source.fetch(version), _FETCH_SECONDS, _UNDER_WAY_SECONDS
        )
        with self._lock:
            self._check_floor(published, floor)
            slots.stage(content, published.manifest, published.measurement)
        _log.info("firmware staged", version=version)

    def security_version_of(self, version: int) -> int:
        """Return the security version of a staged image that may be activated.

        Raises:
            FirmwareRefused: It is not staged, not known to be verified, or older than what runs.
        """
        with self._lock:
            source, slots = self._parts()
            published = source.known().get(version)
            if published is None or not slots.staged(version):
                raise FirmwareRefused(f"version {version} is not staged")
            if version < running().version:
                raise FirmwareRefused(f"version {version} is older than the one that runs")
            return published.manifest.security_version

    def activate(self, version: int) -> None:
        """Let the next start run a staged version; the pool has decided that it may.

        Raises:
            FirmwareRefused: It is not staged.
        """
        with self._lock:
            _, slots = self._parts()
            slots.activate(version, running().measurement)
        _log.info("firmware activated", version=version)

    def follow(self, version: int) -> None:
        """Fetch the version that a peer runs and start again with it, if it is newer than what runs.

        A node whose disk is new runs what is installed, which its pool may have left behind: then no
        peer admits it, and without the pool's keys it obeys no command. Only the number comes from
        the peer; the image is verified like any other. One that was given up is left alone.
        """
        if self._slots is None or not version > running().version:
            return
        try:
            if version == self._slots.active().failed:
                return
            self.stage(version, self._floor)
            self.activate(version)
        except FirmwareRefused as refused:
            _log.warning("firmware of a peer", version=version, reason=refused.message)
            return
        _log.warning(
            "firmware of a peer", version=version, reason="it refuses what runs here; starting again"
        )
        os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        """Wait a moment for a read of the repository."""
        self._reads.close()

    def note_waiting(self) -> None:
        """Say that this start waits for others: a quorum, a resume, the store."""
        if self._slots and not self._confirmed:
            self._slots.note_waiting()

    def note_serving(self) -> None:
        """Say that this partition holds a lease now: an image that has served for a while is kept."""
        if self._slots is None or self._confirmed:
            return
        now = self._clock()
        if self._served_since is None:
            self._served_since = now
        if now - self._served_since >= SERVED_SECONDS:
            self._slots.confirm(running().version)
            self._confirmed = True
            _log.info("firmware serves", version=running().version)

    def refresh(self) -> None:
        """Learn of images that were published lately: a peer may run one already.

        What was verified before still holds, whatever the repository says now and whether it answers.
        """
        if self._source is None:
            return
        try:
            self._reads.run(self._source.refresh, _REFRESH_SECONDS, 0.0)
        except FirmwareRefused as refused:
            _log.warning("firmware", reason=refused.message)
        self.verifier.replace_policy(self._policy(), self._floor)

    def take_floor(self, pool: PoolRecord) -> None:
        """Take the pool's floor.

        Raises:
            FirmwareRefused: This partition runs below it: it must not serve.
        """
        if self._slots is None:
            return
        if running().security_version < pool.security_version_floor:
            raise FirmwareRefused(_BELOW)
        if pool.security_version_floor > self._floor:
            # Known at the next start, too, before a peer or the chain can say it.
            self._floor = pool.security_version_floor
            self._slots.raise_floor(self._floor)
            self.verifier.replace_policy(self._policy(), self._floor)

    def report(self, pool: PoolRecord) -> ReportSecurityVersion | None:
        """Return what is to be reported to the pool, None when it knows; take its floor.

        An image that may still be given up is not reported: the floor would rise above the one before.

        Raises:
            FirmwareRefused: As take_floor.
        """
        self.take_floor(pool)
        if self._slots is None or not self._confirmed:
            return None
        if pool.security_versions.get(self._index) == running().security_version:
            return None
        return ReportSecurityVersion(self._index, running().security_version)

    def _parts(self) -> tuple[FirmwareSource, Slots]:
        if self._source is None or self._slots is None:
            raise FirmwareRefused("this pool has no firmware repository")
        return self._source, self._slots

    @staticmethod
    def _check_floor(published: Published, floor: int) -> None:
        if published.manifest.security_version < floor:
            raise FirmwareRefused(
                f"security version {published.manifest.security_version} is below the pool's {floor}"
            )

    def _policy(self) -> ReleasePolicy:
        """Return whom peers may be: what runs here, and the verified images that are not below the floor."""
        if self._own_policy is not None:
            return self._own_policy
        images = self._source.known().values() if self._source else ()
        floor = max(self._floor, 1) if self._source else running().security_version
        measurements = {image.measurement for image in images if image.manifest.security_version >= floor}
        if self._slots and (before := self._slots.active().previous_measurement):
            measurements.add(bytes.fromhex(before))
        return admission.default_policy(floor, frozenset(measurements))
