"""mhsm security-domain restore-blob and upload: Azure's way, on one workstation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hsm_pool.cli.attempts import (
    EXISTING_FILE,
    NEW_FILE,
    attempt_option,
    certificates,
    described,
    private_key,
    read_attempt,
    require_evidence,
    require_own_pool,
    require_share,
)
from hsm_pool.cli.ceremony_progress import after, done
from hsm_pool.cli.evidence_files import Anchors, anchor_options
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import QUORUM, common_options, connect, fail, named, read_bounded, report
from security_domain.azure import document as azure_document
from security_domain.azure.items import DOCUMENT_BYTES_MAX
from security_domain.azure.restore_blob import make_restore_blob
from security_domain.errors import SubmissionRefused


@click.command("restore-blob")
@click.option(
    "--azure-file",
    type=EXISTING_FILE,
    required=True,
    help="The security domain in Azure's format (download --azure-output).",
)
@attempt_option
@click.option(
    "--officer",
    "officer_files",
    type=(EXISTING_FILE, EXISTING_FILE),
    multiple=True,
    required=True,
    help="Certificate and key of an officer; as many as the quorum.",
)
@click.option("--output", type=NEW_FILE, required=True, help="The restore blob, to be written.")
@anchor_options
@common_options
def restore_blob(
    azure_file: Path,
    attempt_file: Path,
    officer_files: tuple[tuple[Path, Path], ...],
    output: Path,
    platform_root: Path | None,
    owner_root: Path | None,
    policy: Path | None,
    firmware_repository: Path | None,
    **common: Any,
) -> None:
    """Open Azure's file with a quorum of keys on ONE machine, and encrypt it to the pool; contacts nobody.

    Before a share is opened, the evidence of the attempt's exchange certificate is verified.

    A quorum of private keys meets on this machine: whoever controls it has the security domain.
    Prefer submit-share, where each officer opens his own share on his own machine.
    """
    refuse_existing(output)
    click.echo("warning: a quorum of officers' keys meets on this machine; prefer submit-share", err=True)
    attempt = read_attempt(attempt_file)
    exchange = attempt.exchange_certificate_der
    anchors = Anchors.load(common["data_dir"], platform_root, owner_root, policy, firmware_repository)
    require_evidence(attempt_file, attempt, anchors, exchange)
    with named(azure_file):
        parsed = azure_document.parse(read_bounded(azure_file, DOCUMENT_BYTES_MAX))
    paths = [path for path, _ in officer_files]
    ders = certificates(paths)
    files = {
        require_share(azure_file, parsed, path, der).thumbprint: path
        for path, der in zip(paths, ders, strict=True)
    }
    keys = [private_key(key_file, f"passphrase of {key_file}") for _, key_file in officer_files]
    try:
        blob = make_restore_blob(parsed, list(zip(keys, ders, strict=True)), exchange)
    except SubmissionRefused as error:
        fail(
            f"{azure_file}, {files[error.officer]}: {error}",
            "each officer's own certificate and key, once",
            QUORUM,
        )
    write_new(output, blob)
    report(
        {"output": str(output)},
        as_json=common["as_json"],
        text=f"wrote {output}: the security domain under the exchange certificate",
        following=f"mhsm security-domain upload --restore-blob {output} --attempt {attempt_file}",
    )


@click.command("upload")
@attempt_option
@click.option("--restore-blob", "blob_file", type=EXISTING_FILE, required=True)
@common_options
def upload(attempt_file: Path, blob_file: Path, **common: Any) -> None:
    """Complete a recovery with a restore blob, ours or one of Azure's clients."""
    attempt = read_attempt(attempt_file)
    blob = read_bounded(blob_file, DOCUMENT_BYTES_MAX)
    require_own_pool(attempt_file, attempt, common["data_dir"])
    with connect(common, client="administrator") as pool, named(blob_file):
        ceremony = pool.upload_restore_blob(attempt.partition, attempt.attempt_id, blob)
    report(
        described(ceremony),
        as_json=common["as_json"],
        text=done(ceremony),
        following=after(ceremony),
    )
