"""What callers of the client library pass: Azure's names are taken, and all else is refused by name (G8)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from hsm_pool.client import backup_calls, calls, key_names, role_calls
from hsm_pool.client.aio import AsyncPool
from hsm_pool.client.errors import CallIndefinite, PoolClosed
from hsm_pool.client.pool import Pool
from hsm_pool.errors import InvalidField
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2
from tests.unit.client.protocol_server import Servers

AES: dict[str, Any] = {"key_type": "oct", "size_bits": 256}


SECURE = ["secureWrapKey", "secureUnwrapKey"]
NAMES = {
    key_names.key_type: (keys_pb2.KeyType, ["RSA", "EC", "oct", "AKP"]),
    key_names.curve: (keys_pb2.Curve, ["P-256", "P-384", "P-521", "P-256K"]),
    lambda name: key_names.key_operations([name])[0]: (
        keys_pb2.KeyOperation,
        ["encrypt", "decrypt", "sign", "verify", "wrapKey", "unwrapKey", "import", *SECURE],
    ),
}


@pytest.mark.parametrize("value_of", NAMES, ids=["key type", "curve", "operation"])
def test_the_names_are_those_of_azure_and_the_values_those_of_the_contract(value_of: Any) -> None:
    """All of them: what the contract gets has a name here."""
    kind, names = NAMES[value_of]
    assert [value_of(name) for name in names] == kind.values()[1:]  # without UNSPECIFIED


@pytest.mark.parametrize("name", ["RSA", "EC", "oct", "AKP"])
def test_a_key_type_is_a_name_of_azure_or_a_value(name: str) -> None:
    """RSA-HSM is what Managed HSM answers and what its users write."""
    value = getattr(keys_pb2, f"KEY_TYPE_{name.upper()}")
    for given in (name, f"{name}-HSM", value):
        request = calls.create_key("k", key_type=given, curve="P-256K").request
        assert (request.key_type, request.curve) == (value, keys_pb2.CURVE_P256K)


def test_operations_are_names_of_azure_or_values() -> None:
    wanted = [keys_pb2.KEY_OPERATION_WRAP_KEY, keys_pb2.KEY_OPERATION_SIGN]
    for given in (["wrapKey", "sign"], wanted, ["wrapKey", keys_pb2.KEY_OPERATION_SIGN]):
        assert calls.create_key("k", **AES, key_operations=given).request.key_operations == wanted
        assert calls.import_key("k", octets=b"x", key_operations=given).request.key_operations == wanted
        assert calls.update_key("keys/k", key_operations=given).request.key_operations == wanted


def test_attributes_keep_their_times() -> None:
    """Also a time without a zone, which is UTC."""
    made = calls.attributes(not_before=datetime(2030, 1, 31), expires=datetime(2031, 1, 31, tzinfo=UTC))  # noqa: DTZ001
    assert made.not_before.ToJsonString() == "2030-01-31T00:00:00Z"
    assert made.expires.ToJsonString() == "2031-01-31T00:00:00Z"
    assert not made.HasField("enabled")
    assert calls.attributes(enabled=False).HasField("enabled")


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "unknown key type": ("key_type", lambda p: p.create_key("k", key_type="DSA")),
    "key type in capitals": ("key_type", lambda p: p.create_key("k", key_type="OCT")),
    "key type is no type": ("key_type", lambda p: p.create_key("k", key_type=2.5)),
    "unknown curve": ("curve", lambda p: p.create_key("k", key_type="EC", curve="secp256r1")),
    "unknown operation": ("key_operations", lambda p: p.create_key("k", **AES, key_operations=["wrap_key"])),
    "one operation": ("key_operations", lambda p: p.create_key("k", **AES, key_operations="sign")),
    "operations are no list": ("key_operations", lambda p: p.update_key("keys/k", key_operations=5)),
    "negative size": ("size_bits", lambda p: p.create_key("k", key_type="RSA", size_bits=-1)),
    "huge size": ("size_bits", lambda p: p.create_key("k", key_type="RSA", size_bits=1 << 40)),
    "size as text": ("size_bits", lambda p: p.create_key("k", key_type="RSA", size_bits="3072")),
    "key id is no text": ("key_id", lambda p: p.create_key(5, **AES)),
    "key id is no Unicode": ("key_id", lambda p: p.create_key("\ud800", **AES)),
    "tags are numbers": ("tags", lambda p: p.create_key("k", **AES, tags={1: 2})),
    "attributes as a list": ("attributes", lambda p: p.create_key("k", **AES, key_attributes=[True])),
    "unknown keyword": ("enabled", lambda p: p.update_key("keys/k", enabled=False)),
    "unknown keyword of a new key": ("size", lambda p: p.create_key("k", key_type="oct", size=256)),
    "unknown keyword of an import": ("pem", lambda p: p.import_key("k", pem="x")),
    "unknown keyword of a policy": ("days", lambda p: p.update_key_rotation_policy("keys/k", days=90)),
    "unknown keyword of a role": ("actions", lambda p: p.create_role_definition("r", [], actions=[])),
    "unknown keyword of an assignment": ("role", lambda p: p.create_role_assignment("c", "r", role="x")),
    "material is text": ("octets", lambda p: p.import_key("k", octets="0123456789abcdef")),
    "PEM is text": ("pkcs8_der", lambda p: p.import_key("k", pkcs8_der="-----BEGIN")),
    "name is None": ("name", lambda p: p.get_key(5)),
    "digest is text": ("digests", lambda p: p.sign("keys/k", "ES256", "text")),
    "digest in place of digests": ("digests", lambda p: p.sign_batch("keys/k", "ES256", 5)),
    "algorithm is a number": ("algorithm", lambda p: p.sign("keys/k", 256, b"")),
    "signature is text": ("signature", lambda p: p.verify("keys/k", "ES256", b"", "text")),
    "plaintext is text": ("plaintext", lambda p: p.encrypt("keys/k", "A256GCM", "text")),
    "ciphertext is octets": ("items", lambda p: p.decrypt("keys/k", "A256GCM", b"octets")),
    "key to wrap is text": ("keys", lambda p: p.wrap_key("keys/k", "A256KW", "text")),
    "wrapped key is text": ("wrapped_keys", lambda p: p.unwrap_key("keys/k", "A256KW", "text")),
    "count is negative": ("count", lambda p: p.random_bytes(-1)),
    "backup is text": ("backup", lambda p: p.restore_key("text")),
    "data actions are numbers": ("data_actions", lambda p: p.create_role_definition("r", [5])),
    "principal is a number": ("principal_id", lambda p: p.create_role_assignment(5, "r")),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_what_does_not_fit_is_refused_by_name(servers: Servers, kind: str, case: str) -> None:
    """G8: InvalidField with the field's name, before anything is sent; never ValueError or TypeError."""
    field, call = WRONG[case]

    async def with_asyncio() -> None:
        async with AsyncPool(servers.connection) as pool:
            await call(pool)

    with pytest.raises(InvalidField) as refused:
        if kind == "sync":
            with Pool(servers.connection) as pool:
                call(pool)
        else:
            asyncio.run(with_asyncio())
    assert refused.value.metadata == {"field": field}
    assert refused.value.definite
    assert [partition.calls for partition in servers.partitions] == [[], [], []]


def test_refusals_do_not_hold_the_value() -> None:
    """G3: what was meant for another field may be a secret."""
    secret = "0123456789abcdef"
    for build in (
        lambda: calls.import_key("k", octets=secret),  # type: ignore[arg-type]
        lambda: calls.wrap_batch("keys/k", "A256KW", [secret]),  # type: ignore[list-item]
        lambda: backup_calls.restore_key(secret),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidField) as refused:
            build()
        assert secret not in str(refused.value)
        assert refused.value.__cause__ is None
        assert refused.value.__suppress_context__


def test_an_unknown_keyword_is_told_with_those_that_there_are() -> None:
    with pytest.raises(InvalidField, match="update_key has no field enabled; it has name, key_attributes, "):
        calls.update_key("keys/k", enabled=False)  # type: ignore[call-arg]
    with pytest.raises(InvalidField, match="no field role; it has principal_id, "):
        role_calls.create_role_assignment("c", "r", role="x")  # type: ignore[call-arg]


USES: dict[str, Callable[[Any], Any]] = {
    "a service that was used": lambda p: p.get_key("keys/k"),
    "a service that was not": lambda p: p.random_bytes(8),
    "one partition": lambda p: p.partition_status(1),
    "a mutation": lambda p: p.create_key("k", **AES),
}


@pytest.mark.parametrize("use", USES)
def test_use_after_close_is_a_typed_error(servers: Servers, use: str) -> None:
    """G8: of a service that had no stub yet, too: grpc would end the process with a segmentation fault."""
    with Pool(servers.connection) as pool:
        pool.get_key("keys/k")
        stream = pool.stream([crypto_pb2.StreamOperationsRequest()])
    for _ in range(2):
        with pytest.raises(PoolClosed) as refused:
            USES[use](pool)
        assert refused.value.definite
    with pytest.raises(PoolClosed):
        list(stream)
    pool.close()


@pytest.mark.parametrize("use", USES)
def test_use_after_close_is_a_typed_error_with_asyncio(servers: Servers, use: str) -> None:
    async def main() -> None:
        async with AsyncPool(servers.connection) as pool:
            await pool.get_key("keys/k")
            stream = pool.stream([crypto_pb2.StreamOperationsRequest()])
        with pytest.raises(PoolClosed):
            await USES[use](pool)
        with pytest.raises(PoolClosed):
            await anext(stream)
        await pool.close()

    asyncio.run(main())


def test_close_ends_a_mutation_as_indefinite(servers: Servers) -> None:
    """G1: it was sent, and may take effect."""
    servers.script(servers.partitions[0].hang)
    pool = Pool(servers.connection)
    raised: list[Exception] = []

    def create() -> None:
        try:
            pool.create_key("k", **AES)
        except Exception as error:  # noqa: BLE001 - compared below
            raised.append(error)

    thread = threading.Thread(target=create)
    thread.start()
    assert servers.partitions[0].entered.wait(10)
    pool.close()
    thread.join(10)
    assert [type(error) for error in raised] == [CallIndefinite]


def test_close_ends_a_mutation_as_indefinite_with_asyncio(servers: Servers) -> None:
    """G1: grpc tells a closed channel like a cancelled task, which is no answer to a caller."""
    servers.script(servers.partitions[0].hang)

    async def main() -> None:
        pool = AsyncPool(servers.connection)
        task = asyncio.ensure_future(pool.create_key("k", **AES))
        assert await asyncio.to_thread(servers.partitions[0].entered.wait, 10)
        await pool.close()
        with pytest.raises(CallIndefinite):
            await task

    asyncio.run(main())


def test_a_cancelled_task_stays_cancelled(servers: Servers) -> None:
    servers.script(servers.partitions[0].hang)

    async def main() -> None:
        async with AsyncPool(servers.connection) as pool:
            task = asyncio.ensure_future(pool.create_key("k", **AES))
            assert await asyncio.to_thread(servers.partitions[0].entered.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()

    asyncio.run(main())


def test_a_channel_that_closes_between_two_steps_is_a_typed_error(servers: Servers) -> None:
    """The stubs were had before the channels were closed."""
    pool = Pool(servers.connection)
    for _ in servers.partitions:
        pool.get_key("keys/k")
    for channel in pool._channels:
        channel.close()
    with pytest.raises(PoolClosed):
        pool.get_key("keys/k")
    pool.close()
