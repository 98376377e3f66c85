"""A story that is told to a real pool and to the reference model: who calls, and what both answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from tests.model.pool_answers import ACTIONS, Environments
from tests.model.reference import Assignment, ReferencePool, Refused
from tests.moved_clock import MovedClock

UNKNOWN_VERSION = "f" * 32
UNKNOWN_GUID = "00000000-0000-4000-8000-000000000000"
SOON = -1
"""An hour after the story, or its jump in time, began."""

HOUR_MS = 3600 * 1000
DAY_MS = 24 * HOUR_MS

callers = st.sampled_from(["application", "application", "ann", "ann", "bob"])
partitions = st.integers(0, 2)
positions = st.integers(0, 3)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


class Story(RuleBasedStateMachine):
    """What the rules share. Scopes are "/", "/keys" or a key of the story."""

    clients: ClassVar[dict[tuple[str, int], Pool]] = {}
    environments: ClassVar[Environments]
    clock: ClassVar[MovedClock]
    ahead_ms: ClassVar[int] = 0
    """How far the clocks of the pool are ahead; they never go back."""
    told: ClassVar[Counter[tuple[str, str]]] = Counter()
    """How often somebody was told something, "" for what he asked for."""

    prefix: str
    reference: ReferencePool
    custom: list[str]
    """Ids of custom roles; only the first is defined at the beginning."""
    soon_ms: int
    types: dict[str, bool]
    """Whether a version is an EC key, by its id."""
    public: dict[str, bytes]
    """What a release of a version shows (see :meth:`Environments.released`), by its id."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms

    def time_ms(self, drawn: int | None) -> int | None:
        return self.soon_ms if drawn == SOON else drawn

    def name(self, key: str, version_id: str = "") -> str:
        return f"keys/{self.prefix}{key}" + (f"/versions/{version_id}" if version_id else "")

    def scope(self, scope: str) -> str:
        """Return the pool's name of a scope of the story."""
        return scope if scope in {"/", "/keys"} else f"/{self.name(scope.rpartition('/')[2])}"

    def version_id(self, key: str, position: int) -> str:
        """Return a version of the key by position, "" for the newest, or one that it does not have."""
        known = list(self.reference.active.get(key, {}))
        return ["", *known, UNKNOWN_VERSION][position % (len(known) + 2)]

    def both(
        self,
        who: str,
        partition: int,
        method: str,
        scope: str,
        real: Callable[[Pool], Any],
        model: Callable[[Any], Any],
    ) -> tuple[Any, Any]:
        """Let both answer: the same refusal, or (answer, the model's answer); the model sees the answer.

        ``scope`` is "/" or a key of the story.
        """
        answer, reason, wanted, modelled = None, "", "", None
        try:
            answer = real(self.clients[who, partition])
        except MHSMError as error:
            reason = error.reason
        try:
            self.reference.permit(who, ACTIONS[method], scope if "/" in scope else f"/keys/{scope}")
            modelled = model(answer)
        except Refused as refused:
            wanted = refused.reason
        self.told[who, reason] += 1
        assert reason == wanted, (who, method, scope)
        return answer, modelled

    def given(self) -> dict[str, Assignment]:
        """Return the assignments that the story made."""
        return {name: a for name, a in self.reference.assignments.items() if not name.startswith("initial")}
