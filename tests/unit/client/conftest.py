"""Fixtures of the client's protocol tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.client.protocol_server import Servers


@pytest.fixture(scope="module")
def running_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.stop()


@pytest.fixture
def servers(running_servers: Servers) -> Iterator[Servers]:
    running_servers.reset()
    yield running_servers
    for partition in running_servers.partitions:
        partition.release.set()
