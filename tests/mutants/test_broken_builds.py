"""Each broken build must be caught by the tests that it names; the same tests pass on an unbroken copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.broken_builds import BROKEN_BUILDS, BrokenBuild
from tests.running_pool import ROOT

pytestmark = [pytest.mark.mutant, pytest.mark.timeout(600)]
_COPIED = ("hsm_pool", "security_domain", "fabric_controller", "proto", "tests", "pyproject.toml")


def copy_tree(target: Path) -> Path:
    """Copy what the tests need, without caches."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    return target


def run_tests(tree: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run tests of a copied tree against that very tree."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'proto' / 'gen'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    origin = subprocess.run(
        [sys.executable, "-c", "import hsm_pool, mhsm; print(hsm_pool.__file__)"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert Path(origin).is_relative_to(tree), "the copy is not what would be tested"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


NAMED = tuple(dict.fromkeys(test for build in BROKEN_BUILDS for test in build.tests))


@pytest.mark.parametrize("file", sorted({test.split("::")[0] for test in NAMED}))
def test_the_named_tests_pass_on_an_unbroken_copy(file: str, tmp_path: Path) -> None:
    """The positive control: what catches a break is the break, not the copying."""
    named = tuple(test for test in NAMED if test.split("::")[0] == file)
    completed = run_tests(copy_tree(tmp_path / "tree"), named)
    assert completed.returncode == 0, completed.stdout[-4000:]


@pytest.mark.parametrize("build", BROKEN_BUILDS, ids=lambda build: f"{build.guarantee}-{build.name}")
def test_a_broken_build_is_caught(build: BrokenBuild, tmp_path: Path) -> None:
    """A test that cannot fail proves nothing."""
    tree = copy_tree(tmp_path / "tree")
    for name, old, new in ((build.file, build.old, build.new), *build.elsewhere):
        text = (tree / name).read_text()
        assert text.count(old) == 1, f"{name} no longer holds the text that is broken here"
        (tree / name).write_text(text.replace(old, new))
    completed = run_tests(tree, build.tests)
    # 1: a test or its set-up failed. A tree that does not even import ends with 2.
    assert completed.returncode == 1, f"not caught:\n{completed.stdout[-4000:]}"
    assert re.search(r"\d (failed|error)", completed.stdout)
