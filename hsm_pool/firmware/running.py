"""What this process runs: an image, or the installed distribution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from hsm_pool.firmware.image import SECURITY_VERSION, Manifest, installed_roots, parse_manifest
from hsm_pool.firmware.measurement import MANIFEST, measure
from hsm_pool.firmware.slots import INSTALLED


@dataclass(frozen=True, slots=True)
class Running:
    """Version (0: the installed distribution), security version and measurement (48 bytes)."""

    version: int
    security_version: int
    measurement: bytes


@cache
def running() -> Running:
    """Return what this process runs, read once: what is installed later does not count.

    Raises:
        FirmwareRefused: The image's manifest is malformed.
    """
    roots = installed_roots()
    file = roots["hsm_pool"].parent / MANIFEST
    if not file.is_file():
        return Running(INSTALLED, SECURITY_VERSION, measure(roots))
    octets = file.read_bytes()
    manifest: Manifest = parse_manifest(octets)
    return Running(manifest.version, manifest.security_version, measure(roots, octets))
