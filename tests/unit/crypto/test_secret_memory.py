"""G3: where long-lived secrets live, measured from outside the process."""

from __future__ import annotations

import pickle
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hsm_pool.crypto.secret_memory import SecretMemory

_CHILD = """
import ctypes, os, sys
from hsm_pool.crypto.secret_memory import SecretMemory
memory = SecretMemory(32, force_fallback=sys.argv[1] != "secret")
os.readv(0, [memory.view()])  # no copy in ordinary memory on the way
plain = bytearray(memory.view()) if sys.argv[1] == "control" else None
print(memory.kind, ctypes.addressof(ctypes.c_char.from_buffer(memory.view())), flush=True)
os.read(0, 1)
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


def flags_at(process_id: int, address: int) -> list[str]:
    """Return the kernel's flags of the mapping at an address (proc_pid_smaps(5), VmFlags)."""
    inside = False
    for line in Path(f"/proc/{process_id}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            start, end = (int(value, 16) for value in name.split("-"))
            inside = start <= address < end
        elif inside and name == "VmFlags:":
            return rest
    raise AssertionError("no mapping at this address")


@pytest.mark.parametrize("mode", ["secret", "fallback", "control"])
def test_secret_memory_is_not_readable_from_outside(mode: str) -> None:
    """The page by its address, and all other memory; the fallback's page is the positive control."""
    needle = secrets.token_bytes(32)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdin
        assert child.stdout
        child.stdin.write(needle)
        child.stdin.flush()
        kind, address = child.stdout.readline().decode().split()
        if mode == "secret" and kind != "memfd_secret":
            pytest.skip("this kernel has no memfd_secret; status says mlock")
        try:
            found = hits_in(child.pid, needle[4:28])
        except PermissionError:
            pytest.skip("this user may not read another process's memory")
        flags = flags_at(child.pid, int(address))
        with Path(f"/proc/{child.pid}/mem").open("rb", 0) as memory:
            memory.seek(int(address))
            if mode == "secret":
                with pytest.raises(OSError, match="Input/output"):
                    memory.read(32)
            else:
                assert memory.read(32) == needle
    finally:
        child.kill()
        child.communicate()
    if mode == "control":
        assert found >= 2, "the page, the copy, and what the allocator left of its making"
    else:
        assert found == {"secret": 0, "fallback": 1}[mode]
    assert "lo" in flags, "locked: never swapped"
    if mode != "secret":
        assert "dd" in flags, "left out of core files"


@pytest.mark.parametrize("force_fallback", [False, True])
def test_primitives_take_the_view(force_fallback: bool) -> None:
    memory = SecretMemory(32, force_fallback=force_fallback)
    key = secrets.token_bytes(32)
    memory.write(key)
    sealed = AESGCM(memory.view()).encrypt(bytes(12), b"text", None)
    assert AESGCM(key).decrypt(bytes(12), sealed, None) == b"text"
    derived = [HKDF(SHA256(), 32, None, b"label").derive(octets) for octets in (memory.view(), key)]
    assert derived[0] == derived[1]
    memory.close()


def test_bounds_wiping_and_misuse() -> None:
    memory = SecretMemory(16)
    memory.write(b"sixteen octets!!")
    assert bytes(memory.view()) == b"sixteen octets!!"
    with pytest.raises(ValueError, match="more octets"):
        memory.write(bytes(17))
    with pytest.raises(TypeError):
        pickle.dumps(memory)
    assert "sixteen" not in repr(memory)
    memory.write(b"short")
    assert bytes(memory.view()) == b"short" + bytes(11), "nothing of the earlier octets is left"
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="released"):
        memory.view()[0]
    held = SecretMemory(16)
    held.write(b"sixteen octets!!")
    part = held.view()[4:]
    with pytest.raises(BufferError):
        held.close()
    assert bytes(part) == bytes(12), "overwritten, whoever holds it"
    part.release()
    held.close()
    for capacity in (0, 5000):
        with pytest.raises(ValueError, match="capacity"):
            SecretMemory(capacity)
