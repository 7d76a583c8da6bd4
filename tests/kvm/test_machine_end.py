"""However a live machine ends, nothing of it is left: no process, no zombie, no socket, no memory, no descriptor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from live import Remains, log, parent_of, records, small, wait_gone

from cpu.layout import UPDATE_CTRL
from kvm.machine import Machine, MachineError

ROOT = Path(__file__).resolve().parent.parent.parent

LAUNCHER = """
import sys, trio
sys.path.insert(0, sys.argv[1])
from kvm.machine import Machine
from kvm.topology import Topology

async def main():
    async with Machine(Topology(cpus=3, vcpus=3, seconds=60.0, run_dir=sys.argv[2])) as machine:
        print(*machine.pids.values(), machine.processes["kvm"].pid, machine.processes["seamldr"].pid, flush=True)
        await machine.run_workload()

try:
    trio.run(main)
except KeyboardInterrupt:
    sys.exit(3)
"""

PARENT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import kvm.parent

def fail(*_):
    raise ValueError("this CPU is broken")

def no_fork():
    raise OSError(11, "Resource temporarily unavailable")

{change}
kvm.parent.main(int(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.parametrize("end", ["return", "error", "cancellation"])
async def test_the_block_leaves_nothing_behind(tmp_path: Path, end: str) -> None:
    """The block may end by itself in the middle of a run, by an exception, or by trio's cancellation."""
    remains = Remains()
    machine = Machine(small(tmp_path, seconds=60.0))
    with trio.CancelScope() as block:
        try:
            async with machine, trio.open_nursery() as nursery:
                nursery.start_soon(machine.run_workload)
                await trio.testing.wait_all_tasks_blocked()
                if end == "error":
                    raise ValueError("of the user")
                if end == "cancellation":
                    block.cancel()
                nursery.cancel_scope.cancel()
        except* ValueError:
            assert end == "error"
    remains.nothing_of(machine)
    assert log(machine.run_dir) == ""
    (ended,) = records(machine.run_dir, "machine_end")
    assert ended["finished"] == 0
    assert machine.check().verdict == "incomplete"


async def test_an_exception_leaves_the_block_as_itself(tmp_path: Path) -> None:
    """What the user's code raises is what the user's code catches, not a group around it."""
    with pytest.raises(KeyError, match="of the user"):
        async with Machine(small(tmp_path)):
            raise KeyError("of the user")


@pytest.mark.parametrize("moves", [True, False])
async def test_a_machine_is_stuck_when_nothing_moves(tmp_path: Path, moves: bool) -> None:
    """User space has been silent for longer than the grace period: that is the end, unless an update makes progress."""
    machine = Machine(small(tmp_path, cpus=2, updates=0, seconds=0.1, grace_s=0.5))
    finished: list[bool] = []

    async def work() -> None:
        finished.append(await machine.run_workload())

    async with machine, trio.open_nursery() as nursery:
        await machine.stop("kvm")
        nursery.start_soon(work)
        for acks in range(8):
            await trio.sleep(0.25)
            machine.memory.store(UPDATE_CTRL.num_ack, acks if moves else 0, 0)
        await machine.resume("kvm")
    assert finished == [moves]


async def test_cancelled_while_it_starts(tmp_path: Path) -> None:
    """A machine that is cancelled while its processes come up takes down those that are there."""
    remains = Remains()
    machine = Machine(small(tmp_path, cpus=16))
    with trio.CancelScope() as start:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                while not any(process.born.is_set() for process in machine.processes.values()):
                    await trio.lowlevel.checkpoint()
                start.cancel()

            nursery.start_soon(cancel)
            async with machine:
                pytest.fail("the machine came up after it was cancelled")
    remains.nothing_of(machine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("os.fork = no_fork", "process seamldr cannot be forked: Resource temporarily unavailable"),
        ('kvm.parent.ROLES["cpu"] = lambda *_: signal.pause()', "2 of 3 processes did not come online, cpu0 among"),
        ('kvm.parent.ROLES["kvm"] = fail', "process kvm ended by itself with status 1: ValueError: this CPU is broken"),
        ("sys.exit(1)", "the parent of the machine's processes has died, and they with it"),
    ],
    ids=["fork", "silent", "fails", "parent"],
)
async def test_a_machine_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    """A failed fork, a process that never says hello, one that fails, a parent that ends: one line, nothing left."""
    monkeypatch.setattr("kvm.processes.PARENT", PARENT.format(change=change))
    monkeypatch.setattr("kvm.fleet.ONLINE_S", 2.0)
    remains = Remains()
    machine = Machine(small(tmp_path))
    with pytest.raises(MachineError) as caught:
        async with machine:
            pytest.fail("it came up")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    remains.nothing_of(machine)


async def test_the_machine_ends_with_its_parent(tmp_path: Path) -> None:
    """SIGKILL of the parent of all processes: they die with it, and the run says so in one line."""
    remains = Remains()

    def kill(facts: dict[str, int]) -> None:
        if facts["done"]:
            os.kill(machine.parent_pid, signal.SIGKILL)

    with trio.fail_after(30):
        async with Machine(small(tmp_path, seconds=20.0), kill) as machine:
            pidfds = [os.pidfd_open(pid) for pid in machine.pids.values()]
            assert not await machine.run_workload()
            wait_gone(pidfds)
    remains.nothing_of(machine)
    (end,) = records(machine.run_dir, "machine_end")
    assert end["why"] == "the parent of the machine's processes has died, and they with it"
    assert machine.check().verdict == "incomplete"


class Launcher:
    """A machine in a launcher of its own, to be ended by signals."""

    def __init__(self, tmp_path: Path) -> None:
        self.run_dir = tmp_path / "run"
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(ROOT), str(self.run_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        while not (found := self._parent()):
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.005)
        parent, directory = found
        self.pidfds = [os.pidfd_open(parent)]
        self.socket_dir = Path(directory)

    def _parent(self) -> tuple[int, str] | None:
        """The machine's parent among the launcher's children, once its program is loaded, and its socket directory."""
        children = [pid for pid in _living() if _has_parent(pid, self.process.pid)]
        return next(((pid, directory) for pid in children if (directory := _socket_dir(pid))), None)

    def wait_online(self) -> None:
        """Until the workload begins."""
        assert self.process.stdout is not None
        self.pidfds += [os.pidfd_open(int(pid)) for pid in self.process.stdout.readline().split()]

    def end(self, number: int) -> int:
        """Send the signal; the launcher's status, when nothing is left of the machine."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        assert errors == b""
        wait_gone(self.pidfds)
        assert not self.socket_dir.exists()
        return self.process.returncode


def _socket_dir(parent: int) -> str | None:
    """The last argument of the machine's parent, once its program is loaded."""
    try:
        argument = Path(f"/proc/{parent}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")[-1].decode()
    except FileNotFoundError:  # it has ended; so has its launcher, or will
        return None
    return argument if argument.startswith("/tmp/seam-") else None


def _living() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _has_parent(pid: int, parent: int) -> bool:
    try:
        return parent_of(pid) == parent
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 3), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_the_machine_ends_with_its_launcher(tmp_path: Path, number: int, status: int) -> None:
    """Ctrl-C takes the machine down in order; after SIGTERM or SIGKILL of the launcher the parent cleans up."""
    launcher = Launcher(tmp_path)
    launcher.wait_online()
    assert launcher.end(number) == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_machine_that_starts_ends_with_its_launcher(tmp_path: Path, number: int) -> None:
    """The same while the processes come up: whatever exists by then goes."""
    launcher = Launcher(tmp_path)
    while not (launcher.run_dir / "records" / "cpu0.jsonl").exists():
        time.sleep(0.001)
    assert launcher.end(number) != 0
