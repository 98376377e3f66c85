"""The calls of RoleService."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hsm_pool.client.calls import Call, Kind
from hsm_pool.client.messages import message, named_fields
from mhsm.roles.v1 import roles_pb2, roles_pb2_grpc

T = TypeVar("T")


def _role(method: str, request: Any, kind: Kind, answer: Callable[[Any], T]) -> Call[T]:
    return Call(roles_pb2_grpc.RoleServiceStub, method, request, kind, answer)


def _definition(method: str, request: Any, kind: Kind) -> Call[roles_pb2.RoleDefinition]:
    return _role(method, request, kind, lambda response: response.role_definition)


def _assignment(method: str, request: Any, kind: Kind) -> Call[roles_pb2.RoleAssignment]:
    return _role(method, request, kind, lambda response: response.role_assignment)


@named_fields
def create_role_definition(
    role_name: str,
    data_actions: Sequence[str],
    *,
    not_data_actions: Sequence[str] = (),
    description: str = "",
    role_definition_id: str = "",
    request_id: str | None = None,
) -> Call[roles_pb2.RoleDefinition]:
    """CreateRoleDefinition."""
    request = message(
        roles_pb2.CreateRoleDefinitionRequest,
        role_definition_id=role_definition_id,
        role_name=role_name,
        description=description,
        data_actions=data_actions,
        not_data_actions=not_data_actions,
        request_id=request_id or str(uuid.uuid4()),
    )
    return _definition("CreateRoleDefinition", request, "mutation")


def get_role_definition(role_definition_id: str) -> Call[roles_pb2.RoleDefinition]:
    """GetRoleDefinition."""
    request = message(roles_pb2.GetRoleDefinitionRequest, role_definition_id=role_definition_id)
    return _definition("GetRoleDefinition", request, "read")


def list_role_definitions(page_size: int, page_token: str) -> Call[roles_pb2.ListRoleDefinitionsResponse]:
    """ListRoleDefinitions, one page."""
    request = message(roles_pb2.ListRoleDefinitionsRequest, page_size=page_size, page_token=page_token)
    return _role("ListRoleDefinitions", request, "read", lambda response: response)


def delete_role_definition(
    role_definition_id: str, request_id: str | None = None
) -> Call[roles_pb2.RoleDefinition]:
    """DeleteRoleDefinition."""
    request = message(
        roles_pb2.DeleteRoleDefinitionRequest,
        role_definition_id=role_definition_id,
        request_id=request_id or str(uuid.uuid4()),
    )
    return _definition("DeleteRoleDefinition", request, "mutation")


@named_fields
def create_role_assignment(
    principal_id: str,
    role_definition_id: str,
    scope: str = "/",
    *,
    name: str = "",
    request_id: str | None = None,
) -> Call[roles_pb2.RoleAssignment]:
    """CreateRoleAssignment."""
    request = message(
        roles_pb2.CreateRoleAssignmentRequest,
        name=name,
        scope=scope,
        role_definition_id=role_definition_id,
        principal_id=principal_id,
        request_id=request_id or str(uuid.uuid4()),
    )
    return _assignment("CreateRoleAssignment", request, "mutation")


def get_role_assignment(name: str, scope: str = "/") -> Call[roles_pb2.RoleAssignment]:
    """GetRoleAssignment."""
    request = message(roles_pb2.GetRoleAssignmentRequest, name=name, scope=scope)
    return _assignment("GetRoleAssignment", request, "read")


def list_role_assignments(
    scope: str, principal_id: str, page_size: int, page_token: str
) -> Call[roles_pb2.ListRoleAssignmentsResponse]:
    """ListRoleAssignments, one page."""
    request = message(
        roles_pb2.ListRoleAssignmentsRequest,
        scope=scope,
        principal_id=principal_id,
        page_size=page_size,
        page_token=page_token,
    )
    return _role("ListRoleAssignments", request, "read", lambda response: response)


def delete_role_assignment(
    name: str, scope: str = "/", request_id: str | None = None
) -> Call[roles_pb2.RoleAssignment]:
    """DeleteRoleAssignment."""
    request = message(
        roles_pb2.DeleteRoleAssignmentRequest,
        name=name,
        scope=scope,
        request_id=request_id or str(uuid.uuid4()),
    )
    return _assignment("DeleteRoleAssignment", request, "mutation")
