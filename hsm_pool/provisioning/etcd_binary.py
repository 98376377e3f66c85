"""Which etcd runs the store: found, and refused where it is known to lose data."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

_REPOSITORY_BINARY = Path(__file__).resolve().parent.parent.parent / ".etcd" / "etcd"
_REFUSED = {(3, 5, 0), (3, 5, 1), (3, 5, 2)}
"""These lose consistency when killed under load (etcd post-mortem v3.5-data-inconsistency)."""
_OLDEST = (3, 4, 0)
"""The first with all flags of a member (see :mod:`hsm_pool.node_agent.store_member`)."""
_SUPPORTED_FROM = {5: (3, 5, 28), 6: (3, 6, 9)}


class EtcdUnusable(Exception):
    """No etcd was found, or one that must not carry a pool."""


def find_etcd(configured: str | None) -> str:
    """Return the path of the etcd binary: configured, on PATH, or beside the project.

    Raises:
        EtcdUnusable: None is there.
    """
    if configured:
        if not Path(configured).is_file():
            raise EtcdUnusable(f"{configured} does not exist")
        return str(Path(configured).resolve())
    found = shutil.which("etcd")
    if found:
        return str(Path(found).resolve())
    if _REPOSITORY_BINARY.is_file():
        return str(_REPOSITORY_BINARY)
    raise EtcdUnusable("etcd was not found: install Debian's etcd-server or run scripts/setup")


def check_version(binary: str) -> tuple[str, str]:
    """Return (version, warning or "") of a binary.

    Raises:
        EtcdUnusable: It is not etcd, a version that loses data, or one that is too old.
    """
    try:
        output = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        raise EtcdUnusable(f"{binary} does not run") from None
    match = re.search(r"etcd Version: (\d{1,5})\.(\d{1,5})\.(\d{1,5})(?!\d)", output)
    if match is None:
        raise EtcdUnusable(f"{binary} is not etcd")
    version = (int(match[1]), int(match[2]), int(match[3]))
    text = ".".join(map(str, version))
    if version in _REFUSED:
        raise EtcdUnusable(f"etcd {text} loses data when it is killed: use another version")
    if version < _OLDEST:
        raise EtcdUnusable(f"etcd {text} is too old: 3.4 or newer is needed")
    supported = version[:2] > (3, 6) or version >= _SUPPORTED_FROM.get(version[1], (3, 99, 0))
    return text, "" if supported else f"etcd {text} is past its support; fine for a simulation"
