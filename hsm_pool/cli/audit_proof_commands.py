"""mhsm audit prove, verify-proof: one record, or an older checkpoint, in a file that is checked offline."""

from __future__ import annotations

import base64
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click
from cryptography import x509

from hsm_pool import limits
from hsm_pool.audit.checkpoint import Checkpoint, CheckpointInvalid, Note, SignerKey
from hsm_pool.audit.proof import Consistency, Inclusion, Proof
from hsm_pool.audit.tree import ProofRefused
from hsm_pool.cli.audit_files import kept_checkpoints, load_root, owner_root_option, root_file
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import (
    VERIFICATION,
    common_options,
    connect,
    data_directory_option,
    fail,
    json_option,
    read_bounded,
    report,
    typed_errors,
)
from hsm_pool.client import audit_calls
from hsm_pool.client.pool import Pool
from hsm_pool.core.membership import PARTITIONS
from mhsm.audit.v1 import audit_pb2

_POLL_SECONDS = 0.2
_WAIT_SECONDS = 5.0
"""For the next checkpoint, which comes within a second, and the cosignatures of both others."""
_file = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("prove")
@click.argument("record", metavar="[INDEX]", type=click.IntRange(min=0), required=False)
@click.option("--partition", type=click.IntRange(0, 2), required=True, help="Whose log.")
@click.option(
    "--old-checkpoint",
    type=_file,
    help="A backup's manifest, a ceremony's record or a checkpoint that was kept: prove that the log "
    "continues it.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="File; must not exist.")
@owner_root_option
@common_options
def prove(
    record: int | None,
    partition: int,
    old_checkpoint: Path | None,
    output: Path,
    owner_root: Path | None,
    **common: Any,
) -> None:
    """Write a proof that verify-proof checks offline: INDEX is in the log (query shows each record's index).

    Or, with --old-checkpoint: the log continues the one of a checkpoint that was kept. Exit code 6: the
    pool's own answer does not verify; the log was cut or rewritten.
    """
    if (record is None) == (old_checkpoint is None):
        raise click.UsageError("give the INDEX of a record, or --old-checkpoint")
    refuse_existing(output)
    with connect(common, client="administrator") as pool:
        root = load_root(owner_root or root_file(Path(pool.connection.data_directory)))
        if old_checkpoint is None:
            assert record is not None
            proof = _inclusion(pool, partition, record)
        else:
            proof = _consistency(pool, partition, old_checkpoint)
    document = _verified(
        proof, root, f"mhsm audit verify --anchor {old_checkpoint}" if old_checkpoint else ""
    )
    write_new(output, proof.render())
    kept = f" --old-checkpoint {old_checkpoint}" if old_checkpoint else ""
    report(
        {"output": str(output), **document},
        as_json=common["as_json"],
        text=f"{output}: {_words(document)}",
        following=f"mhsm audit verify-proof {output}{kept}\n"
        "elsewhere: with --owner-root, a copy of the root certificate that was taken when the pool was made",
    )


@click.command("verify-proof")
@click.argument("file", type=_file)
@click.option("--old-checkpoint", type=_file, help="The checkpoint that the proof is to begin with.")
@owner_root_option
@json_option
@data_directory_option
@typed_errors
def verify_proof(
    file: Path, old_checkpoint: Path | None, owner_root: Path | None, data_dir: Path, as_json: bool
) -> None:
    """Verify a proof offline, under the owner's root certificate; no pool is asked.

    Exit code 6: it does not verify. Without --owner-root the root is that of the data directory.
    """
    root = load_root(owner_root or root_file(data_dir))
    try:
        proof = Proof.parse(read_bounded(file, limits.AUDIT_PROOF_BYTES_MAX))
    except ProofRefused as refused:
        _refuse(str(refused))
    document = _verified(proof, root)
    if old_checkpoint is not None:
        _compare(proof, old_checkpoint)
        document["old_checkpoint"] = str(old_checkpoint)
    if as_json:
        click.echo(json.dumps({"ok": True, **document}))
        return
    click.echo(_words(document))
    if isinstance(proof.shown, Inclusion):
        click.echo(proof.shown.record)
    elif old_checkpoint is None:
        click.echo(f"hint: compare the root {document['old_root']} with yours: --old-checkpoint", err=True)


# -- making ----------------------------------------------------------------------------------


def _inclusion(pool: Pool, partition: int, record: int) -> Proof:
    size = pool.call(audit_calls.get_checkpoint(), partition).size
    if record >= size:
        fail(f"the log of partition {partition} has {size} records: there is no record {record} yet")
    note, signers = _cosigned(pool, partition, record + 1)
    path = pool.call(audit_calls.get_inclusion_proof(record, note.checkpoint.size), partition).proof
    request = audit_pb2.QueryRecordsRequest(start_index=record, page_size=1)
    found = pool.call(audit_calls.query_records(request), partition).records
    text = found[0].json if found else ""
    return Proof(note, signers, Inclusion(record, text, tuple(path)))


def _consistency(pool: Pool, partition: int, kept: Path) -> Proof:
    texts = kept_checkpoints(kept)
    newest = pool.call(audit_calls.get_checkpoint(), partition)
    if not newest.checkpoint:
        fail(f"partition {partition} has made no checkpoint yet", "mhsm status")
    origin = _parsed(newest.checkpoint).checkpoint.origin
    old = max(_of_log(texts, origin), key=lambda checkpoint: checkpoint.size, default=None)
    if old is None:
        fail(
            f"{kept} holds no checkpoint of the log that partition {partition} has now",
            "it is of another pool or partition, or of a log that is gone\n"
            f"mhsm audit verify --anchor {kept}",
        )
    if old.size > newest.size:
        _refuse(
            f"the log was cut: it has {newest.size} records, the checkpoint in {kept} covers {old.size}",
            f"mhsm audit verify --anchor {kept}",
        )
    note, signers = _cosigned(pool, partition, old.size)
    path = pool.call(audit_calls.get_consistency_proof(old.size, note.checkpoint.size), partition).proof
    return Proof(note, signers, Consistency(old.size, old.root, tuple(path)))


def _cosigned(pool: Pool, partition: int, size: int) -> tuple[Note, tuple[SignerKey, ...]]:
    """Return a checkpoint of at least this size, cosigned by both others or, after a while, by one."""
    deadline = time.monotonic() + _WAIT_SECONDS
    found = None
    while True:
        answer = pool.call(audit_calls.get_checkpoint(), partition)
        signers = tuple(SignerKey.from_message(message) for message in answer.signers)
        note = _parsed(answer.checkpoint) if answer.checkpoint else None
        if note and note.checkpoint.size >= size and len(signers) == len(note.signatures) > 1:
            found = note, signers
        if found and (len(found[1]) == PARTITIONS or time.monotonic() > deadline):
            return found
        if time.monotonic() > deadline:
            fail(
                f"no cosigned checkpoint of partition {partition} covers that {answer.failure}", "mhsm status"
            )
        time.sleep(_POLL_SECONDS)


def _parsed(text: str) -> Note:
    try:
        return Note.parse(text)
    except CheckpointInvalid as error:
        _refuse(str(error))


# -- checking --------------------------------------------------------------------------------


def _verified(proof: Proof, root: x509.Certificate, following: str = "") -> dict[str, Any]:
    """Return what a proof shows, once it verifies."""
    try:
        cosigned = proof.verify(root)
    except ProofRefused as refused:
        _refuse(str(refused), following)
    checkpoint = proof.note.checkpoint
    document: dict[str, Any] = {
        "pool_id": checkpoint.pool_id,
        "partition": checkpoint.partition,
        "log": checkpoint.origin.rpartition("/")[2],
        "checkpoint": checkpoint.number,
        "size": checkpoint.size,
        "root": base64.b64encode(checkpoint.root).decode(),
        "cosigned": [
            {"partition": partition, "time": datetime.fromtimestamp(seconds, UTC).isoformat()}
            for partition, seconds in sorted(cosigned.items())
        ],
    }
    return {**document, **{name: value for name, value in proof.shown.document().items() if name != "hashes"}}


def _compare(proof: Proof, kept: Path) -> None:
    """Check that a consistency proof begins with a checkpoint that was kept."""
    if not isinstance(proof.shown, Consistency):
        raise click.UsageError("--old-checkpoint is for a consistency proof; this one is of a record")
    shown = proof.shown
    of_log = _of_log(kept_checkpoints(kept), proof.note.checkpoint.origin)
    roots = {checkpoint.root for checkpoint in of_log if checkpoint.size == shown.old_size}
    if not roots:
        fail(f"{kept} holds no checkpoint of {shown.old_size} records of this log", "mhsm audit prove --help")
    if roots != {shown.old_root}:
        _refuse(f"the checkpoint in {kept} has another root: the log does not continue it")


def _of_log(texts: list[str], origin: str) -> list[Checkpoint]:
    checkpoints = [Note.parse(text).checkpoint for text in texts]
    return [checkpoint for checkpoint in checkpoints if checkpoint.origin == origin]


def _refuse(why: str, following: str = "") -> NoReturn:
    # Parts of it stand in files of anybody, and go to a terminal.
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in why)
    hint = "if it is of another pool: --owner-root, the certificate of that pool's owner"
    fail(f"the proof does not verify: {shown}", following or hint, VERIFICATION)


def _words(document: dict[str, Any]) -> str:
    checkpoint, size = document["checkpoint"], document["size"]
    log = f"log {document['log']} of partition {document['partition']}"
    if "index" in document:
        shown = f"record {document['index']} is in {log}"
    else:
        shown = f"{log} continues that of {document['old_size']} records"
    cosigners = " and ".join(
        f"partition {entry['partition']} ({entry['time']})" for entry in document["cosigned"]
    )
    return f"{shown}, checkpoint {checkpoint} of {size} records, cosigned by {cosigners}"
