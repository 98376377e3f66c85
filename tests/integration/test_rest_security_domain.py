"""The security domain over REST on real pools: lost answers, deaths, refusals (G1, G4, G7, G8)."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as fixed_seed
from hypothesis import strategies as st

from hsm_pool import limits
from hsm_pool.audit import query
from hsm_pool.errors import NotActivated
from mhsm.keys.v1 import keys_pb2
from tests.rest_client import (
    DOWNLOAD,
    IN_PROGRESS,
    SUCCESS,
    UPLOAD,
    Reply,
    RestClient,
    download_body,
    send,
    upload_body,
)
from tests.running_pool import RunningPool, TestOfficer, make_officers, until

pytestmark = [pytest.mark.pool, pytest.mark.slow]

ROUTES = (
    ("POST", DOWNLOAD),
    ("GET", f"{DOWNLOAD}/pending"),
    ("GET", UPLOAD),
    ("POST", UPLOAD),
    ("GET", f"{UPLOAD}/pending"),
)
EC: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
INTERNALS = ("Traceback", "hsm_pool", "Error(", ".py", "cheroot", "werkzeug", "object has no", "expected")


@pytest.fixture(scope="module")
def new_pool(make_pool: Callable[..., RunningPool]) -> Iterator[RunningPool]:
    """An attended pool without a security domain; the tests of this module use it up in their order."""
    pool = make_pool(attended=True)
    yield pool
    pool.down()


@pytest.fixture(scope="module")
def others() -> list[TestOfficer]:
    """Three other officers."""
    return make_officers(3)


def port_of(pool: RunningPool) -> int:
    return RestClient(pool).port


def refused(reply: Reply, status: int, code: str) -> None:
    """Check a refusal: Azure's shape, the status, and no word from inside."""
    assert (reply.status, reply.code) == (status, code), reply.value
    assert set(reply.value) == {"error"}
    assert set(reply.value["error"]) == {"code", "message"}
    assert not any(word in reply.value["error"]["message"] for word in INTERNALS), reply.value


def test_whoever_presents_no_token_is_told_where_to_get_one(new_pool: RunningPool) -> None:
    """Any method, path and body: 401 with the challenge of Azure's clients, who send no body at first."""
    connection, port = new_pool.connection, port_of(new_pool)
    assert connection.token_issuer
    authority = connection.token_issuer["issuer"]
    for method, path in (*ROUTES, ("GET", "/nothing"), ("PUT", "/"), ("DELETE", DOWNLOAD)):
        reply = send(port, connection.client_ca_file, method, path)
        refused(reply, 401, "Unauthorized")
        challenge = reply.headers["www-authenticate"]
        assert challenge.startswith(f'Bearer authorization="{authority}/')
        assert challenge.endswith('resource="https://managedhsm.azure.net"')
    for authorization in ("", "Bearer", "Bearer x", "Basic eDp5"):
        headers = {"Authorization": authorization}
        reply = send(port, connection.client_ca_file, "GET", DOWNLOAD, None, headers)
        refused(reply, 401, "Unauthorized")
        assert "www-authenticate" in reply.headers


def test_a_token_without_a_role_opens_no_route(new_pool: RunningPool) -> None:
    """A new pool has no roles yet: only its initial administrators hold ceremonies."""
    stranger = RestClient(new_pool, name="stranger")
    for method, path in ROUTES:
        refused(stranger.call(method, path, {} if method == "POST" else None), 403, "AccessDenied")


def test_what_is_wrong_is_refused_and_changes_nothing(
    new_pool: RunningPool, officers: list[TestOfficer]
) -> None:
    """G8: versions, paths, methods, bodies and states."""
    client, body = RestClient(new_pool), download_body(officers, 2)
    for version in ("", "x", "7", "2025", "7.5;", "%00", "7.5%20"):
        refused(client.call("POST", DOWNLOAD, body, version=version), 400, "BadParameter")
    refused(client.call("GET", "/securitydomain"), 404, "NotFound")
    refused(client.call("GET", "/keys"), 404, "NotFound")
    refused(client.call("GET", DOWNLOAD), 405, "MethodNotAllowed")
    for octets in (b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000):
        refused(client.call("POST", DOWNLOAD, octets), 400, "BadParameter")
        refused(client.call("POST", UPLOAD, octets), 400, "BadParameter")
    der = body["certificates"][0]["x5c"][0]
    for wrong in (
        {},
        {"certificates": []},
        {"certificates": {}},
        {"certificates": [1, 2, 3], "required": 2},
        {**body, "required": 1},
        {**body, "required": 4},
        {**body, "required": "2"},
        {**body, "required": True},
        {**body, "required": 10**30},
        {**body, "certificates": body["certificates"][:2]},
        {**body, "certificates": [body["certificates"][0]] * 3},
        {**body, "certificates": body["certificates"] * 4},
        {**body, "certificates": [{"x5c": [der[:-4]]}, *body["certificates"][1:]]},
        {**body, "certificates": [{"x5c": ["=" * 9]}, *body["certificates"][1:]]},
        {**body, "certificates": [{"x5c": [der], "x5t#S256": "x"}, *body["certificates"][1:]]},
    ):
        refused(client.call("POST", DOWNLOAD, wrong), 400, "BadParameter")
    refused(client.call("POST", DOWNLOAD, body, Host="a b"), 400, "BadParameter")
    large = {"Content-Length": str(limits.REST_BODY_BYTES_MAX + 1)}  # refused before it is sent
    refused(client.call("POST", DOWNLOAD, **large), 413, "RequestEntityTooLarge")
    refused(client.call("GET", f"{DOWNLOAD}/pending"), 400, "NotActivated")
    refused(client.call("GET", f"{DOWNLOAD}/pending?generation=x"), 400, "BadParameter")
    refused(client.call("GET", f"{UPLOAD}/pending"), 400, "CeremonyState")
    refused(client.call("POST", UPLOAD, {"value": "{}"}), 400, "CeremonyState")
    assert new_pool.states() == ["PROVISIONED"] * 3


def test_what_is_not_http_ends_its_own_connection_only(new_pool: RunningPool) -> None:
    """G8: junk, plain HTTP, half a request and a silent client; others are served meanwhile."""
    connection, port = new_pool.connection, port_of(new_pool)
    context = ssl.create_default_context(cafile=connection.client_ca_file)
    silent = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(3)]
    try:
        for junk in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as plain:
                plain.sendall(junk)
                try:
                    assert b"200" not in plain.recv(4096)
                except ConnectionResetError:
                    continue
        for junk in (
            b"\x00\x01\x02\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET //[ HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nx: " + b"y" * 40_000 + b"\r\n\r\n",
            b"GET /" + b"z" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        ):
            with (
                socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
                context.wrap_socket(raw, server_hostname="localhost") as tls,
            ):
                answer = b""
                try:
                    tls.sendall(junk)
                    while chunk := tls.recv(65536):
                        answer += chunk
                except (ConnectionError, ssl.SSLError):
                    pass  # closed before all of it was read
                status = answer.split(b" ")[1:2]
                if len(junk) > limits.REST_HEADER_BYTES_MAX:
                    # What was not read of it may have taken the answer away with it (TCP).
                    assert status in ([], [b"413"], [b"414"]), answer[:200]
                    continue
                assert status and (status[0] == b"505" or status[0][:1] == b"4"), (junk[:40], answer[:200])
                assert not any(word.encode() in answer for word in INTERNALS), answer
        refused(send(port, connection.client_ca_file, "GET", "/"), 401, "Unauthorized")
    finally:
        for client in silent:
            client.close()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_NAMES = st.sampled_from(("certificates", "required", "value", "x5c", "x5t#S256", "kty"))
_BODIES = st.binary(max_size=200) | (
    _JSON
    | st.dictionaries(_NAMES, _JSON, max_size=4)
    | st.fixed_dictionaries(
        {
            "certificates": st.lists(
                st.dictionaries(_NAMES, _JSON | st.lists(st.text(), max_size=2)), max_size=11
            ),
            "required": st.integers(-1, 11) | _JSON,
        }
    )
).map(lambda value: json.dumps(value).encode())


def test_no_body_is_an_accident(new_pool: RunningPool, seed: int) -> None:
    """G8: whatever the body, a refusal of Azure's shape; never a 5xx, an open end, a text of Python."""
    client = RestClient(new_pool)
    context = ssl.create_default_context(cafile=new_pool.connection.client_ca_file)
    connection = http.client.HTTPSConnection("localhost", client.port, timeout=60, context=context)

    @fixed_seed(seed)
    @settings(max_examples=150, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from((DOWNLOAD, UPLOAD)), _BODIES)
    def fuzz(path: str, body: bytes) -> None:
        connection.request("POST", f"{path}?api-version=7.5", body, client.authorization)
        answer = connection.getresponse()
        names = {name.lower(): value for name, value in answer.getheaders()}
        reply = Reply(answer.status, names, json.loads(answer.read()))
        assert reply.status == 400, (body, reply)
        assert not any(word in json.dumps(reply.value) for word in INTERNALS), (body, reply)

    try:
        fuzz()
    finally:
        connection.close()
    assert new_pool.states() == ["PROVISIONED"] * 3


def accepted(client: RestClient, body: dict[str, Any]) -> Reply:
    """Repeat a download as clients do, until the partition has taken the pool's keys."""

    def once() -> Reply | None:
        reply = client.call("POST", DOWNLOAD, body)
        if reply.status == 503:
            assert reply.headers["retry-after"] == "1"
            return None
        assert reply.status == 202, reply.value
        return reply

    return until(once, 30, "the answer of a download")


def test_a_download_may_be_repeated_and_replaced_until_its_first_poll(
    new_pool: RunningPool, officers: list[TestOfficer], others: list[TestOfficer]
) -> None:
    """G1, G4: a lost answer loses nothing; after the first poll nothing replaces the domain that is in force.

    The partition that made the last one is killed before the poll, which goes to another one.
    """
    client = RestClient(new_pool)
    lost, wanted = download_body(officers, 2), download_body(others, 3)
    made = client.call("POST", DOWNLOAD, lost)
    again = accepted(client.at(1), lost)
    assert (made.status, again.status) == (202, 202)
    assert made.value == again.value, "the same request, at any partition: the same file"
    new_pool.await_states(["PROVISIONED"] * 3)  # the third partition may still be taking the keys
    with new_pool.client() as user, pytest.raises(Exception, match="not active"):
        user.create_key("early", **EC)
    replaced = accepted(client.at(2), wanted)
    assert replaced.value != made.value
    new_pool.signal(2, "partition", signal.SIGKILL)
    refused(client.at(1).follow(made), 400, "CeremonyState")
    assert new_pool.states()[:2] == ["PROVISIONED"] * 2, "the poll of a replaced download activates nothing"
    refused(client.at(1).call("GET", UPLOAD), 400, "CeremonyState")
    with new_pool.client("administrator") as administrator:
        for begin in (administrator.verify_security_domain, administrator.rotate_key_encryption_key):
            with pytest.raises(NotActivated):
                begin(partition=0)
    with ThreadPoolExecutor(1) as threads:
        # The poll comes while another partition makes a successor: whoever is first, the other is refused.
        late = threads.submit(client.at(1).call, "POST", DOWNLOAD, download_body(others, 2))
        child = until(lambda: new_pool.ceremony_child(1), 30, "the child that makes the successor")
        os.kill(child, signal.SIGSTOP)
        first = client.at(0).follow(replaced)
        os.kill(child, signal.SIGCONT)
    assert (first.status, first.value["status"]) == (200, IN_PROGRESS)
    refused(late.result(), 400, "CeremonyState")
    assert first.headers["retry-after"] == "1"
    new_pool.await_states(["SERVING"] * 3)
    for index in range(3):
        polled = client.at(index).follow(replaced)
        assert (polled.status, polled.value["status"]) == (200, SUCCESS)
        for body in (lost, wanted, download_body(others, 2)):
            refused(client.at(index).call("POST", DOWNLOAD, body), 400, "AlreadyActivated")
    with new_pool.client() as user:
        user.create_key("kept", **EC)

    new_pool.kill_everything()
    new_pool.await_states(["LOCKED"] * 3)
    key = client.call("GET", UPLOAD)
    assert key.value == client.call("GET", UPLOAD).value, "a GET may be repeated"
    assert key.value["key_format"] == "jwk"
    refused(client.call("POST", UPLOAD, upload_body(key, made.value["value"], officers)), 400, "BadParameter")
    refused(client.at(1).call("POST", UPLOAD, {"value": "{}"}), 400, "CeremonyState")
    assert client.call("GET", f"{UPLOAD}/pending").value["status"] == IN_PROGRESS
    uploaded = client.call("POST", UPLOAD, upload_body(key, replaced.value["value"], others))
    assert (uploaded.status, uploaded.value["status"]) == (202, IN_PROGRESS)
    new_pool.await_states(["SERVING"] * 3)
    assert client.follow(uploaded).value["status"] == SUCCESS
    with new_pool.client() as user:
        user.sign("keys/kept", "ES256", bytes(32))


def test_the_routes_are_on_record_as_the_calls_whose_front_they_are(new_pool: RunningPool) -> None:
    """G7: names of Azure, the bearer's id, the status that he got; the refused ones, too."""
    seen = set()
    for index in range(3):
        for _, line in query.records_from(new_pool.directory / f"nodes/{index}/audit", 0):
            entry = json.loads(line)
            if entry["identity"].startswith("token/"):
                assert entry["callerIpAddress"] == "127.0.0.1"
                seen.add((entry["operationName"], entry["resultType"], entry["httpStatusCode"]))
    assert {
        ("SecurityDomainBackup", "Success", 200),
        ("SecurityDomainBackup", "Failed", 400),
        ("SecurityDomainBackup", "Failed", 403),
        ("SecurityDomainBackupStatusGet", "Success", 200),
        ("InitRecovery", "Success", 200),
        ("UploadRestoreBlob", "Success", 200),
        ("UploadRestoreBlob", "Failed", 400),
    } <= seen


def test_a_pool_that_dies_before_the_first_poll_is_opened_by_its_officers(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], others: list[TestOfficer]
) -> None:
    """G1, G4: all partitions of an attended pool die; none hands out a file that it cannot vouch for.

    The one that was downloaded opens the pool.

    Then the whole pool is lost, and a new one takes its security domain, over REST alone.
    """
    pool = make_pool(attended=True)
    client, body = RestClient(pool), download_body(officers, 2)
    with pool.paused(1, "partition"), pool.paused(2, "partition"):
        # One partition alone holds the keys: if it died now they would be gone.
        alone = client.call("POST", DOWNLOAD, body)
        refused(alone, 503, "ServiceUnavailable")
        assert alone.headers["retry-after"] == "1"
    made = client.call("POST", DOWNLOAD, body)
    assert made.status == 202
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    for again in (body, download_body(others, 2)):
        # What the store says is no proof: whoever holds it could have his own file handed out (G4).
        refused(client.call("POST", DOWNLOAD, again), 400, "PoolLocked")
    refused(client.follow(made), 400, "PoolLocked")
    key = client.call("GET", UPLOAD)
    assert client.call("POST", UPLOAD, upload_body(key, made.value["value"], officers[1:])).status == 202
    pool.await_states(["PROVISIONED"] * 3)
    assert client.at(1).follow(made).value["status"] == IN_PROGRESS
    pool.await_states(["SERVING"] * 3)
    pool.down()

    found = make_pool(attended=True)
    client = RestClient(found, partition=1)
    key = client.call("GET", UPLOAD)
    refused(client.call("POST", DOWNLOAD, body), 400, "CeremonyState")
    uploaded = client.call("POST", UPLOAD, upload_body(key, made.value["value"], officers[:2]))
    assert uploaded.status == 202
    found.await_states(["SERVING"] * 3)
    assert client.follow(uploaded).value["status"] == SUCCESS
    refused(client.call("GET", UPLOAD), 400, "CeremonyState")
    found.down()


def test_the_front_has_the_certificate_of_the_client_plane(new_pool: RunningPool, tmp_path: Path) -> None:
    """Its clients need the pool's authority and no other; without it they refuse."""
    with pytest.raises(ssl.SSLCertVerificationError):
        send(port_of(new_pool), new_pool.connection.fabric_controller["ca_file"], "GET", "/")


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\n{}\r\n0\r\n\r\n",
        b"2\r\n{}XX0\r\n\r\n",
        # Refused by the second number: nothing is under way that could break the connection first.
        b"%x\r\n" % 600_000 + b" " * 600_000 + b"\r\n" + b"%x\r\n" % 600_000,
    ],
    ids=["no-number", "no-end", "too-large"],
)
def test_chunks_that_are_none_are_refused(new_pool: RunningPool, chunks: bytes) -> None:
    """G8: a typed refusal, and the rest of the body is not read as another request."""
    client = RestClient(new_pool)
    head = f"POST {DOWNLOAD}?api-version=7.5 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    token = "".join(f"{name}: {value}\r\n" for name, value in client.authorization.items())
    context = ssl.create_default_context(cafile=new_pool.connection.client_ca_file)
    with (
        socket.create_connection(("127.0.0.1", client.port), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        answer = b""
        try:
            tls.sendall((head + token + "\r\n").encode() + chunks)
            while octets := tls.recv(65536):
                answer += octets
        except (ConnectionError, ssl.SSLError):
            pass  # closed before all of it was read
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert answer.split(b" ")[1] == b"400", answer
    assert b"connection: close" in answer.lower()
