"""Recovering the security domain from shares of Azure's format, submitted one by one (G4)."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from security_domain.azure import document as azure_document
from security_domain.azure import domain as azure_domain
from security_domain.azure.submission import Context, open_submission
from security_domain.domain import Core
from security_domain.errors import SUBMITTED_BEFORE, QuorumMissing, SubmissionRefused
from security_domain.recovery import SUBMISSIONS_MAX, Progress
from security_domain.secret import Secret
from security_domain.submission import RECOVERY, public_exchange_key


class AzureRecovery:
    """One attempt: takes submissions until a quorum of a document's shares is in.

    Args:
        document: The security-domain document.
        attempt_id: 16 bytes.
        exchange_key: Of the attempt.
        purpose: What the shares are for; those that were given for something else are refused.
        detail: Of the purpose.

    Raises:
        InvalidFile: It is not a security-domain document.
        SubmissionRefused: The attempt id does not have 16 bytes.
    """

    def __init__(
        self,
        document: bytes,
        attempt_id: bytes,
        exchange_key: X25519PrivateKey,
        *,
        purpose: str = RECOVERY,
        detail: bytes = b"",
    ) -> None:
        self._document = azure_document.parse(document)
        self._exchange_key = exchange_key
        self._context = Context(
            attempt_id,
            public_exchange_key(exchange_key),
            purpose,
            detail,
            document_digest=self._document.digest,
        )
        self._shares: dict[str, Secret] = {}
        self._submissions = 0
        self._opened: tuple[Core, bytes] | None = None
        self.needed = self._document.required

    @property
    def exchange_public_key(self) -> bytes:
        """The key to which officers encrypt, 32 bytes."""
        return self._context.exchange_public_key

    @property
    def accepted_officers(self) -> list[str]:
        """Thumbprints of the officers whose shares were accepted, in their order."""
        return list(self._shares)

    def submit(self, submission: bytes) -> Progress:
        """Take one officer's submission; a refused one changes nothing.

        Raises:
            SubmissionRefused: Malformed, not signed, of another attempt, repeated, or one too many.
            ShareRefused: The share is not the one the officer was given; names him.
            InvalidShare: Two shares have the same number: the document was changed.
            InvalidFile: All shares are right and an item does not open: the document was changed.
        """
        self._submissions += 1
        if self._submissions > SUBMISSIONS_MAX:
            raise SubmissionRefused(f"more than {SUBMISSIONS_MAX} submissions in one attempt")
        if self._opened is not None:
            raise SubmissionRefused("the quorum is complete")
        officer, share = open_submission(submission, self._document, self._context, self._exchange_key)
        if officer in self._shares:
            raise SubmissionRefused(SUBMITTED_BEFORE, officer)
        accepted = {**self._shares, officer: share}
        complete = len(accepted) == self.needed
        if complete:
            items = azure_document.open_items(self._document, list(accepted.values()))
            self._opened = azure_domain.open_core(items)
            for secret in (*accepted.values(), *(item.plaintext for item in items)):
                secret.wipe()
        self._shares = accepted
        return Progress(len(accepted), self.needed, complete)

    def opened(self) -> tuple[Core, bytes]:
        """Return (core, our own file) that the quorum has opened.

        Raises:
            QuorumMissing: The quorum is not complete.
        """
        if self._opened is None:
            raise QuorumMissing("the quorum is not complete")
        return self._opened
