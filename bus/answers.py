"""Answers of a query as people and programs read them: a table, CSV, JSON."""

from __future__ import annotations

import csv
import io
from typing import Literal

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bus.sql import Answer

TABLE_ROWS = 200
"""Rows of an answer that a table shows."""

_NUMBERS = ("INT", "DOUBLE", "FLOAT", "DECIMAL")
_json = msgspec.json.Encoder(decimal_format="number")


def print_answer(console: Console, answer: Answer) -> None:
    """The answer as a table of at most `TABLE_ROWS` rows; that there are more is said below it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name, kind in zip(answer.columns, answer.types, strict=True):
        justify: Literal["left", "right"] = "right" if _is_number(kind) else "left"
        table.add_column(Text(name), justify=justify, overflow="fold")
    for row in answer.rows[:TABLE_ROWS]:
        table.add_row(*(Text(_cell(value)) for value in row))
    console.print(table)
    if not answer.rows:
        console.print("no rows", style="dim")
    if len(answer.rows) > TABLE_ROWS:
        console.print(f"more than {TABLE_ROWS} rows: --format csv, json or parquet gives them all", style="dim")


def _is_number(kind: str) -> bool:
    return any(word in kind for word in _NUMBERS) and not kind.endswith("]")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value)


def csv_text(answer: Answer) -> str:
    """The answer as CSV with a header; NULL is an empty field, a list or structure is JSON."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(answer.columns)
    writer.writerows([_field(value) for value in row] for row in answer.rows)
    return out.getvalue()


def _field(value: object) -> object:
    if isinstance(value, list | dict):
        return _json.encode(value).decode()
    return str(value).lower() if isinstance(value, bool) else value


def json_text(answer: Answer) -> str:
    """The answer as one JSON array with an object a row; columns of type JSON are as they are in the record."""
    raw = [kind == "JSON" for kind in answer.types]
    rows = (_json.encode(_row(answer.columns, raw, row)).decode() for row in answer.rows)
    return "[" + ",\n ".join(rows) + "]\n"


def _row(columns: list[str], raw: list[bool], row: tuple[object, ...]) -> dict[str, object]:
    return {
        name: msgspec.Raw(value.encode()) if is_json and isinstance(value, str) else value
        for name, is_json, value in zip(columns, raw, row, strict=True)
    }
