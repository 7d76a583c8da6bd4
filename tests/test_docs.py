"""What the documentation says is true: generated pages, links, command lines, examples, docstrings."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bus.docs
import kvm.docs
import launcher
from bus.judge import judge_records
from cpu.vmx import run_script
from kvm.compose import CHOICES, Knobs, parse_knobs
from seamldr import api
from seamldr.strategies import STRATEGIES, find_strategy

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
ROOMS = ("bus", "cpu", "seamldr", "kvm")
GENERATED = {**bus.docs.PAGES, "knobs.md": kvm.docs.knobs_page, "hazards.md": kvm.docs.hazards_page}

COMMAND = re.compile(r"(?:^|(?<=[ `/]))(?:seamlab|python launcher\.py)((?: [^`|#\n]*)?)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_page(name: str) -> None:
    """A generated page is what the generator gives now: else run `python -m bus.docs` and `python -m kvm.docs`."""
    make: Callable[[], str] = GENERATED[name]
    assert (ROOT / "docs" / name).read_text() == make()


def prose(page: Path) -> str:
    """The text of a page without code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in HEADING.findall(prose(page))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that exists, and a heading in it."""
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def command_lines(page: Path) -> Iterator[list[str]]:
    """Arguments of every command line in code: those that follow `$`, and those in code blocks and spans."""
    for line in page.read_text().splitlines():
        code = [line] if line.startswith("    ") else re.findall(r"`[^`]+`", line)
        for span in code:
            for words in COMMAND.findall(span):
                arguments = shlex.split(words)
                if arguments and re.fullmatch(r"[a-z]+", arguments[0]):
                    yield arguments


def all_command_lines() -> list[tuple[str, list[str]]]:
    """Every command line of every page, with the page's name."""
    return [(page.name, arguments) for page in PAGES for arguments in command_lines(page)]


@pytest.mark.parametrize(("page", "arguments"), all_command_lines(), ids=lambda value: str(value)[:60])
def test_command_lines_parse(page: str, arguments: list[str]) -> None:
    """Every `seamlab ...` in the pages is a command line that the parser takes."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            parsed = launcher._parser().parse_args(arguments)
    except SystemExit as end:
        assert end.code == 0 or arguments == ["module"], f"{page}: {errors.getvalue()}"
    else:
        parse_knobs([knob for knob in getattr(parsed, "knob", []) if knob != "NAME=VALUE"])


def test_there_are_command_lines() -> None:
    """The search for command lines finds those that it must."""
    found = [" ".join(arguments) for _, arguments in all_command_lines()]
    assert len(found) > 20
    assert any(line.startswith("run --strategy my_idea.py:seamldr_call") for line in found)


def blocks(name: str, language: str) -> list[str]:
    """Fenced code blocks of a page of docs/."""
    text = (ROOT / name).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/strategies.md"])
def test_example_strategy_runs(page: str, tmp_path: Path) -> None:
    """The strategy that a page tells the reader to save loads, and a short run of it is safe."""
    file = tmp_path / "my_idea.py"
    file.write_text(blocks(page, "python")[0])
    strategy = f"{file}:seamldr_call"
    find_strategy(strategy)
    arguments = ["run", "--cpus", "2", "--vcpus", "4", "--updates", "1", "--seconds", "0.4", "--json"]
    command = [sys.executable, str(ROOT / "launcher.py"), *arguments, "--strategy", strategy]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["updates"]["succeeded"] == 1


def test_machine_example_runs(tmp_path: Path) -> None:
    """The example of docs/library.md prints what the page says."""
    example = blocks("docs/library.md", "python")[0]
    done = subprocess.run(
        [sys.executable, "-c", example],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs/library.md").read_text().replace("\n    ", "\n")
    assert "'I3'" in done.stdout


def test_second_library_example_is_python() -> None:
    """The pytest example of docs/library.md compiles."""
    compile(blocks("docs/library.md", "python")[1], "library.md", "exec")


def test_vmx_script_example() -> None:
    """The script of docs/vmx-script.md gives the results that the page shows, in their order."""
    page = "docs/vmx-script.md"
    script = json.loads(blocks(page, "json")[0])
    results = run_script(script["config"], script["ops"])
    shown = [json.loads(row) for row in re.findall(r"^    (\[.*\])$", (ROOT / page).read_text(), re.MULTILINE)]
    rows = [[r["status"], r["error"], r["value"], (r["exit"] or {}).get("reason")] for r in results]
    assert shown[0] == rows[0]
    assert shown[1:] == rows[-len(shown) + 1 :]


def test_catalogue_is_documented() -> None:
    """docs/strategies.md has a row for each strategy of the catalogue, in its order."""
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs/strategies.md").read_text(), re.MULTILINE)
    assert rows == list(STRATEGIES)


def test_strategy_api_is_documented() -> None:
    """docs/strategies.md names all that `seamldr.api` offers."""
    text = (ROOT / "docs/strategies.md").read_text()
    assert [name for name in api.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_summary_is_documented() -> None:
    """docs/summary.md names every field of the summary."""
    text = (ROOT / "docs/summary.md").read_text()
    fields = [*judge_records([]).as_dict(), "run_dir"]
    assert [field for field in fields if f"`{field}`" not in text] == []


def modules() -> list[str]:
    """Every module of the project."""
    names = ["launcher"]
    for room in ROOMS:
        names.append(room)
        names += [found.name for found in pkgutil.walk_packages([str(ROOT / room)], f"{room}.")]
    return [name for name in names if not name.endswith("__main__")]


def test_docstring_examples() -> None:
    """Every `>>>` in a docstring gives what it says."""
    attempted = 0
    for name in modules():
        result = doctest.testmod(importlib.import_module(name), verbose=False)
        assert result.failed == 0, name
        attempted += result.attempted
    assert attempted > 10


def test_pages_stand_alone() -> None:
    """Pages do not name the place where they were written."""
    assert [page.name for page in PAGES if str(ROOT) in page.read_text()] == []


def test_generators_are_complete() -> None:
    """Every knob has a meaning, and no meaning is left of a knob that is gone."""
    assert kvm.docs.MEANINGS.keys() == set(inspect.signature(Knobs).parameters)
    values = {name: set(meanings) for name, (_, meanings) in kvm.docs.MEANINGS.items() if meanings}
    assert values == {name: set(choices) for name, choices in CHOICES.items()}
