"""The message union: every body travels unchanged, and everything else is refused whole."""

from __future__ import annotations

import contextlib
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.linkfaults import LinkRule
from bus.messages import MAX_FRAME, Body, Envelope, Ipi, LockGrant, Member, Message, Seamcall, Start, decode, encode

KINDS: tuple[type[Message], ...] = get_args(Body)


def envelope(body: Body | None = None, **fields: Any) -> Envelope:
    """A frame from CPU 0 to the seamldr process."""
    values: dict[str, Any] = {
        "source": "cpu0", "source_incarnation": 1, "target": "seamldr", "target_incarnation": 1, "sequence": 1,
        "acknowledged": 0, "clock": 9,
    }  # fmt: skip
    return Envelope(**(values | fields), body=body)


def sample(kind: type[Message]) -> Body:
    """One message of a kind, with a value of its own in every field."""
    values = {}
    for index, field in enumerate(msgspec.structs.fields(kind)):
        values[field.name] = _value(field.name, field.type, index + 1)
    return kind(**values)  # type: ignore[return-value]


def _value(name: str, kind: Any, number: int) -> Any:
    words = {"state": "dead", "what": "offline", "command": "run"}
    if name in words and kind is not str and "pattern=" in repr(kind):
        return words[name]
    if name == "registers":
        return tuple(range(number, number + 13))
    if name == "pages":
        return (number << 12, 1 << 40)
    if name == "rules":
        return (LinkRule("cpu*", "seamldr", drop=0.5, delay_ns=1), LinkRule(partition="two-way"))
    if name == "facts":
        return {"requests": number}
    base = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    return {int: number, bool: True, str: f"text {number}"}[base]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_body_travels_unchanged(kind: type[Message]) -> None:
    """Encoding and decoding gives the same envelope around the same body."""
    sent = envelope(sample(kind))
    received = decode(encode(sent))
    assert received == sent and type(received.body) is kind


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_body_says_what_it_is_for(kind: type[Message]) -> None:
    """A kind of message has a sentence, a tag of its own, and cannot be changed once made."""
    assert kind.__doc__ and kind.__doc__ != Message.__doc__
    assert kind.__struct_config__.frozen and kind.__struct_config__.forbid_unknown_fields
    assert [other.__struct_config__.tag for other in KINDS].count(kind.__struct_config__.tag) == 1


def test_the_union_is_closed_over_its_module() -> None:
    """Every kind of message that is defined can be sent."""
    assert set(KINDS) == set(Message.__subclasses__())


def test_a_frame_may_be_an_acknowledgement_alone() -> None:
    """No body is a body."""
    assert decode(encode(envelope(None, sequence=0))).body is None


def raw(body: Any, **fields: Any) -> bytes:
    """A frame with any body at all."""
    return msgspec.msgpack.encode([*_head(**fields), body])


def _head(**fields: Any) -> list[Any]:
    return list(msgspec.structs.astuple(envelope(**fields)))[:-2]


REFUSED: dict[str, bytes] = {
    "empty": b"",
    "not msgpack": b"\xc1\xc1\xc1",
    "a text": msgspec.msgpack.encode("hello"),
    "an object instead of an array": msgspec.msgpack.encode({"source": "cpu0"}),
    "cut short": encode(envelope(Start()))[:-3],
    "something behind it": encode(envelope(Start())) + b"\x00",
    "unknown tag": raw(["halt_and_catch_fire"]),
    "tag of the wrong type": raw([7]),
    "no tag": raw([]),
    "body that is a text": raw("start"),
    "field missing": raw(["ring"]),
    "field too many": raw(["ring", 5, 6]),
    "field too many in an empty body": raw(["start", 1]),
    "number as text": raw(["ring", "5"]),
    "text as number": raw(["lock_acquire", 5, 0, 1]),
    "negative number": raw(["ring", -1]),
    "float": raw(["ring", 1.0]),
    "bool as number": raw(["ring", True]),
    "number as bool": raw(["ipi", 2, 1]),
    "vector of 256": raw(["ipi", 256, False]),
    "CPU number of 4096": raw(["move_task", 1, 4096]),
    "u32 too large": raw(["run_task", 1 << 32]),
    "empty name": raw(["lock_release", "", 1, 1]),
    "name too long": raw(["lock_release", "x" * 65, 1, 1]),
    "text too long": raw(["task_ended", 1, "x" * 4097]),
    "state that is none": raw(["member", "cpu0", 1, "sleepy"]),
    "state with a tail": raw(["member", "cpu0", 1, "online "]),
    "state with a line end": raw(["member", "cpu0", 1, "online\n"]),
    "twelve registers": raw(["seamret", 1, True, 0, [0] * 12]),
    "fourteen registers": raw(["seamret", 1, True, 0, [0] * 14]),
    "fact that is no number": raw(["progress", {"done": "many"}]),
    "rule that is out of range": raw(["set_link_faults", [{"drop": 1.5}], 1]),
    "rule that is none": raw(["set_link_faults", [{"dorp": 0.5}], 1]),
    "too many rules": raw(["set_link_faults", [{}] * 257, 1]),
    "missing what is no number": msgspec.msgpack.encode([*_head(), None, ["1"]]),
    "too much missing": msgspec.msgpack.encode([*_head(), None, [1] * 129]),
    "arrays in arrays, as deep as a frame is long": b"\x91" * MAX_FRAME,
    "maps in maps behind a good head": msgspec.msgpack.encode(_head())[:1] + b"\x81\x00" * 30_000,
    "source without a name": raw(["start"], source=""),
    "negative sequence": raw(["start"], sequence=-1),
    "clock that cannot go on": raw(["start"], clock=2**62),
    "clock as text": raw(["start"], clock="9"),
    "field too many in the envelope": msgspec.msgpack.encode([*_head(), ["start"], [], 1]),
    "field missing in the envelope": msgspec.msgpack.encode(_head()[:-1]),
}


@pytest.mark.parametrize("frame", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_exactly_a_message_is_refused(frame: bytes) -> None:
    """decode raises ValueError and nothing else."""
    with pytest.raises(ValueError, match=r"."):
        decode(frame)


def test_the_examples_of_refusal_are_refused_for_their_own_reason() -> None:
    """The frames that they are made from are good ones."""
    for body in (["start"], ["ring", 5], ["ipi", 255, False], ["move_task", 1, 4095], ["run_task", (1 << 32) - 1]):
        assert decode(raw(body)).body is not None
    assert decode(raw(["seamret", 1, True, 0, [0] * 13])).body is not None
    assert decode(raw(["set_link_faults", [{"drop": 1.0}] * 256, 1])).body is not None
    assert decode(msgspec.msgpack.encode([*_head(), None, [1] * 128])).missing == (1,) * 128
    assert decode(raw(["lock_release", "x" * 64, 1, 1])).body is not None
    assert decode(raw(["task_ended", 1, "x" * 4096])).body is not None


def test_a_frame_that_is_too_long_is_refused_unread() -> None:
    """One byte more than MAX_FRAME is refused for its length, before anything in it is looked at."""
    with pytest.raises(ValueError, match="are more than"):
        decode(b"\xc1" * (MAX_FRAME + 1))
    with pytest.raises(msgspec.DecodeError):
        decode(b"\xc1" * MAX_FRAME)


@given(st.binary(max_size=200))
def test_noise_is_refused_or_is_a_message(noise: bytes) -> None:
    """Whatever comes in, decode gives an envelope or raises ValueError."""
    with contextlib.suppress(ValueError):
        assert isinstance(decode(noise), Envelope)


BODIES: list[Body] = [
    Ipi(0xFB),
    Member("cpu1", 2, "dead"),
    LockGrant("seamldr_lock", 1, 2, 3),
    Seamcall(1, 1 << 63, (0,) * 13, 1, 2, False),
]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(BODIES), st.data())
def test_a_flipped_bit_never_raises_anything_else(body: Body, data: st.DataObject) -> None:
    """A damaged frame is refused, or it decodes to some envelope; it ends no process."""
    frame = bytearray(encode(envelope(body)))
    at = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[at // 8] ^= 1 << at % 8
    with contextlib.suppress(ValueError):
        assert isinstance(decode(bytes(frame)), Envelope)
