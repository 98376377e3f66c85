"""The state a partition has applied, and what it may therefore say (G2, G6).

One thread, the follower, feeds it revisions in order; serving threads consult it. Every
change of a record is checked against the chain before it is applied; whatever does not
fit raises :class:`~hsm_pool.store.sealing.Tampered` and nothing is applied.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hsm_pool import limits, waiting
from hsm_pool.core import membership
from hsm_pool.core.freshness import (
    FreshnessTracker,
    PeerRenewal,
    agreed_clock_offset,
    clock_skew_seconds,
)
from hsm_pool.core.model import POOL, PoolRecord, Record, RecordName
from hsm_pool.core.state import Overlay, State, View
from hsm_pool.errors import LimitExceeded, MHSMError, NotFresh, PartitionDrained
from hsm_pool.store import chain, loading
from hsm_pool.store.chain import Head, TableDigest
from hsm_pool.store.etcd_client import Revision
from hsm_pool.store.sealing import PoolKeys, Tampered
from mhsm.record.v1 import record_pb2

T = TypeVar("T")
R = TypeVar("R")

_RENEWAL_LABEL = b"mhsm/renewal/v1"
_ANSWER_TRIES = 5
"""How often an answer is made anew when what it rests on changed meanwhile."""
_LEASE_WAIT_SECONDS = 0.5
"""How long a call waits for the partition's lease before it is sent to another partition."""
_WORD_SECONDS = 2 * limits.RENEWAL_SECONDS
"""Within that time each partition that holds a lease says so."""


def boot_time() -> float:
    """Return seconds on the clock that also counts suspension (leases are measured on it)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Consulted(Generic[T]):
    """A decision and the records it rests on."""

    value: T
    basis: Mapping[RecordName, Record | None]


class Stopped(Exception):
    """The replica was shut down or quarantined while a call waited."""


class MutationLog(Protocol):
    """Where the audit records of applied mutations go, before anything says that they are applied (G7)."""

    sequence: int
    """Newest sequence whose records are there."""

    @property
    def refuses(self) -> bool:
        """Whether nothing can be put on record, so that this partition must not serve."""

    def append_mutations(self, sequence: int, records: Sequence[bytes]) -> None:
        """Append the records of a transaction; a repeat does nothing.

        Raises:
            AuditUnavailable: They could not be written.
        """


def _lease_seconds(renewal: record_pb2.Renewal) -> float:
    """Return how long the lease lasted that the sender of a renewal had when it was written."""
    if not renewal.HasField("lease_remaining_ms"):
        return limits.LEASE_SECONDS  # older firmware: a roll-out that was begun must not be stuck
    return min(limits.LEASE_SECONDS, renewal.lease_remaining_ms / 1000)


class _NoLog:
    """For replicas that nobody serves from."""

    sequence = 0
    refuses = False

    def append_mutations(self, sequence: int, records: Sequence[bytes]) -> None:
        """Forget them."""


class Replica:
    """Applied state, chain position and freshness of one partition. Thread-safe."""

    def __init__(self, keys: PoolKeys, index: int, incarnation: int) -> None:
        self.keys = keys
        self.index = index
        self.incarnation = incarnation
        self.condition = threading.Condition()
        self.state = State()
        self.table = TableDigest()
        self.head = Head(0, chain.genesis_digest(keys.pool_id), b"")
        self.revision = 0
        self.tracker = FreshnessTracker(index)
        self.pool_time_ms = 0
        self._names: dict[bytes, RecordName] = {}
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        self._fresh_until = 0.0
        self._sent: dict[int, float] = {}
        self._seen: dict[int, bytes] = {}
        self._clocks: dict[int, tuple[float, float]] = {}
        self._peer_revisions: dict[int, int] = {}
        self._drained = False
        self._stopped = False
        self.mutation_log: MutationLog = _NoLog()
        self.on_applied: Callable[[], None] = lambda: None
        self.on_removed: Callable[[RecordName], None] = lambda _: None
        self.on_header: Callable[[bytes], None] = lambda _: None
        self.on_loaded: Callable[[PoolRecord], None] = lambda _: None
        """Called with what was loaded, before anything of it may be served."""

    # -- following the store -------------------------------------------------------------

    def load(self, revision: int, values: Mapping[str, bytes], known: tuple[int, bytes] | None) -> None:
        """Take over a whole table that was read at one revision.

        Args:
            revision: Revision of the table.
            values: All keys of the pool.
            known: (sequence, digest) of a head that the store must contain, if one is known.

        Raises:
            Tampered: The table is not what the chain says, or lacks the known head.
            MissingEpoch: It is of an epoch whose key is not here.
        """
        loaded = loading.read_table(self.keys, values, known)
        head, state = loaded.head, loaded.state
        if known is None:
            self._check_first_start(values, state.pool())
        with self.condition:
            for name in set(self.state.names()).difference(state.names()):
                self.on_removed(name)
            recorded = self.mutation_log.sequence
            for sequence, records in loading.audit_records(self.keys, values, head, recorded):
                self.mutation_log.append_mutations(sequence, records)
            self.keys.epoch = head.epoch
            self.state, self.table, self._names = state, loaded.table, loaded.names
            self.head, self.revision = head, revision
            self._recent = loaded.recent
            self._fresh_until = 0.0
            self._sent.clear()
            self._seen.clear()
            renewals = [
                self._read_renewal(value)
                for key, value in values.items()
                if key.startswith(chain.FRESH_PREFIX)
            ]
            for renewal in renewals:
                if not self._observe_renewal(renewal, of_now=False):
                    # It counted where it was written, perhaps: so its sender may hold a lease. A dead
                    # one never renews under the keys of now, and who it was is known from this alone.
                    index, incarnation = renewal.partition_index, renewal.incarnation
                    if not membership.may_be_of(state.pool(), index, incarnation):
                        incarnation = 0
                    self.tracker.observe_unproved(index, boot_time(), incarnation)
            written = sorted(renewal.wall_time_ms for renewal in renewals if renewal.epoch == self.keys.epoch)
            if len(written) > 1:
                self.pool_time_ms = max(self.pool_time_ms, written[-2])
            # They were written at an unknown time: no clock can be compared with them.
            self._clocks.clear()
            self._note_drained()
            self.tracker.reset(head.sequence, boot_time())
            self.condition.notify_all()
        self.on_header(loaded.header)
        self.on_loaded(state.pool())
        self.on_applied()

    def _check_first_start(self, values: Mapping[str, bytes], pool: PoolRecord) -> None:
        """Accept that no head was ever noted here, if this partition is new or was newly admitted (G6).

        A head is noted before the first renewal, so a partition that has renewed had one: its disk
        was lost or exchanged, and with it the only thing that shows a rollback of the store.
        """
        value = values.get(f"{chain.FRESH_PREFIX}{self.index}")
        if value is None:
            return
        last = self._read_renewal(value)
        admission = pool.admissions.get(self.index)
        if admission is None or not admission.ready or last.incarnation >= admission.incarnation:
            raise Tampered(
                "the state file of this partition is gone and no new incarnation was admitted: "
                "replace the partition"
            )

    def apply(self, revision: Revision) -> None:
        """Apply everything one revision changed.

        Raises:
            Tampered: It does not fit the chain.
        """
        values = {change.key: change.value for change in revision.changes}
        with self.condition:
            if revision.revision <= self.revision:
                return
            if chain.HEAD_KEY in values:
                self._apply_transaction(values)
            else:
                for key in values:
                    if not key.startswith(chain.FRESH_PREFIX):
                        raise Tampered(f"{key.split('/')[0]} was changed outside the chain")
            for key, value in values.items():
                if key.startswith(chain.FRESH_PREFIX) and value is not None:
                    renewal = self._read_renewal(value)
                    if self._observe_renewal(renewal):
                        self._advance_pool_time(renewal.wall_time_ms)
            self.revision = revision.revision
            self.tracker.advance(boot_time())
            self.condition.notify_all()
        header = values.get(chain.HEADER_KEY)
        if header:
            self.on_header(header)
        if chain.HEAD_KEY in values:
            self.on_applied()

    def _apply_transaction(self, values: Mapping[str, bytes | None]) -> None:
        head_value = values[chain.HEAD_KEY]
        if head_value is None:
            raise Tampered("the head of the chain was deleted")
        head = chain.read_head(self.keys, head_value)
        log_value = values.get(chain.log_key(head.sequence))
        if log_value is None or chain.value_digest(log_value) != head.digest:
            raise Tampered(f"the head of sequence {head.sequence} came without its log entry")
        entry = chain.read_log_entry(self.keys, log_value)
        chain.check_link(self.head, entry)
        epochs = range(entry.epoch, entry.epoch + 1)
        digests: list[tuple[bytes, bytes]] = []
        changes: dict[RecordName, Record | None] = {}
        expected = {chain.HEAD_KEY, chain.log_key(head.sequence)}
        new_names: dict[bytes, RecordName] = {}
        for change in entry.changes:
            key = chain.record_key(change.opaque_id)
            expected.add(key)
            if change.old_digest != self.table.get(change.opaque_id):
                raise Tampered(f"sequence {head.sequence} changes a record that is not here")
            digests.append((change.opaque_id, change.new_digest))
            if not change.new_digest:
                changes[self._names[change.opaque_id]] = None
                continue
            value = values.get(key)
            if value is None or chain.value_digest(value) != change.new_digest:
                raise Tampered(f"a record of sequence {head.sequence} is not the one its log entry names")
            _, name, record = loading.open_as_record(self.keys, change.opaque_id, value, epochs)
            changes[name] = record
            new_names[change.opaque_id] = name
        expected |= self._check_header(values.get(chain.HEADER_KEY), changes.get(POOL))
        if set(values) - expected:
            raise Tampered(f"sequence {head.sequence} came with records that its log entry does not name")
        if self.table.after(digests) != entry.table_digest:
            raise Tampered(f"the table after sequence {head.sequence} is not the one its log entry names")
        pool = changes.get(POOL)
        in_force = pool.epoch if isinstance(pool, PoolRecord) else self.keys.epoch
        if not head.epoch == entry.epoch == in_force:
            raise Tampered(f"sequence {head.sequence} is not of the epoch that is in force after it")
        self.mutation_log.append_mutations(head.sequence, chain.read_audit(self.keys, entry))
        self.keys.epoch = in_force
        self.table.update(digests)
        self.state.apply(changes)
        self._names.update(new_names)
        for name, changed in changes.items():
            if changed is None:
                del self._names[self.keys.opaque_id(name)]
                self.on_removed(name)
        self.head = head
        self._recent[head.sequence] = entry.transaction_id
        while len(self._recent) > loading.RECENT_TRANSACTIONS:
            self._recent.popitem(last=False)
        self._note_drained()
        self.tracker.applied(head.sequence, tuple(changes), boot_time())

    def _check_header(self, header: bytes | None, pool: Record | None) -> set[str]:
        """Check that the pool header changes exactly when the pool record names another one."""
        old = self.state.pool().header_digest
        new = pool.header_digest if isinstance(pool, PoolRecord) else old
        if new == old:
            return set()  # a header that comes all the same is one that the log entry does not name
        if header is None or chain.value_digest(header) != new:
            raise Tampered("the pool header is not the one that the chain names")
        return {chain.HEADER_KEY}

    def _note_drained(self) -> None:
        self._drained = self.index in self.state.pool().drained
        if self._drained:
            self._fresh_until = 0.0

    # -- freshness -----------------------------------------------------------------------

    def new_renewal(self, counter: int) -> record_pb2.Renewal:
        """Return a renewal of what is applied now, and note the moment before it is sent."""
        with self.condition:
            renewal = record_pb2.Renewal(
                partition_index=self.index,
                incarnation=self.incarnation,
                counter=counter,
                applied_sequence=self.head.sequence,
                head_digest=self.head.digest,
                wall_time_ms=time.time_ns() // 1_000_000,
                surrendered=self.withdrawn,
                applied_revision=self.revision,
                epoch=self.keys.epoch,
                lease_remaining_ms=0 if self.withdrawn else int(1000 * self.lease_remaining()),
            )
            content = renewal.SerializeToString(deterministic=True)
            renewal.mac = self.keys.mac(renewal.epoch, _RENEWAL_LABEL, content)
            if renewal.surrendered:
                # Nor may a renewal that is still under way bring the lease back.
                self._fresh_until = 0.0
                self._sent.clear()
                self._seen.clear()
                return renewal
            self._sent[counter] = boot_time()
            for old in [sent for sent in self._sent if sent < counter - 50]:
                del self._sent[old]
                self._seen.pop(old, None)
            return renewal

    def renewal_committed(self, counter: int, head_value: bytes | None) -> None:
        """Take the answer to a renewal: the head that stood in the store when it was committed."""
        with self.condition:
            if counter in self._seen:
                if self._seen[counter] != head_value:
                    raise Tampered("the watch delivered a renewal before the mutations committed before it")
                self._extend(counter)
            else:
                self._seen[counter] = head_value or b""

    def _advance_pool_time(self, wall_time_ms: int) -> None:
        """Take the time of a renewal, unless its clock is ahead of the one that a majority agrees on."""
        agreed_ms = self.agreed_time_ms()
        if agreed_ms is None or wall_time_ms <= agreed_ms + 1000 * limits.CLOCK_SKEW_SECONDS_MAX:
            self.pool_time_ms = max(self.pool_time_ms, wall_time_ms)

    def _observe_renewal(self, renewal: record_pb2.Renewal, *, of_now: bool = True) -> bool:
        """Take a renewal if it is of the epoch in force here; return whether it is.

        All partitions see it at the same place of the store's order, so all of them, its sender
        too, take it or leave it: one that an activation has overtaken gives nobody a lease.
        One that was found in a table was written at an unknown time: it says that its sender may
        hold a lease, not that it does.
        """
        if renewal.epoch != self.keys.epoch:
            return False
        now = boot_time()
        self._clocks[renewal.partition_index] = (renewal.wall_time_ms / 1000 - now, now)
        if renewal.partition_index == self.index:
            if renewal.incarnation == self.incarnation:
                self._own_renewal_returned(renewal.counter)
            return True
        news = PeerRenewal(
            renewal.incarnation,
            renewal.counter,
            renewal.applied_sequence,
            renewal.surrendered,
            now,
            now + _lease_seconds(renewal) if of_now else 0.0,
        )
        if self.tracker.observe_renewal(renewal.partition_index, news):
            self._peer_revisions[renewal.partition_index] = renewal.applied_revision
        return True

    def _read_renewal(self, value: bytes) -> record_pb2.Renewal:
        try:
            renewal = record_pb2.Renewal.FromString(value)
        except Exception:  # noqa: BLE001 - the protobuf parser's own error
            raise Tampered("a renewal is not readable") from None
        mac, renewal.mac = renewal.mac, b""
        content = renewal.SerializeToString(deterministic=True)
        self.keys.check_mac(renewal.epoch, _RENEWAL_LABEL, content, mac, "a renewal")
        return renewal

    def _own_renewal_returned(self, counter: int) -> None:
        if counter in self._seen:  # the answer came first
            if self._seen[counter] != self.head.value:
                raise Tampered("the watch delivered a renewal before the mutations committed before it")
            self._extend(counter)
        elif counter in self._sent:
            self._seen[counter] = self.head.value

    def _extend(self, counter: int) -> None:
        sent_at = self._sent.pop(counter, None)
        self._seen.pop(counter, None)
        if sent_at is None or self.withdrawn:
            return
        if self._clock_is_off():
            return
        self._fresh_until = max(self._fresh_until, sent_at + limits.LEASE_SECONDS)
        self.condition.notify_all()

    def _clock_is_off(self) -> bool:
        """Return whether the own clock is too far from the median of the clocks that were heard of lately."""
        return clock_skew_seconds(self._heard_clocks(), self.index) > limits.CLOCK_SKEW_SECONDS_MAX

    def _heard_clocks(self) -> dict[int, float]:
        """Return the clocks of renewals that arrived lately, by partition, as offsets to the boot clock."""
        now = boot_time()
        return {
            index: offset
            for index, (offset, heard_at) in self._clocks.items()
            if now - heard_at < limits.LEASE_SECONDS
        }

    def agreed_time_ms(self) -> int | None:
        """Return the time that a majority of the partitions agrees on, Unix milliseconds.

        What cannot be undone waits for it: purges and rotations. It never is ahead of the second clock
        of three. None while fewer than two clocks were heard of lately.
        """
        with self.condition:
            offset = agreed_clock_offset(self._heard_clocks(), membership.PARTITIONS)
        return None if offset is None else int((offset + boot_time()) * 1000)

    def lease_remaining(self) -> float:
        """Return for how many seconds this partition may still serve; 0.0 when it may not."""
        return max(0.0, self._fresh_until - boot_time())

    @property
    def drained(self) -> bool:
        """Whether this partition is drained, as of the applied state."""
        return self._drained

    @property
    def withdrawn(self) -> bool:
        """Whether this partition holds no lease by its own will: drained, stopped, without an audit log."""
        return self._drained or self._stopped or self.mutation_log.refuses

    def peer_exited(self, index: int, incarnation: int) -> None:
        """Take a node agent's exit notice."""
        with self.condition:
            self.tracker.observe_exit(index, incarnation)
            self.tracker.advance(boot_time())
            self.condition.notify_all()

    def serving(self) -> frozenset[int]:
        """Return the partitions that do hold a lease, itself included: the floor of two counts these (G5)."""
        with self.condition:
            return self.tracker.serving(boot_time()) | self._itself()

    def await_serving(self) -> frozenset[int]:
        """Return the partitions that do hold a lease, when all that may hold one have said so or had time to.

        A partition that has just started has not heard of the others yet.
        """
        with self.condition:
            self.condition.wait_for(
                lambda: self._stopped or self.serving() == self.lease_holders(), _WORD_SECONDS
            )
            return self.serving()

    def lease_holders(self) -> frozenset[int]:
        """Return the partitions that may hold a lease, itself included."""
        with self.condition:
            return self.tracker.lease_holders(boot_time()) | self._itself()

    def _itself(self) -> frozenset[int]:
        return frozenset({self.index} if self.lease_remaining() else ())

    def peer_incarnation(self, index: int) -> int:
        """Return the newest incarnation of another partition that was seen, 0 for none."""
        with self.condition:
            return self.tracker.incarnation_seen(index)

    def half_replaced(self) -> frozenset[int]:
        """Return the partitions in whose place a new one was admitted that was not seen yet.

        It may be this very one, of before the admission.
        """
        with self.condition:
            seen = {index: self.tracker.incarnation_seen(index) for index in self.tracker.peers()}
            return membership.half_replaced(self.state.pool(), {**seen, self.index: self.incarnation})

    def boot_count_min(self, index: int) -> int:
        """Return the least that evidence of another partition may say of its starts."""
        return membership.boot_count_min(self.state.pool(), index, self.peer_incarnation(index))

    def is_housekeeper(self) -> bool:
        """Return whether this partition holds the housekeeping role, as far as it knows.

        Two that both believe so do no harm: compaction and restores bear a repeat, and due work
        is decided again on the state that it is committed on.
        """
        return membership.housekeeper(self.state.pool().housekeeper, self.serving()) == self.index

    def compaction_revision(self) -> int:
        """Return the revision below which no partition that was ever seen needs the store."""
        with self.condition:
            live = self.tracker.lease_holders(boot_time())
            return min([self.revision] + [self._peer_revisions[i] for i in live if i in self._peer_revisions])

    # -- consulting ----------------------------------------------------------------------

    def consult(self, decide: Callable[[View], T], deadline: float) -> Consulted[T]:
        """Decide something on state that is applied, fresh and not pending.

        Args:
            decide: Reads the view and returns a value or raises a typed refusal.
            deadline: When to give up, on the boot clock.

        Raises:
            NotFresh: No lease, or what was read did not become stable in time.
            PartitionDrained: This partition is drained.
            MHSMError: Whatever decide raised, once what it rests on was stable.
        """
        with self.condition:
            while True:
                self._await_lease(deadline)
                overlay = Overlay(self.state)
                error: MHSMError | None = None
                value: T | None = None
                try:
                    value = decide(overlay)
                except MHSMError as refusal:
                    error = refusal
                if isinstance(error, LimitExceeded):
                    # It rests on all that was counted, as of now: what comes meanwhile is not waited for.
                    self._wait_stable(self.head.sequence, deadline)
                    self._await_lease(deadline)
                    raise error
                awaited = self.awaited(overlay.reads)
                if awaited <= self.tracker.stable_sequence:
                    if error is not None:
                        raise error
                    basis = {name: self.state.get(name) for name in overlay.reads}
                    return Consulted(value, basis)  # type: ignore[arg-type]
                self._wait_stable(awaited, deadline)

    def awaited(self, reads: Collection[RecordName], error: MHSMError | None = None) -> int:
        """Return the sequence that has to be stable before an answer leaves (G2); the caller holds the lock.

        Args:
            reads: The records that were read for it.
            error: The refusal that it is. That of a limit counts records that were not read.
        """
        if isinstance(error, LimitExceeded):
            return self.head.sequence
        return max((self.tracker.pending_sequence(name) for name in reads), default=0)

    def answer(
        self, decide: Callable[[View], T], compute: Callable[[T], R], deadline: float, changing: str
    ) -> R:
        """Compute an answer on a decision; anew, while what the decision rests on changes meanwhile (G2).

        Args:
            decide: See :meth:`consult`.
            compute: Makes the answer of what was decided; it leaves only if that still holds afterwards.
            deadline: When to give up, on the boot clock.
            changing: Words of the refusal: what kept changing.

        Raises:
            NotFresh: No lease, or it kept changing.
            MHSMError: Whatever decide or compute raised.
        """
        for _ in range(_ANSWER_TRIES):
            consulted = self.consult(decide, deadline)
            answer = compute(consulted.value)
            if self.unchanged(consulted):
                return answer
        raise NotFresh(changing)

    def unchanged(self, consulted: Consulted[T]) -> bool:
        """Return whether a result that rests on this decision may still leave (G2)."""
        state = self.state
        return self.lease_remaining() > 0 and all(
            state.get(name) is record for name, record in consulted.basis.items()
        )

    def consult_all(self, decide: Callable[[State], T], deadline: float) -> T:
        """Decide something on the whole state: note what is applied, wait until it is stable."""
        with self.condition:
            self._await_lease(deadline)
            noted = self.head.sequence
            value = decide(self.state)
            self._wait_stable(noted, deadline)
            self._await_lease(deadline)
            return value

    def wait_stable(self, sequence: int, deadline: float) -> None:
        """Wait until a sequence is stable.

        Raises:
            NotFresh: It did not become stable in time.
            Stopped: The replica was shut down.
        """
        with self.condition:
            self._wait_stable(sequence, deadline)

    def wait_applied(self, sequence: int, timeout_seconds: float) -> bool:
        """Wait until a sequence is applied; return whether it is."""
        with self.condition:
            return self.condition.wait_for(
                lambda: self._stopped or self.head.sequence >= sequence, timeout_seconds
            )

    def transaction_at(self, sequence: int) -> bytes | None:
        """Return the id of a recently applied transaction."""
        with self.condition:
            return self._recent.get(sequence)

    def stop(self) -> None:
        """Serve nothing any more; waiting calls fail."""
        with self.condition:
            self._stopped = True
            self._fresh_until = 0.0
            self.condition.notify_all()

    @property
    def stopped(self) -> bool:
        """Whether it serves nothing any more: the partition is quarantined or shut down."""
        return self._stopped

    def _await_lease(self, deadline: float) -> None:
        until = min(deadline, boot_time() + _LEASE_WAIT_SECONDS)
        while not self.lease_remaining():
            if self._stopped:
                raise Stopped
            if self._drained:
                raise PartitionDrained("this partition is drained; another one serves")
            remaining = until - boot_time()
            if remaining <= 0:
                raise NotFresh("this partition holds no freshness lease at the moment")
            with waiting.idle():
                self.condition.wait(remaining)

    def _wait_stable(self, sequence: int, deadline: float) -> None:
        while self.tracker.stable_sequence < sequence:
            if self._stopped:
                raise Stopped
            now = boot_time()
            if self.tracker.advance(now):
                self.condition.notify_all()
                continue
            if now >= deadline:
                raise NotFresh("what the answer depends on did not become stable in time")
            release = self.tracker.next_release()
            wake = deadline if release is None else min(deadline, release)
            with waiting.idle():
                self.condition.wait(max(0.001, wake - now))
