"""An audit log's files, page by page: what a partition sends is what lies on its disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hsm_pool import limits
from hsm_pool.audit import files
from hsm_pool.errors import AuditRecordNotFound, InvalidField

_TOKEN = re.compile(r"(checkpoints-\d{16}\.jsonl|records-\d{16}\.jsonl|peers\.json):(\d{1,18})")


@dataclass(frozen=True, slots=True)
class ExportPage:
    """Octets of one file, and where the next page begins."""

    file_name: str
    content: bytes
    next_token: str
    bytes_left: int


def peers_page(directory: Path, token: str) -> ExportPage:
    """Return a page of what the partition knows of the others' logs."""
    path = directory / files.PEERS
    return _page([path] if path.exists() else [], token)


def log_page(directory: Path, token: str) -> ExportPage:
    """Return a page of the log: checkpoints first, so that no checkpoint is ahead of the records."""
    # Listed last, so that they cover the removal of any file of records that is not in the list.
    records = files.listed(directory, files.RECORDS)
    return _page([*files.listed(directory, files.CHECKPOINTS), *records], token)


def _page(paths: list[Path], token: str) -> ExportPage:
    if not paths:
        return ExportPage("", b"", "", 0)
    name, offset = _parse(token) if token else (paths[0].name, 0)
    names = [path.name for path in paths]
    if name not in names:
        raise AuditRecordNotFound("the file that the page token names is not kept any more")
    position = names.index(name)
    path = paths[position]
    with path.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(limits.AUDIT_PAGE_BYTES)
    if path.name != files.PEERS:
        # A line that is being written is not part of the log yet.
        content = content[: content.rfind(b"\n") + 1]
    ended = len(content) == 0 or offset + len(content) >= path.stat().st_size
    following = paths[position + 1 :]
    left = max(0, path.stat().st_size - offset - len(content)) if not ended else 0
    left += sum(other.stat().st_size for other in following)
    if not ended:
        next_token = f"{name}:{offset + len(content)}"
    else:
        next_token = f"{following[0].name}:0" if following else ""
    return ExportPage(name, content, next_token, left)


def _parse(token: str) -> tuple[str, int]:
    found = _TOKEN.fullmatch(token)
    if found is None:
        raise InvalidField("the page token is not valid", field="page_token")
    return found[1], int(found[2])
