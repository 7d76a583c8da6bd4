"""How long a lock is nobody's after its holder was killed: from SIGKILL until the next waiter holds it.

    python tests/bench/bench_recovery.py [DEATHS [CPUS]]

All times are from the records, which share one monotonic clock. The floor is how long a bare process takes from SIGKILL
until its pidfd fires, measured right before each death.
"""

import contextlib
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import msgspec
import trio
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kvm.machine import Machine  # noqa: E402
from kvm.topology import Topology  # noqa: E402

DEATHS = 20
CPUS = 8
TARGET_MS = 50.0
WAITERS_S = 0.1
"""Time in which two more CPUs surely queue."""


def bare_ms() -> float:
    """Milliseconds from SIGKILL of a bare process until its pidfd fires."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pidfd = os.pidfd_open(process.pid)
    began = perf_counter()
    process.send_signal(signal.SIGKILL)
    select.select([pidfd], [], [])
    taken = perf_counter() - began
    os.close(pidfd)
    process.wait()
    return 1000 * taken


async def wait_for_the_lock(machine: Machine, cpu: int) -> None:
    """A reader, whose CPU may be the next to die."""
    with contextlib.suppress(OSError):
        await machine.read_version(cpu)


async def deaths(count: int, cpus: int, run_dir: Path) -> list[float]:
    """Kill the holder `count` times while others wait; the floors, one a death."""
    floors = []
    topology = Topology(cpus=cpus, vcpus=cpus, updates=0, seconds=600.0, run_dir=str(run_dir))
    async with Machine(topology) as machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        for _ in range(count):
            floors.append(bare_ms())
            async with machine.standing("holding") as holder:
                assert holder is not None
                for other in (1, 2):
                    nursery.start_soon(wait_for_the_lock, machine, (holder + other) % cpus)
                await trio.sleep(WAITERS_S)
                await machine.kill(holder)
            await machine.replug(holder)
        await machine.finish()
    return floors


def gaps_ms(run_dir: Path) -> list[float]:
    """Milliseconds from each kill until another CPU holds seamldr_lock."""
    kills, holds = [], []
    for path in (run_dir / "records").glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            record = msgspec.json.decode(line)
            if record["event"] == "fault" and record["kind"] == "kill":
                kills.append((record["ts"], record["name"]))
            elif record["event"] == "lock_hold" and record["lock"] == "seamldr_lock":
                holds.append((record["ts"], record["node"]))
    return [min(ts - at for ts, node in holds if ts > at and node != dead) / 1e6 for at, dead in kills]


def main(count: int = DEATHS, cpus: int = CPUS) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        floors = trio.run(deaths, count, cpus, run_dir)
        gaps = gaps_ms(run_dir)
    table = Table(title=f"from SIGKILL of the holder until the next waiter holds, {cpus} CPUs, {len(gaps)} deaths")
    for name in ("", "median ms", "worst ms"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("bare process: SIGKILL to pidfd", f"{statistics.median(floors):.2f}", f"{max(floors):.2f}")
    table.add_row("seamldr_lock: SIGKILL to hold", f"{statistics.median(gaps):.2f}", f"{max(gaps):.2f}")
    table.add_row("promise", f"{TARGET_MS:.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
