"""G3: where long-lived secrets live, measured from outside the process."""

from __future__ import annotations

import pickle
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from hsm_pool.crypto.secret_memory import SecretMemory

_CHILD = """
import sys
from hsm_pool.crypto.secret_memory import SecretMemory
octets = sys.stdin.buffer.read(32)
memory = SecretMemory(32, force_fallback=sys.argv[1] == "fallback")
memory.write(octets)
plain = bytearray(octets) if sys.argv[1] == "control" else None
del octets
print(memory.kind, flush=True)
sys.stdin.buffer.read()
"""


def hits_in(process_id: int, needle: bytes) -> int:
    """Count a needle in all readable memory of a process."""
    found = 0
    with (
        Path(f"/proc/{process_id}/maps").open() as maps,
        Path(f"/proc/{process_id}/mem").open("rb", 0) as memory,
    ):
        for line in maps:
            span, permissions = line.split()[:2]
            if not permissions.startswith("r"):
                continue
            start, end = (int(value, 16) for value in span.split("-"))
            try:
                memory.seek(start)
                found += memory.read(end - start).count(needle)
            except (OSError, OverflowError, ValueError):
                continue  # not readable, as secret memory is
    return found


@pytest.mark.parametrize("mode", ["secret", "fallback", "control"])
def test_secret_memory_is_not_readable_from_outside(mode: str) -> None:
    needle = secrets.token_bytes(32)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdin
        assert child.stdout
        child.stdin.write(needle)
        child.stdin.flush()
        kind = child.stdout.readline().decode().strip()
        try:
            found = hits_in(child.pid, needle[4:28])
        except PermissionError:
            pytest.skip("this user may not read another process's memory")
    finally:
        child.kill()
        child.wait()
    if mode == "secret" and kind != "memfd_secret":
        pytest.skip("this kernel has no memfd_secret; status says mlock")
    if mode == "secret":
        # The buffered reader of the child's standard input may keep one transient copy.
        assert found <= 1
    else:
        assert found > (1 if mode == "control" else 0), "the positive control must be found"


def test_bounds_wiping_and_misuse() -> None:
    memory = SecretMemory(16)
    memory.write(b"sixteen octets!!")
    assert bytes(memory.view()) == b"sixteen octets!!"
    with pytest.raises(ValueError, match="more octets"):
        memory.write(bytes(17))
    with pytest.raises(TypeError):
        pickle.dumps(memory)
    assert "sixteen" not in repr(memory)
    memory.close()
    memory.close()
    for capacity in (0, 5000):
        with pytest.raises(ValueError, match="capacity"):
            SecretMemory(capacity)
