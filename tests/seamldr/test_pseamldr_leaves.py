"""Conformance rows 8 to 43: admission at the gate, and every leaf but INSTALL."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pseamldr_bench import BUFFER_PA, PARAMS_PA, LoaderBench, RdrandUse, published

from seamldr.gate import Admission
from seamldr.image import PAGE
from seamldr.platform import LoaderProfile, Platform
from seamldr.pseamldr import INTR_PENDING_INTR, INTR_PENDING_NMI, INTR_PENDING_SMI, Return
from seamldr.seamextend import SeamExtend
from seamldr.status import Fatal, Flow, Scenario, SeamldrLeaf, SeamldrStatus
from seamldr.structures import SeamldrInfo

INFO, INSTALL, SHUTDOWN, SEAMINFO, CLEANUP = (
    SeamldrLeaf.INFO, SeamldrLeaf.INSTALL, SeamldrLeaf.SHUTDOWN, SeamldrLeaf.SEAMINFO, SeamldrLeaf.CLEANUP,
)  # fmt: skip
MakeBench = Callable[..., LoaderBench]
KEYID_SHIFT = 40


def open_install(bench: LoaderBench) -> None:
    """The first three LPs of an INSTALL session."""
    bench.install_placed(bench.place(published("1.5.08")), lps=(0, 1, 2))


def info(bench: LoaderBench) -> SeamldrInfo:
    assert bench.call(0, INFO, BUFFER_PA) == Return(0)
    return SeamldrInfo.decode(bench.memory.read(BUFFER_PA, 256))


class TestGate:
    """The processor's decision at SEAMCALL."""

    @pytest.mark.conformance("P-SEAMLDR calls", 8)
    def test_no_p_seamldr(self, make_bench: MakeBench) -> None:
        """RAX[63]=1 without P-SEAMLDR is VMfailInvalid, and the mutex is free again."""
        bench = make_bench()
        bench.state.seamextend = SeamExtend()
        assert bench.gate.enter(0, INFO) is Admission.NOT_LOADED
        assert bench.gate.state.owner is None

    @pytest.mark.conformance("P-SEAMLDR calls", 9)
    def test_mutex_held(self, bench: LoaderBench) -> None:
        """A second LP is refused at once and the first keeps the mutex."""
        assert bench.gate.enter(0, INFO) is Admission.ADMITTED
        assert bench.gate.enter(1, INFO) is Admission.MUTEX_HELD
        assert bench.gate.state.owner == 0
        bench.gate.leave(1)
        assert bench.gate.state.owner == 0
        bench.gate.leave(0)
        assert bench.gate.enter(1, INFO) is Admission.ADMITTED

    @pytest.mark.conformance("P-SEAMLDR calls", 10)
    def test_no_module(self, make_bench: MakeBench) -> None:
        """RAX[63]=0 without a module is VMfailInvalid."""
        assert make_bench().gate.enter(0, 33) is Admission.NOT_LOADED

    @pytest.mark.conformance("P-SEAMLDR calls", 11)
    def test_module_during_install(self, bench: LoaderBench) -> None:
        """Between the first and the last INSTALL no LP reaches the module."""
        open_install(bench)
        assert [bench.gate.enter(lp, 33) for lp in range(4)] == [Admission.NOT_LOADED] * 4

    @pytest.mark.conformance("P-SEAMLDR calls", 12)
    def test_module_beside_info(self, bench: LoaderBench) -> None:
        """A module call does not look at P_SEAMLDR_MUTEX."""
        assert bench.gate.enter(0, INFO) is Admission.ADMITTED
        assert bench.gate.enter(1, 33) is Admission.ADMITTED

    @pytest.mark.conformance("P-SEAMLDR calls", 14)
    @pytest.mark.parametrize("rax", [INFO, 33], ids=["in-p-seamldr", "in-module"])
    def test_crash_inside(self, bench: LoaderBench, rax: int) -> None:
        """An LP that shuts down inside SEAM takes module and P-SEAMLDR with it until reset."""
        assert bench.gate.enter(2, rax) is Admission.ADMITTED
        assert bench.gate.shutdown(2)
        assert [bench.gate.enter(lp, rax) for lp in range(4) for rax in (33, INFO)] == [Admission.SEAM_DEAD] * 8

    @pytest.mark.conformance("P-SEAMLDR calls", 14)
    def test_crash_outside(self, bench: LoaderBench) -> None:
        """An LP that dies outside SEAM harms nobody."""
        assert not bench.gate.shutdown(2)
        assert bench.gate.enter(1, INFO) is Admission.ADMITTED
        assert bench.gate.shutdown(1)
        assert not bench.gate.shutdown(2)
        assert bench.gate.enter(0, INFO) is Admission.SEAM_DEAD


@pytest.mark.conformance("P-SEAMLDR calls")
@pytest.mark.parametrize(
    ("leaf", "profile"),
    [
        pytest.param(0x8000_0000_0000_0005, LoaderProfile.P15, id="row-18"),
        pytest.param(0x8000_0000_0001_0000, LoaderProfile.P15, id="row-19"),
        pytest.param(CLEANUP, LoaderProfile.P10, id="row-20"),
        pytest.param(0x8000_0000_0000_00FE, LoaderProfile.P15, id="row-21"),
    ],
)
def test_unknown_leaf(make_bench: MakeBench, leaf: int, profile: LoaderProfile) -> None:
    """A leaf that the loader does not know is EBADPARAM and leaves RDX alone."""
    assert make_bench(profile=profile).call(0, leaf, PARAMS_PA) == Return(SeamldrStatus.EBADPARAM, None)


@pytest.mark.conformance("P-SEAMLDR calls")
@pytest.mark.parametrize(
    ("leaf", "rcx", "status"),
    [
        pytest.param(INFO, BUFFER_PA + 0x10, SeamldrStatus.EBADPARAM, id="row-22"),
        pytest.param(INFO, BUFFER_PA + 0x80, SeamldrStatus.EBADPARAM, id="row-23"),
        pytest.param(INFO, 1 << 46, SeamldrStatus.EBADPARAM, id="row-24"),
        pytest.param(INFO, 0x4000_0000, SeamldrStatus.EBADPARAM, id="row-25"),
        pytest.param(INFO, 0x4300_0000, SeamldrStatus.EBADPARAM, id="row-26"),
        pytest.param(INFO, 32 << KEYID_SHIFT | BUFFER_PA, SeamldrStatus.EBADPARAM, id="row-27"),
        pytest.param(INFO, 31 << KEYID_SHIFT | BUFFER_PA, SeamldrStatus.SUCCESS, id="row-28"),
        pytest.param(SEAMINFO, BUFFER_PA + 0x400, SeamldrStatus.EBADPARAM, id="row-29"),
        pytest.param(SEAMINFO, BUFFER_PA + 0x800, SeamldrStatus.SUCCESS, id="row-29-aligned"),
        pytest.param(INFO, 31 << KEYID_SHIFT | 0x4000_0000, SeamldrStatus.EBADPARAM, id="row-25-with-keyid"),
    ],
)
def test_buffer_address(bench: LoaderBench, leaf: int, rcx: int, status: SeamldrStatus) -> None:
    """A bad buffer address is EBADPARAM and nothing is written; a good one is written to."""
    bench.memory.write(BUFFER_PA, b"\xaa" * PAGE)
    assert bench.call(1, leaf, rcx) == Return(status)
    untouched = bench.memory.read(BUFFER_PA, PAGE) == b"\xaa" * PAGE
    assert untouched == (status != SeamldrStatus.SUCCESS)


def test_info_fields(bench: LoaderBench) -> None:
    """SEAMLDR.INFO reports version, remaining updates and the live SEAMEXTEND."""
    report = info(bench)
    assert (report.major, report.minor, report.update, report.build_date) == (1, 5, 2, 20240130)
    assert (report.num_remaining_updates, report.features0, report.vendor_id) == (5, 2, 0x8086)
    assert report.seamextend == bench.state.seamextend
    assert report.seamextend.seam_ready == 1


def test_seaminfo_is_the_platform_table(bench: LoaderBench) -> None:
    """SEAMLDR.SEAMINFO copies the first half of P_SYS_INFO_TABLE, and SYS_INFO_TABLE starts with the same."""
    bench.call(0, SEAMINFO, BUFFER_PA)
    table = bench.memory.read(BUFFER_PA, 2048)
    assert table == bench.memory.read(0x43FF_F000, 2048) == bench.memory.read(0x4000_0000, 2048)
    assert table[8:20] == b"\4\0\0\0\1\0\0\0\xf2\6\x0c\0"


@pytest.mark.conformance("P-SEAMLDR calls", 30)
def test_info_in_session(bench: LoaderBench) -> None:
    """INFO in the middle of an INSTALL session sees SEAM_READY 0, and the session goes on."""
    open_install(bench)
    assert info(bench).seamextend.seam_ready == 0
    assert bench.state.current_flow is Flow.INSTALL
    assert bench.call(3, INSTALL, PARAMS_PA) == Return(0, 0)


@pytest.mark.conformance("P-SEAMLDR calls", 31)
@pytest.mark.parametrize("leaf", [*SeamldrLeaf, 0x8000_0000_0000_0005])
def test_no_canary(make_bench: MakeBench, leaf: int) -> None:
    """Without a stack canary every leaf is EUNSPECERR, with RDX preserved; the next call tries again."""
    bench = make_bench()
    bench.entropy.failures[RdrandUse.CANARY] = 2
    assert [bench.call(0, leaf, BUFFER_PA) for _ in range(2)] == [Return(SeamldrStatus.EUNSPECERR)] * 2
    assert bench.state.update_bitmap == set()
    assert bench.call(0, INFO, BUFFER_PA) == Return(0)


def shut_down(bench: LoaderBench, *order: int) -> list[SeamldrStatus]:
    return [bench.call(lp, SHUTDOWN).rax for lp in order]


@pytest.mark.conformance("P-SEAMLDR calls", 32)
def test_shutdown_while_dirty(bench: LoaderBench) -> None:
    """After an install SHUTDOWN asks for a CLEANUP first and changes nothing."""
    assert shut_down(bench, 0) == [SeamldrStatus.ECLEANUPREQ]
    assert bench.module_callable()
    assert bench.state.shutdown_bitmap == set()


@pytest.mark.conformance("P-SEAMLDR calls", 33)
def test_shutdown_in_install(make_bench: MakeBench) -> None:
    """SHUTDOWN in an INSTALL session is EBADCALL, and the session goes on."""
    bench = make_bench()
    open_install(bench)
    assert shut_down(bench, 3) == [SeamldrStatus.EBADCALL]
    assert bench.state.update_bitmap == {0, 1, 2}


@pytest.mark.conformance("P-SEAMLDR calls", 34)
def test_shutdown_twice(make_bench: MakeBench) -> None:
    """A second SHUTDOWN on one LP succeeds and is not counted."""
    bench = make_bench()
    assert shut_down(bench, 1, 1) == [0, 0]
    assert bench.state.shutdown_bitmap == {1}


@pytest.mark.conformance("P-SEAMLDR calls", 35)
def test_shutdown_ends_on_wrong_lp(make_bench: MakeBench) -> None:
    """The call that completes the count must be the ACM LP's; P-SEAMLDR stays callable."""
    bench = make_bench()
    assert shut_down(bench, 0, 1, 2, 3) == [0, 0, 0, SeamldrStatus.EBADCALL]
    assert (bench.loader.p_seamldr_ready, bench.loader.seam_ready) == (True, False)


@pytest.mark.conformance("P-SEAMLDR calls", 36)
def test_shutdown_repaired(make_bench: MakeBench) -> None:
    """A later call on the ACM LP finishes the job; calls elsewhere stay EBADCALL."""
    bench = make_bench()
    shut_down(bench, 0, 1, 2, 3)
    assert shut_down(bench, 2, 0) == [SeamldrStatus.EBADCALL, 0]
    assert [bench.gate.enter(lp, rax) for lp in range(4) for rax in (0, INFO)] == [Admission.NOT_LOADED] * 8


@pytest.mark.conformance("P-SEAMLDR calls", 37)
def test_shutdown_in_order(make_bench: MakeBench) -> None:
    """With the ACM LP last, all calls succeed and nothing answers any more."""
    bench = make_bench()
    assert shut_down(bench, 1, 2, 3, 0) == [0] * 4
    assert bench.state.seamextend.encode() == bytes(136)
    assert bench.gate.enter(0, INFO) is Admission.NOT_LOADED


def test_shutdown_cannot_be_left(make_bench: MakeBench) -> None:
    """INSTALL and CLEANUP are EBADCALL from the first SHUTDOWN on; INFO goes on."""
    bench = make_bench()
    shut_down(bench, 1)
    assert bench.call(2, INSTALL, PARAMS_PA) == Return(SeamldrStatus.EBADCALL, 0)
    assert bench.call(2, CLEANUP) == Return(SeamldrStatus.EBADCALL)
    assert bench.call(2, INFO, BUFFER_PA) == Return(0)


def test_shutdown_after_cleanup(bench: LoaderBench) -> None:
    """After a complete CLEANUP an installed system can shut its loader down."""
    assert bench.cleanup() == [Return(0)] * 4
    assert shut_down(bench, 3, 2, 1, 0) == [0] * 4


def test_x2apic_too_large(make_bench: MakeBench) -> None:
    """SHUTDOWN and CLEANUP on x2APIC ID 1024 are EUNSPECERR."""
    bench = make_bench()
    assert bench.call(1024, SHUTDOWN) == bench.call(1024, CLEANUP) == Return(SeamldrStatus.EUNSPECERR)


@pytest.mark.conformance("P-SEAMLDR calls", 38)
def test_cleanup_too_early(make_bench: MakeBench) -> None:
    """CLEANUP before any INSTALL session reached its last LP is EBADCALL."""
    bench = make_bench()
    assert bench.call(0, CLEANUP) == Return(SeamldrStatus.EBADCALL)
    assert bench.state.current_flow is Flow.READY


@pytest.mark.conformance("P-SEAMLDR calls", 39)
def test_cleanup_in_install(bench: LoaderBench) -> None:
    """CLEANUP in an INSTALL session is EBADCALL, and the session goes on."""
    open_install(bench)
    assert bench.call(3, CLEANUP) == Return(SeamldrStatus.EBADCALL)
    assert bench.call(3, INSTALL, PARAMS_PA) == Return(0, 0)


@pytest.mark.conformance("P-SEAMLDR calls", 40)
def test_cleanup_twice(bench: LoaderBench) -> None:
    """An LP that is done gets EBADCALL while the session is open."""
    assert [bench.call(1, CLEANUP).rax for _ in range(2)] == [0, SeamldrStatus.EBADCALL]
    assert bench.state.cleanup_bitmap == {1}


def test_cleanup_takes_the_module(bench: LoaderBench) -> None:
    """The first CLEANUP call withdraws the module, its SVN and its handoff data, but not its measurement."""
    mrseam = bench.state.seamextend.mrseam
    bench.call(0, CLEANUP)
    register = bench.state.seamextend
    assert (register.seam_ready, register.tee_tcb_svn, register.mrseam) == (0, bytes(16), mrseam)
    assert bench.memory.read(0x4000_5000, 1) == b"\0"
    assert bench.loader.installed is None


def cleanup_until_done(bench: LoaderBench, **events: int) -> int:
    """Repeat the last LP's CLEANUP while it is interrupted; how often it was."""
    for count in range(1000):
        result = bench.call(3, CLEANUP, **events)
        if result.rax != SeamldrStatus.EINTERRUPT:
            assert result == Return(0)
            return count
    raise AssertionError("CLEANUP never ends")


@pytest.mark.conformance("P-SEAMLDR calls", 41)
@pytest.mark.parametrize("pending", [INTR_PENDING_NMI, INTR_PENDING_SMI, 1 << 3])
def test_cleanup_interrupted(bench: LoaderBench, pending: int) -> None:
    """A pending NMI, SMI or other event interrupts after each unit of work, which is kept."""
    for lp in range(3):
        assert bench.call(lp, CLEANUP, interrupts_pending=pending) == Return(0)
    assert bench.call(3, CLEANUP, interrupts_pending=pending) == Return(SeamldrStatus.EINTERRUPT)
    assert bench.state.next_kid[0] == 1
    units = bench.platform.private_keyids + bench.platform.cache_sub_blocks
    assert cleanup_until_done(bench, interrupts_pending=pending, caller_if=False) == units - 1
    assert bench.state.current_flow is Flow.READY


@pytest.mark.conformance("P-SEAMLDR calls", 42)
def test_cleanup_masked_interrupt(bench: LoaderBench) -> None:
    """INTR alone does not interrupt a caller with IF=0; with IF=1 it does."""
    for lp in range(3):
        bench.call(lp, CLEANUP)
    assert bench.call(3, CLEANUP, interrupts_pending=INTR_PENDING_INTR, caller_if=True).rax == SeamldrStatus.EINTERRUPT
    assert bench.call(3, CLEANUP, interrupts_pending=INTR_PENDING_INTR, caller_if=False) == Return(0)


@pytest.mark.conformance("P-SEAMLDR calls", 43)
def test_cleanup_no_entropy(bench: LoaderBench) -> None:
    """PCONFIG without entropy is ENOENTROPY; the LP repeats and finishes."""
    for lp in range(3):
        bench.call(lp, CLEANUP)
    bench.entropy.failures["pconfig"] = 1
    assert bench.call(3, CLEANUP) == Return(SeamldrStatus.ENOENTROPY)
    assert bench.call(3, CLEANUP) == Return(0)


def test_cleanup_complete(bench: LoaderBench) -> None:
    """A complete CLEANUP leaves no identity, no dirty flag and an empty history."""
    assert bench.cleanup() == [Return(0)] * 4
    assert bench.state.seamextend == SeamExtend(p_seamldr_ready=1)
    assert not bench.state.dirty
    assert (bench.state.num_remaining_updates, bench.state.seamdb_entries) == (6, 0)
    assert bench.state.cleanup_bitmap == set()


def test_every_install_dirties_again(bench: LoaderBench) -> None:
    """Each CLEANUP after an install renews all keys and flushes all blocks."""
    for _ in range(2):
        for lp in range(3):
            bench.call(lp, CLEANUP)
        units = bench.platform.private_keyids + bench.platform.cache_sub_blocks
        assert cleanup_until_done(bench, interrupts_pending=INTR_PENDING_NMI) == units
        assert bench.load(published("1.5.06")) == Return(0, 0)


def test_cleanup_by_package(make_bench: MakeBench) -> None:
    """Each package cleans when its own last LP calls."""
    bench = make_bench(num_lps=6, fms=(0xC06F2, 0xC06F1))
    assert bench.platform.x2apic_ids == (0, 1, 2, 4, 5, 6)
    bench.load(published("1.5.06"))
    assert bench.state.key_dirty[:3] == [True, True, False]
    for lp, dirty in zip((4, 0, 5, 6, 1), ([True, True],) * 3 + ([True, False],) * 2, strict=True):
        assert bench.call(lp, CLEANUP) == Return(0)
        assert bench.state.key_dirty[:2] == dirty
    assert bench.call(2, CLEANUP) == Return(0)
    assert bench.state.current_flow is Flow.READY


def test_package_outside(bench: LoaderBench) -> None:
    """An LP of a ninth package is fatal in CLEANUP and INSTALL."""
    for leaf in (CLEANUP, INSTALL):
        with pytest.raises(Fatal):
            bench.loader.call(1000, leaf, 0)


def test_load_counts_from_full(bench: LoaderBench) -> None:
    """Updates count down from the database size; at 0 INFO asks the database again."""
    for left in (4, 3, 2, 1, 0):
        bench.write_handoff()
        assert bench.install(published("1.5.08")) == Return(0, 0)
        assert info(bench).num_remaining_updates == left
    assert bench.load(published("1.5.08")) == Return(0, 0)
    assert info(bench).num_remaining_updates == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_lps": 5, "fms": (1, 2)},
        {"num_lps": 2048},
        {"fms": ()},
        {"p_seamldr_base": 0x5000_0000},
        {"seamrr_base": 0x4000_0800},
    ],
)
def test_platform_refuses(wrong: dict[str, object]) -> None:
    """Sockets, x2APIC IDs or ranges that do not fit are a ValueError."""
    with pytest.raises(ValueError, match=r"sockets|x2APIC|RANGE|pages"):
        Platform(**wrong)  # type: ignore[arg-type]


def test_p10_shutdown_in_install(make_bench: MakeBench) -> None:
    """The first loader lets SHUTDOWN in during an INSTALL session, which then cannot go on."""
    bench = make_bench(profile=LoaderProfile.P10)
    bench.loader.call(0, INSTALL, PARAMS_PA)
    assert bench.loader.call(1, SHUTDOWN, 0) == Return(0)
    assert bench.loader.call(1, INSTALL, PARAMS_PA) == Return(SeamldrStatus.EBADCALL, 0)
    assert info_of_p10(bench).num_remaining_updates == 0


def info_of_p10(bench: LoaderBench) -> SeamldrInfo:
    assert bench.loader.call(0, INFO, BUFFER_PA) == Return(0)
    return SeamldrInfo.decode(bench.memory.read(BUFFER_PA, 256))


def test_scenario_numbers() -> None:
    """The numbers of the interface: LOAD 0, UPDATE 1, INFO shares its number with EBADPARAM."""
    assert (Scenario.LOAD, Scenario.UPDATE) == (0, 1)
    assert int(SeamldrLeaf.INFO) == int(SeamldrStatus.EBADPARAM) == 1 << 63
