"""Azure's names of key types, curves and key operations, as callers of the client library write them.

Every function takes a name or the number that the contract has for it, and raises InvalidField for a
name that is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hsm_pool.core.model import Curve, KeyOperation, KeyType
from hsm_pool.errors import InvalidField

_TYPES = {key_type.azure_name: key_type for key_type in KeyType}
_CURVES = {curve.azure_name: curve for curve in Curve if curve is not Curve.NONE}
_OPERATIONS = {operation.azure_name: operation for operation in KeyOperation}


def key_type(given: str | int) -> int:
    """Return the key type of RSA, EC, oct or AKP, with or without -HSM: all keys are in the pool."""
    return _value(_TYPES, given.removesuffix("-HSM") if isinstance(given, str) else given, "key_type")


def curve(given: str | int) -> int:
    """Return the curve of P-256, P-384, P-521 or P-256K."""
    return _value(_CURVES, given, "curve")


def key_operations(given: Iterable[str | int]) -> list[int]:
    """Return the operations of names such as sign and wrapKey."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InvalidField("key_operations is a list of names, not one name", field="key_operations")
    return [_value(_OPERATIONS, operation, "key_operations") for operation in given]


def _value(names: Mapping[str, int], given: str | int, field: str) -> int:
    if not isinstance(given, str):
        return given
    if given not in names:
        raise InvalidField(f"{field}: {given!r} is none of {', '.join(names)}", field=field)
    return names[given]
