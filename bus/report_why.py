"""What `seamlab why` prints: one row a process, who waits for whom, the cycle, and where the waits lead to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bus.shadow import node_order
from bus.why import Edge, Root, Row, Why
from bus.why_words import UNABLE

SINGLE_ROWS = 16
"""With more processes than these, those that do the same share a row."""

LOCKUPS = 3
"""Lockups of one kind that are shown in the kernel's words."""

ROOTS = 5
"""Processes to which waits lead that are shown, those with the most behind them."""

RANGES = 8
"""Ranges of nodes that are named; the others are counted."""

COLORS = dict.fromkeys(UNABLE, "red")


def why_as_dict(why: Why, run_dir: str) -> dict[str, Any]:
    """For `--json`: one row a process whatever their number."""
    answer: dict[str, Any] = msgspec.to_builtins(why)
    return {"schema": 1, "run_dir": run_dir} | answer


def print_why(console: Console, why: Why) -> None:
    """The whole answer, the most important part last, where the reader's eye is."""
    _print_freshness(console, why)
    _print_processes(console, why)
    for line in _facts(why):
        console.print(line, soft_wrap=True)
    _print_graph(console, why)
    for line in _conclusions(why):
        console.print(line, soft_wrap=True)


def _print_freshness(console: Console, why: Why) -> None:
    at = f"{why.machine_s:.3f} s after its begin"
    if why.running:
        text = f"The machine runs. This is how it stood {at}; the newest record was {_seconds(why.newest_s)} old."
    elif why.ended is None:
        text = f"The machine is gone and did not say why. This is how it stood at its last record, {at}."
    else:
        text = f"The machine has ended{': ' * bool(why.ended)}{why.ended}. This is how it stood then, {at}."
    console.print(Text(text, style="bold"), soft_wrap=True)
    console.print(Text("Seconds: since the begin; for, and silent (no record), up to the look.", style="dim"))


# Processes


def _print_processes(console: Console, why: Why) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("process", "state"):
        table.add_column(name)
    for name in ("since", "for", "silent"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("waits for, or does", min_width=30)
    for rows in _groups(why.processes):
        first = rows[0]
        table.add_row(
            Text(_who(rows)),
            Text(first.state if len(rows) == 1 else _alive(first.state), style=COLORS.get(first.state, "")),
            _span([row.since_s for row in rows]),
            _span([row.for_s for row in rows]),
            _span([row.silent_s for row in rows]),
            _what(rows),
        )
    console.print(table)


def _groups(rows: Sequence[Row]) -> Iterable[list[Row]]:
    """Each process by itself, or those that do the same together."""
    found: dict[object, list[Row]] = {}
    for row in rows:
        key = (_alive(row.state), row.alike) if len(rows) > SINGLE_ROWS else row.node
        found.setdefault(key, []).append(row)
    return found.values()


def _alive(state: str) -> str:
    return "alive" if state in ("running", "asleep") else state


def _who(rows: Sequence[Row]) -> str:
    """The process with its pid, or all of a group: "cpu2-cpu9, cpu12 (9)"."""
    if len(rows) == 1:
        return f"{rows[0].node} [{rows[0].pid}]" if rows[0].pid else rows[0].node
    return f"{nodes_text([row.node for row in rows])} ({len(rows)})"


def _what(rows: Sequence[Row]) -> Text:
    text = Text(rows[0].what if len(rows) == 1 else rows[0].alike)
    if len({tuple(within.what for within in row.within) for row in rows}) == 1:
        for within in rows[0].within:
            text.append(f"\n  within: {within.what}, for {_seconds(within.for_s)}", style="dim")
    if len(rows) == 1 and rows[0].said:
        text.append(f"\n  said, when asked: {rows[0].said}", style="dim")
    return text


def nodes_text(nodes: Sequence[str]) -> str:
    """Nodes in short, neighbours as ranges.

    >>> nodes_text(["cpu3", "cpu1", "cpu2", "kvm", "cpu7"])
    'cpu1-cpu3, cpu7, kvm'
    """
    parts: list[list[str]] = []
    for node in sorted(set(nodes), key=node_order):
        if parts and _follows(parts[-1][-1], node):
            parts[-1].append(node)
        else:
            parts.append([node])
    texts = [part[0] if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    more = sum(map(len, parts[RANGES:]))
    return ", ".join(texts[:RANGES]) + (f" and {more} more" if more else "")


def _follows(before: str, node: str) -> bool:
    numbers = [name.removeprefix("cpu") for name in (before, node) if name.startswith("cpu")]
    return len(numbers) == 2 and int(numbers[0]) + 1 == int(numbers[1])


def _span(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    if not known:
        return ""
    low, high = f"{min(known):.3f}", f"{max(known):.3f}"
    return low if low == high else f"{low}-{high}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


# Locks, update, lockups


def _facts(why: Why) -> Iterable[Text]:
    for lock in why.locks:
        held = (
            f"held by {lock.holder} for {_seconds(lock.for_s)} under token {lock.epoch}.{lock.number}"
            if lock.holder and lock.for_s is not None
            else "not held"
        )
        queue = ", ".join(lock.queue[:8]) + (f" and {len(lock.queue) - 8} more" if len(lock.queue) > 8 else "")
        yield Text(f"{lock.lock}: {held}; " + (f"in the queue: {queue}" if queue else "nobody waits"))
    update = why.update
    if update is not None:
        done = update.online - len(update.missing)
        text = f"update {update.update}: stage {update.stage} for {_seconds(update.for_s)}, acknowledged by {done} of "
        text += f"{update.online}"
        if update.late:
            text += f"; not come to stop_machine: {nodes_text(update.late)}"
        elif update.missing:
            text += f"; not acknowledged: {nodes_text(update.missing)}"
        yield Text(text + (f"; failed on {update.failed}" if update.failed else ""))
    for kind in ("soft_lockup", "hard_lockup"):
        lockups = [lockup for lockup in why.lockups if lockup.kind == kind]
        for lockup in lockups[:LOCKUPS]:
            yield Text(f"at {lockup.at_s:.1f} s: {lockup.text}", style="red")
        if len(lockups) > LOCKUPS:
            nodes = nodes_text([lockup.node for lockup in lockups])
            yield Text(f"and so on, {kind.replace('_', ' ')}s: {nodes} ({len(lockups)})", style="red")
    for note in why.notes:
        yield Text(f"note: {note}", style="dim")


# The graph


def _print_graph(console: Console, why: Why) -> None:
    if not why.graph:
        console.print("\nNobody waits for anybody.")
        return
    console.print(Text("\nWho waits for whom", style="bold"))
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("node", "on", "what", "for"):
        table.add_column(name)
    for edges in _bundles(why):
        first = edges[0]
        mark = Text("<- cycle" if first.in_cycle else "", style="bold red")
        since = _span([edge.for_s for edge in edges])
        who, whom = nodes_text([edge.node for edge in edges]), nodes_text([edge.on for edge in edges])
        style = "red" if first.in_cycle else ""
        what = first.what if first.kind != "request" or len(edges) == 1 else "to answer requests"
        table.add_row(Text(who, style), Text(f"-> {whom}", style), Text(f"{what}, for {since} s"), mark)
    console.print(table)


def _bundles(why: Why) -> list[list[Edge]]:
    """Edges from several nodes to one, or from a stage or user space to several, go together; those of the cycle come
    first, each by itself.
    """
    processes = {row.node for row in why.processes}
    found: dict[object, list[Edge]] = {}
    for number, edge in enumerate(why.graph):
        one_end, what = (edge.on if edge.node in processes else edge.node), edge.what
        if edge.kind == "request":
            one_end, what = edge.node, ""
        key: object = number if edge.in_cycle else (one_end, edge.kind, what)
        found.setdefault(key, []).append(edge)
    return sorted(found.values(), key=lambda edges: _place(why, edges[0]))


def _place(why: Why, edge: Edge) -> int:
    return why.cycle.index(edge.node) if edge.in_cycle else len(why.cycle)


def _conclusions(why: Why) -> Iterable[Text]:
    if why.cycle:
        ring = " -> ".join((*why.cycle, why.cycle[0]))
        yield Text(f"\nDeadlock: {ring}. No time will end this.", style="bold red")
        if why.behind_cycle:
            yield Text(f"Behind it: {nodes_text(why.behind_cycle)}.", style="red")
    for number, root in enumerate(why.roots[:ROOTS]):
        yield Text(("" if number else "\n") + _root(root), style="bold" if root.state in COLORS else "")


def _root(root: Root) -> str:
    number = len(root.waiting)
    verb = "waits" if number == 1 else "wait"
    return f"{nodes_text(root.waiting)} {verb} in the end for {root.node} ({root.state}): {root.what}"
