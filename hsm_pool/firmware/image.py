"""A firmware image: the distribution's packages and a manifest, in one zip file.

The octets follow from the content alone, so that who builds the same version from the same
sources gets the same image.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware.measurement import MANIFEST, PACKAGES, measure

IMAGE_BYTES_MAX = 16 * 1024 * 1024
_CONTENT_BYTES_MAX = 64 * 1024 * 1024
_FILES_MAX = 4096
VERSION_MAX = 1_000_000
SECURITY_VERSION_MAX = 65_535
SECURITY_VERSION = 1
"""Security version number (SVN) of this distribution; only ever raised. An image says its own."""
PRODUCT_ID = 1
"""Of this product; images of another one are refused."""
_ENCRYPTED = 0x1
_NOT_READABLE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    ValueError,
    OverflowError,
    EOFError,
    RuntimeError,
)
"""What Python's zipfile raises at octets that are no zip file, or a damaged one."""
_TIME = (1980, 1, 1, 0, 0, 0)
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SUFFIXES = frozenset({".py", ".pyi", ".typed", ".yaml"})


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image says of itself.

    Args:
        version: 1 to 1,000,000; names the image.
        security_version: Security version number (SVN), 1 to 65,535: raised when an older image must
            not run any more.
        product_id: Of the product.
    """

    version: int
    security_version: int
    product_id: int = PRODUCT_ID

    def serialise(self) -> bytes:
        """Return it as JSON of one spelling."""
        fields = {
            "product_id": self.product_id,
            "security_version": self.security_version,
            "version": self.version,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def parse_manifest(octets: bytes) -> Manifest:
    """Parse a manifest.

    Raises:
        FirmwareRefused: It is something else, out of bounds, or of another product.
    """
    try:
        fields = json.loads(octets)
        manifest = Manifest(fields["version"], fields["security_version"], fields["product_id"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FirmwareRefused("the manifest of the image is not readable") from None
    numbers = (manifest.version, manifest.security_version, manifest.product_id)
    if any(type(number) is not int for number in numbers) or manifest.serialise() != octets:
        raise FirmwareRefused("the manifest of the image is malformed")
    if not (1 <= manifest.version <= VERSION_MAX and 1 <= manifest.security_version <= SECURITY_VERSION_MAX):
        raise FirmwareRefused("the version of the image is out of bounds")
    if manifest.product_id != PRODUCT_ID:
        raise FirmwareRefused("the image is of another product")
    return manifest


def installed_roots() -> dict[str, Path]:
    """Return the directory of each package as it is installed here."""
    roots: dict[str, Path] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(f"package {package} is not installed")
        roots[package] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def build(roots: dict[str, Path], manifest: Manifest) -> bytes:
    """Return the image of these packages.

    Args:
        roots: Directory of each package, by its name (:func:`installed_roots`).
        manifest: What the image is to say of itself.
    """
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, MANIFEST, manifest.serialise())
        for package in PACKAGES:
            root = roots[package]
            for path in sorted(root.rglob("*")):
                if path.suffix in _SUFFIXES and path.is_file():
                    _add(archive, f"{package}/{path.relative_to(root).as_posix()}", path.read_bytes())
    return output.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content)


def unpack(content: bytes, directory: Path) -> tuple[Manifest, bytes]:
    """Unpack an image into a directory that must not exist; it appears whole or not at all.

    Returns:
        (manifest, measurement of what was unpacked).

    Raises:
        FirmwareRefused: It is no image, or larger than an image may be.
        OSError: It cannot be written.
    """
    if len(content) > IMAGE_BYTES_MAX:
        raise FirmwareRefused(f"an image has at most {IMAGE_BYTES_MAX} bytes")
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".new-", dir=directory.parent))
    try:
        try:
            archive = zipfile.ZipFile(io.BytesIO(content))
        except _NOT_READABLE:
            raise FirmwareRefused("the image is not a zip file") from None
        with archive:
            _extract(archive, building)
        manifest, measurement = examine(building)
        _sync(building)
        building.rename(directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _sync(directory.parent, deep=False)
    return manifest, measurement


def examine(directory: Path) -> tuple[Manifest, bytes]:
    """Return (manifest, measurement) of an unpacked image.

    Raises:
        FirmwareRefused: It is none.
    """
    try:
        manifest = (directory / MANIFEST).read_bytes()
    except OSError:
        raise FirmwareRefused("the image has no manifest") from None
    roots = {package: directory / package for package in PACKAGES}
    if not all((root / "__init__.py").is_file() for root in roots.values()):
        raise FirmwareRefused("the image lacks a package")
    return parse_manifest(manifest), measure(roots, manifest)


def _extract(archive: zipfile.ZipFile, directory: Path) -> None:
    entries = archive.infolist()
    if len(entries) > _FILES_MAX or sum(entry.file_size for entry in entries) > _CONTENT_BYTES_MAX:
        raise FirmwareRefused("the image holds too much")
    for entry in entries:
        path = PurePosixPath(entry.filename)
        parts = path.parts
        named = entry.filename == MANIFEST or (
            len(parts) > 1 and parts[0] in PACKAGES and path.suffix in _SUFFIXES
        )
        if not named or not all(_PART.fullmatch(part) for part in parts):
            raise FirmwareRefused("the image holds something that is not of the distribution")
        target = directory.joinpath(*parts)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            output = target.open("xb")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise FirmwareRefused(f"the image holds {path} twice") from None
        with output:
            output.write(_content(archive, entry))


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Return what an entry holds.

    Raises:
        FirmwareRefused: It cannot be read, or is more than the entry says.
    """
    if entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} or entry.flag_bits & _ENCRYPTED:
        raise FirmwareRefused(f"the image is packed otherwise than it should be: {entry.filename}")
    try:
        with archive.open(entry) as source:
            content = source.read(entry.file_size + 1)
    except _NOT_READABLE:
        raise FirmwareRefused(f"the image is damaged: {entry.filename}") from None
    if len(content) != entry.file_size:
        raise FirmwareRefused(f"the image is damaged: {entry.filename}")
    return content


def _sync(directory: Path, *, deep: bool = True) -> None:
    for path in [*(directory.rglob("*") if deep else ()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
