"""Conformance rows 44 to 52: who may call INSTALL when, and who is the last."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from pseamldr_bench import MODULE_PA, PARAMS_PA, Before, LoaderBench, published

from seamldr.pseamldr import Return
from seamldr.status import Flow, Scenario, SeamldrLeaf, SeamldrStatus

OK = Return(0, 0)
EBADCALL = Return(SeamldrStatus.EBADCALL, 0)
MakeBench = Callable[..., LoaderBench]


@pytest.mark.conformance("P-SEAMLDR calls", 44)
def test_same_lp_twice(bench: LoaderBench) -> None:
    """An LP that calls twice gets EBADCALL the second time; the session stays open with count 1."""
    assert bench.install_placed(bench.place(published("1.5.08")), lps=(0, 0)) == [OK, EBADCALL]
    assert (bench.state.update_bitmap, bench.state.current_flow) == ({0}, Flow.INSTALL)


@pytest.mark.conformance("P-SEAMLDR calls", 45)
def test_after_shutdown(make_bench: MakeBench) -> None:
    """INSTALL after a SHUTDOWN call is EBADCALL and opens nothing."""
    bench = make_bench()
    bench.call(0, SeamldrLeaf.SHUTDOWN)
    assert bench.call(1, SeamldrLeaf.INSTALL, PARAMS_PA) == EBADCALL
    assert (bench.state.update_bitmap, bench.state.current_flow) == (set(), Flow.SHUTDOWN)


@pytest.mark.conformance("P-SEAMLDR calls", 46)
def test_during_cleanup(bench: LoaderBench) -> None:
    """INSTALL during a CLEANUP session is EBADCALL and opens nothing."""
    bench.call(0, SeamldrLeaf.CLEANUP)
    assert bench.call(1, SeamldrLeaf.INSTALL, PARAMS_PA) == EBADCALL
    assert (bench.state.update_bitmap, bench.state.current_flow) == (set(), Flow.CLEANUP)


@pytest.mark.conformance("P-SEAMLDR calls", 47)
@pytest.mark.parametrize("lp", [1024, 0xFFFF_FFFF])
def test_x2apic_too_large(bench: LoaderBench, lp: int) -> None:
    """X2APIC ID 1024 and above is EUNSPECERR, and the module stays callable."""
    before = Before(bench)
    assert bench.call(lp, SeamldrLeaf.INSTALL, PARAMS_PA) == Return(SeamldrStatus.EUNSPECERR, 0)
    before.assert_restored()


@pytest.mark.conformance("P-SEAMLDR calls", 48)
def test_only_the_last_rcx_counts(bench: LoaderBench) -> None:
    """LPs before the last may pass anything in RCX."""
    before, image = Before(bench), published("1.5.08")
    params = bench.place(image)
    assert [bench.install_placed(params, (lp,), rcx)[0] for lp, rcx in enumerate((1, 0x4000_0000, 1 << 63))] == [OK] * 3
    assert bench.install_placed(params, (3,)) == [OK]
    before.assert_installed(image)


@pytest.mark.conformance("P-SEAMLDR calls", 49)
def test_last_rcx_bad(bench: LoaderBench) -> None:
    """A bad RCX on the last LP is EBADPARAM there only, and the old module is restored."""
    before = Before(bench)
    params = bench.place(published("1.5.08"))
    assert bench.install_placed(params, (0, 1, 2)) == [OK] * 3
    assert bench.install_placed(params, (3,), 0x1001) == [Return(SeamldrStatus.EBADPARAM, 0)]
    before.assert_restored()


@pytest.mark.conformance("P-SEAMLDR calls", 50)
@pytest.mark.conformance("Image files", 127)
def test_one_lp_missing(bench: LoaderBench) -> None:
    """Three of four LPs succeed, the session stays open and no LP reaches the module."""
    assert bench.install_placed(bench.place(published("1.5.08")), (2, 0, 3)) == [OK] * 3
    assert bench.state.current_flow is Flow.INSTALL
    assert not bench.module_callable()
    for leaf in (SeamldrLeaf.SHUTDOWN, SeamldrLeaf.CLEANUP):
        assert bench.call(1, leaf) == Return(SeamldrStatus.EBADCALL)


@pytest.mark.conformance("P-SEAMLDR calls", 51)
def test_missing_lp_comes(bench: LoaderBench) -> None:
    """The missing LP completes the session with its own call."""
    before, image = Before(bench), published("1.5.08")
    params = bench.place(image)
    bench.install_placed(params, (2, 0, 3))
    assert bench.install_placed(params, (1,)) == [OK]
    before.assert_installed(image)


@pytest.mark.conformance("P-SEAMLDR calls", 52)
def test_new_session_after_failure(bench: LoaderBench) -> None:
    """After a recoverable failure all LPs call again, and it works."""
    before, image = Before(bench), published("1.5.08")
    params = bench.place(image)
    bench.install_placed(params, (0, 1, 2, 3), 0x1001)
    assert bench.install_placed(params) == [OK] * 4
    before.assert_installed(image)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=lambda order: "".join(map(str, order)))
def test_any_order(bench: LoaderBench, order: tuple[int, ...]) -> None:
    """The last LP is whoever comes last."""
    before, image = Before(bench), published("1.5.08")
    assert bench.install_placed(bench.place(image), order) == [OK] * 4
    before.assert_installed(image)


def test_one_lp(make_bench: MakeBench) -> None:
    """On one LP a session opens and closes in one call."""
    bench = make_bench(num_lps=1)
    assert bench.load(published("1.5.06")) == OK
    assert bench.state.current_flow is Flow.READY


def test_first_call_withdraws_the_module(bench: LoaderBench) -> None:
    """From the first INSTALL on SEAM_READY is 0 while the rest of SEAMEXTEND stays."""
    old = bench.state.seamextend
    bench.call(0, SeamldrLeaf.INSTALL)
    assert bench.state.seamextend == old.with_ready(0)
    assert bench.state.seamextend_snapshot == old


@pytest.mark.conformance("P-SEAMLDR calls", 112)
def test_params_copied_once(make_bench: MakeBench) -> None:
    """A params page that is rewritten after the last LP copied it changes nothing."""
    bench = make_bench()
    image = published("1.5.06")
    bench.memory.after_read = {PARAMS_PA: lambda: bench.memory.write(PARAMS_PA, b"\xff" * 4096)}
    assert bench.load(image) == OK
    assert bench.memory.read(PARAMS_PA, 4) == b"\xff" * 4


@pytest.mark.conformance("P-SEAMLDR calls", 113)
def test_module_page_copied_once(make_bench: MakeBench) -> None:
    """A module page that is rewritten after it was copied changes nothing."""
    bench = make_bench()
    image = published("1.5.06")
    bench.memory.after_read = {MODULE_PA: lambda: bench.memory.write(MODULE_PA, bytes(4096))}
    assert bench.load(image) == OK
    assert bench.memory.read(MODULE_PA, 4096) == bytes(4096)


def test_load_needs_no_module(make_bench: MakeBench) -> None:
    """A first LOAD works on a platform that never had a module, and an UPDATE does not."""
    bench = make_bench()
    assert bench.install(published("1.5.06"), Scenario.UPDATE) == Return(SeamldrStatus.EBADPARAM, 0)
    assert bench.load(published("1.5.06")) == OK
