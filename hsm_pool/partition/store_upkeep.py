"""Keeps the store from filling up, and brings it back when it did.

Every partition asks how full the store is and tells its committer. The one that does the housekeeping
compacts: at intervals, and sooner when much was written. A member whose file nears the quota is
defragmented, and the alarm of one that met it is disarmed: none of it needs a write, so it also brings
back a pool in which nobody can renew a lease. While nobody serves, every partition does it: a repeat
does no harm, and a partition whose next revision was compacted away loads the table.
"""

from __future__ import annotations

import structlog

from hsm_pool.core.store_room import StoreRoom
from hsm_pool.partition.passes import Passes
from hsm_pool.settings import StoreSettings
from hsm_pool.store.committer import Committer
from hsm_pool.store.etcd_client import Ambiguous, EtcdClient, MemberStatus
from hsm_pool.store.replica import Replica, Stopped, boot_time

_log = structlog.get_logger()
_POLL_SECONDS = 1.0
_COMPACT_SECONDS = 60.0
_COMPACT_FULL_SECONDS = 5.0
"""How often a full store is compacted: it costs a look at all it holds."""
_DEFRAGMENT_PAUSE_SECONDS = 30.0
"""A member is defragmented this often at most."""


class StoreUpkeep(Passes):
    """Looks after the store as long as the partition holds the pool's keys."""

    def __init__(
        self, store: EtcdClient, settings: StoreSettings, replica: Replica, committer: Committer
    ) -> None:
        super().__init__("store-upkeep", _POLL_SECONDS)
        self._store = store
        self._quota_bytes = settings.quota_bytes
        self._own_members = bool(settings.member_peer_urls)
        self._replica = replica
        self._committer = committer
        self._compacted_at = boot_time()
        self._least_in_use_bytes = 0
        """Since the last compaction, whose room may be freed slowly."""
        self._defragmented_at: dict[int, float] = {}

    def _pass(self) -> None:
        if self._replica.stopped:
            raise Stopped  # a store that was tampered with is evidence
        try:
            status = self._nearest()
            room = self._room(status)
            self._committer.room = room
            if self._replica.is_housekeeper() or not self._replica.serving():
                self._compact(room, alarm=status.alarm)
                if self._own_members and (status.alarm or room.defragmentation_helps):
                    self._make_room()
        except Ambiguous as error:
            _log.debug("upkeep of the store put off", cause=str(error))

    def _room(self, status: MemberStatus) -> StoreRoom:
        return StoreRoom(status.size_bytes, status.in_use_bytes, self._quota_bytes)

    def _nearest(self) -> MemberStatus:
        """Return the status of the first member that answers.

        Raises:
            Ambiguous: None does.
        """
        for number in range(self._store.endpoint_count - 1):
            try:
                return self._store.member_status(number)
            except Ambiguous:
                continue
        return self._store.member_status(self._store.endpoint_count - 1)

    def _compact(self, room: StoreRoom, *, alarm: bool) -> None:
        """Compact below what every live partition has applied, if it is time."""
        self._least_in_use_bytes = min(self._least_in_use_bytes or room.in_use_bytes, room.in_use_bytes)
        seconds = _COMPACT_FULL_SECONDS if alarm or room.full else _COMPACT_SECONDS
        due = boot_time() >= self._compacted_at + seconds
        if not (due or room.compaction_due(self._least_in_use_bytes)):
            return
        self._compacted_at = boot_time()
        self._least_in_use_bytes = 0
        revision = self._replica.compaction_revision() - 1
        if revision > 0:
            self._store.compact(revision)

    def _make_room(self) -> None:
        """Defragment the members that it makes smaller; when none is too large any more, end the alarm."""
        alarm = False
        for number in range(self._store.endpoint_count):
            try:
                status = self._store.member_status(number)
                if self._room(status).defragmentation_helps and self._may_defragment(number):
                    _log.warning("defragmenting a store member", size_bytes=status.size_bytes)
                    self._store.defragment(number, self._stopping)
                    status = self._store.member_status(number)
            except Ambiguous as error:
                _log.info("a store member does not answer", cause=str(error))
                continue
            if self._room(status).file_full:
                return
            alarm = alarm or status.alarm
        if alarm:
            self._store.disarm()
            _log.warning("the store takes writes again")

    def _may_defragment(self, number: int) -> bool:
        now = boot_time()
        if now < self._defragmented_at.get(number, 0.0) + _DEFRAGMENT_PAUSE_SECONDS:
            return False
        self._defragmented_at[number] = now
        return True
