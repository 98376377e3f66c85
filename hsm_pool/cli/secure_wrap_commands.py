"""mhsm key secure-wrap and secure-unwrap: new keys for attested environments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.key_output import as_application, resource
from hsm_pool.cli.output import connect, read_bounded, report
from hsm_pool.core.model import KeyOperation
from hsm_pool.crypto import algorithms
from hsm_pool.limits import PAYLOAD_BYTES_MAX, TOKEN_BYTES_MAX

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_algorithm_option = click.option(
    "--algorithm", type=click.Choice(algorithms.names(KeyOperation.SECURE_WRAP_KEY)), required=True
)


@click.command("secure-wrap")
@click.argument("name")
@_algorithm_option
@click.option("--output", type=click.Path(path_type=Path), required=True, help="File for the wrapped key.")
@as_application
def secure_wrap(name: str, algorithm: str, output: Path, **common: Any) -> None:
    """Have the pool make an AES key of 256 bits; only an attested environment will see it."""
    refuse_existing(output)
    with connect(common) as pool:
        wrapped = pool.secure_wrap_key(resource(name), algorithm)
    write_new(output, wrapped)
    report(
        {"output": str(output), "key": wrapped.key_name, "algorithm": algorithm},
        as_json=common["as_json"],
        text=f"wrote {output}: a new key, wrapped with {wrapped.key_name}",
        following=f"mhsm key secure-unwrap {wrapped.key_name.removeprefix('keys/')} --algorithm {algorithm}"
        f" --file {output} --attestation-token FILE --output FILE",
    )


@click.command("secure-unwrap")
@click.argument("name")
@_algorithm_option
@click.option("--file", "file", type=_FILE, required=True, help="What secure-wrap wrote.")
@click.option("--attestation-token", type=_FILE, required=True, help="JWT of an attestation authority.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="File for the JWS.")
@as_application
def secure_unwrap(
    name: str, algorithm: str, file: Path, attestation_token: Path, output: Path, **common: Any
) -> None:
    """Unwrap a key that the pool made, encrypted to the environment that the token is about."""
    refuse_existing(output)
    wrapped = read_bounded(file, PAYLOAD_BYTES_MAX)
    token = read_bounded(attestation_token, TOKEN_BYTES_MAX).decode(errors="replace").strip()
    with connect(common) as pool:
        answer = pool.secure_unwrap_key(resource(name), algorithm, wrapped, token)
    write_new(output, answer.encode())
    report(
        {"output": str(output), "algorithm": algorithm},
        as_json=common["as_json"],
        text=f"wrote {output}: the key in {file}, encrypted to the attested environment",
        following="docs/operations.md says how the environment opens it",
    )
