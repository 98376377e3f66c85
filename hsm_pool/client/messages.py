"""Messages of the contract from what callers pass: what does not fit is refused by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from google.protobuf.message import Message

from hsm_pool.errors import InvalidField

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=Message)


def message(kind: type[M], **fields: Any) -> M:
    """Return a message with these fields; what is None stays absent.

    Raises:
        InvalidField: A value has another type than the field, or is out of its range. The message has
            the field's name and never the value, which may be secret (G3).
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        # protobuf's own text does not say which field it means.
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError):
                text = f"{name} has another type than {kind.DESCRIPTOR.name} takes, or is out of range"
                raise InvalidField(text, field=name) from None
        raise InvalidField(f"a field of {kind.DESCRIPTOR.name} has another type than it takes") from None


def named_fields(build: Callable[P, R]) -> Callable[P, R]:
    """Let a function refuse a keyword that it does not have as what it is for callers: a field.

    The clients pass their keywords on, so Python's own TypeError would name a function of this library.

    Raises:
        InvalidField: There is no such field; the text has those that there are.
    """
    known = inspect.signature(build).parameters

    @functools.wraps(build)
    def checked(*arguments: P.args, **fields: P.kwargs) -> R:
        for name in fields:
            if name not in known:
                text = f"{build.__name__} has no field {name}; it has {', '.join(known)}"
                raise InvalidField(text, field=name)
        return build(*arguments, **fields)

    return checked
