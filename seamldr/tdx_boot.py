"""Shortcuts through the real leaves: bring a module up and build TDs, so that a machine starts with guests to run.

boot(module, plan, scratch_pa=...)
td = born_finalized(module, hkid=33, pages=iter(free_pages), scratch_pa=..., vcpus=2)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from seamldr.tdx_call import Registers
from seamldr.tdx_context import TDVPS_BASE_PAGES
from seamldr.tdx_leaves import TdhLeaf
from seamldr.tdx_module import Result, TdxModule
from seamldr.tdx_state import PAGE_SIZE
from seamldr.tdx_status import is_error, status_name
from seamldr.tdx_td import write_td_params
from seamldr.tdx_tdmr import TDMR_INFO_SIZE, TdmrInfo


class BootError(Exception):
    """A leaf of a bring-up or a TD build failed: the parameters do not fit the platform."""


class TdHandle(msgspec.Struct, frozen=True):
    """Physical addresses of a TD: what its host has to remember."""

    hkid: int
    tdr: int
    tdcx: tuple[int, ...]
    vcpus: tuple[int, ...]  # TDVPRs
    vcpu_tdcx: tuple[int, ...]
    memory: tuple[int, ...]

    @property
    def children(self) -> tuple[int, ...]:
        """All pages but the TDR, which is reclaimed last."""
        return self.tdcx + self.vcpus + self.vcpu_tdcx + self.memory


def must(module: TdxModule, lp: int, leaf: TdhLeaf, **registers: int) -> Result:
    """A SEAMCALL that has to succeed. Raises BootError if it does not."""
    result = module.seamcall(lp, leaf, Registers(**registers))
    if is_error(result.rax):
        raise BootError(f"{leaf.name} on LP {lp} failed: {status_name(result.rax)} (0x{result.rax:016x})")
    return result


def init_lps(module: TdxModule) -> None:
    """SYS.INIT on the first LP and SYS.LP.INIT on every LP. Raises BootError."""
    must(module, module.platform.lps[0], TdhLeaf.TDH_SYS_INIT)
    for lp in module.platform.lps:
        must(module, lp, TdhLeaf.TDH_SYS_LP_INIT)


def boot(module: TdxModule, tdmrs: Sequence[TdmrInfo], *, scratch_pa: int, global_hkid: int | None = None) -> None:
    """The cold path from a fresh install to SYS_READY with every TDMR initialised.

    `scratch_pa` is a page-aligned buffer of host memory, one page and 512 bytes for each TDMR. Raises BootError.
    """
    init_lps(module)
    for index, tdmr in enumerate(tdmrs):
        info_pa = scratch_pa + PAGE_SIZE + index * TDMR_INFO_SIZE
        tdmr.write(module.memory, info_pa)
        module.memory.write64(scratch_pa + 8 * index, info_pa)
    hkid = module.platform.first_private_hkid if global_hkid is None else global_hkid
    must(module, module.platform.lps[0], TdhLeaf.TDH_SYS_CONFIG, rcx=scratch_pa, rdx=len(tdmrs), r8=hkid)
    for lp in module.platform.first_lps():
        must(module, lp, TdhLeaf.TDH_SYS_KEY_CONFIG)
    for tdmr in tdmrs:
        end = tdmr.base
        while end < tdmr.base + tdmr.size:
            end = must(module, module.platform.lps[0], TdhLeaf.TDH_SYS_TDMR_INIT, rcx=tdmr.base).out["rdx"]


def create_td(module: TdxModule, *, hkid: int, pages: Iterator[int], scratch_pa: int, max_vcpus: int) -> TdHandle:
    """MNG.CREATE, KEY.CONFIG on each package, ADDCX and MNG.INIT: a TD in build, without vCPUs. Raises BootError.

    `scratch_pa` is a 1 KiB aligned buffer for TD_PARAMS.
    """
    tdr = next(pages)
    must(module, module.platform.lps[0], TdhLeaf.TDH_MNG_CREATE, rcx=tdr, rdx=hkid)
    for lp in module.platform.first_lps():
        must(module, lp, TdhLeaf.TDH_MNG_KEY_CONFIG, rcx=tdr)
    tdcx = tuple(next(pages) for _ in range(module.tdcs_base_pages))
    for page in tdcx:
        must(module, module.platform.lps[0], TdhLeaf.TDH_MNG_ADDCX, rcx=page, rdx=tdr)
    write_td_params(module.memory, scratch_pa, max_vcpus=max_vcpus)
    must(module, module.platform.lps[0], TdhLeaf.TDH_MNG_INIT, rcx=tdr, rdx=scratch_pa)
    return TdHandle(hkid, tdr, tdcx, (), (), ())


def add_vcpu(module: TdxModule, td: TdHandle, *, pages: Iterator[int], lp: int) -> TdHandle:
    """VP.CREATE, VP.ADDCX and VP.INIT on `lp`, which then holds the vCPU. Returns the longer handle."""
    tdvpr = next(pages)
    must(module, lp, TdhLeaf.TDH_VP_CREATE, rcx=tdvpr, rdx=td.tdr)
    tdcx = tuple(next(pages) for _ in range(TDVPS_BASE_PAGES - 1))
    for page in tdcx:
        must(module, lp, TdhLeaf.TDH_VP_ADDCX, rcx=page, rdx=tdvpr)
    must(module, lp, TdhLeaf.TDH_VP_INIT, rcx=tdvpr, rdx=0)
    return msgspec.structs.replace(td, vcpus=(*td.vcpus, tdvpr), vcpu_tdcx=td.vcpu_tdcx + tdcx)


def add_page(module: TdxModule, td: TdHandle, *, pages: Iterator[int], gpa: int, source_pa: int) -> TdHandle:
    """MEM.PAGE.ADD of the page at `source_pa`, MR.EXTEND of all of it. Returns the longer handle. Raises BootError."""
    page = next(pages)
    must(module, module.platform.lps[0], TdhLeaf.TDH_MEM_PAGE_ADD, rcx=gpa, rdx=td.tdr, r8=page, r9=source_pa)
    for offset in range(0, PAGE_SIZE, 256):
        must(module, module.platform.lps[0], TdhLeaf.TDH_MR_EXTEND, rcx=gpa + offset, rdx=td.tdr)
    return msgspec.structs.replace(td, memory=(*td.memory, page))


def born_finalized(
    module: TdxModule,
    *,
    hkid: int,
    pages: Iterator[int],
    scratch_pa: int,
    vcpus: int = 1,
    memory_pages: int = 1,
    associate: Sequence[int | None] = (),
) -> TdHandle:
    """A TD that can run, built on a booted module by the leaves that a host would call.

    `pages` yields free pages of a TDMR, `pages_needed` of them; `scratch_pa` is a page of host memory, for TD_PARAMS
    and the content of the TD's pages. vCPU i stays bound to LP `associate[i]`, or to none if that is None or missing.
    Raises BootError if a leaf fails, StopIteration if `pages` runs out.
    """
    first = module.platform.lps[0]
    td = create_td(module, hkid=hkid, pages=pages, scratch_pa=scratch_pa, max_vcpus=vcpus)
    for index in range(vcpus):
        lp = associate[index] if index < len(associate) else None
        td = add_vcpu(module, td, pages=pages, lp=first if lp is None else lp)
        if lp is None:
            must(module, first, TdhLeaf.TDH_VP_FLUSH, rcx=td.vcpus[-1])
    for index in range(memory_pages):
        td = add_page(module, td, pages=pages, gpa=index * PAGE_SIZE, source_pa=scratch_pa)
    must(module, first, TdhLeaf.TDH_MR_FINALIZE, rcx=td.tdr)
    return td


def pages_needed(module: TdxModule, vcpus: int, memory_pages: int = 1) -> int:
    """Pages that `born_finalized` takes."""
    return 1 + module.tdcs_base_pages + vcpus * TDVPS_BASE_PAGES + memory_pages
