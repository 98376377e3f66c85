"""The first question to a caller's roles, before his request is even parsed.

A call whose scope is the whole pool is decided here; one whose request names a scope gets
through when the caller has the data action at some scope, and its service decides the rest.
Whatever rests on state is decided again together with it (:mod:`hsm_pool.core.roles`).
"""

from __future__ import annotations

from hsm_pool.core import roles
from hsm_pool.core.roles import Access
from hsm_pool.core.state import View
from hsm_pool.errors import AvailabilityError, NotActivated, PermissionDenied, PoolLocked
from hsm_pool.net.authorization import CEREMONY_SERVICE, Caller, Rule
from hsm_pool.partition.partition import Partition


class RoleGate:
    """Admits calls by the roles of their callers."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def admit(self, caller: Caller, rule: Rule, method: str, until: float) -> None:
        """Check a caller's roles.

        Raises:
            PermissionDenied: They do not allow the call.
            MHSMError: They cannot be told here and now; the error says why.
        """
        try:
            self._decide(caller, rule, method, until)
        except (AvailabilityError, NotActivated, PoolLocked):
            # Each message of a stream is decided anew, and answered with what holds then.
            if len(rule.actions) == 1:
                raise

    def _decide(self, caller: Caller, rule: Rule, method: str, until: float) -> None:
        serving = self._partition.holding_keys()
        if serving is None:
            self._admit_without_state(caller, method)
            return

        def decide(view: View) -> None:
            if rule.scoped:
                roles.check_anywhere(view, caller.principals, rule.actions)
            else:
                (action,) = rule.actions
                roles.check(view, Access(caller.principals, action))

        serving.replica.consult(decide, until)

    def _admit_without_state(self, caller: Caller, method: str) -> None:
        """Let the initial administrators hold ceremonies; nobody else can be served anything here."""
        if not method.startswith(CEREMONY_SERVICE):
            raise self._partition.refusal()
        if not set(caller.principals) & set(self._partition.settings.initial_administrators):
            raise PermissionDenied("only an initial administrator holds ceremonies of a pool without keys")
