"""G5: the controller's own source imports nothing that could hold or open a secret."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import fabric_controller

ALLOWED = {"click", "fabric_controller", "grpc", "grpc_health", "mhsm", "pyseccomp", "rich", "structlog"}
MODULES = sorted(Path(fabric_controller.__file__).parent.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module or "")
        elif isinstance(node, ast.Name):
            assert node.id not in {"__import__", "eval", "exec"}
        elif isinstance(node, ast.Attribute):
            assert node.attr != "import_module"
    return found


def test_g5_imports() -> None:
    assert len(MODULES) >= 7
    for path in MODULES:
        for name in _imports(path):
            top = name.split(".")[0]
            assert top in ALLOWED or top in sys.stdlib_module_names, (path.name, name)


def test_g5_only_the_enclave_client_knows_the_enclave_messages() -> None:
    users = {path.name: name for path in MODULES for name in _imports(path) if name.startswith("mhsm")}
    assert users == {"enclave_client.py": "mhsm.enclave.v1"}
