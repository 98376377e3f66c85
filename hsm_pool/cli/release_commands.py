"""mhsm key release, and what it takes: release policies and attestations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import click
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.key_output import as_application, resource
from hsm_pool.cli.output import (
    UNREACHABLE,
    connect,
    data_directory_option,
    fail,
    json_option,
    named,
    read_bounded,
    report,
    typed_errors,
)
from hsm_pool.client import calls
from hsm_pool.client.connection import load_connection
from hsm_pool.client.tokens import NoIssuer, development_attestation, development_authority
from hsm_pool.core import release_policy
from hsm_pool.crypto.key_transport import CKM_RSA_AES_KEY_WRAP, ENCRYPTION_ALGORITHMS
from hsm_pool.limits import RELEASE_POLICY_BYTES_MAX, TOKEN_BYTES_MAX
from mhsm.keys.v1 import keys_pb2
from security_domain.encoding import encode

F = TypeVar("F")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_KEY_FILE_BYTES_MAX = 16 * 1024


def exportable_option(function: F) -> F:
    """Add --exportable."""
    option = click.option(
        "--exportable", is_flag=True, help="The key may be released; fixed for ever, needs a release policy."
    )
    return option(function)  # type: ignore[type-var]


def release_policy_options(function: F) -> F:
    """Add --release-policy and --immutable."""
    for option in (
        click.option("--immutable", is_flag=True, help="The release policy can never be replaced."),
        click.option("--release-policy", type=_FILE, default=None, help="JSON; who gets the key."),
    ):
        function = option(function)  # type: ignore[type-var]
    return function


def release_policy_of(options: dict[str, Any]) -> keys_pb2.KeyReleasePolicy | None:
    """Return the release policy of these options; None without one."""
    path: Path | None = options["release_policy"]
    if path is None:
        if options["immutable"]:
            raise click.UsageError("--immutable needs --release-policy")
        return None
    content = read_bounded(path, RELEASE_POLICY_BYTES_MAX)
    with named(path, "mhsm key new-release-policy --help"):
        release_policy.parse(content)
    return calls.release_policy(content, immutable=options["immutable"])


def _claims(
    context: click.Context,  # noqa: ARG001
    parameter: click.Parameter,  # noqa: ARG001
    values: tuple[str, ...],
) -> dict[str, str | int | float | bool]:
    parsed: dict[str, str | int | float | bool] = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not separator or not name:
            raise click.BadParameter("a claim is NAME=VALUE")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = text
        parsed[name] = found if isinstance(found, str | int | float | bool) else text
    return parsed


_claim_option = click.option(
    "--claim",
    "claims",
    multiple=True,
    required=True,
    callback=_claims,
    help="NAME=VALUE; true, false and numbers are no strings; repeatable.",
)


@click.command("new-release-policy")
@_claim_option
@click.option(
    "--authority", default=None, help="Who vouches (iss); by default the development profile's own."
)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@json_option
@data_directory_option
@typed_errors
def new_release_policy(
    claims: dict[str, Any], authority: str | None, output: Path, data_dir: Path, as_json: bool
) -> None:
    """Write a release policy under which one authority must say all of these claims."""
    refuse_existing(output)
    try:
        vouching = authority or development_authority(load_connection(data_dir))
    except NoIssuer as error:
        fail(str(error), "name one with --authority")
    conditions = [{"claim": name, "equals": value} for name, value in claims.items()]
    policy = {"version": release_policy.VERSION, "anyOf": [{"authority": vouching, "allOf": conditions}]}
    content = json.dumps(policy, indent=2).encode() + b"\n"
    release_policy.parse(content)
    write_new(output, content)
    report(
        {"output": str(output), "authority": vouching},
        as_json=as_json,
        text=f"wrote {output}, for {vouching}",
        following=f"mhsm key create NAME --type RSA --exportable --release-policy {output}",
    )


@click.command("attestation-token")
@_claim_option
@click.option("--public-key", type=_FILE, required=True, help="RSA, PEM: what a key is encrypted to.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="File for the token.")
@json_option
@data_directory_option
@typed_errors
def attestation_token(
    claims: dict[str, Any], public_key: Path, output: Path, data_dir: Path, as_json: bool
) -> None:
    """Have the development profile's authority say anything of an environment; vouches for nothing."""
    refuse_existing(output)
    try:
        parsed = serialization.load_pem_public_key(read_bounded(public_key, _KEY_FILE_BYTES_MAX))
    except (ValueError, TypeError):
        parsed = None
    if not isinstance(parsed, rsa.RSAPublicKey):
        fail(
            f"{public_key} is no RSA public key", "openssl genpkey -algorithm RSA, then openssl pkey -pubout"
        )
    numbers = parsed.public_numbers()
    key = {
        "kty": "RSA",
        "kid": "environment",
        "use": "enc",
        "n": encode(numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big")),
        "e": encode(numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big")),
    }
    said = _nested(claims)
    try:
        made = development_attestation(load_connection(data_dir), said, [key])
    except NoIssuer as error:
        fail(str(error), "mhsm status", UNREACHABLE)
    write_new(output, made["attestation_token"].encode())
    report(
        {"output": str(output), "expires": made["exp"]},
        as_json=as_json,
        text=f"wrote an attestation token to {output}",
        following=f"mhsm key release NAME --attestation-token {output} --output released.jws",
    )


def _nested(claims: dict[str, Any]) -> dict[str, Any]:
    """Return claims whose dotted names are objects in objects, as release policies read them."""
    said: dict[str, Any] = {}
    for name, value in claims.items():
        *outer, last = name.split(".")
        place = said
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise click.UsageError(f"the claim {name} lies in one that is no object")
        place[last] = value
    return said


@click.command()
@click.argument("name")
@click.option("--attestation-token", type=_FILE, required=True, help="JWT of an attestation authority.")
@click.option(
    "--encryption-algorithm",
    type=click.Choice(ENCRYPTION_ALGORITHMS),
    default=CKM_RSA_AES_KEY_WRAP,
    show_default=True,
)
@click.option("--nonce", default="", help="Comes back in the answer.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="File for the JWS.")
@as_application
def release(
    name: str,
    attestation_token: Path,
    encryption_algorithm: str,
    nonce: str,
    output: Path,
    **common: Any,
) -> None:
    """Release an exportable key, encrypted to the environment that the token is about."""
    refuse_existing(output)
    token = read_bounded(attestation_token, TOKEN_BYTES_MAX).decode(errors="replace").strip()
    with connect(common) as pool:
        answer = pool.release_key(resource(name), token, encryption_algorithm, nonce)
    write_new(output, answer.encode())
    report(
        {"output": str(output), "encryption_algorithm": encryption_algorithm},
        as_json=common["as_json"],
        text=f"wrote {output}: {resource(name)}, encrypted to the attested environment",
        following="docs/operations.md says how the environment opens it",
    )
