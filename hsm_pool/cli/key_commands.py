"""mhsm key: the life cycle of keys."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives import serialization
from google.protobuf.json_format import MessageToDict

from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.key_attestation_commands import attestation, verify_attestation
from hsm_pool.cli.key_output import (
    CURVES,
    OPERATIONS,
    TYPES,
    as_application,
    has_expired,
    resource,
    show_deleted_key,
    show_key,
    show_keys,
)
from hsm_pool.cli.output import (
    confirmed_by_name,
    connect,
    fail,
    read_bounded,
    report,
    request_id_option,
)
from hsm_pool.cli.release_commands import (
    attestation_token,
    exportable_option,
    new_release_policy,
    release,
    release_policy_of,
    release_policy_options,
)
from hsm_pool.cli.rotation_commands import rotate, rotation_policy
from hsm_pool.cli.secure_wrap_commands import secure_unwrap, secure_wrap
from hsm_pool.client import calls, jwk
from hsm_pool.core.model import Curve, KeyType
from hsm_pool.crypto.algorithms import AKP_SIZES_BITS, ALGORITHMS, RSA_EXPONENT, RSA_EXPONENTS
from hsm_pool.limits import IMPORT_BYTES_MAX, KEY_BACKUP_BYTES_MAX

# Azure's, but for AKP.
_DEFAULT_SIZES = {KeyType.RSA: 2048, KeyType.OCT: 256, KeyType.EC: 0, KeyType.AKP: AKP_SIZES_BITS[1]}
_DEFAULT_CURVES = {KeyType.EC: Curve.P256}
_AKP_SIZES = ", ".join(f"{a.size_bits} {a.name}" for a in ALGORITHMS if a.preview)
_CHANGES = (
    "not_before",
    "expires",
    "operations",
    "tags",
    "clear_not_before",
    "clear_expires",
    "clear_tags",
)
_TIME = click.DateTime(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d"])


def _tags(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:  # noqa: ARG001
    parsed: dict[str, str] = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not separator:
            raise click.BadParameter("a tag is NAME=VALUE")
        parsed[name] = text
    return parsed


def _attribute_options(function: Any) -> Any:
    for option in (
        click.option("--tag", "tags", multiple=True, callback=_tags, help="NAME=VALUE; repeatable."),
        click.option("--not-before", type=_TIME, default=None, help="UTC, e.g. 2030-01-31T00:00:00Z."),
        click.option("--expires", type=_TIME, default=None, help="UTC."),
        click.option(
            "--operation",
            "operations",
            type=click.Choice(list(OPERATIONS)),
            multiple=True,
            help="Repeatable; by default what fits the type.",
        ),
    ):
        function = option(function)
    return function


def _utc(value: datetime | None) -> datetime | None:
    return value.replace(tzinfo=UTC) if value else None


@click.group("key")
def key() -> None:
    """Create, read, change, delete and recover keys."""


key.add_command(attestation)
key.add_command(attestation_token)
key.add_command(new_release_policy)
key.add_command(release)
key.add_command(rotate)
key.add_command(rotation_policy)
key.add_command(secure_wrap)
key.add_command(secure_unwrap)
key.add_command(verify_attestation)


@key.command()
@click.argument("name")
@click.option(
    "--type",
    "type_name",
    type=click.Choice(list(TYPES)),
    required=True,
    help="Each with or without -HSM: all keys are in the pool.",
)
@click.option(
    "--curve", type=click.Choice(list(CURVES)), default=None, help="Of an EC key; by default P-256."
)
@click.option(
    "--size",
    type=click.IntRange(1, 65_536),
    default=None,
    help=f"Bits: RSA (default 2048), oct (256); PREVIEW, AKP: {_AKP_SIZES}.",
)
@click.option(
    "--public-exponent",
    type=click.Choice([str(exponent) for exponent in RSA_EXPONENTS]),
    default=None,
    help=f"Of an RSA key; {RSA_EXPONENT} by default, and only that for new uses.",
)
@click.option("--disabled", is_flag=True)
@click.option("--new-only", is_flag=True, help="Refuse to add a version to an existing key.")
@exportable_option
@release_policy_options
@request_id_option
@_attribute_options
@as_application
def create(name: str, type_name: str, curve: str | None, size: int | None, **options: Any) -> None:
    """Create a key, or a new version of it."""
    attributes = calls.attributes(
        enabled=False if options["disabled"] else None,
        not_before=_utc(options["not_before"]),
        expires=_utc(options["expires"]),
        exportable=options["exportable"],
    )
    policy = release_policy_of(options)
    key_type = TYPES[type_name]
    with connect(options) as pool:
        made = pool.create_key(
            name,
            key_type=key_type,
            curve=CURVES[curve] if curve else _DEFAULT_CURVES.get(key_type, Curve.NONE),
            size_bits=_DEFAULT_SIZES[key_type] if size is None else size,
            key_operations=[OPERATIONS[operation] for operation in options["operations"]],
            key_attributes=attributes,
            tags=options["tags"],
            must_not_exist=options["new_only"],
            public_exponent=int(options["public_exponent"] or 0),
            release_policy=policy,
            request_id=options["request_id"],
        )
    following = f"mhsm key public-key {name} --output {name}.pem" if made.public_key_der else "mhsm key list"
    if has_expired(made.attributes):
        following = (
            f"it has expired already: it only verifies, decrypts, unwraps and is released\n{following}"
        )
    show_key(made, options, f"made {made.name}", following)


def _material(file: Path) -> dict[str, bytes]:
    content = read_bounded(file, 2 * IMPORT_BYTES_MAX)  # PEM is longer than what it holds
    if content.startswith(b"-----BEGIN"):
        try:
            parsed = serialization.load_pem_private_key(content, None)
        except (ValueError, TypeError):
            fail(f"{file} is not an unencrypted private key", "convert it to PKCS#8 first")
        der = parsed.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {"pkcs8_der": der}
    if content.lstrip().startswith(b"{"):
        return jwk.material(content)
    return {"octets" if len(content) in {16, 24, 32} else "pkcs8_der": content}


@key.command("import")
@click.argument("name")
@click.option(
    "--file",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="PKCS#8 (PEM or DER) or JWK for RSA and EC; 16, 24 or 32 raw bytes, or JWK, for oct.",
)
@click.option(
    "--byok",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="Key transfer blob, encrypted to a key of the pool whose only operation is import.",
)
@exportable_option
@release_policy_options
@request_id_option
@_attribute_options
@as_application
def import_(name: str, file: Path | None, byok: Path | None, **options: Any) -> None:
    """Import key material as a key, or as a new version of it."""
    if byok is not None and file is None:
        material = {"key_transfer_blob": read_bounded(byok, IMPORT_BYTES_MAX)}
    elif file is not None and byok is None:
        material = _material(file)
    else:
        raise click.UsageError("give --file or --byok, and not both")
    attributes = calls.attributes(
        not_before=_utc(options["not_before"]),
        expires=_utc(options["expires"]),
        exportable=options["exportable"],
    )
    policy = release_policy_of(options)
    with connect(options) as pool:
        made = pool.import_key(
            name,
            **material,
            key_operations=[OPERATIONS[operation] for operation in options["operations"]],
            key_attributes=attributes,
            tags=options["tags"],
            release_policy=policy,
            request_id=options["request_id"],
        )
    show_key(made, options, f"imported {made.name}", f"mhsm key show {name}")


@key.command()
@click.argument("name")
@as_application
def show(name: str, **common: Any) -> None:
    """Show a key's newest version, or keys/NAME/versions/VERSION."""
    with connect(common) as pool:
        found = pool.get_key(resource(name))
    show_key(found, common, "", "")


@key.command("list")
@as_application
def list_(**common: Any) -> None:
    """List the keys."""
    with connect(common) as pool:
        show_keys(list(pool.list_keys()), common)


@key.command()
@click.argument("name")
@as_application
def versions(name: str, **common: Any) -> None:
    """List the versions of a key, oldest first."""
    with connect(common) as pool:
        show_keys(list(pool.list_key_versions(resource(name))), common)


@key.command()
@click.argument("name")
@click.option("--enable/--disable", "enabled", default=None)
@click.option("--clear-not-before", is_flag=True)
@click.option("--clear-expires", is_flag=True)
@click.option("--clear-tags", is_flag=True)
@release_policy_options
@request_id_option
@_attribute_options
@as_application
def update(name: str, enabled: bool | None, **options: Any) -> None:
    """Change attributes, operations or tags; what is not named stays."""
    attributes = calls.attributes(
        enabled=enabled, not_before=_utc(options["not_before"]), expires=_utc(options["expires"])
    )
    policy = release_policy_of(options)
    if enabled is None and policy is None and not any(options[name] for name in _CHANGES):
        raise click.UsageError("nothing to change: say what")
    with connect(options) as pool:
        changed = pool.update_key(
            resource(name),
            key_attributes=attributes,
            key_operations=[OPERATIONS[operation] for operation in options["operations"]],
            tags=options["tags"] if options["tags"] or options["clear_tags"] else None,
            clear_not_before=options["clear_not_before"],
            clear_expires=options["clear_expires"],
            release_policy=policy,
            request_id=options["request_id"],
        )
    show_key(changed, options, f"changed {changed.name}", f"mhsm key show {name}")


@key.command()
@click.argument("name")
@request_id_option
@as_application
def delete(name: str, request_id: str | None, **common: Any) -> None:
    """Soft-delete a key with all its versions."""
    with connect(common) as pool:
        deleted = pool.delete_key(resource(name), request_id)
    show_deleted_key(deleted, common, f"mhsm key recover {name}")


@key.command("show-deleted")
@click.argument("name")
@as_application
def show_deleted(name: str, **common: Any) -> None:
    """Show a soft-deleted key."""
    with connect(common) as pool:
        deleted = pool.get_deleted_key(resource(name))
    show_deleted_key(deleted, common, f"mhsm key recover {name}")


@key.command("list-deleted")
@as_application
def list_deleted(**common: Any) -> None:
    """List soft-deleted keys."""
    with connect(common) as pool:
        found = list(pool.list_deleted_keys())
    if common["as_json"]:
        click.echo(json.dumps({"deleted_keys": [MessageToDict(deleted) for deleted in found]}))
        return
    if not found:
        click.echo("no key is soft-deleted")
    for deleted in found:
        click.echo(f"{deleted.key.name}  purged at {deleted.scheduled_purge_time.ToJsonString()}")


@key.command()
@click.argument("name")
@request_id_option
@as_application
def recover(name: str, request_id: str | None, **common: Any) -> None:
    """Recover a soft-deleted key."""
    with connect(common) as pool:
        recovered = pool.recover_deleted_key(resource(name), request_id)
    show_key(recovered, common, f"recovered {recovered.name}", f"mhsm key show {name}")


@key.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@request_id_option
@as_application
def purge(name: str, yes: bool, request_id: str | None, **common: Any) -> None:
    """Destroy a soft-deleted key for good."""
    question = "type the key's name to destroy it for good"
    if not yes and not confirmed_by_name(question, name, f"mhsm key purge {name} --yes"):
        fail("the name does not fit; nothing was done", "")
    with connect(common) as pool:
        pool.purge_deleted_key(resource(name), request_id)
    report({"purged": name}, as_json=common["as_json"], text=f"purged {name}", following="mhsm key list")


@key.command("public-key")
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="PEM; - for standard output.")
@as_application
def public_key(name: str, output: Path, **common: Any) -> None:
    """Write a key's public half as PEM."""
    to_file = str(output) != "-"
    if to_file:
        refuse_existing(output)
    with connect(common) as pool:
        found = pool.get_key(resource(name))
    if not found.public_key_der:
        fail(f"{found.name} is a symmetric key and has no public half", "")
    pem = serialization.load_der_public_key(found.public_key_der).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    if not to_file:
        if common["as_json"]:
            click.echo(json.dumps({"name": found.name, "public_key": pem.decode()}))
        else:
            click.echo(pem.decode(), nl=False)
        return
    write_new(output, pem, 0o644)
    report(
        {"name": found.name, "public_key_file": str(output)},
        as_json=common["as_json"],
        text=f"wrote the public key of {found.name} to {output}",
        following=("openssl 3.5 or newer reads it\n" if KeyType(found.key_type) is KeyType.AKP else "")
        + f"openssl pkey -pubin -in {output} -text -noout",
    )


@key.command()
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@as_application
def backup(name: str, output: Path, **common: Any) -> None:
    """Write a key with all its versions, encrypted to the security domain."""
    refuse_existing(output)
    with connect(common) as pool:
        write_new(output, pool.backup_key(resource(name)))
    report(
        {"output": str(output)},
        as_json=common["as_json"],
        text=f"wrote {output}",
        following="it can be restored in a pool of this security domain that has no such key (any more)",
    )


@key.command()
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@request_id_option
@as_application
def restore(file: Path, request_id: str, **common: Any) -> None:
    """Restore a backed-up key, which must not exist, in a pool of the same security domain."""
    octets = read_bounded(file, KEY_BACKUP_BYTES_MAX)
    with connect(common) as pool:
        found = pool.restore_key(octets, request_id)
    show_key(found, common, f"restored {found.name}", f"mhsm key show {found.name}")
