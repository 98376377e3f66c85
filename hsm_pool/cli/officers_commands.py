"""mhsm officers: making officers for rehearsals."""

from __future__ import annotations

from pathlib import Path

import click

from hsm_pool.cli.ceremony_progress import download_command
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import report
from security_domain import officers


@click.group("officers")
def officers_group() -> None:
    """Officers of the security domain: each holds one RSA key."""


@officers_group.command("make")
@click.option("--count", type=click.IntRange(1, 10), default=3, show_default=True)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def officers_make(count: int, output_dir: Path, as_json: bool) -> None:
    """Make officers' keys and certificates, for rehearsals.

    In production each officer makes his own key on his own machine.
    """
    output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    targets = [
        (output_dir / f"officer-{index}.crt", output_dir / f"officer-{index}.key")
        for index in range(1, count + 1)
    ]
    for path in [path for pair in targets for path in pair]:
        refuse_existing(path)
    made: list[dict[str, str]] = []
    for index, (certificate_file, key_file) in enumerate(targets, start=1):
        certificate_pem, key = officers.make_officer(f"officer-{index}")
        write_new(key_file, officers.save_private_key(key))
        write_new(certificate_file, certificate_pem, 0o644)
        made.append({"certificate_file": str(certificate_file), "key_file": str(key_file)})
    report(
        {"officers": made},
        as_json=as_json,
        text=f"made {count} officers in {output_dir}",
        following=download_command((pair[0] for pair in targets), 2),
    )
