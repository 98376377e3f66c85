"""mhsm crypto: using keys on files."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSAMuHasher
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.key_output import as_application, resource
from hsm_pool.cli.output import connect, fail, read_bounded, report
from hsm_pool.client.calls import Made
from hsm_pool.client.pool import Pool
from hsm_pool.core.model import KeyOperation
from hsm_pool.crypto import algorithms
from hsm_pool.crypto.loaded_keys import MLDSAPublicKey
from hsm_pool.limits import PAYLOAD_BYTES_MAX
from mhsm.crypto.v1 import crypto_pb2

Command = TypeVar("Command", bound=Callable[..., Any])

_IN_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUT_FILE = click.Path(path_type=Path)
_BLOCK_BYTES = 16
_ZEROS = "A*CBC adds zeros up to 16 bytes, and decrypt leaves them there: A*CBCPAD takes them off"


def _algorithm_option(operation: KeyOperation) -> Callable[[Command], Command]:
    return click.option(
        "--algorithm",
        type=click.Choice(algorithms.names(operation)),
        required=True,
        metavar="ALGORITHM",
        help=f"One of {', '.join(algorithms.names(operation))}. ML-DSA and ML-KEM are PREVIEWs.",
    )


@click.group("crypto")
def crypto() -> None:
    """Sign, verify, encrypt, decrypt, wrap and unwrap files; random bytes."""


def _digest(pool: Pool, name: str, algorithm: str, file: Path) -> bytes:
    """Return the digest of a file by the algorithm's hash; RSNULL has none and takes the file itself.

    ML-DSA's depends on the public key, which is asked for.
    """
    kind = algorithms.named(algorithm).hash
    if algorithms.named(algorithm).scheme is algorithms.Scheme.ML_DSA:
        public = serialization.load_der_public_key(pool.get_key(resource(name)).public_key_der)
        if not isinstance(public, MLDSAPublicKey):
            fail(f"{name} is no ML-DSA key", f"mhsm key show {name}")
        hasher = MLDSAMuHasher(public)
        with file.open("rb") as stream:
            while part := stream.read(PAYLOAD_BYTES_MAX):
                hasher.update(part)
        return hasher.finalize()
    if kind is None:
        return read_bounded(file, PAYLOAD_BYTES_MAX)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, kind.name).digest()


def _is_ecdsa(algorithm: str) -> bool:
    return algorithms.named(algorithm).scheme is algorithms.Scheme.ECDSA


def _to_der(signature: bytes) -> bytes:
    half = len(signature) // 2
    return encode_dss_signature(
        int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    )


def _width(algorithm: str) -> int:
    """Return the bytes of r, and of s."""
    return (algorithms.CURVE_BITS[algorithms.named(algorithm).curve] + 7) // 8


def _check_raw(signature: bytes, algorithm: str) -> None:
    """End the command where a file cannot be an EC signature: exit code 6 would accuse somebody."""
    if len(signature) == 2 * _width(algorithm):
        return
    try:
        decode_dss_signature(signature)
    except ValueError:
        found = f"{len(signature)} bytes"
    else:
        found = "DER"
    wanted = f"a signature of {algorithm} is r || s, {2 * _width(algorithm)} bytes"
    fail(f"{wanted}: this is {found}", "give --der" if found == "DER" else "")


def _from_der(signature: bytes, algorithm: str) -> bytes:
    width = _width(algorithm)
    try:
        r, s = decode_dss_signature(signature)
        return r.to_bytes(width, "big") + s.to_bytes(width, "big")
    except (ValueError, OverflowError):
        fail("the signature is not DER", "leave --der away for r || s")


def _adds_zeros(algorithm: str) -> bool:
    return algorithms.named(algorithm).scheme is algorithms.Scheme.AES_CBC


def _argument(made: Made) -> str:
    """Return the key version that has made something, as an argument."""
    return made.key_name.removeprefix("keys/")


@crypto.command()
@click.argument("name")
@_algorithm_option(KeyOperation.SIGN)
@click.option("--file", "file", type=_IN_FILE, required=True)
@click.option("--output", type=_OUT_FILE, required=True)
@click.option("--der", is_flag=True, help="EC: write DER instead of r || s, as openssl needs it.")
@as_application
def sign(name: str, algorithm: str, file: Path, output: Path, der: bool, **common: Any) -> None:
    """Sign a file; the file is hashed here, only the digest travels."""
    refuse_existing(output)
    with connect(common) as pool:
        signature = pool.sign(resource(name), algorithm, _digest(pool, name, algorithm, file))
    write_new(output, _to_der(signature) if der and _is_ecdsa(algorithm) else signature, 0o644)
    report(
        {
            "signature_file": str(output),
            "key": signature.key_name,
            "algorithm": algorithm,
            "bytes": output.stat().st_size,
        },
        as_json=common["as_json"],
        text=f"signed {file}: {output}",
        # The version that has signed: another one may be the newest when that is verified.
        following=f"mhsm crypto verify {_argument(signature)} --algorithm {algorithm} --file {file}"
        f" --signature {output}" + (" --der" if der else ""),
    )


@crypto.command()
@click.argument("name")
@_algorithm_option(KeyOperation.VERIFY)
@click.option("--file", "file", type=_IN_FILE, required=True)
@click.option("--signature", type=_IN_FILE, required=True)
@click.option("--der", is_flag=True, help="EC: the signature is DER, not r || s.")
@as_application
def verify(name: str, algorithm: str, file: Path, signature: Path, der: bool, **common: Any) -> None:
    """Verify a file's signature; exit code 6 when it does not verify."""
    octets = read_bounded(signature, PAYLOAD_BYTES_MAX)
    if _is_ecdsa(algorithm):
        if der:
            octets = _from_der(octets, algorithm)
        else:
            _check_raw(octets, algorithm)
    with connect(common) as pool:
        pool.verify(resource(name), algorithm, _digest(pool, name, algorithm, file), octets)
    report({"valid": True}, as_json=common["as_json"], text="the signature verifies", following="")


@crypto.command()
@click.argument("name")
@_algorithm_option(KeyOperation.ENCRYPT)
@click.option("--file", "file", type=_IN_FILE, required=True, help="At most 64 KiB.")
@click.option("--output", type=_OUT_FILE, required=True)
@as_application
def encrypt(name: str, algorithm: str, file: Path, output: Path, **common: Any) -> None:
    """Encrypt a small file into a JSON file that decrypt takes."""
    refuse_existing(output)
    plaintext = read_bounded(file, PAYLOAD_BYTES_MAX)
    with connect(common) as pool:
        key_name = pool.get_key(resource(name)).name
        sealed = pool.encrypt(key_name, algorithm, plaintext)
    content = {
        "key": key_name,
        "algorithm": algorithm,
        "ciphertext": base64.b64encode(sealed.ciphertext).decode(),
        "initialization_vector": base64.b64encode(sealed.initialization_vector).decode(),
        "authentication_tag": base64.b64encode(sealed.authentication_tag).decode(),
    }
    write_new(output, json.dumps(content, indent=2).encode() + b"\n")
    report(
        {"output": str(output), "key": key_name},
        as_json=common["as_json"],
        text=f"encrypted {file}: {output}",
        following=f"mhsm crypto decrypt --file {output} --output FILE"
        + (f"\n{_ZEROS}" if _adds_zeros(algorithm) and len(plaintext) % _BLOCK_BYTES else ""),
    )


@crypto.command()
@click.option("--file", "file", type=_IN_FILE, required=True, help="What encrypt wrote.")
@click.option("--output", type=_OUT_FILE, required=True)
@as_application
def decrypt(file: Path, output: Path, **common: Any) -> None:
    """Decrypt what encrypt wrote."""
    refuse_existing(output)
    octets = read_bounded(file, 2 * PAYLOAD_BYTES_MAX)
    try:
        content = json.loads(octets)
        sealed = crypto_pb2.Ciphertext(
            ciphertext=base64.b64decode(content["ciphertext"]),
            initialization_vector=base64.b64decode(content["initialization_vector"]),
            authentication_tag=base64.b64decode(content["authentication_tag"]),
        )
        name, algorithm = str(content["key"]), str(content["algorithm"])
    except (ValueError, KeyError, TypeError, RecursionError):
        fail(f"{file} was not written by mhsm crypto encrypt", "")
    with connect(common) as pool:
        write_new(output, pool.decrypt(name, algorithm, sealed))
    report(
        {"output": str(output)},
        as_json=common["as_json"],
        text=f"decrypted: {output}",
        following=_ZEROS if _adds_zeros(algorithm) else "",
    )


@crypto.command()
@click.argument("name")
@_algorithm_option(KeyOperation.WRAP_KEY)
@click.option("--file", "file", type=_IN_FILE, required=True, help="The raw key to wrap.")
@click.option("--output", type=_OUT_FILE, required=True)
@as_application
def wrap(name: str, algorithm: str, file: Path, output: Path, **common: Any) -> None:
    """Wrap a raw key in a file."""
    refuse_existing(output)
    octets = read_bounded(file, PAYLOAD_BYTES_MAX)
    with connect(common) as pool:
        wrapped = pool.wrap_key(resource(name), algorithm, octets)
    write_new(output, wrapped)
    report(
        {"output": str(output), "key": wrapped.key_name},
        as_json=common["as_json"],
        text=f"wrapped: {output}",
        following=f"mhsm crypto unwrap {_argument(wrapped)} --algorithm {algorithm} --file {output}"
        " --output FILE",
    )


@crypto.command()
@click.argument("name")
@_algorithm_option(KeyOperation.UNWRAP_KEY)
@click.option("--file", "file", type=_IN_FILE, required=True)
@click.option("--output", type=_OUT_FILE, required=True)
@as_application
def unwrap(name: str, algorithm: str, file: Path, output: Path, **common: Any) -> None:
    """Unwrap a wrapped key."""
    refuse_existing(output)
    octets = read_bounded(file, PAYLOAD_BYTES_MAX)
    with connect(common) as pool:
        write_new(output, pool.unwrap_key(resource(name), algorithm, octets))
    report({"output": str(output)}, as_json=common["as_json"], text=f"unwrapped: {output}", following="")


@crypto.command()
@click.argument("count", type=click.IntRange(1, 128))
@click.option("--output", type=_OUT_FILE, required=True)
@as_application
def random(count: int, output: Path, **common: Any) -> None:
    """Write random bytes from the pool to a file."""
    refuse_existing(output)
    with connect(common) as pool:
        write_new(output, pool.random_bytes(count))
    report({"output": str(output), "bytes": count}, as_json=common["as_json"], text=str(output), following="")
