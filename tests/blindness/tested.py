"""What a run was about: the code, the machine, what hardened the controller, and which secrets there were."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hsm_pool.enclave.evidence import measurement
from tests.running_pool import ROOT, RunningPool, mhsm

_KINDS = (
    ("file ", "private keys of planes, platforms and clients"),
    ("share ", "shares"),
    ("passphrase ", "officers' passphrases"),
    ("officer ", "officers' keys"),
    ("modulus ", "moduli"),
    ("RSA modulus", "moduli"),
    ("security domain ", "security domain"),
    ("pool ", "pool keys"),
    ("", "imported keys"),
)
"""Beginning of a secret's name, and its kind; the first that fits counts."""


def kind_of(name: str) -> str:
    """Return the kind of a secret, or of a hit, which begins with the secret's name."""
    return next(kind for beginning, kind in _KINDS if name.startswith(beginning))


def by_kind(names: Iterable[str]) -> Counter[str]:
    """Count secrets, forms or hits by kind."""
    return Counter(map(kind_of, names))


def facts(pool: RunningPool) -> dict[str, Any]:
    """Return what identifies a run: enough to say later what the result was a result of."""
    status = json.loads(mhsm("status", "--json", "--data-dir", str(pool.directory)).stdout)
    return {
        "commit": _commit(),
        "distribution_measurement": measurement().hex(),
        "controller_code_sha256": _digest(ROOT / "fabric_controller"),
        "pool_id": status["pool_id"],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "run_by_root": os.geteuid() == 0,
        "controller_made_readable_by_the_recorder": os.geteuid() != 0,
        "fabric_controller": status["fabric_controller"],
        "users_separated": status["users"]["separated"],
        "seed": None,
    }


def in_words(found: dict[str, Any]) -> list[str]:
    """Return :func:`facts` for people."""
    controller = found["fabric_controller"]
    sandbox = "under bubblewrap" if controller["bubblewrap"] else "without bubblewrap"
    measures = ", ".join(controller["hardening"] or ()) or "not hardened"
    user = "a user of its own" if found["users_separated"] else "no user of its own"
    readable = "; the recorder made it readable again" * found["controller_made_readable_by_the_recorder"]
    runner = "root" if found["run_by_root"] else "a user who is not root"
    return [
        f"tested: commit {found['commit'] or 'unknown'}, distribution {found['distribution_measurement']}",
        f"  controller's code sha256 {found['controller_code_sha256']}, pool {found['pool_id']}",
        f"  Linux {found['kernel']}, Python {found['python']}, run by {runner}",
        f"  controller: {sandbox}, {measures}, {user}{readable}",
        "  secrets are drawn anew by the kernel in each run: there is no seed to repeat one with",
    ]


def _commit() -> str:
    """Return the commit, "+" if files differ from it; "" outside of a checkout."""
    try:
        made = [
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return made[0].strip() + "+" * bool(made[1].strip())


def _digest(directory: Path) -> str:
    """Return SHA-256 over the names and digests of a package's modules."""
    total = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(directory)} {digest}\n".encode())
    return total.hexdigest()
