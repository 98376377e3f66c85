"""mhsm officers and mhsm security-domain: making officers, activating, unlocking."""

from __future__ import annotations

import base64
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import common_options, connect, fail, read_bounded, report
from security_domain import container, officers, submission


@click.group("officers")
def officers_group() -> None:
    """Officers of the security domain: each holds one RSA key."""


@officers_group.command("make")
@click.option("--count", type=click.IntRange(1, 10), default=3, show_default=True)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def officers_make(count: int, output_dir: Path, as_json: bool) -> None:
    """Make officers' keys and certificates, for rehearsals.

    In production each officer makes his own key on his own machine.
    """
    output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    targets = [
        (output_dir / f"officer-{index}.crt", output_dir / f"officer-{index}.key")
        for index in range(1, count + 1)
    ]
    for path in [path for pair in targets for path in pair]:
        refuse_existing(path)
    made: list[dict[str, str]] = []
    for index, (certificate_file, key_file) in enumerate(targets, start=1):
        certificate_pem, key = officers.make_officer(f"officer-{index}")
        write_new(key_file, officers.save_private_key(key))
        write_new(certificate_file, certificate_pem, 0o644)
        made.append({"certificate_file": str(certificate_file), "key_file": str(key_file)})
    report(
        {"officers": made},
        as_json=as_json,
        text=f"made {count} officers in {output_dir}",
        following="mhsm security-domain download --required 2 --output security-domain.json "
        + " ".join(f"--officer {pair[0]}" for pair in targets),
    )


@click.group("security-domain")
def security_domain_group() -> None:
    """The security domain: activation and unlocking by a quorum of officers."""


@security_domain_group.command("download")
@click.option(
    "--officer",
    "certificate_files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    required=True,
    help="Certificate of an officer, PEM; 3 to 10 times.",
)
@click.option("--required", type=click.IntRange(2, 10), required=True, help="Quorum.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--request-id", default="", help="Repeat an interrupted download with its request id.")
@common_options
def download(
    certificate_files: tuple[Path, ...],
    required: int,
    output: Path,
    request_id: str,
    **common: Any,
) -> None:
    """Create the security domain for these officers and activate the pool."""
    refuse_existing(output)
    certificates = [
        officers.certificate_der(read_bounded(path, officers.PEM_BYTES_MAX)) for path in certificate_files
    ]
    request_id = request_id or str(uuid.uuid4())
    click.echo(f"request id {request_id} (repeat with it if the answer is lost)", err=True)
    with connect(common, client="administrator") as pool:
        file = pool.download_security_domain(certificates, required, request_id=request_id)
    write_new(output, file)
    domain = container.parse(file)
    report(
        {
            "security_domain_file": str(output),
            "pool_id": domain.pool_id,
            "required": domain.required,
            "officers": len(certificates),
            "request_id": request_id,
        },
        as_json=common["as_json"],
        text=f"the pool is active; {domain.required} of {len(certificates)} officers open {output}",
        following="mhsm status",
    )


@security_domain_group.command("init-recovery")
@click.option("--partition", type=click.IntRange(0, 2), default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@common_options
def init_recovery(partition: int, output: Path, **common: Any) -> None:
    """Start to unlock a locked pool; writes what the officers need to submit their shares."""
    refuse_existing(output)
    with connect(common, client="administrator") as pool:
        begun = pool.init_recovery(partition)
    content = {
        "attempt_id": base64.b64encode(begun.attempt_id).decode(),
        "exchange_public_key": base64.b64encode(begun.exchange_public_key).decode(),
        "partition": begun.partition_index,
        "pool_id": begun.pool_id,
        "generation": begun.generation,
        "expires": begun.expires.ToJsonString(),
    }
    write_new(output, json.dumps(content, indent=2).encode() + b"\n")
    report(
        {"recovery_file": str(output), **content},
        as_json=common["as_json"],
        text=f"partition {partition} waits for shares until {content['expires']}",
        following=f"mhsm security-domain submit-share --recovery {output} "
        "--security-domain security-domain.json --officer-key officer-1.key",
    )


@dataclass(frozen=True, slots=True)
class _RecoveryFile:
    """What init-recovery wrote."""

    partition: int
    pool_id: str
    generation: int
    attempt_id: bytes
    exchange_public_key: bytes


def _read_recovery(path: Path) -> _RecoveryFile:
    try:
        content = json.loads(read_bounded(path, container.FILE_BYTES_MAX))
        return _RecoveryFile(
            int(content["partition"]),
            str(content["pool_id"]),
            int(content["generation"]),
            base64.b64decode(content["attempt_id"], validate=True),
            base64.b64decode(content["exchange_public_key"], validate=True),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        fail(f"{path} was not written by init-recovery", "mhsm security-domain init-recovery --help")


@security_domain_group.command("submit-share")
@click.option(
    "--recovery", "recovery_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True
)
@click.option(
    "--security-domain",
    "domain_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
)
@click.option(
    "--officer-key", "key_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True
)
@common_options
def submit_share(recovery_file: Path, domain_file: Path, key_file: Path, **common: Any) -> None:
    """Open one officer's share, encrypt it to the exchange key, sign and submit it.

    The passphrase of an encrypted key file is asked for.
    """
    recovery = _read_recovery(recovery_file)
    key = officers.load_private_key(
        read_bounded(key_file, officers.PEM_BYTES_MAX),
        lambda: click.prompt("passphrase", hide_input=True, err=True).encode(),
    )
    file = read_bounded(domain_file, container.FILE_BYTES_MAX)
    domain = container.parse(file)
    if (domain.pool_id, domain.generation) != (recovery.pool_id, recovery.generation):
        fail("the security-domain file is of another pool or generation", "use the file in force")
    submitted = submission.make_submission(file, key, recovery.attempt_id, recovery.exchange_public_key)
    with connect(common, client="administrator") as pool:
        progress = pool.submit_share(recovery.partition, recovery.attempt_id, submitted)
    missing = progress.required - progress.accepted
    report(
        {
            "accepted": progress.accepted,
            "required": progress.required,
            "unlocked": progress.unlocked,
        },
        as_json=common["as_json"],
        text=f"{progress.accepted} of {progress.required} shares"
        + (": the pool is unlocked" if progress.unlocked else f", {missing} more needed"),
        following="mhsm status"
        if progress.unlocked
        else "the next officer runs the same command with his own key",
    )


@security_domain_group.command("cancel-recovery")
@click.option(
    "--recovery", "recovery_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True
)
@common_options
def cancel_recovery(recovery_file: Path, **common: Any) -> None:
    """End an attempt to unlock; all submitted shares are forgotten."""
    recovery = _read_recovery(recovery_file)
    with connect(common, client="administrator") as pool:
        pool.cancel_recovery(recovery.partition, recovery.attempt_id)
    report({"cancelled": True}, as_json=common["as_json"], text="the attempt is cancelled", following="")
