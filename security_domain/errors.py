"""Errors of the security domain. Each message is safe to show: none holds a value."""

from __future__ import annotations

SUBMITTED_BEFORE = "this officer's share was submitted before"
NO_OFFICER = "the submission is of no officer of this security domain"
OTHER_FORMAT = "this attempt takes shares of the other format"
OTHER_SHARE = "the share is not the one this officer was given"
"""Why a submission was refused, where another step follows than that its officer submits again."""


class SecurityDomainError(Exception):
    """Base of all errors here."""


class InvalidFile(SecurityDomainError):
    """The file is not a security domain, or was changed."""


class InvalidOfficers(SecurityDomainError):
    """The officers or the quorum are not acceptable."""


class InvalidShare(SecurityDomainError):
    """A share is malformed."""


class QuorumMissing(SecurityDomainError):
    """Fewer shares than the quorum were accepted."""


class SubmissionRefused(SecurityDomainError):
    """A submission was refused before its share was looked at.

    Args:
        message: Why.
        officer: Thumbprint of the officer it claims to be from, "" when it names none.
    """

    def __init__(self, message: str, officer: str = "") -> None:
        super().__init__(f"{message} (officer {officer})" if officer else message)
        self.officer = officer


class ShareRefused(SubmissionRefused):
    """The share in a submission is not the one that this officer was given."""
