"""How keys are named and shown on the command line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import click
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from hsm_pool.cli.output import caller_options, report
from hsm_pool.core.model import Curve, KeyOperation, KeyType
from hsm_pool.crypto import algorithms
from mhsm.keys.v1 import keys_pb2

TYPES = {f"{key_type.azure_name}{suffix}": key_type for suffix in ("", "-HSM") for key_type in KeyType}
"""As on Managed HSM, where each key is an HSM's, the names with and without -HSM mean the same."""
CURVES = {curve.azure_name: curve for curve in Curve if curve is not Curve.NONE}
OPERATIONS = {operation.azure_name: operation for operation in KeyOperation}
as_application = caller_options("application")
"""Options of a command that uses keys."""


def resource(name: str) -> str:
    """Return keys/NAME for a plain name; a full resource name stays as it is."""
    return name if name.startswith("keys/") else f"keys/{name}"


def _kind(found: keys_pb2.Key) -> str:
    return algorithms.kind(KeyType(found.key_type), Curve(found.curve), found.size_bits)


def _operations(found: keys_pb2.Key) -> list[str]:
    return [KeyOperation(operation).azure_name for operation in found.key_operations]


def _state(attributes: keys_pb2.KeyAttributes) -> str:
    """Return whether a version can be used now, by this machine's clock."""
    if not attributes.enabled:
        return "disabled"
    if attributes.HasField("not_before") and _now() < attributes.not_before.ToDatetime(UTC):
        return "not valid yet"
    return "expired" if has_expired(attributes) else "enabled"


def has_expired(attributes: keys_pb2.KeyAttributes) -> bool:
    """Return whether a version is used no more for what makes something, by this machine's clock."""
    return attributes.HasField("expires") and attributes.expires.ToDatetime(UTC) <= _now()


def _now() -> datetime:
    return datetime.now(UTC)


def show_key(found: keys_pb2.Key, options: dict[str, Any], text: str, following: str) -> None:
    """Report a key version."""
    attributes = found.attributes
    content: dict[str, Any] = {"key": MessageToDict(found)}
    lines = [text] if text else [found.name]
    lines.append(f"  {_kind(found)}, {_state(attributes)}")
    lines.append("  " + ", ".join(_operations(found)))
    if attributes.HasField("not_before"):
        lines.append(f"  not before {attributes.not_before.ToJsonString()}")
    if attributes.HasField("expires"):
        lines.append(f"  expires {attributes.expires.ToJsonString()}")
    if found.HasField("release_policy"):
        policy = "immutable" if found.release_policy.immutable else "replaceable"
        lines.append(
            f"  {'exportable' if attributes.exportable else 'not exportable'}, {policy} release policy"
        )
        content["release_policy"] = json.loads(found.release_policy.data)
        lines.append(f"  {json.dumps(content['release_policy'])}")
    lines.extend(f"  {name}={value}" for name, value in sorted(found.tags.items()))
    report(content, as_json=options["as_json"], text="\n".join(lines), following=following)


def show_deleted_key(deleted: keys_pb2.DeletedKey, common: dict[str, Any], following: str) -> None:
    """Report a soft-deleted key."""
    report(
        {"deleted_key": MessageToDict(deleted)},
        as_json=common["as_json"],
        text=f"{deleted.key.name} is soft-deleted; it will be purged at "
        f"{deleted.scheduled_purge_time.ToJsonString()}",
        following=following,
    )


def show_keys(found: list[keys_pb2.Key], common: dict[str, Any]) -> None:
    """Report a list of key versions."""
    if common["as_json"]:
        click.echo(json.dumps({"keys": [MessageToDict(entry) for entry in found]}))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "state", "operations", "created"):
        table.add_column(column)
    for entry in found:
        table.add_row(
            entry.name,
            _kind(entry),
            _state(entry.attributes),
            " ".join(_operations(entry)),
            entry.attributes.created.ToJsonString(),
        )
    Console(width=None if Console().is_terminal else 200).print(table)
