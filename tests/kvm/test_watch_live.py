"""`--watch` on a real terminal: it shows what goes on, and leaves the terminal as if it had never been there."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path

import pytest
from live import small

import launcher
from kvm.machine import Machine
from kvm.summary import BAD_INPUT, SAFE, UNFINISHED
from kvm.watching import Watching

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, LINES = 100, 30
PATIENCE_S = 60
RUN = ("run", "--watch", "--cpus", "2", "--vcpus", "4", "--updates", "1")

IN_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
PARTS = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")
TORN = re.compile(r"\x1b(\[[\d;?]*)?\Z")

PLAN = """
cpus = 3
seconds = 1.5
updates = 0
[[fault]]
at = "time"
after_ms = 200
do = "kill"
target = "cpu1"
for_ms = 300
[[fault]]
at = "time"
after_ms = 300
do = "stop"
target = "cpu2"
for_ms = 300
"""


class Terminal:
    """As much of a terminal as the view needs; anything else that is done to it is an error."""

    def __init__(self) -> None:
        self.rows = [""]
        self.row = 0
        self.cursor_visible = True
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._torn = ""

    def feed(self, data: bytes) -> None:
        """Take what a program wrote, up to any byte."""
        text = self._torn + self._decode(data)
        torn = TORN.search(text)
        self._torn = torn.group() if torn else ""
        for code, letter, _, down, plain in PARTS.findall(text.removesuffix(self._torn)):
            if plain:
                self.rows[self.row] += plain
            elif down:
                self.row += 1
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif letter:
                self._control(code, letter)

    def _control(self, code: str, letter: str) -> None:
        match code, letter:
            case _, "A":
                self.row -= int(code)
                assert self.row >= 0
            case "2", "K":
                self.rows[self.row] = ""
            case "?25", "h" | "l":
                self.cursor_visible = letter == "h"
            case _:
                assert letter == "m", f"ESC [ {code} {letter}"

    @property
    def screen(self) -> str:
        """What is to be seen, without the empty lines at its end."""
        return "\n".join(self.rows).rstrip()


def watched(*arguments: str, type_once: Callable[[str], bytes] = lambda _: b"") -> tuple[int, str, list[str], Terminal]:
    """Run a command whose stdin and stderr are a terminal: its status, its stdout, all screens, the terminal.

    `type_once` says for each screen what is typed, until that is anything.
    """
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", LINES, COLUMNS, 0, 0))
    modes = termios.tcgetattr(theirs)
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, sys.executable, str(ROOT / "launcher.py"), *arguments],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        start_new_session=True,
        env=clean | {"TERM": "xterm-256color"},
    )
    terminal, screens, typed, deadline = Terminal(), [""], b"", time.monotonic() + PATIENCE_S
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        assert time.monotonic() < deadline
        if select.select([ours], [], [], 0.02)[0]:
            terminal.feed(os.read(ours, 1 << 16))
            screens.append(terminal.screen)
            assert terminal.cursor_visible or "rates" not in terminal.screen, "SIGKILL would leave no cursor"
            if not typed and (typed := type_once(terminal.screen)):
                os.write(ours, typed)
    assert termios.tcgetattr(theirs) == modes
    os.close(ours)
    os.close(theirs)
    return process.returncode, process.communicate()[0], screens, terminal


def test_a_run_is_shown_while_it_goes_on_and_nothing_stays(tmp_path: Path) -> None:
    """Rows of CPUs with what they do, the update, then an empty terminal, and on stdout the summary alone."""
    status, out, screens, terminal = watched(*RUN, "--seconds", "1.2", "--json", "--run-dir", str(tmp_path / "run"))
    assert status == SAFE and json.loads(out)["verdict"] == "safe"
    seen = "\n".join(screens)
    for words in ("starting, ", " s of 1.2", "0 of 1 ended", "   1: done", "judging the records"):
        assert words in seen
    rows = set(re.findall(r"^   (\d) (\w+)", seen, re.MULTILINE))
    assert {number for number, _ in rows} == {"0", "1"} and {"guest", "offline"} <= {state for _, state in rows}
    assert max(int(rate) for rate in re.findall(r"exits ([\d]+)/s", seen)) > 0
    assert (terminal.screen, terminal.cursor_visible) == ("", True)


def test_faults_that_strike_are_told(tmp_path: Path) -> None:
    """Each fault of a plan, the death and the return of a process are events, in the order of their time."""
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    status, out, screens, terminal = watched("chaos", str(plan), "--watch", "--json", "--run-dir", str(tmp_path / "r"))
    assert status == SAFE and json.loads(out)["outcome"] == "held"
    told = re.findall(r"^ +([\d.]+) s  (.*)$", "\n".join(screens), re.MULTILINE)
    times = {event: float(time) for time, event in told}
    cpu1 = ["fault: kill cpu1", "cpu1 is dead (SIGKILL)", "fault: replug cpu1", "cpu1 is back, incarnation 2"]
    cpu2 = ["fault: stop cpu2", "fault: resume cpu2"]
    for events in (cpu1, cpu2):
        assert [times[event] for event in events] == sorted(times[event] for event in events)
    assert terminal.screen == ""


def test_ctrl_c_works_as_without_it(tmp_path: Path) -> None:
    """Typed while guests run, it takes the machine down: status 3, the one line that says so, no trace of the view."""
    status, out, _, terminal = watched(
        *RUN, "--seconds", "60", "--run-dir", str(tmp_path / "run"),
        type_once=lambda screen: b"\x03" if " guest " in screen else b"",
    )  # fmt: skip
    assert (status, out) == (UNFINISHED, "")
    assert terminal.screen == "seamlab: interrupted; the machine has been taken down"
    assert terminal.cursor_visible


def test_where_there_is_no_terminal_there_are_lines(tmp_path: Path) -> None:
    """Into a pipe it writes a line a second, without any control character; stdout has one JSON object all the same."""
    command = [sys.executable, str(ROOT / "launcher.py"), *RUN, "--seconds", "1.2", "--json"]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == SAFE and json.loads(done.stdout)["verdict"] == "safe"
    lines = done.stderr.splitlines()
    assert len(lines) >= 2 and all(line.startswith("seamlab: ") and line.isprintable() for line in lines)
    assert any(re.search(r"s of 1.2; .*\d+ exits/s, \d+ P-SEAMLDR calls/s", line) for line in lines)


async def test_a_view_that_cannot_be_shown_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the terminal, or the reader of the pipe, has gone away, the machine runs to its end."""

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    watching = Watching("gone")
    monkeypatch.setattr(sys, "stderr", Gone())
    async with Machine(small(tmp_path), watch=watching.follow) as machine:
        assert await machine.run_workload()
    assert machine.check().as_dict()["verdict"] == "safe"


def test_random_rounds_are_not_watched(capsys: pytest.CaptureFixture[str]) -> None:
    """`chaos --watch` wants a plan: one line, status 2."""
    assert launcher.main(["chaos", "--watch"]) == BAD_INPUT
    assert capsys.readouterr().err == "seamlab: --watch goes with a plan\n"
