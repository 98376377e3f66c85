"""What a download without proofs answers when another one overtakes it (G4).

The moment lies between the commit of the one and its answer; on a real pool it cannot be held open,
so the partition around the decision is a stand-in here. tests/integration/test_rest_security_domain.py
has the whole.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from hsm_pool.core.roles import Access
from hsm_pool.errors import CeremonyState
from hsm_pool.partition.ceremonies import request_digest
from hsm_pool.partition.unproved_download import _WITHOUT_PROOFS, UnprovedDownload
from hsm_pool.store.replica import boot_time
from mhsm.record.v1 import record_pb2

MINE, OTHER = [b"my officers"], [b"somebody else's officers"]


def header(generation: int, certificates: list[bytes]) -> record_pb2.PoolHeader:
    return record_pb2.PoolHeader(
        generation=generation,
        unconfirmed=True,
        activation_request_digest=request_digest(certificates, 2, _WITHOUT_PROOFS),
        azure_security_domain_file=certificates[0],
    )


class Partition:
    """Holds the keys; its header becomes the other one while an answer waits for a second holder."""

    def __init__(self, first: record_pb2.PoolHeader, then: record_pb2.PoolHeader) -> None:
        self.header, self._then = first, then
        self.unconfirmed = True
        self._replica = SimpleNamespace(condition=threading.Condition(), serving=self._serving)

    def _serving(self) -> frozenset[int]:
        self.header = self._then
        return frozenset((0, 1))

    def holding_keys(self) -> Any:
        return SimpleNamespace(replica=self._replica)


def download(first: record_pb2.PoolHeader, then: record_pb2.PoolHeader) -> record_pb2.PoolHeader:
    partition: Any = Partition(first, then)
    access: Any = Access
    return UnprovedDownload(partition, SimpleNamespace()).download(MINE, 2, access, boot_time() + 10)  # type: ignore[arg-type]


def test_a_download_that_was_overtaken_says_so() -> None:
    """Its caller would keep a file whose shares are other officers', and open nothing with his."""
    with pytest.raises(CeremonyState, match="replaced this one"):
        download(header(1, MINE), header(2, OTHER))


def test_a_download_that_nobody_overtook_answers_with_its_own_file() -> None:
    mine = header(1, MINE)
    assert download(mine, mine).azure_security_domain_file == MINE[0]
