"""G3, G5: what the controller does to itself before it serves, as the kernel has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.kernel import needs_landlock, needs_seccomp

FROM_THE_START = ["no_core_files", "not_dumpable", "no_new_privileges"]

_CONTROLLER = """
import ctypes, json, os, socket, sys, threading
if {without}:
    sys.modules["pyseccomp"] = None
from fabric_controller import hardening
from fabric_controller.settings import FabricSettings, Identity, Partition
directory = sys.argv[1]
files = [directory + "/" + name for name in ("crt", "key", "ca")]
settings = FabricSettings("p", (Partition(0, "127.0.0.1:1"),), Identity(*files), directory)
before = hardening.in_force()
if {harden}:
    hardening.harden(settings)
libc = ctypes.CDLL(None, use_errno=True)

def process_vm_readv():
    if libc.process_vm_readv(os.getpid(), None, 0, None, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "")

tried = {{}}

def reach():
    for name, call in {{
        "program": lambda: os.posix_spawn("/usr/bin/true", ["true"], {{}}),
        "memory": process_vm_readv,
        "connections": lambda: socket.socket().listen(),
        "own file": lambda: open(directory + "/own", "w").close(),
    }}.items():
        try:
            call()
            tried[name] = True
        except PermissionError:
            tried[name] = False

thread = threading.Thread(target=reach)
thread.start()
thread.join()
print(json.dumps([before, hardening.in_force(), tried]), flush=True)
sys.stdin.read()
"""


def run(directory: Path, *, harden: bool = True, without: bool = False) -> tuple[list[str], dict, Path]:
    """Return what is in force in a process, what a thread of it reaches, and a copy of its /proc."""
    seen = directory / "seen"
    seen.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", _CONTROLLER.format(harden=harden, without=without), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    try:
        before, named, tried = json.loads(child.stdout.readline())
        for name in ("limits", "status"):
            (seen / name).write_bytes(Path(f"/proc/{child.pid}/{name}").read_bytes())
    finally:
        child.communicate("", timeout=30)
    assert set(before) <= {"no_core_files"}, "nothing is claimed before it was done"
    return named, tried, seen


def field(seen: Path, name: str) -> str:
    """Return a field of the status that the kernel shows."""
    (line,) = (line for line in (seen / "status").read_text().splitlines() if line.startswith(f"{name}:"))
    return line.split(":")[1].strip()


def test_what_the_controller_says_is_what_the_kernel_has(tmp_path: Path) -> None:
    named, _, seen = run(tmp_path)
    assert named[:3] == FROM_THE_START
    assert field(seen, "NoNewPrivs") == "1"
    (line,) = (x for x in (seen / "limits").read_text().splitlines() if x.startswith("Max core file size"))
    assert line.split()[4:6] == ["0", "0"]


@needs_seccomp
@needs_landlock
def test_it_starts_no_program_takes_no_connection_and_reads_no_memory(tmp_path: Path) -> None:
    """The process that is not hardened is the positive control."""
    named, tried, seen = run(tmp_path)
    assert named == [*FROM_THE_START, "system_call_filter", "landlock"]
    assert tried == {"program": False, "memory": False, "connections": False, "own file": True}
    assert field(seen, "Seccomp") == "2"
    directory = tmp_path / "control"
    directory.mkdir()
    named, tried, _ = run(directory, harden=False)
    assert tried == {"program": True, "memory": True, "connections": True, "own file": True}
    assert set(named) <= {"no_core_files"}, "of a machine that has none for anybody"


def test_without_libseccomp_nothing_fails_and_no_filter_is_claimed(tmp_path: Path) -> None:
    named, tried, _ = run(tmp_path, without=True)
    assert named[:3] == FROM_THE_START
    assert "system_call_filter" not in named
    assert tried["memory"]
