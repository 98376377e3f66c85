"""Five builds in which the controller is not blind: each must be caught, by the check that it names.

A sixth shows what the proof does not see: a partition that spells a key out in a number which the contract
allows. Evidence and signed firmware stand against that (docs/threat-model.md), not the proof.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.test_broken_builds import copy_tree
from tests.running_pool import ROOT

_CHECK_SECONDS = 800
"""Generous: a quiet machine needs 15 s."""
_AT_ONCE = 2

_SHORT_RUN = (
    "pytest",
    "tests/integration/test_blindness.py::test_the_controller_sees_no_secret_in_a_short_run",
)
_CONTRACT = (
    "pytest",
    "tests/contract/test_enclave_descriptors.py::test_g5_messages_hold_bounded_numbers_only",
)
_IMPORTS = ("lint-imports", "")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One break, and what of the check's output shows that it was caught for its own sake.

    ``old`` occurs exactly once in ``file`` and becomes ``new``; after a change below proto/ the
    code is generated anew.
    """

    name: str
    file: str
    old: str
    new: str
    check: tuple[str, str]
    shown: str


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "a bytes field in the enclave contract",
        "proto/mhsm/enclave/v1/enclave.proto",
        "  bool replaced = 8;\n",
        "  bool replaced = 8;\n  bytes note = 9;\n",
        _CONTRACT,
        r"GetStatusResponse\.note has type 12",
    ),
    Mutant(
        "a partition logs a key",
        "hsm_pool/net/key_creation.py",
        "            return import_octets(SecretBytes(_bounded(request.material.octets)))\n",
        "            print(request.material.octets.hex(), flush=True)\n"
        "            return import_octets(SecretBytes(_bounded(request.material.octets)))\n",
        _SHORT_RUN,
        r"oct key \(hex\) in partition\S*\.log",
    ),
    Mutant(
        "the text of an exception reaches the controller",
        "hsm_pool/net/interceptors.py",
        '            context.abort(getattr(grpc.StatusCode, shown.code), "")\n',
        "            context.abort(getattr(grpc.StatusCode, shown.code), str(error))\n",
        _SHORT_RUN,
        r"StageFirmware: a text in an error \(PERMISSION_DENIED\)",
    ),
    Mutant(
        "a trailer on the enclave plane holds keys",
        "hsm_pool/net/enclave_service.py",
        "        return enclave_pb2.DrainResponse(state=self._state())\n",
        '        context.set_trailing_metadata((("trace", serving.keys.export().reveal().hex()),))\n'
        "        return enclave_pb2.DrainResponse(state=self._state())\n",
        _SHORT_RUN,
        r"pool key-encryption key 1 \(hex\) in recording",
    ),
    Mutant(
        "the controller imports the partition's code",
        "fabric_controller/observe.py",
        "from __future__ import annotations\n",
        "from __future__ import annotations\n\nfrom hsm_pool.store import sealing  # noqa: F401\n",
        _IMPORTS,
        r"sees the enclave stubs and nothing else of the pool \(G5\) BROKEN",
    ),
)

NOT_SEEN = Mutant(
    "a partition spells a key out in the applied sequence, 48 bits a reply",
    "hsm_pool/net/enclave_service.py",
    "            response.applied_sequence = serving.replica.head.sequence\n",
    "            key = serving.keys.export().reveal()\n"
    "            place = int(time.time()) % (len(key) // 6) * 6\n"
    '            response.applied_sequence = int.from_bytes(key[place : place + 6], "big")\n',
    _SHORT_RUN,
    "",
)
"""Within the contract, and each piece shorter than what the scanner takes for a hit."""


def _environment(tree: Path) -> dict[str, str]:
    path = f"{tree}{os.pathsep}{tree / 'proto' / 'gen'}"
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def _run_check(tree: Path, check: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    kind, *nodes = check
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *nodes]
    if kind == "lint-imports":
        command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(
        command,
        cwd=tree,
        env=_environment(tree),
        capture_output=True,
        text=True,
        timeout=_CHECK_SECONDS,
        check=False,
    )


def _copy(directory: Path) -> Path:
    tree = copy_tree(directory / "tree")
    (tree / "scripts").mkdir()
    (tree / "scripts" / "generate-proto").write_bytes((ROOT / "scripts" / "generate-proto").read_bytes())
    return tree


def _break(tree: Path, mutant: Mutant) -> None:
    file = tree / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise AssertionError(f"{mutant.file} no longer holds the text that is broken here")
    file.write_text(text.replace(mutant.old, mutant.new))
    if mutant.file.startswith("proto/"):
        command = [sys.executable, "scripts/generate-proto"]
        subprocess.run(command, cwd=tree, capture_output=True, check=True, timeout=_CHECK_SECONDS)


def unbroken_copy_passes() -> bool:
    """Return whether all checks pass on a copy without a break: what catches a break is the break."""
    with tempfile.TemporaryDirectory(prefix="mhsm-blind-") as temporary:
        tree = _copy(Path(temporary))
        nodes = tuple(dict.fromkeys(m.check[1] for m in MUTANTS if m.check[0] == "pytest"))
        checks = [_run_check(tree, ("pytest", *nodes)), _run_check(tree, ("lint-imports",))]
    return not any(completed.returncode for completed in checks)


def caught(mutant: Mutant) -> bool:
    """Return whether a mutant's own check fails, and for the reason that it should."""
    with tempfile.TemporaryDirectory(prefix="mhsm-blind-") as temporary:
        tree = _copy(Path(temporary))
        _break(tree, mutant)
        completed = _run_check(tree, mutant.check)
    # 1: the check says no. What does not even run ends with another code.
    return completed.returncode == 1 and bool(re.search(mutant.shown, completed.stdout))


def not_seen() -> bool:
    """Return whether the proof finds nothing in the build that leaks through an allowed number."""
    with tempfile.TemporaryDirectory(prefix="mhsm-blind-") as temporary:
        tree = _copy(Path(temporary))
        _break(tree, NOT_SEEN)
        return _run_check(tree, NOT_SEEN.check).returncode == 0


def hunt(say: Callable[[str], None]) -> tuple[int, bool]:
    """Break, check and count; two at once.

    Returns:
        How many were caught, 0 if the checks fail on an unbroken copy; and whether the one that is not
        seen was not.
    """

    def judged(mutant: Mutant) -> bool:
        result = caught(mutant)
        how = f"caught by {mutant.check[1].rpartition('::')[2] or mutant.check[0]}"
        say(f"mutant {how if result else 'NOT CAUGHT'}: {mutant.name}")
        return result

    with ThreadPoolExecutor(_AT_ONCE) as executor:
        unbroken, unseen = executor.submit(unbroken_copy_passes), executor.submit(not_seen)
        results = list(executor.map(judged, MUTANTS))
        if not unbroken.result():
            say("the checks fail on an unbroken copy: they catch nothing")
            return 0, False
        if unseen.result():
            say(f"mutant not caught, as the threat model says: {NOT_SEEN.name}")
    return sum(results), unseen.result()
