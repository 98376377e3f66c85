"""What the controller may reach of the machine (G5).

It needs its settings, its identity, its data directory and Python; not the partitions' files,
other processes, or any port but those of the enclave interfaces. Landlock takes away the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fabric_controller.landlock import python_directories, restrict
from fabric_controller.settings import FabricSettings

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


def confine(settings: FabricSettings) -> None:
    """Give up what the controller does not need. Call it before there is a second thread.

    Raises:
        LandlockUnavailable: The kernel has no Landlock; nothing is given up.
    """
    identity = settings.identity
    files = [identity.certificate_file, identity.key_file, identity.ca_file, *_SYSTEM]
    ports = [int(partition.enclave_endpoint.rpartition(":")[2]) for partition in settings.partitions]
    restrict(
        readable=[*python_directories("fabric_controller", "mhsm"), *map(Path, files)],
        writable=[Path(settings.data_directory)],
        connect_ports=ports,
    )
