"""`module make`, `inspect` and `verify`: files in, tables out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from rich.table import Table
from rich.text import Text

from seamldr.identity import make_identity
from seamldr.image import ImageError, build_v1, build_v2
from seamldr.module_maker import make_module
from seamldr.platform import LoaderProfile, Platform
from seamldr.sigstruct import SigStruct, new_key, signer_hash
from seamldr.verdict import describe_image, verify_image

SIGNER_SUFFIX = ".signer"
"""Beside an image made here lies a file with the hash of its key, by which a machine trusts it."""


class ModuleCommandError(ValueError):
    """The file or a parameter is unusable; one line for the user."""


def make_module_file(path: Path, version: str, profile: str, pages: int, v1: bool) -> str:
    """Write a signed image and its signer's hash; what was made, as a sentence. Raises `ModuleCommandError`."""
    handoff: Literal["A", "B"] = "B" if profile == "B" else "A"
    try:
        image = make_module(make_identity(version, handoff), key=new_key(), pages=pages)
        blob = build_v1(image) if v1 else build_v2(image)
        path.write_bytes(blob)
        signer = signer_hash(SigStruct.decode(image.sigstruct))
        path.with_name(path.name + SIGNER_SUFFIX).write_text(signer + "\n")
    except ValueError as error:
        raise ModuleCommandError(str(error)) from None
    except OSError as error:
        raise ModuleCommandError(f"{path} cannot be written: {error.strerror}") from None
    container = "version 1" if v1 else "version 2"
    return f"{path}: TDX module {version}, {len(blob)} bytes, {container}, signed by a new key ({signer[:16]}...)"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModuleCommandError(f"{path} cannot be read: {error.strerror}") from None


def inspect_module(path: Path) -> Table:
    """Every field of the image; raises `ModuleCommandError` if there is no telling its fields."""
    try:
        rows = describe_image(_read(path))
    except ImageError as error:
        raise ModuleCommandError(f"{path} is not a TDX module image: {error}") from None
    table = Table(title=str(path), title_justify="left")
    for column in ("field", "value", "meaning"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def verify_module(path: Path, fms: int, profile: str) -> tuple[Table, bool]:
    """Every rule with its outcome, and whether the image would be taken. Raises `ModuleCommandError`."""
    blob = _read(path)
    beside = path.with_name(path.name + SIGNER_SUFFIX)
    trusted = (beside.read_text().strip(),) if beside.is_file() else ()
    platform = msgspec.structs.replace(
        Platform(), profile=LoaderProfile(profile), fms=(fms,), trusted_signers=trusted
    )
    report = verify_image(blob, platform)
    stop = report.first_failure
    words = "would be installed" if stop is None else f"stops at: {stop.title} ({stop.outcome})"
    table = Table(title=f"{path}: {words}", title_justify="left")
    for column in ("rule", "demands", "outcome"):
        table.add_column(column, overflow="fold")
    for finding in report.findings:
        style = "green" if finding.ok else "bold red" if finding is stop else "red"
        table.add_row(finding.rule, Text(finding.title), Text(finding.outcome, style=style))
    return table, report.accepted
