"""mhsm security-domain plan, download, init-recovery, verify, rotate-shares, new-generation.

The verbs that begin a ceremony; each but plan writes an attempt file for the officers.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from hsm_pool.cli.attempts import (
    EXISTING_FILE,
    NEW_FILE,
    azure_output_option,
    described,
    exchange_certificate,
    new_officers,
    partition_option,
    purpose,
    write_attempt,
)
from hsm_pool.cli.ceremony_progress import (
    DOMAIN_FILE,
    download_command,
    fetch_file,
    officer_key,
    submit_share,
)
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import (
    common_options,
    connect,
    fail,
    json_option,
    named,
    read_bounded,
    report,
    typed_errors,
)
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import container, officers
from security_domain.azure import document as azure_document
from security_domain.azure.items import DOCUMENT_BYTES_MAX
from security_domain.fingerprints import words

_attempt_output = click.option(
    "--output", type=NEW_FILE, required=True, help="What the officers need, to be written."
)
_officers = click.option(
    "--officer",
    "certificate_files",
    type=EXISTING_FILE,
    multiple=True,
    required=True,
    help="Certificate of an officer, PEM; 3 to 10 times.",
)
_required = click.option("--required", type=click.IntRange(2, 10), required=True, help="Quorum.")


@click.command("plan")
@_officers
@_required
@json_option
@typed_errors
def plan(certificate_files: tuple[Path, ...], required: int, as_json: bool) -> None:
    """Say what a download or a rotation with these officers would do; contacts nobody."""
    found = new_officers(certificate_files, required)
    spare = len(found) - required
    warnings = [] if spare else ["every officer is needed: one lost key loses the security domain"]
    rows = [
        {
            "index": index,
            "file": str(path),
            "thumbprint": officer.thumbprint,
            "words": words(officer.certificate_der),
        }
        for index, (path, officer) in enumerate(zip(certificate_files, found, strict=True), start=1)
    ]
    lines = [
        f"officer {row['index']}: {row['file']}\n  thumbprint {row['thumbprint']}\n  {row['words']}"
        for row in rows
    ]
    lines.append(f"any {required} of {len(found)} open the security domain; {spare} may be lost")
    lines.append(
        "the file that is written holds ciphertext only; it opens nothing before its officers have submitted"
    )
    lines += [f"warning: {warning}" for warning in warnings]
    report(
        {"officers": rows, "required": required, "may_be_lost": spare, "warnings": warnings},
        as_json=as_json,
        text="\n".join(lines),
        following="each officer compares his words\nof a new pool:\n"
        + download_command(certificate_files, required)
        + "\nof an active one:\nmhsm security-domain rotate-shares --help"
        + "\nmhsm security-domain new-generation --help",
    )


@click.command("download")
@_officers
@_required
@click.option("--output", type=NEW_FILE, required=True, help="The security-domain file, to be written.")
@click.option("--attempt-output", type=NEW_FILE, required=True, help="The attempt file, to be written.")
@azure_output_option
@click.option("--request-id", default="", help="Repeat an interrupted download with its request id.")
@partition_option
@common_options
def download(
    certificate_files: tuple[Path, ...],
    required: int,
    output: Path,
    attempt_output: Path,
    azure_output: Path | None,
    request_id: str,
    partition: int,
    **common: Any,
) -> None:
    """Create the security domain; the pool is active when every officer has submitted his share."""
    refuse_existing(output)
    refuse_existing(attempt_output)
    if azure_output:
        refuse_existing(azure_output)
    found = _certificates(certificate_files, required)
    request_id = request_id or str(uuid.uuid4())
    click.echo(f"request id {request_id} (repeat with it if the answer is lost)", err=True)
    with connect(common, client="administrator") as pool:
        refuse_second(pool, {0, 1, 2} - {partition})
        ceremony = pool.download_security_domain(found, required, request_id, partition)
    write_new(output, ceremony.security_domain_file)
    if azure_output:
        write_new(azure_output, ceremony.azure_security_domain_file)
    if not ceremony.complete:
        write_attempt(attempt_output, ceremony, common["data_dir"])
    report(
        {
            "output": str(output),
            "attempt": str(attempt_output),
            "pool_id": ceremony.pool_id,
            "generation": ceremony.generation,
            "officers": len(found),
            "required": required,
            "active": ceremony.complete,
            "request_id": request_id,
            "words": words(ceremony.security_domain_file),
            "exchange_key_words": words(ceremony.exchange_public_key) if not ceremony.complete else "",
        },
        as_json=common["as_json"],
        text=f"wrote {output}: any {required} of {len(found)} officers open it\n"
        f"security-domain file: {words(ceremony.security_domain_file)}\n"
        + ("" if ceremony.complete else f"exchange key: {words(ceremony.exchange_public_key)}\n")
        + ("the pool is active" if ceremony.complete else "the pool becomes active when all have submitted"),
        following="mhsm status"
        if ceremony.complete
        else submit_share(attempt_output, output, officer_key(certificate_files)),
    )


@click.command("init-recovery")
@click.option(
    "--security-domain",
    "domain_file",
    type=EXISTING_FILE,
    default=None,
    help="In a new pool: the lost pool's file (its own or Azure's format), unless a restore blob brings it. "
    "A locked pool has its own.",
)
@_attempt_output
@click.option(
    "--exchange-certificate-output",
    type=NEW_FILE,
    default=None,
    help="Where to write the exchange certificate (PEM), for az keyvault security-domain restore-blob.",
)
@partition_option
@common_options
def init_recovery(
    domain_file: Path | None,
    partition: int,
    output: Path,
    exchange_certificate_output: Path | None,
    **common: Any,
) -> None:
    """Start to unlock a locked pool, or to recover a lost pool's security domain in a new pool."""
    file = read_bounded(domain_file, DOCUMENT_BYTES_MAX) if domain_file else b""
    if domain_file and not azure_document.is_document(file):
        with named(domain_file):
            container.parse(file)
    if exchange_certificate_output:
        refuse_existing(exchange_certificate_output)
    following = _restore_blob(output) if exchange_certificate_output else ""
    ceremony = _begin(
        common, partition, output, lambda pool: pool.init_recovery(partition, file), following, domain_file
    )
    if exchange_certificate_output:
        pem = officers.certificate_pem(exchange_certificate(ceremony))
        write_new(exchange_certificate_output, pem, 0o644)


@click.command("verify")
@_attempt_output
@partition_option
@common_options
def verify(partition: int, output: Path, **common: Any) -> None:
    """Start a proof that a quorum can open the security domain; it changes nothing."""
    _begin(common, partition, output, lambda pool: pool.verify_security_domain(partition))


@click.command("rotate-shares")
@_officers
@_required
@_attempt_output
@partition_option
@common_options
def rotate_shares(
    certificate_files: tuple[Path, ...], required: int, partition: int, output: Path, **common: Any
) -> None:
    """Start to share the same secret out among new officers.

    It takes effect when a quorum of the old officers, and then a quorum of the new ones, have
    submitted. It does not revoke: an old file with an old quorum still opens the secret.
    """
    found = _certificates(certificate_files, required)
    _begin(common, partition, output, lambda pool: pool.rotate_shares(found, required, partition))


@click.command("new-generation")
@_officers
@_required
@_attempt_output
@partition_option
@common_options
def new_generation(
    certificate_files: tuple[Path, ...], required: int, partition: int, output: Path, **common: Any
) -> None:
    """Start to replace the security domain: the only ceremony that revokes.

    It needs a living pool and no old officer, and takes effect when every new officer has submitted
    his share. What is written from then on opens to nobody who holds old shares. Take a new backup.
    """
    found = _certificates(certificate_files, required)
    following = fetch_file(partition)
    _begin(common, partition, output, lambda pool: pool.new_generation(found, required, partition), following)


def _certificates(paths: tuple[Path, ...], required: int) -> list[bytes]:
    return [officer.certificate_der for officer in new_officers(paths, required)]


def _begin(
    common: dict[str, Any],
    partition: int,
    output: Path,
    begin: Callable[[Pool], security_domain_pb2.Ceremony],
    following: str = "",
    domain_file: Path | None = None,
) -> security_domain_pb2.Ceremony:
    refuse_existing(output)
    with connect(common, client="administrator") as pool:
        refuse_second(pool, range(3))
        ceremony = begin(pool)
    write_attempt(output, ceremony, common["data_dir"])
    keys = {
        "exchange key": ceremony.exchange_public_key,
        "exchange certificate": exchange_certificate(ceremony),
    }
    if not following and not ceremony.required:
        following = _restore_blob(output)
    report(
        {"attempt": str(output), **described(ceremony)},
        as_json=common["as_json"],
        text=f"partition {partition} waits for {_awaited(ceremony)} "
        f"until {ceremony.expires.ToJsonString()}\n"
        + "\n".join(f"{name}: {words(key)}" for name, key in keys.items() if key),
        following=following or submit_share(output, domain_file or DOMAIN_FILE),
    )
    return ceremony


def _awaited(ceremony: security_domain_pb2.Ceremony) -> str:
    return f"{ceremony.required} shares" if ceremony.required else "a restore blob"


def refuse_second(pool: Pool, partitions: Iterable[int]) -> None:
    """End the command if one of these partitions runs a ceremony; one that begins refuses by itself."""
    for index in partitions:
        try:
            ceremony = pool.get_ceremony(index)
        except MHSMError as error:
            click.echo(f"warning: partition {index} may be in a ceremony: {error.message}", err=True)
            continue
        if ceremony:
            fail(
                f"a ceremony ({purpose(ceremony).replace('_', ' ')}) is under way at partition {index}; "
                "finish it or cancel it first",
                f"mhsm security-domain status\nmhsm security-domain cancel --partition {index}",
            )


def _restore_blob(attempt: Path) -> str:
    return (
        f"mhsm security-domain restore-blob --attempt {shlex.quote(str(attempt))} "
        "--azure-file AZURE-DOMAIN.json --officer OFFICER-1.crt OFFICER-1.key "
        "--officer OFFICER-2.crt OFFICER-2.key --output blob.json"
    )
