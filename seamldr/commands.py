"""`module make`, `inspect` and `verify`: files in, tables out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from bus.files import read_file_within
from seamldr.identity import make_identity
from seamldr.image import MAX_FILE, ImageError, ModuleImage, build_v1, build_v2, parse
from seamldr.module_maker import make_module
from seamldr.platform import LoaderProfile, Platform
from seamldr.sigstruct import SigStruct, new_key, signer_hash
from seamldr.status import Scenario
from seamldr.verdict import Finding, ImageReport, describe_image, verify_image

SIGNER_SUFFIX = ".signer"
"""Beside an image made here lies a file with the hash of its key, by which a machine trusts it."""
MAX_SIGNER = 4096


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
        return read_file_within(path, MAX_FILE)
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


def verify_module(path: Path, fms: int, profile: str, running: Path | None = None) -> tuple[Table, bool]:
    """Every rule with its outcome, and whether the image would be taken. Raises `ModuleCommandError`.

    Without `running` this is the first module of the platform (LOAD); else an UPDATE of the module in that file.
    """
    blob = _read(path)
    trusted = tuple(signer for file in (path, running) if file is not None for signer in _signer_of(file))
    platform = Platform(profile=LoaderProfile(profile), fms=(fms,), trusted_signers=trusted)
    old = None if running is None else _running_module(running, platform)
    report = verify_image(blob, platform, Scenario.LOAD if old is None else Scenario.UPDATE, old)
    stop = report.first_failure
    caption = f"assumed: {report.assumed}"
    table = Table(title=f"{path}: {_verdict(report)}", title_justify="left", caption=caption, caption_justify="left")
    for column in ("rule", "demands", "outcome"):
        table.add_column(column, overflow="fold")
    for finding in report.findings:
        style = "green" if finding.ok else "bold red" if finding is stop else "red"
        table.add_row(finding.rule, Text(finding.title), Text(finding.outcome, style=style))
    return table, report.accepted


def _verdict(report: ImageReport) -> str:
    """The outcome in words; of a version 1 file also what would become of it in the other container."""
    words = _outcome(report.first_failure)
    if report.reframable:
        words += f"; as version 2 it {_outcome(report.first_loader_failure)}"
    return words


def _outcome(stop: Finding | None) -> str:
    return "would be installed" if stop is None else f"stops at: {stop.title} ({stop.outcome})"


def signer_beside(path: str | Path) -> tuple[str, ...]:
    """The hash of the signer that is kept beside an image that `module make` made, if it is; raises `OSError`."""
    beside = Path(f"{path}{SIGNER_SUFFIX}")
    return (read_file_within(beside, MAX_SIGNER).decode(errors="replace").strip(),) if beside.exists() else ()


def _signer_of(path: Path) -> tuple[str, ...]:
    try:
        return signer_beside(path)
    except OSError as error:
        raise ModuleCommandError(f"{path}{SIGNER_SUFFIX} cannot be read: {error.strerror}") from None


def _running_module(path: Path, platform: Platform) -> ModuleImage:
    """The module of a file, if P-SEAMLDR would have loaded it; either container will do."""
    try:
        image = parse(_read(path))
    except ImageError as error:
        raise ModuleCommandError(f"{path} is not a TDX module image: {error}") from None
    refusal = verify_image(build_v2(image), platform).first_failure
    if refusal is not None:
        raise ModuleCommandError(f"{path} cannot be running there: {refusal.title} ({refusal.outcome})")
    return image
