"""Answers that their callers have not taken yet: they lie in the memory of the server.

Admission counts a call until it is answered. What gRPC holds then, until the client reads it, is
counted here, and who leaves too much of it unread is refused until he has read or gone.
"""

from __future__ import annotations

from typing import Any

import grpc

from hsm_pool import limits
from hsm_pool.errors import Overloaded
from hsm_pool.net.call_watch import CallWatch
from hsm_pool.net.shares import Shares


class UnreadAnswers:
    """Large answers of one listener. Thread-safe. :meth:`close` ends its thread."""

    def __init__(
        self,
        bytes_max: int = limits.UNREAD_BYTES_MAX,
        bytes_of_principal_max: int = limits.UNREAD_BYTES_MAX // 2,
        seconds_max: float = limits.UNREAD_SECONDS_MAX,
    ) -> None:
        self._shares = Shares(bytes_max, bytes_of_principal_max)
        self._watch = CallWatch(seconds_max)
        self.close = self._watch.close

    def check(self, principal: str) -> None:
        """Let a call begin.

        Raises:
            Overloaded: He, or all together, have left too much unread.
        """
        if not self._shares.has_room(principal):
            raise Overloaded("too many answers were not read yet").retry_after(limits.RETRY_SECONDS_MAX)

    def hold(self, principal: str, answer: Any, context: grpc.ServicerContext) -> None:
        """Count an answer that is about to leave, until its call has ended; end that in time."""
        octets = answer.ByteSize()
        if octets < limits.UNREAD_BYTES_COUNTED:
            return
        self._shares.add(principal, octets)
        watched = self._watch.begin(context)

        def release() -> None:
            self._watch.end(watched)
            self._shares.give_back(principal, octets)

        if not context.add_callback(release):
            release()
