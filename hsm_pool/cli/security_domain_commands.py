"""mhsm security-domain: the ceremonies of the pool's officers and its administrator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hsm_pool.cli import begin_ceremony_commands, ceremony_progress, restore_blob_commands
from hsm_pool.cli.attempts import (
    EXISTING_FILE,
    NEW_FILE,
    azure_output_option,
    described,
    exchange_certificate,
    partition_option,
    read_attempt,
    require_own_pool,
    stage,
    write_attempt,
)
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import UNREACHABLE, common_options, connect, fail, report
from hsm_pool.cli.submit_share_command import submit_share
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain.fingerprints import words


@click.group("security-domain")
def security_domain_group() -> None:
    """The security domain: what a quorum of officers opens, and nobody else.

    Every ceremony has the same shape: one command begins it and writes an attempt file; then each
    officer runs submit-share with his own key. docs/ceremonies.md is the script.
    """


@security_domain_group.command("rotate-kek")
@partition_option
@common_options
def rotate_kek(partition: int, **common: Any) -> None:
    """Replace the key-encryption key; needs no officers. Records written later are sealed under it.

    Refused while a ceremony is under way: its last share would be refused afterwards.
    """
    with connect(common, client="administrator") as pool:
        begin_ceremony_commands.refuse_second(pool, range(3))
        epoch = pool.rotate_key_encryption_key(partition)
    report(
        {"epoch": epoch},
        as_json=common["as_json"],
        text=f"epoch {epoch} is in force",
        following="mhsm status",
    )


@security_domain_group.command("fetch-file")
@click.option("--output", type=NEW_FILE, required=True)
@azure_output_option
@click.option("--attempt-output", type=NEW_FILE, default=None, help="The attempt file again, if it was lost.")
@partition_option
@common_options
def fetch_file(
    output: Path, azure_output: Path | None, attempt_output: Path | None, partition: int, **common: Any
) -> None:
    """Write the security-domain file whose officers submit now.

    In a change of officers that is the file in force, and the new one when the old quorum is complete.
    """
    for path in (output, azure_output, attempt_output):
        if path:
            refuse_existing(path)
    with connect(common, client="administrator") as pool:
        ceremony = pool.get_ceremony(partition)
    if ceremony is None:
        fail(
            "no ceremony is under way at this partition: a file is fetched within one",
            "mhsm security-domain verify --output ATTEMPT.json\n"
            "then fetch the file, and cancel the proof if it is not wanted",
        )
    if azure_output and not ceremony.azure_security_domain_file:
        fail("this pool has no file in Azure's format: its domain was recovered without one", "")
    if not ceremony.security_domain_file:
        fail("the file is in Azure's document until a quorum has opened it", "use the document itself")
    write_new(output, ceremony.security_domain_file)
    if azure_output:
        write_new(azure_output, ceremony.azure_security_domain_file)
    if attempt_output:
        write_attempt(attempt_output, ceremony, common["data_dir"])
    file = "new" if ceremony.new_file else "in force"
    fingerprint = words(ceremony.security_domain_file)
    if stage(ceremony) == "old quorum":
        click.echo(
            "warning: this is the file in force; the new one exists when the old quorum is complete", err=True
        )
    report(
        {"output": str(output), "file": file, "words": fingerprint},
        as_json=common["as_json"],
        text=f"wrote {output} ({file})\nsecurity-domain file: {fingerprint}",
        following=ceremony_progress.submit_share(attempt_output or ceremony_progress.ATTEMPT_FILE, output),
    )


@security_domain_group.command("status")
@common_options
def status(**common: Any) -> None:
    """Show the ceremonies under way, whose shares are in, and what is next.

    Exit code 5 if a partition did not answer: it may be in a ceremony.
    """
    with connect(common, client="administrator") as pool:
        found = ceremony_progress.under_way(pool)
    entries: list[dict[str, Any]] = []
    lines: list[str] = []
    following = ""
    for index, ceremony in found.items():
        if isinstance(ceremony, str):
            entries.append({"partition": index, "error": ceremony})
            lines.append(f"partition {index}: {ceremony}")
            continue
        entries.append({"partition": index, **described(ceremony)})
        lines.append(f"partition {index}: {ceremony_progress.progress(ceremony)}")
        lines.append(f"  until {ceremony.expires.ToJsonString()}")
        lines += [f"  {name}: {words(octets)}" for name, octets in _fingerprinted(ceremony).items()]
        lines += [f"  accepted: officer {officer}" for officer in ceremony.accepted_officers]
        following = ceremony_progress.following(ceremony)
    report(
        {"ceremonies": entries},
        as_json=common["as_json"],
        text="\n".join(lines) or "no ceremony is under way",
        following=following or "mhsm status",
    )
    if any(isinstance(ceremony, str) for ceremony in found.values()):
        click.get_current_context().exit(UNREACHABLE)


def _fingerprinted(ceremony: security_domain_pb2.Ceremony) -> dict[str, bytes]:
    """Return what people compare by its words, without what the ceremony does not have."""
    file = "new security-domain file" if ceremony.new_file else "security-domain file"
    named = {
        file: ceremony.security_domain_file,
        "exchange key": ceremony.exchange_public_key,
        "exchange certificate": exchange_certificate(ceremony),
    }
    return {name: octets for name, octets in named.items() if octets}


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
    attempt = read_attempt(attempt_file) if attempt_file else None
    if attempt_file and attempt:
        require_own_pool(attempt_file, attempt, common["data_dir"])
    with connect(common, client="administrator") as pool:
        if attempt:
            pool.cancel_ceremony(attempt.partition, attempt.attempt_id)
        else:
            ceremony = pool.get_ceremony(partition)
            if ceremony is None:
                fail("no ceremony is under way at this partition", "mhsm security-domain status")
            pool.cancel_ceremony(ceremony.partition_index, ceremony.attempt_id)
    report({"cancelled": True}, as_json=common["as_json"], text="the ceremony is cancelled", following="")


for _command in (
    begin_ceremony_commands.plan,
    begin_ceremony_commands.download,
    begin_ceremony_commands.init_recovery,
    begin_ceremony_commands.verify,
    begin_ceremony_commands.rotate_shares,
    begin_ceremony_commands.new_generation,
    submit_share,
    restore_blob_commands.restore_blob,
    restore_blob_commands.upload,
):
    security_domain_group.add_command(_command)
