"""mhsm security-domain restore-blob and upload: Azure's way, on one workstation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hsm_pool.cli.attempts import (
    EXISTING_FILE,
    NEW_FILE,
    attempt_option,
    described,
    private_key,
    read_attempt,
)
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import common_options, connect, read_bounded, report
from security_domain import officers
from security_domain.azure import document as azure_document
from security_domain.azure.items import DOCUMENT_BYTES_MAX
from security_domain.azure.restore_blob import make_restore_blob


@click.command("restore-blob")
@click.option(
    "--azure-file",
    type=EXISTING_FILE,
    required=True,
    help="The security domain in Azure's format (download --azure-output).",
)
@click.option(
    "--exchange-certificate",
    "exchange_file",
    type=EXISTING_FILE,
    required=True,
    help="PEM, from init-recovery.",
)
@click.option(
    "--officer",
    "officer_files",
    type=(EXISTING_FILE, EXISTING_FILE),
    multiple=True,
    required=True,
    help="Certificate and key of an officer; as many as the quorum.",
)
@click.option("--output", type=NEW_FILE, required=True, help="The restore blob, to be written.")
@common_options
def restore_blob(
    azure_file: Path,
    exchange_file: Path,
    officer_files: tuple[tuple[Path, Path], ...],
    output: Path,
    **common: Any,
) -> None:
    """Open Azure's file with a quorum of keys on ONE machine, and encrypt it to the pool; contacts nobody.

    A quorum of private keys meets on this machine: whoever controls it has the security domain.
    Prefer submit-share, where each officer opens his own share on his own machine.
    """
    refuse_existing(output)
    click.echo("warning: a quorum of officers' keys meets on this machine; prefer submit-share", err=True)
    parsed = azure_document.parse(read_bounded(azure_file, DOCUMENT_BYTES_MAX))
    exchange = officers.pem_to_der(read_bounded(exchange_file, officers.PEM_BYTES_MAX))
    pairs = [
        (
            private_key(key_file, f"passphrase of {key_file}"),
            officers.certificate_der(read_bounded(path, officers.PEM_BYTES_MAX)),
        )
        for path, key_file in officer_files
    ]
    write_new(output, make_restore_blob(parsed, pairs, exchange))
    report(
        {"output": str(output)},
        as_json=common["as_json"],
        text=f"wrote {output}: the security domain under the exchange certificate",
        following=f"mhsm security-domain upload --restore-blob {output} --attempt ATTEMPT",
    )


@click.command("upload")
@attempt_option
@click.option("--restore-blob", "blob_file", type=EXISTING_FILE, required=True)
@common_options
def upload(attempt_file: Path, blob_file: Path, **common: Any) -> None:
    """Complete a recovery with a restore blob, ours or one of Azure's clients."""
    attempt = read_attempt(attempt_file)
    blob = read_bounded(blob_file, DOCUMENT_BYTES_MAX)
    with connect(common, client="administrator") as pool:
        ceremony = pool.upload_restore_blob(attempt.partition, attempt.attempt_id, blob)
    report(
        described(ceremony),
        as_json=common["as_json"],
        text="the pool is unlocked",
        following="mhsm status",
    )
