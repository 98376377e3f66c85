"""A security domain of ours in Azure's format: what its items hold.

The document carries the domain's core, and our own file in pieces. So a restore blob, which
knows nothing of officers, brings the file along whose officers open the domain later.
"""

from __future__ import annotations

from collections.abc import Sequence

from security_domain import container
from security_domain.azure import document
from security_domain.azure.items import Item
from security_domain.domain import Core
from security_domain.encoding import canonical, decode, encode, parse_object
from security_domain.errors import InvalidFile
from security_domain.secret import Secret

CORE_TAG = "mhsm_core"
FILE_TAG = "mhsm_file"
_PIECE_BYTES = 24 * 1024
_CORE_BYTES_MAX = 4096
_CORE_FIELDS: dict[str, type] = {"pool_id": str, "generation": int, "root": str, "owner_key": str}


def make(core: Core, file: bytes, officer_certificates_der: Sequence[bytes], required: int) -> bytes:
    """Return the document of a domain, for the same officers and quorum as its own file.

    Raises:
        InvalidOfficers: The officers or the quorum are not acceptable.
        InvalidFile: The file is too large for Azure's format.
    """
    fields = {
        "pool_id": core.pool_id,
        "generation": core.generation,
        "root": encode(core.root.reveal()),
        "owner_key": encode(core.owner_key.reveal()),
    }
    items = [Item(CORE_TAG, Secret(canonical(fields)))]
    for number, start in enumerate(range(0, len(file), _PIECE_BYTES)):
        items.append(Item(f"{FILE_TAG}_{number}", Secret(file[start : start + _PIECE_BYTES])))
    try:
        return document.make(items, officer_certificates_der, required)
    finally:
        for item in items:
            item.plaintext.wipe()


def open_core(items: Sequence[Item]) -> tuple[Core, bytes]:
    """Return (core, our own file) of the items that a restore blob or a quorum gave.

    Raises:
        InvalidFile: They are not those of a domain of ours, or do not belong together.
    """
    held = {item.tag: item.plaintext for item in items}
    core_item = held.pop(CORE_TAG, None)
    if core_item is None or set(held) != {f"{FILE_TAG}_{number}" for number in range(len(held))}:
        raise InvalidFile("the items are not those of a security domain of this kind of pool")
    fields = parse_object(core_item.reveal(), _CORE_BYTES_MAX, _CORE_FIELDS)
    file = b"".join(held[f"{FILE_TAG}_{number}"].reveal() for number in range(len(held)))
    domain = container.parse(file)
    core = Core(
        fields["pool_id"],
        fields["generation"],
        Secret(decode(fields["root"], 32)),
        Secret(decode(fields["owner_key"])),
    )
    core.check(domain)
    return core, file
