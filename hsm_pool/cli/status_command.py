"""mhsm status: one line a partition."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hsm_pool.cli import ceremony_progress, process_facts
from hsm_pool.cli.attempts import described, purpose
from hsm_pool.cli.output import (
    DOWNLOAD,
    LOCKED,
    POLL,
    UNREACHABLE,
    data_directory_option,
    failure_of,
    json_option,
)
from hsm_pool.cli.suggestions import at_the_same_pool, say_next
from hsm_pool.client.connection import Connection, NoConnection
from hsm_pool.client.errors import PoolUnreachable
from hsm_pool.client.pool import Pool
from hsm_pool.errors import DISK_IS_EMPTY, DOWNLOADED_OVER_REST, MHSMError
from hsm_pool.provisioning import layout
from hsm_pool.regular_files import read_own_file
from mhsm.enclave.v1 import enclave_pb2
from mhsm.pool.v1 import pool_pb2
from mhsm.security_domain.v1 import security_domain_pb2

_REFRESH_SECONDS = 0.5
_WIDTH_OF_NO_TERMINAL = 200
_WIDTH_MAX = 1000
"""Columns; more than any line needs."""
_STATUS_BYTES_MAX = 1024 * 1024
_SERVING = "SERVING"
_OTHERS_MIN = 2
"""Partitions that must serve so that another one may be replaced (G5)."""
_FAILURES_SHOWN = 2
"""One may be a kill."""
_PROCESSES = {
    "node_agent": ("its node agent", "node-agent-{index}"),
    "partition": ("its process", "partition"),
    "store_member": ("its store member", "store"),
}
"""In words, and the name of the log."""
_OF_AN_ANSWER = (
    "lease_remaining_ms",
    "applied_sequence",
    "head",
    "incarnation",
    "sealing",
    "secret_memory",
    "store_version",
    "key_count",
    "recovery_path",
    "required",
    "accepted_shares",
    "audit_records",
    "audit_cosignatures",
    "audit_lost_records",
    "audit_failure",
    "store_full",
    "hardening",
    "ceremony_child_hardening",
)
"""Fields of the JSON form that a partition says itself: null while it does not answer."""
_STORE_DISK_LOST = "the disk of its store member is lost: it stays out until the partition is replaced"
_PUT_BACK = "put back a copy (firmware/root.json is the same in all nodes): a replacement does not make it"
_SILENT_SECONDS_SHOWN = 20
"""A round of the controller takes 13 s at most."""
_STORE_FULL = "the store is nearly full: nothing that makes the pool larger is taken; delete and purge keys"
COLUMNS = (
    ("partition", "index"),
    ("state", "state"),
    ("lease ms", "lease_remaining_ms"),
    ("sequence", "applied_sequence"),
    ("head", "head"),
    ("starts", "incarnation"),
    ("keys from", "recovery_path"),
    ("sealing", "sealing"),
    ("secrets in", "secret_memory"),
    ("etcd", "store_version"),
    ("agent, partition, store", "process_ids"),
)
"""Title of each column, and the field of the JSON form that it shows."""


@click.command()
@click.option("--watch", is_flag=True, help="Refresh until interrupted.")
@data_directory_option
@json_option
@click.pass_context
def status(context: click.Context, watch: bool, data_dir: Path, as_json: bool) -> None:
    """Show how the partitions are.

    Exit code 0: two or more serve; 3: not activated, or locked; 5: fewer than two answer and serve.
    """
    try:
        connection = process_facts.running_pool(data_dir)
    except NoConnection as error:
        raise failure_of(error) from None
    with Pool(connection, "administrator") as pool:
        if watch and not as_json:
            console = Console()
            with Live(console=console, refresh_per_second=4) as live:
                while True:
                    live.update(table(rows_of(pool, connection), console))
                    time.sleep(_REFRESH_SECONDS)
        rows = rows_of(pool, connection)
        answering = [row["index"] for row in rows if row["state"] != "UNREACHABLE"]
        found = ceremony_progress.under_way(pool, answering)
    code = _exit_code(rows)
    say_downloaded(rows, found.values())
    ceremonies = {index: ceremony for index, ceremony in found.items() if not isinstance(ceremony, str)}
    controller = _fabric_controller(connection)
    users = process_facts.measured(connection)
    if as_json:
        document = {
            "pool_id": connection.pool_id,
            "attended": connection.attended,
            "partitions": rows,
            "ceremonies": [
                {"partition": index, **described(ceremony)} for index, ceremony in ceremonies.items()
            ],
            "fabric_controller": controller,
            "users": users,
        }
        click.echo(json.dumps(document))
    else:
        console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_NO_TERMINAL)
        console.print(table(rows, console))
        for row in rows:
            for line in _lines(row):
                click.echo(f"partition {row['index']}: {line}")
        for line in (*_gone(connection), *_hardening_lines(rows), *_controller_lines(controller)):
            click.echo(line)
        click.echo(process_facts.in_words(users))
        for index, ceremony in ceremonies.items():
            click.echo(f"partition {index}: ceremony under way: {ceremony_progress.progress(ceremony)}")
        if ceremonies:
            # Whoever began another one would be refused.
            say_next(at_the_same_pool("mhsm security-domain status"))
            context.exit(code)
        for line in way_out(rows):
            say_next(at_the_same_pool(line))
        polled = any(row["reason"] == DOWNLOADED_OVER_REST for row in rows)
        following = {
            "PROVISIONED": POLL if polled else DOWNLOAD,
            "LOCKED": "mhsm security-domain init-recovery --output attempt.json",
        }
        states = {row["state"] for row in rows}
        # Beside one that serves, a locked partition heals by itself.
        if code and _SERVING not in states:
            for state in sorted(states & following.keys()):
                say_next(at_the_same_pool(following[state]))
    context.exit(code)


def rows_of(pool: Pool, connection: Connection) -> list[dict[str, Any]]:
    """Return a line of the table for each partition, with the same fields whether it answers or not."""
    rows: list[dict[str, Any]] = []
    half_replaced: set[int] = set()
    for entry in connection.partitions:
        row: dict[str, Any] = {
            "index": entry.index,
            "process_ids": entry.process_ids,
            "failures": entry.failures,
            "store_disk_lost": entry.store_disk_lost,
            "node_agent_hardening": entry.node_agent_hardening,
            "state": "UNREACHABLE",
            "reason": "",
            "fresh": False,
            **dict.fromkeys(_OF_AN_ANSWER),
        }
        try:
            answer = pool.partition_status(entry.index)
        except PoolUnreachable:
            row["reason"] = "it does not answer"
        except MHSMError as error:
            row["reason"] = error.message
        else:
            half_replaced.update(answer.half_replaced)
            row.update(
                state=enclave_pb2.PartitionState.Name(answer.state).removeprefix("PARTITION_STATE_"),
                reason=answer.state_reason,
                fresh=answer.fresh,
                lease_remaining_ms=answer.lease_remaining_ms,
                applied_sequence=answer.applied_sequence,
                head=answer.head_digest_prefix,
                incarnation=answer.incarnation,
                sealing=answer.sealing,
                secret_memory=answer.secret_memory,
                store_version=answer.store_version,
                store_full=answer.store_full,
                key_count=answer.key_count,
                recovery_path=answer.recovery_path,
                required=answer.required,
                accepted_shares=answer.accepted_shares,
                audit_records=answer.audit_records,
                audit_cosignatures=answer.audit_cosignatures,
                audit_lost_records=answer.audit_lost_records,
                audit_failure=answer.audit_failure,
                hardening=_measures(answer.hardening),
                ceremony_child_hardening=_measures(answer.ceremony_child_hardening),
            )
        rows.append(row)
    for row in rows:
        row["half_replaced"] = row["index"] in half_replaced
    return rows


def _lines(row: dict[str, Any]) -> Iterator[str]:
    """Give what is wrong with a partition in words."""
    replaced = "its replacement was begun and has not ended" if row["half_replaced"] else ""
    full = _STORE_FULL if row["store_full"] else ""
    disk = _STORE_DISK_LOST if row["store_disk_lost"] else ""
    yield from filter(None, (row["reason"], replaced, row["audit_failure"], full, disk))
    yield from unstable(row)


def unstable(row: dict[str, Any]) -> Iterator[str]:
    """Say of each process of a partition that does not stay up where the reason is."""
    for name, (what, log) in _PROCESSES.items():
        failures = row["failures"].get(name, 0)
        if failures >= _FAILURES_SHOWN:
            index = row["index"]
            logs = f"nodes/{index}/logs/{log.format(index=index)}.log and those before it"
            # The count goes back to zero when a process has run for a while.
            now = ", and runs at the moment" if row["process_ids"].get(name) else ""
            yield f"{what} does not stay up: ended {failures} times in a row{now}; " + logs


def way_out(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Give what brings back partitions that do not by themselves, while two others serve."""
    serving = {row["index"] for row in rows if row["state"] == _SERVING and row["fresh"]}
    for row in rows:
        lost = row["state"] == "LOCKED" and row["reason"] == DISK_IS_EMPTY
        needed = row["half_replaced"] or lost or row["state"] == "QUARANTINED" or row["store_disk_lost"]
        if needed and len(serving - {row["index"]}) >= _OTHERS_MIN:
            if row["index"] in serving:  # by the other members of the store
                yield f"mhsm-fabric drain {row['index']}"
            yield f"mhsm-fabric replace {row['index']}"


def say_downloaded(rows: list[dict[str, Any]], found: Iterable[security_domain_pb2.Ceremony | str]) -> None:
    """Have partitions that do not know of another one's activation under way say what the pool waits for."""
    for ceremony in found:
        if not isinstance(ceremony, str) and purpose(ceremony) == "activation":
            missing = ceremony.required - ceremony.accepted
            shares = f"{missing} more share{'' if missing == 1 else 's'}"
            for row in rows:
                if row["state"] == "PROVISIONED":
                    row["reason"] = f"the security domain is downloaded; waits for {shares}"


def _hardening(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Give (processes, measures): partitions and agents that are hardened alike, then ceremony children."""
    for who, field in (("partition", "hardening"), ("node agent", "node_agent_hardening")):
        alike: dict[str, list[str]] = {}
        for row in rows:
            if row[field] is not None:
                alike.setdefault(", ".join(row[field]) or "nothing", []).append(str(row["index"]))
        for measures, indexes in alike.items():
            yield f"{who} {', '.join(indexes)}", measures.replace("_", " ")
    for row in rows:
        if row.get("ceremony_child_hardening"):
            measures = ", ".join(row["ceremony_child_hardening"])
            yield f"ceremony child of partition {row['index']}", measures.replace("_", " ")


def _controller_hardening(connection: Connection) -> list[str] | None:
    """Return what the controller that runs says of itself; None where its status cannot be read."""
    controller = connection.fabric_controller
    try:
        content = read_own_file(Path(controller["data_directory"]) / "status.json", _STATUS_BYTES_MAX)
        said = json.loads(content)["controller"]
        if said["process_id"] == process_facts.innermost_process_id(controller["process_id"]):
            return [str(measure) for measure in said["hardening"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _hardening_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for who, hardening in _hardening(rows):
        yield f"{who}: hardened with {hardening}"


def _fabric_controller(connection: Connection) -> dict[str, Any]:
    return {
        "process_id": connection.fabric_controller["process_id"],
        "hardening": _controller_hardening(connection),
        "silent_seconds": _controller_silent_seconds(connection),
        **_sandbox(connection),
    }


def _controller_lines(controller: dict[str, Any]) -> Iterator[str]:
    """Say how the controller is, a line each."""
    if controller["hardening"] is not None:
        measures = ", ".join(controller["hardening"]).replace("_", " ") or "nothing"
        yield f"fabric controller: hardened with {measures}"
    bubblewrap = controller["bubblewrap"]
    in_words = "under bubblewrap" if bubblewrap else f"no bubblewrap: {controller['bubblewrap_reason']}"
    yield f"fabric controller: {in_words}"
    silent = controller["silent_seconds"]
    if silent is not None and silent > _SILENT_SECONDS_SHOWN:
        yield f"fabric controller: not heard of for {silent} s: it does not run, or hangs"


def _gone(connection: Connection) -> Iterator[str]:
    """Say what of a node's directory nobody makes anew is gone, a line a node."""
    for entry in connection.partitions:
        lost = layout.lost_files(Path(connection.data_directory), entry.index)
        if lost:
            yield f"partition {entry.index}: gone: {', '.join(lost)}; {_PUT_BACK}"


def _controller_silent_seconds(connection: Connection) -> int | None:
    """Return for how long the controller, which writes its status each round, has not; None: never did."""
    try:
        written_at = (Path(connection.fabric_controller["data_directory"]) / "status.json").lstat().st_mtime
    except (OSError, KeyError):
        return None
    return max(0, int(time.time() - written_at))


def _sandbox(connection: Connection) -> dict[str, Any]:
    """Return whether the controller runs under bubblewrap, as the kernel says, and else why not."""
    controller = connection.fabric_controller
    found = process_facts.own_namespaces(controller["process_id"], connection.supervisor_process_id)
    reason = controller.get("sandbox", {}).get("reason") or "not known"
    return {"bubblewrap": found, "bubblewrap_reason": "" if found else reason}


def _measures(values: Iterable[pool_pb2.HardeningMeasure.ValueType]) -> list[str]:
    names = (pool_pb2.HardeningMeasure.Name(value) for value in values)
    return [name.removeprefix("HARDENING_MEASURE_").lower() for name in names]


def _exit_code(rows: list[dict[str, Any]]) -> int:
    if sum(row["state"] == _SERVING and row["fresh"] for row in rows) >= 2:
        return 0
    states = {row["state"] for row in rows}
    if _SERVING not in states and states & {"PROVISIONED", "LOCKED"}:
        return LOCKED
    return UNREACHABLE


def table(rows: list[dict[str, Any]], console: Console) -> RenderableType:
    """Return a line for each partition with as many of COLUMNS, from the left, as the terminal is wide for.

    Cells are never wrapped. A last line says how many columns do not fit.
    """
    for count in range(len(COLUMNS), 0, -1):
        fitting = Table(box=None, pad_edge=False)
        for title, _ in COLUMNS[:count]:
            fitting.add_column(title, no_wrap=True)
        for row in rows:
            fitting.add_row(*(_cell(row, field) for _, field in COLUMNS[:count]))
        unbounded = console.options.update(max_width=_WIDTH_MAX)
        if Measurement.get(console, unbounded, fitting).maximum <= console.width:
            break
    if count == len(COLUMNS):
        return fitting
    said = f"{len(COLUMNS) - count} columns do not fit: mhsm status --json"
    return Group(fitting, Text(said, no_wrap=True, overflow="ellipsis"))


def _cell(row: dict[str, Any], field: str) -> str:
    value = row[field]
    if field == "state":
        return str(value).lower()
    if field == "process_ids":
        return " ".join("-" if process_id is None else str(process_id) for process_id in value.values())
    return "-" if value is None else str(value)
