"""G5: a replacement that was begun and has not ended is visible; its old partition is refused for good."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from hsm_pool.core.membership import half_replaced
from hsm_pool.core.model import POOL, Admission, PoolRecord
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import NotFresh, PartitionReplaced
from hsm_pool.net.enclave_service import EnclaveService
from hsm_pool.partition.command_counter import CommandCounter
from hsm_pool.partition.partition import Partition, PartitionState
from hsm_pool.store import chain
from hsm_pool.store.replica import Replica
from hsm_pool.store.sealing import PoolKeys
from mhsm.enclave.v1 import enclave_pb2
from tests.unit.store.test_revoked_epochs import POOL_ID, Story, header_of

ADMITTED = 2**20


def replica_of(index: int, incarnation: int) -> Replica:
    """Return a partition's replica of a pool that has admitted a new partition 2."""
    keys = PoolKeys.generate(POOL_ID, 1, SecretBytes(bytes(32)))
    story = Story(keys, keys)
    pool = PoolRecord(
        epoch=1,
        header_digest=chain.value_digest(header_of(1)),
        drained=frozenset({2}),
        admissions={2: Admission(1, ADMITTED, 77)},
    )
    story.commit({POOL: pool}, header_of(1))
    replica = Replica(keys, index, incarnation)
    story_replica = story.replica(keys)
    replica.state, replica.head = story_replica.state, story_replica.head
    return replica


def service_of(replica: Replica, directory: Path) -> EnclaveService:
    """Return the enclave interface before a partition that is drained and holds no lease."""

    def decide_without_a_lease(*_: object) -> bytes:
        raise NotFresh("this partition holds no freshness lease at the moment")

    serving = SimpleNamespace(
        replica=replica,
        committer=SimpleNamespace(submit=decide_without_a_lease),
        now_ms=lambda: time.time_ns() // 1_000_000,
    )
    replica._drained = True
    partition = SimpleNamespace(
        settings=SimpleNamespace(index=replica.index),
        holding_keys=lambda: serving,
        state=PartitionState.DRAINED,
        state_directory=SimpleNamespace(incarnation=replica.incarnation),
    )
    return EnclaveService(cast("Partition", cast("Any", partition)), CommandCounter(directory))


def resume(service: EnclaveService) -> None:
    now_ms = time.time_ns() // 1_000_000
    context = cast("grpc.ServicerContext", SimpleNamespace(time_remaining=lambda: 1.0))
    service.Resume(enclave_pb2.ResumeRequest(counter=now_ms, expires_ms=now_ms + 10_000), context)


def status(service: EnclaveService) -> enclave_pb2.GetStatusResponse:
    context = cast("grpc.ServicerContext", SimpleNamespace())
    return service.GetStatus(enclave_pb2.GetStatusRequest(), context)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [({}, {2}), ({2: ADMITTED - 1}, {2}), ({2: ADMITTED}, set()), ({2: ADMITTED + 5}, set())],
)
def test_a_replacement_has_ended_when_the_new_partition_was_seen(
    seen: dict[int, int], expected: set[int]
) -> None:
    pool = PoolRecord(admissions={2: Admission(1, ADMITTED, 77, ready=True)})
    assert half_replaced(pool, seen) == expected


def test_the_old_partition_refuses_its_resume_definitely_although_it_cannot_decide(tmp_path: Path) -> None:
    """It holds no lease and never will again: "not fresh" would have it repeated for ever."""
    service = service_of(replica_of(2, 3), tmp_path)
    with pytest.raises(PartitionReplaced) as refused:
        resume(service)
    assert refused.value.definite
    assert refused.value.code == "FAILED_PRECONDITION"
    assert status(service).replaced


def test_the_new_partition_and_the_others_are_not_replaced(tmp_path: Path) -> None:
    for index, incarnation in ((2, ADMITTED), (0, 3)):
        directory = tmp_path / str(index)
        directory.mkdir()
        service = service_of(replica_of(index, incarnation), directory)
        assert not status(service).replaced
        with pytest.raises(NotFresh):
            resume(service)
    assert replica_of(0, 3).half_replaced() == {2}, "one that serves tells of it when the old one is dead"
