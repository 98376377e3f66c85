"""mhsm attest: what the partitions are, verified under both roots and the admission policy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from hsm_pool import limits
from hsm_pool.cli.attempts import EXISTING_FILE, NEW_FILE
from hsm_pool.cli.evidence_files import Anchors, anchor_options, decode, encode
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import common_options, connect, fail, read_bounded, report
from hsm_pool.enclave.claims import Claims
from hsm_pool.enclave.evidence import client_report_data
from hsm_pool.enclave.verifier import Expected
from hsm_pool.provisioning.layout import PARTITIONS
from mhsm.evidence.v1 import evidence_pb2
from security_domain.fingerprints import words

_NONCE_BYTES = 32
_FILE_BYTES_MAX = 64 * 1024


@click.command()
@click.option(
    "--partition", type=click.IntRange(0, PARTITIONS - 1), default=None, help="One partition; else all."
)
@click.option("--output", type=NEW_FILE, default=None, help="Where to keep the evidence, to be written.")
@click.option(
    "--verify",
    "evidence_file",
    type=EXISTING_FILE,
    default=None,
    help="What --output wrote; contacts nobody.",
)
@click.option("--nonce", "nonce_text", default="", help="Nonce in hex, 16-64 bytes; by default a random one.")
@anchor_options
@common_options
def attest(
    partition: int | None,
    output: Path | None,
    evidence_file: Path | None,
    nonce_text: str,
    platform_root: Path | None,
    owner_root: Path | None,
    policy: Path | None,
    firmware_repository: Path | None,
    **common: Any,
) -> None:
    """Show and verify evidence of the partitions: who they are, what they run, which keys they hold."""
    if evidence_file and (output or partition is not None or not nonce_text):
        raise click.UsageError("--verify needs --nonce, and neither --output nor --partition")
    if output:
        refuse_existing(output)
    nonce = _nonce(nonce_text)
    if evidence_file:
        found = _read(evidence_file)
    else:
        indexes = range(PARTITIONS) if partition is None else [partition]
        # Before the roots are looked for: where no pool is, that is the reason.
        with connect(common, client="administrator") as pool:
            found = {index: pool.evidence(index, nonce) for index in indexes}
    anchors = Anchors.load(common["data_dir"], platform_root, owner_root, policy, firmware_repository)
    data = client_report_data(nonce)
    verified = [
        anchors.verifier.verify(evidence, Expected(nonce, data, partition_index=index))
        for index, evidence in found.items()
    ]
    if output:
        content = [{"partition": index, **encode(evidence)} for index, evidence in found.items()]
        write_new(output, json.dumps({"evidence": content}, indent=2).encode() + b"\n", 0o644)
    report(
        {
            "verified": True,
            "nonce": nonce.hex(),
            "root_words": anchors.words,
            "partitions": [
                {
                    "claims": claims.named(),
                    "measurement_words": words(claims.measurement),
                    "firmware_version": anchors.firmware_versions.get(claims.measurement),
                }
                for claims in verified
            ],
        },
        as_json=common["as_json"],
        text="\n".join(
            [
                f"platform root: {anchors.words['platform']}",
                f"owner root:    {anchors.words['owner']}",
                *(_text(claims, anchors.firmware_versions.get(claims.measurement)) for claims in verified),
            ]
        ),
        following=f"mhsm attest --verify {output} --nonce {nonce.hex()}" if output else "",
    )


def _text(claims: Claims, firmware_version: int | None) -> str:
    named = claims.named()
    own = named.pop("mhsm")
    lines = [f"  {name}: {value}" for name, value in {**named, **own}.items()]
    head = (
        f"partition {claims.partition_index} of pool {claims.pool_id}: both chains verify, "
        f"the policy is met\n  measurement in words: {words(claims.measurement)}"
    )
    firmware = f"  firmware: version {firmware_version} of the repository"
    return "\n".join([head, *([firmware] if firmware_version else []), *lines])


def _nonce(text: str) -> bytes:
    if not text:
        return os.urandom(_NONCE_BYTES)
    try:
        nonce = bytes.fromhex(text)
    except ValueError:
        nonce = b""
    least, most = limits.EVIDENCE_NONCE_BYTES_MIN, limits.EVIDENCE_NONCE_BYTES_MAX
    if not least <= len(nonce) <= most:
        raise click.UsageError(f"--nonce: {least} to {most} bytes in hex are needed")
    return nonce


def _read(path: Path) -> dict[int, evidence_pb2.Evidence]:
    try:
        content = json.loads(read_bounded(path, _FILE_BYTES_MAX))["evidence"]
        found = {int(entry["partition"]): decode(entry) for entry in content}
    except (ValueError, KeyError, TypeError, RecursionError):
        fail(f"{path} holds no evidence", "mhsm attest --output FILE")
    if not found:
        fail(f"{path} holds no evidence", "mhsm attest --output FILE")
    return found
