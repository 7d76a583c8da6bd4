"""What it costs to start and end a machine, as ratios to bare forks of the same parent in the same run.

    python tests/bench/bench_machine.py [ROUNDS [CPUS ...]]

Absolute times depend on the computer and its other load, so each round measures the machine and, right before it, as
many bare forks of an interpreter that is warmed up in the same way: each child only says that it is there.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import trio
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kvm.machine import Machine  # noqa: E402
from kvm.topology import Topology  # noqa: E402

SIZES = (4, 32, 128)
ROUNDS = 3
SAMPLE = 8

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


def main(rounds: int, sizes: list[int]) -> None:
    """Measure and print the table."""
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
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    main(arguments[0] if arguments else ROUNDS, arguments[1:] or list(SIZES))
