"""Files that commands write: never overwritten, never half-written, readable by the owner only."""

from __future__ import annotations

import os
from pathlib import Path

from hsm_pool.cli.output import fail
from hsm_pool.client.new_file import write_new_file


def refuse_existing(path: Path) -> None:
    """End the command if a file exists or cannot be made, before any work is done."""
    if path.exists():
        fail(f"{path} exists and is not overwritten", "choose another name or move it away")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        fail(f"{path} cannot be written: no such directory, or not yours", "make it, or choose another")


def write_new(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file that must not exist yet."""
    refuse_existing(path)
    try:
        write_new_file(path, content, mode)
    except FileExistsError:
        fail(f"{path} exists and is not overwritten", "choose another name or move it away")
