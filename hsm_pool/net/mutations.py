"""Mutations of the client plane: each has a request id, whose repeat gets the first answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from hsm_pool.core import requests, roles
from hsm_pool.core.commands import Command, DeletedKeyReply, Reply, RotationPolicyReply, VersionReply
from hsm_pool.core.model import RequestRecord
from hsm_pool.core.roles import Access
from hsm_pool.core.state import View
from hsm_pool.net import convert
from hsm_pool.net.interceptors import current_caller
from hsm_pool.partition.serving import Serving
from hsm_pool.store.committer import Mutation

R = TypeVar("R", bound=Message)


def answered(serving: Serving, access: Access, request: Message, response: type[R], until: float) -> R | None:
    """Return the first answer to this request id, before costly work is done again."""
    key, digest = request_key(request), request_digest(request)

    def decide(view: View) -> RequestRecord | None:
        return requests.answered_before(view, key, digest)

    record = serving.replica.consult(roles.permitted(access, decide), until).value
    return response.FromString(record.reply) if record else None


def commit(
    serving: Serving, access: Access, command: Command, request: Message, response: type[R], until: float
) -> R:
    """Commit a command, and return its answer."""
    mutation = Mutation(
        command,
        access,
        reply_encoder(response),
        request_key(request),
        request_digest(request),
        serving.now_ms(),
    )
    return response.FromString(serving.committer.submit(mutation, until))


def reply_encoder(response: type[Message]) -> Callable[[Reply], bytes]:
    """Return the function that makes the answer which is kept with the request id."""

    def encode(reply: Reply) -> bytes:
        message = response()
        match reply:
            case VersionReply():
                key = convert.key_message(reply.version, reply.retention)
                message.key.CopyFrom(key)  # type: ignore[attr-defined]
            case DeletedKeyReply():
                deleted = convert.deleted_key_message(reply.key, reply.version, reply.retention)
                message.deleted_key.CopyFrom(deleted)  # type: ignore[attr-defined]
            case RotationPolicyReply():
                policy = convert.rotation_policy_message(reply.key.rotation_policy)
                message.policy.CopyFrom(policy)  # type: ignore[attr-defined]
        return message.SerializeToString(deterministic=True)

    return encode


def request_key(request: Message) -> bytes:
    """Return the caller and request id, hashed: ids of different callers never meet."""
    request_id = convert.request_id(request.request_id)  # type: ignore[attr-defined]
    return hashlib.sha256(f"{current_caller().uri}\x00{request_id}".encode()).digest()


def request_digest(request: Message) -> bytes:
    """Return what makes a request the same as another; not its id, which has several spellings."""
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField("request_id")
    kind = request.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(kind + b"\x00" + content.SerializeToString(deterministic=True)).digest()
