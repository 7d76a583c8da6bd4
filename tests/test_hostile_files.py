"""Every command with files that nobody should have to read: one clear line and status 2, or a note, and soon.

A file is cut off, huge, endless, deep, not UTF-8, no file at all, or says what no record, plan or script would.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

import launcher
from bus.merge import LONGEST_LINE
from cpu.vmx.__main__ import main as vmx_main
from kvm.plan import MAX_PLAN_BYTES
from kvm.summary import BAD_INPUT, SAFE, UNFINISHED, VIOLATED
from kvm.topology import Topology

PATIENCE_S = 30
MACHINE = {"strategy": "none", "knobs": {}, "seed": 1, "cpus": 2, "vcpus": 2, "tds": 0, "updates": 1}


@contextmanager
def in_time() -> Iterator[None]:
    """Fail if the block hangs, also in a system call."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(*arguments: str) -> int:
    """The exit status of a command."""
    with in_time():
        try:
            return launcher.main(arguments)
        except SystemExit as end:
            return int(end.code or 0)


# Any file


def cut_off(path: Path, good: bytes) -> None:
    path.write_bytes(good[: len(good) // 2])


def huge(path: Path, good: bytes) -> None:
    path.write_bytes(good)
    os.truncate(path, 1 << 28)


def noise(path: Path, good: bytes) -> None:
    path.write_bytes(bytes(range(256)) * 64)


def deep(path: Path, good: bytes) -> None:
    path.write_bytes(b'{"config": ' + b"[" * 100_000)


def not_utf8(path: Path, good: bytes) -> None:
    path.write_bytes(good[:20] + b"\xff\xfe" + good[20:])


def a_pipe(path: Path, good: bytes) -> None:
    os.mkfifo(path)


def endless(path: Path, good: bytes) -> None:
    path.symlink_to("/dev/zero")


def a_directory(path: Path, good: bytes) -> None:
    path.mkdir()


def around_itself(path: Path, good: bytes) -> None:
    path.symlink_to(path)


def nothing(path: Path, good: bytes) -> None:
    pass


def empty(path: Path, good: bytes) -> None:
    path.touch()


SPOIL: list[Callable[[Path, bytes], None]] = [
    cut_off, huge, noise, deep, not_utf8, a_pipe, endless, a_directory, around_itself, nothing,
]  # fmt: skip
PLAN = b'strategy = "none"\ncpus = 2\n[[fault]]\nat = "resident"\ndo = "kill"\n'


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize(
    "command",
    [
        "chaos {}",
        "run --faults {}",
        "run --module {}",
        "module inspect {}",
        "module verify {}",
        "module verify {good} --running {}",
        "run --strategy {}:f",
        "analyze {}",
        "why {}",
    ],
)
def test_a_bad_file_is_one_clear_line(
    command: str,
    spoil: Callable[[Path, bytes], None],
    tmp_path: Path,
    image: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Status 2 and one line of at most 500 characters, before any machine starts."""
    monkeypatch.chdir(tmp_path)
    suffix = ".py" if "strategy" in command else ".dat"
    path = tmp_path / f"file{suffix}"
    spoil(path, image.read_bytes() if "module" in command else PLAN)
    status = run(*command.format(path, good=image).split())
    output = capsys.readouterr()
    assert not (tmp_path / "runs").exists()
    if command == "module verify {}" and spoil in (cut_off, noise, deep, not_utf8):
        assert status == VIOLATED and output.err == ""  # which rules it breaks is the answer
        return
    assert (status, output.out) == (BAD_INPUT, "")
    assert len(output.err.splitlines()) == 1 and len(output.err) < 500, output.err


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module image."""
    path = tmp_path_factory.mktemp("image") / "module.bin"
    assert launcher.main(["module", "make", str(path)]) == SAFE
    return path


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda spoil: spoil.__name__)
def test_a_bad_vmx_script_is_one_clear_line(
    spoil: Callable[[Path, bytes], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m cpu.vmx` has the same manners."""
    path = tmp_path / "script.json"
    spoil(path, b'{"config": {}, "ops": [{"op": "vmxon", "pa": "0x1000"}]}')
    with in_time():
        assert vmx_main([str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1 and len(output.err) < 500


@pytest.mark.parametrize("spoil", [huge, a_pipe, a_directory, endless], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("command", ["module verify {}", "run --module {} --cpus 1 --run-dir {}.run"])
def test_a_bad_file_beside_an_image_is_one_clear_line(
    command: str, spoil: Callable[[Path, bytes], None], tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FILE.signer, where the hash of the signer is looked for."""
    path = tmp_path / "module.bin"
    shutil.copy(image, path)
    spoil(tmp_path / "module.bin.signer", b"0" * 96)
    assert run(*command.format(path, path).split()) == BAD_INPUT
    message = capsys.readouterr().err
    assert "signer" in message and len(message.splitlines()) == 1


def test_a_signer_that_is_no_hash_is_not_believed(
    tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not UTF-8 is no hash."""
    path = tmp_path / "module.bin"
    shutil.copy(image, path)
    not_utf8(tmp_path / "module.bin.signer", b"0" * 96)
    assert run("module", "verify", str(path)) == VIOLATED
    assert "EBADSIG" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 50_000,
        "a." * 20_000 + "a = 1",
        "x = " + "1" * 5000,
        "seconds = 1e999",
        "seconds = nan",
        "cpus = 99999999999999999999",
        '"\\u001b[2J" = 1',
        'strategy = "\\u0000.py:f"',
        'strategy = "' + "x" * 5000 + '.py:f"',
        "[[fault]]\nat = 'time'\ndo = 'stop'\ntarget = 'cpu1'\n" * 5000,
        "knobs = 1",
        "x = {" + "a." * 20_000 + "a = 1}",
        "x = 1979-99-99",
        "#" * MAX_PLAN_BYTES + "\n",
    ],
    ids=lambda text: text[:12].strip(),
)
def test_a_plan_that_no_machine_could_have_is_one_clear_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Deep, long, too large, not printable: refused, and nothing of it moves the cursor of a terminal."""
    path = tmp_path / "plan.toml"
    path.write_text(text)
    assert run("chaos", str(path), "--run-dir", str(tmp_path / "run")) == BAD_INPUT
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and len(message) < 500 and message.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "text", ["9" * 400 + "s1c1t", "-1s1c1t", "1s1c1t ", "\u0661s1c1t", "999s999c99t", "", "0s0c0t", "1s1c1t\n"]
)
def test_a_topology_that_is_none_is_one_clear_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Too large, negative, in other digits, with a tail."""
    assert run("run", f"--topology={text}") == BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 1


# Records


def line(node: str, seq: int, event: str, **fields: object) -> bytes:
    record = {"ts": seq, "clock": seq, "node": node, "pid": 1, "seq": seq, "event": event} | fields
    return json.dumps(record).encode() + b"\n"


def a_run(tmp_path: Path) -> Path:
    """The records of a machine that did nothing."""
    records = tmp_path / "run" / "records"
    records.mkdir(parents=True)
    begin = line("launcher", 1, "machine_begin", **MACHINE)
    online = line("launcher", 2, "process_online", name="cpu0", incarnation=1)
    (records / "launcher.jsonl").write_bytes(begin + online + line("launcher", 3, "machine_end", finished=1, why=""))
    (records / "cpu0.jsonl").write_bytes(b"".join(line("cpu0", seq, "log", text="x") for seq in range(1, 9)))
    return records


def after(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


def replaced(spoil: Callable[[Path, bytes], None]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        good = path.read_bytes()
        path.unlink()
        spoil(path, good)

    return act


STRANGE: dict[str, Callable[[Path], None]] = {
    **{spoil.__name__: replaced(spoil) for spoil in (*SPOIL, empty)},
    "deep in a record": lambda path: after(path, line("cpu0", 9, "log", text="@").replace(b'"@"', b"[" * 99_999)),
    "deep and whole": lambda path: after(
        path, line("cpu0", 9, "log", text="@").replace(b'"@"', b"[" * 5000 + b"]" * 5000)
    ),
    "a line without end": lambda path: after(path, b"a" * (3 * LONGEST_LINE) + b"\n" + line("cpu0", 9, "log", text="")),
    "twice": lambda path: after(path, path.read_bytes()),
    "zeros": lambda path: after(path, bytes(100_000)),
    "clock of all bits": lambda path: after(path, line("cpu0", 9, "log", text="", clock=2**64)),
    "clock before all": lambda path: after(path, line("cpu0", 9, "log", text="", clock=-(10**30))),
    "number without end": lambda path: after(path, line("cpu0", 9, "log", ts=10**4000)),
    "numbers as text": lambda path: after(path, line("cpu0", 9, "log", ts="9", text=9)),
    "lists as names": lambda path: after(path, line("cpu0", 9, "lock_grant", lock=[], to={}, request=None)),
    "a record that says nothing": lambda path: after(path, line("cpu0", 9, "vmread") + line("cpu0", 10, "lock_hold")),
    "an event of no table": lambda path: after(path, line("cpu0", 9, "x" * 9999)),
    "not an object": lambda path: after(path, b"[]\n1\nnull\n"),
    "a node that is none": lambda path: after(path, line("cpu99999999999999999999", 9, "log", text="")),
    "a CPU beyond all": lambda path: after(path, line("cpu0", 9, "ipi_send", target=2**62, vector=1, nmi=0, id="")),
    "terminal codes": lambda path: after(path, line("\x1b[2J", 9, "log", text="\x1b[2J[/bold]\x9b2J")),
}


@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE.keys())
@pytest.mark.parametrize("option", ["", " --check", " --json"])
def test_strange_records_are_noted_or_one_clear_line(
    change: Callable[[Path], None], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of one CPU may be anything: the run is read to its end, and nothing of it moves a terminal's cursor."""
    records = a_run(tmp_path)
    change(records / "cpu0.jsonl")
    assert run("analyze", str(records.parent), *option.split()) in (SAFE, VIOLATED, UNFINISHED)
    assert run("why", str(records.parent), *option.replace("--check", "").split()) == SAFE
    output = capsys.readouterr()
    assert output.err == "" and "\x1b" not in output.out and "\x9b" not in output.out


@pytest.mark.parametrize(
    "change", [STRANGE[name] for name in ("noise", "a_pipe", "deep", "endless", "cut_off", "twice", "lists as names")]
)
@pytest.mark.parametrize("option", ["--html", "--perfetto", "--shiviz", "--ftrace", "--junit", "--markdown"])
def test_strange_records_can_be_drawn(
    change: Callable[[Path], None], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can be read of them is drawn, in every format."""
    records = a_run(tmp_path)
    change(records / "cpu0.jsonl")
    out = tmp_path / "out"
    assert run("analyze", str(records.parent), option, str(out)) != BAD_INPUT
    assert out.stat().st_size > 0 and capsys.readouterr().err == ""


def test_unreadable_records_are_counted_in_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three lines that are no records, and a file that is none: both are said, and the run is incomplete."""
    records = a_run(tmp_path)
    bad = line("cpu0", 9, "log", text=1) + b"\xff\xff\n" + b"{" * 9999 + b"\n" + line("cpu0", 9, "log", text="")
    after(records / "cpu0.jsonl", bad)
    os.mkfifo(records / "kvm.jsonl")
    assert run("analyze", str(records.parent), "--json") == UNFINISHED
    summary = json.loads(capsys.readouterr().out)
    assert "cpu0 has unreadable lines (3)" in summary["notes"]
    assert "kvm.jsonl cannot be read: not a regular file" in summary["notes"]
    assert "records are missing or unreadable" in summary["why"]


def test_a_run_that_may_only_be_read_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where summary.json cannot be written, the verdict is printed all the same, and the reason is said."""
    records = a_run(tmp_path)
    (records.parent / "summary.json").mkdir()
    assert run("analyze", str(records.parent)) == UNFINISHED
    output = capsys.readouterr()
    assert "incomplete" in output.out and output.err == "seamlab: summary.json is not written: Is a directory\n"


def test_a_topology_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    """Numbers beyond all limits are refused, as from the command line so from a library's user."""
    for wrong in ({"cpus": sys.maxsize}, {"vcpus": -1}, {"tds": 1 << 70}, {"seconds": float("inf")}):
        with pytest.raises(ValueError, match=r" is "):
            Topology(run_dir=str(tmp_path / "run"), **wrong).validate()  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
