"""What every route passes: the bearer's token, the roles, the audit record, and errors as answers.

A WSGI application (PEP 3333). The calls are those of gRPC: each route names the method whose front
it is, and has that method's permissions and record.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from werkzeug.exceptions import MethodNotAllowed, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Request, Response

from hsm_pool import limits
from hsm_pool.audit import record
from hsm_pool.errors import MHSMError, Unauthenticated
from hsm_pool.net.identities import TokenIdentities
from hsm_pool.net.interceptors import Passage
from hsm_pool.rest import errors
from hsm_pool.rest.call import Call, Route
from hsm_pool.store.replica import boot_time

_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Strict-Transport-Security": "max-age=31536000; includeSubDomains",
    "X-Content-Type-Options": "nosniff",
}


class Front:
    """The WSGI application of one partition.

    Args:
        passage: Permissions and records.
        identities: Who presents which token.
        challenge: Value of WWW-Authenticate for whoever presents none.
        routes: All routes.
    """

    def __init__(
        self, passage: Passage, identities: TokenIdentities, challenge: str, routes: Sequence[Route]
    ) -> None:
        self._passage = passage
        self._identities = identities
        self._challenge = challenge
        self._map = Map([_rule(route) for route in routes], merge_slashes=False)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
        return self._answer(Request(environ))(environ, start_response)

    def _answer(self, request: Request) -> Response:
        method, authorization = "", request.headers.get("Authorization")
        # Before path and body: whoever presents no token is told where to get one.
        if authorization is None:
            return self._refusal(Unauthenticated("a bearer token is needed"))
        try:
            caller = self._identities.bearer(authorization)
            try:
                route = self._route(request)
            except NotFound:
                return _plain(404, "NotFound", "this service has no such path")
            except MethodNotAllowed:
                return _plain(405, "MethodNotAllowed", "this path does not take this method")
            method, until = route.front_of, boot_time() + limits.MUTATION_SECONDS_MAX
            self._passage.enter(caller, request.remote_addr or "", method, until)
            answered = route.handle(Call(request, until))
            self._passage.succeed()
            return _response(answered.value, answered.status, answered.headers, _correlation_id())
        except Exception as error:  # noqa: BLE001 - the one place where errors become answers
            return self._refusal(self._passage.fail(error, method))
        finally:
            record.begin(None)

    def _route(self, request: Request) -> Route:
        # Clients send doubled and trailing slashes; a redirect would cost them their token.
        path = "/" + "/".join(part for part in request.path.split("/") if part)
        route, _ = self._map.bind("").match(path, method=request.method)
        assert isinstance(route, Route)
        return route

    def _refusal(self, shown: MHSMError) -> Response:
        correlation_id, status = _correlation_id(), errors.status_of(shown)
        headers: dict[str, str] = {}
        if isinstance(shown, Unauthenticated):
            headers["WWW-Authenticate"] = self._challenge
        if status in {429, 503}:
            headers["Retry-After"] = "1"
        return _response(errors.body_of(shown, correlation_id), status, headers, correlation_id)


def _rule(route: Route) -> Rule:
    rule = Rule(route.path, methods=[route.method], endpoint=route)
    # werkzeug adds HEAD to every GET; here a GET may change something.
    rule.methods = {route.method}
    return rule


def _plain(status: int, code: str, message: str) -> Response:
    return _response(errors.body(code, message), status, {}, _correlation_id())


def _response(
    value: Mapping[str, Any], status: int, headers: Mapping[str, str], correlation_id: str
) -> Response:
    content = json.dumps(value, separators=(",", ":"))
    response = Response(content, status, content_type="application/json; charset=utf-8")
    response.headers.update({**_HEADERS, "x-ms-request-id": correlation_id, **headers})
    return response


def _correlation_id() -> str:
    operation = record.current()
    return operation.correlation_id if operation else uuid.uuid4().hex
