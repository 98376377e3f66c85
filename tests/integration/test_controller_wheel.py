"""G5: the controller runs where nothing else of the pool is installed: its code cannot reach a key."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.running_pool import ROOT, RunningPool, until

pytestmark = pytest.mark.pool

ABSENT = (
    "hsm_pool",
    "security_domain",
    "mhsm.keys",
    "mhsm.crypto",
    "mhsm.peer",
    "mhsm.node",
    "mhsm.record",
    "mhsm.etcd",
    "cryptography",
    "shamir_mnemonic",
    "joserfc",
)


def requirements(names: list[str]) -> set[str]:
    """Return the names and all that they need, of what is installed here."""
    found: set[str] = set()
    while names:
        name = re.split(r"[^A-Za-z0-9._-]", names.pop(), maxsplit=1)[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another version of Python or another system
        found.add(name)
        names += [entry for entry in needed if "extra ==" not in entry]
    return found


def copy_distribution(name: str, target: Path) -> None:
    """Copy what is installed of a distribution: no network is needed to install it elsewhere."""
    distribution = metadata.distribution(name)
    for file in distribution.files or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            path = target / file
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(distribution.locate_file(file)), path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of an environment that holds the controller's wheel and what it requires."""
    directory = tmp_path_factory.mktemp("alone")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = directory / "source"
    for name in ("fabric_controller", "proto/gen/mhsm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(directory)]
    subprocess.run([*build, str(source / "fabric_controller")], check=True)
    (wheel,) = directory.glob("*.whl")
    venv = directory / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    install = ["install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, "--python", str(venv / "bin" / "python"), *install], check=True)
    (information,) = site.glob("mhsm_fabric_controller-*.dist-info")
    for name in requirements(metadata.PathDistribution(information).requires or []):
        copy_distribution(name, site)

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(venv / "bin" / program), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd="/",
            timeout=60,
            check=False,
        )

    return run


def test_g5_the_environment_holds_nothing_that_could_hold_a_key(
    alone: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    script = (
        "import importlib.util, json, sys, mhsm\n"
        "def there(name):\n"
        "    try:\n"
        "        return importlib.util.find_spec(name) is not None\n"
        "    except ModuleNotFoundError:\n"
        "        return False\n"
        "print(json.dumps([name for name in sys.argv[1:] if there(name)]))\n"
    )
    looked = alone("python", "-c", script, *ABSENT, "fabric_controller", "mhsm.enclave")
    assert json.loads(looked.stdout) == ["fabric_controller", "mhsm.enclave"], looked.stderr


def test_g5_the_controller_alone_looks_and_works(
    pool: RunningPool, alone: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Its own command, from its own wheel, against a real pool."""
    assert "failover" in alone("mhsm-fabric", "--help").stdout
    place = ("--data-dir", str(pool.directory))
    looked = alone("mhsm-fabric", "status", "--json", *place)
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["serving_count"] == 3
    assert alone("mhsm-fabric", "drain", "1", *place).returncode == 0
    assert alone("mhsm-fabric", "resume", "1", *place).returncode == 0
    completed = alone("mhsm-fabric", "history", *place)
    assert completed.stdout.count("verb=") == 2, completed.stderr


def test_g5_the_controller_alone_serves(
    pool: RunningPool, alone: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """The process itself, hardened as the pool's own, beside it, on a data directory of its own."""
    settings = json.loads((pool.directory / "fabric" / "fabric.json").read_text())
    data = tmp_path / "data"
    own = tmp_path / "fabric.json"
    own.write_text(json.dumps({**settings, "data_directory": str(data)}))
    python = alone("python", "-c", "import sys; print(sys.executable)").stdout.strip()
    serving = subprocess.Popen(
        [Path(python).with_name("mhsm-fabric"), "serve", "--settings", str(own)],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        cwd="/",
    )
    try:
        until(lambda: looked(data).get("serving_count") == 3, 60, "it sees three serving partitions")
    finally:
        serving.terminate()
        assert serving.wait(30) == 0
    said = looked(data)
    measures = looked(pool.directory / "fabric")["controller"]["hardening"]
    assert said["controller"]["hardening"] == measures, "as of the pool's own controller"


def looked(directory: Path) -> dict[str, Any]:
    """Return what a controller has seen in its last round; nothing before its first."""
    try:
        found: dict[str, Any] = json.loads((directory / "status.json").read_text())
    except FileNotFoundError:
        return {}
    return found
