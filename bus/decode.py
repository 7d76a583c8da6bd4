"""Records as they are read back: what they have of the event table's fields has the type that it should. A pure core.

Whoever looks at records may so rely on the common fields, and on types, whoever wrote the file. Fields that the table
does not name are left out; of an event that it does not know only the common fields are left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from msgspec import Meta

from bus.columns import event_columns
from bus.events import EVENTS
from bus.plain import plain
from bus.records import Record

UNREADABLE = (ValueError, RecursionError)
"""What decoding a line may raise: no JSON, no UTF-8, nested too deeply, not as the event table says."""

I64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seq = Annotated[int, Meta(ge=1, le=2**63 - 1)]

_TYPES: dict[str, Any] = {
    "BIGINT": I64,
    "UBIGINT": Annotated[int, Meta(ge=0)],
    "BOOLEAN": bool | I64,
    "DOUBLE": float,
    "VARCHAR": str,
    "JSON": dict[str, Any] | list[Any],
}
_COMMON: dict[str, Any] = {
    "ts": U63,
    "clock": U63,
    "node": str,
    "pid": U63,
    "seq": Seq,
    "event": str,
    "ctx": NotRequired[str],
    "irqs": NotRequired[bool | I64],
}
_CLOSER: dict[str, Any] = {
    "asked": list[int],
    "counts": dict[str, int],
    "files": list[str],
    "knobs": dict[str, bool | int | float | str],
    "locks": list[str],
    "online": list[int],
    "rules": list[dict[str, Any]],
}
"""Fields that are JSON in SQL; others are a list or an object of anything."""
_IDS = frozenset((("ipi_send", "id"), ("ipi_deliver", "id")))
"""In machines that are stepped in one process a message is a number."""


def decode_record(event: str, line: bytes) -> Record:
    """The record in a line, which is of this event; raises what is UNREADABLE. Its texts are fit for a terminal."""
    record = _decoder(event)(line)
    if not line.isascii() or b"\\" in line or b"\x7f" in line:  # one byte is looked for much faster than two
        return {name: _plain(value) for name, value in record.items()}
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(name): _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


@cache
def _decoder(event: str) -> Callable[[bytes], Record]:
    columns = event_columns(event) if event in EVENTS else {}
    fields = {name: NotRequired[_type(event, name, kind)] for name, kind in columns.items()}
    shape: Any = TypedDict("shape", _COMMON | fields)  # type: ignore[misc]
    return msgspec.json.Decoder[Record](shape).decode


def _type(event: str, name: str, kind: str) -> Any:
    if kind == "JSON":
        return _CLOSER.get(name, _TYPES[kind])
    return str | int if (event, name) in _IDS else _TYPES[kind]
