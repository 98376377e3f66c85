"""mhsm key rotate and mhsm key rotation-policy."""

from __future__ import annotations

from typing import Any

import click
from google.protobuf.json_format import MessageToDict

from hsm_pool.cli.key_output import as_application, resource, show_key
from hsm_pool.cli.output import connect, report, request_id_option
from hsm_pool.core.rotation import duration_days
from mhsm.keys.v1 import keys_pb2


@click.command()
@click.argument("name")
@request_id_option
@as_application
def rotate(name: str, request_id: str, **common: Any) -> None:
    """Make a new version of the same kind; the key needs a rotation policy."""
    with connect(common) as pool:
        made = pool.rotate_key(resource(name), request_id)
    show_key(made, common, f"made {made.name}", f"mhsm key versions {name}")


@click.group("rotation-policy")
def rotation_policy() -> None:
    """When a key gets a new version by itself, and how long each new version lives."""


@rotation_policy.command("show")
@click.argument("name")
@as_application
def show_policy(name: str, **common: Any) -> None:
    """Show a key's rotation policy."""
    with connect(common) as pool:
        policy = pool.get_key_rotation_policy(resource(name))
    changing = f"mhsm key rotation-policy update {name} --help"
    known = policy.expiry_time or policy.lifetime_actions
    _show_policy(name, policy, common, f"mhsm key rotate {name}" if known else changing)


@rotation_policy.command("update")
@click.argument("name")
@click.option("--time-after-create", default="", help="Rotate a version of this age; ISO 8601, e.g. P90D.")
@click.option("--time-before-expiry", default="", help="Rotate so long before a version expires.")
@click.option("--expiry-time", default="", help="Life of each new version; ISO 8601, e.g. P2Y.")
@click.option("--remove", is_flag=True, help="Remove the policy.")
@request_id_option
@as_application
def update_policy(
    name: str, time_after_create: str, time_before_expiry: str, expiry_time: str, remove: bool, **options: Any
) -> None:
    """Replace a key's rotation policy as a whole."""
    if time_after_create and time_before_expiry:
        raise click.UsageError("give --time-after-create or --time-before-expiry, not both")
    if remove == bool(time_after_create or time_before_expiry or expiry_time):
        raise click.UsageError("say what the policy is, or --remove")
    with connect(options) as pool:
        policy = pool.update_key_rotation_policy(
            resource(name),
            time_after_create=time_after_create,
            time_before_expiry=time_before_expiry,
            expiry_time=expiry_time,
            request_id=options["request_id"],
        )
    following = f"mhsm key rotation-policy show {name}"
    if expires_before_it_is_rotated(time_after_create, expiry_time):
        following = f"each version expires before the next one is made\n{following}"
    _show_policy(name, policy, options, following)


def expires_before_it_is_rotated(time_after_create: str, expiry_time: str) -> bool:
    """Return whether a policy of these durations leaves a key without a valid version for a time."""
    if not (time_after_create and expiry_time):
        return False
    return duration_days(time_after_create, "time_after_create") > duration_days(expiry_time, "expiry_time")


def _show_policy(
    name: str, policy: keys_pb2.KeyRotationPolicy, options: dict[str, Any], following: str
) -> None:
    lines = [
        f"  rotated {action.time_after_create} after creation"
        if action.time_after_create
        else f"  rotated {action.time_before_expiry} before expiry"
        for action in policy.lifetime_actions
    ]
    if policy.expiry_time:
        lines.append(f"  a new version expires after {policy.expiry_time}")
    head = f"rotation policy of {resource(name)}" if lines else f"{resource(name)} has no rotation policy"
    report(
        {"rotation_policy": MessageToDict(policy)},
        as_json=options["as_json"],
        text="\n".join([head, *lines]),
        following=following,
    )
