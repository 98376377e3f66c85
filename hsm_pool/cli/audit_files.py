"""Files that audit commands read: checkpoints that were kept elsewhere, and the owner's root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from cryptography import x509

from hsm_pool.audit.checkpoint import CheckpointInvalid, Note
from hsm_pool.audit.files import parse_json
from hsm_pool.cli.output import fail, read_bounded

FILE_BYTES_MAX = 16 * 1024 * 1024
_ROOT_BYTES_MAX = 64 * 1024

owner_root_option = click.option(
    "--owner-root",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Root certificate of the pool's owner (PEM) from a source that you trust.",
)


def root_file(data_directory: Path) -> Path:
    """Return where a pool has the root certificate of its owner."""
    return data_directory / "nodes" / "0" / "owner" / "root.crt"


def load_root(path: Path) -> x509.Certificate:
    """Return the root certificate of a pool's owner."""
    if not path.is_file():
        fail("the root certificate of the pool's owner is not at hand", "give it with --owner-root")
    try:
        return x509.load_pem_x509_certificate(read_bounded(path, _ROOT_BYTES_MAX))
    except ValueError:
        fail(f"{path} is no certificate", "give the one of the pool's owner with --owner-root")


def kept_checkpoints(path: Path) -> list[str]:
    """Return the checkpoints in a file: a note, or JSON with the field audit_checkpoints somewhere."""
    content = read_bounded(path, FILE_BYTES_MAX)
    try:
        texts = _texts(parse_json(content))
    except (ValueError, RecursionError):
        texts = [content.decode(errors="replace")]
    try:
        for text in texts:
            Note.parse(text)
    except CheckpointInvalid:
        texts = []
    if not texts:
        fail(f"{path} holds no checkpoint of an audit log", "")
    return texts


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for entry in value for text in _texts(entry)]
    if not isinstance(value, dict):
        return []
    found = value.get("audit_checkpoints")
    own = [text for text in found if isinstance(text, str)] if isinstance(found, list) else []
    return own + [text for entry in value.values() for text in _texts(entry)]
