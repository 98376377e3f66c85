"""One request and its answer, as a route sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cheroot.errors import MaxSizeExceeded
from werkzeug.wrappers import Request

from hsm_pool import limits
from hsm_pool.errors import InvalidField, PayloadTooLarge

_API_VERSION: Final = re.compile(r"7\.\d(-preview(\.\d)?)?|20\d\d-\d\d-\d\d(-preview)?")
"""Every version that clients of a Managed HSM send; the routes here are the same in all of them."""
_HOST: Final = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:\d{1,5})?")
_DIGITS_MAX: Final = 9


@dataclass(frozen=True, slots=True)
class Answer:
    """What a route answers, as JSON."""

    value: Mapping[str, Any]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Call:
    """One request.

    Args:
        request: As it came.
        until: When to answer, on the boot clock.

    Raises:
        InvalidField: The query's api-version is missing, or no version of this API.
    """

    def __init__(self, request: Request, until: float) -> None:
        self._request = request
        self.until = until
        self.api_version = request.args.get("api-version", "")
        if not _API_VERSION.fullmatch(self.api_version):
            raise InvalidField("api-version is missing, or no version of this service", field="api-version")

    def number(self, name: str) -> int | None:
        """Return a whole number of the query, None when it is not there.

        Raises:
            InvalidField: It is none.
        """
        text = self._request.args.get(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
            raise InvalidField(f"{name} is no whole number", field=name)
        return int(text)

    def url(self, path: str, **query: int) -> str:
        """Return the absolute URL of a path, under the name that the client has for this server.

        Raises:
            InvalidField: That name is none.
        """
        host = self._request.headers.get("Host", "")
        if not _HOST.fullmatch(host):
            raise InvalidField("the header Host is no name of a server", field="Host")
        more = "".join(f"&{name}={value}" for name, value in query.items())
        return f"https://{host}{path}?api-version={self.api_version}{more}"

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the request.

        Raises:
            PayloadTooLarge: It is too large.
            InvalidField: It is none.
        """
        try:
            octets = self._request.stream.read(limits.REST_BODY_BYTES_MAX + 1)
        except (ValueError, TimeoutError):  # chunks that are none, or that do not come in time
            raise InvalidField("the body of the request cannot be read", field="") from None
        except (MaxSizeExceeded, OSError):  # the latter is what cheroot says of chunks
            raise PayloadTooLarge("the body of the request is too large") from None
        if len(octets) > limits.REST_BODY_BYTES_MAX:
            raise PayloadTooLarge("the body of the request is too large")
        try:
            value = json.loads(octets)
        except (ValueError, RecursionError):
            raise InvalidField("the body of the request is not JSON", field="") from None
        if not isinstance(value, dict):
            raise InvalidField("the body of the request is not a JSON object", field="")
        return value


@dataclass(frozen=True, slots=True)
class Route:
    """One route: HTTP method, path as werkzeug writes it, and the gRPC method whose front it is."""

    method: str
    path: str
    front_of: str
    handle: Callable[[Call], Answer]
