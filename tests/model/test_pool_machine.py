"""A real pool against the reference model, each call on any partition (G2: one pool, not three).

Keys, roles, release and time at once: whoever calls has the roles that the story gave him, and now
and then two hours pass on every clock of the pool.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from hsm_pool.client import calls
from hsm_pool.errors import KeyNotUsable, MHSMError
from mhsm.keys.v1 import keys_pb2
from tests.identities import Clients
from tests.model.key_rules import LEVELS, KeyRules, keys, release_rules
from tests.model.pool_answers import Environments, moment
from tests.model.pool_story import HOUR_MS, callers, partitions
from tests.model.reference import Assignment, ReferencePool, ReleaseRule
from tests.model.role_rules import RoleRules, built_in, principals, scopes
from tests.moved_clock import MovedClock, moved_clock
from tests.role_tables import ALLOWED, GUIDS
from tests.running_pool import RunningPool, TestOfficer, until

pytestmark = pytest.mark.pool

INITIAL = (
    ("administrator", "Administrator"),
    ("application", "Crypto User"),
    ("application", "Crypto Officer"),
)
"""The roles that a pool begins with (Azure: the initial administrators; the development profile: both)."""
EXCLUDED = frozenset({"keys/sign/action", "keys/encrypt/action", "keys/delete"})
"""What the custom role of each story has not of a Crypto User."""


class PoolMachine(KeyRules, RoleRules):
    """The same story told to a pool, each sentence to another partition, and to the reference."""

    @initialize(scope=st.sampled_from(["/", "/keys/a"]))
    def begin(self, scope: str) -> None:
        self.prefix = f"m{uuid.uuid4().hex[:12]}-"
        self.reference = ReferencePool()
        for number, (who, role) in enumerate(INITIAL):
            self.reference.assignments[f"initial {number}"] = Assignment(who, GUIDS[role], "/")
        self.custom = [str(uuid.uuid4()), str(uuid.uuid4())]
        self.soon_ms = self.now_ms() + HOUR_MS
        self.jumped = False
        self.types, self.public = {}, {}
        # A story may go without a rule (swarm testing); without keys and roles it would say little.
        for key, is_ec, tags in (("a", True, {"n": "1"}), ("a", False, {"n": "2"}), ("b", True, {})):
            self.make("application", 0, key, tags, is_ec=is_ec, release=ReleaseRule(1))
        self.define("administrator", 0, 0, ALLOWED["Crypto User"], EXCLUDED)
        self.assign("administrator", 1, "ann", self.custom[0], scope)

    # -- sentences of several calls ------------------------------------------------------

    @rule(
        partition=partitions,
        other=partitions,
        principal=principals,
        role=built_in,
        scope=scopes,
        key=keys,
        operation=st.sampled_from(["SIGN", "VERIFY", "WRAP_KEY", "DECRYPT"]),
    )
    def give_use_and_take(
        self, partition: int, other: int, principal: str, role: str, scope: str, key: str, operation: str
    ) -> None:
        """A role works at once on another partition, and a role that was taken nowhere (G2)."""
        before = set(self.given())
        self.assign("administrator", partition, principal, role, scope)
        self.use(principal, other, partition, key, 0, operation)
        self.get(principal, other, key, 0)
        for name in set(self.given()) - before:
            self.revoke_named("administrator", partition, name)
        self.use(principal, other, partition, key, 0, operation)
        self.get(principal, partition, key, 0)

    @rule(
        who=callers,
        partition=partitions,
        other=partitions,
        key=keys,
        is_ec=st.booleans(),
        wanted=release_rules,
        level=st.sampled_from(LEVELS),
    )
    def make_and_release(
        self, who: str, partition: int, other: int, key: str, is_ec: bool, wanted: ReleaseRule, level: int
    ) -> None:
        """Another partition releases what was just made, by the policy that it was made with (G2)."""
        self.make("application", partition, key, {}, is_ec=is_ec, release=wanted)
        self.release(who, other, key, 0, level)

    # -- time ----------------------------------------------------------------------------

    @precondition(lambda self: not self.jumped)
    @rule()
    def jump(self) -> None:
        """Two hours pass for the pool: what was to begin or to expire soon has done so everywhere."""
        application = {index: self.clients["application", index] for index in range(3)}
        probe = f"clock-{uuid.uuid4()}"
        application[0].create_key(
            probe,
            key_type=keys_pb2.KEY_TYPE_OCT,
            size_bits=256,
            key_attributes=calls.attributes(expires=moment(self.now_ms() + HOUR_MS)),
        )
        type(self).ahead_ms += 2 * HOUR_MS
        self.clock.move(self.ahead_ms)

        def over(index: int) -> bool:
            try:
                application[index].encrypt(f"keys/{probe}", "A256GCM", b"text")
            except KeyNotUsable:
                return True
            except MHSMError as error:
                if error.definite and error.reason != "NOT_FRESH":
                    raise
            return False

        until(lambda: all(over(index) for index in range(3)), 30, "every partition's clock")
        self.soon_ms = self.now_ms() + HOUR_MS
        self.jumped = True

    # -- the end -------------------------------------------------------------------------

    def teardown(self) -> None:
        """At the end of a story every partition tells the same; nobody keeps a role of it."""
        try:
            for partition in range(3):
                self.list_all("application", partition)
                self.list_assignments("administrator", partition, "/")
                for key in ("a", "b"):
                    self.list_versions("application", partition, key)
        finally:
            administrator = self.clients["administrator", 0]
            for name, given in self.given().items():
                administrator.delete_role_assignment(name, self.scope(given.scope))
            for role in self.custom:
                if role in self.reference.roles:
                    administrator.delete_role_definition(role)


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MovedClock]:
    with moved_clock(tmp_path_factory.mktemp("clock") / "moved") as moved:
        yield moved


@pytest.fixture(scope="module")
def pool(
    clock: MovedClock, make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> Iterator[RunningPool]:
    """A pool whose clock moves."""
    del clock
    made = make_pool(attended=True)
    made.activate(officers, 2)
    yield made
    made.down()


def test_a_pool_answers_as_the_reference(pool: RunningPool, clock: MovedClock, full: bool, seed: int) -> None:
    """G2, G8: 20 stories of up to 25 calls (60 of 40 with --full), each call on any partition."""
    known = Clients(pool)
    clients = {
        (who, index): pool.client(who, partition=index, timeout_seconds=20)
        if who in pool.connection.clients
        else known.connect(who, partition=index, timeout_seconds=20)
        for who in ("administrator", "application", "ann", "bob")
        for index in range(3)
    }

    class Machine(PoolMachine):
        pass

    Machine.clients, Machine.clock = clients, clock
    Machine.environments = Environments(pool.connection, LEVELS)
    chosen = settings(
        max_examples=60 if full else 20,
        stateful_step_count=40 if full else 25,
        # A story that fails is told as it is: to find a shorter one takes minutes on a real pool.
        phases=[Phase.generate, Phase.shrink] if full else [Phase.generate],
        report_multiple_bugs=False,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seeded(seed)(Machine), settings=chosen)
    finally:
        for client in clients.values():
            client.close()
    told = {"allowed": Machine.told["ann", ""], "refused": Machine.told["ann", "PERMISSION_DENIED"]}
    assert all(told.values()), f"a run in which nobody is {told} proves nothing of roles"
    pool.await_states(["SERVING"] * 3)
