"""Answered requests: a repeat of a request id gets the first answer again."""

from __future__ import annotations

from hsm_pool import limits
from hsm_pool.core.model import Record, RecordName, RequestRecord, request_name, stored_bytes
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


_AGED_MAX = 2
"""Answers whose time is over that one mutation forgets: with each new one there are fewer of them."""


def remember(view: View, record: RequestRecord, room: int) -> Changes:
    """Return the changes that keep an answer and forget old ones, the oldest first.

    What is kept is bounded by time, number and bytes. All three are decided on the chain, so all
    partitions keep the same answers.

    Args:
        view: With the changes of the mutation itself.
        record: The new answer.
        room: How many may be forgotten: each is a deletion of the same transaction. Where a restored key
            leaves no room for enough of them, later mutations forget the rest: until then what is kept
            may be a few times its bound.
    """
    changes: dict[RecordName, Record | None] = {request_name(record.request_key): record}
    surplus = view.request_count() + 1 - limits.REQUESTS_MAX
    surplus_bytes = view.bytes_held("request") + stored_bytes(record) - limits.REQUESTS_BYTES_MAX
    for forgotten, old in enumerate(view.oldest_requests(room if surplus_bytes > 0 else _AGED_MAX)):
        aged = old.answered_ms + limits.REQUEST_RETENTION_MS < record.answered_ms
        if surplus <= 0 and surplus_bytes <= 0 and not (aged and forgotten < _AGED_MAX):
            break
        changes[request_name(old.request_key)] = None
        surplus -= 1
        surplus_bytes -= stored_bytes(old)
    return changes
