"""Ctrl-C and SIGTERM of the command line mean the same: the machine is taken down in order, and one line says so."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live import records, small

from kvm.machine import Machine, MachineError

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30
RUNS = "task_place"
"""A record of the KVM process: the machine is up, its workload begins."""


def launched(run_dir: Path, node: str, event: str) -> subprocess.Popen[str]:
    """A machine, once a process of it has written this record."""
    command = [sys.executable, str(ROOT / "launcher.py"), "run", "--cpus", "2", "--vcpus", "2", "--seconds", "60"]
    process = subprocess.Popen(
        [*command, "--run-dir", str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    file, deadline = run_dir / "records" / f"{node}.jsonl", time.monotonic() + PATIENCE_S
    while not (file.exists() and event in file.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("node", "event"), [("launcher", "machine_begin"), ("kvm", RUNS)], ids=["starts", "runs"])
def test_a_signal_ends_the_machine_in_order(tmp_path: Path, number: int, node: str, event: str) -> None:
    """Status 3, one line, the records have an end, and a process that was up was asked to go, not killed."""
    process = launched(tmp_path / "run", node, event)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (3, "")
    assert err == "seamlab: interrupted; the machine has been taken down\n"
    lines = (tmp_path / "run/records/launcher.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    (end,) = (record for record in written if record["event"] == "machine_end")
    # Python raises the interrupt in whatever task runs; if that is not the machine's, the machine is cancelled.
    assert end["finished"] == 0 and end["why"] in ("ended by KeyboardInterrupt", "ended by Cancelled")
    if event == RUNS:
        exits = [record for record in written if record["event"] == "process_exit"]
        assert len(exits) == 4 and {(record["status"], record["wanted"]) for record in exits} == {(0, 1)}


async def test_a_machine_that_does_not_start_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records of a failed start say in one place why there is no more of them."""
    monkeypatch.setattr("kvm.processes.PARENT", "import sys; sys.exit(1)")
    with pytest.raises(MachineError) as caught:
        async with Machine(small(tmp_path)):
            pytest.fail("it came up")
    (end,) = records(tmp_path / "run", "machine_end")
    assert (end["finished"], end["why"]) == (0, str(caught.value))
