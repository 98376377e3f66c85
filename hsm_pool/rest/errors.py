"""The one place where a typed error becomes an answer of Azure's shape (G8).

Source: error bodies of the Azure Key Vault REST API, ``{"error": {"code", "message"}}``. The HTTP
status is the one that stands in the audit record of the same call.
"""

from __future__ import annotations

from typing import Final

from hsm_pool.audit.record import HTTP_STATUS
from hsm_pool.errors import MHSMError

_CODE: Final = {
    "INVALID_ARGUMENT": "BadParameter",
    "UNAUTHENTICATED": "Unauthorized",
    "PERMISSION_DENIED": "AccessDenied",
    "NOT_FOUND": "NotFound",
    "ALREADY_EXISTS": "Conflict",
    "RESOURCE_EXHAUSTED": "Throttled",
    "UNAVAILABLE": "ServiceUnavailable",
    "INTERNAL": "InternalError",
}


def status_of(error: MHSMError) -> int:
    """Return the HTTP status of a typed error."""
    return HTTP_STATUS.get(error.code, 500)


def body_of(error: MHSMError, correlation_id: str) -> dict[str, object]:
    """Return the body that says a typed error.

    A state that does not allow the call has its reason as code, such as AlreadyActivated: Azure
    documents none.
    """
    own = error.reason.title().replace("_", "")
    return body(_CODE.get(error.code, own), f"{error.message} (Activity ID: {correlation_id})")


def body(code: str, message: str) -> dict[str, object]:
    """Return an error body."""
    return {"error": {"code": code, "message": message}}
