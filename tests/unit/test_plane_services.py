"""G3, G5, G6: what the services inside of the pool refuse by themselves, whatever the gate let through."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hsm_pool import errors
from hsm_pool.core.model import POOL, Admission, PoolRecord
from hsm_pool.core.state import State
from hsm_pool.net import enclave_service, plane_services
from hsm_pool.net.authorization import Caller, Kind
from hsm_pool.net.enclave_service import EnclaveService
from hsm_pool.net.plane_services import NodeService, PeerService
from hsm_pool.partition.command_counter import CommandCounter
from hsm_pool.partition.partition import PartitionState
from mhsm.enclave.v1 import enclave_pb2
from mhsm.node.v1 import node_pb2
from mhsm.peer.v1 import peer_pb2

CONTEXT: Any = SimpleNamespace(
    time_remaining=lambda: 10.0,
    auth_context=lambda: {"x509_pem_cert": [b"certificate"]},
)


class Partition:
    """Partition 0 as the services see it: drained or not, with a lease or without."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(index=0, store=SimpleNamespace(member_peer_urls=()))
        self.state = PartitionState.DRAINED
        self.lease = 3.0
        self.commit: Callable[[], None] = lambda: None
        self.core = State()
        self.submitted: list[Any] = []
        replica = SimpleNamespace(
            drained=True,
            state=self.core,
            lease_remaining=lambda: self.lease,
            # Three that differ, so that it shows which one a command is decided by.
            await_serving=lambda: frozenset({1, 2}),
            serving=lambda: frozenset({0}),
            lease_holders=lambda: frozenset({0, 1, 2}),
            head=SimpleNamespace(sequence=7),
            is_housekeeper=lambda: True,
            peer_incarnation=lambda _: 3,
            boot_count_min=lambda _: 0,
            half_replaced=frozenset,
        )
        committer = SimpleNamespace(submit=self._submit)
        self._serving = SimpleNamespace(
            replica=replica,
            committer=committer,
            keys=object(),
            now_ms=lambda: time.time_ns() // 1_000_000,
        )
        self.state_directory = SimpleNamespace(incarnation=1)
        self.firmware = SimpleNamespace(refresh=lambda: None)
        self.heal_giver = SimpleNamespace(begin=lambda: b"nonce", give=self.give)
        self.on_giving: Callable[[], None] = lambda: None

    def _submit(self, mutation: Any, _: float) -> None:
        self.submitted.append(mutation.command)
        self.commit()

    def serving(self) -> Any:
        return self._serving

    store = None

    def give(self, *_: object) -> peer_pb2.HealResponse:
        self.on_giving()
        return peer_pb2.HealResponse()

    def holding_keys(self) -> Any:
        return self._serving

    def serving_or_unconfirmed(self) -> Any:
        return self._serving


class Commands:
    """An enclave service and stamps that are above all before."""

    def __init__(self, directory: Path) -> None:
        self.partition = Partition()
        self.service = EnclaveService(self.partition, CommandCounter(directory))  # type: ignore[arg-type]
        self._counter = time.time_ns() // 1_000_000

    def send(self, verb: str, **fields: int) -> Any:
        self._counter += 1
        stamp = {"counter": self._counter, "expires_ms": self._counter + 30_000, **fields}
        return getattr(self.service, verb)(getattr(enclave_pb2, f"{verb}Request")(**stamp), CONTEXT)


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def test_nothing_is_obeyed_after_a_restart(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """G5: one that is resumed while its process already ends would be counted as serving, and then gone."""
    ended: list[int] = []
    monkeypatch.setattr(enclave_service.os, "kill", lambda process, _: ended.append(process))
    commands.send("Restart")
    assert len(ended) == 1
    for verb in ("Resume", "Restart"):
        with pytest.raises(errors.PartitionStarting):
            commands.send(verb)
    assert len(ended) == 1


@pytest.mark.parametrize("verb", ["Drain", "Relinquish", "Restart", "Heal"])
def test_the_floor_counts_who_serves_by_his_own_word(
    verb: str, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: not who may hold a lease, and not who is known to at once after a start; status says no more."""
    monkeypatch.setattr(enclave_service.os, "kill", lambda *_: None)
    partition = commands.partition
    partition.holding_keys().replica.drained = verb == "Restart"
    admission = Admission(1, 4, 0, ready=True)
    partition.core.apply({POOL: PoolRecord(admissions={1: admission})})
    commands.send(verb, **({"index": 1} if verb == "Heal" else {}))
    (command,) = partition.submitted
    assert command.serving == {1, 2}
    assert command.index == (1 if verb == "Heal" else 0)
    assert commands.service.GetStatus(enclave_pb2.GetStatusRequest(), CONTEXT).serving_count == 1


def test_one_command_is_obeyed_at_a_time(commands: Commands) -> None:
    """G5: the second is refused at once, and may be sent again when the first has ended."""
    begun, go_on = threading.Event(), threading.Event()

    def commit() -> None:
        begun.set()
        assert go_on.wait(20)

    commands.partition.commit = commit
    with ThreadPoolExecutor(1) as other:
        first = other.submit(commands.send, "Resume")
        assert begun.wait(20)
        try:
            with pytest.raises(errors.Overloaded):
                commands.send("Resume")
        finally:
            go_on.set()
        first.result()
    commands.send("Resume")


@pytest.fixture
def caller(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set which partition or node calls."""
    monkeypatch.setattr(plane_services, "certificate_key", lambda _: b"key")

    def set_to(index: int) -> None:
        found = Caller("spiffe://pool/x", Kind.PARTITION, index)
        monkeypatch.setattr(plane_services, "current_caller", lambda: found)

    return set_to


def test_who_holds_no_lease_gives_no_keys(caller: Callable[[int], None]) -> None:
    """G3: it may be cut off since long, and not know that the asker was replaced or its key revoked."""
    caller(1)
    partition = Partition()
    service = PeerService(partition)  # type: ignore[arg-type]
    assert service.BeginHeal(peer_pb2.BeginHealRequest(), CONTEXT).nonce
    service.Heal(peer_pb2.HealRequest(), CONTEXT)
    partition.lease = 0.0
    with pytest.raises(errors.NotFresh):
        service.BeginHeal(peer_pb2.BeginHealRequest(), CONTEXT)
    with pytest.raises(errors.NotFresh):
        service.Heal(peer_pb2.HealRequest(), CONTEXT)


def test_keys_do_not_leave_when_the_lease_ended_meanwhile(caller: Callable[[int], None]) -> None:
    """G3: verifying evidence takes time; the right to give is checked again before the answer leaves."""
    caller(1)
    partition = Partition()

    def end_the_lease() -> None:
        partition.lease = 0.0

    partition.on_giving = end_the_lease
    with pytest.raises(errors.NotFresh):
        PeerService(partition).Heal(peer_pb2.HealRequest(), CONTEXT)  # type: ignore[arg-type]


def test_a_partition_does_not_heal_from_itself(caller: Callable[[int], None]) -> None:
    """G3: who has stolen its identity would be given keys as that very partition."""
    caller(0)
    with pytest.raises(errors.PermissionDenied):
        PeerService(Partition()).Heal(peer_pb2.HealRequest(), CONTEXT)  # type: ignore[arg-type]


def test_an_agent_hears_of_an_admission_when_the_store_has_changed_its_members(
    caller: Callable[[int], None],
) -> None:
    """G1, G6: a member that starts empty before its old id is gone breaks what the store promises."""
    partition = Partition()
    service = NodeService(partition)  # type: ignore[arg-type]
    caller(2)
    for ready in (False, True):
        admission = Admission(1, 2**20, 77, ready=ready)
        partition.core.apply({POOL: PoolRecord(admissions={2: admission})})
        found = service.GetAdmission(node_pb2.GetAdmissionRequest(), CONTEXT)
        assert (found.number, found.incarnation) == ((1, 2**20) if ready else (0, 0))
    caller(1)
    found = service.GetAdmission(node_pb2.GetAdmissionRequest(), CONTEXT)
    assert found.number == 0, "each agent hears of its own partition only"
