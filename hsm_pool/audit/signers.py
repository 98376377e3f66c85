"""The keys that sign the checkpoints of a pool's audit logs, certified under the root of its owner."""

from __future__ import annotations

from cryptography import x509

from hsm_pool.audit.checkpoint import CheckpointInvalid, Note, SignerKey, signer_of


class Signers:
    """Certified keys; a name may stand for several.

    Args:
        pool_id: Of the pool.
        root: Root certificate of the pool's owner.
    """

    def __init__(self, pool_id: str, root: x509.Certificate) -> None:
        self._pool_id, self._root = pool_id, root
        self._keys: dict[str, list[SignerKey]] = {}

    def trust(self, key: SignerKey) -> None:
        """Take a key.

        Raises:
            CheckpointInvalid: It is no key of a partition of this pool.
        """
        known = self._keys.setdefault(key.name, [])
        if key not in known:
            key.check(self._root, self._pool_id)
            known.append(key)

    def any(self) -> bool:
        """Return whether any key is certified."""
        return any(self._keys.values())

    def of_line(self, line: str) -> SignerKey:
        """Return the key of a signature line: a name may have several, which the id tells apart.

        Raises:
            CheckpointInvalid: No key of this name is certified.
        """
        known = self._keys.get(signer_of(line))
        if not known:
            raise CheckpointInvalid(f"nothing certifies the signer {signer_of(line)[:100]}")
        return next((key for key in known if key.is_named_by(line)), known[0])

    def repeated_names(self) -> dict[str, int]:
        """Return the names of several keys, and how many."""
        return {name: len(keys) for name, keys in self._keys.items() if len(keys) > 1}

    def check_note(self, note: Note, partition: int) -> dict[int, int]:
        """Check the signature of a partition's log and all cosignatures.

        Returns:
            When each partition that cosigned says it did, in seconds since 1970.

        Raises:
            CheckpointInvalid: One does not fit, or is of a key that nothing certifies.
        """
        own = f"{self._pool_id}/partition/{partition}/"
        if not note.signatures or not signer_of(note.signatures[0]).startswith(own):
            raise CheckpointInvalid(f"checkpoint {note.checkpoint.number} is not signed by its partition")
        self.of_line(note.signatures[0]).verify(note.checkpoint, note.signatures[0])
        cosigned = {}
        for line in note.signatures[1:]:
            if signer_of(line).startswith(own):
                raise CheckpointInvalid("a partition has cosigned its own checkpoint")
            key = self.of_line(line)
            cosigned[key.partition] = key.verify_cosignature(note.checkpoint, line)
        return cosigned
