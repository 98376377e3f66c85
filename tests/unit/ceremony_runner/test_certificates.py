"""Who may sign a transcript: an identity whose certificate the authority has issued (G7)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hsm_pool.ceremony_runner.transcript import Identity, administrator_uri
from hsm_pool.ceremony_runner.verification import TranscriptRefused, verify
from tests.unit.ceremony_runner.rehearsal import POOL_ID, Administrator, made_transcript

DAY = timedelta(days=1)
NO_USAGE = x509.KeyUsage(False, False, False, False, False, False, False, False, False)
SIGNS = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
ISSUES = x509.KeyUsage(False, False, False, False, False, True, True, False, False)


@dataclass(frozen=True)
class Made:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def make(
    name: str,
    issuer: Made | None = None,
    *,
    ca: bool | None = False,
    usage: x509.KeyUsage | None = SIGNS,
    before: timedelta = -DAY,
    after: timedelta = DAY,
) -> Made:
    """Make a certificate of the administrator's name, by default as a pool's authority would.

    Args:
        name: Common name.
        issuer: Who signs; itself if None.
        ca: What the basic constraints say; None leaves them out.
        usage: What the key is for; None leaves it out.
        before: From when it is valid, from now.
        after: Until when, from now.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer.certificate.subject if issuer else subject, subject, key.public_key()
    )
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now + before).not_valid_after(now + after)
    uri = x509.UniformResourceIdentifier(administrator_uri(POOL_ID))
    builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    if usage is not None:
        builder = builder.add_extension(usage, critical=True)
    return Made(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def signed_by(made: Made, directory: Path) -> bytes:
    """Return a transcript of three steps that this certificate's key has signed."""
    octets = made_transcript(directory / "transcript.json", Identity(made.certificate, made.key))
    assert not verify(octets).certificate_checked, "without the authority any certificate shows integrity"
    return octets


def authority(**changed: object) -> Made:
    """Return a self-signed authority, unless something is changed."""
    return make("authority", **{"ca": True, "usage": ISSUES, **changed})  # type: ignore[arg-type]


def test_what_the_authority_has_issued_to_an_identity_counts(tmp_path: Path) -> None:
    """The control of what follows: nothing is wrong with certificates that are made here."""
    root = authority()
    assert verify(signed_by(make("administrator", root), tmp_path), root.pem).certificate_checked


def test_an_identity_issues_no_certificates(administrator: Administrator, ca: bytes, tmp_path: Path) -> None:
    """Whoever has a certificate of the pool makes himself no administrator, whichever of the two is shown."""
    pem, key_pem = administrator.authority.issue(f"spiffe://{POOL_ID}/client/application")
    key = serialization.load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    application = Made(x509.load_pem_x509_certificate(pem), key)
    forged = signed_by(make("administrator", application), tmp_path)
    with pytest.raises(TranscriptRefused, match="not issued by this authority"):
        verify(forged, ca)
    for shown in (application.pem, application.pem + ca):  # the first certificate of a file counts
        with pytest.raises(TranscriptRefused, match="not issued by an authority"):
            verify(forged, shown)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ca": False}, "not issued by an authority to an identity"),
        ({"ca": None}, "not readable"),
        ({"usage": None}, "not readable"),
        ({"usage": SIGNS}, "not meant for"),
        ({"usage": NO_USAGE}, "not meant for"),
        ({"after": -DAY / 2}, "not valid at the time"),
        ({"before": DAY / 2}, "not valid at the time"),
    ],
    ids=["no authority", "silent", "no usage", "signs data", "for nothing", "expired", "not yet valid"],
)
def test_an_authority_that_may_not_issue_is_none(
    changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    root = authority(**changed)
    with pytest.raises(TranscriptRefused, match=said):
        verify(signed_by(make("administrator", root), tmp_path), root.pem)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ca": True}, "not issued by an authority to an identity"),
        ({"ca": None}, "not readable"),
        ({"usage": None}, "not readable"),
        ({"usage": ISSUES}, "not meant for"),
        ({"usage": NO_USAGE}, "not meant for"),
        ({"after": -DAY / 2}, "not valid at the time"),
        ({"before": DAY / 2}, "not valid at the time"),
    ],
    ids=["an authority", "silent", "no usage", "issues", "for nothing", "expired", "not yet valid"],
)
def test_a_certificate_that_may_not_sign_signs_nothing(
    changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    root = authority()
    made = make("administrator", root, **changed)  # type: ignore[arg-type]
    with pytest.raises(TranscriptRefused, match=said):
        verify(signed_by(made, tmp_path), root.pem)


def test_another_authority_of_the_same_name_is_not_this_one(tmp_path: Path) -> None:
    ours, theirs = authority(), authority()
    with pytest.raises(TranscriptRefused, match="not issued by this authority"):
        verify(signed_by(make("administrator", theirs), tmp_path), ours.pem)
    with pytest.raises(TranscriptRefused, match="an authority to an identity"):
        verify(signed_by(ours, tmp_path), ours.pem)  # an authority signs no transcripts
