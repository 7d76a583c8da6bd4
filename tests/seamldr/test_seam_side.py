"""The SEAM side as one: gate, P-SEAMLDR, module and TDs, entered and left by LPs, rebuilt from memory at any time."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from seam_bench import EXIT_TDCALL, INFO, LPS, MODULE_HV, PARAMS, Side, module

from bus.memory import PAGE_SIZE, PhysicalMemory
from cpu.layout import BUFFERS, memory_size
from seamldr.gate import Admission
from seamldr.seam import SeamSide
from seamldr.status import Fatal, SeamldrLeaf, SeamldrStatus
from seamldr.tdx_leaves import TdhLeaf

MINOR_VERSION, UPDATE_VERSION = 0x0800_0001_0000_0003, 0x0800_0001_0000_0005
EXIT_INTERRUPT, EXIT_NMI = 1, 0

# Enter and leave


def test_info_is_written_on_leave() -> None:
    """An LP is inside from enter to leave; the caller's buffer is filled when the call ends, other registers stay."""
    side = Side()
    entry = side.seam.enter(1, SeamldrLeaf.INFO, side.registers(rcx=INFO, r9=5))
    assert (entry.admission, entry.guest, side.seam.inside) == (Admission.ADMITTED, False, 1)
    rax, registers = side.seam.leave(1)
    assert (rax, side.seam.inside) == (0, None)
    assert registers == side.registers(rcx=INFO, r9=5)
    info = side.memory.read(INFO, 24)
    assert [int.from_bytes(info[at : at + 2], "little") for at in (20, 18, 22)] == [1, 5, 2]


def test_a_second_caller_finds_p_seamldr_busy() -> None:
    """While one LP is inside, another is refused and nothing happens to either; afterwards it may enter."""
    side = Side()
    side.seam.enter(0, SeamldrLeaf.INFO, side.registers(rcx=INFO))
    before = side.memory.read(INFO, PAGE_SIZE)
    for _ in range(3):
        assert side.seam.enter(1, SeamldrLeaf.INFO, side.registers(rcx=INFO)).admission is Admission.MUTEX_HELD
    assert side.seam.inside == 0 and side.memory.read(INFO, PAGE_SIZE) == before
    assert side.seam.leave(0)[0] == 0
    assert side.call(1, SeamldrLeaf.INFO, rcx=INFO)[0] == 0


def test_the_module_admits_others_while_p_seamldr_is_busy() -> None:
    """The mutex is P-SEAMLDR's alone: module calls of other LPs go on, also several at once."""
    side = Side()
    side.seam.enter(0, SeamldrLeaf.INFO, side.registers(rcx=INFO))
    assert side.call(1, TdhLeaf.TDH_SYS_RD, rdx=UPDATE_VERSION)[1]["r8"] == 8
    assert side.seam.leave(0)[0] == 0


def test_without_a_module_only_p_seamldr_is_there() -> None:
    """Before anything is loaded a module leaf is not admitted, and INFO is."""
    side = Side()
    empty = SeamSide(side.platform, PhysicalMemory.private(memory_size(LPS)))
    assert empty.enter(0, TdhLeaf.TDH_SYS_RD, side.registers()).admission is Admission.NOT_LOADED
    assert empty.enter(0, SeamldrLeaf.INFO, side.registers(rcx=INFO)).admission is Admission.ADMITTED


def test_a_module_of_a_stranger_is_not_what_the_machine_starts_with() -> None:
    """Firmware's LOAD raises Fatal if P-SEAMLDR refuses the image."""
    side = Side()
    platform = msgspec.structs.replace(side.platform, trusted_signers=("00" * 48,))
    fresh = SeamSide(platform, PhysicalMemory.private(memory_size(LPS)))
    with pytest.raises(Fatal, match="EBADSIG"):
        fresh.load(module("1.5.08"), BUFFERS)


# Death


@pytest.mark.parametrize("leaf", [SeamldrLeaf.INFO, TdhLeaf.TDH_VP_ENTER], ids=lambda leaf: leaf.name)
def test_death_inside_latches_until_reset(leaf: int) -> None:
    """An LP that dies in SEAM takes P-SEAMLDR and the module with it, for everybody, also after a restart."""
    side = Side(tds=1)
    operand = INFO if leaf >> 63 else side.tds[0].vcpus[0]
    side.seam.enter(0, leaf, side.registers(rcx=operand))
    assert side.seam.leave_dead(0)
    assert side.seam.inside is None
    for _ in range(2):
        for other in (SeamldrLeaf.INFO, TdhLeaf.TDH_SYS_RD):
            assert side.seam.enter(1, other, side.registers(rcx=INFO)).admission is Admission.SEAM_DEAD
        side.restart()


def test_death_outside_changes_nothing() -> None:
    """An LP that is not in SEAM may die; the others go on."""
    side = Side()
    side.call(0, SeamldrLeaf.INFO, rcx=INFO)
    assert not side.seam.leave_dead(0)
    assert side.call(1, SeamldrLeaf.INFO, rcx=INFO)[0] == 0


# Restart


def test_who_is_inside_survives_a_restart() -> None:
    """The mutex is in the SEAM range: a process that takes over still refuses the second caller."""
    side = Side()
    side.seam.enter(0, SeamldrLeaf.INFO, side.registers(rcx=INFO))
    side.restart()
    assert side.seam.inside == 0
    assert side.seam.enter(1, SeamldrLeaf.INFO, side.registers(rcx=INFO)).admission is Admission.MUTEX_HELD


def test_an_install_session_goes_on_after_a_restart() -> None:
    """One LP has installed, the process is replaced, the other LP completes: each LP still counts once."""
    side = Side()
    side.stage("1.5.09")
    assert side.call(0, TdhLeaf.TDH_SYS_SHUTDOWN, rcx=side.read(MODULE_HV))[0] == 0
    assert side.call(0, SeamldrLeaf.INSTALL, rcx=PARAMS)[0] == 0
    assert side.call(0, SeamldrLeaf.INSTALL, rcx=PARAMS)[0] == SeamldrStatus.EBADCALL
    side.restart()
    assert side.call(0, SeamldrLeaf.INSTALL, rcx=PARAMS)[0] == SeamldrStatus.EBADCALL
    assert side.seam.enter(1, TdhLeaf.TDH_SYS_INIT, side.registers()).admission is Admission.NOT_LOADED
    assert side.call(1, SeamldrLeaf.INSTALL, rcx=PARAMS)[0] == 0
    assert side.call(1, TdhLeaf.TDH_SYS_INIT)[0] == 0
    for lp in range(LPS):
        assert side.call(lp, TdhLeaf.TDH_SYS_LP_INIT)[0] == 0
    assert side.call(0, TdhLeaf.TDH_SYS_UPDATE)[0] == 0
    assert side.read(UPDATE_VERSION) == 9


def test_restarts_are_invisible() -> None:
    """Two updates with a restart after every SEAMCALL end as two without any: same version, same answers."""
    plain, restarted = Side(tds=1), Side(tds=1)
    answers = []
    for side, restarts in ((plain, False), (restarted, True)):
        seen = [side.run_td(0)]
        for version in ("1.5.09", "1.5.13"):
            side.update(version, restarts=restarts)
            seen += [side.run_td(0), (side.read(MINOR_VERSION), side.read(UPDATE_VERSION))]
        side.call(0, SeamldrLeaf.INFO, rcx=INFO)
        answers.append((seen, side.memory.read(INFO, 256)))
    assert answers[0] == answers[1]
    assert answers[0][0][-1] == (5, 13)


# TDs


def test_td_data_survive_updates_and_restarts() -> None:
    """The guest's counter and hash chain go on, run by run, over updates, restarts and from LP to LP."""
    side = Side(tds=2)
    chains, counters = [bytes(32), bytes(32)], [0, 0]
    for turn, version in enumerate(("1.5.09", "1.5.13", None)):
        for td in (1, 0, 1):
            counters[td] += 1
            chains[td] = hashlib.sha256(chains[td] + counters[td].to_bytes(8, "little")).digest()
            expected = (counters[td], int.from_bytes(chains[td][:8], "little"))
            assert side.run_td(turn % LPS, td) == expected
        for td in (0, 1):
            side.call(turn % LPS, TdhLeaf.TDH_VP_FLUSH, rcx=side.tds[td].vcpus[0])
        if version is not None:
            side.update(version, restarts=True)
    assert counters == [3, 6]


@pytest.mark.parametrize(
    "how, reason", [({}, EXIT_TDCALL), ({"interrupted": True}, EXIT_INTERRUPT), ({"nmi": True}, EXIT_NMI)], ids=str
)
def test_a_guest_runs_until_it_leaves(how: dict[str, bool], reason: int) -> None:
    """TDH.VP.ENTER keeps the LP in SEAM; the guest's own TDVMCALL, an interrupt or an NMI ends it, by that reason."""
    side = Side(tds=1)
    entry = side.seam.enter(0, TdhLeaf.TDH_VP_ENTER, side.registers(rcx=side.tds[0].vcpus[0]))
    assert entry == type(entry)(Admission.ADMITTED, True) and side.seam.inside is None
    rax, _ = side.seam.leave(0, **how)
    assert (rax & 0xFFFF_FFFF, rax >> 62) == (reason, 0)


def test_an_interrupted_guest_has_not_moved() -> None:
    """Only a run that ends by itself advances the guest: after an interrupted one the counter follows the last."""
    side = Side(tds=1)
    assert side.run_td(0)[0] == 1
    side.seam.enter(0, TdhLeaf.TDH_VP_ENTER, side.registers(rcx=side.tds[0].vcpus[0]))
    side.seam.leave(0, interrupted=True)
    assert side.run_td(0)[0] == 2
