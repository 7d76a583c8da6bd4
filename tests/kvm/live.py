"""Small live machines for tests: their topology, their records, and what must not be left of them."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvm.machine import Machine
from kvm.topology import Topology

GONE_S = 20.0


def small(tmp_path: Path, **settings: Any) -> Topology:
    """Two CPUs, half a second of work, one update; `settings` change that."""
    sizes = {"cpus": 2, "vcpus": 2, "updates": 1, "seconds": 0.5, "run_dir": str(tmp_path / "run")}
    return Topology(**(sizes | settings))


def records(run_dir: Path, event: str, **fields: Any) -> list[dict[str, Any]]:
    """All records of `event` in a run, of every process, that have these field values."""
    found = []
    for path in sorted((run_dir / "records").glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            record = msgspec.json.decode(line)
            if record["event"] == event and fields.items() <= record.items():
                found.append(record)
    return found


def log(run_dir: Path) -> str:
    """What the processes of a run wrote to their stdout and stderr."""
    return (run_dir / "stderr.txt").read_text()


def parent_of(pid: int) -> int:
    """Process id of the parent of `pid`."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie; an orphan may be one until init reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children() -> set[int]:
    """Children of this process, zombies too."""
    return {pid for pid in _pids() if _is_child(pid)}


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _is_child(pid: int) -> bool:
    try:
        return parent_of(pid) == os.getpid()
    except (FileNotFoundError, ProcessLookupError):
        return False


def descriptors() -> list[str]:
    """What the open descriptors of this process are, sorted."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}").partition("[")[0])
        except FileNotFoundError:  # the descriptor of this listing
            continue
    return sorted(found)


class Remains:
    """What there is of machines now; `nothing_of` tells after their end that it is all gone again."""

    def __init__(self) -> None:
        self.children = children()
        self.descriptors = descriptors()

    def nothing_of(self, machine: Machine) -> None:
        """Asserts that no process, socket, mapping or descriptor of `machine` is left."""
        assert children() == self.children
        assert [process for process in machine.processes.values() if process.pid and runs(process.pid)] == []
        assert not Path(machine.spec.socket_dir).exists()
        assert "seamlab-memory" not in Path("/proc/self/maps").read_text()
        assert descriptors() == self.descriptors


def wait_gone(pidfds: list[int]) -> None:
    """Wait until each of these processes has ended; close the descriptors."""
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], GONE_S)[0], "a process outlived its machine"
        os.close(pidfd)
