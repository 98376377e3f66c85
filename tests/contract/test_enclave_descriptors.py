"""G5: the enclave interface has no room for key material. Walks the descriptors of the built contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor

from hsm_pool.net.enclave_guard import BOUNDS
from mhsm.enclave.v1 import enclave_pb2

METHODS_MAX = 8
REPLY_BITS_MAX = 128
"""Less than an AES-128 key."""

# What a partition could choose freely in one reply. A new field is a decision: raise its line here
# with the contract, never the ceiling above.
STATE_BITS = 3
REPLY_BITS = {
    "GetStatus": STATE_BITS + 1 + 53 + 2 + 32 + 1 + 20 + 1,
    **dict.fromkeys(
        ("Drain", "Resume", "Relinquish", "Restart", "Heal", "StageFirmware", "ActivateFirmware"), STATE_BITS
    ),
}

TYPES = frozenset(
    {
        FieldDescriptor.TYPE_BOOL,
        FieldDescriptor.TYPE_ENUM,
        FieldDescriptor.TYPE_UINT32,
        FieldDescriptor.TYPE_UINT64,
    }
)


def closure(message: Descriptor, seen: dict[str, Descriptor] | None = None) -> dict[str, Descriptor]:
    """Return the message and all messages its fields lead to, by full name."""
    seen = {} if seen is None else seen
    if message.full_name not in seen:
        seen[message.full_name] = message
        for field in message.fields:
            if field.message_type is not None:
                closure(field.message_type, seen)
    return seen


def violations(service: ServiceDescriptor) -> Iterator[str]:
    """Yield everything of the service that could carry more than bounded numbers."""
    if len(service.methods) > METHODS_MAX:
        yield f"{len(service.methods)} methods"
    messages: dict[str, Descriptor] = {}
    for method in service.methods:
        if method.client_streaming or method.server_streaming:
            yield f"{method.full_name} streams"
        closure(method.input_type, messages)
        closure(method.output_type, messages)
    for message in messages.values():
        if message.is_extendable:
            yield f"{message.full_name} can be extended"
        for field in message.fields:
            if field.is_repeated:
                yield f"{field.full_name} is repeated"
            if field.type not in TYPES:
                yield f"{field.full_name} has type {field.type}"


def unconstrained_bits(message: Descriptor) -> int:
    """Return how many bits the sender can choose in one message; presence of an optional field is one.

    The guard sends no enum number outside the closed set and no integer outside its bounds
    (tests/unit/test_enclave_guard.py), so these are what counts. A field without bounds counts in full.
    """
    return sum(_bits(field) + field.has_presence for field in message.fields)


def _bits(field: FieldDescriptor) -> int:
    if field.type == FieldDescriptor.TYPE_BOOL:
        return 1
    if field.enum_type is not None:
        return max(1, (len(field.enum_type.values) - 1).bit_length())
    full = (0, 2**32 - 1 if field.type == FieldDescriptor.TYPE_UINT32 else 2**64 - 1)
    lowest, highest = BOUNDS.get(field.name, full)
    return (highest - lowest).bit_length()


SERVICE = enclave_pb2.DESCRIPTOR.services_by_name["EnclaveService"]


def test_g5_messages_hold_bounded_numbers_only() -> None:
    assert list(violations(SERVICE)) == []


def test_g5_the_file_holds_one_service_and_imports_nothing() -> None:
    assert list(enclave_pb2.DESCRIPTOR.services_by_name) == ["EnclaveService"]
    assert [file.name for file in enclave_pb2.DESCRIPTOR.dependencies] == []
    assert not enclave_pb2.DESCRIPTOR.extensions_by_name


def test_g5_every_message_of_the_file_was_walked() -> None:
    walked: dict[str, Descriptor] = {}
    for method in SERVICE.methods:
        closure(method.input_type, walked)
        closure(method.output_type, walked)
    declared = {message.full_name for message in enclave_pb2.DESCRIPTOR.message_types_by_name.values()}
    assert set(walked) == declared


def test_g5_no_reply_has_room_for_a_key() -> None:
    counted = {method.name: unconstrained_bits(method.output_type) for method in SERVICE.methods}
    assert counted == REPLY_BITS
    assert max(counted.values()) < REPLY_BITS_MAX


def test_g5_every_integer_has_bounds() -> None:
    """Requests and replies: what is not bounded would be refused by the guard, with a KeyError."""
    integers = {
        field.name
        for message in enclave_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.type in {FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64}
    }
    assert integers == set(BOUNDS)


def test_g5_every_verb_but_getstatus_is_stamped() -> None:
    for method in SERVICE.methods:
        fields = {field.name for field in method.input_type.fields}
        assert fields >= ({"counter", "expires_ms"} if method.name != "GetStatus" else set()), method.name


# The walker must be able to fail: contracts planted in a private pool.

FieldProto = descriptor_pb2.FieldDescriptorProto
Plant = Callable[[descriptor_pb2.FileDescriptorProto], None]


def _reply_field(file: descriptor_pb2.FileDescriptorProto, kind: int, name: str = "planted") -> FieldProto:
    reply = file.message_type[1]
    return reply.field.add(
        name=name,
        number=len(reply.field) + 1,
        type=kind,
        label=FieldProto.LABEL_OPTIONAL,
    )


def _scalar(kind: int) -> Plant:
    def plant(file: descriptor_pb2.FileDescriptorProto) -> None:
        _reply_field(file, kind)

    return plant


def _repeated(file: descriptor_pb2.FileDescriptorProto) -> None:
    _reply_field(file, FieldProto.TYPE_UINT64).label = FieldProto.LABEL_REPEATED


def _bytes_two_messages_down(file: descriptor_pb2.FileDescriptorProto) -> None:
    middle = file.message_type.add(name="Middle")
    inner = file.message_type.add(name="Inner")
    inner.field.add(name="b", number=1, type=FieldProto.TYPE_BYTES, label=FieldProto.LABEL_OPTIONAL)
    middle.field.add(
        name="inner",
        number=1,
        type=FieldProto.TYPE_MESSAGE,
        type_name=".planted.Inner",
        label=FieldProto.LABEL_OPTIONAL,
    )
    _reply_field(file, FieldProto.TYPE_MESSAGE).type_name = ".planted.Middle"


def _bytes_in_a_request(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.message_type[0].field.add(
        name="b", number=1, type=FieldProto.TYPE_BYTES, label=FieldProto.LABEL_OPTIONAL
    )


def _recursion(file: descriptor_pb2.FileDescriptorProto) -> None:
    _reply_field(file, FieldProto.TYPE_MESSAGE).type_name = ".planted.Reply"


def _map(file: descriptor_pb2.FileDescriptorProto) -> None:
    entry = file.message_type[1].nested_type.add(name="PlantedEntry")
    entry.options.map_entry = True
    for number, name in ((1, "key"), (2, "value")):
        entry.field.add(
            name=name, number=number, type=FieldProto.TYPE_UINT32, label=FieldProto.LABEL_OPTIONAL
        )
    field = _reply_field(file, FieldProto.TYPE_MESSAGE)
    field.type_name = ".planted.Reply.PlantedEntry"
    field.label = FieldProto.LABEL_REPEATED


def _any(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.dependency.append("google/protobuf/any.proto")
    _reply_field(file, FieldProto.TYPE_MESSAGE).type_name = ".google.protobuf.Any"


def _oneof_with_a_message(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.message_type.add(name="Choice")
    file.message_type[1].oneof_decl.add(name="choice")
    for index, kind in enumerate((FieldProto.TYPE_UINT32, FieldProto.TYPE_MESSAGE)):
        field = _reply_field(file, kind, name=f"choice_{index}")
        field.oneof_index = 0
        if kind == FieldProto.TYPE_MESSAGE:
            field.type_name = ".planted.Choice"


def _streaming_reply(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.service[0].method[0].server_streaming = True


def _streaming_request(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.service[0].method[0].client_streaming = True


def _nine_methods(file: descriptor_pb2.FileDescriptorProto) -> None:
    for number in range(METHODS_MAX):
        file.service[0].method.add(
            name=f"More{number}", input_type=".planted.Request", output_type=".planted.Reply"
        )


PLANTS: dict[str, Plant] = {
    "bytes": _scalar(FieldProto.TYPE_BYTES),
    "string": _scalar(FieldProto.TYPE_STRING),
    "double": _scalar(FieldProto.TYPE_DOUBLE),
    "int64": _scalar(FieldProto.TYPE_INT64),
    "fixed64": _scalar(FieldProto.TYPE_FIXED64),
    "repeated": _repeated,
    "bytes two messages down": _bytes_two_messages_down,
    "bytes in a request": _bytes_in_a_request,
    "recursion": _recursion,
    "map": _map,
    "Any": _any,
    "oneof with a message": _oneof_with_a_message,
    "streaming reply": _streaming_reply,
    "streaming request": _streaming_request,
    "nine methods": _nine_methods,
}


def _service(plant: Plant) -> ServiceDescriptor:
    file = descriptor_pb2.FileDescriptorProto(name="planted.proto", package="planted", syntax="proto3")
    file.message_type.add(name="Request")
    file.message_type.add(name="Reply")
    _reply_field(file, FieldProto.TYPE_UINT32, name="honest")
    service = file.service.add(name="Planted")
    service.method.add(name="Get", input_type=".planted.Request", output_type=".planted.Reply")
    plant(file)
    pool = descriptor_pool.DescriptorPool()
    any_file = descriptor_pb2.FileDescriptorProto(
        name="google/protobuf/any.proto", package="google.protobuf", syntax="proto3"
    )
    message = any_file.message_type.add(name="Any")
    for number, kind in ((1, FieldProto.TYPE_STRING), (2, FieldProto.TYPE_BYTES)):
        message.field.add(name=f"field_{number}", number=number, type=kind, label=FieldProto.LABEL_OPTIONAL)
    pool.Add(any_file)
    pool.Add(file)
    return pool.FindServiceByName("planted.Planted")


def test_g5_the_walker_accepts_a_clean_contract() -> None:
    service = _service(lambda _: None)
    assert list(violations(service)) == []
    assert unconstrained_bits(service.methods[0].output_type) == 32


@pytest.mark.parametrize("name", PLANTS)
def test_g5_the_walker_catches(name: str) -> None:
    assert list(violations(_service(PLANTS[name])))


def test_g5_the_walker_counts_a_planted_digest() -> None:
    def four_words(file: descriptor_pb2.FileDescriptorProto) -> None:
        for number in range(4):
            _reply_field(file, FieldProto.TYPE_UINT64, name=f"word_{number}")

    assert unconstrained_bits(_service(four_words).methods[0].output_type) >= REPLY_BITS_MAX
