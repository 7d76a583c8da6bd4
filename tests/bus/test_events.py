"""The event table and the sources agree: every record that is written is described, every description is used."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from bus.events import EVENTS
from bus.records import COMMON_FIELDS, CPU_FIELDS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for room in ("bus", "cpu", "seamldr", "kvm") for path in (ROOT / room).rglob("*.py"))
NOT_YET_WRITTEN = {"broken"}
"""Events that the table describes and nothing writes so far."""

DYNAMIC = {"cpu/cpu.py": 2, "cpu/ops_vmx.py": 1}
"""Places that write an event whose name is a variable: per-CPU pointers, recorded stores, VMREAD and VMWRITE."""


class Written(msgspec.Struct, frozen=True):
    """One call that writes a record."""

    where: str
    event: str
    fields: frozenset[str]


@functools.cache
def all_calls(path: Path) -> list[ast.Call]:
    """Every call in a file."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def calls(path: Path, *names: str) -> Iterator[ast.Call]:
    """Calls of a method with one of these names."""
    for call in all_calls(path):
        if isinstance(call.func, ast.Attribute) and call.func.attr in names:
            yield call


def literal(node: ast.expr) -> str | None:
    """The text of a string constant."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def written(path: Path) -> Iterator[Written]:
    """Every record whose event is named where it is written."""
    for call in calls(path, "emit", "_emit"):
        event = literal(call.args[0]) if call.args else None
        if event is not None:
            yield Written(f"{path.relative_to(ROOT)}:{call.lineno}", event, keywords(call))
    for call in calls(path, "store_recorded"):
        event = literal(call.args[2])
        if event is not None:
            yield Written(f"{path.relative_to(ROOT)}:{call.lineno}", event, keywords(call) | {"new"})
    for call in all_calls(path):
        if isinstance(call.func, ast.Name) and call.func.id == "PerCpuVariable":
            event = literal(call.args[1])
            assert event is not None
            yield Written(f"{path.relative_to(ROOT)}:{call.lineno}", event, frozenset({"old", "new"}))
    for call in calls(path, "_field_record"):
        event = literal(call.args[0])
        assert event is not None
        fields = frozenset({"field", "name", "value", "vmcs", "result"})
        yield Written(f"{path.relative_to(ROOT)}:{call.lineno}", event, fields)


def keywords(call: ast.Call) -> frozenset[str]:
    """The fields that a call names; every one must be named."""
    names = [keyword.arg for keyword in call.keywords]
    assert None not in names, f"line {call.lineno} passes fields that cannot be checked"
    return frozenset(name for name in names if name is not None)


ALL = [record for path in SOURCES for record in written(path)]


@pytest.mark.parametrize("event", EVENTS)
def test_records_have_exactly_the_fields_of_their_event(event: str) -> None:
    """Wherever the event is written, it has all fields of the table and no others."""
    wanted = frozenset(EVENTS[event].fields)
    assert [record for record in ALL if record.event == event and record.fields != wanted] == []


def test_every_record_names_an_event_of_the_table() -> None:
    """Nothing is written that the table does not describe."""
    assert len(ALL) > 60
    assert [record for record in ALL if record.event not in EVENTS] == []


def test_every_event_is_written_somewhere() -> None:
    """The table describes nothing that does not happen."""
    assert EVENTS.keys() - {record.event for record in ALL} == NOT_YET_WRITTEN


def test_only_known_places_write_events_by_variable() -> None:
    """What the check above cannot see is listed, place by place."""
    found: dict[str, int] = {}
    for path in SOURCES:
        by_variable = [
            call
            for call in calls(path, "emit", "_emit")
            if call.args and literal(call.args[0]) is None and not isinstance(call.args[0], ast.Starred)
        ]
        if by_variable:
            found[str(path.relative_to(ROOT))] = len(by_variable)
    assert found == DYNAMIC


def test_the_table_explains_itself() -> None:
    """Each event is one sentence, each field has a meaning, and none has the name of a common field."""
    for name, event in EVENTS.items():
        assert name.islower() and event.sentence.endswith("."), name
        assert all(event.fields.values()), name
        assert not event.fields.keys() & (COMMON_FIELDS | CPU_FIELDS), name
