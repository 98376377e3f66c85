"""Partitions that can make evidence, and forgers with any of their keys; the roots are the test's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from hsm_pool.enclave import admission
from hsm_pool.enclave.claims import Claims, DebugStatus
from hsm_pool.enclave.evidence import Attester, Signer, certificate_key
from hsm_pool.enclave.verifier import TrustAnchors, Verifier
from hsm_pool.provisioning.pki import Authority
from hsm_pool.settings import Identity, OwnerSettings, PlatformSettings
from mhsm.evidence.v1 import evidence_pb2
from tests.unit.provisioning.test_settings import PARTITION

POOL = "0" * 32
BOOT_COUNT = 4


def signer(root: Authority, uri: str) -> Signer:
    """Return a new key that a root certified for a name."""
    return Signer(*root.issue(uri, client=False))


@dataclass(frozen=True, slots=True)
class Node:
    """A partition of a pool with the keys of its node, in the hands of the test."""

    attester: Attester
    platform: Signer
    owner: Signer
    tls_key: bytes
    """SubjectPublicKeyInfo of its peer-plane certificate."""

    def signed(self, claims: bytes) -> evidence_pb2.Evidence:
        """Return what the node's keys sign, whatever it is."""
        return evidence_pb2.Evidence(
            platform_token=self.platform.token(claims), owner_token=self.owner.token(claims)
        )

    def changed(self, evidence: evidence_pb2.Evidence, **changes: object) -> evidence_pb2.Evidence:
        """Return evidence signed by this node with some claims changed: what honest hardware would say."""
        return self.signed(dataclasses.replace(claims_of(evidence), **changes).encode())  # type: ignore[arg-type]


class TestPool:
    """Roots, three partitions, and a verifier with the default policy."""

    __test__ = False

    def __init__(self, directory: Path, pool_id: str = POOL) -> None:
        self.pool_id = pool_id
        self.platform_root, self.owner_root = Authority("platform root"), Authority("owner root")
        self.anchors = TrustAnchors(
            *(
                x509.load_pem_x509_certificate(root.certificate_pem)
                for root in (self.platform_root, self.owner_root)
            )
        )
        self.verifier = Verifier(self.anchors, admission.load(None))
        self.nodes = [self._node(directory / str(index), index) for index in range(3)]

    def _node(self, directory: Path, index: int) -> Node:
        directory.mkdir(parents=True)
        peers = Authority("peer plane")
        uri = f"spiffe://{self.pool_id}/partition/{index}"

        def write(name: str, issued: tuple[bytes, bytes]) -> tuple[str, str]:
            for suffix, octets in zip(("crt", "key"), issued, strict=True):
                (directory / f"{name}.{suffix}").write_bytes(octets)
            return str(directory / f"{name}.crt"), str(directory / f"{name}.key")

        (directory / "root.crt").write_bytes(self.owner_root.certificate_pem)
        (directory / "platform-root.crt").write_bytes(self.platform_root.certificate_pem)
        platform = write("platform", self.platform_root.issue(f"spiffe://{self.pool_id}/platform/{index}"))
        owner = write("owner", self.owner_root.issue(uri))
        tls = write("peer", peers.issue(uri, server=True))
        client = write("client", peers.issue(uri, server=True))
        settings = dataclasses.replace(
            PARTITION,
            pool_id=self.pool_id,
            index=index,
            platform=PlatformSettings(*platform, str(directory / "platform-root.crt"), "/sealing"),
            owner=OwnerSettings(*owner, str(directory / "root.crt")),
            peer_plane=Identity(*tls, "/ca"),
            client_plane=Identity(*client, "/ca"),
        )
        attester = Attester(settings, BOOT_COUNT, debug=lambda: DebugStatus.DISABLED_SINCE_BOOT)
        return Node(
            attester, Signer.load(*platform), Signer.load(*owner), certificate_key(Path(tls[0]).read_bytes())
        )


def claims_of(evidence: evidence_pb2.Evidence) -> Claims:
    """Return the claims of evidence, unverified."""
    import cbor2

    return Claims.decode(cbor2.loads(evidence.platform_token).value[2])
