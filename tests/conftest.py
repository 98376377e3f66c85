"""Options and fixtures of all tests: sizes, the seed, officers and real pools."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.running_pool import ROOT, RunningPool, TestOfficer, make_officers

SHARED = ROOT.parent / "shared"
"""Material that lies beside the project where it is developed; never needed by a user."""

_seed = 0
# How long an example takes is the machine's affair; benchmarks say it.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mhsm")
    group.addoption("--full", action="store_true", help="the full counts")
    group.addoption("--quick", action="store_true", help="a subset in a few minutes")
    group.addoption(
        "--update-golden", action="store_true", help="write the transcripts of tests/cli/golden anew"
    )
    group.addoption("--seed", type=int, default=None, help="seed of all random tests")


def pytest_configure(config: pytest.Config) -> None:
    global _seed
    chosen = config.getoption("--seed")
    if (given := getattr(config, "workerinput", None)) is not None:
        chosen = given["seed"]
    _seed = int.from_bytes(os.urandom(4), "big") if chosen is None else chosen
    config.pluginmanager.register(_BesideEachOther())
    # The package installs etcd for itself into the repository when none is on PATH.
    os.environ["PATH"] = f"{os.environ['PATH']}:{ROOT / '.etcd'}"


def pytest_report_header() -> str:
    return f"seed: {_seed} (repeat with --seed {_seed})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--quick leaves out the long tests; what is marked full runs with --full only. Both are counted."""
    # Whoever names a test wants it run, as broken builds do.
    named = any("::" in argument for argument in config.args)
    without: set[str] = set() if config.getoption("--full") or named else {"full"}
    if config.getoption("--quick"):
        without |= {"chaos", "mutant", "slow"}
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in without)]
    if not config.getoption("--full") and not config.getoption("keyword"):
        left_out += _broken_builds_for_another_run([item for item in items if item not in left_out])
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    worker = getattr(config, "workeroutput", None)
    if worker is not None:
        worker["left_out"] = len(left_out)


def _broken_builds_for_another_run(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return all broken builds but one of each guarantee, and one control, by the seed."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("mutant"):
            parameters = item.callspec.params  # type: ignore[attr-defined]
            build = parameters.get("build")
            groups.setdefault(build.guarantee if build else "", []).append(item)
    left_out = []
    for group in groups.values():
        kept = random.Random(_seed).randrange(len(group))
        left_out += [item for index, item in enumerate(group) if index != kept]
    return left_out


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run beside each other (scripts/test), modules stay whole: their tests share a pool, in order.

    Broken builds share nothing, so each may go to any process. The groups of pytest-xdist are not used:
    its version 3.8 does not see them with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith("tests/mutants/") else nodeid.split("::", maxsplit=1)[0]

    return ByModule(config, log)


class _BesideEachOther:
    """Gives test processes the run's seed, and counts what they leave out."""

    def __init__(self) -> None:
        self.count = 0

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        # Set as an option it would not get there: pytest-xdist 3.8 parses the command line anew.
        node.workerinput["seed"] = _seed

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.count = max(self.count, node.workeroutput.get("left_out", 0))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.count:
            terminalreporter.write_line(f"{self.count} deselected")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the full counts are wanted."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test: the run's seed and the test's name."""
    return random.Random(f"{_seed}/{request.node.nodeid}").randrange(2**32)


@pytest.fixture
def some_of(full: bool, seed: int) -> Callable[[Sequence[int]], Sequence[int]]:
    """Choose a third of the steps of something long, by the seed, one at least; all with --full."""

    def choose(steps: Sequence[int]) -> Sequence[int]:
        return steps if full else steps[seed % min(3, len(steps)) :: 3]

    return choose


@pytest.fixture(scope="session")
def officers() -> list[TestOfficer]:
    """Three officers."""
    return make_officers(3)


@pytest.fixture(scope="module")
def make_pool(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., RunningPool]]:
    """Make pools that end with the module at the latest: idle ones cost all the others their time."""
    made: list[RunningPool] = []

    def make(**options: object) -> RunningPool:
        pool = RunningPool(tmp_path_factory.mktemp("pool") / "data", **options)  # type: ignore[arg-type]
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.down()


@pytest.fixture(scope="module")
def pool(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> Iterator[RunningPool]:
    """An active, attended pool of three serving partitions (quorum 2 of 3), one a module."""
    made = make_pool(attended=True)
    made.activate(officers, 2)
    yield made
    made.down()


@pytest.fixture
def shared_vectors() -> Path:
    """Vectors that are not part of the project; absent, the test is skipped and counted."""
    path = SHARED / "vectors"
    if not path.is_dir():
        pytest.skip("the shared vectors are not on this machine")
    return path
