"""Answers of queries as a table, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal

from rich.console import Console

from bus.answers import TABLE_ROWS, csv_text, json_text, print_answer
from bus.sql import Answer

ANSWER = Answer(
    ["name", "count", "share", "cpus", "counts", "ok"],
    ["VARCHAR", "BIGINT", "DECIMAL(4,2)", "BIGINT[]", "JSON", "BOOLEAN"],
    [('a "b",\nc', 2**64 - 1, Decimal("1.50"), [0, 1], '{"x":[1]}', True), (None, None, None, None, None, False)],
)


def table(answer: Answer) -> str:
    """What is printed."""
    console = Console(file=io.StringIO(), width=100)
    print_answer(console, answer)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_csv_reads_back() -> None:
    """CSV has a header, quotes what needs it, leaves NULL empty, and writes lists as JSON."""
    found = list(csv.reader(io.StringIO(csv_text(ANSWER))))
    assert found == [
        ["name", "count", "share", "cpus", "counts", "ok"],
        ['a "b",\nc', "18446744073709551615", "1.50", "[0,1]", '{"x":[1]}', "true"],
        ["", "", "", "", "", "false"],
    ]


def test_json_reads_back() -> None:
    """JSON is one array with an object a row; numbers are numbers, and what was JSON is not a string."""
    assert json.loads(json_text(ANSWER)) == [
        {"name": 'a "b",\nc', "count": 2**64 - 1, "share": 1.5, "cpus": [0, 1], "counts": {"x": [1]}, "ok": True},
        dict.fromkeys(("name", "count", "share", "cpus", "counts"), None) | {"ok": False},
    ]
    assert json.loads(json_text(Answer(["x"], ["DOUBLE"], []))) == []
    assert json.loads(json_text(Answer(["x"], ["DOUBLE"], [(float("nan"),)]))) == [{"x": None}]


def test_a_table_shows_names_and_values() -> None:
    """A table shows each value as people write it; text that looks like markup is text."""
    text = table(Answer(["[bold]", "cpus"], ["VARCHAR", "BIGINT[]"], [("[red]x", [0, 1]), (None, [])]))
    assert "[bold]" in text and "[red]x" in text and "0, 1" in text and " - " in text


def test_a_long_answer_is_cut_and_says_so() -> None:
    """A table has at most so many rows, and tells when there are more."""
    rows = [(f"row{number}",) for number in range(TABLE_ROWS + 1)]
    text = table(Answer(["x"], ["VARCHAR"], rows))
    assert f"row{TABLE_ROWS - 1}" in text and f"row{TABLE_ROWS} " not in text and "more than 200 rows" in text
    assert "more than" not in table(Answer(["x"], ["VARCHAR"], rows[:-1]))
    assert "no rows" in table(Answer(["x"], ["VARCHAR"], []))
