"""A partition that holds the pool's keys: replica, committer and parsed private keys."""

from __future__ import annotations

import time
from collections.abc import Callable

from hsm_pool import limits
from hsm_pool.audit.trail import AuditTrail
from hsm_pool.core.model import KeyVersionRecord, PoolRecord, RecordName
from hsm_pool.crypto.key_generation import KeyGenerator
from hsm_pool.crypto.loaded_keys import LoadedKey, LoadedKeyCache
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.partition.due_work import DueWork
from hsm_pool.partition.housekeeping import Housekeeper, ReportFirmware
from hsm_pool.partition.store_upkeep import StoreUpkeep
from hsm_pool.settings import StoreSettings
from hsm_pool.store.committer import Committer
from hsm_pool.store.etcd_client import EtcdClient
from hsm_pool.store.follower import Follower
from hsm_pool.store.replica import Replica
from hsm_pool.store.sealing import PoolKeys, open_material
from hsm_pool.store.state_file import StateDirectory

_LOADED_KEYS_MAX = 512
"""Parsed private keys kept; parsing an RSA key costs about fifty signatures."""


class Serving:
    """Everything that exists only while the pool's keys are here."""

    def __init__(
        self,
        store: EtcdClient,
        store_settings: StoreSettings,
        keys: PoolKeys,
        index: int,
        state: StateDirectory,
        on_tampered: Callable[[str], None],
        on_header: Callable[[bytes], None],
        on_loaded: Callable[[PoolRecord], None],
        hold_epoch: Callable[[int], bool],
        report_firmware: ReportFirmware,
        trail: AuditTrail,
        generator: KeyGenerator,
    ) -> None:
        self.keys = keys
        self.replica = Replica(keys, index, state.incarnation)
        self.replica.mutation_log = trail.log
        self.committer = Committer(store, self.replica)
        self._follower = Follower(store, self.replica, state, on_tampered)
        self._housekeeper = Housekeeper(self.replica, self.committer, hold_epoch, report_firmware, trail)
        self._due_work = DueWork(keys, self.replica, self.committer, generator)
        self._upkeep = StoreUpkeep(store, store_settings, self.replica, self.committer)
        self._loaded = LoadedKeyCache(_LOADED_KEYS_MAX)
        self.replica.on_removed = self._forget
        self.replica.on_header = on_header
        self.replica.on_loaded = on_loaded
        self._follower.start()
        self._housekeeper.start()
        self._due_work.start()
        self._upkeep.start()

    def close(self) -> None:
        """Stop serving and forget parsed keys."""
        self.replica.stop()
        self._upkeep.close()
        self._due_work.close()
        self._housekeeper.close()
        self._follower.close()
        self.committer.close()
        self._loaded.clear()

    def now_ms(self) -> int:
        """Return the time of a command: the own clock, never behind the pool's time nor far ahead of it."""
        now_ms, agreed_ms = time.time_ns() // 1_000_000, self.replica.agreed_time_ms()
        if agreed_ms is not None:
            now_ms = min(now_ms, agreed_ms + int(1000 * limits.CLOCK_SKEW_SECONDS_MAX))
        return max(now_ms, self.replica.pool_time_ms)

    def _forget(self, name: RecordName) -> None:
        """Forget the parsed private key of a version that was purged."""
        if name[0] == "version":
            self._loaded.discard((name[1], name[2]))

    def load_key(self, version: KeyVersionRecord) -> LoadedKey:
        """Return the parsed private key of a version.

        Raises:
            Tampered: Its material does not open.
        """
        return self._loaded.get(
            (version.key_id, version.version_id),
            lambda: (version.key_type, self.open_material(version)),
        )

    def open_material(self, version: KeyVersionRecord) -> SecretBytes:
        """Return the private or secret material of a version.

        Raises:
            Tampered: It does not open.
        """
        return open_material(
            self.keys,
            version.key_id,
            version.version_id,
            version.key_type,
            version.curve,
            version.size_bits,
            version.sealed_material,
        )
