"""G3: what a process does to itself against others, seen from outside."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel import needs_landlock, needs_seccomp
from tests.running_pool import ROOT

_ORDINARY_USER = """
import ctypes, os
if os.getuid() == 0:  # root reads everything
    os.setgroups([])
    os.setgid(20001)
    os.setuid(20001)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, as a process of such a user is
"""

_CHILD = """
import ctypes, json, os, socket, subprocess, sys, threading
from hsm_pool.enclave import hardening, system_calls
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def run(ready):
    ready.wait()
    for line in sys.stdin:
        try:
            exec(line)
            print("done", flush=True)
        except OSError as error:
            print(type(error).__name__, flush=True)

ready = threading.Event()
thread = threading.Thread(target=run, args=[ready])
thread.start()
{before}
claimed = hardening.in_force()
{measures}
names = [[measure.name for measure in found] for found in (claimed, hardening.in_force())]
print(json.dumps(names), flush=True)
ready.set()
thread.join()
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
    """Run a process that takes measures; gives it and the measures that it says are in force.

    The lines that it reads afterwards run in a thread that was there before.
    """
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


def ask(child: subprocess.Popen[str], line: str) -> str:
    """Have a line run; return "done", or the type of its OSError."""
    assert child.stdin
    assert child.stdout
    child.stdin.write(line + "\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def seccomp_of(process_id: int) -> list[tuple[str, str]]:
    """Return the mode and the number of filters of each thread, as the kernel says."""
    found = []
    for file in Path(f"/proc/{process_id}/task").glob("*/status"):
        status = dict(line.split(":", 1) for line in file.read_text().splitlines())
        found.append((status["Seccomp"].strip(), status["Seccomp_filters"].strip()))
    return found


OTHERS = ("call('unshare', 0)", "call('process_vm_readv', os.getpid(), None, 0, None, 0, 0)")
NEEDED = "subprocess.run(['true'], check=True)"
SOCKETS = ("socket.socket()", "socket.socketpair()", "socket.create_connection(('127.0.0.1', 1))")


def test_without_a_filter_the_calls_work() -> None:
    """Positive control of the next test."""
    with running("") as (child, named):
        assert named == []
        assert [ask(child, line) for line in (*OTHERS, NEEDED, *SOCKETS)] == [
            *["done"] * 5,
            "ConnectionRefusedError",
        ]


@needs_seccomp
@pytest.mark.parametrize("who", ["PARTITION", "CEREMONY_CHILD"])
def test_denied_system_calls_fail_in_every_thread(who: str) -> None:
    with running(f"hardening.filter_system_calls(system_calls.{who})") as (child, named):
        assert named == ["NO_NEW_PRIVILEGES", "SYSTEM_CALL_FILTER"], "the library sets the first"
        modes = seccomp_of(child.pid)
        assert len(modes) == 2
        assert len(set(modes)) == 1, "both threads alike"
        assert modes[0][0] == "2", "SECCOMP_MODE_FILTER"
        assert [ask(child, line) for line in OTHERS] == ["PermissionError"] * 2
        allowed = "done" if who == "PARTITION" else "PermissionError"
        assert ask(child, NEEDED) == allowed, "a partition starts its ceremony child"
        assert [ask(child, line) for line in SOCKETS[:2]] == [allowed] * 2


_STARTED = """
import socket, sys
from hsm_pool.ceremony import child

def tried(*_):
    try:
        socket.socketpair()
        print("done")
    except OSError as error:
        print(type(error).__name__)

child.read_frame = tried  # what the child does first, once it is hardened
sys.exit(child.main())
"""


@needs_seccomp
def test_a_ceremony_child_starts_with_its_own_filter() -> None:
    """G3: whoever reads shares cannot open a socket, whatever the partition may do."""
    completed = subprocess.run(
        [sys.executable, "-c", _STARTED], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert (completed.returncode, completed.stdout) == (0, "PermissionError\n"), completed.stderr


def test_where_there_is_no_filter_nothing_fails_and_nothing_is_claimed() -> None:
    without = "sys.modules['pyseccomp'] = None\nhardening.filter_system_calls(system_calls.PARTITION)"
    with running(without) as (child, named):
        assert named == []
        assert ask(child, OTHERS[0]) == "done"


_REACHING = """
import os, pathlib, socket, sys
from hsm_pool.enclave import hardening, landlock
{restrict}
lines = [
    lambda: open(sys.argv[1]).read(),
    lambda: open(sys.argv[2]).read(),
    lambda: open(sys.argv[2], "a"),
    lambda: open(f"/proc/{{os.getppid()}}/environ"),
    lambda: os.kill(os.getppid(), 0),
    lambda: socket.create_server(("127.0.0.1", 0)),
    lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3]))),
]
for line in lines:
    try:
        line()
        print("done")
    except OSError as error:
        print(type(error).__name__)
"""


@needs_landlock
@pytest.mark.parametrize(
    ("restrict", "reached"),
    [
        ("", [0, 1, 2, 3, 4, 5, 6]),
        ("hardening.reach_nothing()", []),
        ("landlock.restrict(readable=[pathlib.Path(sys.argv[2])])", [1]),
        ("landlock.restrict(writable=[pathlib.Path(sys.argv[2]).parent])", [1, 2]),
        (
            "landlock.restrict(readable=landlock.python_directories(), connect_ports=[int(sys.argv[3])])",
            [6],
        ),
    ],
)
def test_landlock_leaves_what_was_named(restrict: str, reached: list[int], tmp_path: Path) -> None:
    """G3, G5: the first case, without it, is the positive control. It holds for root, too."""
    files = []
    for name in ("other", "own"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "file")
        files[-1].write_text(name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        completed = subprocess.run(
            [
                sys.executable,
                "-c",
                _REACHING.format(restrict=restrict),
                *map(str, files),
                str(server.getsockname()[1]),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    lines = completed.stdout.split()
    assert len(lines) == 7
    assert [number for number, line in enumerate(lines) if line == "done"] == reached
    assert {line for line in lines if line != "done"} <= {"PermissionError"}


_PORTS_AND_PROGRAMS = """
import os, socket, subprocess, sys
from pathlib import Path
from hsm_pool.enclave import confinement, landlock
port, directory, restrict = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "yes"
assert not confinement.in_force()
if restrict:
    python = landlock.python_directories()
    landlock.restrict(
        readable=python,
        listable=[Path(directory)],
        executable=map(Path, ("/lib", "/lib64", "/usr/lib", "/usr/bin/true")),
        bind_ports=[port],
    )
assert confinement.in_force() == restrict

def bind(number):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", number))

for line in (
    lambda: bind(0),
    lambda: open(directory + "/file"),
    lambda: subprocess.run(["/usr/bin/false"]),
    lambda: bind(port),
    lambda: os.listdir(directory),
    lambda: subprocess.run(["/usr/bin/true"], check=True),
):
    try:
        line()
        print("done")
    except PermissionError:
        print("refused")
"""


@needs_landlock
@pytest.mark.parametrize("restrict", ["yes", "no"])
def test_a_confined_process_is_found_to_be_so(restrict: str, tmp_path: Path) -> None:
    """G3: ports to bind, directories to list and programs to start are named; "no" is the control."""
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    completed = subprocess.run(
        [sys.executable, "-c", _PORTS_AND_PROGRAMS, str(port), str(tmp_path), restrict],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert completed.returncode == 0, completed.stderr
    first = "refused" if restrict == "yes" else "done"
    assert completed.stdout.split() == [first] * 3 + ["done"] * 3


@needs_landlock
def test_landlock_is_refused_while_another_thread_runs() -> None:
    """It would hold for one thread only."""
    with running("") as (child, _):
        line = "\\n".join(
            ("try:", "    hardening.reach_nothing()", "except RuntimeError:", "    raise OSError from None")
        )
        assert ask(child, f"exec({line!r})".replace("\\\\n", "\\n")) == "OSError"


@pytest.mark.parametrize("module", ["landlock.py", "system_calls.py"])
def test_modules_that_stand_twice_are_the_same(module: str) -> None:
    ours = (ROOT / "hsm_pool" / "enclave" / module).read_bytes()
    assert (ROOT / "fabric_controller" / module).read_bytes() == ours
