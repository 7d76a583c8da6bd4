"""Hostile frames at every kind of endpoint of a machine that runs, and processes of another user: refused, that is all.

SEAMLAB_FUZZ sets how many frames each of the four endpoints gets while the machine runs; 20,000 unless it is set.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import zmq
from hostile_frames import REPLAY, Frames
from live import records, small

from bus.link import Refusal
from bus.messages import Query, Ring, decode
from bus.seal import SEAL_SIZE
from bus.spec import KVM, LAUNCHER, SEAMLDR
from kvm.compose import Knobs
from kvm.machine import Machine
from kvm.sysfs import sysfs_directory
from kvm.topology import TopologyError

FRAMES = int(os.environ.get("SEAMLAB_FUZZ", "20000"))
AT_REST = 1000
READS = 10
ENDPOINTS = (LAUNCHER, SEAMLDR, KVM, "cpu0")
ASKED = 200
MORE_MEMORY_KB = 100_000
"""What a flood may cost a process: its inbox has a limit."""
PATIENCE_S = 60 + FRAMES / 500


class Sniffer:
    """The real frames with messages that the launcher's endpoint sends and takes in, by the process they are for."""

    def __init__(self, machine: Machine) -> None:
        self.frames: dict[str, list[bytes]] = {node: [] for node in ENDPOINTS}
        endpoint = machine.node.endpoint
        put, receive = endpoint._put, endpoint._peers.receive

        def sent(frame: bytes, peer: str) -> None:
            if peer in self.frames:
                self.frames[peer].append(frame)
            put(frame, peer)

        def received(frame: memoryview, now: int) -> Refusal | None:
            refusal = receive(frame, now)
            if refusal is None:
                self.frames[LAUNCHER].append(bytes(frame))
            return refusal

        endpoint._put = sent  # type: ignore[method-assign]
        endpoint._peers.receive = received  # type: ignore[method-assign, assignment]


async def _sniff(machine: Machine) -> dict[str, list[bytes]]:
    """Real frames for each endpoint, all taken by now."""
    sniffer = Sniffer(machine)
    for _ in range(ASKED):
        for node in ENDPOINTS[1:]:
            machine.node.endpoint.send(node, Ring(0) if node == "cpu0" else Query())
    await machine.node.endpoint.flush()
    return {
        node: [frame for frame in frames if decode(frame[SEAL_SIZE:]).body is not None]
        for node, frames in sniffer.frames.items()
    }


async def _flood(frames: Frames, number: int) -> None:
    """Send so many to their target, over a connection of its own, and wait until it has read them."""
    path = Path(frames.spec.run_dir, "records", f"{frames.target}.jsonl")
    mark = f'"reason":"{Refusal.STALE_INCARNATION}"'
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.set(zmq.LINGER, 0)
        push.connect(f"ipc://{frames.spec.socket_dir}/{frames.target}")
        for n in range(number):
            await _push(push, frames.make())
            if n % 32 == 0:
                await trio.lowlevel.checkpoint()
        await _push(push, frames.last())
        while _count(path, mark) < frames.expected[Refusal.STALE_INCARNATION]:  # noqa: ASYNC110
            await trio.sleep(0.02)


def _count(path: Path, mark: str) -> int:
    return path.read_text().count(mark)


async def _push(push: zmq.Socket[bytes], frame: bytes) -> None:
    while True:
        try:
            push.send(frame, zmq.NOBLOCK)
            return
        except zmq.Again:
            await trio.sleep(0.001)


async def _flood_all(every: dict[str, Frames], number: int) -> None:
    async with trio.open_nursery() as nursery:
        for frames in every.values():
            nursery.start_soon(_flood, frames, number)


def _peaks(machine: Machine) -> dict[str, int]:
    """The most memory that each process had so far, in KiB."""
    return {
        name: int(Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()[0])
        for name, process in machine.processes.items()
    }


def _contents(machine: Machine) -> dict[int, bytes]:
    """The pages of the machine's memory that were ever written."""
    fd, pages = machine.memory.fd, {}
    assert fd is not None
    at = 0
    while at < machine.memory.size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        pages[begin] = os.pread(fd, at - begin, begin)
    return pages


async def _at_rest(machine: Machine) -> tuple[dict[int, bytes], list[bytes]]:
    """Memory and records once the CPUs have gone to sleep."""
    before: dict[int, bytes] = {}
    while (now := _contents(machine)) != before:  # nothing tells when all sleep
        before = now
        await trio.sleep(0.1)
    return now, _written(machine)


def _written(machine: Machine) -> list[bytes]:
    """All records so far but those of refusals."""
    found: list[bytes] = []
    for path in sorted((machine.run_dir / "records").glob("*.jsonl")):
        found += [line for line in path.read_bytes().splitlines() if b'"event":"refused"' not in line]
    return found


async def test_a_flood_of_hostile_frames_is_counted_and_changes_nothing(tmp_path: Path) -> None:
    """Noise, damage, replays, forged names and numbers, messages in another's role, values that the machine has not.

    All processes live, the machine works on, at rest not a byte of its memory changes, and every frame is counted
    under its reason.
    """
    machine = Machine(
        small(tmp_path, cpus=2, vcpus=4, tds=1, seconds=3600.0, updates=0, knobs=Knobs(watchdog_thresh=0))
    )
    async with machine, trio.open_nursery() as nursery:
        nursery.start_soon(machine.run_workload)
        real = await _sniff(machine)
        pids, peaks = {name: process.pid for name, process in machine.processes.items()}, _peaks(machine)
        every = {node: Frames(machine.spec, node, real[node], 7) for node in ENDPOINTS}
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as flood:
                flood.start_soon(_flood_all, every, FRAMES)
                assert await machine.update() == 0
                for _ in range(READS):
                    assert await machine.read_version()
            await machine.finish()
            memory, written = await _at_rest(machine)
            await _flood_all(every, AT_REST)
            assert _contents(machine) == memory
            assert _written(machine) == written
        assert {name: process.pid for name, process in machine.processes.items()} == pids
        assert not any(process.gone.is_set() for process in machine.processes.values())
        grown = {name: peak - peaks[name] for name, peak in _peaks(machine).items()}
        assert max(grown.values()) < MORE_MEMORY_KB, grown
    assert machine.check().verdict == "safe"
    totals = {record["node"]: record["counts"] for record in records(machine.run_dir, "refused_totals")}
    for node, frames in every.items():
        replayed = frames.expected.pop(REPLAY)
        assert totals[node] == frames.expected
        if node != LAUNCHER:
            assert replayed <= (machine.processes[node].totals or {})["duplicates"]
    assert len(records(machine.run_dir, "refused")) < 25 * len(Refusal) * len(ENDPOINTS)
    log = (machine.run_dir / "stderr.txt").read_text()
    assert log == ""


# Another user

NOBODY = 65534


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that everybody may enter, so that only what a machine makes itself keeps others out."""
    path = Path(tempfile.mkdtemp(prefix="seam-open-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def as_nobody(attempts: dict[str, Callable[[], object]]) -> dict[str, str]:
    """What becomes of these in a process of another user: the name of what they raise, or "done"."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        results = {}
        for name, attempt in attempts.items():
            try:
                attempt()
                results[name] = "done"
            except OSError as error:
                results[name] = type(error).__name__
        os.write(into, json.dumps(results).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as answer:
        results = json.load(answer)
    os.waitpid(pid, 0)
    return results


def connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_process_of_another_user_gets_nowhere(open_place: Path) -> None:
    """Sockets, records, memory and processes of a running machine are refused to it, each by itself.

    The sockets are refused even where their directory is open.
    """
    machine = Machine(small(open_place, sysfs=str(open_place / "sys")))
    with sysfs_directory(open_place / "sys"):
        async with machine:
            spec, memory = machine.spec, machine.memory.fd
            cpu0, launcher = machine.processes["cpu0"].pid, os.getpid()
            attempts: dict[str, Callable[[], object]] = {
                "see the sockets": lambda: os.listdir(spec.socket_dir),
                "see the records": lambda: os.listdir(f"{spec.run_dir}/records"),
                "see the run": lambda: os.listdir(spec.run_dir),
                "read a record": lambda: os.open(f"{spec.run_dir}/records/cpu0.jsonl", os.O_RDONLY),
                "see the files": lambda: os.listdir(spec.sysfs),
                "open the launcher's memory": lambda: os.open(f"/proc/{launcher}/fd/{memory}", os.O_RDWR),
                "open a CPU's memory": lambda: os.open(f"/proc/{cpu0}/fd/{memory}", os.O_RDONLY),
                "read a CPU": lambda: os.open(f"/proc/{cpu0}/mem", os.O_RDONLY),
                "kill a CPU": lambda: os.kill(cpu0, 9),
            }
            nodes = (LAUNCHER, *spec.nodes())
            attempts |= {f"connect to {node}": lambda node=node: connect(f"{spec.socket_dir}/{node}") for node in nodes}
            assert set(as_nobody(attempts).values()) == {"PermissionError"}
            os.chmod(spec.socket_dir, 0o755)
            opened = {name: attempt for name, attempt in attempts.items() if name.startswith("connect")}
            assert set(as_nobody(opened).values()) == {"PermissionError"}
            for node in nodes:
                connect(f"{spec.socket_dir}/{node}")  # to its owner they are open


def mode(path: str | int) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


async def test_what_a_machine_makes_is_for_its_owner_alone(open_place: Path) -> None:
    """Modes of the run directory, the records, the sockets and the memory, whatever the umask."""
    before = os.umask(0)
    try:
        machine = Machine(small(open_place))
        async with machine:
            await machine.run_workload()
            directories = (str(machine.run_dir), f"{machine.run_dir}/records", machine.spec.socket_dir)
            inside = [f"{place}/{name}" for place in directories[1:] for name in os.listdir(place)]
            assert len(inside) == 2 * len(machine.spec.nodes()) + 2
            assert {mode(path) for path in directories} == {0o700}
            assert {mode(path) for path in inside} == {0o600}
            assert machine.memory.fd is not None
            assert mode(machine.memory.fd) == 0o600
    finally:
        os.umask(before)


def test_a_run_directory_of_another_user_is_not_used(open_place: Path) -> None:
    """Its owner could exchange the files in it."""
    theirs = open_place / "run"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(TopologyError, match="belongs to another user"):
        small(open_place).make_run_dir()
