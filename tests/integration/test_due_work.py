"""What comes due with keys on a real pool whose clocks are moved: rotation, purge, purge protection (G1)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from hsm_pool.audit import query
from hsm_pool.client.pool import Pool
from hsm_pool.errors import DeletedKeyNotFound, KeyNotFound, PurgeProtected, RotationPolicyMissing
from mhsm.keys.v1 import keys_pb2
from tests.moved_clock import MovedClock, moved_clock
from tests.running_pool import RunningPool, TestOfficer, mhsm, until

pytestmark = pytest.mark.pool

EC: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
DAY_MS = 24 * 3600 * 1000
PASSES_SECONDS = 3.0
"""Several passes of the due work: what was not done in that time is not about to be done."""


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MovedClock]:
    with moved_clock(tmp_path_factory.mktemp("clock") / "moved") as moved:
        yield moved


@pytest.fixture(scope="module")
def pool(
    clock: MovedClock, make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> Iterator[RunningPool]:
    """A pool with purge protection and the shortest retention."""
    del clock
    made = make_pool(attended=True, options=("--recoverable-days", "7", "--purge-protection"))
    made.activate(officers, 2)
    yield made
    made.down()


def versions(client: Pool, key_id: str) -> list[keys_pb2.Key]:
    return list(client.list_key_versions(f"keys/{key_id}"))


def gone(client: Pool, key_id: str) -> bool:
    try:
        client.get_deleted_key(f"keys/{key_id}")
    except DeletedKeyNotFound:
        return True
    return False


def recorded(pool: RunningPool, index: int, operation: str, key_id: str) -> list[dict[str, Any]]:
    """Return the successes of an operation on a key that a partition's audit log has."""
    directory = pool.directory / f"nodes/{index}/audit"
    found = [json.loads(record) for _, record in query.records_from(directory, 0)]
    return [
        entry
        for entry in found
        if entry["operationName"] == operation
        and entry["properties"].get("keyName") == key_id
        and entry["resultType"] == "Success"
    ]


def not_fresh(pool: RunningPool, index: int) -> bool:
    status = pool.status(index)
    return status is not None and not status.fresh


def passed(seconds: float) -> Callable[[], bool]:
    """Return whether so much time has passed since now, for what must not happen meanwhile."""
    end = datetime.now(UTC).timestamp() + seconds
    return lambda: datetime.now(UTC).timestamp() > end


def test_a_key_is_rotated_on_demand_once_it_has_a_policy(pool: RunningPool) -> None:
    """Azure Managed HSM: a policy first; the new version has the policy's life."""
    with pool.client() as client:
        client.create_key("by-hand", **EC, tags={"x": "1"})
        with pytest.raises(RotationPolicyMissing):
            client.rotate_key("keys/by-hand")
        assert client.get_key_rotation_policy("keys/by-hand") == keys_pb2.KeyRotationPolicy()
        set_to = client.update_key_rotation_policy("keys/by-hand", expiry_time="P90D")
        assert (set_to.expiry_time, list(set_to.lifetime_actions)) == ("P90D", [])
        new = client.rotate_key("keys/by-hand")
        old, newest = versions(client, "by-hand")
        assert newest == new
        assert (new.public_key_der != old.public_key_der, dict(new.tags)) == (True, {"x": "1"})
        life_ms = new.attributes.expires.ToMilliseconds() - new.attributes.created.ToMilliseconds()
        assert life_ms == 90 * DAY_MS
        assert list(new.key_operations) == list(old.key_operations)
        (record,) = recorded(pool, 0, "KeyRotate", "by-hand")
        assert record["properties"]["keyVersion"] == new.name.rpartition("/")[2]


@pytest.mark.parametrize(
    "kind",
    [
        {"key_type": keys_pb2.KEY_TYPE_RSA, "size_bits": 2048, "public_exponent": 3},
        {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P521},
        {"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": 192},
        {"key_type": keys_pb2.KEY_TYPE_AKP, "size_bits": 10_496},
    ],
    ids=["RSA", "EC", "oct", "AKP"],
)
def test_every_kind_of_key_rotates_to_its_own_kind(pool: RunningPool, kind: dict[str, Any]) -> None:
    key_id = f"kind-{kind['key_type']}"
    with pool.client() as client:
        old = client.create_key(key_id, **kind)
        client.update_key_rotation_policy(f"keys/{key_id}", time_after_create="P28D")
        new = client.rotate_key(f"keys/{key_id}")
    assert (new.key_type, new.curve, new.size_bits) == (old.key_type, old.curve, old.size_bits)
    assert len(new.public_key_der) - len(old.public_key_der) in {-1, 0, 1}, "with the same public exponent"
    assert new.name != old.name


def test_purge_protection_holds_whoever_asks(pool: RunningPool) -> None:
    """On every partition, by the command too; the recovery level is Azure's CustomizedRecoverable."""
    with pool.client() as client:
        made = client.create_key("protected", **EC)
        assert made.attributes.recovery_level == keys_pb2.RECOVERY_LEVEL_CUSTOMIZED_RECOVERABLE
        assert made.attributes.recoverable_days == 7
        client.delete_key("keys/protected")
    for index in range(3):
        with pool.client(partition=index, timeout_seconds=10) as one, pytest.raises(PurgeProtected):
            one.purge_deleted_key("keys/protected")
    data = ("--data-dir", str(pool.directory))
    refused = mhsm("key", "purge", "protected", "--yes", *data, check=False)
    assert refused.returncode == 1
    assert "purge protection is on" in refused.stderr
    assert "next: mhsm key show-deleted protected" in refused.stderr
    with pool.client() as client:
        assert client.recover_deleted_key("keys/protected") == made


def test_one_wrong_clock_brings_no_date_forward(pool: RunningPool, clock: MovedClock) -> None:
    """G1: a partition whose clock is a year ahead purges and rotates nothing; nor does it serve."""
    with pool.client() as client:
        for key_id in ("early", "not-yet"):
            client.create_key(key_id, **EC)
        client.update_key_rotation_policy("keys/early", time_after_create="P28D")
        client.delete_key("keys/not-yet")
    for index in (0, 2):  # the holder of the housekeeping role, and another one
        clock.move(365 * DAY_MS, partition=index)
        try:
            until(partial(not_fresh, pool, index), 20, "it is not fresh")
            until(passed(PASSES_SECONDS), 60, "some passes")
            with pool.client() as client:
                assert len(versions(client, "early")) == 1
                assert not gone(client, "not-yet")
                with pytest.raises(PurgeProtected):
                    client.purge_deleted_key("keys/not-yet")
        finally:
            clock.move(0, partition=index)
        pool.await_states(["SERVING"] * 3)
    with pool.client() as client:
        client.recover_deleted_key("keys/not-yet")
        client.update_key_rotation_policy("keys/early")


def test_what_is_due_is_done_once_and_what_is_not_is_left(pool: RunningPool, clock: MovedClock) -> None:
    """G1: at its date a key is rotated, and a deleted one purged, by one partition; each shows on all."""
    with pool.client() as client:
        for key_id in ("turning", "lasting", "ending", "rescued", "disabled"):
            client.create_key(key_id, **EC)
        for key_id in ("turning", "disabled"):
            client.update_key_rotation_policy(f"keys/{key_id}", time_after_create="P28D", expiry_time="P90D")
        client.update_key_rotation_policy("keys/lasting", time_after_create="P90D")
        client.update_key("keys/disabled", key_attributes=keys_pb2.KeyAttributes(enabled=False))
        for key_id in ("ending", "rescued"):
            client.delete_key(f"keys/{key_id}")
        clock.move(6 * DAY_MS)
        pool.await_states(["SERVING"] * 3)
        until(passed(PASSES_SECONDS), 60, "some passes")
        assert not gone(client, "ending")
        client.recover_deleted_key("keys/rescued")
        clock.move(29 * DAY_MS)
        until(lambda: gone(client, "ending"), 60, "the deleted key is purged")
        until(lambda: len(versions(client, "turning")) == 2, 60, "the key is rotated")
        until(passed(PASSES_SECONDS), 60, "some more passes")
    for index in range(3):
        with pool.client(partition=index, timeout_seconds=20) as one:
            counts = {k: len(versions(one, k)) for k in ("turning", "lasting", "rescued", "disabled")}
            assert counts == {"turning": 2, "lasting": 1, "rescued": 1, "disabled": 1}
            with pytest.raises(KeyNotFound):
                one.get_key("keys/ending")
            old, new = versions(one, "turning")
            born = new.attributes.created.ToMilliseconds()
            assert born - old.attributes.created.ToMilliseconds() >= 28 * DAY_MS
            assert new.attributes.expires.ToMilliseconds() == born + 90 * DAY_MS
        for operation, key_id in (("KeyRotateIfDue", "turning"), ("KeyPurge", "ending")):
            (record,) = recorded(pool, index, operation, key_id)
            assert "/partition/" in record["identity"], "nobody asked for it"


def test_the_commands_of_rotation(pool: RunningPool) -> None:
    """Each with words and with --json; a refusal says what to do (G8)."""
    data = ("--data-dir", str(pool.directory))
    mhsm("key", "create", "told", "--type", "EC", "--curve", "P-256", *data)
    refused = mhsm("key", "rotate", "told", *data, check=False)
    assert refused.returncode == 1
    assert "next: mhsm key rotation-policy update told" in refused.stderr
    shown = mhsm("key", "rotation-policy", "show", "told", *data).stdout
    assert shown.strip() == "keys/told has no rotation policy"
    policy = ("--time-before-expiry", "P30D", "--expiry-time", "P1Y")
    updated = mhsm("key", "rotation-policy", "update", "told", *policy, *data).stdout
    assert updated.splitlines()[1:] == ["  rotated P30D before expiry", "  a new version expires after P1Y"]
    as_json = mhsm("key", "rotation-policy", "show", "told", "--json", *data).stdout
    assert '"timeBeforeExpiry": "P30D"' in as_json
    assert '"expiryTime": "P1Y"' in as_json
    assert "made keys/told/versions/" in mhsm("key", "rotate", "told", *data).stdout
    removed = mhsm("key", "rotation-policy", "update", "told", "--remove", *data).stdout
    assert removed.strip() == "keys/told has no rotation policy"
    for wrong in ((), ("--remove", "--expiry-time", "P90D"), ("--time-after-create", "P90D", *policy)):
        assert mhsm("key", "rotation-policy", "update", "told", *wrong, *data, check=False).returncode == 2
    short = mhsm("key", "rotation-policy", "update", "told", "--expiry-time", "P1D", *data, check=False)
    assert (short.returncode, "28 days at least" in short.stderr) == (1, True)
    other = mhsm("up", "--purge-protection", *data, "--json")
    assert '"already_running": true' in other.stdout
