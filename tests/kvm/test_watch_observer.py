"""What is seen of a machine from outside: states, rates and shares by the rows, updates by the kernel's own words."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from live import small
from stepping import Stepped, module

from bus.memory import PhysicalMemory
from cpu.board import SPENT_IN, Board, Doing
from cpu.core import Counters
from cpu.cpu import Cpu
from cpu.layout import BUFFERS, KERNEL, PER_CPU, PER_CPU_SIZE, per_cpu
from cpu.stop_machine import MultiStopState, stop_machine
from cpu.struct import Word
from kvm.machine import Machine
from kvm.observer import MachineObserver, UpdateSeen
from seamldr.image import build_v2
from seamldr.lock_board import LockBoard
from seamldr.lock_queue import LockQueue, Request
from seamldr.update import ModuleUpdateState, seamldr_install_module

MS = 1_000_000
IMAGE_AT = BUFFERS + 0x20_0000
PARAMS = BUFFERS + 0x10_0000
STAGES = list(ModuleUpdateState)[1:]


class Rows:
    """A memory in which the rows of some CPUs are written by hand."""

    def __init__(self, cpus: int) -> None:
        self.memory = PhysicalMemory.private(PER_CPU + cpus * PER_CPU_SIZE)
        self.counts = [Counters() for _ in range(cpus)]
        self.boards = [Board(self.memory, number, count) for number, count in enumerate(self.counts)]
        self.observer = MachineObserver(self.memory, cpus)
        for number in range(cpus):
            self.set(number, "online", 1)

    def set(self, number: int, name: str, value: int) -> None:
        """Store a per-CPU word."""
        word: int = getattr(per_cpu(number), name)
        assert isinstance(vars(type(per_cpu(number)))[name], Word)
        self.memory.store(word, value, 0)


def test_states_of_cpus() -> None:
    """What memory says of a CPU's process, and what the launcher says, goes before what the CPU said last."""
    rows = Rows(5)
    for board in rows.boards:
        board.change(Doing.GUEST, 10 * MS, 4)
    rows.boards[4].change(Doing.P_SEAMLDR, 12 * MS, 1 << 63)
    rows.set(1, "dead", 1)
    rows.set(2, "online", 0)
    seen = rows.observer.look(15 * MS, frozenset({3}))
    assert [cpu.doing for cpu in seen.cpus] == [
        Doing.GUEST, Doing.DEAD, Doing.OFFLINE, Doing.SIGSTOPPED, Doing.P_SEAMLDR
    ]  # fmt: skip
    assert (seen.cpus[0].what, seen.cpus[0].for_ns) == ("vcpu3", 5 * MS)
    assert (seen.cpus[4].what, seen.cpus[4].for_ns) == ("SEAMLDR.INFO", 3 * MS)
    assert [bool(cpu.shares) for cpu in seen.cpus] == [True, False, False, False, True]
    assert seen.states()[Doing.DEAD] == 1


def test_who_waits_for_a_lock_has_a_place_in_its_queue() -> None:
    """A CPU that waits is found in the queue that the lock service shows; one whose request is on its way is not."""
    rows, queue = Rows(3), LockQueue("seamldr_lock", 1)
    for number in (2, 1):
        queue.acquire(Request(f"cpu{number}", 1, 1, 0, 0))
    LockBoard(rows.memory).show(queue, 3 * MS)
    for board in rows.boards[:2]:
        board.change(Doing.LOCK, MS)
    seen = rows.observer.look(2 * MS)
    assert [cpu.what for cpu in seen.cpus] == ["", "seamldr_lock, 1st", ""]
    assert (seen.totals.grants, seen.wait_ns) == (1, 0.0), "the first look has nothing to compare with"


def test_rates_and_shares_are_those_of_the_last_second() -> None:
    """Differences of counts and times between now and the look of a second ago, the present state included."""
    rows = Rows(1)
    board, count = rows.boards[0], rows.counts[0]
    board.change(Doing.KERNEL, 0)
    for step in range(1, 31):
        count.exits += 10 if step <= 20 else 50
        count.ipis_delivered += 1
        board.change(Doing.GUEST if step % 2 else Doing.KERNEL, step * 100 * MS)
        seen = rows.observer.look(step * 100 * MS + 50 * MS)
    shares = dict(zip(SPENT_IN, seen.cpus[0].shares, strict=True))
    assert shares[Doing.GUEST] == shares[Doing.KERNEL] == 0.5
    assert seen.per_s.exits == seen.cpus[0].exits_per_s == 500
    assert (seen.per_s.ipis, seen.totals.ipis, seen.totals.exits) == (10, 30, 700)


def test_mean_wait_of_the_locks_granted_in_the_last_second() -> None:
    """Waits of earlier grants do not count."""
    rows, queue = Rows(1), LockQueue("seamldr_lock", 1)
    board = LockBoard(rows.memory)
    board.show(queue, 900 * MS)
    rows.observer.look(0)
    for waited in (2 * MS, 4 * MS):
        board.show(queue, waited)
    seen = rows.observer.look(1000 * MS)
    assert (seen.wait_ns, seen.per_s.grants, seen.totals.grants) == (3 * MS, 2, 3)


def test_a_power_cycle_begins_anew() -> None:
    """After all memory was cleared no rate is below zero."""
    rows = Rows(1)
    rows.counts[0].exits = 100
    rows.boards[0].change(Doing.KERNEL, MS)
    rows.observer.look(2 * MS)
    rows.memory.clear()
    seen = rows.observer.look(3 * MS)
    assert (seen.totals.exits, seen.per_s.exits, seen.cpus[0].doing) == (0, 0, Doing.OFFLINE)


class Updating:
    """A stepped machine that is looked at after every operation of random CPUs."""

    def __init__(self, cpus: int, **knobs: str) -> None:
        self.stepped = Stepped("clear-current-vmcs", cpus=cpus, **knobs)
        self.observer = MachineObserver(self.stepped.memory, cpus)
        self.looks: list[UpdateSeen] = []

    def run(self, seed: int) -> None:
        """Until the machine is at rest."""
        machine, random = self.stepped.machine, Random(seed)
        while ready := machine.ready():
            machine.step(random.choice(ready))
            update = self.observer.look(machine.steps).update
            if not self.looks or update != self.looks[-1]:
                self.looks.append(update)

    def install(self, image: bytes) -> None:
        """Begin an update to this image."""
        pages = tuple(range(IMAGE_AT, IMAGE_AT + len(image), 4096))
        self.stepped.memory.write(IMAGE_AT, image)

        async def body(cpu: Cpu) -> int:
            return await seamldr_install_module(cpu, pages, len(image), PARAMS)

        self.stepped.start(body)


@pytest.mark.parametrize("seed", range(3))
def test_an_update_is_seen_stage_by_stage(seed: int) -> None:
    """CPUs gather, each stage in its order is acknowledged by 0 to all, then it is over and the new module up."""
    updating = Updating(3)
    updating.install(build_v2(module("1.5.09")))
    updating.run(seed)
    looks = [look for look in updating.looks if look.running]
    gather = [look.stopped for look in looks if look.gathers and look.stop is MultiStopState.PREPARE]
    assert gather[:4] == [0, 1, 2, 3] and set(gather[4:]) <= {0}
    stages = [look.stage for look in looks if not look.gathers]
    assert stages == sorted(stages) and list(dict.fromkeys(stages)) == STAGES
    for stage in STAGES[:-1]:
        acked = [look.acked for look in looks if look.stage is stage]
        assert set(acked) >= {0, 1, 2} and max(acked) <= 3 and {look.online for look in looks} == {3}
    last = updating.looks[-1]
    assert (last.number, last.over, last.running, last.failed) == (1, True, False, 0)
    assert updating.observer.look(0).module == "1.5.09"


def test_a_failed_update_is_seen_to_fail() -> None:
    """An update that a stage refuses is not over but has failed there, and the module is down."""
    updating = Updating(2)
    image = bytearray(build_v2(module("1.5.09")))
    image[-1] ^= 1
    updating.install(bytes(image))
    updating.run(1)
    last = updating.looks[-1]
    assert (last.stage, last.over, last.running) == (ModuleUpdateState.CPU_INSTALL, False, False)
    assert last.failed >= 1 and updating.observer.look(0).module == ""


def test_a_stop_machine_that_is_no_update() -> None:
    """CPU hotplug stops the machine, too: this is seen as a stop, not as an update."""
    updating = Updating(2)

    async def body(cpu: Cpu) -> int:
        return await stop_machine(cpu, "take_cpu_down", 1, only=1)

    updating.stepped.start(body)
    updating.run(1)
    stops = [look.stop for look in updating.looks]
    assert set(stops) > {MultiStopState.PREPARE, MultiStopState.RUN, MultiStopState.EXIT}
    assert not any(look.running for look in updating.looks) and updating.looks[-1].stop is MultiStopState.NONE


async def test_totals_are_those_of_the_summary(tmp_path: Path) -> None:
    """At the end of a live machine with TDs and an update, what was seen is what the records add up to."""
    topology = small(tmp_path, cpus=3, vcpus=4, tds=1, seconds=0.6)
    async with Machine(topology) as machine:
        observer = MachineObserver(machine.memory, 3, 4, 1)
        await machine.run_workload()
        await machine.end()
        seen = observer.look(0)
        assert machine.memory.load(KERNEL.num_online)[0] == seen.update.online - 3 == 0
    summary = machine.check().as_dict()
    assert seen.totals.exits == summary["guests"]["exits"] > 0
    assert seen.totals.calls == summary["cost"]["calls"] > 0
    assert seen.totals.ipis == summary["ipis"]["delivered"] > 0
    assert seen.totals.errors == 0
    (lock,) = (lock for lock in seen.locks if lock.name == "seamldr_lock")
    assert lock.grants == summary["lock"]["acquisitions"] and lock.holder is None and not lock.waiting
    assert seen.update.over and seen.update.number == summary["updates"]["succeeded"] == 1
    assert {cpu.doing for cpu in seen.cpus} == {Doing.OFFLINE}
