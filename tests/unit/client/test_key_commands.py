"""Protocol tests of mhsm key, crypto and role against scripted servers: who calls, what is sent and said.

The servers are no pool (see protocol_server.py); tests/cli runs the commands on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import grpc
import pytest
from click.testing import CliRunner, Result

from hsm_pool.cli.main import mhsm
from hsm_pool.core.model import Curve, KeyType
from tests.unit.client.protocol_server import POOL_ID, Servers


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
