"""Memory for long-lived secrets: memfd_secret where the kernel has it, else locked pages (G3).

Linux memfd_secret(2) pages are not reachable through /proc/PID/mem or ptrace, not even
by root, are never swapped and never in a core file. The fallback is an anonymous
mapping with mlock(2) and MADV_DONTDUMP; status says which one is in use.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Literal, NoReturn

_MEMFD_SECRET = {"x86_64": 447, "aarch64": 447}

_libc = ctypes.CDLL(None, use_errno=True)


class SecretMemory:
    """A fixed number of octets in secret memory; :meth:`close` overwrites and frees them.

    Args:
        capacity: Octets that fit, 1-4096.
        force_fallback: Use locked pages even where memfd_secret exists.
    """

    def __init__(self, capacity: int, *, force_fallback: bool = False) -> None:
        if not 1 <= capacity <= mmap.PAGESIZE:
            raise ValueError("capacity is 1 to one page")
        self.capacity = capacity
        mapped = None if force_fallback else _map_secret()
        self.kind: Literal["memfd_secret", "mlock"] = "memfd_secret" if mapped else "mlock"
        self._map = mapped or _map_locked()
        self._view = memoryview(self._map)[:capacity]

    def write(self, octets: bytes) -> None:
        """Put octets at the start; the rest is zeroed."""
        if len(octets) > self.capacity:
            raise ValueError("more octets than fit")
        # In two steps: joining them first would leave a copy in ordinary memory.
        self._view[: len(octets)] = octets
        self._view[len(octets) :] = bytes(self.capacity - len(octets))

    def view(self) -> memoryview:
        """Return a view of the octets, for primitives that take a buffer."""
        return self._view

    def close(self) -> None:
        """Overwrite and unmap.

        Raises:
            BufferError: A part of the view is still held; it is overwritten all the same.
        """
        if not self._map.closed:
            self._map[: self.capacity] = bytes(self.capacity)
            self._view.release()
            self._map.close()

    def __repr__(self) -> str:
        return f"SecretMemory({self.kind}, redacted)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("secrets cannot be pickled")


def _map_secret() -> mmap.mmap | None:
    number = _MEMFD_SECRET.get(os.uname().machine)
    if number is None:
        return None
    descriptor = _libc.syscall(number, os.O_CLOEXEC)
    if descriptor < 0:
        return None
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        return mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _map_locked() -> mmap.mmap:
    mapped = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_DONTDUMP)
    anchor = ctypes.c_char.from_buffer(mapped)
    failed = _libc.mlock(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(mmap.PAGESIZE))
    del anchor  # releases the buffer, so that the mapping can be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mlock failed: the limit of locked memory is too small")
    return mapped
