"""Chaos on live machines: what a plan does, how a failure is shrunk, what the command says, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live import children, parent_of, records

from bus.linkfaults import LinkRule
from kvm.campaign import run_round, shrink
from kvm.chaos_command import read_plan
from kvm.plan import Fault, Plan, write_plan

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE: dict[str, Any] = {"cpus": 3, "vcpus": 6, "updates": 1, "seconds": 0.8}


def socket_dir(launcher: int) -> Path:
    """Where the sockets of a launcher's machine are: the last argument of its only child."""
    (child,) = [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_child(int(name), launcher)]
    return Path(Path(f"/proc/{child}/cmdline").read_text().split("\0")[-2])


def _is_child(pid: int, parent: int) -> bool:
    try:
        return parent_of(pid) == parent
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_every_kind_of_fault_strikes_and_is_undone(tmp_path: Path) -> None:
    """One round with a kill, a stop, a slow-down, hotplug and link faults: all strike, all are undone, it held."""
    before = children()
    faults = (
        Fault("holding", "kill", cpu=1, for_ms=50),
        Fault("before-acquire", "stop", cpu=2, for_ms=50),
        Fault("time", "slow", "cpu0", after_ms=100, for_ms=100),
        Fault("time", "offline", "cpu2", after_ms=400, for_ms=50),
        Fault("time", "links", after_ms=50, for_ms=200, links=(LinkRule(drop=0.1, duplicate=0.1),)),
        Fault("granted", "kill", "seamldr", nth=2, for_ms=50),
    )
    plan = Plan(**SIZE, fault=faults)
    done = run_round(plan, tmp_path / "round")
    assert [(strike.fault.do, strike.outcome) for strike in done.strikes] == [(fault.do, "undone") for fault in faults]
    assert (done.outcome, done.broken) == ("held", ())
    assert read_plan(str(tmp_path / "round" / "plan.toml")) == plan
    kinds = {record["kind"] for record in records(tmp_path / "round", "fault")}
    assert {"kill", "replug", "restart", "stop", "resume", "slow", "links", "standstill"} <= kinds
    assert children() == before


def test_a_failure_is_shrunk_to_what_it_takes(tmp_path: Path) -> None:
    """`unserialized` needs no fault to fail: what is left is no fault, two CPUs, one update, and it fails again."""
    faults = Fault("migration", "stop", for_ms=10), Fault("in-guest", "stop", for_ms=10)
    plan = Plan(**(SIZE | {"updates": 2}), strategy="unserialized", fault=faults)
    failed = run_round(plan, tmp_path / "round")
    assert failed.outcome == "broken" and {"I20", "I21"} & set(failed.broken)
    tried: list[Plan] = []
    smallest = shrink(failed, tmp_path / "shrunk", tried.append)
    assert smallest.outcome == "broken" and {"I20", "I21"} & set(smallest.broken)
    assert (smallest.plan.fault, smallest.plan.cpus, smallest.plan.updates) == ((), 2, 1)
    assert read_plan(f"{smallest.run_dir}/plan.toml") == smallest.plan
    assert len(tried) >= 4


def seamlab(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    command = [sys.executable, str(ROOT / "launcher.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_rounds_of_the_command_line(tmp_path: Path) -> None:
    """`chaos --rounds` prints one JSON object, writes each plan, and keeps no records of rounds that held."""
    done = seamlab("chaos", "--rounds", "2", "--cpus", "3", "--seed", "7", "--run-dir", "c", "--json", cwd=tmp_path)
    answer = msgspec.json.decode(done.stdout)
    assert done.returncode == 0, (done.stderr, answer)
    assert [one["seed"] for one in answer["rounds"]] == [7, 8] and answer["smallest"] is None
    for number in (7, 8):
        directory = tmp_path / "c" / f"round-{number:05}"
        assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == []
        assert read_plan(str(directory / "plan.toml")).seed == number


def test_faults_for_a_machine_of_ones_own(tmp_path: Path) -> None:
    """`run --faults` takes the faults of a plan for a machine of another size, and judges it."""
    fault = Fault("before-release", "kill", for_ms=50)
    (tmp_path / "plan.toml").write_text(write_plan(Plan(cpus=8, fault=(fault,))))
    arguments = ("run", "--cpus", "2", "--seconds", "0.5", "--updates", "0", "--faults", "plan.toml", "--run-dir", "r")
    done = seamlab(*arguments, "--json", cwd=tmp_path)
    summary = msgspec.json.decode(done.stdout)
    assert (summary["cpus"], summary["violations"]) == (2, [])
    assert (summary["processes"]["killed"], summary["processes"]["restarted"]) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.toml",), "plan nothing.toml cannot be read: No such file or directory"),
        (("bad.toml",), "bad.toml: line 2: no point 'lunch'"),
        (("--rounds", "0"), "rounds is 1 to 1000000, not 0"),
        (("--rounds", "1", "--cpus", "0"), "cpus is 1 to 1024, not 0"),
        (("--rounds", "1", "--strategy", "hope"), "no strategy 'hope'"),
        (("--rounds", "1", "--knob", "hope=1"), "no knob 'hope=1'"),
    ],
)
def test_bad_input_of_chaos(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    """One line on stderr and exit status 2; nothing is run."""
    (tmp_path / "bad.toml").write_text('[[fault]]\nat = "lunch"\ndo = "kill"\n')
    done = seamlab("chaos", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_an_interrupt_lets_go_of_everything(tmp_path: Path) -> None:
    """Ctrl-C while one CPU is stopped and another stands still: status 3, and no process or socket is left."""
    faults = Fault("time", "stop", "cpu1", for_ms=60_000), Fault("holding", "stop", "seamldr", for_ms=60_000)
    (tmp_path / "plan.toml").write_text(write_plan(Plan(cpus=2, seconds=60.0, fault=faults)))
    command = [sys.executable, str(ROOT / "launcher.py"), "chaos", "plan.toml", "--run-dir", "r"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not _stopped(tmp_path / "r"):
        assert process.poll() is None
        time.sleep(0.02)
    sockets = socket_dir(process.pid)
    assert sockets.is_dir()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert errors == "seamlab: interrupted; the machine has been taken down\n"
    assert not sockets.exists()
    ended = records(tmp_path / "r", "process_exit")
    assert {record["name"] for record in ended} == {"cpu0", "cpu1", "kvm", "seamldr"}


def _stopped(run_dir: Path) -> bool:
    return (run_dir / "records").is_dir() and bool(records(run_dir, "fault", kind="stop"))
