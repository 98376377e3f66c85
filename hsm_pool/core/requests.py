"""Answered requests: a repeat of a request id gets the first answer again."""

from __future__ import annotations

from hsm_pool import limits
from hsm_pool.core.model import Record, RecordName, RequestRecord, request_name
from hsm_pool.core.state import Changes, View
from hsm_pool.errors import RequestIdReused


def answered_before(view: View, request_key: bytes, request_digest: bytes) -> RequestRecord | None:
    """Return the first answer to a request id, if there is one.

    Raises:
        RequestIdReused: The id was used for another request.
    """
    record = view.get(request_name(request_key))
    if not isinstance(record, RequestRecord):
        return None
    if record.request_digest != request_digest:
        raise RequestIdReused("request_id was used before for another request")
    return record


def remember(view: View, record: RequestRecord) -> Changes:
    """Return the changes that keep an answer and forget up to two old ones."""
    changes: dict[RecordName, Record | None] = {request_name(record.request_key): record}
    surplus = view.request_count() >= limits.REQUESTS_MAX
    for old in view.oldest_requests(2):
        if surplus or old.answered_ms + limits.REQUEST_RETENTION_MS < record.answered_ms:
            changes[request_name(old.request_key)] = None
    return changes
