"""Free TCP ports for a pool on one machine."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 10_000
_TRIES_MAX = 2_000


def free_ports(count: int) -> list[int]:
    """Return distinct free ports on 127.0.0.1, below the range of outgoing connections.

    A port there stays free for the pool while its processes restart.

    Raises:
        OSError: No free ports were found.
    """
    highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]) - 1
    if highest <= _LOWEST + count:
        highest = 60_000
    chosen: list[int] = []
    generator = random.SystemRandom()
    for _ in range(_TRIES_MAX):
        if len(chosen) == count:
            return chosen
        port = generator.randrange(_LOWEST, highest)
        if port not in chosen and _is_free(port):
            chosen.append(port)
    raise OSError(f"no {count} free ports were found on 127.0.0.1")


def _is_free(port: int) -> bool:
    with socket.socket() as candidate:
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
