"""mhsm security-domain submit-share: one officer's part of a ceremony."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives.asymmetric import rsa

from hsm_pool.cli import ceremony_progress
from hsm_pool.cli.attempts import (
    EXISTING_FILE,
    NEW_FILE,
    Attempt,
    attempt_option,
    certificates,
    described,
    private_key,
    read_attempt,
    require_evidence,
    require_own_pool,
    require_share,
)
from hsm_pool.cli.evidence_files import Anchors, anchor_options
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import (
    QUORUM,
    common_options,
    confirmed,
    connect,
    fail,
    named,
    read_bounded,
    report,
)
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import container, submission
from security_domain.azure import document as azure_document
from security_domain.azure import submission as azure_submission
from security_domain.azure.items import DOCUMENT_BYTES_MAX
from security_domain.encoding import decode
from security_domain.errors import SecurityDomainError
from security_domain.fingerprints import words, words_of_digest

_OF_ITS_OWN_OFFICERS = frozenset({submission.ACTIVATION, submission.NEW_GENERATION})
"""Ceremonies whose file is new: the share is given to the officers that the file itself names."""
_RIGHT_FILE = (
    "use the file whose officers submit now: --security-domain\n"
    "mhsm security-domain fetch-file --partition {partition} --output FILE"
)


@click.command("submit-share")
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
@click.option("--yes", is_flag=True, help="Do not ask, at a terminal, before the share is opened or sent.")
@anchor_options
@common_options
def submit_share(
    attempt_file: Path,
    domain_file: Path | None,
    key_file: Path | None,
    certificate_file: Path | None,
    output: Path | None,
    submission_file: Path | None,
    yes: bool,
    platform_root: Path | None,
    owner_root: Path | None,
    policy: Path | None,
    firmware_repository: Path | None,
    **common: Any,
) -> None:
    """Open one officer's share, encrypt it to the exchange key, sign and submit it.

    Before the share is opened the exchange key's evidence is verified: a partition of the pool whose
    roots this machine has (--platform-root and --owner-root, or those of --data-dir) must hold it.
    What the share is given for, and to whom, is shown before anything is opened, asked or sent; at a
    terminal it is agreed to. An officer whose machine must stay offline writes the submission with
    --output; somebody submits that file later with --submission. The passphrase of an encrypted key
    is asked for.
    """
    attempt = read_attempt(attempt_file)
    if submission_file:
        if domain_file or key_file or certificate_file or output:
            raise click.UsageError("--submission stands alone, with --attempt")
        submitted = read_bounded(submission_file, submission.SUBMISSION_BYTES_MAX)
        require_own_pool(attempt_file, attempt, common["data_dir"])
        click.echo(f"exchange key: {words(attempt.exchange_public_key)}", err=True)
        _agree(attempt, attempt.new_officers, attempt.new_required, yes=yes)
    else:
        if not domain_file or not key_file:
            raise click.UsageError("--security-domain and --officer-key are needed (or --submission)")
        if output:
            refuse_existing(output)
        anchors = Anchors.load(common["data_dir"], platform_root, owner_root, policy, firmware_repository)
        require_evidence(attempt_file, attempt, anchors, attempt.exchange_public_key)
        submitted = _make_submission(attempt, domain_file, key_file, certificate_file, yes=yes)
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
    if submission_file:
        following = f"mhsm security-domain submit-share --attempt {attempt_file} --submission SUBMISSION"
    else:
        following = ceremony_progress.submit_share(attempt_file, domain_file or "")
        following += " --officer-certificate OFFICER.crt" if certificate_file else ""
        for option, root in (("--platform-root", platform_root), ("--owner-root", owner_root)):
            following += f" {option} {shlex.quote(str(root))}" if root else ""
    _report_progress(ceremony, common["as_json"], following)


def _make_submission(
    attempt: Attempt, domain_file: Path, key_file: Path, certificate_file: Path | None, *, yes: bool
) -> bytes:
    """Make the submission; the officer agrees before his key is opened."""
    file = read_bounded(domain_file, DOCUMENT_BYTES_MAX)
    if azure_document.is_document(file):
        if certificate_file is None:
            raise click.UsageError("a document of Azure's format needs --officer-certificate, too")
        return _of_document(attempt, (domain_file, file), key_file, certificate_file, yes=yes)
    with named(domain_file, "--security-domain is the file that download or fetch-file wrote"):
        domain = container.parse(file)
    if (domain.pool_id, domain.generation) != (attempt.pool_id, attempt.generation):
        fail(
            f"{domain_file} is of another pool or generation than this attempt; {key_file} was not opened",
            _RIGHT_FILE.format(partition=attempt.partition),
            QUORUM,
        )
    click.echo(f"security-domain file: {words(file)}", err=True)
    new_officers, required = attempt.new_officers, attempt.new_required
    if attempt.purpose in _OF_ITS_OWN_OFFICERS:
        new_officers, required = tuple(entry.thumbprint for entry in domain.officers), domain.required
    _agree(attempt, new_officers, required, yes=yes)
    key = private_key(key_file)
    try:
        submission.own_entry(domain, key)
    except SecurityDomainError:
        fail(
            f"{domain_file} has no share for {key_file}",
            "check --security-domain and --officer-key; in a change of officers each quorum has its own file",
            QUORUM,
        )
    with named(domain_file):
        return submission.make_submission(
            file,
            key,
            attempt.attempt_id,
            attempt.exchange_public_key,
            attempt.purpose,
            attempt.detail,
        )


def _of_document(
    attempt: Attempt, document: tuple[Path, bytes], key_file: Path, certificate_file: Path, *, yes: bool
) -> bytes:
    path, file = document
    with named(path):
        parsed = azure_document.parse(file)
    certificate = certificates((certificate_file,))[0]
    officer = require_share(path, parsed, certificate_file, certificate)
    _agree(attempt, attempt.new_officers, attempt.new_required, yes=yes)
    key: rsa.RSAPrivateKey = private_key(key_file)
    if officer.public_key.public_numbers() != key.public_key().public_numbers():
        fail(
            f"{certificate_file} is not the certificate of {key_file}",
            "check --officer-certificate and --officer-key",
            QUORUM,
        )
    with named(path):
        return azure_submission.make_submission(
            parsed,
            key,
            certificate,
            attempt.attempt_id,
            attempt.exchange_public_key,
            attempt.purpose,
            attempt.detail,
        )


def _agree(attempt: Attempt, new_officers: tuple[str, ...], required: int, *, yes: bool) -> None:
    """Say what the share is given for and to whom, in the words of certificates; at a terminal, ask."""
    agreed = f"this share is given for: {attempt.purpose.replace('_', ' ')}"
    if new_officers:
        agreed += f", to any {required} of these officers"
    click.echo(f"{agreed}; for nothing else will it be taken", err=True)
    for thumbprint in new_officers:
        # The thumbprint is the digest that the words are of: nobody can exchange one without the other.
        click.echo(f"  {words_of_digest(decode(thumbprint, 32))}  {thumbprint}", err=True)
    if not yes and sys.stdin.isatty() and not confirmed("submit?", ""):
        fail("nothing was submitted")


def _report_progress(ceremony: security_domain_pb2.Ceremony, as_json: bool, following: str) -> None:
    """Report how far a ceremony is.

    Args:
        ceremony: The ceremony.
        as_json: In one JSON object.
        following: What the next officer does, if one is needed.
    """
    missing = ceremony.required - ceremony.accepted
    text = f"{ceremony.accepted} of {ceremony.required} shares"
    if ceremony.complete:
        text += f": {ceremony_progress.done(ceremony)}"
        following = ceremony_progress.after(ceremony)
    elif not ceremony.accepted:
        text = f"the old quorum is complete; the new file waits for {ceremony.required} new shares"
        following = ceremony_progress.fetch_file(ceremony.partition_index)
    else:
        text += f", {missing} more needed"
    report(described(ceremony), as_json=as_json, text=text, following=following)
