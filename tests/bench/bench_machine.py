"""What it costs to start and end a machine, as ratios to bare forks of the same parent in the same run; and what it
costs to watch one.

    python tests/bench/bench_machine.py [ROUNDS [CPUS ...]]

Absolute times depend on the computer and its other load, so each round measures the machine and, right before it, as
many bare forks of an interpreter that is warmed up in the same way: each child only says that it is there. A machine
is watched for every other slice of time, on a terminal that `cat` reads: the work done is VM exits, the ratio that of
slices next to each other. Other load makes that wide; "by work" is the ratio of exits to the processor time that the
whole machine took for them, the launcher included. The launcher's time is that of one processor.
"""

import os
import pty
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import clock_gettime, perf_counter, process_time
from typing import NamedTuple, Self

import trio
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cpu.board import read_rows  # noqa: E402
from kvm.machine import Machine  # noqa: E402
from kvm.topology import Topology  # noqa: E402
from kvm.watching import Watching  # noqa: E402

SIZES = (4, 32, 128)
ROUNDS = 3
SAMPLE = 8
WATCHED_SIZES = (8, 256)
TURNS = 30
SLICE_S = 1.0

BARE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import kvm.parent
from cpu import forkserver
forkserver.warm_up()
ready, done = os.pipe(), os.pipe()
began = time.perf_counter()
for _ in range(int(sys.argv[2])):
    if os.fork() == 0:
        os.write(ready[1], b"x")
        os.close(done[1])
        os.read(done[0], 1)
        os._exit(0)
got = 0
while got < int(sys.argv[2]):
    got += len(os.read(ready[0], 4096))
print(time.perf_counter() - began)
"""


def bare(count: int) -> float:
    """Seconds until `count` bare forks are there."""
    command = [sys.executable, "-c", BARE, str(ROOT), str(count)]
    return float(subprocess.run(command, check=True, capture_output=True).stdout)


async def machine(cpus: int) -> tuple[float, float, float]:
    """Seconds until a machine is online, seconds until it is gone, and MiB that one CPU's process has for itself."""
    with tempfile.TemporaryDirectory() as directory:
        topology = Topology(cpus=cpus, vcpus=cpus, seconds=1.0, run_dir=f"{directory}/run")
        async with Machine(topology) as live:
            sample = list(live.pids.values())[:: max(1, cpus // SAMPLE)]
            private = statistics.mean(private_mib(pid) for pid in sample)
            began = perf_counter()
        return live.online_seconds, perf_counter() - began, private


def private_mib(pid: int) -> float:
    """What no other process shares."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024


class Slice(NamedTuple):
    """VM exits of all CPUs in a slice of time; processor time that the launcher, and the whole machine with it, took
    meanwhile, in seconds.
    """

    exits: float
    launcher: float
    machine: float

    @classmethod
    def until_now(cls, machine: Machine) -> Self:
        """From the machine's beginning."""
        pids = [process.pid for process in machine.processes.values()]
        exits = sum(row.exits for row in read_rows(machine.memory, machine.spec.cpus))
        return cls(exits, process_time(), process_time() + sum(processor_time(pid) for pid in pids))

    def since(self, before: Self) -> Self:
        """What came after."""
        return type(self)(*(now - then for now, then in zip(self, before, strict=True)))


def processor_time(pid: int) -> float:
    """Of a process with all its threads, in seconds; the clock of clock_getcpuclockid(3)."""
    return clock_gettime(~pid << 3 | 2)


async def watched_by_turns(cpus: int, turns: int) -> list[tuple[Slice, Slice]]:
    """One machine in slices of equal length: without a view of it and with it, for each turn."""
    with tempfile.TemporaryDirectory() as directory:
        seconds = 2 * turns * SLICE_S + 2
        topology = Topology(cpus=cpus, vcpus=2 * cpus, updates=0, seconds=seconds, run_dir=f"{directory}/run")
        async with Machine(topology) as machine, trio.open_nursery() as nursery:
            nursery.start_soon(machine.run_workload)
            await trio.sleep(1)
            with Watching(topology.strategy) as watching:
                return [await turn(machine, watching, number % 2 == 0) for number in range(turns)]


async def turn(machine: Machine, watching: Watching, watched_first: bool) -> tuple[Slice, Slice]:
    """A slice without and one with the view, in this or the other order."""
    slices = {}
    for watched in (watched_first, not watched_first):
        before = Slice.until_now(machine)
        async with trio.open_nursery() as nursery:
            if watched:
                nursery.start_soon(watching.follow, machine)
            await trio.sleep(SLICE_S)
            nursery.cancel_scope.cancel()
        slices[watched] = Slice.until_now(machine).since(before)
    return slices[False], slices[True]


def watching(turns: int) -> None:
    """Measure and print what a view costs."""
    table = Table("CPUs", "exits/s", "watched", "ratio", "quartiles", "by work", "launcher", "watched")
    table.title = "Watching a machine"
    ours, theirs = pty.openpty()
    terminal = subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL)
    os.close(ours)
    stderr, sys.stderr = sys.stderr, os.fdopen(theirs, "w")
    os.environ |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    try:
        for cpus in WATCHED_SIZES:
            pairs = trio.run(watched_by_turns, cpus, turns)
            low, middle, high = statistics.quantiles(watched.exits / bare.exits for bare, watched in pairs)
            halves = [Slice(*map(statistics.mean, zip(*half, strict=True))) for half in zip(*pairs, strict=True)]
            exits = [f"{half.exits / SLICE_S:,.0f}" for half in halves]
            bare, watched = (half.exits / half.machine for half in halves)
            times = [f"{half.launcher / SLICE_S:.1%}" for half in halves]
            ratios = f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{watched / bare:.3f}"
            table.add_row(str(cpus), *exits, *ratios, *times)
    finally:
        sys.stderr.close()
        sys.stderr = stderr
        terminal.terminate()
        terminal.wait()
    Console().print(table)


def starting(rounds: int, sizes: list[int]) -> None:
    """Measure and print what it costs to start machines."""
    table = Table("CPUs", "bare forks", "online", "x bare", "a CPU", "down", "own memory", title="Starting a machine")
    for cpus in sizes:
        forks, ups, downs, memory = [], [], [], []
        for _ in range(rounds):
            forks.append(bare(cpus))
            up, down, private = trio.run(machine, cpus)
            ups.append(up)
            downs.append(down)
            memory.append(private)
        ratio = statistics.median(up / fork for up, fork in zip(ups, forks, strict=True))
        middle = statistics.median
        table.add_row(
            str(cpus),
            f"{middle(forks):.2f} s",
            f"{middle(ups):.2f} s",
            f"{ratio:.1f}",
            f"{middle(ups) / cpus * 1000:.1f} ms",
            f"{middle(downs):.2f} s",
            f"{middle(memory):.1f} MiB",
        )
    Console().print(table)


def main(rounds: int, sizes: list[int]) -> None:
    """Both tables."""
    starting(rounds, sizes)
    watching(TURNS)
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    main(arguments[0] if arguments else ROUNDS, arguments[1:] or list(SIZES))
