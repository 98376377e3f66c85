"""docs/roles.md says what the code does: its three tables are compared with the code's."""

from __future__ import annotations

import re

from hsm_pool.core.roles import BUILT_IN_ROLES, DataAction
from hsm_pool.net.authorization import DATA_ACTIONS
from tests.running_pool import ROOT


def tables() -> dict[str, list[str]]:
    """Return the rows that the page must have, by the name of their table."""
    roles = list(BUILT_IN_ROLES.values())
    return {
        "roles": [f"| {role.role_name} | {role.role_definition_id} |" for role in roles],
        "actions": [
            f"| {action.value} |" + "".join(" x |" if action in role.data_actions else " |" for role in roles)
            for action in DataAction
        ],
        "methods": [
            f"| {method.split('.')[-1].replace('/', ' ')} | {', '.join(a.value for a in rule.actions)} | "
            f"{'key' if rule.scoped else ''} |".replace("|  |", "| |")
            for method, rule in DATA_ACTIONS.items()
        ],
    }


def test_the_page_of_roles_has_the_tables_of_the_code() -> None:
    page = (ROOT / "docs/roles.md").read_text()
    for name, rows in tables().items():
        found = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
        assert found
        assert found[1].splitlines()[2:] == rows, name
