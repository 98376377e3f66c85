"""Run a node agent: ``python -m hsm_pool.node_agent --settings FILE``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hsm_pool import settings as settings_module
from hsm_pool.enclave import confinement, hardening, system_calls
from hsm_pool.node_agent import agent
from hsm_pool.node_agent.ownership import NodeUsers
from hsm_pool.observability import logs
from hsm_pool.settings import NodeSettings, PartitionSettings


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--partition-user", type=int, help="What the partition runs as (with the next one).")
    parser.add_argument("--store-user", type=int, help="What the store member runs as.")
    arguments = parser.parse_args()
    users = None
    if arguments.partition_user is not None and arguments.store_user is not None:
        users = NodeUsers(os.getuid(), arguments.partition_user, arguments.store_user)
    logs.configure()
    hardening.harden_process()
    settings = settings_module.load(NodeSettings, arguments.settings)
    hardening.filter_system_calls(system_calls.NODE_AGENT)
    partition = settings_module.load(PartitionSettings, Path(settings.partition_settings_file))
    confinement.confine_agent(settings, partition)
    agent.run(settings, lambda: agent.partition_command(settings), users)
    return 0


if __name__ == "__main__":
    sys.exit(main())
