"""The page: one HTML file with everything in it, which needs no network.

Summary, verdicts and stories are plain HTML; what the timeline draws is JSON of columns, packed with gzip and base64,
which the page unpacks by itself (DecompressionStream). Times in it are microseconds since the machine began.
"""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Iterable
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from bus.invariants import INVARIANTS
from bus.lanes import NAMES
from bus.marks import MarkKind
from bus.picture import Picture
from bus.records import Record
from bus.report import summary_rows
from bus.spec import LAUNCHER
from bus.story import text
from bus.summary_words import times_text

Summary = dict[str, Any]

HERE = Path(__file__).parent
TEXT_CHARACTERS = 240
"""Longest text of a record."""


class Points:
    """The records of one lane as columns: monotonic ns, Lamport time, number of the text."""

    def __init__(self) -> None:
        self.ts: list[int] = []
        self.clock: list[int] = []
        self.text: list[int] = []


class Strings:
    """Numbers texts in the order in which they first come."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a text."""
        return self.known.setdefault(text, len(self.known))


class Page:
    """Sees one history beside its painter; `render` gives the page."""

    def __init__(self) -> None:
        self._points: dict[str, Points] = {}
        self._strings = Strings()

    def see(self, record: Record) -> None:
        """The next record."""
        node = record["node"]
        points = self._points.get(node)
        if points is None:
            points = self._points[node] = Points()
        points.ts.append(record["ts"])
        points.clock.append(record["clock"])
        points.text.append(self._strings.number(text(record)[:TEXT_CHARACTERS]))

    def render(self, summary: Summary, picture: Picture) -> str:
        """The page as text."""
        parts = {
            "title": escape(f"{summary['strategy']}: {summary['verdict']}"),
            "strategy": escape(str(summary["strategy"])),
            "verdict": escape(summary["verdict"]),
            "machine": escape(_machine(summary)),
            "summary": _rows(summary),
            "stories": "\n".join(_story(*numbered) for numbered in enumerate(summary["violations"])),
            "invariants": _invariants(summary),
            "css": (HERE / "timeline.css").read_text(),
            "js": "".join((HERE / name).read_text() for name in ("timeline_draw.js", "timeline.js")),
            "data": pack(self.data(summary, picture)),
        }
        return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], (HERE / "timeline.html").read_text())

    def data(self, summary: Summary, picture: Picture) -> dict[str, Any]:
        """What the timeline draws, as columns. Times of points and intervals are differences, each to the one before.
        """
        rows = {node: number for number, node in enumerate(picture.lanes)}
        elsewhere = rows.get(LAUNCHER, 0)
        at, number = _clock(picture.begin), self._strings.number
        told = [
            [rows.get(event["node"], elsewhere), at(event["ts"]), story]
            for story, violation in enumerate(summary["violations"])
            for event in violation["first"]["events"]
        ]
        data = {
            "end": max(1, at(picture.end)),
            "states": list(NAMES.values()),
            "kinds": [kind.name.lower() for kind in MarkKind],
            "lanes": [self._lane(node, picture) for node in picture.lanes],
            "marks": [[rows.get(m.node, elsewhere), at(m.ts), int(m.kind), number(m.text)] for m in picture.marks],
            "arrows": {
                "kind": [a.kind for a in picture.arrows],
                "source": [rows[a.source] for a in picture.arrows],
                "sent": _steps(at(a.sent) for a in picture.arrows),
                "target": [rows[a.target] for a in picture.arrows],
                "length": [at(a.taken) - at(a.sent) for a in picture.arrows],
                "text": [number(a.text) for a in picture.arrows],
            },
            "stages": [[at(s.begin), at(s.end), s.update, s.name] for s in picture.stages],
            "locks": [_lock(lock, picture, rows) for lock in _locks(picture)],
            "stories": [violation["invariant"] for violation in summary["violations"]],
            "told": told,
        }
        return data | {"strings": list(self._strings.known)}

    def _lane(self, node: str, picture: Picture) -> dict[str, Any]:
        at, intervals, points = _clock(picture.begin), picture.lanes[node], self._points.get(node, Points())
        return {
            "node": node,
            "begin": _steps(at(interval.begin) for interval in intervals),
            "length": [at(interval.end) - at(interval.begin) for interval in intervals],
            "state": [int(interval.state) for interval in intervals],
            "what": [self._strings.number(interval.what) for interval in intervals],
            "ts": _steps(map(at, points.ts)),
            "clock": _steps(points.clock),
            "text": points.text,
        }


def _locks(picture: Picture) -> list[str]:
    """The locks that were held, P-SEAMLDR's first."""
    return sorted({hold.lock for hold in picture.holds}, key=lambda lock: (lock != "seamldr_lock", lock))


def _lock(lock: str, picture: Picture, rows: dict[str, int]) -> dict[str, Any]:
    at, holds = _clock(picture.begin), [hold for hold in picture.holds if hold.lock == lock]
    return {
        "lock": lock,
        "begin": _steps(at(hold.begin) for hold in holds),
        "length": [at(hold.end) - at(hold.begin) for hold in holds],
        "row": [rows.get(hold.node, 0) for hold in holds],
    }


def _clock(begin: int) -> Any:
    """From monotonic ns to microseconds since the begin."""
    return lambda ts: (ts - begin) // 1000


def _steps(numbers: Iterable[int]) -> list[int]:
    """The first number, then differences."""
    return [after - before for before, after in pairwise([0, *numbers])]


def pack(data: dict[str, Any]) -> str:
    """As the page holds it; the same data give the same text."""
    return base64.b64encode(gzip.compress(msgspec.json.encode(data), compresslevel=6, mtime=0)).decode()


def unpack(page: str) -> dict[str, Any]:
    """The data of a page, as its script unpacks them; raises ValueError if there are none."""
    found = re.search(r'<script id="data"[^>]*>([^<]*)</script>', page)
    if found is None:
        raise ValueError("this page holds no data")
    data: dict[str, Any] = msgspec.json.decode(gzip.decompress(base64.b64decode(found[1])))
    return data


def _machine(summary: Summary) -> str:
    return f"{summary['cpus']} CPUs, {summary['vcpus']} vCPUs, {summary['tds']} TDs, seed {summary['seed']}"


def _rows(summary: Summary) -> str:
    rows: dict[str, list[str]] = {}
    for name, value in summary_rows(summary):
        rows.setdefault(name, []).append(str(value))
    return "\n".join(
        f"<dt>{escape(name)}</dt><dd>{'<br>'.join(map(escape, values))}</dd>" for name, values in rows.items()
    )


def _story(number: int, violation: Summary) -> str:
    """A violation with its events, and the button that shows them on the timeline."""
    follows = violation["follows_from"]
    head = f"{violation['invariant']} {violation['slug']}, {times_text(violation['count'])}"
    head += f", follows from {', '.join(follows)}" if follows else ""
    lines = "\n".join(violation["first"]["text"])
    return (
        f'<details class="story"{"" if follows else " open"}><summary>{escape(head)}</summary>'
        f"<pre>{escape(lines)}</pre>"
        f'<button type="button" data-story="{number}">Show on the timeline</button></details>'
    )


def _invariants(summary: Summary) -> str:
    """A row an invariant, the broken ones first."""
    broken = {violation["invariant"]: violation for violation in summary["violations"]}
    rows = []
    for id, invariant in sorted(INVARIANTS.items(), key=lambda item: item[0] not in broken):
        violation = broken.get(id)
        word = "held" if violation is None else f"broken {times_text(violation['count'])}"
        rows.append(
            f'<tr class="{"held" if violation is None else "broken"}"><td>{id}</td><td>{escape(invariant.slug)}</td>'
            f"<td>{word}</td><td>{escape(invariant.sentence)}</td></tr>"
        )
    return "\n".join(rows)
