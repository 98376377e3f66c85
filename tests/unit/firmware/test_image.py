"""Images: the same octets from the same sources, and nothing unpacks that is not one (G5, G8)."""

from __future__ import annotations

import io
import os
import random
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware import image
from hsm_pool.firmware.image import Manifest, build, examine, installed_roots, parse_manifest, unpack
from hsm_pool.firmware.measurement import PACKAGES, measure

MANIFEST = Manifest(7, 3)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """A small distribution."""
    roots = {package: tmp_path / "sources" / package for package in PACKAGES}
    for package, root in roots.items():
        (root / "inner").mkdir(parents=True)
        (root / "__init__.py").write_text(f'"""{package}."""\n')
        (root / "inner" / "module.py").write_text("VALUE = 1\n")
        (root / "__pycache__").mkdir()
        (root / "__pycache__" / "module.pyc").write_bytes(b"cache")
    return roots


def test_an_image_follows_from_its_content(sources: dict[str, Path], tmp_path: Path) -> None:
    first = build(sources, MANIFEST)
    os.utime(sources["hsm_pool"] / "__init__.py", (1, 1))
    assert build(sources, MANIFEST) == first
    assert build(sources, Manifest(8, 3)) != first
    manifest, measurement = unpack(first, tmp_path / "images" / "7")
    assert manifest == MANIFEST
    assert measurement == measure(sources, MANIFEST.serialise())
    assert examine(tmp_path / "images" / "7") == (manifest, measurement)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["7"]


def test_the_installed_distribution_is_an_image(tmp_path: Path) -> None:
    """What runs here unpacks and measures as what runs here."""
    content = build(installed_roots(), MANIFEST)
    assert len(content) < image.IMAGE_BYTES_MAX
    assert unpack(content, tmp_path / "1")[1] == measure(installed_roots(), MANIFEST.serialise())


def test_every_module_and_the_manifest_are_measured(sources: dict[str, Path]) -> None:
    """G5."""
    seen = {measure(sources), measure(sources, b"a"), measure(sources, b"b")}
    for root in sources.values():
        for path in root.rglob("*.py"):
            kept = path.read_text()
            path.write_text(kept + "\n")
            seen.add(measure(sources))
            path.write_text(kept)
    (sources["mhsm"] / "more.py").write_text("")
    seen.add(measure(sources))
    assert len(seen) == 3 + 2 * len(PACKAGES) + 1


def zipped(entries: dict[str, bytes]) -> bytes:
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return output.getvalue()


WHOLE = {
    "firmware.json": MANIFEST.serialise(),
    **{f"{package}/__init__.py": b"" for package in PACKAGES},
}


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {**WHOLE, "../outside.py": b""},
        {**WHOLE, "/outside.py": b""},
        {**WHOLE, "hsm_pool/../../outside.py": b""},
        {**WHOLE, "other/module.py": b""},
        {**WHOLE, "hsm_pool/module.so": b""},
        {**WHOLE, "hsm_pool/a b.py": b""},
        {**WHOLE, "sitecustomize.py": b""},
        {name: content for name, content in WHOLE.items() if name != "firmware.json"},
        {name: content for name, content in WHOLE.items() if name != "mhsm/__init__.py"},
        {**WHOLE, "firmware.json": b"{}"},
        {**WHOLE, "firmware.json": Manifest(0, 1).serialise()},
        {**WHOLE, "firmware.json": Manifest(1, 65_536).serialise()},
        {**WHOLE, "firmware.json": Manifest(1, 1, product_id=2).serialise()},
        {**WHOLE, "firmware.json": MANIFEST.serialise() + b" "},
    ],
    ids=range(15),
)
def test_what_is_no_image_leaves_nothing(entries: dict[str, bytes], tmp_path: Path) -> None:
    """G5, G8: no path leads out, nothing foreign comes in, nothing half-unpacked stays."""
    with pytest.raises(FirmwareRefused):
        unpack(zipped(entries), tmp_path / "images" / "7")
    assert list((tmp_path / "images").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_an_image_that_holds_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: checked before anything is unpacked."""
    monkeypatch.setattr(image, "_CONTENT_BYTES_MAX", 1000)
    with pytest.raises(FirmwareRefused, match="too much"):
        unpack(zipped({**WHOLE, "hsm_pool/large.py": bytes(1001)}), tmp_path / "7")
    monkeypatch.setattr(image, "IMAGE_BYTES_MAX", 100)
    with pytest.raises(FirmwareRefused, match="at most"):
        unpack(zipped(WHOLE), tmp_path / "7")


def test_a_damaged_image_is_refused(sources: dict[str, Path], tmp_path: Path, seed: int) -> None:
    """G8: a typed refusal wherever the damage is, or what its measurement says; metadata names that."""
    draw = random.Random(seed)
    (sources["hsm_pool"] / "large.py").write_text("".join(f"VALUE = {draw.random()}\n" for _ in range(500)))
    content = build(sources, MANIFEST)
    refused = 0
    for number in range(300):
        damaged, at = bytearray(content), draw.randrange(len(content) - 2)
        damaged[at : at + 2] = draw.randbytes(2)
        try:
            found = unpack(bytes(damaged), tmp_path / str(number))
        except FirmwareRefused:
            refused += 1
            continue
        assert found == examine(tmp_path / str(number))
    assert refused > 100


def test_what_is_damaged_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    """G8: damage of the packed octets is said as such; it is not a file of another kind."""
    (sources["hsm_pool"] / "large.py").write_text("".join(f"VALUE = {number**9}\n" for number in range(500)))
    content = bytearray(build(sources, MANIFEST))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entry = archive.getinfo("hsm_pool/large.py")
        start = entry.header_offset + 30 + len(entry.filename)
        end = start + entry.compress_size
    content[start:end] = bytes([255]) * (end - start)
    with pytest.raises(FirmwareRefused, match=r"damaged: hsm_pool/large\.py"):
        unpack(bytes(content), tmp_path / "7")


def test_an_image_of_two_files_with_one_name_is_refused(tmp_path: Path) -> None:
    """G8: also a file that would be a directory."""
    for names in (
        ("hsm_pool/a.py", "hsm_pool/a.py"),
        ("hsm_pool/a.py", "hsm_pool/a.py/b.py"),
        ("hsm_pool/a.py/b.py", "hsm_pool/a.py"),
    ):
        output = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # zipfile's own, of two names
            with zipfile.ZipFile(output, "w") as archive:
                for name, content in [*WHOLE.items(), *((name, b"") for name in names)]:
                    archive.writestr(name, content)
        with pytest.raises(FirmwareRefused, match="twice"):
            unpack(output.getvalue(), tmp_path / "7")


def test_an_image_is_packed_in_one_way(tmp_path: Path) -> None:
    """G8: neither encrypted, nor with another compression than the builder's."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in WHOLE.items():
            archive.writestr(name, content)
    encrypted = bytearray(zipped(WHOLE))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(signature) + offset] |= 1
    for octets in (output.getvalue(), bytes(encrypted)):
        with pytest.raises(FirmwareRefused, match="packed otherwise"):
            unpack(octets, tmp_path / "7")


@given(octets=st.binary(max_size=200))
def test_any_octets_are_refused(octets: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FirmwareRefused):
        unpack(octets, tmp_path_factory.mktemp("any") / "7")
    with pytest.raises(FirmwareRefused):
        parse_manifest(octets)
