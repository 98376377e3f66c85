"""mhsm security-domain: the ceremonies of the pool's officers and its administrator."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hsm_pool.cli import restore_blob_commands
from hsm_pool.cli.attempts import (
    EXISTING_FILE,
    NEW_FILE,
    Attempt,
    attempt_option,
    certificates,
    described,
    exchange_certificate,
    private_key,
    purpose,
    read_attempt,
    require_evidence,
    write_attempt,
)
from hsm_pool.cli.evidence_files import Anchors, anchor_options
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
from security_domain import container, officers, submission
from security_domain.azure import document as azure_document
from security_domain.azure import submission as azure_submission
from security_domain.azure.items import DOCUMENT_BYTES_MAX
from security_domain.fingerprints import words

_partition = click.option("--partition", type=click.IntRange(0, 2), default=0, show_default=True)
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
_azure_output = click.option(
    "--azure-output",
    type=NEW_FILE,
    default=None,
    help="The same domain in Azure's file format, to be written.",
)


@click.group("security-domain")
def security_domain_group() -> None:
    """The security domain: what a quorum of officers opens, and nobody else.

    Every ceremony has the same shape: one command begins it and writes an attempt file; then each
    officer runs submit-share with his own key. docs/ceremonies.md is the script.
    """


@security_domain_group.command("plan")
@_officers
@_required
@json_option
@typed_errors
def plan(certificate_files: tuple[Path, ...], required: int, as_json: bool) -> None:
    """Say what a download or a rotation with these officers would do; contacts nobody."""
    found = officers.check_officers(certificates(certificate_files), required)
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
        "download writes one file of ciphertext; the pool is active when every officer has submitted"
    )
    lines += [f"warning: {warning}" for warning in warnings]
    report(
        {"officers": rows, "required": required, "may_be_lost": spare, "warnings": warnings},
        as_json=as_json,
        text="\n".join(lines),
        following="each officer compares his words; then mhsm security-domain download",
    )


@security_domain_group.command("download")
@_officers
@_required
@click.option("--output", type=NEW_FILE, required=True, help="The security-domain file, to be written.")
@click.option("--attempt-output", type=NEW_FILE, required=True, help="The attempt file, to be written.")
@_azure_output
@click.option("--request-id", default="", help="Repeat an interrupted download with its request id.")
@_partition
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
    found = certificates(certificate_files)
    request_id = request_id or str(uuid.uuid4())
    click.echo(f"request id {request_id} (repeat with it if the answer is lost)", err=True)
    with connect(common, client="administrator") as pool:
        _refuse_second(pool, partition)
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
        },
        as_json=common["as_json"],
        text=f"wrote {output}: any {required} of {len(found)} officers open it\n"
        f"{words(ceremony.security_domain_file)}\n"
        + ("the pool is active" if ceremony.complete else "the pool becomes active when all have submitted"),
        following="mhsm status" if ceremony.complete else _submit(attempt_output, output),
    )


@security_domain_group.command("init-recovery")
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
@_partition
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


@security_domain_group.command("verify")
@_attempt_output
@_partition
@common_options
def verify(partition: int, output: Path, **common: Any) -> None:
    """Start a proof that a quorum can open the security domain; it changes nothing."""
    _begin(common, partition, output, lambda pool: pool.verify_security_domain(partition))


@security_domain_group.command("rotate-shares")
@_officers
@_required
@_attempt_output
@_partition
@common_options
def rotate_shares(
    certificate_files: tuple[Path, ...], required: int, partition: int, output: Path, **common: Any
) -> None:
    """Start to share the same secret out among new officers.

    It takes effect when a quorum of the old officers, and then a quorum of the new ones, have
    submitted. It does not revoke: an old file with an old quorum still opens the secret.
    """
    found = certificates(certificate_files)
    _begin(common, partition, output, lambda pool: pool.rotate_shares(found, required, partition))


@security_domain_group.command("new-generation")
@_officers
@_required
@_attempt_output
@_partition
@common_options
def new_generation(
    certificate_files: tuple[Path, ...], required: int, partition: int, output: Path, **common: Any
) -> None:
    """Start to replace the security domain: the only ceremony that revokes.

    It needs a living pool and no old officer, and takes effect when every new officer has submitted
    his share. What is written from then on opens to nobody who holds old shares. Take a new backup.
    """
    found = certificates(certificate_files)
    following = f"mhsm security-domain fetch-file --partition {partition} --output FILE"
    following += ", then each new officer submits with FILE"
    _begin(common, partition, output, lambda pool: pool.new_generation(found, required, partition), following)


@security_domain_group.command("rotate-kek")
@_partition
@common_options
def rotate_kek(partition: int, **common: Any) -> None:
    """Replace the key-encryption key; needs no officers. Records written later are sealed under it."""
    with connect(common, client="administrator") as pool:
        epoch = pool.rotate_key_encryption_key(partition)
    report(
        {"epoch": epoch},
        as_json=common["as_json"],
        text=f"epoch {epoch} is in force",
        following="mhsm status",
    )


@security_domain_group.command("fetch-file")
@click.option("--output", type=NEW_FILE, required=True)
@_azure_output
@click.option("--attempt-output", type=NEW_FILE, default=None, help="The attempt file again, if it was lost.")
@_partition
@common_options
def fetch_file(
    output: Path, azure_output: Path | None, attempt_output: Path | None, partition: int, **common: Any
) -> None:
    """Write the security-domain file whose officers submit now (in a rotation: the new one)."""
    for path in (output, azure_output, attempt_output):
        if path:
            refuse_existing(path)
    with connect(common, client="administrator") as pool:
        ceremony = pool.get_ceremony(partition)
    if ceremony is None:
        fail("no ceremony is under way at this partition", "mhsm security-domain status")
    if azure_output and not ceremony.azure_security_domain_file:
        fail("this pool has no file in Azure's format: its domain was recovered without one", "")
    if not ceremony.security_domain_file:
        fail("the file is in Azure's document until a quorum has opened it", "use the document itself")
    write_new(output, ceremony.security_domain_file)
    if azure_output:
        write_new(azure_output, ceremony.azure_security_domain_file)
    if attempt_output:
        write_attempt(attempt_output, ceremony, common["data_dir"])
    fingerprint = words(ceremony.security_domain_file)
    report(
        {"output": str(output), "words": fingerprint},
        as_json=common["as_json"],
        text=f"wrote {output}\n{fingerprint}",
        following=f"mhsm security-domain submit-share --security-domain {output} --help",
    )


@security_domain_group.command("submit-share")
@attempt_option
@click.option(
    "--security-domain",
    "domain_file",
    type=EXISTING_FILE,
    default=None,
    help="The security-domain file, or the document of Azure's format.",
)
@click.option("--officer-key", "key_file", type=EXISTING_FILE, default=None)
@click.option(
    "--officer-certificate",
    "certificate_file",
    type=EXISTING_FILE,
    default=None,
    help="Needed with a document of Azure's format, which holds no certificates.",
)
@click.option("--output", type=NEW_FILE, default=None, help="Write the submission and contact nobody.")
@click.option(
    "--submission", "submission_file", type=EXISTING_FILE, default=None, help="Submit what --output wrote."
)
@anchor_options
@common_options
def submit_share(
    attempt_file: Path,
    domain_file: Path | None,
    key_file: Path | None,
    certificate_file: Path | None,
    output: Path | None,
    submission_file: Path | None,
    platform_root: Path | None,
    owner_root: Path | None,
    policy: Path | None,
    **common: Any,
) -> None:
    """Open one officer's share, encrypt it to the exchange key, sign and submit it.

    Before the share is opened the exchange key's evidence is verified: a partition of the pool whose
    roots this machine has (--platform-root and --owner-root, or those of --data-dir) must hold it.
    An officer whose machine must stay offline writes the submission with --output; somebody
    submits that file later with --submission. The passphrase of an encrypted key is asked for.
    """
    attempt = read_attempt(attempt_file)
    if submission_file:
        if domain_file or key_file or certificate_file or output:
            raise click.UsageError("--submission stands alone, with --attempt")
        submitted = read_bounded(submission_file, submission.SUBMISSION_BYTES_MAX)
    else:
        if not domain_file or not key_file:
            raise click.UsageError("--security-domain and --officer-key are needed (or --submission)")
        if output:
            refuse_existing(output)
        anchors = Anchors.load(common["data_dir"], platform_root, owner_root, policy)
        require_evidence(attempt, anchors, attempt.exchange_public_key)
        submitted = _make_submission(attempt, domain_file, key_file, certificate_file)
    if output:
        write_new(output, submitted)
        report(
            {"output": str(output)},
            as_json=common["as_json"],
            text=f"wrote {output}: the share under the exchange key, signed",
            following=f"mhsm security-domain submit-share --attempt {attempt_file} --submission {output}",
        )
        return
    with connect(common, client="administrator") as pool:
        ceremony = pool.submit_share(attempt.partition, attempt.attempt_id, submitted)
    _report_progress(ceremony, common["as_json"])


@security_domain_group.command("status")
@common_options
def status(**common: Any) -> None:
    """Show the ceremonies under way, and whose shares are in."""
    found: list[dict[str, Any]] = []
    with connect(common, client="administrator") as pool:
        for index in range(3):
            try:
                ceremony = pool.get_ceremony(index)
            except MHSMError as error:
                found.append({"partition": index, "error": error.message})
                continue
            if ceremony:
                found.append({"partition": index, **described(ceremony)})
    lines = [
        f"partition {entry['partition']}: "
        + (
            entry["error"]
            if "error" in entry
            else f"{entry['purpose']}, {entry['accepted']} of {entry['required']} shares"
        )
        + "".join(f"\n  accepted: officer {officer}" for officer in entry.get("accepted_officers", ()))
        for entry in found
    ]
    report(
        {"ceremonies": found},
        as_json=common["as_json"],
        text="\n".join(lines) or "no ceremony is under way",
        following="",
    )


@security_domain_group.command("cancel")
@click.option(
    "--attempt", "attempt_file", type=EXISTING_FILE, default=None, help="Attempt file of the ceremony."
)
@click.option(
    "--partition",
    type=click.IntRange(0, 2),
    default=None,
    help="Whatever this partition runs, if the file is lost.",
)
@common_options
def cancel(attempt_file: Path | None, partition: int | None, **common: Any) -> None:
    """End a ceremony; all submitted shares are forgotten and nothing changes."""
    if (attempt_file is None) == (partition is None):
        raise click.UsageError("one of --attempt and --partition is needed")
    with connect(common, client="administrator") as pool:
        if attempt_file is not None:
            attempt = read_attempt(attempt_file)
            pool.cancel_ceremony(attempt.partition, attempt.attempt_id)
        else:
            ceremony = pool.get_ceremony(partition)
            if ceremony is None:
                fail("no ceremony is under way at this partition", "mhsm security-domain status")
            pool.cancel_ceremony(ceremony.partition_index, ceremony.attempt_id)
    report({"cancelled": True}, as_json=common["as_json"], text="the ceremony is cancelled", following="")


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
        _refuse_second(pool, partition)
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
        following=following or _submit(output, domain_file or "security-domain.json"),
    )
    return ceremony


def _awaited(ceremony: security_domain_pb2.Ceremony) -> str:
    return f"{ceremony.required} shares" if ceremony.required else "a restore blob"


def _refuse_second(pool: Pool, partition: int) -> None:
    """End the command if another partition runs a ceremony; its own partition refuses by itself."""
    for other in {0, 1, 2} - {partition}:
        try:
            ceremony = pool.get_ceremony(other)
        except MHSMError:
            continue  # it is down, and so is whatever it ran
        if ceremony:
            fail(
                f"a ceremony ({purpose(ceremony)}) is under way at partition {other}",
                "mhsm security-domain status; finish it or cancel it first",
            )


def _make_submission(
    attempt: Attempt, domain_file: Path, key_file: Path, certificate_file: Path | None
) -> bytes:
    agreed = f"this share is given for: {attempt.purpose.replace('_', ' ')}"
    if attempt.new_officers:
        agreed += f", to any {attempt.new_required} of the officers {', '.join(attempt.new_officers)}"
    click.echo(f"{agreed}; for nothing else will it be taken", err=True)
    file = read_bounded(domain_file, DOCUMENT_BYTES_MAX)
    if azure_document.is_document(file):
        if certificate_file is None:
            raise click.UsageError("a document of Azure's format needs --officer-certificate, too")
        with named(domain_file):
            parsed = azure_document.parse(file)
        return azure_submission.make_submission(
            parsed,
            private_key(key_file),
            certificates((certificate_file,))[0],
            attempt.attempt_id,
            attempt.exchange_public_key,
            attempt.purpose,
            attempt.detail,
        )
    key = private_key(key_file)
    with named(domain_file):
        domain = container.parse(file)
    if (domain.pool_id, domain.generation) != (attempt.pool_id, attempt.generation):
        fail("the security-domain file is of another pool or generation", "use the file in force")
    return submission.make_submission(
        file,
        key,
        attempt.attempt_id,
        attempt.exchange_public_key,
        attempt.purpose,
        attempt.detail,
    )


def _report_progress(ceremony: security_domain_pb2.Ceremony, as_json: bool) -> None:
    missing = ceremony.required - ceremony.accepted
    done = {
        security_domain_pb2.CEREMONY_PURPOSE_ACTIVATION: "the pool is active",
        security_domain_pb2.CEREMONY_PURPOSE_RECOVERY: "the pool is unlocked",
        security_domain_pb2.CEREMONY_PURPOSE_VERIFICATION: "a quorum can open the security domain",
        security_domain_pb2.CEREMONY_PURPOSE_SHARE_ROTATION: "the new file is in force",
        security_domain_pb2.CEREMONY_PURPOSE_NEW_GENERATION: "the new generation is in force",
    }
    text = f"{ceremony.accepted} of {ceremony.required} shares"
    following = "the next officer runs the same command with his own key"
    if ceremony.complete:
        text += f": {done.get(ceremony.purpose, '')}"
        following = "mhsm status"
        if ceremony.purpose == security_domain_pb2.CEREMONY_PURPOSE_NEW_GENERATION:
            following = "mhsm backup create --output DIRECTORY; backups of before are of the old generation"
    elif not ceremony.accepted:
        text = f"the old quorum is complete; the new file waits for {ceremony.required} new shares"
        following = f"mhsm security-domain fetch-file --partition {ceremony.partition_index} --output FILE"
        following += ", then each new officer submits with FILE"
    else:
        text += f", {missing} more needed"
    report(described(ceremony), as_json=as_json, text=text, following=following)


def _restore_blob(attempt: Path) -> str:
    return (
        f"mhsm security-domain restore-blob --attempt {attempt} --azure-file azure-domain.json "
        "--officer officer-1.crt officer-1.key --officer officer-2.crt officer-2.key --output blob.json"
    )


def _submit(attempt: Path, domain_file: Path | str) -> str:
    return (
        f"mhsm security-domain submit-share --attempt {attempt} "
        f"--security-domain {domain_file} --officer-key officer-1.key"
    )


security_domain_group.add_command(restore_blob_commands.restore_blob)
security_domain_group.add_command(restore_blob_commands.upload)
