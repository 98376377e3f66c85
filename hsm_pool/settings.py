"""Settings of the pool's processes: frozen dataclasses, read from JSON files.

A file is written once by :mod:`hsm_pool.provisioning` and read at every start.
Unknown and missing keys are refused, so a misspelt setting cannot be ignored.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from hsm_pool import limits

T = TypeVar("T")
_PARTITIONS_MAX = 3
"""Partitions of a pool (Azure Managed HSM has three)."""
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_PORT_MAX = 65_535


@dataclass(frozen=True, slots=True)
class Identity:
    """A TLS identity: files in PEM, absolute paths."""

    certificate_file: str
    key_file: str
    ca_file: str
    """Roots that the other side's certificate must lead to."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another partition of the pool; endpoints are host:port."""

    index: int
    peer_endpoint: str
    node_endpoint: str


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How the store is reached. The first endpoint is the member beside the partition."""

    endpoints: tuple[str, ...]
    identity: Identity
    prefix: str
    member_peer_urls: tuple[str, ...]
    """Peer URL of each partition's own member, by index; empty when the store is external."""
    quota_bytes: int
    """What a member may hold: the quota that it was started with."""

    def __post_init__(self) -> None:
        _check_quota(self.quota_bytes)


@dataclass(frozen=True, slots=True)
class PlatformSettings:
    """The simulated hardware root of one node: files in PEM, the sealing key raw."""

    certificate_file: str
    key_file: str
    root_certificate_file: str
    sealing_key_file: str


@dataclass(frozen=True, slots=True)
class OwnerSettings:
    """The key of one partition that the pool's owner certified, and the owner's root; files in PEM."""

    certificate_file: str
    key_file: str
    root_certificate_file: str


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """Where callers with bearer tokens are served (host:port), and whose tokens are accepted."""

    endpoint: str
    issuer: str
    audience: str
    keys: str
    """The issuer's key set (JWKS): path of a file, or an https URL on loopback."""
    keys_ca_file: str
    """Authority of that URL, PEM; "" for a file."""

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in dataclasses.astuple(self)):
            raise ValueError("tokens: texts are needed")
        if not self.issuer or not self.audience or not self.keys:
            raise ValueError("tokens: issuer, audience and keys are needed")
        _check_key_set(self.keys)


@dataclass(frozen=True, slots=True)
class AttestationAuthority:
    """Who may vouch for environments that keys are released to; fields as in TokenSettings."""

    issuer: str
    keys: str
    keys_ca_file: str

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in dataclasses.astuple(self)):
            raise ValueError("attestation_authorities: texts are needed")
        if not self.issuer or not self.keys:
            raise ValueError("attestation_authorities: issuer and keys are needed")
        _check_key_set(self.keys)


@dataclass(frozen=True, slots=True)
class RestSettings:
    """Where Azure's clients are served (host:port), and where the challenge sends them for a token."""

    endpoint: str
    authority: str
    """URL; Entra ID has the tenant as first segment of its path."""

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in dataclasses.astuple(self)):
            raise ValueError("rest: texts are needed")
        if not self.authority.isprintable() or '"' in self.authority:
            raise ValueError("rest: the authority does not fit in a header")


@dataclass(frozen=True, slots=True)
class TokenIssuerSettings:
    """The issuer of the development profile: host:port, and what stands in its tokens."""

    pool_id: str
    endpoint: str
    issuer: str
    audience: str
    identity: Identity


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """Where traces are sent by OTLP over gRPC without TLS: host:port of a collector on this machine."""

    endpoint: str

    def __post_init__(self) -> None:
        _check_loopback("traces", self.endpoint)


@dataclass(frozen=True, slots=True)
class InitialAssignment:
    """A role assignment that a pool begins with: the GUID of a built-in role, at the whole pool."""

    principal_id: str
    role_definition_id: str


@dataclass(frozen=True, slots=True)
class FirmwareSettings:
    """Where a node gets firmware, and where it keeps it."""

    repository: str
    """Directory of a TUF repository."""
    root_file: str
    """The root metadata that the node was given when it was made."""
    directory: str
    """Verified metadata, images, and which of them is active."""


@dataclass(frozen=True, slots=True)
class PartitionSettings:
    """Everything a partition process needs; endpoints are host:port."""

    pool_id: str
    index: int
    partition_count: int
    data_directory: str
    client_endpoint: str
    peer_endpoint: str
    enclave_endpoint: str
    node_endpoint: str
    client_plane: Identity
    peer_plane: Identity
    fabric_plane: Identity
    node_plane: Identity
    peers: tuple[Peer, ...]
    store: StoreSettings
    platform: PlatformSettings
    owner: OwnerSettings
    admission_policy_file: str
    """What evidence must say, in the grammar of release policies; absent: the same distribution."""
    sealing: Literal["platform", "none"]
    recoverable_days: int
    purge_protection: bool
    keys_max: int
    versions_per_key_max: int
    """All four are taken over when the pool is activated, and fixed from then on."""
    initial_administrators: tuple[str, ...]
    """Principals: they hold ceremonies while no role can be read, and begin as Administrators."""
    initial_assignments: tuple[InitialAssignment, ...]
    tokens: TokenSettings | None
    rest: RestSettings | None
    """The front for Azure's clients, who present tokens; none without an issuer of tokens."""
    attestation_authorities: tuple[AttestationAuthority, ...]
    """Release policies that name another authority are never met."""
    firmware: FirmwareSettings | None
    """Absent in a pool without a repository: it runs what is installed."""
    audit_directory: str
    audit_failure: Literal["stop", "continue"]
    """What happens to operations while the audit log cannot be written."""
    audit_retention_mebibytes: int
    metrics_endpoint: str
    """Where metrics are scraped, host:port on loopback."""
    traces: TraceSettings | None
    """Absent: no traces."""

    @property
    def issuers(self) -> tuple[TokenSettings | AttestationAuthority, ...]:
        """Whose key sets a partition reads."""
        return (*((self.tokens,) if self.tokens else ()), *self.attestation_authorities)

    def __post_init__(self) -> None:
        if self.rest and not self.tokens:
            raise ValueError("rest: tokens are needed, too")
        if not self.initial_administrators:
            raise ValueError("initial_administrators: at least one is needed")
        _check_loopback("metrics_endpoint", self.metrics_endpoint)
        issuers = {entry.issuer for entry in self.attestation_authorities}
        if len(issuers) < len(self.attestation_authorities):
            raise ValueError("attestation_authorities: one is named twice")
        _check_range("attestation_authorities", len(issuers), 0, limits.ATTESTATION_AUTHORITIES_MAX)
        _check_range("partition_count", self.partition_count, 1, _PARTITIONS_MAX)
        _check_range("index", self.index, 0, self.partition_count - 1)
        _check_range(
            "recoverable_days",
            self.recoverable_days,
            limits.RECOVERABLE_DAYS_MIN,
            limits.RECOVERABLE_DAYS_MAX,
        )
        _check_range("keys_max", self.keys_max, 1, limits.KEYS_MAX)
        _check_range("versions_per_key_max", self.versions_per_key_max, 1, limits.VERSIONS_PER_KEY_MAX)
        _check_range(
            "audit_retention_mebibytes",
            self.audit_retention_mebibytes,
            limits.AUDIT_RETENTION_MEBIBYTES_MIN,
            limits.AUDIT_RETENTION_MEBIBYTES_MAX,
        )


@dataclass(frozen=True, slots=True)
class StoreMemberSettings:
    """The etcd member that a node agent runs; absent when the store is external."""

    binary: str
    name: str
    data_directory: str
    client_url: str
    peer_url: str
    initial_cluster: str
    cluster_token: str
    client_identity: Identity
    peer_identity: Identity
    quota_bytes: int
    """What it may hold; partitions are told the same."""

    def __post_init__(self) -> None:
        _check_quota(self.quota_bytes)


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Everything a node agent needs."""

    pool_id: str
    index: int
    data_directory: str
    partition_settings_file: str
    partition_lock_file: str
    incarnation_file: str
    log_directory: str
    identity: Identity
    peer_node_endpoints: tuple[str, ...]
    """Node endpoints of all other partitions: they receive exit notices."""
    store_member: StoreMemberSettings | None
    firmware: FirmwareSettings | None

    def __post_init__(self) -> None:
        _check_range("index", self.index, 0, _PARTITIONS_MAX - 1)


def _check_loopback(name: str, endpoint: str) -> None:
    """Check host:port: what has no TLS and asks for no identity stays on this machine."""
    host, _, port = endpoint.rpartition(":")
    if host not in _LOOPBACK or not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= _PORT_MAX):
        raise ValueError(f"{name}: host:port on loopback is needed")


def _check_key_set(keys: str) -> None:
    """Check where a JWKS is read from: nothing leaves the machine."""
    if "://" not in keys:
        return
    url = urllib.parse.urlsplit(keys)
    if url.scheme != "https" or url.hostname not in _LOOPBACK:
        raise ValueError("keys: a file, or an https URL on loopback is needed")


def _check_quota(quota_bytes: int) -> None:
    _check_range("quota_bytes", quota_bytes, limits.STORE_QUOTA_BYTES_MIN, limits.STORE_QUOTA_BYTES_MAX)


def _check_range(name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name}: {lowest} to {highest} is needed")


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: an object is needed")
        hints = typing.get_type_hints(kind)
        unknown, missing = set(value) - set(hints), set(hints) - set(value)
        if unknown or missing:
            raise ValueError(f"{where}: unknown {sorted(unknown)}, missing {sorted(missing)}")
        return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: a list is needed")
        element = typing.get_args(kind)[0]
        return tuple(_decode(element, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{where}: one of {typing.get_args(kind)} is needed")
        return value
    if origin is types.UnionType:
        if value is None:
            return None
        (inner,) = [option for option in typing.get_args(kind) if option is not type(None)]
        return _decode(inner, value, where)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {kind.__name__} is needed")
    return value


def load(kind: type[T], path: Path) -> T:
    """Read settings of the given kind.

    Raises:
        ValueError: The file is not JSON, or a key is unknown, missing, of the wrong type or out of range.
        OSError: The file cannot be read.
    """
    decoded: T = _decode(kind, json.loads(path.read_text()), path.name)
    return decoded


def dump(settings: Any) -> str:
    """Return settings as the JSON text that :func:`load` reads."""
    return json.dumps(dataclasses.asdict(settings), indent=2) + "\n"
