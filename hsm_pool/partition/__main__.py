"""Run a partition: ``python -m hsm_pool.partition --settings FILE``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

import structlog

from hsm_pool import settings as settings_module
from hsm_pool.enclave import confinement, hardening, system_calls
from hsm_pool.enclave.evidence import measurement
from hsm_pool.net.listening import CannotListen, listening
from hsm_pool.net.peer_client import PeerCosigning, PeerHealing
from hsm_pool.net.server import PlaneServers
from hsm_pool.observability import logs
from hsm_pool.partition.ceremonies import Ceremonies
from hsm_pool.partition.partition import Partition
from hsm_pool.rest.server import rest_server
from hsm_pool.settings import PartitionSettings

_FAILED = 70
"""Exit code after an unexpected exception in a thread (EX_SOFTWARE)."""
_NO_PORT = 69
"""Exit code when a port of the settings is taken (EX_UNAVAILABLE)."""


def _end_process(arguments: threading.ExceptHookArgs) -> None:
    """End the process: a dead partition is safe and restarted, a half-working one is neither."""
    trace = arguments.exc_traceback
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
    name = arguments.thread.name if arguments.thread else ""
    structlog.get_logger().critical(
        "a thread failed", thread=name, kind=arguments.exc_type.__name__, place=place
    )
    os._exit(_FAILED)


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, required=True)
    arguments = parser.parse_args()
    if not __debug__:
        sys.exit("partition: assertions are stripped (-O); refusing to start")
    logs.configure()
    threading.excepthook = _end_process
    # Blocked before any thread exists, so that only sigwait below sees them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    hardening.harden_process()
    settings = settings_module.load(PartitionSettings, arguments.settings)
    measurement()  # of what is loaded now, whatever is installed later
    confinement.confine_partition(settings)
    log = structlog.get_logger().bind(partition=settings.index)
    cosign = PeerCosigning(settings)
    healing = PeerHealing(settings)
    partition = Partition(settings, healing, cosign)
    healing.on_refused = partition.follow_firmware
    ceremonies = Ceremonies(partition)
    rest = None
    try:
        servers = PlaneServers(partition, ceremonies)
        if settings.rest and settings.tokens:
            with listening(settings.rest.endpoint):
                rest = rest_server(partition, ceremonies, settings.rest, settings.tokens)
        servers.start()
    except CannotListen as error:
        log.critical("the port is taken by another process, or may not be used", endpoint=error.endpoint)
        # Nothing was served yet, and threads of what listens already would hold up an orderly end.
        os._exit(_NO_PORT)
    if rest:
        rest.start()
    partition.start()
    hardening.filter_system_calls(system_calls.PARTITION)
    log.info(
        "started",
        incarnation=partition.state_directory.incarnation,
        hardening=[measure.name.lower() for measure in hardening.in_force()],
    )
    received = signal.sigwait({signal.SIGTERM, signal.SIGINT})
    log.info("stopping", signal=signal.Signals(received).name)
    if rest:
        rest.close()
    servers.close()
    ceremonies.close()
    partition.close()
    cosign.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
