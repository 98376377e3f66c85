"""mhsm client: certificates of further clients."""

from __future__ import annotations

import re
from pathlib import Path

import click

from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import data_directory_option, fail, json_option, report, typed_errors
from hsm_pool.provisioning.layout import pool_settings
from hsm_pool.provisioning.pki import Authority

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


@click.group("client")
def client_group() -> None:
    """Clients of the pool; what they may do is said by their roles."""


@client_group.command("create")
@click.argument("name")
@json_option
@data_directory_option
@typed_errors
def create(name: str, data_dir: Path, as_json: bool) -> None:
    """Make the certificate of client/NAME; it has no role yet. Lasts 825 days."""
    if not _NAME.fullmatch(name):
        fail("a client's name has 1-64 characters of 0-9 a-z A-Z and hyphen")
    if not (data_dir / "pool.json").is_file():
        fail(f"{data_dir} is not a pool's data directory", "mhsm up")
    base = data_dir / "clients" / name
    certificate_file, key_file = base.with_suffix(".crt"), base.with_suffix(".key")
    for path in (certificate_file, key_file):
        refuse_existing(path)
    authority = Authority.load(
        (data_dir / "pki/client-ca.crt").read_bytes(), (data_dir / "pki/client-ca.key").read_bytes()
    )
    certificate, key = authority.issue(f"spiffe://{pool_settings(data_dir)['pool_id']}/client/{name}")
    write_new(key_file, key)
    write_new(certificate_file, certificate)
    report(
        {
            "principal_id": f"client/{name}",
            "certificate_file": str(certificate_file),
            "key_file": str(key_file),
        },
        as_json=as_json,
        text=f"made client/{name}: {certificate_file}",
        following=f'mhsm role assignment create --role "Crypto User" --assignee client/{name}',
    )
