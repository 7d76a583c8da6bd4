"""Which invariant needs which field of which event: read off the code of the invariants, for the docs.

A handler needs what it, and whatever it hands the record to, reads of it. A record that a handler keeps may be read
later, under another name, by another handler of its class; what is read there counts for every event that is kept. The
shadow state keeps records for all; what anybody reads of those counts as needed by the state.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType

from bus import waits
from bus.events import EVENTS
from bus.invariant import Invariant
from bus.invariants import INVARIANTS
from bus.shadow import Shadow

STATE = "state"
"""Who needs what the shadow state follows: every invariant that looks at it."""

_Needs = dict[tuple[str, str], list[str]]


@functools.cache
def needs() -> _Needs:
    """By event and field, the ids of the invariants that need it, and `STATE`; field "" stands for the event."""
    found: _Needs = {}
    for id, invariant in INVARIANTS.items():
        for event, fields in _of_invariant(invariant):
            for field in ("", *fields):
                found.setdefault((event, field), []).append(id)
    of_kept = _elsewhere(Shadow) | _of_state()
    for name in dir(Shadow):
        event = name.removeprefix("_on_")
        if event != name:
            direct, kept = _reads(getattr(Shadow, name), "record", Shadow)
            for field in ("", *_known(event, direct | (of_kept if kept else set()))):
                found.setdefault((event, field), []).append(STATE)
    return found


def _of_state() -> set[str]:
    """What is read of records that the state keeps: when a history ends, and as `something.begin["update"]`."""
    ends: list[Callable[..., object]] = [one for one in vars(waits).values() if isinstance(one, FunctionType)]
    ends += [invariant.at_end for invariant in INVARIANTS.values()]
    found = {key[1] for function in ends for key in map(_key, ast.walk(_tree(function))) if key is not None}
    for invariant in INVARIANTS.values():
        trees = (_tree(function) for function in vars(invariant).values() if isinstance(function, FunctionType))
        keys = (_key(node) for tree in trees for node in ast.walk(tree))
        found |= {key[1] for key in keys if key is not None and _is_of_state(key[0])}
    return found


def _is_of_state(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and not _is(node.value, "self")


def _of_invariant(invariant: type[Invariant]) -> Iterator[tuple[str, tuple[str, ...]]]:
    elsewhere = _elsewhere(invariant)
    for name in dir(invariant):
        if name.startswith("on_"):
            direct, kept = _reads(getattr(invariant, name), "record", invariant)
            yield name[3:], _known(name[3:], direct | (elsewhere if kept else set()))


def _known(event: str, fields: set[str]) -> tuple[str, ...]:
    """Those that the event has, in the order of the table."""
    return tuple(field for field in EVENTS[event].fields if field in fields)


def _reads(function: Callable[..., object], name: str, owner: type) -> tuple[set[str], bool]:
    """What a function reads of its argument `name`, and whether it keeps it."""
    return _reads_of(function, name, owner, frozenset())


def _reads_of(
    function: Callable[..., object], name: str, owner: type, above: frozenset[object]
) -> tuple[set[str], bool]:
    fields: set[str] = set()
    kept = False
    if function in above:
        return fields, kept
    for node in ast.walk(_tree(function)):
        key = _key(node)
        if key is not None and _is(key[0], name):
            fields.add(key[1])
        elif isinstance(node, ast.Assign):
            kept |= any(_is(value, name) for value in ast.walk(node.value) if not isinstance(value, ast.Subscript))
        elif isinstance(node, ast.Call):
            places = [place for place, value in enumerate(node.args) if _is(value, name)]
            callee = _callee(node, function, owner)
            if places and callee is not None:
                method = isinstance(node.func, ast.Attribute)
                parameter = list(inspect.signature(callee).parameters)[places[0] + method]
                more, also = _reads_of(callee, parameter, owner, above | {function})
                fields |= more
                kept |= also
            elif places:
                kept = True
    return fields, kept


def _callee(call: ast.Call, function: Callable[..., object], owner: type) -> FunctionType | None:
    """The function of ours that is called; None for those that only keep or show what they get."""
    found: object = None
    match call.func:
        case ast.Name(name):
            found = getattr(sys.modules[function.__module__], name, None)
        case ast.Attribute(ast.Name("self"), name) if name != "violated":
            found = getattr(owner, name, None)
        case ast.Attribute(ast.Call(ast.Name("super")), name):
            found = getattr(owner.__mro__[1], name, None)
    return found if isinstance(found, FunctionType) else None


def _elsewhere(owner: type) -> set[str]:
    """What the class reads of records that are not the one at hand."""
    return {
        key[1]
        for function in vars(owner).values()
        if isinstance(function, FunctionType)
        for key in map(_key, ast.walk(_tree(function)))
        if key is not None and not _is(key[0], "record")
    }


def _key(node: ast.AST) -> tuple[ast.expr, str] | None:
    """X and "y" of X["y"] and of X.get("y")."""
    if isinstance(node, ast.Subscript):
        base, key = node.value, node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        base, key = node.func.value, node.args[0]
    else:
        return None
    return (base, key.value) if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


@functools.cache
def _tree(function: Callable[..., object]) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))
