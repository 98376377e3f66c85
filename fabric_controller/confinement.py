"""What the controller takes from itself before it serves (G5).

It needs its settings, its identity, its data directory and Python; not the partitions' files,
other processes, or any port but those of the enclave interfaces. Landlock takes away the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fabric_controller.landlock import LandlockUnavailable, python_directories, restrict
from fabric_controller.settings import FabricSettings

LANDLOCK: Final = "landlock"
"""Name of the measure in status."""

_SYSTEM: Final = (
    "/dev/null",
    "/dev/urandom",
    "/etc/hosts",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/ssl/openssl.cnf",
    "/lib",
    "/usr/lib",
    "/usr/share/zoneinfo",
)


def confine(settings: FabricSettings) -> list[str]:
    """Give up what the controller does not need; return the measures that took effect.

    Call it before there is a second thread. Where the kernel has no Landlock, nothing happens.
    """
    identity = settings.identity
    files = [identity.certificate_file, identity.key_file, identity.ca_file, *_SYSTEM]
    ports = [int(partition.enclave_endpoint.rpartition(":")[2]) for partition in settings.partitions]
    try:
        restrict(
            readable=[*python_directories("fabric_controller", "mhsm"), *map(Path, files)],
            writable=[Path(settings.data_directory)],
            connect_ports=ports,
        )
    except LandlockUnavailable:
        return []
    return [LANDLOCK]
