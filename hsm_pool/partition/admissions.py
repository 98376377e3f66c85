"""Admits a new partition in place of a dead one: decided on the chain, then done in the store.

1. The core decides (:mod:`hsm_pool.core.membership`): the other one holds no lease, two go on
   serving. The record names the store member that goes.
2. That member is removed from the store and a new one is added at the same address.
3. A second mutation says that it is done. Only then does the node agent of the dead
   partition learn of it, put its data directories aside and start empty: a member that came
   back with its old id and without its data would break what the store promises.

Each step may be repeated by anybody after any crash.
"""

from __future__ import annotations

from hsm_pool.core.commands import AdmitPartition, Command, CompleteAdmission
from hsm_pool.errors import CommitUnknown
from hsm_pool.partition.serving import Serving
from hsm_pool.store.committer import Mutation
from hsm_pool.store.etcd_client import Ambiguous, EtcdClient


def admit(
    serving: Serving, store: EtcdClient, member_peer_urls: tuple[str, ...], index: int, deadline: float
) -> None:
    """Admit a new partition of this index.

    Args:
        serving: The partition that does it; it serves itself.
        store: Its store.
        member_peer_urls: Peer URL of each partition's store member; empty when the store is external.
        index: The dead partition.
        deadline: On the boot clock.

    Raises:
        PartitionServes: The partition of that index serves.
        FloorOfTwo: Fewer than two others serve.
        LimitExceeded: It was replaced too often, or too often lately.
        CommitUnknown: It may be done in part; a repeat goes on with it.
    """
    replica = serving.replica
    peer_url = member_peer_urls[index] if member_peer_urls else ""
    try:
        member_id = store.members().get(peer_url, 0) if peer_url else 0
        incarnation = replica.peer_incarnation(index) + 1
        command = AdmitPartition(serving.now_ms(), index, incarnation, member_id, replica.await_serving())
        _commit(serving, command, deadline)
        admission = replica.state.pool().admissions[index]
        if admission.ready:
            return
        if peer_url:
            store.replace_member(admission.member_id, peer_url)
    except Ambiguous:
        raise CommitUnknown("the store's members may or may not have been changed; repeat it") from None
    _commit(serving, CompleteAdmission(index, admission.number), deadline)


def _commit(serving: Serving, command: Command, deadline: float) -> None:
    serving.committer.submit(Mutation(command, None, lambda _: b"", None, b"", 0), deadline)
