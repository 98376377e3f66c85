"""mhsm up, down and kill: a pool's processes on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console

from hsm_pool.cli.ceremony_progress import download_command
from hsm_pool.cli.output import FAILED, UNREACHABLE, data_directory_option, fail, json_option, report
from hsm_pool.cli.process_facts import running_pool, signal_own, supervisor_process_id
from hsm_pool.client.connection import NoConnection, load_connection
from hsm_pool.client.pool import Pool
from hsm_pool.errors import InvalidField, MHSMError
from hsm_pool.limits import ATTESTATION_AUTHORITIES_MAX, KEYS_MAX, VERSIONS_PER_KEY_MAX
from hsm_pool.provisioning import etcd_binary, layout, users
from hsm_pool.settings import AttestationAuthority, TraceSettings
from mhsm.enclave.v1 import enclave_pb2

_OFFICERS = [Path("officers") / f"officer-{number}.crt" for number in (1, 2, 3)]
"""What the command makes that up suggests first."""
_UP_SECONDS = 90.0
_DOWN_SECONDS = 40.0
_POLL_SECONDS = 0.1
_READY = {
    enclave_pb2.PARTITION_STATE_PROVISIONED,
    enclave_pb2.PARTITION_STATE_LOCKED,
    enclave_pb2.PARTITION_STATE_SERVING,
    enclave_pb2.PARTITION_STATE_DRAINED,
    enclave_pb2.PARTITION_STATE_QUARANTINED,
}


@click.command()
@click.option("--attended", is_flag=True, help="After all partitions stopped, a quorum must unlock the pool.")
@click.option("--recoverable-days", type=click.IntRange(7, 90), default=90, show_default=True)
@click.option(
    "--purge-protection",
    is_flag=True,
    help="No deleted key is purged before its scheduled purge date; for ever, nobody can take it back.",
)
@click.option(
    "--keys-max",
    type=click.IntRange(1, KEYS_MAX),
    default=KEYS_MAX,
    show_default=True,
    help="Keys that a new pool holds, soft-deleted ones included.",
)
@click.option(
    "--versions-per-key-max",
    type=click.IntRange(1, VERSIONS_PER_KEY_MAX),
    default=VERSIONS_PER_KEY_MAX,
    show_default=True,
    help="Versions that a key of a new pool has.",
)
@click.option(
    "--audit-failure",
    type=click.Choice(["stop", "continue"]),
    default="stop",
    show_default=True,
    help="What happens to operations while the audit log cannot be written.",
)
@click.option("--etcd", "etcd_path", default=None, help="etcd binary; by default the one on PATH.")
@click.option(
    "--external-store",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="JSON with endpoints, ca_file, certificate_file, key_file of an etcd cluster.",
)
@click.option(
    "--token-issuer",
    default="development",
    show_default=True,
    help="Whose bearer tokens are accepted: development (a small issuer of the pool's own), none, or a JSON "
    "file with issuer, audience, keys (file, or https URL on loopback) and keys_ca_file.",
)
@click.option(
    "--administrator",
    "administrators",
    type=click.UUID,
    multiple=True,
    help="Object id of an initial administrator who presents tokens of that issuer; repeatable.",
)
@click.option(
    "--attestation-authority",
    "authority_files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Who may vouch for environments that keys are released to, beside the development profile's own "
    "authority: JSON file with issuer, keys and keys_ca_file as for --token-issuer; repeatable.",
)
@click.option(
    "--firmware-repository",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="Where a new pool gets its firmware (mhsm firmware new-repository).",
)
@click.option(
    "--first-user-id",
    type=click.IntRange(users.FIRST_USER_ID_MIN, users.FIRST_USER_ID_MAX),
    default=users.FIRST_USER_ID,
    show_default=True,
    help="First of the five users that a new pool's processes run as where root starts it.",
)
@click.option(
    "--traces",
    default=None,
    metavar="HOST:PORT",
    help="Where a new pool sends traces: an OpenTelemetry collector on this machine (OTLP over gRPC).",
)
@data_directory_option
@json_option
def up(
    attended: bool,
    recoverable_days: int,
    purge_protection: bool,
    keys_max: int,
    versions_per_key_max: int,
    audit_failure: Literal["stop", "continue"],
    etcd_path: str | None,
    external_store: Path | None,
    token_issuer: str,
    administrators: tuple[uuid.UUID, ...],
    authority_files: tuple[Path, ...],
    firmware_repository: Path | None,
    first_user_id: int,
    traces: str | None,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Start the pool in a data directory; make it first when the directory is new."""
    directory = data_dir.absolute()
    made = not layout.is_pool(directory)
    if made:
        binary = ""
        if external_store is None:
            binary = _usable_etcd(etcd_path)
        tokens = _token_issuer(token_issuer)
        external = _external(external_store)
        object_ids = tuple(str(object_id) for object_id in administrators)
        new = layout.NewPool(
            attended,
            recoverable_days,
            binary,
            external,
            tokens,
            firmware_repository,
            audit_failure,
            purge_protection,
            first_user_id,
            object_ids,
            _traces(traces),
            _authorities(authority_files),
            keys_max,
            versions_per_key_max,
        )
        try:
            pool_id = layout.provision(directory, new)
        except layout.DirectoryRefused as error:
            fail(str(error), "choose another --data-dir")
        click.echo(f"made pool {pool_id} in {directory}", err=True)
    elif attended and not layout.pool_settings(directory)["attended"]:
        fail("the pool was made unattended; that cannot be changed", "mhsm up")
    elif purge_protection and not layout.pool_settings(directory).get("purge_protection"):
        fail("the pool was made without purge protection", "mhsm up")
    _check_admission_policy(directory)
    running = supervisor_process_id(directory) is not None
    started = None if running else _start_supervisor(directory)
    with Console(stderr=True).status("waiting for the partitions"):
        states = _await_ready(directory, started)
    names = [enclave_pb2.PartitionState.Name(state).removeprefix("PARTITION_STATE_") for state in states]
    connection = directory / "connection.json"
    rest = [f"https://localhost:{port}" for port in _rest_ports(directory)]
    metrics = [f"http://{entry.metrics_endpoint}/metrics" for entry in load_connection(directory).partitions]
    following = {
        "PROVISIONED": f"mhsm officers make --output-dir officers\n{download_command(_OFFICERS, 2)}",
        "LOCKED": "mhsm security-domain init-recovery --output attempt.json",
    }.get(names[0], "mhsm status")
    report(
        {
            "made": made,
            "already_running": running,
            "data_directory": str(directory),
            "connection_file": str(connection),
            "states": names,
            "rest_endpoints": rest,
            "metrics": metrics,
        },
        as_json=as_json,
        text=f"the pool {'was running already' if running else 'runs'}: {', '.join(names).lower()}\n"
        f"connection file: {connection}"
        + (f"\nREST, any of: {' '.join(rest)}" if rest else "")
        + f"\nmetrics: {' '.join(metrics)}",
        following=following,
    )


@click.command()
@data_directory_option
@json_option
def down(data_dir: Path, as_json: bool) -> None:
    """Stop the pool; leaves no process. Nothing is deleted."""
    directory = data_dir.absolute()
    process_id = supervisor_process_id(directory)
    if process_id is not None:
        os.kill(process_id, signal.SIGTERM)
        deadline = time.monotonic() + _DOWN_SECONDS
        while supervisor_process_id(directory) is not None:
            if time.monotonic() > deadline:
                fail(f"the supervisor (process {process_id}) did not stop in time", "mhsm down")
            time.sleep(_POLL_SECONDS)
    report(
        {"was_running": process_id is not None, "data_directory": str(directory)},
        as_json=as_json,
        text="the pool is stopped" if process_id is not None else "the pool was not running",
        following="mhsm up",
    )


@click.command()
@click.argument("partition", type=click.IntRange(0, layout.PARTITIONS - 1))
@click.option(
    "--what",
    type=click.Choice(["partition", "store", "node", "agent"]),
    default="partition",
    show_default=True,
    help="The partition process, its store member, both, or the node agent (and so both).",
)
@click.option(
    "--signal", "signal_name", type=click.Choice(["KILL", "STOP", "CONT"]), default="KILL", show_default=True
)
@data_directory_option
@json_option
def kill(partition: int, what: str, signal_name: str, data_dir: Path, as_json: bool) -> None:
    """Send a signal to a partition's processes, for chaos. What is killed is restarted.

    Only what this pool's supervisor and its node agents have started gets it.
    """
    try:
        connection = running_pool(data_dir)
    except NoConnection as error:
        fail(str(error), "mhsm up", UNREACHABLE)
    names = {
        "partition": ["partition"],
        "store": ["store_member"],
        "node": ["store_member", "partition"],
        "agent": ["node_agent"],
    }[what]
    sent: dict[str, int] = {}
    for name in names:
        process_id = connection.partitions[partition].process_ids.get(name)
        if process_id and signal_own(process_id, signal.Signals[f"SIG{signal_name}"], connection):
            sent[name] = process_id
    if not sent:
        fail(f"nothing of partition {partition} is running", "mhsm status", FAILED)
    report(
        {"partition": partition, "signal": signal_name, "process_ids": sent},
        as_json=as_json,
        text=f"sent {signal_name} to {', '.join(f'{name} ({pid})' for name, pid in sent.items())}",
        following="mhsm status",
    )


def _rest_ports(directory: Path) -> list[str]:
    """Return the port of each partition's REST endpoint; none without an issuer of tokens."""
    endpoints = [entry.rest_endpoint for entry in load_connection(directory).partitions]
    return [endpoint.rpartition(":")[2] for endpoint in endpoints if endpoint]


def _check_admission_policy(directory: Path) -> None:
    """End the command if the partitions could not read their policy; they would not start."""
    from hsm_pool.enclave import admission

    try:
        admission.load(directory / layout.ADMISSION_POLICY)
    except InvalidField as error:
        fail(error.message, f"correct {directory / layout.ADMISSION_POLICY}, or remove it for the default")


def _usable_etcd(configured: str | None) -> str:
    try:
        binary = etcd_binary.find_etcd(configured)
        version, warning = etcd_binary.check_version(binary)
    except etcd_binary.EtcdUnusable as error:
        fail(str(error), "apt-get install etcd-server\nmhsm up --etcd PATH")
    click.echo(f"store: etcd {version}" + (f" ({warning})" if warning else ""), err=True)
    return binary


def _external(path: Path | None) -> layout.ExternalStore | None:
    if path is None:
        return None
    try:
        value = json.loads(path.read_text())
        return layout.ExternalStore(
            tuple(value["endpoints"]), value["ca_file"], value["certificate_file"], value["key_file"]
        )
    except (ValueError, KeyError, TypeError):
        fail(f"{path} does not describe an etcd cluster", "mhsm up --help")


def _token_issuer(value: str) -> layout.OwnIssuer | Literal["development"] | None:
    if value == "development":
        return "development"
    if value == "none":
        return None
    path = Path(value)
    try:
        own = layout.OwnIssuer(**json.loads(path.read_text()))
        own.settings("127.0.0.1:1")  # checks them
    except (OSError, ValueError, TypeError, AttributeError):
        fail(f"{path} does not describe a token issuer", "mhsm up --help")
    return own


def _traces(endpoint: str | None) -> TraceSettings | None:
    try:
        return TraceSettings(endpoint) if endpoint is not None else None
    except ValueError as error:
        fail(str(error), "mhsm up --traces 127.0.0.1:4317")


def _authorities(files: tuple[Path, ...]) -> tuple[AttestationAuthority, ...]:
    authorities: list[AttestationAuthority] = []
    for path in files:
        try:
            authorities.append(AttestationAuthority(**{"keys_ca_file": "", **json.loads(path.read_text())}))
        except (OSError, ValueError, TypeError):
            fail(f"{path} does not describe an attestation authority", "see mhsm up --help")
    if len({entry.issuer for entry in authorities}) < len(authorities):
        fail("an attestation authority is named twice", "see mhsm up --help")
    if len(authorities) >= ATTESTATION_AUTHORITIES_MAX:
        fail(f"at most {ATTESTATION_AUTHORITIES_MAX - 1} attestation authorities can be named", "")
    return tuple(authorities)


def _start_supervisor(directory: Path) -> subprocess.Popen[bytes]:
    try:
        layout.pool_settings(directory)
    except (OSError, ValueError, layout.DirectoryRefused) as refused:
        fail(str(refused), "mhsm up --data-dir D with a new directory")
    for index in range(layout.PARTITIONS):
        for file in layout.NODE_SETTINGS:
            missing = directory / "nodes" / str(index) / file
            if not missing.is_file():
                fail(
                    f"{missing} is gone",
                    "put back the node's directory, or its pki, platform, owner and *.json: "
                    "all else in it can be lost",
                )
    (directory / "connection.json").unlink(missing_ok=True)
    log = os.open(directory / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "hsm_pool.provisioning.supervisor", "--data-dir", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(log)


def _await_ready(
    directory: Path, started: subprocess.Popen[bytes] | None
) -> list[enclave_pb2.PartitionState.ValueType]:
    """Wait, bounded, until every partition is in a state that an operator can act on."""
    deadline = time.monotonic() + _UP_SECONDS
    while time.monotonic() < deadline:
        states = _states(directory)
        if states is not None:
            return states
        # Another one may have been started at the same time, and have been first.
        if started and started.poll() is not None and supervisor_process_id(directory) is None:
            fail("the supervisor ended at once", f"look at {directory}/supervisor.log", UNREACHABLE)
        time.sleep(_POLL_SECONDS)
    fail(
        f"the partitions did not become ready in {_UP_SECONDS:.0f} s",
        f"look at {directory}/supervisor.log and {directory}/nodes/*/logs",
        UNREACHABLE,
    )


def _states(directory: Path) -> list[enclave_pb2.PartitionState.ValueType] | None:
    """Return the partitions' states once all are ready, else None."""
    try:
        connection = load_connection(directory)
    except NoConnection:
        return None
    expected: list[Any] = [entry.process_ids.get("partition") for entry in connection.partitions]
    if not all(expected):
        return None
    states: list[enclave_pb2.PartitionState.ValueType] = []
    with Pool(connection, "administrator", timeout_seconds=1.0) as pool:
        for entry in connection.partitions:
            try:
                state = pool.partition_status(entry.index).state
            except MHSMError:
                return None
            if state not in _READY:
                return None
            states.append(state)
    locked = enclave_pb2.PARTITION_STATE_LOCKED
    # One partition may unseal or heal a moment later than the first: then it is not locked.
    return None if locked in states and len(set(states)) > 1 else states
