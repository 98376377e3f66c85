"""Length-prefixed protobuf messages over a pipe, bounded."""

from __future__ import annotations

import struct
from typing import IO, TypeVar

from google.protobuf.message import Message

FRAME_BYTES_MAX = 1024 * 1024

M = TypeVar("M", bound=Message)


def write_frame(stream: IO[bytes], message: Message) -> None:
    """Write one message and flush it.

    Raises:
        OSError: The other side is gone.
    """
    body = message.SerializeToString()
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def read_frame(stream: IO[bytes], kind: type[M]) -> M | None:
    """Read one message; None at the end of the stream.

    Raises:
        ValueError: The frame is too large or cut short.
    """
    prefix = stream.read(4)
    if not prefix:
        return None
    if len(prefix) < 4:
        raise ValueError("a frame is cut short")
    (length,) = struct.unpack(">I", prefix)
    if length > FRAME_BYTES_MAX:
        raise ValueError("a frame is too large")
    body = stream.read(length)
    if len(body) < length:
        raise ValueError("a frame is cut short")
    message = kind()
    message.ParseFromString(body)
    return message
