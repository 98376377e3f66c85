"""A whole machine is lost: what clients notice, when the controller sees it, and when three serve again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.bench_pool import PARTITIONS, BenchmarkPool
from benchmarks.faults import LOAD_SECONDS, Load
from benchmarks.summaries import tail

_POLL_SECONDS = 0.005
_WAIT_SECONDS = 60.0


class _Detection(threading.Thread):
    """Watches the controller's status.json for what is no longer as it was. Start it before the kill."""

    def __init__(self, pool: BenchmarkPool, index: int) -> None:
        super().__init__()
        self._file = pool.directory / "fabric" / "status.json"
        self._index = index
        # It sees the end of the fault before with its next round only.
        pool.wait_for(lambda: self._look()[0], "whole pool in the eyes of the controller")
        self._before = self._look()
        self._ended = threading.Event()
        self.at: float | None = None

    def _look(self) -> tuple[bool, int]:
        document = json.loads(self._file.read_bytes())
        view = document["partitions"][self._index]
        return view["answering"] and document["serving_count"] == PARTITIONS, view["incarnation"]

    def run(self) -> None:
        """Poll until something differs: it does not answer, fewer serve, or it has started again."""
        while not self._ended.wait(_POLL_SECONDS):
            if self._look() != self._before:
                self.at = time.monotonic()
                return

    def end(self) -> float:
        """Wait, bounded, and return when it was seen.

        Raises:
            RuntimeError: The controller noticed nothing.
        """
        self.join(_WAIT_SECONDS)
        self._ended.set()
        self.join()
        if self.at is None:
            raise RuntimeError("the controller did not notice the loss of a machine")
        return self.at


def lose_machines(pool: BenchmarkPool, runs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Kill a node agent with everything below it, one machine after the other, under load.

    Returns:
        Median, p99 and maximum in milliseconds: from the kill until the controller shows it; the longest
        time without an acknowledged write or signature; until all three partitions serve again.
    """
    detections: list[float] = []
    writes: list[float] = []
    signatures: list[float] = []
    serving: list[float] = []
    leaders = 0
    for run in range(runs):
        victim = run % PARTITIONS
        leaders += pool.await_leader() == victim
        status = pool.status(victim)
        incarnation = status.incarnation if status else 0
        detection = _Detection(pool, victim)
        with Load(pool) as load:
            load.wait(LOAD_SECONDS)
            load.writes.mark()
            load.signatures.mark()
            detection.start()
            began = time.monotonic()
            # The agent first: it would start the others again.
            pool.kill(victim, "node_agent", "store_member", "partition")

            def whole(victim: int = victim, incarnation: int = incarnation) -> bool:
                now = pool.status(victim)
                return bool(now and now.incarnation > incarnation and now.fresh) and pool.all_fresh()

            pool.wait_for(whole, "three serving partitions")
            serving.append((time.monotonic() - began) * 1000)
            load.wait(LOAD_SECONDS)
            writes.append(load.writes.longest_ms())
            signatures.append(load.signatures.longest_ms())
        detections.append((detection.end() - began) * 1000)
        pool.await_whole()
        if (run + 1) % 10 == 0:
            say(f"{run + 1} of {runs} machines lost")
    return {
        "fault": "kill -9 of a node agent with all its processes",
        "store_leader_among_them": leaders,
        "detection_ms": tail(detections),
        "write_gap_ms": tail(writes),
        "crypto_gap_ms": tail(signatures),
        "three_serve_ms": tail(serving),
    }
