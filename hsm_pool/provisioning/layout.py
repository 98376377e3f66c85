"""The data directory of a pool: what lies where, and who gets which identity.

::

    D/pool.json  connection.json (while it runs)  supervisor.lock  supervisor.log
      pki/               client-ca.crt client-ca.key platform-root.crt owner-root.crt
      policy/            admission-policy.json (the owner's, if he writes one)
      clients/           administrator.* application.*
      nodes/<i>/         node.json partition.json pki/ platform/ owner/ partition/ store/ logs/ firmware/
      fabric/            fabric.json controller.* ca.crt
      token-issuer/      token-issuer.json issuer.*  (development profile)
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hsm_pool import limits
from hsm_pool import settings as settings_module
from hsm_pool.core.roles import CRYPTO_OFFICER, CRYPTO_USER
from hsm_pool.provisioning.pki import Authority
from hsm_pool.provisioning.ports import free_ports
from hsm_pool.provisioning.users import FIRST_USER_ID
from hsm_pool.settings import (
    AttestationAuthority,
    FirmwareSettings,
    Identity,
    InitialAssignment,
    NodeSettings,
    OwnerSettings,
    PartitionSettings,
    Peer,
    PlatformSettings,
    RestSettings,
    StoreMemberSettings,
    StoreSettings,
    TokenIssuerSettings,
    TokenSettings,
    TraceSettings,
)
from hsm_pool.tokens import attestation_authority
from hsm_pool.tokens.issuer import KEYS_PATH, object_id

PARTITIONS = 3
POOL_FORMAT = 5
"""5 since the MACs of the chain belong to an epoch."""

PLATFORM_ROOT = "pki/platform-root.crt"
OWNER_ROOT = "pki/owner-root.crt"
ADMISSION_POLICY = "policy/admission-policy.json"
STORE_PREFIX = "/mhsm/"
_PORTS_PER_NODE = 9
AUDIENCE = "https://managedhsm.azure.net"
"""Audience of the tokens of a Managed HSM (Azure public cloud)."""


class DirectoryRefused(Exception):
    """The data directory is something else than a pool's."""


@dataclass(frozen=True, slots=True)
class ExternalStore:
    """An etcd cluster that is run by somebody else."""

    endpoints: tuple[str, ...]
    ca_file: str
    certificate_file: str
    key_file: str


@dataclass(frozen=True, slots=True)
class OwnIssuer:
    """An issuer of bearer tokens that is run by somebody else; fields as in TokenSettings."""

    issuer: str
    audience: str
    keys: str
    keys_ca_file: str = ""

    def settings(self, endpoint: str) -> TokenSettings:
        """Return the settings of a partition that serves its tokens at an endpoint.

        Raises:
            ValueError: One of them is out of range.
        """
        return TokenSettings(endpoint, self.issuer, self.audience, self.keys, self.keys_ca_file)


@dataclass(frozen=True, slots=True)
class NewPool:
    """What the customer chooses when a pool is made."""

    attended: bool
    recoverable_days: int
    etcd_binary: str
    external_store: ExternalStore | None = None
    tokens: OwnIssuer | Literal["development"] | None = "development"
    """Whose bearer tokens are accepted: a small issuer of the pool's own, the customer's, or nobody's."""
    firmware_repository: Path | None = None
    audit_failure: Literal["stop", "continue"] = "stop"
    purge_protection: bool = False
    first_user_id: int = FIRST_USER_ID
    """Of the users that the processes run as where root starts the pool."""
    administrators: tuple[str, ...] = ()
    """Object ids of further initial administrators, who present tokens."""
    traces: TraceSettings | None = None
    attestation_authorities: tuple[AttestationAuthority, ...] = ()
    """Beside the small one of the development profile."""
    keys_max: int = limits.KEYS_MAX
    versions_per_key_max: int = limits.VERSIONS_PER_KEY_MAX


@dataclass(frozen=True, slots=True)
class _Ports:
    client: int
    peer: int
    enclave: int
    node: int
    store_client: int
    store_peer: int
    tokens: int
    metrics: int
    rest: int


class _Planes:
    """The authorities, for as long as provisioning takes."""

    def __init__(self, pool_id: str) -> None:
        prefix = f"pool {pool_id[:8]}"
        self.client = Authority(f"{prefix} client plane")
        self.peer = Authority(f"{prefix} peer plane")
        self.fabric = Authority(f"{prefix} fabric plane")
        self.node = Authority(f"{prefix} node plane")
        self.store_client = Authority(f"{prefix} store clients")
        self.store_peer = Authority(f"{prefix} store members")
        self.platform = Authority(f"{prefix} platform root")
        self.owner = Authority(f"{prefix} owner root")


def is_pool(directory: Path) -> bool:
    """Return whether a directory holds a pool."""
    return (directory / "pool.json").is_file()


def pool_settings(directory: Path) -> dict[str, Any]:
    """Return what pool.json says."""
    settings: dict[str, Any] = json.loads((directory / "pool.json").read_text())
    if settings.get("format") != POOL_FORMAT:
        raise DirectoryRefused(f"{directory} holds a pool of another format")
    return settings


NODE_SETTINGS = ("node.json", "partition.json")
"""Files of each node's directory without which no pool is started."""


def lost_files(directory: Path, index: int) -> list[str]:
    """Return what is gone of a node's directory that nobody makes anew: its identities and settings."""
    node = directory / "nodes" / str(index)
    needed = [*NODE_SETTINGS, "pki", "platform", "owner"]
    if any(node.parent.glob("*/firmware")):
        needed.append("firmware/root.json")
    return [f"nodes/{index}/{name}" for name in needed if not (node / name).exists()]


def provision(directory: Path, new: NewPool) -> str:
    """Make the data directory of a new pool, all or nothing, and return the pool's id.

    Raises:
        DirectoryRefused: Something else lies there.
    """
    try:
        directory = directory.resolve()
    except RuntimeError:  # so Python 3.11 and 3.12; later ones raise an OSError where it is used
        raise DirectoryRefused(f"{directory} is a link to itself") from None
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DirectoryRefused(f"{directory} exists and is not a pool's data directory")
    if not limits.RECOVERABLE_DAYS_MIN <= new.recoverable_days <= limits.RECOVERABLE_DAYS_MAX:
        raise DirectoryRefused("a deleted key is kept for 7 to 90 days")
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = directory.with_name(f".{directory.name}.new-{secrets.token_hex(4)}")
    building.mkdir(mode=0o700)
    try:
        pool_id = _Builder(building, directory, new).build()
        if directory.exists():
            directory.rmdir()
        building.rename(directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _sync_directory(directory.parent)
    return pool_id


class _Builder:
    """Writes into ``building``, with paths as they will be in ``final``."""

    def __init__(self, building: Path, final: Path, new: NewPool) -> None:
        self._building = building
        self._final = final
        self._new = new
        self._pool_id = secrets.token_hex(16)
        self._planes = _Planes(self._pool_id)
        *ports, self._issuer_port = free_ports(_PORTS_PER_NODE * PARTITIONS + 1)
        self._ports = [
            _Ports(*ports[i * _PORTS_PER_NODE : (i + 1) * _PORTS_PER_NODE]) for i in range(PARTITIONS)
        ]

    def build(self) -> str:
        """Write everything."""
        planes = self._planes
        self._write("pki/client-ca.crt", planes.client.certificate_pem)
        self._write("pki/client-ca.key", planes.client.key_pem)
        self._write(PLATFORM_ROOT, planes.platform.certificate_pem)
        self._write(OWNER_ROOT, planes.owner.certificate_pem)
        self._directory(self._building / Path(ADMISSION_POLICY).parent)
        for name in ("administrator", "application"):
            self._identity(f"clients/{name}", planes.client, f"client/{name}", planes.client)
        for index in range(PARTITIONS):
            self._node(index)
        self._fabric()
        if self._new.tokens == "development":
            self._token_issuer()
        pool = {
            "format": POOL_FORMAT,
            "pool_id": self._pool_id,
            "attended": self._new.attended,
            "partition_count": PARTITIONS,
            "recoverable_days": self._new.recoverable_days,
            "purge_protection": self._new.purge_protection,
            "first_user_id": self._new.first_user_id,
        }
        self._write("pool.json", json.dumps(pool, indent=2).encode() + b"\n")
        return self._pool_id

    def _write(self, name: str, content: bytes) -> str:
        path = self._building / name
        self._directory(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        return str(self._final / name)

    def _directory(self, path: Path) -> None:
        """Make a directory and those above it; Path.mkdir gives its mode to the last one only."""
        for made in [*reversed(path.relative_to(self._building).parents), path.relative_to(self._building)]:
            (self._building / made).mkdir(mode=0o700, exist_ok=True)

    def _identity(
        self,
        name: str,
        issuer: Authority,
        path: str,
        trusted: Authority,
        *,
        server: bool = False,
        server_name: str = "",
    ) -> Identity:
        uri = f"spiffe://{self._pool_id}/{path}"
        certificate, key = issuer.issue(uri, server=server, server_name=server_name)
        return Identity(
            certificate_file=self._write(f"{name}.crt", certificate),
            key_file=self._write(f"{name}.key", key),
            ca_file=self._write(f"{name}-trusted.crt", trusted.certificate_pem),
        )

    def _node(self, index: int) -> None:
        planes, ports = self._planes, self._ports[index]
        base = f"nodes/{index}"
        final = self._final / base
        for directory in ("partition", "logs", "store", "audit"):
            self._directory(self._building / base / directory)
        me = f"partition/{index}"
        platform_certificate, platform_key = planes.platform.issue(
            f"spiffe://{self._pool_id}/platform/{index}", client=False, server=False
        )
        owner_certificate, owner_key = planes.owner.issue(
            f"spiffe://{self._pool_id}/{me}", client=False, server=False
        )
        partition = PartitionSettings(
            pool_id=self._pool_id,
            index=index,
            partition_count=PARTITIONS,
            data_directory=str(final / "partition"),
            client_endpoint=_local(ports.client),
            peer_endpoint=_local(ports.peer),
            enclave_endpoint=_local(ports.enclave),
            node_endpoint=_local(ports.node),
            client_plane=self._identity(f"{base}/pki/client", planes.client, me, planes.client, server=True),
            peer_plane=self._identity(f"{base}/pki/peer", planes.peer, me, planes.peer, server=True),
            fabric_plane=self._identity(
                f"{base}/pki/fabric",
                planes.fabric,
                me,
                planes.fabric,
                server=True,
                # The controller asks for it: commands say what is to be done, not to whom.
                server_name=f"partition-{index}.{self._pool_id}",
            ),
            node_plane=self._identity(f"{base}/pki/node", planes.node, me, planes.node, server=True),
            peers=tuple(
                Peer(i, _local(self._ports[i].peer), _local(self._ports[i].node))
                for i in range(PARTITIONS)
                if i != index
            ),
            store=self._store(index),
            platform=PlatformSettings(
                certificate_file=self._write(f"{base}/platform/platform.crt", platform_certificate),
                key_file=self._write(f"{base}/platform/platform.key", platform_key),
                root_certificate_file=self._write(
                    f"{base}/platform/root.crt", planes.platform.certificate_pem
                ),
                sealing_key_file=self._write(f"{base}/platform/sealing.key", secrets.token_bytes(32)),
            ),
            owner=OwnerSettings(
                certificate_file=self._write(f"{base}/owner/owner.crt", owner_certificate),
                key_file=self._write(f"{base}/owner/owner.key", owner_key),
                root_certificate_file=self._write(f"{base}/owner/root.crt", planes.owner.certificate_pem),
            ),
            admission_policy_file=str(self._final / ADMISSION_POLICY),
            sealing="none" if self._new.attended else "platform",
            recoverable_days=self._new.recoverable_days,
            purge_protection=self._new.purge_protection,
            keys_max=self._new.keys_max,
            versions_per_key_max=self._new.versions_per_key_max,
            initial_administrators=self._initial_administrators(),
            initial_assignments=tuple(
                InitialAssignment("client/application", role.role_definition_id)
                for role in (CRYPTO_USER, CRYPTO_OFFICER)
            ),
            tokens=self._tokens(ports.tokens),
            rest=self._rest(ports.rest),
            attestation_authorities=self._attestation_authorities(),
            firmware=self._firmware(base),
            audit_directory=str(final / "audit"),
            audit_failure=self._new.audit_failure,
            audit_retention_mebibytes=limits.AUDIT_RETENTION_MEBIBYTES,
            metrics_endpoint=_local(ports.metrics),
            traces=self._new.traces,
        )
        settings_file = self._write(f"{base}/partition.json", settings_module.dump(partition).encode())
        node = NodeSettings(
            pool_id=self._pool_id,
            index=index,
            data_directory=str(final),
            partition_settings_file=settings_file,
            partition_lock_file=str(final / "partition" / "lock"),
            incarnation_file=str(final / "partition" / "incarnation"),
            log_directory=str(final / "logs"),
            identity=self._identity(f"{base}/pki/agent", planes.node, f"node/{index}", planes.node),
            peer_node_endpoints=tuple(peer.node_endpoint for peer in partition.peers),
            store_member=None if self._new.external_store else self._member(index),
            firmware=partition.firmware,
        )
        self._write(f"{base}/node.json", settings_module.dump(node).encode())

    def _firmware(self, base: str) -> FirmwareSettings | None:
        repository = self._new.firmware_repository
        if repository is None:
            return None
        try:
            root = (repository / "metadata" / "1.root.json").read_bytes()
        except OSError:
            raise DirectoryRefused(f"{repository} is not a firmware repository") from None
        return FirmwareSettings(
            repository=str(repository.resolve()),
            root_file=self._write(f"{base}/firmware/root.json", root),
            directory=str(self._final / base / "firmware"),
        )

    def _store(self, index: int) -> StoreSettings:
        external = self._new.external_store
        if external:
            identity = Identity(external.certificate_file, external.key_file, external.ca_file)
            prefix = f"{STORE_PREFIX}{self._pool_id}/"
            quota_bytes = limits.STORE_QUOTA_EXTERNAL_BYTES
            return StoreSettings(external.endpoints, identity, prefix, (), quota_bytes)
        order = [index, *(i for i in range(PARTITIONS) if i != index)]
        return StoreSettings(
            endpoints=tuple(_local(self._ports[i].store_client) for i in order),
            identity=self._identity(
                f"nodes/{index}/pki/store-client",
                self._planes.store_client,
                f"partition/{index}",
                self._planes.store_client,
            ),
            prefix=f"{STORE_PREFIX}{self._pool_id}/",
            member_peer_urls=tuple(self._peer_url(i) for i in range(PARTITIONS)),
            quota_bytes=limits.STORE_QUOTA_BYTES,
        )

    def _peer_url(self, index: int) -> str:
        return f"https://{_local(self._ports[index].store_peer)}"

    def _member(self, index: int) -> StoreMemberSettings:
        base, me, planes = f"nodes/{index}", f"store/{index}", self._planes
        return StoreMemberSettings(
            binary=self._new.etcd_binary,
            name=f"member-{index}",
            data_directory=str(self._final / base / "store"),
            client_url=f"https://{_local(self._ports[index].store_client)}",
            peer_url=self._peer_url(index),
            initial_cluster=",".join(f"member-{i}={self._peer_url(i)}" for i in range(PARTITIONS)),
            cluster_token=self._pool_id,
            client_identity=self._identity(
                f"{base}/pki/store-server", planes.store_client, me, planes.store_client, server=True
            ),
            peer_identity=self._identity(
                f"{base}/pki/store-peer", planes.store_peer, me, planes.store_peer, server=True
            ),
            quota_bytes=limits.STORE_QUOTA_BYTES,
        )

    def _tokens(self, port: int) -> TokenSettings | None:
        match self._new.tokens:
            case "development":
                url = f"https://{_local(self._issuer_port)}"
                ca_file = str(self._final / "pki/client-ca.crt")
                return TokenSettings(_local(port), url, AUDIENCE, url + KEYS_PATH, ca_file)
            case OwnIssuer() as own:
                return own.settings(_local(port))
            case _:
                return None

    def _rest(self, port: int) -> RestSettings | None:
        match self._new.tokens:
            case "development":
                tenant = uuid.UUID(self._pool_id)
                return RestSettings(_local(port), f"https://{_local(self._issuer_port)}/{tenant}")
            case OwnIssuer() as own:
                return RestSettings(_local(port), own.issuer)
            case _:
                return None

    def _initial_administrators(self) -> tuple[str, ...]:
        """Return who holds ceremonies of the new pool: a certificate, and the same person's object id."""
        found = ["client/administrator", *self._new.administrators]
        if self._new.tokens == "development":
            found.append(object_id(self._pool_id, "administrator"))
        return tuple(found)

    def _attestation_authorities(self) -> tuple[AttestationAuthority, ...]:
        if self._new.tokens != "development":
            return self._new.attestation_authorities
        url = f"https://{_local(self._issuer_port)}"
        own = AttestationAuthority(
            url + attestation_authority.ISSUER_PATH,
            url + attestation_authority.KEYS_PATH,
            str(self._final / "pki/client-ca.crt"),
        )
        return (*self._new.attestation_authorities, own)

    def _token_issuer(self) -> None:
        client = self._planes.client
        issuer = TokenIssuerSettings(
            pool_id=self._pool_id,
            endpoint=_local(self._issuer_port),
            issuer=f"https://{_local(self._issuer_port)}",
            audience=AUDIENCE,
            identity=self._identity("token-issuer/issuer", client, "token-issuer", client, server=True),
        )
        self._write("token-issuer/token-issuer.json", settings_module.dump(issuer).encode())

    def _fabric(self) -> None:
        identity = self._identity("fabric/controller", self._planes.fabric, "fabric", self._planes.fabric)
        fabric = {
            "pool_id": self._pool_id,
            "partitions": [
                {"index": i, "enclave_endpoint": _local(self._ports[i].enclave)} for i in range(PARTITIONS)
            ],
            "identity": {
                "certificate_file": identity.certificate_file,
                "key_file": identity.key_file,
                "ca_file": identity.ca_file,
            },
            "data_directory": str(self._final / "fabric"),
        }
        self._write("fabric/fabric.json", json.dumps(fabric, indent=2).encode() + b"\n")


def _local(port: int) -> str:
    return f"127.0.0.1:{port}"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
