"""Recovering the security domain from submissions, in a process that exits afterwards (G4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from security_domain import container, shares
from security_domain.domain import Core, share_out
from security_domain.encoding import bind, decode, parse_object
from security_domain.errors import SUBMITTED_BEFORE, InvalidFile, QuorumMissing, SubmissionRefused
from security_domain.secret import Secret
from security_domain.submission import RECOVERY, Context, open_submission, public_exchange_key
from security_domain.wrapping import SUITE, open_payload

SUBMISSIONS_MAX = 64
_PAYLOAD_FIELDS: dict[str, type] = {"pool_id": str, "generation": int, "root": str, "owner_key": str}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a recovery is."""

    accepted: int
    required: int
    complete: bool


def _pool_keys_info(pool_id: str, generation: int, epoch: int) -> bytes:
    return bind("mhsm-sd/pool-keys/v1", pool_id, generation, epoch)


def seal_pool_keys(
    recovery_public_key: bytes, pool_id: str, generation: int, epoch: int, plaintext: bytes
) -> bytes:
    """Encrypt a pool's keys to the security domain: only a quorum opens them again.

    Args:
        recovery_public_key: X25519, 32 bytes, of the security domain.
        pool_id: Bound, with the generation and the epoch.
        generation: Of the security domain.
        epoch: Of the keys.
        plaintext: The keys.

    Returns:
        HPKE encapsulated key and ciphertext (RFC 9180).

    Raises:
        InvalidFile: The key is not a usable X25519 key.
    """
    try:
        key = X25519PublicKey.from_public_bytes(recovery_public_key)
        return SUITE.encrypt(plaintext, key, _pool_keys_info(pool_id, generation, epoch))
    except ValueError:
        raise InvalidFile("the recovery key is not an X25519 key") from None


class Recovery:
    """One attempt: takes submissions until enough shares are in.

    Args:
        file: The security-domain file whose officers submit.
        attempt_id: 16 bytes.
        exchange_key: Of the attempt; a new one by default.
        everyone: Whether all officers are needed, not just a quorum: so each proves that he can
            open his share before anything depends on it.
        purpose: What the shares are for; those that were given for something else are refused.
        detail: Of the purpose, as :class:`~security_domain.submission.Context` says.

    Raises:
        InvalidFile: The file is not a security domain.
        SubmissionRefused: The attempt id does not have 16 bytes.
    """

    def __init__(
        self,
        file: bytes,
        attempt_id: bytes,
        exchange_key: X25519PrivateKey | None = None,
        *,
        everyone: bool = False,
        purpose: str = RECOVERY,
        detail: bytes = b"",
    ) -> None:
        self._domain = container.parse(file)
        self._exchange_key = exchange_key or X25519PrivateKey.generate()
        self._context = Context(
            attempt_id,
            public_exchange_key(self._exchange_key),
            purpose,
            detail,
            pool_id=self._domain.pool_id,
            generation=self._domain.generation,
        )
        self._mnemonics: dict[str, Secret] = {}
        self._submissions = 0
        self._core: Core | None = None
        self.needed = len(self._domain.officers) if everyone else self._domain.required

    @property
    def exchange_public_key(self) -> bytes:
        """The key to which officers encrypt, 32 bytes; new for each attempt."""
        return self._context.exchange_public_key

    @property
    def generation(self) -> int:
        """Of the file whose officers submit."""
        return self._domain.generation

    @property
    def accepted_officers(self) -> list[str]:
        """Thumbprints of the officers whose shares were accepted, in their order."""
        return list(self._mnemonics)

    def accept(self, core: Core) -> None:
        """Take the domain's core from elsewhere than shares: from a restore blob.

        Raises:
            SubmissionRefused: The quorum is complete already.
            InvalidFile: It is of another domain.
        """
        if self._core is not None:
            raise SubmissionRefused("the quorum is complete")
        core.check(self._domain)
        self._core = core

    def next_phase(self, officer_certificates_der: Sequence[bytes], required: int) -> tuple[bytes, Recovery]:
        """Share the opened domain out anew, and collect a quorum of the new shares.

        Returns:
            (new file, recovery that takes its officers' submissions under the same exchange key).

        Raises:
            QuorumMissing: The quorum is not complete.
            InvalidOfficers: The new officers or their quorum are not acceptable.
        """
        file = share_out(self.opened(), self._domain.sharing + 1, officer_certificates_der, required)
        context = self._context
        return file, Recovery(
            file,
            context.attempt_id,
            self._exchange_key,
            purpose=context.purpose,
            detail=context.detail,
        )

    def submit(self, submission: bytes) -> Progress:
        """Take one officer's submission; a refused one changes nothing.

        Raises:
            SubmissionRefused: Malformed, not signed, of another attempt, repeated, or one too many.
            ShareRefused: The share is not the one the officer was given; names him.
            InvalidFile: All shares are right and the payload does not open: the file was changed.
        """
        self._submissions += 1
        if self._submissions > SUBMISSIONS_MAX:
            raise SubmissionRefused(f"more than {SUBMISSIONS_MAX} submissions in one attempt")
        if self._core is not None:
            raise SubmissionRefused("the quorum is complete")
        entry, mnemonic = open_submission(submission, self._domain, self._context, self._exchange_key)
        if entry.thumbprint in self._mnemonics:
            raise SubmissionRefused(SUBMITTED_BEFORE, entry.thumbprint)
        accepted = {**self._mnemonics, entry.thumbprint: Secret(mnemonic.encode())}
        complete = len(accepted) == self.needed
        if complete:
            self._core = self._open_all([words.reveal().decode() for words in accepted.values()])
            for words in accepted.values():
                words.wipe()
        self._mnemonics = accepted
        return Progress(len(accepted), self.needed, complete)

    def unseal_pool_keys(self, sealed: bytes, epoch: int) -> bytes:
        """Open what :func:`seal_pool_keys` sealed.

        Raises:
            QuorumMissing: The quorum is not complete.
            InvalidFile: It was sealed for another pool, generation or epoch.
        """
        recovery_key = self.opened().derived.recovery
        info = _pool_keys_info(self._domain.pool_id, self._domain.generation, epoch)
        try:
            return SUITE.decrypt(sealed, recovery_key, info)
        except Exception:  # noqa: BLE001 - HPKE raises several kinds
            raise InvalidFile("the pool keys do not open with this security domain") from None

    def backup_private_key(self) -> Secret:
        """Return the key that opens backups taken under this security domain.

        Raises:
            QuorumMissing: The quorum is not complete.
        """
        return Secret(self.opened().derived.backup.private_bytes_raw())

    def opened(self) -> Core:
        """Return what the quorum has opened.

        Raises:
            QuorumMissing: The quorum is not complete.
        """
        if self._core is None:
            raise QuorumMissing("the quorum is not complete")
        return self._core

    def _open_all(self, mnemonics: list[str]) -> Core:
        """Open the payload with as many quorums as it takes to use every share."""
        required = self._domain.required
        starts = range(len(mnemonics) - required + 1)
        return [self._open(mnemonics[start : start + required]) for start in starts][-1]

    def _open(self, mnemonics: list[str]) -> Core:
        domain = self._domain
        key = shares.combine(mnemonics, domain.required)
        try:
            opened = open_payload(key, domain.payload, domain.header())
        finally:
            key.wipe()
        payload = parse_object(opened, container.FILE_BYTES_MAX, _PAYLOAD_FIELDS)
        core = Core(
            payload["pool_id"],
            payload["generation"],
            Secret(decode(payload["root"], 32)),
            Secret(decode(payload["owner_key"])),
        )
        core.check(domain)
        return core
