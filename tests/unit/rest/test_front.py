"""What every route passes, with real tokens and a real audit log; the routes are the test's own (G7, G8)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from werkzeug.test import Client

from hsm_pool.audit import query
from hsm_pool.audit.log import AuditLog
from hsm_pool.audit.record import HTTP_STATUS
from hsm_pool.errors import BY_REASON, InvalidField, MHSMError
from hsm_pool.net.identities import TokenIdentities
from hsm_pool.net.interceptors import Passage
from hsm_pool.net.role_gate import RoleGate
from hsm_pool.rest import errors
from hsm_pool.rest.call import Answer, Call, Route
from hsm_pool.rest.front import Front
from hsm_pool.settings import Identity, TokenIssuerSettings, TokenSettings
from hsm_pool.tokens.issuer import Issuer
from hsm_pool.tokens.issuer_keys import IssuerKeys
from hsm_pool.tokens.verification import TokenVerifier

FREE = "/mhsm.pool.v1.PoolService/GetEvidence"
"""A method that needs no role, so that no state is asked."""
CHALLENGE = 'Bearer authorization="https://issuer/tenant", resource="audience"'
SECRET = "the value that was quoted"


def _raise(error: Exception) -> Callable[[Call], Answer]:
    def handle(_: Call) -> Answer:
        raise error

    return handle


ROUTES = (
    Route("GET", "/echo", FREE, lambda call: Answer({"url": call.url("/x", n=1), "n": call.number("n")})),
    Route("POST", "/echo", FREE, lambda call: Answer(call.body(), 202, {"Retry-After": "1"})),
    Route("GET", "/typed", FREE, _raise(InvalidField("the field is wrong", field="f"))),
    Route("GET", "/untyped", FREE, _raise(ValueError(SECRET))),
)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    made = AuditLog(tmp_path / "audit", "spiffe://pool/partition/0", 0, "stop", 64 * 1024 * 1024)
    yield made
    made.close()


@pytest.fixture
def client(tmp_path: Path, log: AuditLog) -> Client:
    identity = Identity("/certificate", "/key", "/ca")
    issuer = Issuer(TokenIssuerSettings("0" * 32, "127.0.0.1:1", "https://issuer", "audience", identity))
    (tmp_path / "keys.json").write_text(json.dumps(issuer.key_set()))
    settings = TokenSettings("127.0.0.1:2", "https://issuer", "audience", str(tmp_path / "keys.json"), "")
    identities = TokenIdentities(TokenVerifier(settings, IssuerKeys(settings.keys, "")))
    passage = Passage(0, lambda error: error, cast("RoleGate", None), log)
    made = Client(Front(passage, identities, CHALLENGE, ROUTES))
    made.token = issuer.token("alice", [])["access_token"]  # type: ignore[attr-defined]
    return made


def call(client: Client, method: str, path: str, **options: Any) -> Any:
    headers = {"Authorization": f"Bearer {client.token}", "Host": "localhost:8443"}  # type: ignore[attr-defined]
    return client.open(path, method=method, headers=headers | options.pop("headers", {}), **options)


def recorded(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in query.records_from(tmp_path / "audit", 0)]


def test_a_route_sees_version_query_body_and_host_as_its_client_does(client: Client) -> None:
    """Doubled and trailing slashes, encoded names of the query (as JavaScript has them), the own port."""
    found = call(client, "GET", "/echo//?api%2Dversion=2025-07-01&n=7")
    assert found.json == {"url": "https://localhost:8443/x?api-version=2025-07-01&n=1", "n": 7}
    assert found.headers["Content-Type"] == "application/json; charset=utf-8"
    assert found.headers["Cache-Control"] == "no-cache"
    posted = call(client, "POST", "/echo?api-version=7.6-preview.2", json={"a": [1]})
    assert (posted.status_code, posted.json, posted.headers["Retry-After"]) == (202, {"a": [1]}, "1")
    for path, headers in (
        ("/echo", {}),
        ("/echo?api-version=8", {}),
        ("/echo?api-version=7.5%0d%0ax: y", {}),
        ("/echo?api-version=7.5&n=-1", {}),
        ("/echo?api-version=7.5", {"Host": "a/b"}),
    ):
        refused = call(client, "GET", path, headers=headers)
        assert (refused.status_code, refused.json["error"]["code"]) == (400, "BadParameter")


def test_a_refusal_and_an_answer_are_on_record_with_the_id_that_the_client_sees(
    client: Client, tmp_path: Path
) -> None:
    """G7: x-ms-request-id is the record's correlation id."""
    for path, status in (("/echo", 200), ("/typed", 400)):
        answer = call(client, "GET", f"{path}?api-version=7.5")
        assert answer.status_code == status
        last = recorded(tmp_path)[-1]
        assert (last["correlationId"], last["httpStatusCode"]) == (answer.headers["x-ms-request-id"], status)
        assert last["identity"].startswith("token/")


def test_an_unhandled_exception_shows_a_correlation_id_only(client: Client, tmp_path: Path) -> None:
    """G8: nothing of its text, to the client or in the log."""
    answer = call(client, "GET", "/untyped?api-version=7.5")
    assert (answer.status_code, answer.json["error"]["code"]) == (500, "InternalError")
    assert SECRET not in answer.text
    assert answer.headers["x-ms-request-id"] in answer.text
    assert SECRET not in json.dumps(recorded(tmp_path))


def test_without_a_token_nothing_is_looked_at(client: Client, tmp_path: Path) -> None:
    """The challenge comes first, for paths that do not exist, too; it leaves no record."""
    for method, path in (("GET", "/untyped"), ("POST", "/nothing"), ("GET", "/echo?api-version=")):
        answer = client.open(path, method=method)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, CHALLENGE)
    assert [entry["operationName"] for entry in recorded(tmp_path)] == ["AuditLogCreate"]
    assert call(client, "GET", "/nothing").status_code == 404
    assert call(client, "DELETE", "/echo").status_code == 405


@pytest.mark.parametrize("kind", BY_REASON.values(), ids=lambda kind: str(kind.reason))
def test_every_typed_error_has_an_answer(kind: type[MHSMError]) -> None:
    """G8: a status that the audit record has, too, and a code in Azure's spelling."""
    error = kind.__new__(kind)
    MHSMError.__init__(error, "said")
    body: Any = errors.body_of(error, "0" * 32)
    assert body == {"error": {"code": body["error"]["code"], "message": f"said (Activity ID: {'0' * 32})"}}
    assert body["error"]["code"].isalnum()
    assert errors.status_of(error) == HTTP_STATUS.get(error.code, 500)


def test_a_get_that_may_change_something_has_no_head(client: Client) -> None:
    """G4: nobody confirms a download by asking for its headers alone."""
    assert call(client, "GET", "/echo?api-version=7.5").status_code == 200
    assert call(client, "HEAD", "/echo?api-version=7.5").status_code == 405
