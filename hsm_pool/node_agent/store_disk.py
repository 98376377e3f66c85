"""Whether a store member may start on the disk that it finds.

A member that comes back with its old id and without its data has forgotten whom it voted for and what it
acknowledged: with one other that lags behind it would be a majority that never was, and take back
acknowledged writes (G1). etcd itself notices that only while it reaches the others. So the agent notes,
beside the member's directory, that this member has had a log; from then on it starts with one, or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path

import structlog

from hsm_pool.node_agent import store_member
from hsm_pool.settings import NodeSettings
from hsm_pool.store.state_file import write_atomically

_log = structlog.get_logger()
_FILE = "store-member.json"


class StoreDisk:
    """The disk of a node's store member. Not thread-safe; driven by the agent's loop.

    Args:
        settings: The node's.
        admission: Number of the admission that the member belongs to, 0 for the first one: each has a member
            of its own, with an id of its own.
    """

    def __init__(self, settings: NodeSettings, admission: int) -> None:
        self._settings = settings
        self._admission = admission
        path = self._path
        noted = json.loads(path.read_text())["admission"] if path.exists() else None
        self._had_log = noted == admission
        self.lost = False
        """Whether the member had a log, and had none when it was to start: then it stays out."""

    @property
    def _path(self) -> Path:
        return Path(self._settings.data_directory) / _FILE

    @property
    def joining(self) -> bool:
        """Whether the member joins running ones, and does not know its own id yet."""
        return self._admission > 0 and not self._had_log

    @property
    def settled(self) -> bool:
        """Whether nothing has to be noted any more."""
        return self._had_log or self._settings.store_member is None

    def admit(self, number: int) -> None:
        """Take note that a new member begins on an empty disk."""
        self._admission, self._had_log, self.lost = number, False, False

    def look(self) -> None:
        """Take note that the member has its log, once it has."""
        if self._settings.store_member and not self._had_log and store_member.has_joined(self._settings):
            write_atomically(self._path, json.dumps({"admission": self._admission}).encode())
            self._had_log = True

    def may_start(self) -> bool:
        """Return whether the member may start on what is there now; its directory was made ready."""
        lost = self._had_log and not store_member.has_joined(self._settings)
        if lost and not self.lost:
            _log.error("the store member's disk is lost; it does not start without its data")
        self.lost = lost
        return not lost
