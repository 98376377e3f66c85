"""What a partition and its node agent may reach of the machine (G3), by Landlock.

Both start programs: the agent its partition and its store member, the partition its ceremony child.
Whatever a process starts is confined with it, so the agent keeps what all of them need, and each of
them gives up more.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from hsm_pool.enclave import landlock
from hsm_pool.enclave.landlock import LandlockUnavailable
from hsm_pool.settings import Identity, NodeSettings, PartitionSettings

PACKAGES: Final = ("hsm_pool", "security_domain", "mhsm")

_SYSTEM_FILES: Final = (
    "/dev/urandom",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/ssl/openssl.cnf",
    "/proc",  # of other processes the kernel shows what their owner and their domain allow
    "/usr/share/zoneinfo",
)
_SYSTEM_PROGRAMS: Final = ("/lib", "/lib64", "/sbin/ldconfig", "/usr/lib")
"""The loader of programs lies among the libraries; Python finds libraries with ldconfig."""


def confine_partition(settings: PartitionSettings) -> bool:
    """Confine this partition and what it starts; return whether that took effect. One thread runs."""
    firmware = [Path(settings.firmware.directory)] if settings.firmware else []
    tokens = settings.tokens
    endpoints = [settings.client_endpoint, settings.peer_endpoint]
    endpoints += [settings.enclave_endpoint, settings.node_endpoint, settings.metrics_endpoint]
    endpoints += [settings.rest.endpoint] if settings.rest else []
    return _confine(
        readable=_read_by_partition(settings),
        executable=[],
        writable=[Path(settings.data_directory), Path(settings.audit_directory), *firmware],
        connect_ports=_partition_connects_to(settings),
        bind_ports=map(_port, [*endpoints, *([tokens.endpoint] if tokens else [])]),
    )


def confine_agent(settings: NodeSettings, partition: PartitionSettings) -> bool:
    """Confine this node agent and what it starts; return whether that took effect. One thread runs."""
    member = settings.store_member
    members = (
        [url for pair in member.initial_cluster.split(",") for url in pair.split("=")[1:]] if member else []
    )
    node = Path(settings.data_directory)
    bound = [partition.client_endpoint, partition.peer_endpoint]
    bound += [partition.enclave_endpoint, partition.node_endpoint, partition.metrics_endpoint]
    bound += [partition.tokens.endpoint] if partition.tokens else []
    bound += [partition.rest.endpoint] if partition.rest else []
    bound += [member.client_url, member.peer_url] if member else []
    return _confine(
        # Within the node's directory the agent could not even name all that its partition reads.
        readable=[path for path in _read_by_partition(partition) if not path.is_relative_to(node)],
        executable=[Path(found) for name in ("setpriv", "env") if (found := shutil.which(name))]
        + ([Path(member.binary)] if member else []),
        writable=[node],
        connect_ports=[
            *_partition_connects_to(partition),
            *map(_port, settings.peer_node_endpoints),
            *map(_port, members),
            *([_port(member.client_url)] if member else []),
        ],
        bind_ports=map(_port, bound),
    )


def _confine(
    *,
    readable: Iterable[Path],
    executable: Iterable[Path],
    writable: Iterable[Path],
    connect_ports: Iterable[int],
    bind_ports: Iterable[int],
) -> bool:
    # Without its own library a Python that is not the system's would take that of the system.
    python = [Path(sys.prefix, "pyvenv.cfg"), Path(sys.base_prefix, "lib")]
    python += landlock.python_directories(*PACKAGES)
    # Named by who started the pool; what is started anew looks for its modules there.
    python += map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    programs = [Path(sys.executable), *map(Path, _SYSTEM_PROGRAMS), *executable]
    try:
        landlock.restrict(
            readable=[*python, *map(Path, _SYSTEM_FILES), *readable],
            listable=_package_parents(),
            executable=programs,
            writable=[Path("/dev/null"), *writable],
            connect_ports=connect_ports,
            bind_ports=bind_ports,
        )
    except LandlockUnavailable:
        return False
    return True


def in_force() -> bool:
    """Return whether a Landlock domain holds: nothing but one closes the root directory to a process."""
    try:
        os.scandir("/").close()
    except PermissionError:
        return True
    return False


def _read_by_partition(settings: PartitionSettings) -> Iterator[Path]:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Identity):
            yield from _files_of(value)
    yield from _files_of(settings.store.identity)
    yield from map(Path, dataclasses.astuple(settings.platform))
    yield from map(Path, dataclasses.astuple(settings.owner))
    yield Path(settings.admission_policy_file).parent  # the owner may write one at any time
    if settings.firmware:
        yield from (Path(settings.firmware.repository), Path(settings.firmware.root_file))
    for issuer in settings.issuers:
        if "://" not in issuer.keys:
            yield Path(issuer.keys).parent  # the file may be replaced by another one
        if issuer.keys_ca_file:
            yield Path(issuer.keys_ca_file)


def _files_of(identity: Identity) -> Iterator[Path]:
    yield from map(Path, (identity.certificate_file, identity.key_file, identity.ca_file))


def _partition_connects_to(settings: PartitionSettings) -> list[int]:
    ports = [_port(peer.peer_endpoint) for peer in settings.peers]
    ports += map(_port, settings.store.endpoints)
    ports += [_port(settings.traces.endpoint)] if settings.traces else []
    ports += [_port(issuer.keys) for issuer in settings.issuers if "://" in issuer.keys]
    return ports


def _package_parents() -> Iterator[Path]:
    """Give the directories in which Python looks for the packages: it lists them."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        yield from (Path(place).parent for place in (spec and spec.submodule_search_locations) or ())


def _port(endpoint: str) -> int:
    """Return the port of host:port, or of a URL."""
    _, _, rest = endpoint.rpartition("://")
    _, _, port = rest.partition("/")[0].rpartition(":")
    return int(port) if port.isdigit() else 443
