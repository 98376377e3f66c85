"""mhsm key attestation and verify-attestation: proof of what a key is, for somebody without the pool."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives import serialization

from hsm_pool.cli.evidence_files import load_roots, root_options
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.key_output import as_application, resource
from hsm_pool.cli.output import (
    connect,
    data_directory_option,
    fail,
    json_option,
    read_bounded,
    report,
    typed_errors,
)
from hsm_pool.enclave.key_attestation import KeyAttestation, verify
from hsm_pool.errors import EvidenceRefused

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FILE_BYTES_MAX = 64 * 1024


@click.command()
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="File for the attestation.")
@as_application
def attestation(name: str, output: Path, **common: Any) -> None:
    """Write proof that a key is one of this pool, and of which kind; nothing in it is secret."""
    refuse_existing(output)
    with connect(common) as pool:
        found = pool.get_key_attestation(resource(name))
    made = KeyAttestation(
        found.attestation.certificates_pem,
        found.attestation.private_key_attestation,
        found.attestation.public_key_attestation,
        found.attestation.version,
    )
    content = {"attestation": made.to_json(), "name": found.key.name}
    write_new(output, json.dumps(content, indent=2).encode() + b"\n", 0o644)
    report(
        {"name": found.key.name, "output": str(output), "version": made.version},
        as_json=common["as_json"],
        text=f"wrote {output}: an attestation of {found.key.name}",
        following=f"mhsm key verify-attestation {output}",
    )


@click.command("verify-attestation")
@click.argument("file", type=_FILE)
@click.option(
    "--public-key", type=_FILE, default=None, help="PEM that must be the public half of the attested key."
)
@root_options
@json_option
@data_directory_option
@typed_errors
def verify_attestation(
    file: Path,
    public_key: Path | None,
    platform_root: Path | None,
    owner_root: Path | None,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Verify what key attestation wrote, under the pool's two roots; contacts nobody."""
    roots = load_roots(data_dir, platform_root, owner_root)
    try:
        content = json.loads(read_bounded(file, _FILE_BYTES_MAX))
        name, found = str(content["name"]), KeyAttestation.from_json(content["attestation"])
    except (ValueError, KeyError, TypeError, RecursionError):
        fail(f"{file} holds no key attestation", "mhsm key attestation NAME --output FILE")
    claims = verify(found, roots, datetime.now(UTC))
    named = claims.named()
    if name != named["sub"]:
        raise EvidenceRefused(f"{file} says {name}, and the attestation in it is of {named['sub']}")
    if public_key is not None and _digest(public_key) != claims.public_key:
        raise EvidenceRefused(f"{public_key} is not the public half of the attested key")
    report(
        {"verified": True, "claims": named},
        as_json=as_json,
        text="\n".join(
            [
                f"{name} of pool {claims.pool_id}: both chains verify",
                *(f"  {claim}: {value}" for claim, value in named.items()),
            ]
        ),
        following="",
    )


def _digest(public_key: Path) -> bytes:
    try:
        parsed = serialization.load_pem_public_key(read_bounded(public_key, _FILE_BYTES_MAX))
    except (ValueError, TypeError):
        fail(f"{public_key} is no public key", "mhsm key public-key NAME --output FILE")
    der = parsed.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).digest()
