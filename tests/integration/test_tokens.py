"""Bearer tokens on a real pool, with the development profile's issuer (G2, G8)."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hsm_pool.client import tokens
from hsm_pool.client.aio import AsyncPool
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError, PermissionDenied, Unauthenticated
from mhsm.keys.v1 import keys_pb2
from tests.identities import Clients
from tests.integration.test_authorization import SERVICES, described_methods, outcome
from tests.role_tables import GUIDS
from tests.running_pool import RunningPool, mhsm, until

pytestmark = pytest.mark.pool

EC: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
DIGEST = bytes(32)
CLIENT_SERVICES = {name for name, (planes, _) in SERVICES.items() if "client" in planes}
STATUS = "/mhsm.pool.v1.PoolService/"
FREE = {f"{STATUS}GetPartitionStatus", f"{STATUS}GetEvidence", "/grpc.health.v1.Health/Check"}
NOT_OFFERED = {"/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"}


def token_of(pool: RunningPool, name: str, *groups: str) -> dict[str, Any]:
    return tokens.development_token(pool.connection, name, groups)


def with_token(pool: RunningPool, token: str, **options: Any) -> Pool:
    return Pool(pool.connection, token=token, **options)


@pytest.fixture
def administrator(pool: RunningPool) -> Iterator[Pool]:
    with pool.client("administrator") as client:
        yield client


def test_a_bearer_has_the_roles_of_his_id_and_of_his_groups(pool: RunningPool, administrator: Pool) -> None:
    """Nothing without a role; his own, or his group's; removed, it is gone on every partition (G2)."""
    with pool.client() as user:
        user.create_key("token", **EC)
    alice, bob = token_of(pool, "alice"), token_of(pool, "bob", "signers")
    role, scope = GUIDS["Crypto User"], "/keys/token"
    for made, principal in ((alice, alice["oid"]), (bob, bob["groups"][0])):
        with with_token(pool, made["access_token"]) as client:
            with pytest.raises(PermissionDenied):
                client.sign("keys/token", "ES256", DIGEST)
            given = administrator.create_role_assignment(principal, role, scope)
            for index in range(3):
                with with_token(pool, made["access_token"], partition=index) as pinned:
                    signature = pinned.sign("keys/token", "ES256", DIGEST)
                    pinned.verify("keys/token", "ES256", DIGEST, signature)
            with pytest.raises(PermissionDenied):
                list(client.list_keys())
            administrator.delete_role_assignment(given.name, given.scope)
            for index in range(3):
                pinned = with_token(pool, made["access_token"], partition=index)
                with pinned, pytest.raises(PermissionDenied):
                    pinned.sign("keys/token", "ES256", DIGEST)


def test_no_token_and_no_role_open_no_method(pool: RunningPool) -> None:
    """Every method of every service: without a token unauthenticated, without a role denied."""
    stranger = token_of(pool, "stranger")["access_token"]
    methods = described_methods()
    for entry in pool.connection.partitions[:1]:
        tls = grpc.ssl_channel_credentials(Path(pool.connection.client_ca_file).read_bytes())
        with grpc.secure_channel(entry.token_endpoint, tls) as channel:
            seen = {
                method: outcome(channel, method, streaming=streams) for method, streams in methods.items()
            }
        of_clients = {method: method.split("/")[1] in CLIENT_SERVICES for method in methods}
        assert seen == {m: "UNAUTHENTICATED" if of_clients[m] else "UNIMPLEMENTED" for m in methods}
        both = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(stranger))
        with grpc.secure_channel(entry.token_endpoint, both) as channel:
            seen = {
                method: outcome(channel, method, streaming=streams) for method, streams in methods.items()
            }
        refused = {
            m: "permitted" if m in FREE or "ServerReflection" in m else "PERMISSION_DENIED" for m in methods
        }
        assert seen == {m: refused[m] if of_clients[m] else "UNIMPLEMENTED" for m in methods}


def tampered(token: str, **claims: Any) -> str:
    header, body, signature = token.split(".")
    content = json.loads(base64.urlsafe_b64decode(body + "=="))
    changed = base64.urlsafe_b64encode(json.dumps({**content, **claims}).encode()).rstrip(b"=").decode()
    return f"{header}.{changed}.{signature}"


def test_a_bad_token_is_a_typed_refusal(pool: RunningPool) -> None:
    """G8: unauthenticated, with its reason; a client certificate or another scheme is no token."""
    good = token_of(pool, "careful")["access_token"]
    entry = pool.connection.partitions[1]
    tls = grpc.ssl_channel_credentials(Path(pool.connection.client_ca_file).read_bytes())
    bad: list[tuple[tuple[str, str], ...]] = [
        (),
        (("authorization", good),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer x"),),
        (("authorization", f"Basic {good}"),),
        (("authorization", f"Bearer {good}"), ("authorization", f"Bearer {good}")),
        (("authorization", f"Bearer {good[:-2]}"),),
        (("authorization", f"Bearer {tampered(good, oid=GUIDS['Administrator'])}"),),
        (("authorization", f"Bearer {tampered(good, exp=4_000_000_000)}"),),
        (("authorization", "Bearer " + "x" * 13_000),),
    ]
    method = "/mhsm.keys.v1.KeyService/ListKeys"
    with grpc.secure_channel(entry.token_endpoint, tls) as channel:
        call = channel.unary_unary(method)
        for metadata in bad:
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=10, metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, metadata
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=10, metadata=(("authorization", f"bearer {good}"),))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED  # it is a good one, without a role
    certificate = pool.connection.clients["application"]
    with_certificate = grpc.ssl_channel_credentials(
        Path(pool.connection.client_ca_file).read_bytes(),
        Path(certificate.key_file).read_bytes(),
        Path(certificate.certificate_file).read_bytes(),
    )
    with grpc.secure_channel(entry.token_endpoint, with_certificate) as channel:
        assert outcome(channel, method, streaming=False) == "UNAUTHENTICATED"
    both = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(good))
    with grpc.secure_channel(entry.endpoint, both) as channel:
        assert outcome(channel, method, streaming=False) == "no connection"


def test_a_restarted_issuer_has_another_key(pool: RunningPool, administrator: Pool) -> None:
    """Rotation of the signing key: new tokens are accepted everywhere, old ones end."""
    old = token_of(pool, "rotated")
    given = administrator.create_role_assignment(old["oid"], GUIDS["Crypto User"])
    with with_token(pool, old["access_token"]) as client:
        list(client.list_keys())
    issuer = pool.connection.token_issuer
    assert issuer
    os.kill(issuer["process_id"], signal.SIGKILL)

    def asked_again() -> dict[str, Any] | None:
        try:
            return token_of(pool, "rotated")
        except tokens.NoIssuer:
            return None

    new = until(asked_again, 30, "a new token")
    for index in range(3):

        def accepted(token: str, index: int = index) -> bool:
            try:
                with with_token(pool, token, partition=index) as pinned:
                    list(pinned.list_keys())
            except Unauthenticated:
                return False
            return True

        until(lambda: accepted(new["access_token"]), 30, "a token of the new key")
        assert not accepted(old["access_token"])
    administrator.delete_role_assignment(given.name)


def test_the_issuer_gives_tokens_to_the_administrator_only(pool: RunningPool) -> None:
    issuer = pool.connection.token_issuer
    assert issuer
    someone = Clients(pool).files("someone")
    connection = pool.connection
    body = json.dumps({"name": "alice"}).encode()

    def status(path: str, identity: Any, content: bytes | None = None) -> int:
        context = ssl.create_default_context(cafile=connection.client_ca_file)
        if identity:
            context.load_cert_chain(identity.certificate_file, identity.key_file)
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
        try:
            with opener.open(issuer["issuer"] + path, content, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:
            return 0  # closed before all of a long request was sent

    administrator = connection.clients["administrator"]
    assert status("/token", administrator, body) == 200
    for identity in (None, connection.clients["application"], someone):
        assert status("/token", identity, body) == 403
    for junk in (b"x", b"{}", b"[]", b'{"name": 1}', b'{"name": "../x"}', b'{"name": "a", "groups": "b"}'):
        assert status("/token", administrator, junk) == 400
    assert status("/token", administrator, b"x" * 40_000) in {0, 400}
    assert status("/keys", None) == status("/.well-known/openid-configuration", None) == 200
    assert status("/elsewhere", None) == status("/elsewhere", administrator, body) == 404
    assert issuer["issuer"].startswith("https://127.0.0.1:")


def test_a_token_by_commands(pool: RunningPool, tmp_path: Path) -> None:
    """Get one, give its bearer a role, use it; without the role exit code 1."""
    at, file = ("--data-dir", str(pool.directory)), tmp_path / "token"
    made = json.loads(mhsm("token", "--as", "carol", "--output", str(file), *at, "--json").stdout)
    assert file.stat().st_mode & 0o077 == 0
    assert mhsm("token", "--as", "carol", "--output", str(file), *at, check=False).returncode == 1
    use = ("key", "create", "carols", "--type", "EC", "--curve", "P-256", "--token-file", str(file), *at)
    refused = mhsm(*use, check=False)
    assert (refused.returncode, "not authorized" in refused.stderr) == (1, True)
    mhsm("role", "assignment", "create", "--role", "Crypto User", "--assignee", made["principal_id"], *at)
    mhsm(*use)
    file.write_text("junk")
    assert mhsm(*use, check=False).returncode == 1


def test_a_group_s_guid_is_shown_where_its_role_is_suggested(pool: RunningPool, tmp_path: Path) -> None:
    """Its name is in no token: the example of docs/roles.md gives the role to the GUID."""
    at, file = ("--data-dir", str(pool.directory)), tmp_path / "token"
    shown = mhsm("token", "--as", "dora", "--group", "cli-signers", "--output", str(file), *at)
    found = re.search("group cli-signers ([0-9a-f-]{36})", shown.stdout)
    assert found
    assert f'--role "Crypto User" --assignee {found[1]} ' in shown.stderr
    mhsm("role", "assignment", "create", "--role", "Crypto User", "--assignee", found[1], *at)
    mhsm("key", "list", "--token-file", str(file), *at)


def test_the_asyncio_client_takes_a_token(pool: RunningPool, administrator: Pool) -> None:
    made = token_of(pool, "dora")
    administrator.create_role_assignment(made["oid"], GUIDS["Crypto Auditor"])

    async def story() -> None:
        async with AsyncPool(pool.connection, token=made["access_token"]) as client:
            assert isinstance([key async for key in client.list_keys()], list)
            with pytest.raises(MHSMError, match="not authorized"):
                await client.random_bytes(1)

    asyncio.run(story())
