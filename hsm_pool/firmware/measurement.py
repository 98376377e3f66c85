"""The measurement of a distribution: one digest over everything that it runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGES = ("hsm_pool", "security_domain", "mhsm")
"""What a partition runs of its own; libraries belong to the machine's image."""
MANIFEST = "firmware.json"
"""Beside the packages of an image; absent where the installed distribution runs as it is."""


def measure(roots: dict[str, Path], manifest: bytes = b"") -> bytes:
    """Return SHA-384 over the sorted (path, SHA-384) of all modules, and the image's manifest.

    Args:
        roots: Directory of each package, by its name.
        manifest: Of the image; b"" for a distribution that is not an image.

    Returns:
        48 bytes.
    """
    lines: list[str] = [f"{MANIFEST} {hashlib.sha384(manifest).hexdigest()}"] if manifest else []
    for package in PACKAGES:
        root = roots[package]
        for path in sorted(root.rglob("*.py")):
            digest = hashlib.sha384(path.read_bytes()).hexdigest()
            lines.append(f"{package}/{path.relative_to(root)} {digest}")
    return hashlib.sha384("\n".join(lines).encode()).digest()
