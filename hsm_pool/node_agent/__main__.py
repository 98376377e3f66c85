"""Run a node agent: ``python -m hsm_pool.node_agent --settings FILE``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hsm_pool import settings as settings_module
from hsm_pool.node_agent import agent
from hsm_pool.observability import logs
from hsm_pool.settings import NodeSettings


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, required=True)
    arguments = parser.parse_args()
    logs.configure()
    settings = settings_module.load(NodeSettings, arguments.settings)
    agent.run(settings, lambda: agent.partition_command(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
