"""A TDX module that P-SEAMLDR really installs, and one that it really replaces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pseamldr_bench import KEY, LoaderBench

from seamldr.identity import ModuleIdentity, make_identity
from seamldr.module_maker import make_module
from seamldr.pseamldr import Return
from seamldr.range_writer import Handoff
from seamldr.status import Scenario
from seamldr.tdx_boot import boot, born_finalized, init_lps, must
from seamldr.tdx_call import Registers
from seamldr.tdx_leaves import TdhLeaf
from seamldr.tdx_module import ExitReason, TdMemory, TdxModule
from seamldr.tdx_platform import ModulePlatform
from seamldr.tdx_tdmr import plan_tdmr

SCRATCH = 0x70_0000
TDMR = plan_tdmr(0, 1 << 30, 0x80_0000, (0x100_0000, 0x200_0000))


def installed(bench: LoaderBench, identity: ModuleIdentity, scenario: Scenario, tds: TdMemory | None) -> TdxModule:
    """Install an image on all LPs and start the module that comes out of it."""
    assert bench.install(make_module(identity, key=KEY), scenario) == Return(0, 0)
    index = 1 + (tds is not None)
    return TdxModule(identity, ModulePlatform.installed(bench.platform, bench.memory, index), bench.memory, tds=tds)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (make_identity("1.5.08", "A"), make_identity("1.5.09", "A")),
        (make_identity("1.5.08", "A"), make_identity("1.5.16", "B")),
        (make_identity("1.5.16", "B"), make_identity("1.5.17", "B")),
    ],
    ids=["hv0-to-hv0", "hv0-to-hv1", "hv1-to-hv1"],
)
def test_the_wipe_spares_the_handoff_and_tds_go_on(
    make_bench: Callable[..., LoaderBench], old: ModuleIdentity, new: ModuleIdentity
) -> None:
    """SHUTDOWN writes what P-SEAMLDR checks and keeps, at the place where the next module finds it."""
    bench = make_bench()
    module = installed(bench, old, Scenario.LOAD, None)
    boot(module, [TDMR], scratch_pa=SCRATCH)
    pages = iter(range(0x100_0000, 0x200_0000, 4096))
    td = born_finalized(module, hkid=33, pages=pages, scratch_pa=SCRATCH, associate=(2,))
    must(module, 2, TdhLeaf.TDH_VP_ENTER, rcx=td.vcpus[0])
    module.guest_step(2, 7)
    module.td_exit(2, ExitReason.EXTERNAL_INTERRUPT)
    kot = module.state.system.kot
    must(module, 0, TdhLeaf.TDH_SYS_SHUTDOWN, rcx=old.module_hv)
    header = Handoff.decode(bench.memory.read(module.platform.handoff_pa, 8))
    assert (header.valid, header.hv) == (1, old.module_hv)

    module = installed(bench, new, Scenario.UPDATE, module.tds)
    init_lps(module)
    must(module, 0, TdhLeaf.TDH_SYS_UPDATE)
    assert module.state.system.kot == kot
    must(module, 2, TdhLeaf.TDH_VP_ENTER, rcx=td.vcpus[0])
    module.guest_step(2)
    assert module.td_exit(2, ExitReason.TDCALL).out["r12"] == 8


def test_the_loader_itself_refuses_a_downgrade(make_bench: Callable[..., LoaderBench]) -> None:
    """A handoff of version 1 for a module of version 0 ends at the last LP, and the old module is still shut down."""
    bench = make_bench()
    identity = make_identity("1.5.16", "B")
    module = installed(bench, identity, Scenario.LOAD, None)
    boot(module, [TDMR], scratch_pa=SCRATCH)
    must(module, 0, TdhLeaf.TDH_SYS_SHUTDOWN, rcx=1)
    assert bench.install(make_module(make_identity("1.5.08", "A"), key=KEY)).rax == 0x8000_0000_0000_0004
    assert module.seamcall(0, TdhLeaf.TDH_SYS_RD, Registers()).rax == 0xC000_0506_0000_0000
