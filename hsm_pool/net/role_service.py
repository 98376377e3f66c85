"""RoleService: role definitions and role assignments."""

from __future__ import annotations

import re
import uuid
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from hsm_pool import limits
from hsm_pool.audit.record import RoleChange, note
from hsm_pool.core import role_management, roles
from hsm_pool.core.commands import (
    Command,
    CreateRoleAssignment,
    CreateRoleDefinition,
    DeleteRoleAssignment,
    DeleteRoleDefinition,
    Reply,
    RoleAssignmentReply,
    RoleDefinitionReply,
)
from hsm_pool.core.model import RoleAssignment, RoleDefinitionRecord
from hsm_pool.core.roles import Access
from hsm_pool.core.state import State, View
from hsm_pool.errors import InvalidField
from hsm_pool.net import convert
from hsm_pool.net.calls import deadline
from hsm_pool.net.interceptors import current_access
from hsm_pool.net.mutations import request_digest, request_key
from hsm_pool.partition.partition import Partition
from hsm_pool.store.committer import Mutation
from mhsm.roles.v1 import roles_pb2, roles_pb2_grpc

R = TypeVar("R", bound=Message)
T = TypeVar("T", RoleAssignment, RoleDefinitionRecord)

_GUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_ALL_SCOPES = ""
_CLIENT = re.compile(rf"client/[!-~]{{1,{limits.PRINCIPAL_ID_LENGTH_MAX - len('client/')}}}")


class RoleService(roles_pb2_grpc.RoleServiceServicer):
    """Local RBAC."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def CreateRoleDefinition(  # noqa: N802, D102
        self, request: roles_pb2.CreateRoleDefinitionRequest, context: grpc.ServicerContext
    ) -> roles_pb2.CreateRoleDefinitionResponse:
        record = RoleDefinitionRecord(
            _new_guid(request.role_definition_id, "role_definition_id"),
            _text(request.role_name, "role_name", 1, limits.ROLE_NAME_LENGTH_MAX),
            _text(request.description, "description", 0, limits.ROLE_DESCRIPTION_LENGTH_MAX),
            roles.parse_data_actions(request.data_actions, "data_actions"),
            roles.parse_data_actions(request.not_data_actions, "not_data_actions"),
        )
        if not record.data_actions:
            raise InvalidField("a role allows at least one data action", field="data_actions")
        note(role=RoleChange(record.role_definition_id))
        command = CreateRoleDefinition(record)
        response = roles_pb2.CreateRoleDefinitionResponse
        return self._commit(current_access(), command, request, response, deadline(context))

    def GetRoleDefinition(  # noqa: N802, D102
        self, request: roles_pb2.GetRoleDefinitionRequest, context: grpc.ServicerContext
    ) -> roles_pb2.GetRoleDefinitionResponse:
        role_definition_id = _guid(request.role_definition_id, "role_definition_id")

        def decide(view: View) -> RoleDefinitionRecord:
            return role_management.definition(view, role_definition_id)

        replica = self._partition.serving().replica
        found = replica.consult(roles.permitted(current_access(), decide), deadline(context)).value
        return roles_pb2.GetRoleDefinitionResponse(role_definition=_definition_message(found))

    def ListRoleDefinitions(  # noqa: N802, D102
        self, request: roles_pb2.ListRoleDefinitionsRequest, context: grpc.ServicerContext
    ) -> roles_pb2.ListRoleDefinitionsResponse:
        size = convert.page_size(request.page_size)

        def decide(state: State) -> tuple[list[RoleDefinitionRecord], str]:
            built_in = [role_management.built_in_record(role) for role in roles.BUILT_IN_ROLES.values()]
            found = [*built_in, *role_management.custom_definitions(state)]
            return _page(found, [record.role_definition_id for record in found], size, request.page_token)

        replica = self._partition.serving().replica
        page, token = replica.consult_all(roles.permitted(current_access(), decide), deadline(context))
        return roles_pb2.ListRoleDefinitionsResponse(
            role_definitions=map(_definition_message, page), next_page_token=token
        )

    def DeleteRoleDefinition(  # noqa: N802, D102
        self, request: roles_pb2.DeleteRoleDefinitionRequest, context: grpc.ServicerContext
    ) -> roles_pb2.DeleteRoleDefinitionResponse:
        command = DeleteRoleDefinition(_guid(request.role_definition_id, "role_definition_id"))
        note(role=RoleChange(command.role_definition_id))
        response = roles_pb2.DeleteRoleDefinitionResponse
        return self._commit(current_access(), command, request, response, deadline(context))

    def CreateRoleAssignment(  # noqa: N802, D102
        self, request: roles_pb2.CreateRoleAssignmentRequest, context: grpc.ServicerContext
    ) -> roles_pb2.CreateRoleAssignmentResponse:
        scope = roles.parse_scope(request.scope)
        assignment = RoleAssignment(
            _new_guid(request.name, "name"),
            _principal(request.principal_id),
            _guid(request.role_definition_id, "role_definition_id"),
            scope,
        )
        note(
            role=RoleChange(
                assignment.role_definition_id, assignment.name, assignment.principal_id, assignment.scope
            )
        )
        command, response = CreateRoleAssignment(assignment), roles_pb2.CreateRoleAssignmentResponse
        return self._commit(current_access(scope), command, request, response, deadline(context))

    def GetRoleAssignment(  # noqa: N802, D102
        self, request: roles_pb2.GetRoleAssignmentRequest, context: grpc.ServicerContext
    ) -> roles_pb2.GetRoleAssignmentResponse:
        scope, name = roles.parse_scope(request.scope), _guid(request.name, "name")

        def decide(view: View) -> RoleAssignment:
            return role_management.assignment(view, scope, name)

        replica = self._partition.serving().replica
        found = replica.consult(roles.permitted(current_access(scope), decide), deadline(context)).value
        return roles_pb2.GetRoleAssignmentResponse(role_assignment=_assignment_message(found))

    def ListRoleAssignments(  # noqa: N802, D102
        self, request: roles_pb2.ListRoleAssignmentsRequest, context: grpc.ServicerContext
    ) -> roles_pb2.ListRoleAssignmentsResponse:
        scope = roles.parse_scope(request.scope) if request.scope else _ALL_SCOPES
        size = convert.page_size(request.page_size)
        principal_id = _principal(request.principal_id) if request.principal_id else ""

        def decide(state: State) -> tuple[list[RoleAssignment], str]:
            found = [
                assignment
                for assignment in role_management.assignments(state)
                if _listed_at(assignment.scope, scope) and principal_id in {"", assignment.principal_id}
            ]
            positions = [f"{assignment.scope} {assignment.name}" for assignment in found]
            return _page(found, positions, size, request.page_token)

        replica = self._partition.serving().replica
        access = current_access(scope or roles.WHOLE_POOL)
        page, token = replica.consult_all(roles.permitted(access, decide), deadline(context))
        return roles_pb2.ListRoleAssignmentsResponse(
            role_assignments=map(_assignment_message, page), next_page_token=token
        )

    def DeleteRoleAssignment(  # noqa: N802, D102
        self, request: roles_pb2.DeleteRoleAssignmentRequest, context: grpc.ServicerContext
    ) -> roles_pb2.DeleteRoleAssignmentResponse:
        scope = roles.parse_scope(request.scope)
        command = DeleteRoleAssignment(scope, _guid(request.name, "name"))
        note(role=RoleChange(assignment=command.name, scope=scope))
        response = roles_pb2.DeleteRoleAssignmentResponse
        return self._commit(current_access(scope), command, request, response, deadline(context))

    def _commit(
        self, access: Access, command: Command, request: Message, response: type[R], until: float
    ) -> R:
        def encode(reply: Reply) -> bytes:
            message = response()
            match reply:
                case RoleDefinitionReply():
                    found = _definition_message(reply.definition)
                    message.role_definition.CopyFrom(found)  # type: ignore[attr-defined]
                case RoleAssignmentReply():
                    assignment = _assignment_message(reply.assignment)
                    message.role_assignment.CopyFrom(assignment)  # type: ignore[attr-defined]
            return message.SerializeToString(deterministic=True)

        serving = self._partition.serving()
        key, digest = request_key(request), request_digest(request)
        mutation = Mutation(command, access, encode, key, digest, serving.now_ms())
        return response.FromString(serving.committer.submit(mutation, until))


def _listed_at(assigned: str, listed: str) -> bool:
    """Azure lists the assignments of the whole pool together, and not those of keys."""
    return listed in {_ALL_SCOPES, assigned} or (
        roles.is_whole_pool(assigned) and roles.is_whole_pool(listed)
    )


def _page(found: list[T], positions: list[str], size: int, token: str) -> tuple[list[T], str]:
    """Return a page and the token of the next; a token is the position that the page before ended with."""
    start = 0
    if token:
        after = convert.page_position(token)
        start = next((i + 1 for i, position in enumerate(positions) if position == after), -1)
        if start < 0:
            raise InvalidField("the page token is not valid", field="page_token")
    end = start + size
    return found[start:end], convert.page_token(positions[end - 1]) if end < len(found) else ""


def _guid(value: str, field: str) -> str:
    if not _GUID.fullmatch(value):
        raise InvalidField("a GUID of 36 characters is needed", field=field)
    return value.lower()


def _new_guid(value: str, field: str) -> str:
    return _guid(value, field) if value else str(uuid.uuid4())


def _principal(value: str) -> str:
    if _GUID.fullmatch(value):
        return value.lower()
    if not _CLIENT.fullmatch(value):
        raise InvalidField("a principal is client/NAME or a GUID", field="principal_id")
    return value


def _text(value: str, field: str, shortest: int, longest: int) -> str:
    if not shortest <= len(value) <= longest or not value.isprintable():
        raise InvalidField(f"{shortest}-{longest} printable characters are needed", field=field)
    return value


def _definition_message(record: RoleDefinitionRecord) -> roles_pb2.RoleDefinition:
    built_in = record.role_definition_id in roles.BUILT_IN_ROLES
    return roles_pb2.RoleDefinition(
        role_definition_id=record.role_definition_id,
        role_name=record.role_name,
        description=record.description,
        role_type=roles_pb2.ROLE_TYPE_BUILT_IN if built_in else roles_pb2.ROLE_TYPE_CUSTOM,
        data_actions=[roles.PREFIX + action for action in record.data_actions],
        not_data_actions=[roles.PREFIX + action for action in record.not_data_actions],
    )


def _assignment_message(assignment: RoleAssignment) -> roles_pb2.RoleAssignment:
    return roles_pb2.RoleAssignment(
        name=assignment.name,
        scope=assignment.scope,
        role_definition_id=assignment.role_definition_id,
        principal_id=assignment.principal_id,
    )
