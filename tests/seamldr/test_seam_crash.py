"""The process that serves SEAM is killed before every single write to memory, and another takes over: nothing is lost,
nothing is half done, nothing is done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import pytest
from seam_bench import EXIT_TDCALL, INFO, LPS, Side

from bus.memory import PhysicalMemory
from cpu.layout import memory_size
from seamldr.entropy import RandomEntropy
from seamldr.gate import Admission
from seamldr.journal import Answer
from seamldr.seam import SeamSide
from seamldr.status import SeamldrLeaf, SeamldrStatus
from seamldr.step_memory import StepMemory
from seamldr.tdx_leaves import TdhLeaf

FOREVER = 1 << 60
EXIT_INTERRUPT = 1


class Killed(Exception):
    """The process is killed before a write."""


class MortalMemory(PhysicalMemory):
    """Memory whose user is killed before its write number `left` (from 0); `roll_back` undoes writes."""

    left = FOREVER

    @classmethod
    def new(cls) -> Self:
        memory = cls.private(memory_size(LPS))
        memory.undo = []
        return memory

    undo: list[tuple[int, bytes]]

    def _count(self, pa: int, length: int) -> None:
        if not self.left:
            raise Killed
        self.left -= 1
        self.undo.append((pa, self.read(pa, length)))

    def write(self, pa: int, data: bytes) -> None:
        self._count(pa, len(data))
        super().write(pa, data)

    def write64(self, pa: int, value: int) -> None:
        self._count(pa, 8)
        super().write64(pa, value)

    def roll_back(self, mark: int) -> None:
        while len(self.undo) > mark:
            pa, data = self.undo.pop()
            super().write(pa, data)


@pytest.fixture(autouse=True)
def _same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever draws a random number gets the same, before and after a restart."""
    monkeypatch.setattr("seamldr.pseamldr.RandomEntropy", lambda: RandomEntropy(lambda size: b"\x5a" * size))


def take_over(side: Side, memory: MortalMemory) -> None:
    """Restart; the new process is killed before each of its own writes too, and restarted again."""
    death = 0
    while True:
        memory.left = death
        try:
            side.restart()
        except Killed:
            death += 1
        else:
            memory.left = FOREVER
            return


class Caller:
    """Makes calls through every crash, as a CPU and the service do: what got no answer is sent again."""

    def __init__(self) -> None:
        self.memory = MortalMemory.new()
        self.side = Side(tds=1, memory=self.memory)
        self.number = 0
        self.crashes = 0

    def enter(self, lp: int, leaf: int, rcx: int) -> Admission:
        """The first half of a call."""
        registers = self.side.registers(rcx=rcx)
        return self.side.seam.enter(lp, leaf, registers, incarnation=1, call=self.number).admission

    def again(self, lp: int, leaf: int, rcx: int) -> Answer:
        """The call is sent again: it goes on where it was."""
        seam = self.side.seam
        known = seam.journal.find(lp, 1, self.number)
        if known is None:
            assert self.enter(lp, leaf, rcx) is Admission.ADMITTED
        elif known.over:
            return known.result
        return seam.leave(lp, interrupted=known is not None and known.guest)

    def crash_everywhere(self, step: Callable[[], object], check: Callable[[], None]) -> None:
        """Do a step, killed before its write 0, 1, 2, ..., each time from where it began; then do it."""
        memory = self.memory
        mark, death = len(memory.undo), 0
        while True:
            memory.left = death
            try:
                step()
            except Killed:
                take_over(self.side, memory)
                check()
                memory.roll_back(mark)
                self.side.restart()
                death += 1
                self.crashes += 1
            else:
                memory.left = FOREVER
                assert death, "the step writes nothing"
                return

    def records(self) -> dict[str, bytes]:
        """All that the SEAM side remembers."""
        return self.side.seam.store.records()


def same_calls(crashing: Caller, plain: Caller, lp: int, leaf: int, rcx: int) -> None:
    """One call on both, on one of them through every crash; they end alike."""
    crashing.number += 1
    plain.number += 1
    assert plain.enter(lp, leaf, rcx) is Admission.ADMITTED
    answer = plain.side.seam.leave(lp)

    def check() -> None:
        assert crashing.again(lp, leaf, rcx) == answer
        assert crashing.records() == plain.records()
        for pa, data in crashing.memory.undo:
            if not crashing.side.platform.p_seamldr_base <= pa:
                assert crashing.memory.read(pa, len(data)) == plain.memory.read(pa, len(data)), hex(pa)

    crashing.crash_everywhere(lambda: crashing.enter(lp, leaf, rcx), check)
    crashing.crash_everywhere(lambda: crashing.side.seam.leave(lp), check)


def test_an_update_survives_a_kill_at_every_write() -> None:
    """Each SEAMCALL of an update ends as without the crash: same answer, state and memory; each LP installs once."""
    crashing, plain = Caller(), Caller()
    crashing.memory.undo.clear()
    calls = crashing.side.update_calls("1.5.09")
    assert calls == plain.side.update_calls("1.5.09")
    crashing.memory.undo.clear()
    for lp, leaf, rcx in [*calls, (1, SeamldrLeaf.INFO, INFO)]:
        same_calls(crashing, plain, lp, leaf, rcx)
    assert crashing.crashes > 50
    assert crashing.side.seam.module is not None and crashing.side.seam.module.identity.update == 9
    assert crashing.side.run_td(0)[0] == 1


def test_an_lp_installs_once_however_often_its_call_is_sent() -> None:
    """The answer of an INSTALL that is over comes from the journal; a new call of that LP finds it in the session."""
    caller = Caller()
    for lp, leaf, rcx in caller.side.update_calls("1.5.09")[:2]:
        caller.number += 1
        first = caller.again(lp, leaf, rcx)
    for _ in range(3):
        take_over(caller.side, caller.memory)
        assert caller.again(lp, leaf, rcx) == first and first[0] == 0
    caller.number += 1
    assert caller.again(lp, leaf, rcx)[0] == SeamldrStatus.EBADCALL


def test_a_guest_exits_when_its_server_was_killed() -> None:
    """A TD's run that a crash cut short ends by an interrupt; the guest's counter counts whole runs only."""
    caller = Caller()
    side = caller.side
    rcx = side.tds[0].vcpus[0]
    runs = 0

    def enter() -> None:
        caller.enter(0, TdhLeaf.TDH_VP_ENTER, rcx)

    def check() -> None:
        rax, registers = caller.again(0, TdhLeaf.TDH_VP_ENTER, rcx)
        whole = rax & 0xFFFF_FFFF == EXIT_TDCALL
        assert whole or rax & 0xFFFF_FFFF == EXIT_INTERRUPT
        assert side.run_td(0)[0] == runs + 1 + whole
        if whole:
            assert registers[6] == runs + 1

    for _ in range(2):
        caller.number += 1
        caller.crash_everywhere(enter, check)
        caller.crash_everywhere(lambda: side.seam.leave(0), check)
        runs += 1
    assert side.run_td(0)[0] == runs + 1


def test_what_was_refused_stays_refused() -> None:
    """VMfailInvalid is in the journal too, although whoever was in the way has left meanwhile."""
    caller = Caller()
    caller.number = 1
    caller.enter(0, SeamldrLeaf.INFO, INFO)
    assert caller.enter(1, SeamldrLeaf.INFO, INFO) is Admission.MUTEX_HELD
    take_over(caller.side, caller.memory)
    caller.side.seam.leave(0)
    call = caller.side.seam.journal.find(1, 1, 1)
    assert call is not None and (call.over, call.entered) == (True, False)
    assert call.result == (SeamldrLeaf.INFO, caller.side.registers(rcx=INFO))


def test_the_call_of_a_dead_cpu_is_not_its_successors() -> None:
    """A journal entry belongs to one incarnation of a CPU, and to its last call."""
    caller = Caller()
    caller.number = 7
    caller.again(0, SeamldrLeaf.INFO, INFO)
    journal = caller.side.seam.journal
    assert journal.find(0, 1, 7) is not None
    assert journal.find(0, 2, 7) is journal.find(0, 1, 8) is journal.find(1, 1, 7) is None


def test_a_step_sees_its_own_stores() -> None:
    """Others see them when it is over; overlapping stores in their order, zeros, and the end of RAM included."""
    below = PhysicalMemory.private(8192)
    below.write(0, bytes(range(32)))
    step = StepMemory(below)
    step.write(4, b"abcdefgh")
    step.write(6, bytes(3))
    step.write64(8, 0x1122_3344_5566_7788)
    step.write(8190, b"xyz")
    step.write(9000, b"lost")
    expected = bytes(range(4)) + b"ab\0\0" + bytes.fromhex("8877665544332211") + bytes(range(16, 32))
    assert step.read(0, 32) == expected and below.read(0, 32) == bytes(range(32))
    assert (step.read(8190, 4), step.read(5, 3), step.read64(8)) == (b"xy\xff\xff", b"b\0\0", 0x1122_3344_5566_7788)
    step.settle()
    assert below.read(0, 32) == expected == step.read(0, 32)
    assert (below.read(8190, 2), step.stores) == (b"xy", [])


def test_power_on_forgets_what_was_kept() -> None:
    """An erased range is a P-SEAMLDR that was just launched: no module, no journal."""
    caller = Caller()
    caller.again(0, SeamldrLeaf.INFO, INFO)
    caller.side.seam.store.erase()
    fresh = SeamSide(caller.side.platform, caller.memory)
    assert (fresh.module, fresh.inside, fresh.journal.calls) == (None, None, {})
