"""The routes of the security domain, as ``az keyvault security-domain`` calls them.

Source: Azure Key Vault REST API, security domain (7.2 and later). The poller of az and of the
official SDK needs the header azure-asyncoperation, and takes the domain from the first answer.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import Any, Final

from hsm_pool.errors import CeremonyState, InvalidField
from hsm_pool.net.interceptors import current_access
from hsm_pool.partition.ceremonies import Ceremonies
from hsm_pool.partition.ceremony_attempts import Ceremony, Purpose
from hsm_pool.partition.partition import Partition, PartitionState
from hsm_pool.partition.unproved_download import UnprovedDownload
from hsm_pool.rest.call import Answer, Call, Route
from security_domain.azure.items import DOCUMENT_BYTES_MAX
from security_domain.officers import CERTIFICATE_BYTES_MAX, OFFICERS_MAX

_SERVICE: Final = "/mhsm.security_domain.v1.SecurityDomainService/"
_DOWNLOAD: Final = "/securitydomain/download"
_UPLOAD: Final = "/securitydomain/upload"
_POLL_SOON: Final = {"Retry-After": "1"}
"""Without it clients wait half a minute. 0 would be taken for none."""
_REQUIRED_DEFAULT: Final = 2


class SecurityDomainRoutes:
    """Download, transfer key, upload, and the status of both."""

    def __init__(self, partition: Partition, ceremonies: Ceremonies) -> None:
        self._partition = partition
        self._ceremonies = ceremonies
        self._downloads = UnprovedDownload(partition, ceremonies)

    def routes(self) -> Sequence[Route]:
        """Return all routes."""
        return (
            Route("POST", _DOWNLOAD, _SERVICE + "DownloadSecurityDomain", self._download),
            Route("GET", f"{_DOWNLOAD}/pending", _SERVICE + "GetCeremony", self._download_pending),
            Route("GET", _UPLOAD, _SERVICE + "InitRecovery", self._transfer_key),
            Route("POST", _UPLOAD, _SERVICE + "UploadRestoreBlob", self._upload),
            Route("GET", f"{_UPLOAD}/pending", _SERVICE + "GetCeremony", self._upload_pending),
        )

    def _download(self, call: Call) -> Answer:
        body = call.body()
        certificates, required = _certificates(body.get("certificates")), body.get("required")
        if required is None:
            required = _REQUIRED_DEFAULT
        if not isinstance(required, int) or isinstance(required, bool) or not 0 <= required <= OFFICERS_MAX:
            raise InvalidField("required is no quorum of these certificates", field="required")
        call.url(_DOWNLOAD)  # refused now, not when the domain is made
        made = self._downloads.download(certificates, required, current_access(), call.until)
        pending = call.url(f"{_DOWNLOAD}/pending", generation=made.generation)
        return Answer(
            {"value": made.azure_security_domain_file.decode()},
            202,
            {"azure-asyncoperation": pending, **_POLL_SOON},
        )

    def _download_pending(self, call: Call) -> Answer:
        """Confirm a download, or say that it is confirmed: the first answer is always InProgress."""
        pending = call.url(f"{_DOWNLOAD}/pending")
        if self._downloads.confirm(call.number("generation"), current_access(), call.until):
            return _status("Success", "The resource is active.", pending)
        return _status("InProgress", "The Security Domain is being confirmed.", pending)

    def _transfer_key(self, call: Call) -> Answer:
        """Begin a recovery, or show the key of the one under way: a GET may be repeated."""
        del call
        recovery = self._recovery() or self._ceremonies.init_recovery()
        return Answer({"key_format": "jwk", "transfer_key": recovery.transfer_key})

    def _upload(self, call: Call) -> Answer:
        blob = call.body().get("value")
        if not isinstance(blob, str):
            raise InvalidField("value is a text: the restore blob", field="value")
        try:
            octets = blob.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can write
            raise InvalidField("value is no text of Unicode", field="value") from None
        if len(octets) > DOCUMENT_BYTES_MAX:
            raise InvalidField("the restore blob is too large", field="value")
        recovery = self._recovery()
        if recovery is None:
            raise CeremonyState("no transfer key was asked of this partition, or its time is over")
        pending = call.url(f"{_UPLOAD}/pending")
        self._ceremonies.upload_restore_blob(recovery.attempt_id, octets, current_access())
        return _status("InProgress", "The Security Domain is being restored.", pending, 202)

    def _upload_pending(self, call: Call) -> Answer:
        pending = call.url(f"{_UPLOAD}/pending")
        state = self._partition.state
        if state in {PartitionState.SERVING, PartitionState.DRAINED}:
            return _status("Success", "The resource is active.", pending)
        if state in {PartitionState.STARTING, PartitionState.HEALING} or self._recovery():
            return _status("InProgress", "The Security Domain is being restored.", pending)
        raise CeremonyState("no upload is under way at this partition")

    def _recovery(self) -> Ceremony | None:
        """Return the recovery under way at this partition, if it takes a restore blob."""
        found = self._ceremonies.current()
        return found if found and found.purpose is Purpose.RECOVERY and found.transfer_key else None


def _status(status: str, details: str, pending: str, http_status: int = 200) -> Answer:
    headers = {"azure-asyncoperation": pending} | (_POLL_SOON if status == "InProgress" else {})
    return Answer({"status": status, "status_details": details}, http_status, headers)


def _certificates(entries: Any) -> list[bytes]:
    """Return the officers' certificates, DER, of their JWKs.

    Raises:
        InvalidField: They are none.
    """
    if not isinstance(entries, list) or len(entries) > OFFICERS_MAX:
        raise InvalidField("certificates is a list of up to ten JWKs", field="certificates")
    return [_certificate(entry) for entry in entries]


def _certificate(entry: Any) -> bytes:
    """Return the certificate of one JWK; of all its members only x5c and x5t#S256 are looked at."""
    chain = entry.get("x5c") if isinstance(entry, dict) else None
    text = chain[0] if isinstance(chain, list) and chain else None
    if not isinstance(text, str) or len(text) > 2 * CERTIFICATE_BYTES_MAX:
        raise InvalidField("a certificate stands in x5c, base64 of DER", field="certificates")
    try:
        der = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidField("a certificate stands in x5c, base64 of DER", field="certificates") from None
    thumbprint = base64.urlsafe_b64encode(hashlib.sha256(der).digest()).rstrip(b"=").decode()
    if len(der) > CERTIFICATE_BYTES_MAX or entry.get("x5t#S256", thumbprint) != thumbprint:
        raise InvalidField("a certificate is too large, or not that of its thumbprint", field="certificates")
    return der
