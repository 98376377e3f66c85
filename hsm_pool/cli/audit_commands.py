"""mhsm audit: read, export and verify the audit logs of all partitions."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import merge
from itertools import repeat
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from hsm_pool.audit.checkpoint import Note
from hsm_pool.audit.files import parse_json
from hsm_pool.audit.verify import Report, Verifier
from hsm_pool.cli.audit_files import (
    FILE_BYTES_MAX,
    kept_checkpoints,
    load_root,
    owner_root_option,
    root_file,
)
from hsm_pool.cli.audit_proof_commands import prove, verify_proof
from hsm_pool.cli.files import refuse_existing
from hsm_pool.cli.output import VERIFICATION, common_options, connect, fail, read_bounded, report
from hsm_pool.client import audit_calls
from hsm_pool.client.audit_calls import EXPORT_FILE, ROOT_FILE, partition_directory
from hsm_pool.client.pool import Pool
from hsm_pool.core.membership import PARTITIONS
from hsm_pool.errors import MHSMError
from mhsm.audit.v1 import audit_pb2

_POLL_SECONDS = 0.5
_PAGE_RECORDS = 1000
_PARTITIONS = range(PARTITIONS)
_partition = click.option("--partition", type=click.IntRange(0, 2), help="Only the log of this partition.")


@click.group("audit")
def audit_group() -> None:
    """Audit logs: who did what, in logs that cannot be rewritten unnoticed.

    For whoever has the data action securitydomain/upload/read; of the built-in roles Administrator has it.
    """


audit_group.add_command(prove)
audit_group.add_command(verify_proof)


@audit_group.command("tail")
@click.option("--lines", type=click.IntRange(0, 1000), default=20, show_default=True)
@click.option("--follow", is_flag=True, help="Go on until interrupted.")
@_partition
@common_options
def tail(lines: int, follow: bool, partition: int | None, **common: Any) -> None:
    """Show the newest records of all partitions; with --json one JSON object a line."""
    with connect(common, client="administrator") as pool:
        following: dict[int, int] = {}
        found: list[tuple[int, dict[str, Any]]] = []
        for index in _partitions(pool, partition):
            size = pool.call(audit_calls.get_checkpoint(), index).size
            request = audit_pb2.QueryRecordsRequest(start_index=max(0, size - lines))
            records, following[index] = _read_all(pool, index, request)
            found.extend((index, record) for record in records)
        found.sort(key=lambda entry: entry[1]["time"])
        for index, record in found[len(found) - min(lines, len(found)) :]:
            _show(index, record, as_json=common["as_json"])
        while follow:
            time.sleep(_POLL_SECONDS)
            for index in following:
                _follow(pool, index, following, as_json=common["as_json"])


def _follow(pool: Pool, index: int, following: dict[int, int], *, as_json: bool) -> None:
    try:
        request = audit_pb2.QueryRecordsRequest(start_index=following[index])
        records, following[index] = _read_all(pool, index, request)
    except MHSMError as error:
        # It restarts, and its log goes on where it was.
        click.echo(f"partition {index}: {error.message}", err=True)
        return
    for record in records:
        # What the following itself puts on record would never end.
        if record["operationName"] != "QueryRecords":
            _show(index, record, as_json=as_json)


@audit_group.command("query")
@click.option("--from", "from_time", default="", help="ISO 8601 in UTC, inclusive.")
@click.option("--until", "until_time", default="", help="ISO 8601 in UTC, exclusive.")
@click.option("--operation", "operation_name", default="", help="An operationName, such as KeySign.")
@click.option(
    "--caller", "identity", default="", help="As shown, such as client/application, or the whole URI."
)
@click.option("--key", "key_name", default="", help="Name of a key.")
@click.option("--result", "result_type", type=click.Choice(["Success", "Failed"]), default=None)
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=1000, show_default=True)
@_partition
@common_options
def query(limit: int, partition: int | None, result_type: str | None, **options: Any) -> None:
    """Show the records of all partitions that pass all filters, by time; with --json one object a line."""
    names = ("from_time", "until_time", "operation_name", "identity", "key_name")
    filters = {name: options.pop(name) for name in names} | {"result_type": result_type or ""}
    left = limit
    with connect(options, client="administrator") as pool:
        if filters["identity"] and "://" not in filters["identity"]:
            filters["identity"] = f"spiffe://{pool.connection.pool_id}/{filters['identity']}"
        logs = [
            zip(repeat(index), _read(pool, index, audit_pb2.QueryRecordsRequest(**filters)))
            for index in _partitions(pool, partition)
        ]
        for index, record in merge(*logs, key=lambda entry: entry[1]["time"]):
            if not left:
                click.echo(f"mhsm: more than {limit} records; narrow the filters or raise --limit", err=True)
                return
            left -= 1
            _show(index, record, as_json=options["as_json"])
    if left == limit:
        click.echo("mhsm: no record passes the filters", err=True)


@audit_group.command("export")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory; must not exist.")
@common_options
def export(output: Path, **common: Any) -> None:
    """Write the logs of all partitions, with checkpoints, into a directory that verify takes."""
    refuse_existing(output)
    with connect(common, client="administrator") as pool, _progress("export", common) as shown:
        pool_root = root_file(Path(pool.connection.data_directory))
        partitions = audit_calls.export_pool(pool, output, pool_root, shown)
    octets = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    report(
        {"output": str(output), "partitions": partitions, "bytes": octets},
        as_json=common["as_json"],
        text=f"the logs of {len(partitions)} partitions are in {output} ({octets:,} bytes)",
        following=f"mhsm audit verify {output}",
    )


@audit_group.command("verify")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.option(
    "--anchor",
    "anchors",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A backup's manifest, a ceremony's record or a checkpoint that was kept elsewhere.",
)
@owner_root_option
@click.option(
    "--known-lost",
    multiple=True,
    metavar="LOG",
    help="Id of a log whose loss you know of, for example of a partition that was replaced.",
)
@common_options
def verify(
    directory: Path | None,
    anchors: tuple[Path, ...],
    owner_root: Path | None,
    known_lost: tuple[str, ...],
    **common: Any,
) -> None:
    """Verify an export, the data directory of a pool, or (without DIRECTORY) the running pool.

    Exit code 6: a log was cut, rewritten, reordered or deleted, or a checkpoint is missing or forged.
    Exit code 1: an anchor is of another pool, a file is no anchor or export at all, or a log that is
    said to be lost is not.
    """
    kept = [(text, path.name) for path in anchors for text in kept_checkpoints(path)]
    if directory is not None:
        result = _verify(directory, kept, owner_root, known_lost, common)
    else:
        with tempfile.TemporaryDirectory(prefix="mhsm-audit-") as scratch:
            output = Path(scratch) / "export"
            with connect(common, client="administrator") as pool, _progress("read", common) as shown:
                pool_root = root_file(Path(pool.connection.data_directory))
                audit_calls.export_pool(pool, output, pool_root, shown)
            result = _verify(output, kept, owner_root, known_lost, common)
    newer = sorted(result.beyond & {path.name for path in anchors}) if directory else []
    _report(result, known_lost, common, newer)


def _verify(
    directory: Path,
    anchors: list[tuple[str, str]],
    owner_root: Path | None,
    known_lost: tuple[str, ...],
    common: dict[str, Any],
) -> Report:
    pool_id, directories, pool_root, noted = _layout(directory)
    kept = [*anchors, *((text, "the pool's chain") for text in noted)]
    root = load_root(owner_root or pool_root)
    for text, source in anchors:
        anchored = Note.parse(text).checkpoint.pool_id
        if anchored != pool_id:
            fail(f"the anchor {source} is of pool {anchored}, this log is of pool {pool_id}")
    total = sum(
        path.stat().st_size
        for place in directories.values()
        for path in place.glob("records-*")
        if path.is_file()
    )
    with _progress("verify", common) as shown:
        done = 0

        def progress(octets: int) -> None:
            nonlocal done
            # One call a record: the screen need not see each of them.
            if done // 1_000_000 != (done := done + octets) // 1_000_000:
                shown(done, total - done)

        return Verifier(pool_id, root, progress).verify(directories, kept, known_lost)


def _layout(directory: Path) -> tuple[str, dict[int, Path], Path, list[str]]:
    """Return (pool id, directory of each partition's log, owner's root, noted checkpoints).

    The directory is an export, or the data directory of a pool, whose chain is not read.
    """
    try:
        if (directory / EXPORT_FILE).is_file():
            document = parse_json(read_bounded(directory / EXPORT_FILE, FILE_BYTES_MAX))
            # Which partitions there are is not the export's to say: then it could leave one out.
            logs = {index: partition_directory(directory, index) for index in _PARTITIONS}
            return _pool_id(document), logs, directory / ROOT_FILE, list(document["audit_checkpoints"])
        document = parse_json(read_bounded(directory / "pool.json", FILE_BYTES_MAX))
        logs = {index: _on_disk(directory, index) for index in _PARTITIONS}
        return _pool_id(document), logs, root_file(directory), []
    except (OSError, ValueError, LookupError, TypeError):
        fail(f"{directory} is neither an export of audit logs nor a pool", "mhsm audit export --help")


def _pool_id(document: dict[str, Any]) -> str:
    if not isinstance(document["pool_id"], str):
        raise TypeError("no pool has this id")
    return document["pool_id"]


def _on_disk(directory: Path, index: int) -> Path:
    settings = parse_json(read_bounded(directory / "nodes" / str(index) / "partition.json", FILE_BYTES_MAX))
    return Path(settings["audit_directory"])


def _report(result: Report, known_lost: tuple[str, ...], common: dict[str, Any], newer: list[str]) -> None:
    if common["as_json"]:
        document = {
            "ok": result.ok,
            "anchors": result.anchors,
            "anchors_before_first_record": result.anchors_before,
            "logs": [
                {
                    "partition": log.partition,
                    "first_record": log.first_record,
                    "records": log.records,
                    "checkpoints": log.checkpoints,
                    "checkpoints_cosigned": log.cosigned,
                    "records_covered": log.covered,
                    "sequences": list(log.sequences),
                }
                for log in result.logs
            ],
            "repeated_signer_names": result.repeated_names,
            "lost_logs": [
                {
                    "partition": lost.checkpoint.partition,
                    "log": lost.log_id,
                    "checkpoint": lost.checkpoint.number,
                    "records": lost.checkpoint.size,
                    "kept_by": list(lost.kept_by),
                    "known": lost.known,
                }
                for lost in result.lost
            ],
            "findings": [
                {"partition": finding.partition, "what": finding.what} for finding in result.findings
            ],
        }
        click.echo(json.dumps(document))
    else:
        for log in result.logs:
            click.echo(
                f"partition {log.partition}: {log.records} records from record {log.first_record} on, "
                f"{log.checkpoints} checkpoints ({log.cosigned} cosigned), "
                f"covered up to record {log.covered}"
            )
        for name, count in sorted(result.repeated_names.items()):
            click.echo(
                f"{name} stands for {count} keys, all certified: that partition's disk was lost, and it "
                "counted its starts anew"
            )
        for lost in result.lost:
            if lost.known:
                click.echo(f"partition {lost.checkpoint.partition}: a gap that is known: {lost.what}")
    if result.ok:
        not_lost = sorted(set(known_lost) - {lost.log_id for lost in result.lost})
        if not_lost:
            fail(f"log {not_lost[0]} is not lost", "leave out --known-lost")
        if not common["as_json"]:
            click.echo(f"the logs are whole; they agree with {result.anchors} checkpoints kept elsewhere")
            if result.anchors_before:
                click.echo(
                    f"{result.anchors_before} checkpoints kept elsewhere are of before the oldest record "
                    "that is kept: nothing was left to compare them with"
                )
        return
    for finding, count in Counter(result.findings).items():
        where = f"partition {finding.partition}" if finding.partition >= 0 else "all partitions"
        times = f" ({count} times)" if count > 1 else ""
        click.echo(f"{where}: {finding.what}{times}", err=True)
    # An id stands in files of anybody, and goes to a terminal.
    ids = [lost.log_id for lost in result.lost if not lost.known and lost.log_id.isalnum()]
    unknown = " ".join(f"--known-lost {log_id}" for log_id in ids)
    hints = [f"if you know why a log is gone: {unknown}"] if unknown else []
    hints += [f"if {name} was made after what is verified here: take a newer export" for name in newer]
    count = len(result.findings)
    fail(
        f"the audit logs do not verify: {count} finding{'s' if count > 1 else ''}",
        "\n".join(hints),
        exit_code=VERIFICATION,
    )


def _partitions(pool: Pool, partition: int | None) -> list[int]:
    return [entry.index for entry in pool.connection.partitions if partition in {None, entry.index}]


def _read(pool: Pool, index: int, request: audit_pb2.QueryRecordsRequest) -> Iterator[dict[str, Any]]:
    request.page_size = _PAGE_RECORDS
    while True:
        page = pool.call(audit_calls.query_records(request), index)
        for record in page.records:
            yield {**json.loads(record.json), "index": record.index}
        request.page_token = page.next_page_token
        if not request.page_token:
            request.start_index = page.next_index
            return


def _read_all(
    pool: Pool, index: int, request: audit_pb2.QueryRecordsRequest
) -> tuple[list[dict[str, Any]], int]:
    records = list(_read(pool, index, request))
    return records, request.start_index


def _show(index: int, record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"partition": index, **record}))
        return
    properties = record.get("properties", {})
    key = properties.get("keyName", "")
    caller = record.get("identity", "").partition("//")[2].partition("/")[2]
    outcome = (
        record["resultType"] if record["resultType"] == "Success" else record.get("resultDescription", "")
    )
    details = " ".join(str(part) for part in (key, properties.get("algorithm", "")) if part)
    where = f"{record['time']}  {index} {record['index']:>7}"
    click.echo(f"{where}  {record['operationName']:<24} {caller:<22} {outcome} {details}".rstrip())


@contextmanager
def _progress(what: str, common: dict[str, Any]) -> Iterator[audit_calls.Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True, quiet=common["as_json"])
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(what, total=None)

        def progress(done: int, left: int) -> None:
            shown.update(task, completed=done, total=done + left)

        yield progress
