"""G3: what a process does to itself against others, seen from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ORDINARY_USER = """
import ctypes, os
if os.getuid() == 0:  # root reads everything
    os.setgroups([])
    os.setgid(20001)
    os.setuid(20001)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, as a process of such a user is
"""

_CHILD = """
import json, sys, threading
from hsm_pool.enclave import hardening
threading.Thread(target=threading.Event().wait, daemon=True).start()
{before}
claimed = hardening.in_force()
{measures}
names = [[measure.name for measure in found] for found in (claimed, hardening.in_force())]
print(json.dumps(names), flush=True)
for line in sys.stdin:
    try:
        exec(line)
        print("done", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""

_OBSERVER = """
import sys
try:
    open(f"/proc/{sys.argv[1]}/mem", "rb")
    print("opened")
except PermissionError:
    print("refused")
"""


@contextmanager
def running(measures: str, before: str = "") -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run a process that takes measures, then lines; gives it and the measures it says are in force."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD.format(before=before, measures=measures)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout
        claimed, after = json.loads(child.stdout.readline())
        assert not claimed, "nothing is claimed before it was done"
        yield child, after
    finally:
        child.kill()
        child.communicate()


def test_hardening_from_the_start_takes_effect() -> None:
    with running("hardening.harden_process()") as (child, named):
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        status = Path(f"/proc/{child.pid}/status").read_text()
        assert named == ["NO_CORE_FILES", "NOT_DUMPABLE"], "another thread could still gain privileges"
        assert "NoNewPrivs:\t1" in status
        (line,) = (line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert line.split()[4:6] == ["0", "0"]


@pytest.mark.parametrize(
    ("measures", "expected"), [("", "opened"), ("hardening.harden_process()", "refused")]
)
def test_another_process_of_the_same_user_reads_no_memory(measures: str, expected: str) -> None:
    """The process that is not hardened is the positive control."""
    with running(measures, _ORDINARY_USER) as (child, _):
        observer = subprocess.run(
            [sys.executable, "-c", _ORDINARY_USER + _OBSERVER, str(child.pid)],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    assert observer.stdout.strip() == expected
