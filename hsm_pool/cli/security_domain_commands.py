"""mhsm officers and mhsm security-domain: making officers, activating, unlocking."""

from __future__ import annotations

import base64
import json
import uuid
from pathlib import Path
from typing import Any

import click
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import common_options, connect, fail, report
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
        key_pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_new(key_file, key_pem)
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
        x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)
        for path in certificate_files
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
@click.option("--ask-passphrase", is_flag=True, help="The key file is encrypted: ask for its passphrase.")
@common_options
def submit_share(
    recovery_file: Path, domain_file: Path, key_file: Path, ask_passphrase: bool, **common: Any
) -> None:
    """Open one officer's share, encrypt it to the exchange key, sign and submit it."""
    recovery = json.loads(recovery_file.read_text())
    passphrase = click.prompt("passphrase", hide_input=True, err=True).encode() if ask_passphrase else None
    key = serialization.load_pem_private_key(key_file.read_bytes(), passphrase)
    if not isinstance(key, rsa.RSAPrivateKey):
        fail(f"{key_file} is not an RSA key", "use the officer's own key")
    file = domain_file.read_bytes()
    domain = container.parse(file)
    if domain.pool_id != recovery["pool_id"] or domain.generation != recovery["generation"]:
        fail("the security-domain file is of another pool or generation", "use the file in force")
    attempt_id = base64.b64decode(recovery["attempt_id"], validate=True)
    exchange_key = base64.b64decode(recovery["exchange_public_key"], validate=True)
    submitted = submission.make_submission(file, key, attempt_id, exchange_key)
    with connect(common, client="administrator") as pool:
        progress = pool.submit_share(recovery["partition"], attempt_id, submitted)
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
    recovery = json.loads(recovery_file.read_text())
    with connect(common, client="administrator") as pool:
        pool.cancel_recovery(recovery["partition"], base64.b64decode(recovery["attempt_id"]))
    report({"cancelled": True}, as_json=common["as_json"], text="the attempt is cancelled", following="")
