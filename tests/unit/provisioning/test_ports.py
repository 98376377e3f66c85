"""Ports of a pool: free, distinct, on the loopback interface only."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsm_pool.provisioning import ports

_WINDOW = 60


def first_outgoing_port() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> range:
    """Narrow the search to a few ports, so that a taken one would be offered almost surely."""
    highest = first_outgoing_port() - 1
    if highest < 20_000:
        pytest.skip("outgoing connections of this machine use nearly all ports")
    monkeypatch.setattr(ports, "_LOWEST", highest - _WINDOW)
    return range(highest - _WINDOW, highest)


@contextlib.contextmanager
def held(wanted: range | list[int], address: str = "127.0.0.1") -> Iterator[list[int]]:
    """Listen on ports; on those that somebody else holds already, nothing is to be done."""
    with contextlib.ExitStack() as stack:
        taken = []
        for port in wanted:
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.bind((address, port))
                listener.listen()
                taken.append(port)
        yield taken


def test_ports_are_distinct_and_can_all_be_listened_on_at_once() -> None:
    found = ports.free_ports(100)
    assert len(found) == len(set(found)) == 100
    with held(found) as taken:
        assert taken == found


def test_ports_lie_below_those_of_outgoing_connections() -> None:
    """There, a restarting process would meet its port taken by somebody's connection."""
    if first_outgoing_port() < 20_000:
        pytest.skip("outgoing connections of this machine use nearly all ports")
    found = ports.free_ports(100)
    assert all(1024 <= port < first_outgoing_port() for port in found)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 - bound to see it respected
def test_a_port_that_is_listened_on_is_never_offered(window: range, address: str) -> None:
    left = list(window)[::10]
    with held([port for port in window if port not in left], address) as taken:
        assert len(taken) > _WINDOW // 2
        found = ports.free_ports(4)
    assert len(set(found)) == 4
    assert set(found) <= set(left)


def test_a_port_is_not_offered_twice_when_few_are_left(window: range) -> None:
    free = ports.free_ports(_WINDOW // 2)
    assert len(set(free)) == _WINDOW // 2
    assert set(free) <= set(window)


def test_the_search_ends_when_no_ports_are_left(window: range) -> None:
    with held(window), pytest.raises(OSError, match="no 1 free ports"):
        ports.free_ports(1)


def test_only_the_loopback_interface_counts(window: range) -> None:
    """A port of another address does not hinder a pool, which listens on 127.0.0.1."""
    with held(window, "127.0.0.2") as taken:
        assert len(taken) > _WINDOW // 2
        assert len(ports.free_ports(4)) == 4


def test_nothing_stays_bound_by_the_search() -> None:
    (port,) = ports.free_ports(1)
    with held([port]) as taken:
        assert taken == [port]
