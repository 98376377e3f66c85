"""mhsm token: tokens of the development profile's issuer."""

from __future__ import annotations

from pathlib import Path

import click

from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import UNREACHABLE, data_directory_option, fail, json_option, report, typed_errors
from hsm_pool.client.connection import load_connection
from hsm_pool.client.tokens import NoIssuer, development_token


@click.command("token")
@click.option("--as", "name", required=True, help="For whom; each name has an object id of its own.")
@click.option("--group", "groups", multiple=True, help="Name of a group that he is in; repeatable.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="File for the token.")
@json_option
@data_directory_option
@typed_errors
def token(name: str, groups: tuple[str, ...], output: Path, data_dir: Path, as_json: bool) -> None:
    """Get a token of the development issuer; needs the administrator's certificate."""
    refuse_existing(output)
    try:
        made = development_token(load_connection(data_dir), name, groups)
    except NoIssuer as error:
        fail(str(error), "mhsm status", UNREACHABLE)
    write_new(output, made["access_token"].encode())
    assignee = [made["oid"], *made["groups"]][-1]  # whoever names groups gives roles to them
    report(
        {
            "principal_id": made["oid"],
            "groups": made["groups"],
            "expires": made["exp"],
            "output": str(output),
        },
        as_json=as_json,
        text="\n".join(
            [
                f"wrote a token of {name} to {output}; principal {made['oid']}",
                *(f"  group {group} {found}" for group, found in zip(groups, made["groups"], strict=True)),
            ]
        ),
        following=f'mhsm role assignment create --role "Crypto User" --assignee {assignee}',
    )
