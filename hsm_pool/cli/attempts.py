"""Attempt files, and what the ceremony commands share."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives.asymmetric import rsa

from hsm_pool.cli import evidence_files
from hsm_pool.cli.evidence_files import Anchors
from hsm_pool.cli.files import write_new
from hsm_pool.cli.output import QUORUM, USAGE, fail, has_terminal, named, read_bounded
from hsm_pool.client.connection import load_connection
from hsm_pool.enclave.evidence import exchange_key_report_data
from hsm_pool.enclave.verifier import Expected, claimed_pool_id
from hsm_pool.errors import EvidenceRefused
from hsm_pool.provisioning.layout import PARTITIONS
from mhsm.evidence.v1 import evidence_pb2
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import container, officers, submission
from security_domain.azure import transfer_key
from security_domain.azure.document import Document
from security_domain.errors import InvalidOfficers
from security_domain.fingerprints import words

NEW_FILE = click.Path(path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
attempt_option = click.option(
    "--attempt",
    "attempt_file",
    type=EXISTING_FILE,
    required=True,
    help="Written by the verb that began the ceremony.",
)

partition_option = click.option("--partition", type=click.IntRange(0, 2), default=0, show_default=True)
azure_output_option = click.option(
    "--azure-output",
    type=NEW_FILE,
    default=None,
    help="The same domain in Azure's file format, to be written.",
)


@dataclass(frozen=True, slots=True)
class Attempt:
    """What an attempt file holds."""

    partition: int
    pool_id: str
    generation: int
    attempt_id: bytes
    exchange_public_key: bytes
    purpose: str
    new_officers: tuple[str, ...]
    new_required: int
    evidence: evidence_pb2.Evidence
    exchange_certificate_der: bytes
    """Of a recovery, for restore blobs; b"" in other ceremonies."""

    @property
    def detail(self) -> bytes:
        """What a submission is bound to besides the purpose."""
        if self.purpose not in submission.WITH_OFFICERS:
            return b""
        return submission.officers_digest(self.new_officers, self.new_required)


def write_attempt(path: Path, ceremony: security_domain_pb2.Ceremony, data_dir: Path) -> None:
    """Write the attempt file of a ceremony; it holds no secret.

    Args:
        path: Where.
        ceremony: The ceremony.
        data_dir: Of the pool; its roots are named in words, for officers to compare with theirs.
    """
    content = {
        "purpose": purpose(ceremony),
        "partition": ceremony.partition_index,
        "pool_id": ceremony.pool_id,
        "generation": ceremony.generation,
        "attempt_id": base64.b64encode(ceremony.attempt_id).decode(),
        "exchange_public_key": base64.b64encode(ceremony.exchange_public_key).decode(),
        "exchange_key_words": words(ceremony.exchange_public_key),
        "exchange_certificate": base64.b64encode(exchange_certificate(ceremony)).decode(),
        "expires": ceremony.expires.ToJsonString(),
        "new_officers": list(ceremony.new_officers),
        "new_required": ceremony.new_required,
        "evidence": evidence_files.encode(ceremony.evidence),
        "root_words": evidence_files.root_words(data_dir),
    }
    write_new(path, json.dumps(content, indent=2).encode() + b"\n", 0o644)


def read_attempt(path: Path) -> Attempt:
    """Read an attempt file, or end the command."""
    try:
        content = json.loads(read_bounded(path, container.FILE_BYTES_MAX))
        partition = int(content["partition"])
        if not 0 <= partition < PARTITIONS:
            raise ValueError("no such partition")
        return Attempt(
            partition,
            str(content["pool_id"]),
            int(content["generation"]),
            base64.b64decode(content["attempt_id"], validate=True),
            base64.b64decode(content["exchange_public_key"], validate=True),
            str(content["purpose"]),
            tuple(str(thumbprint) for thumbprint in content["new_officers"]),
            int(content["new_required"]),
            evidence_files.decode(content["evidence"]),
            base64.b64decode(content["exchange_certificate"], validate=True),
        )
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        fail(f"{path} is no attempt file", "begin a ceremony: mhsm security-domain --help")


def require_evidence(source: Path, attempt: Attempt, anchors: Anchors, receiver: bytes) -> None:
    """Show which partition holds the key that a share will be encrypted to, before the share is opened.

    Args:
        source: The attempt file.
        attempt: What it says.
        anchors: Roots and policy of this machine.
        receiver: The exchange public key or the exchange certificate of the attempt.

    Raises:
        EvidenceRefused: The evidence is absent, has expired or is of anything but an admitted partition
            of this machine's pool that holds this very key for this very attempt.
    """
    if not receiver:
        raise EvidenceRefused(
            "this attempt has no such exchange key: nothing may be encrypted to it (a recovery that began "
            "without a security-domain file waits for a restore blob; others take no blob)"
        )
    expected = Expected(
        nonce=attempt.attempt_id,
        report_data=exchange_key_report_data(
            attempt.attempt_id, attempt.exchange_public_key, attempt.exchange_certificate_der
        ),
        exchange_key=attempt.exchange_public_key,
        partition_index=attempt.partition,
    )
    claims = anchors.verify(source, attempt.evidence, expected)
    name = "exchange certificate" if receiver == attempt.exchange_certificate_der else "exchange key"
    click.echo(
        f"partition {claims.partition_index} of pool {claims.pool_id} holds the {name}\n"
        f"  {name + ':':<14} {words(receiver)}\n"
        f"  measurement:   {words(claims.measurement)}\n"
        f"  platform root: {anchors.words['platform']}\n"
        f"  owner root:    {anchors.words['owner']}\n"
        "compare these words with the administrator's; if they differ, stop",
        err=True,
    )


def exchange_certificate(ceremony: security_domain_pb2.Ceremony) -> bytes:
    """Return the exchange certificate (DER) of a ceremony, b"" if it takes no restore blob."""
    return transfer_key.parse_transfer_key(ceremony.transfer_key) if ceremony.transfer_key else b""


def require_own_pool(source: Path, attempt: Attempt, data_dir: Path) -> None:
    """End the command if an attempt file is of another pool than the one that would be called."""
    claimed, own = claimed_pool_id(attempt.evidence), load_connection(data_dir).pool_id
    if claimed and claimed != own:
        fail(f"{source} says pool {claimed}, {data_dir} is of pool {own}: --data-dir?")


def require_share(
    source: Path, document: Document, certificate_file: Path, certificate_der: bytes
) -> officers.Officer:
    """Return the officer of a certificate, or end the command if Azure's document has no share."""
    with named(certificate_file):
        officer = officers.parse_officer(certificate_der)
    try:
        document.share_of(officer.thumbprint)
    except InvalidOfficers:
        fail(
            f"{source} has no share for {certificate_file} (officer {officer.thumbprint})",
            "check the file and the officer's certificate",
            QUORUM,
        )
    return officer


def private_key(path: Path, prompt: str = "passphrase") -> rsa.RSAPrivateKey:
    """Load an officer's key; the passphrase of an encrypted one is asked for, at a terminal."""

    def ask() -> bytes:
        if not has_terminal():
            fail(
                f"{path} is encrypted, and there is no terminal to ask for its passphrase",
                "run the command at a terminal",
                USAGE,
            )
        return str(click.prompt(prompt, hide_input=True, err=True)).encode()

    with named(path):
        return officers.load_private_key(read_bounded(path, officers.PEM_BYTES_MAX), ask)


def certificates(paths: Iterable[Path]) -> list[bytes]:
    """Return officers' certificates, DER."""
    found: list[bytes] = []
    for path in paths:
        with named(path, "give the officer's certificate, PEM, of an RSA key of 2048 bits or more"):
            found.append(officers.certificate_der(read_bounded(path, officers.PEM_BYTES_MAX)))
    return found


def new_officers(paths: Sequence[Path], required: int) -> list[officers.Officer]:
    """Return the officers of a new sharing, or end the command and name the file at fault."""
    found = certificates(paths)
    keys: dict[int, Path] = {}
    for path, der in zip(paths, found, strict=True):
        modulus = officers.parse_officer(der).public_key.public_numbers().n
        if modulus in keys:
            fail(
                f"{keys[modulus]} and {path} are of the same key", "give each officer's own certificate, once"
            )
        keys[modulus] = path
    try:
        return officers.check_officers(found, required)
    except InvalidOfficers as error:
        fail(str(error), "mhsm security-domain plan --help")


def described(ceremony: security_domain_pb2.Ceremony) -> dict[str, Any]:
    """Return what --json prints of a ceremony."""
    certificate = exchange_certificate(ceremony)
    return {
        "purpose": purpose(ceremony),
        "stage": stage(ceremony),
        "pool_id": ceremony.pool_id,
        "generation": ceremony.generation,
        "accepted": ceremony.accepted,
        "required": ceremony.required,
        "accepted_officers": list(ceremony.accepted_officers),
        "complete": ceremony.complete,
        "expires": ceremony.expires.ToJsonString(),
        "security_domain_words": words(ceremony.security_domain_file),
        "exchange_key_words": words(ceremony.exchange_public_key),
        "exchange_certificate_words": words(certificate) if certificate else "",
    }


def purpose(ceremony: security_domain_pb2.Ceremony) -> str:
    """Return what a ceremony is for, in one word."""
    name = security_domain_pb2.CeremonyPurpose.Name(ceremony.purpose)
    return name.removeprefix("CEREMONY_PURPOSE_").lower()


def stage(ceremony: security_domain_pb2.Ceremony) -> str:
    """Return whose shares a change of officers waits for; "" in other ceremonies, which have one stage."""
    if ceremony.purpose != security_domain_pb2.CEREMONY_PURPOSE_SHARE_ROTATION:
        return ""
    return "new officers" if ceremony.new_file else "old quorum"
