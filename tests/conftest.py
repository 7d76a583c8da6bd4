"""Conformance rows: which tests show them, and the table of README.md that counts those that pass.

A test that shows a row has the mark `conformance(KIND)` or `conformance(KIND, ROW, ...)`. Without rows the row is in
the id of the parameters, as in "row-53-alignment", or in the name of the function, as in "test_h14b_...". A row passes
if all tests that show it do. `--conformance=FILE` counts, and writes the table between the two comments in FILE.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

BEGIN, END = "<!-- conformance: `make conformance` writes this table -->", "<!-- end of conformance -->"


def _numbers(first: int, last: int, prefix: str = "") -> set[str]:
    return {f"{prefix}{number}" for number in range(first, last + 1)}


KINDS: dict[str, tuple[str, set[str] | None]] = {
    "VMX instructions": ("a state, an instruction or event, its exact outcome", _numbers(1, 88)),
    "VMCS fields": ("an encoding: width, type, read-only rule, high half, the feature it needs", None),
    "P-SEAMLDR calls": ("a call, good or bad, its exact status and what is left", _numbers(1, 113)),
    "Module manifests": ("a rule, a processor, or a range of tampered bytes", None),
    "Image files": ("a file that is uploaded: what the kernel answers, and when", _numbers(114, 128)),
    "TDX module states": ("a leaf in a state of the module", None),
    "TDX module calls": ("a situation and the exact RAX, or a sequence", _numbers(1, 72) | _numbers(1, 12, "F")),
    "TDX module checks": ("a leaf with a wrong page, state or lock of its TD, and the exact statuses", None),
    "Golden sequences": ("a history of one CPU, with the number of VMX instructions", _numbers(1, 10, "G")),
    "Hazards": (
        "a way in which it goes wrong, shown by what one would observe",
        _numbers(0, 35, "H") | {"H0b", "H2b", "H5b", "H9b", "H14b"},
    ),
}
"""What a row of each kind is, and the rows that there are; None: those that have a test."""

_IN_ID = re.compile(r"\brow-(\w+)")
_IN_NAME = re.compile(r"test_((?:[a-z]\d+[a-z]?_)+)")


def rows_of(item: pytest.Item) -> Iterator[tuple[str, str]]:
    """Kind and row of all rows that a test shows; raises UsageError for a row that there is not."""
    for mark in item.iter_markers("conformance"):
        kind, *named = mark.args
        if kind not in KINDS:
            raise pytest.UsageError(f"{item.nodeid}: no kind of conformance row is {kind!r}")
        for row in map(str, named) if named else _implied(item):
            known = KINDS[kind][1]
            if known is not None and row not in known:
                raise pytest.UsageError(f"{item.nodeid}: {kind} have no row {row}")
            yield kind, row


def _implied(item: pytest.Item) -> list[str]:
    callspec = getattr(item, "callspec", None)
    found = _IN_ID.search(callspec.id) if callspec is not None else None
    if found is not None:
        return [found[1].lstrip("0") or "0"]
    named = _IN_NAME.match(item.name)
    return [name[0].upper() + name[1:] for name in named[1].split("_") if name] if named is not None else []


class ConformanceTable:
    """Counts rows during a run, and writes the table at its end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.shown_by: dict[str, set[tuple[str, str]]] = {}
        self.failed: set[tuple[str, str]] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Remember which test shows which rows."""
        self.shown_by = {item.nodeid: set(rows_of(item)) for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A row that is skipped has not been shown."""
        if not report.passed:
            self.failed |= self.shown_by.get(report.nodeid, set())

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the table, unless the run was cut short. If nothing but collected, as if all had passed."""
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            before, _, rest = self.file.read_text().partition(BEGIN)
            self.file.write_text(f"{before}{BEGIN}\n{self.table()}{END}{rest.partition(END)[2]}")

    def table(self) -> str:
        """The table in Markdown."""
        shown = set().union(*self.shown_by.values())
        lines = ["| kind | a row is | rows | pass |", "|---|---|---:|---:|"]
        for kind, (meaning, known) in KINDS.items():
            rows = {row for found, row in shown if found == kind} if known is None else known
            passed = sum((kind, row) in shown and (kind, row) not in self.failed for row in rows)
            lines.append(f"| {kind} | {meaning} | {len(rows)} | {passed} |")
        return "\n".join(lines) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--conformance=FILE`."""
    parser.addoption("--conformance", metavar="FILE", type=Path, help="count conformance rows, write the table in FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Count rows if asked to."""
    file = config.getoption("--conformance")
    if file is not None:
        config.pluginmanager.register(ConformanceTable(file), "conformance")
