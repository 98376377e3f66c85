"""G2: an exit notice says only what was seen: this incarnation is dead, because its lock is free.

Peers take a notice as proof and no longer wait for the partition's lease to run out, so
a false one would let a partition that lives on serve what is no longer true.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from hsm_pool import settings
from hsm_pool.node_agent.exit_notice import ExitNotices, incarnation, partition_is_dead
from hsm_pool.provisioning.layout import ExternalStore, NewPool, provision
from hsm_pool.settings import NodeSettings, PartitionSettings
from hsm_pool.store.state_file import StateDirectory
from mhsm.node.v1 import node_pb2, node_pb2_grpc
from tests.unit.node_agent.running_agent import AGENT, SECONDS_MAX, Lines, RunningAgent

Notice = tuple[int, int]
"""(index of the partition that took it, incarnation)"""

PARTITION = """
import sys, signal
from pathlib import Path
from hsm_pool.store.state_file import StateDirectory
state = StateDirectory(Path(sys.argv[1]))
with open(sys.argv[2], "w") as told:
    told.write(f"{state.incarnation}\\n")
signal.pause()
"""
"""Locks its directory and counts its incarnation as a partition does, says so, and waits."""


class Peer(node_pb2_grpc.NodeServiceServicer):
    """The node endpoint of another partition; keeps what it is told."""

    def __init__(self, own: PartitionSettings, notices: queue.Queue[Notice]) -> None:
        self._index = own.index
        self._notices = notices
        self.names: set[str] = set()
        plane = own.node_plane
        identity = (Path(plane.key_file).read_bytes(), Path(plane.certificate_file).read_bytes())
        credentials = grpc.ssl_server_credentials(
            [identity], Path(plane.ca_file).read_bytes(), require_client_auth=True
        )
        self._server = grpc.server(ThreadPoolExecutor(4))
        node_pb2_grpc.add_NodeServiceServicer_to_server(self, self._server)
        self._server.add_secure_port(own.node_endpoint, credentials)
        self._server.start()

    def NotifyExit(  # noqa: N802
        self, request: node_pb2.NotifyExitRequest, context: grpc.ServicerContext
    ) -> node_pb2.NotifyExitResponse:
        pem = context.auth_context()["x509_pem_cert"]
        certificate = x509.load_pem_x509_certificate(bytes(next(iter(pem))))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        self.names |= set(names.get_values_for_type(x509.UniformResourceIdentifier))
        self._notices.put((self._index, request.incarnation))
        return node_pb2.NotifyExitResponse()

    def stop(self) -> None:
        self._server.stop(None).wait(SECONDS_MAX)


class Node:
    """Node 0 of a pool with an external store, and the two peers that its agent tells."""

    def __init__(self, directory: Path) -> None:
        external = ExternalStore(("127.0.0.1:1",), "/ca", "/certificate", "/key")
        self.pool_id = provision(directory / "data", NewPool(True, 90, "", external))
        nodes = directory / "data" / "nodes"
        self.settings_file = nodes / "0" / "node.json"
        self.settings = settings.load(NodeSettings, self.settings_file)
        self.state = Path(self.settings.incarnation_file).parent
        self.notices: queue.Queue[Notice] = queue.Queue()
        self.peers = [
            Peer(settings.load(PartitionSettings, nodes / str(index) / "partition.json"), self.notices)
            for index in (1, 2)
        ]
        self._told = nodes / "0" / "told"  # the agent, and what it starts, reach nothing else
        os.mkfifo(self._told)
        self._descriptor = os.open(self._told, os.O_RDWR)
        self._lines = Lines(self._descriptor)
        self.command = [sys.executable, "-c", PARTITION, str(self.state), str(self._told)]

    def started(self) -> int:
        """Wait until a partition holds its lock; return its incarnation."""
        return int(self._lines.next())

    def notice(self) -> Notice:
        """Return the next notice."""
        return self.notices.get(timeout=SECONDS_MAX)

    def told_since(self) -> list[Notice]:
        """Return the notices that came, in an order that does not depend on the threads that brought them."""
        found = []
        while not self.notices.empty():
            found.append(self.notices.get_nowait())
        return sorted(found)

    def close(self) -> None:
        for peer in self.peers:
            peer.stop()
        os.close(self._descriptor)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


# -- what the agent sees -----------------------------------------------------------------


def test_a_partition_that_never_started_is_dead_and_has_no_incarnation(node: Node) -> None:
    assert partition_is_dead(node.settings)
    assert incarnation(node.settings) == 0
    assert list(node.state.iterdir()) == []  # looking leaves nothing


def test_a_partition_is_dead_when_its_lock_is_free_and_not_before(node: Node) -> None:
    """A stopped process still holds it: it may go on and serve."""
    with subprocess.Popen(node.command) as process:
        try:
            assert node.started() == 1
            assert not partition_is_dead(node.settings)
            process.send_signal(signal.SIGSTOP)
            assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert not partition_is_dead(node.settings)
            assert incarnation(node.settings) == 1
        finally:
            process.kill()
        process.wait(SECONDS_MAX)
    assert partition_is_dead(node.settings)
    assert incarnation(node.settings) == 1


def test_looking_does_not_keep_a_partition_from_its_lock(node: Node) -> None:
    StateDirectory(node.state).close()
    for _ in range(3):
        assert partition_is_dead(node.settings)
    state = StateDirectory(node.state)
    assert state.incarnation == 2
    state.close()


# -- what the peers are told -------------------------------------------------------------


def test_a_notice_reaches_all_peers_under_the_agents_name(node: Node) -> None:
    notices = ExitNotices(node.settings)
    notices.send(41)
    notices.close()
    assert node.told_since() == [(1, 41), (2, 41)]
    for peer in node.peers:
        assert peer.names == {f"spiffe://{node.pool_id}/node/0"}


def test_a_peer_that_is_gone_does_not_keep_the_others_from_it(node: Node) -> None:
    node.peers[0].stop()
    notices = ExitNotices(node.settings)
    notices.send(5)
    notices.close()
    assert node.told_since() == [(2, 5)]


def test_each_incarnation_that_is_killed_is_told_and_no_other(node: Node) -> None:
    with RunningAgent(node.settings_file, node.command) as agent:
        for number in (1, 2):
            assert node.started() == number
            ids = agent.reported(lambda ids: ids["partition"])
            assert node.told_since() == []
            agent.child(ids["partition"]).signal(signal.SIGKILL)
            assert sorted([node.notice(), node.notice()]) == [(1, number), (2, number)]
        assert node.started() == 3
        assert agent.stop() == 0
    assert node.told_since() == []


def test_an_agent_that_starts_tells_of_what_died_with_the_one_before(node: Node) -> None:
    """Both were killed, so nobody has told the peers yet."""
    with RunningAgent(node.settings_file, node.command) as agent:
        assert node.started() == 1
        partition = agent.child(agent.report()["partition"])
        agent.process.kill()
        assert partition.exits()
    assert node.told_since() == []
    with RunningAgent(node.settings_file, node.command) as agent:
        assert sorted([node.notice(), node.notice()]) == [(1, 1), (2, 1)]
        assert node.started() == 2
        assert agent.stop() == 0
    assert node.told_since() == []


def test_a_partition_that_never_started_is_not_told_of_at_the_agents_start(node: Node) -> None:
    with RunningAgent(node.settings_file, node.command) as agent:
        assert node.started() == 1
        assert agent.stop() == 0
    assert node.told_since() == []


def test_nothing_is_told_while_somebody_holds_the_lock(node: Node) -> None:
    """A paused partition lives, even if it is no child of this agent; its own children end without a lock."""
    with subprocess.Popen(node.command) as holder:
        try:
            assert node.started() == 1
            holder.send_signal(signal.SIGSTOP)
            assert os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
            with RunningAgent(node.settings_file, node.command) as agent:
                for _ in range(2):  # children that started and exited again
                    agent.reported(lambda ids: ids["partition"])
                agent.reported(lambda ids: ids["partition"])
                assert agent.stop() == 0  # and every notice under way has ended
            assert node.told_since() == []
            assert incarnation(node.settings) == 1
        finally:
            holder.kill()


def test_the_same_children_are_told_of_once_the_lock_is_free(node: Node) -> None:
    """The positive control of the test above: nothing differs but the lock."""
    StateDirectory(node.state).close()
    with RunningAgent(node.settings_file, ["false"]) as agent:
        for _ in range(3):
            agent.reported(lambda ids: ids["partition"])
        assert agent.stop() == 0
    told = node.told_since()
    assert set(told) == {(1, 1), (2, 1)}
    assert len(told) >= 2 * 3  # at its start and after each child that exited


_RACE = f"""
from pathlib import Path
from hsm_pool.node_agent import agent
from hsm_pool.store.state_file import StateDirectory
look, started = agent.partition_is_dead, []
def then_another_starts(node):
    dead = look(node)
    if dead and Path(node.incarnation_file).exists() and not started:
        started.append(StateDirectory(Path(node.incarnation_file).parent))
    return dead
agent.partition_is_dead = then_another_starts
{AGENT}
"""


def test_an_incarnation_that_starts_just_after_the_look_is_not_told_of(node: Node) -> None:
    """Between the look at the lock and the notice, somebody else starts the partition: that one lives."""
    with RunningAgent(node.settings_file, node.command, _RACE) as agent:
        assert node.started() == 1
        agent.child(agent.report()["partition"]).signal(signal.SIGKILL)
        told = {node.notice(), node.notice()}
        assert agent.stop() == 0
    assert incarnation(node.settings) == 2
    assert told == {(1, 1), (2, 1)}
