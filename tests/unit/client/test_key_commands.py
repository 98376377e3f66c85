"""Protocol tests of mhsm key, crypto and role against scripted servers: who calls, what is sent and said.

The servers are no pool (see protocol_server.py); tests/cli runs the commands on a real one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from grpc_status import rpc_status

from hsm_pool import errors
from hsm_pool.cli import output, rotation_commands
from hsm_pool.cli.main import mhsm
from hsm_pool.core.model import Curve, KeyType
from hsm_pool.errors import MHSMError
from hsm_pool.net.interceptors import error_status
from mhsm.keys.v1 import keys_pb2
from tests.unit.client.protocol_server import POOL_ID, Script, Servers


def run(servers: Servers, *arguments: str) -> Result:
    """Run a command on the scripted servers; no command may end with a traceback."""
    servers.write_connection_file()
    result = CliRunner().invoke(mhsm, [*arguments, "--data-dir", str(servers.directory)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield the commands below a command, with their words."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            below = command.get_command(click.Context(command), name)
            assert below
            yield from leaves(below, (*path, name))
    else:
        yield path, command


# -- who calls ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "default"), [("key", "application"), ("crypto", "application"), ("role", "administrator")]
)
def test_every_command_that_calls_the_pool_takes_a_client(group: str, default: str) -> None:
    """One spelling and one default a group: what a client may do can be tried with each command."""
    command = mhsm.get_command(click.Context(mhsm), group)
    assert command
    calling = [
        {parameter.name: parameter for parameter in leaf.params}
        for _, leaf in leaves(command, (group,))
        if any(parameter.name == "token_file" for parameter in leaf.params)
    ]
    assert len(calling) >= 7
    for parameters in calling:
        assert parameters["client"].opts == ["--as"]
        assert parameters["client"].default == default


@pytest.mark.parametrize(
    ("named", "client"), [((), "application"), (("--as", "administrator"), "administrator")]
)
def test_the_named_client_calls(servers: Servers, named: tuple[str, ...], client: str) -> None:
    callers: list[Any] = []

    def note(method: str, _: Any, context: grpc.ServicerContext) -> None:
        if method == "GetKey":
            callers.extend(context.auth_context()["x509_subject_alternative_name"])

    servers.script(note)
    assert run(servers, "key", "show", "k", *named).exit_code == 0
    assert callers == [f"spiffe://{POOL_ID}/client/{client}".encode()]


def test_a_suggestion_is_for_the_named_client(servers: Servers) -> None:
    """As it is for the pool that was named; but not where he would have to be somebody else."""
    shown = run(servers, "key", "create", "k", "--type", "oct", "--as", "administrator")
    at = f"--data-dir {servers.directory} --as administrator"
    assert f"next: mhsm key public-key k --output k.pem {at}\n" in shown.stderr
    unnamed = run(servers, "key", "create", "k", "--type", "oct").stderr
    assert unnamed == f"next: mhsm key public-key k --output k.pem --data-dir {servers.directory}\n"


def test_a_client_that_is_none_is_an_answer(servers: Servers) -> None:
    ended = run(servers, "crypto", "random", "8", "--output", "-", "--as", "nobody")
    assert ended.exit_code == 1
    assert "the pool has no client nobody" in ended.stderr
    assert sum(servers.count("GetRandomBytes")) == 0


# -- what is made -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "key_type", "curve", "size_bits"),
    [
        (("RSA-HSM",), KeyType.RSA, Curve.NONE, 2048),
        (("RSA", "--size", "4096"), KeyType.RSA, Curve.NONE, 4096),
        (("EC-HSM",), KeyType.EC, Curve.P256, 0),
        (("EC", "--curve", "P-521"), KeyType.EC, Curve.P521, 0),
        (("oct-HSM",), KeyType.OCT, Curve.NONE, 256),
        (("AKP-HSM",), KeyType.AKP, Curve.NONE, 15_616),
    ],
)
def test_azure_s_types_and_defaults(
    servers: Servers, arguments: tuple[str, ...], key_type: KeyType, curve: Curve, size_bits: int
) -> None:
    """What scripts for Managed HSM say makes what it makes there."""
    assert run(servers, "key", "create", "k", "--type", *arguments).exit_code == 0
    (sent,) = [request for p in servers.partitions for request in p.requests("CreateKey")]
    assert (sent.key_type, sent.curve, sent.size_bits) == (key_type, curve, size_bits)


def test_an_update_of_nothing_is_wrong_usage(servers: Servers) -> None:
    ended = run(servers, "key", "update", "k")
    assert (ended.exit_code, "nothing to change" in ended.stderr) == (2, True)
    assert all(not p.calls for p in servers.partitions)


def test_a_key_that_is_made_expired_is_said_to_be(servers: Servers) -> None:
    """Azure takes the date, too: the person who mistyped the year hears of it."""

    def expiring(method: str, request: Any, _: grpc.ServicerContext) -> keys_pb2.CreateKeyResponse | None:
        if method != "CreateKey":
            return None
        key = keys_pb2.Key(name="keys/k/versions/1", key_type=KeyType.OCT, size_bits=256)
        key.attributes.CopyFrom(request.attributes)
        key.attributes.enabled = True
        return keys_pb2.CreateKeyResponse(key=key)

    servers.script(expiring)
    create = ("key", "create", "k", "--type", "oct")
    dead, alive = (run(servers, *create, "--expires", date) for date in ("2020-01-01", "2999-01-01"))
    assert "oct-256, expired\n" in dead.stdout
    assert "hint: it has expired already" in dead.stderr
    assert "oct-256, enabled\n" in alive.stdout
    assert "hint" not in alive.stderr
    early = run(servers, *create, "--not-before", "2999-01-01")
    assert "oct-256, not valid yet\n" in early.stdout


# -- what is said after a refusal ---------------------------------------------------------


def refuse(error: MHSMError) -> Script:
    """Answer every call but the health check with this very error."""

    def script(method: str, _: Any, context: grpc.ServicerContext) -> None:
        if method != "Check":
            context.abort_with_status(rpc_status.to_status(error_status(error)))

    return script


@pytest.mark.parametrize(
    ("error", "following"),
    [
        (errors.KeyNotUsable("why", cause="disabled"), ["next: mhsm key update k --enable"]),
        (errors.KeyNotUsable("why", cause="expires"), ["next: mhsm key show k"]),
        (errors.KeySoftDeleted("why"), ["next: mhsm key recover k", "next: mhsm key purge k"]),
        (errors.KeyExists("why", state="deleted"), ["next: mhsm key recover k", "next: mhsm key purge k"]),
        (errors.KeyExists("why", state="active"), ["next: mhsm key show k"]),
        (errors.KeyExists("why", state="active", key="of-a-file"), ["next: mhsm key show of-a-file"]),
        (errors.KeyExists("why"), []),
        (errors.KeyNotFound("why"), ["next: mhsm key list"]),
        (
            errors.DeletedKeyNotFound("why"),
            ["next: mhsm key list-deleted", "hint: a key is deleted before it is purged"],
        ),
        (errors.OperationNotPermitted("why"), ["next: mhsm key show k"]),
        (errors.PurgeProtected("why"), ["next: mhsm key show-deleted k"]),
        (
            errors.LimitExceeded("why", limit="keys"),
            ["next: mhsm key list-deleted", "next: mhsm key purge NAME"],
        ),
        (errors.LimitExceeded("why", limit="versions"), []),
        (
            errors.InvalidField("why", field="data_actions"),
            ['next: mhsm role definition show "Crypto User"', "hint: all data actions: docs/roles.md"],
        ),
        (errors.PoolLocked("why"), ["next: mhsm security-domain init-recovery --output attempt.json"]),
    ],
)
def test_a_refusal_says_what_to_do(servers: Servers, error: MHSMError, following: list[str]) -> None:
    """The way out is a command, and not words alone."""
    servers.script(refuse(error))
    ended = run(servers, "key", "show", "k")
    assert ended.exit_code in {1, 3}
    at = f" --data-dir {servers.directory}"
    wanted = [line + at * line.startswith("next") for line in following]
    assert ended.stderr.splitlines() == ["mhsm: why", *wanted]


def test_a_refusal_of_a_version_names_the_key_where_only_keys_are(servers: Servers) -> None:
    servers.script(refuse(errors.KeySoftDeleted("why")))
    shown = run(servers, "key", "show", f"k/versions/{'0' * 32}").stderr
    assert "next: mhsm key recover k " in shown


def test_overload_says_when_to_come_back(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pool serves: to look at its status would not help, to wait does."""
    servers.write_connection_file()
    servers.script(refuse(errors.Overloaded("too many calls").retry_after(2.0)))
    command = ["mhsm", "key", "show", "k", "--timeout", "0.3", "--data-dir", str(servers.directory), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        output.main(mhsm)
    error = json.loads(capsys.readouterr().err)["error"]
    assert ended.value.code == 5
    assert (error["reason"], error["retry_seconds"], error["next"]) == ("OVERLOADED", 2.0, [])
    assert error["hints"] == ["come back in 2 s, or give a longer --timeout"]


# -- files --------------------------------------------------------------------------------


def test_a_file_that_is_no_signature_accuses_nobody(servers: Servers, tmp_path: Path) -> None:
    """Exit code 6 is kept for what can be a signature: a forgotten --der is another thing."""
    text, signature = tmp_path / "text", tmp_path / "signature"
    text.write_text("text")
    verify = ("crypto", "verify", "k", "--file", str(text), "--signature", str(signature), "--algorithm")
    for octets, algorithm, hint in (
        (encode_dss_signature(2**255, 2**254), "ES256", "DER\nhint: give --der"),
        (encode_dss_signature(2**500, 2**500), "ES512", "DER\nhint: give --der"),
        (bytes(63), "ES256", "63 bytes"),
        (bytes(64), "ES384", "64 bytes"),
    ):
        signature.write_bytes(octets)
        ended = run(servers, *verify, algorithm)
        assert (ended.exit_code, hint in ended.stderr) == (1, True), ended.stderr
    assert sum(servers.count("Verify")) == 0
    signature.write_bytes(bytes(64))
    assert run(servers, *verify, "ES256").exit_code == 6
    signature.write_bytes(encode_dss_signature(2**255, 2**254))
    assert run(servers, *verify, "ES256", "--der").exit_code == 6
    signature.write_bytes(bytes(64))
    ended = run(servers, *verify, "ES256", "--der")
    assert (ended.exit_code, "hint: leave --der away" in ended.stderr) == (1, True)


@pytest.mark.parametrize(
    ("algorithm", "octets", "warned"),
    [("A256CBC", 11, True), ("A256CBC", 32, False), ("A256CBCPAD", 11, False), ("A256GCM", 11, False)],
)
def test_zeros_that_stay_are_said(
    servers: Servers, tmp_path: Path, algorithm: str, octets: int, warned: bool
) -> None:
    """What A*CBC decrypts to is longer than what was encrypted: Azure's too, and a surprise there."""
    plain, sealed, opened = tmp_path / "plain", tmp_path / "sealed", tmp_path / "opened"
    plain.write_bytes(bytes(octets))
    encrypt = ("crypto", "encrypt", "k", "--algorithm", algorithm, "--file", str(plain))
    assert ("A*CBCPAD takes them off" in run(servers, *encrypt, "--output", str(sealed)).stderr) == warned
    decrypted = run(servers, "crypto", "decrypt", "--file", str(sealed), "--output", str(opened))
    assert ("A*CBCPAD takes them off" in decrypted.stderr) == (algorithm == "A256CBC")


# -- rotation policies --------------------------------------------------------------------


@pytest.mark.parametrize(("age", "life", "warned"), [("P400D", "P1Y", True), ("P90D", "P1Y", False)])
def test_a_policy_that_leaves_a_gap_is_said(age: str, life: str, warned: bool) -> None:
    assert rotation_commands.expires_before_it_is_rotated(age, life) == warned
    assert not rotation_commands.expires_before_it_is_rotated(age, "")
    assert not rotation_commands.expires_before_it_is_rotated("", life)
