"""mhsm firmware: the publisher's side of patching; whoever runs it need not reach the pool."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import fail, json_option, read_bounded, report, typed_errors
from hsm_pool.firmware import image
from hsm_pool.firmware.image import (
    IMAGE_BYTES_MAX,
    SECURITY_VERSION,
    SECURITY_VERSION_MAX,
    VERSION_MAX,
    Manifest,
)
from hsm_pool.firmware.measurement import PACKAGES
from security_domain.fingerprints import words

if TYPE_CHECKING:
    from hsm_pool.firmware.repository import Repository

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_repository = click.option("--repository", type=_DIRECTORY, required=True)
_keys = click.option(
    "--keys", type=_DIRECTORY, required=True, help="Directory of the keys, as new-repository made it."
)


@click.group("firmware")
def firmware_group() -> None:
    """Firmware: build an image, publish it. Partitions fetch and verify it when mhsm-fabric patch says so."""


@firmware_group.command("new-repository")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory, to be made.")
@click.option("--keys-output", type=click.Path(path_type=Path), required=True, help="Directory, to be made.")
@json_option
@typed_errors
def new_repository(output: Path, keys_output: Path, as_json: bool) -> None:
    """Make an empty repository and its keys: root and targets need two of three offline keys."""
    from hsm_pool.firmware.repository import Repository, make_keys

    refuse_existing(output)
    refuse_existing(keys_output)
    keys_output.mkdir(mode=0o700)
    make_keys(keys_output)
    Repository.create(output, keys_output)
    report(
        {"repository": str(output), "keys": str(keys_output)},
        as_json=as_json,
        text=f"made {output}; keep the keys in {keys_output} apart from each other and offline",
        following=f"mhsm up --firmware-repository {output}\nmhsm firmware build --version 1 --output FILE",
    )


@firmware_group.command("build")
@click.option("--version", type=click.IntRange(1, VERSION_MAX), required=True)
@click.option(
    "--security-version",
    type=click.IntRange(1, SECURITY_VERSION_MAX),
    default=SECURITY_VERSION,
    show_default=True,
    help="Raise it when no older image may run any more.",
)
@click.option(
    "--sources",
    type=_DIRECTORY,
    default=None,
    help="A checkout, or a directory of the packages; the installed distribution by default.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The image, to be written.")
@json_option
@typed_errors
def build(version: int, security_version: int, sources: Path | None, output: Path, as_json: bool) -> None:
    """Build an image: the distribution's packages and a manifest, in one file."""
    refuse_existing(output)
    manifest = Manifest(version, security_version)
    content = image.build(_roots(sources), manifest)
    with tempfile.TemporaryDirectory() as directory:
        _, measurement = image.unpack(content, Path(directory) / "image")
    write_new(output, content, 0o644)
    report(
        {
            "output": str(output),
            "version": version,
            "security_version": security_version,
            "measurement": measurement.hex(),
        },
        as_json=as_json,
        text=f"wrote {output}: version {version}, security version {security_version}\n"
        f"{_measured(measurement)}",
        following=f"mhsm firmware publish --image {output} --repository DIRECTORY --keys DIRECTORY",
    )


@firmware_group.command("publish")
@_repository
@click.option("--image", "image_file", type=_FILE, required=True)
@_keys
@json_option
@typed_errors
def publish(repository: Path, image_file: Path, keys: Path, as_json: bool) -> None:
    """Add an image to a repository, signed by two of the offline keys; both of its versions only rise.

    The directory of keys must hold two of the offline ones, snapshot.key and timestamp.key. An
    interrupted publication is repeated with the same command.
    """
    from hsm_pool.firmware.repository import Published, Repository

    content = read_bounded(image_file, IMAGE_BYTES_MAX)
    with tempfile.TemporaryDirectory() as directory:
        manifest, measurement = image.unpack(content, Path(directory) / "image")
    offline = _offline_keys(keys)
    published = Published(manifest, measurement, len(content))
    Repository(repository).publish(content, published, offline, keys / "snapshot.key", keys / "timestamp.key")
    report(
        {
            "version": manifest.version,
            "security_version": manifest.security_version,
            "measurement": measurement.hex(),
        },
        as_json=as_json,
        text=f"published version {manifest.version}\n{_measured(measurement)}",
        following=f"mhsm-fabric patch {manifest.version}",
    )


@firmware_group.command("renew")
@_repository
@_keys
@json_option
@typed_errors
def renew(repository: Path, keys: Path, as_json: bool) -> None:
    """Sign the timestamp anew: it ends after a week, so that a frozen repository is noticed.

    The directory of keys must hold timestamp.key. With snapshot.key, and with two of the offline
    keys, snapshot and targets are signed anew, too, when they end within 60 days.
    """
    from hsm_pool.firmware.repository import Repository

    opened, snapshot = Repository(repository), keys / "snapshot.key"
    renewed = opened.renew(
        keys / "timestamp.key", snapshot if snapshot.is_file() else None, _offline_keys(keys)
    )
    _report_renewed(opened, repository, renewed, as_json=as_json)


@firmware_group.command("renew-root")
@_repository
@_keys
@json_option
@typed_errors
def renew_root(repository: Path, keys: Path, as_json: bool) -> None:
    """Sign the root anew: it ends after a year, and after that nothing can be published or patched.

    The directory of keys must hold two of the offline ones. Partitions follow by themselves.
    """
    from hsm_pool.firmware.repository import Repository

    opened = Repository(repository)
    opened.renew_root(_offline_keys(keys))
    _report_renewed(opened, repository, ["root"], as_json=as_json)


def _offline_keys(keys: Path) -> list[Path]:
    from hsm_pool.firmware.repository import THRESHOLD

    return sorted(keys.glob("offline-*.key"))[:THRESHOLD]


def _report_renewed(opened: Repository, repository: Path, renewed: list[str], *, as_json: bool) -> None:
    """Say what was renewed, until when all of it holds, and what must be renewed with other keys."""
    from hsm_pool.firmware.repository import RENEWED_BEFORE

    ends = opened.expirations()
    soon = [
        role for role, end in ends.items() if role != "timestamp" and end < datetime.now(UTC) + RENEWED_BEFORE
    ]
    for role in soon:
        click.echo(f"warning: the {role} ends at {ends[role]:%Y-%m-%d}: its keys are needed", err=True)
    command = "renew-root" if "root" in soon else "renew"
    report(
        {"renewed": renewed, "ends": _ends(opened)},
        as_json=as_json,
        text="\n".join(
            f"{role}: until {end}{' (renewed)' * (role in renewed)}" for role, end in _ends(opened).items()
        ),
        following=f"mhsm firmware {command} --repository {repository} --keys DIRECTORY" if soon else "",
    )


def _ends(opened: Repository) -> dict[str, str]:
    return {role: f"{end:%Y-%m-%dT%H:%M:%SZ}" for role, end in opened.expirations().items()}


@firmware_group.command("list")
@_repository
@json_option
@typed_errors
def list_images(repository: Path, as_json: bool) -> None:
    """Show what is published; nothing is verified here, partitions do that."""
    from hsm_pool.firmware.repository import Repository

    opened = Repository(repository)
    rows = [
        {
            "version": version,
            "security_version": published.manifest.security_version,
            "bytes": published.length,
            "measurement": published.measurement.hex(),
        }
        for version, published in sorted(opened.images().items())
    ]
    lines = [
        f"version {row['version']}: security version {row['security_version']}, {row['bytes']:,} bytes"
        f"\n{_measured(bytes.fromhex(str(row['measurement'])))}"
        for row in rows
    ]
    ends = _ends(opened)
    lines = lines or ["no image yet"]
    lines += [f"{role}: until {end}" for role, end in ends.items()]
    report({"images": rows, "ends": ends}, as_json=as_json, text="\n".join(lines), following="")


def _measured(measurement: bytes) -> str:
    """Return a measurement as `mhsm attest` shows it, and in words."""
    return f"  measurement: {measurement.hex()}\n  measurement in words: {words(measurement)}"


def _roots(sources: Path | None) -> dict[str, Path]:
    if sources is None:
        return image.installed_roots()
    roots = {package: sources / package for package in PACKAGES}
    if not roots["mhsm"].is_dir():
        roots["mhsm"] = sources / "proto" / "gen" / "mhsm"
    missing = [package for package, root in roots.items() if not (root / "__init__.py").is_file()]
    if missing:
        fail(f"{sources} does not hold the package {missing[0]}", "give a checkout of this project")
    return roots
