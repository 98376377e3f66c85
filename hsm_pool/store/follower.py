"""The threads that keep a replica in step with the store: follow and renew.

They own the only decision about tampering: a revision that does not fit is answered by
loading the whole table once; if that does not fit either, the partition is quarantined.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from hsm_pool import limits
from hsm_pool.errors import AuditUnavailable
from hsm_pool.store import chain
from hsm_pool.store.etcd_client import Ambiguous, Compacted, Conflict, EtcdClient
from hsm_pool.store.replica import Replica
from hsm_pool.store.sealing import RolledBack, Tampered
from hsm_pool.store.state_file import StateDirectory

_log = structlog.get_logger()
_RECONNECT_SECONDS = 0.05
_STALL_SECONDS = 0.7
"""A committed renewal that the watch has not delivered after this long: the watch is stuck."""
_LAGGING_READS_MAX = 4
_LAGGING_READ_SECONDS = 0.5
_UNRECORDED_SECONDS = 0.25
"""How often it is asked whether the audit log can be written again."""


class Follower:
    """Drives one replica. :meth:`close` ends its threads."""

    def __init__(
        self,
        store: EtcdClient,
        replica: Replica,
        state: StateDirectory,
        on_tampered: Callable[[str], None],
    ) -> None:
        self._store = store
        self._replica = replica
        self._state = state
        self._on_tampered = on_tampered
        self._stopping = threading.Event()
        self._renew_now = threading.Event()
        self._watch_stop = threading.Event()
        self._noted_sequence = 0
        self._loaded = threading.Event()
        replica.on_applied = self._renew_now.set
        self._threads = [
            threading.Thread(target=self._guarded(target), name=name, daemon=True)
            for name, target in (("follower", self._follow), ("renewer", self._renew))
        ]

    def start(self) -> None:
        """Start following and renewing."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads."""
        self._stopping.set()
        self._watch_stop.set()
        self._renew_now.set()
        self._loaded.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _guarded(self, target: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                target()
            except Tampered as error:
                self._stopping.set()
                self._watch_stop.set()
                self._renew_now.set()
                self._loaded.set()
                self._replica.stop()
                _log.error("store tampered with", reason=str(error))
                self._on_tampered(str(error))

        return run

    def _follow(self) -> None:
        # The head that was noted on the own disk; None only before the very first start.
        noted = self._state.read_head(self._replica.keys)
        self._load(noted)
        while not self._stopping.is_set():
            try:
                self._watch()
            except Compacted:
                self._load(self._applied())
            except Tampered as error:
                # A lost or doubled event looks the same: the whole table decides.
                _log.warning("a revision does not fit; loading the table", reason=str(error))
                self._load(self._applied())
            except AuditUnavailable:
                self._await_audit_log()
                self._load(self._applied())
            except Ambiguous as error:
                _log.debug("watch broken", cause=str(error))
                self._stopping.wait(_RECONNECT_SECONDS)

    def _await_audit_log(self) -> None:
        """Apply nothing that could not be put on record; the lease is surrendered meanwhile."""
        self._renew_now.set()
        while self._replica.mutation_log.refuses and not self._stopping.is_set():
            self._stopping.wait(_UNRECORDED_SECONDS)

    def _applied(self) -> tuple[int, bytes]:
        head = self._replica.head
        return head.sequence, head.digest

    def _load(self, known: tuple[int, bytes] | None) -> None:
        """Load the whole table, as soon as the store answers.

        Raises:
            Tampered: It is not what the chain says, or lacks the known head.
        """
        lagging = 0
        while not self._stopping.is_set():
            try:
                revision, values = self._store.load()
                self._replica.load(revision, values, known)
                break
            except Ambiguous:
                self._stopping.wait(_RECONNECT_SECONDS)
            except AuditUnavailable:
                self._await_audit_log()
            except RolledBack:
                # Reads of etcd may lag behind (3.4 has a known bug); a rollback stays.
                lagging += 1
                if lagging == _LAGGING_READS_MAX:
                    raise
                self._stopping.wait(_LAGGING_READ_SECONDS)
        else:
            return
        self._loaded.set()
        self._renew_now.set()
        _log.info("loaded", sequence=self._replica.head.sequence, revision=revision)

    def _watch(self) -> None:
        stop = threading.Event()
        self._watch_stop = stop
        if self._stopping.is_set():
            return
        for revision in self._store.watch(self._replica.revision + 1, stop):
            if revision is not None:
                self._replica.apply(revision)
            if self._stopping.is_set():
                return

    def _renew(self) -> None:
        self._loaded.wait()
        counter = 0
        surrendered = False
        while not self._stopping.is_set():
            self._renew_now.clear()
            # A surrendered partition stays silent: nobody waits for its lease.
            if not (surrendered and self._replica.withdrawn):
                counter += 1
                surrendered = self._renew_once(counter)
            self._renew_now.wait(limits.RENEWAL_SECONDS)

    def _renew_once(self, counter: int) -> bool:
        """Send one renewal; return whether it surrendered the lease for good."""
        replica = self._replica
        renewal = replica.new_renewal(counter)
        self._note_head(renewal.applied_sequence, renewal.head_digest)
        try:
            answer = self._store.transact(
                None,
                None,
                {f"{chain.FRESH_PREFIX}{replica.index}": renewal.SerializeToString(deterministic=True)},
                read_key=chain.HEAD_KEY,
            )
        except Ambiguous as error:
            _log.debug("renewal ambiguous", cause=str(error))
            return False
        if isinstance(answer, Conflict):
            return False
        replica.renewal_committed(counter, answer.read)
        with replica.condition:
            arrived = replica.condition.wait_for(
                lambda: replica.revision >= answer.revision or self._stopping.is_set(), _STALL_SECONDS
            )
        if arrived and not renewal.lease_remaining_ms and replica.lease_remaining():
            self._renew_now.set()  # the others learn at once that this one serves
        if not arrived:
            _log.warning("watch stuck; going to another member")
            self._store.watch_stalled()
            self._watch_stop.set()
        return renewal.surrendered

    def _note_head(self, sequence: int, digest: bytes) -> None:
        """Put the head on the own disk before a renewal reports it (G6, rollback)."""
        if sequence != self._noted_sequence:
            self._state.write_head(self._replica.keys, sequence, digest)
            self._noted_sequence = sequence
