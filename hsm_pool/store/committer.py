"""Group commit: one thread that turns mutations into transactions of the chain (G1).

A transaction compares the head it was built on, so at most one can follow a head. When
the answer is ambiguous, the next sequence in the watch decides: the own transaction id
means committed, another one means not. If none appears, an empty mutation is committed
to force a decision. Nothing is ever retried blindly.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from hsm_pool import limits
from hsm_pool.audit.record import Operation, current
from hsm_pool.core import lifecycle, requests, roles, store_room
from hsm_pool.core.commands import Command, Reply
from hsm_pool.core.model import Record, RecordName, RequestRecord, stored_bytes
from hsm_pool.core.roles import Access
from hsm_pool.core.state import Overlay
from hsm_pool.core.store_room import StoreRoom
from hsm_pool.errors import (
    CommitUnknown,
    LimitExceeded,
    MHSMError,
    NotFresh,
    Overloaded,
    PayloadTooLarge,
    StoreUnavailable,
)
from hsm_pool.store import chain
from hsm_pool.store.etcd_client import Ambiguous, Conflict, EtcdClient
from hsm_pool.store.replica import Replica, Stopped, boot_time

_log = structlog.get_logger()
_QUEUE_MAX = 256
_DECISION_SECONDS = 1.0
"""How long an ambiguous transaction may stay unseen before an empty mutation forces a decision."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """A command with its request id and how its answer is kept.

    ``access`` is what the caller's roles must allow, None for what no customer asked for.
    ``request_key`` is None for commands without a request id (those of the controller).
    ``header`` is the pool header that the command puts in force, b"" for none.
    """

    command: Command
    access: Access | None
    encode_reply: Callable[[Reply], bytes]
    request_key: bytes | None
    request_digest: bytes
    time_ms: int
    header: bytes = b""


@dataclass(slots=True, eq=False)
class _Submission:
    mutation: Mutation
    operation: Operation
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    proposed: bool = False
    abandoned: bool = False
    awaited: int = 0
    reply: bytes = b""
    error: MHSMError | None = None

    def finish(self, awaited: int, reply: bytes = b"", error: MHSMError | None = None) -> None:
        self.awaited, self.reply, self.error = awaited, reply, error
        self.done.set()

    def propose(self) -> bool:
        """Mark as sent; False when the caller has given up already."""
        with self.lock:
            self.proposed = self.proposed or not self.abandoned
            return not self.abandoned

    def abandon(self) -> bool:
        """Give up; return whether it was ever sent."""
        with self.lock:
            self.abandoned = True
            return self.proposed


class Committer:
    """Commits the mutations of one partition. Thread-safe; :meth:`close` ends its thread."""

    def __init__(self, store: EtcdClient, replica: Replica) -> None:
        self._store = store
        self._replica = replica
        self.room: StoreRoom | None = None
        """How full the store was when it was last asked."""
        self._queue: queue.Queue[_Submission] = queue.Queue(_QUEUE_MAX)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; mutations under way end as unknown."""
        self._stopping.set()
        self._replica.stop()
        self._thread.join()

    def submit(self, mutation: Mutation, deadline: float) -> bytes:
        """Commit a mutation and wait until it is acknowledged.

        Args:
            mutation: What to do.
            deadline: On the boot clock.

        Returns:
            The encoded reply; for a repeated request id, the first one.

        Raises:
            CommitUnknown: It was sent and its outcome is not known yet (indefinite).
            StoreUnavailable: It was not sent.
            StoreFull: It could make the pool larger, and the store is nearly full.
            Overloaded: Too many mutations wait.
            NotFresh: This partition cannot decide at the moment; nothing was sent.
            MHSMError: It was refused.
        """
        submission = _Submission(mutation, current() or self._own(type(mutation.command).__name__))
        if self._stopping.is_set():
            raise Stopped
        try:
            self._queue.put_nowait(submission)
        except queue.Full:
            raise Overloaded("too many mutations are under way in this partition") from None
        if not submission.done.wait(max(0.0, deadline - boot_time())) and submission.abandon():
            raise CommitUnknown("the mutation was sent and its outcome is not known yet")
        if not submission.done.is_set():
            raise StoreUnavailable("the store did not take the mutation in time; nothing was sent")
        try:
            self._replica.wait_stable(submission.awaited, deadline)
        except (NotFresh, Stopped):
            if submission.error is not None:
                raise NotFresh("what the answer depends on did not become stable in time") from None
            raise CommitUnknown("the mutation was committed but not acknowledged in time") from None
        if submission.error is not None:
            raise submission.error
        return submission.reply

    def _own(self, name: str) -> Operation:
        """Return the operation of a mutation that nobody asked for."""
        index = self._replica.index
        return Operation(name, f"spiffe://{self._replica.keys.pool_id}/partition/{index}", partition=index)

    def _run(self) -> None:
        waiting: list[_Submission] = []
        while not self._stopping.is_set():
            if not waiting:
                try:
                    waiting.append(self._queue.get(timeout=0.2))
                except queue.Empty:
                    continue
            while len(waiting) < limits.COMMANDS_PER_TRANSACTION_MAX:
                try:
                    waiting.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            try:
                waiting = self._commit(waiting)
            except Stopped:
                break
        self._give_up(waiting)

    def _give_up(self, waiting: list[_Submission]) -> None:
        """Answer whoever still waits when the replica has stopped."""
        self._stopping.set()
        while True:
            for submission in waiting:
                if submission.abandon():
                    error: MHSMError = CommitUnknown("the partition stopped; the outcome is not known")
                else:
                    error = StoreUnavailable("the partition stopped; nothing was sent")
                submission.finish(0, error=error)
            try:
                waiting = [self._queue.get_nowait()]
            except queue.Empty:
                return

    def _commit(self, batch: list[_Submission]) -> list[_Submission]:
        """Commit one transaction of the batch; return what must be decided again."""
        replica = self._replica
        with replica.condition:
            head = replica.head
            accepted, later, changes = self._decide(batch)
            if not accepted:
                return later
            # At most one of a batch is accepted: each compares the header that it replaces.
            header = b"".join(submission.mutation.header for submission, _ in accepted)
            records = [
                submission.operation.record(head.sequence + 1, len(accepted)) for submission, _ in accepted
            ]
            transaction = chain.build_transaction(
                replica.keys, replica.index, head, replica.table, changes, records, header
            )
        if self._settle(head, transaction):
            for submission, reply in accepted:
                submission.operation.on_chain = True
                submission.finish(transaction.sequence, reply)
            return later
        return [submission for submission, _ in accepted] + later

    def _decide(
        self, batch: list[_Submission]
    ) -> tuple[list[tuple[_Submission, bytes]], list[_Submission], dict[RecordName, Record | None]]:
        """Decide every mutation of a batch against the applied state; the caller holds the lock."""
        replica = self._replica
        overlay = Overlay(replica.state)
        accepted: list[tuple[_Submission, bytes]] = []
        later: list[_Submission] = []
        used = 0
        for submission in batch:
            scratch = Overlay(overlay)
            mutation = submission.mutation
            try:
                if mutation.access:
                    # Also before a repeat is answered: who has lost a role learns nothing by it.
                    roles.check(scratch, mutation.access)
                before = mutation.request_key and requests.answered_before(
                    scratch, mutation.request_key, mutation.request_digest
                )
                if before:
                    self._answer(submission, scratch, overlay, later, reply=before.reply)
                    continue
                store_room.check(self.room, mutation.command)
                reply = self._apply(mutation, scratch)
            except MHSMError as error:
                self._answer(submission, scratch, overlay, later, error=error)
                continue
            # Each change costs one operation; the head and the log entry two more.
            room = limits.OPERATIONS_PER_TRANSACTION_MAX - 2 - len(overlay.changes)
            size = sum(stored_bytes(record) for record in scratch.changes.values() if record)
            if size > limits.TRANSACTION_BYTES_MAX:
                refusal = PayloadTooLarge("what this would change does not fit into one transaction")
                submission.finish(0, error=refusal)
            elif accepted and (len(scratch.changes) > room or used + size > limits.GROUP_BYTES_MAX):
                later.append(submission)
            elif submission.propose():
                used += size
                overlay.put(scratch.changes)
                accepted.append((submission, reply))
        return accepted, later, dict(overlay.changes)

    @staticmethod
    def _apply(mutation: Mutation, scratch: Overlay) -> bytes:
        outcome = lifecycle.apply(mutation.command, scratch)
        scratch.put(outcome.changes)
        reply = mutation.encode_reply(outcome.reply)
        if mutation.request_key:
            record = RequestRecord(mutation.request_key, mutation.request_digest, reply, mutation.time_ms)
            # The answer itself is a put; head and log entry are two more.
            room = limits.OPERATIONS_PER_TRANSACTION_MAX - 3 - len(scratch.changes)
            scratch.put(requests.remember(scratch, record, room))
        return reply

    def _answer(
        self,
        submission: _Submission,
        scratch: Overlay,
        overlay: Overlay,
        later: list[_Submission],
        reply: bytes = b"",
        error: MHSMError | None = None,
    ) -> None:
        """Give an answer that changes nothing, or put it off when it rests on this very batch."""
        replica = self._replica
        counted = isinstance(error, LimitExceeded) and overlay.changes
        if counted or scratch.reads & overlay.changes.keys():
            later.append(submission)
        elif not replica.lease_remaining():
            submission.finish(0, error=NotFresh("this partition holds no freshness lease at the moment"))
        else:
            submission.finish(replica.awaited(scratch.reads, error), reply, error)

    def _settle(self, head: chain.Head, transaction: chain.Transaction) -> bool:
        """Send a transaction and find out whether it was committed.

        Raises:
            Stopped: The partition shuts down before that is known.
        """
        try:
            answer = self._store.transact(chain.HEAD_KEY, head.value, transaction.puts, transaction.deletes)
            ambiguous = False
            if isinstance(answer, Conflict):
                _log.debug("commit conflict", sequence=transaction.sequence)
        except Ambiguous as error:
            ambiguous = True
            _log.info("commit ambiguous", sequence=transaction.sequence, cause=str(error))
        while not self._replica.wait_applied(transaction.sequence, _DECISION_SECONDS):
            if ambiguous:
                self._force_decision(head)
        if self._stopping.is_set() or self._replica.head.sequence < transaction.sequence:
            raise Stopped
        committed = self._replica.transaction_at(transaction.sequence) == transaction.transaction_id
        if ambiguous:
            _log.info("commit resolved", sequence=transaction.sequence, committed=committed)
        return committed

    def _force_decision(self, head: chain.Head) -> None:
        replica = self._replica
        with replica.condition:
            if replica.head.sequence != head.sequence:
                return
            record = self._own("ChainDecision").record(head.sequence + 1, 1)
            empty = chain.build_transaction(replica.keys, replica.index, head, replica.table, {}, [record])
        try:
            self._store.transact(chain.HEAD_KEY, head.value, empty.puts)
        except Ambiguous:
            return
