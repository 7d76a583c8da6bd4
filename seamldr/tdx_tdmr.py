"""TDMR_INFO, the description of a TD memory region that the host gives to TDH.SYS.CONFIG, and its checks.

Source: Intel TDX module ABI, "TDMR_INFO"; `src/vmm_dispatcher/api_calls/tdh_sys_config.c`.
"""

from __future__ import annotations

import itertools
import struct

import msgspec

from bus.memory import PhysicalMemory
from seamldr.tdx_call import Refused
from seamldr.tdx_context import ModuleContext
from seamldr.tdx_state import MAX_RESERVED_PER_TDMR, PAGE_SIZE, TDMR_GRANULE, Tdmr
from seamldr.tdx_status import OperandId, TdxStatus

TDMR_INFO_SIZE = 512
_TDMR_INFO = struct.Struct("<40Q")
PAMT_ENTRY_SIZE = 16
PAMT_PAGE_SIZES = (1 << 30, 1 << 21, 1 << 12)


class TdmrInfo(msgspec.Struct, frozen=True):
    """`struct tdmr_info`: a region, its three PAMT areas (1 GiB, 2 MiB, 4 KiB pages) and the holes in it, in bytes."""

    base: int
    size: int
    pamt: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    reserved: tuple[tuple[int, int], ...] = ()  # offset from base and size, ascending

    def write(self, memory: PhysicalMemory, pa: int) -> None:
        """Store the 512 bytes at `pa`."""
        holes = [word for hole in self.reserved for word in hole]
        words = [self.base, self.size, *(word for area in self.pamt for word in area), *holes]
        packed = _TDMR_INFO.pack(*words, *[0] * (40 - len(words)))
        memory.write(pa, packed.ljust(TDMR_INFO_SIZE, b"\0"))

    @classmethod
    def read(cls, memory: PhysicalMemory, pa: int) -> TdmrInfo:
        """Load the structure at `pa`."""
        base, size, *words = _TDMR_INFO.unpack(memory.read(pa, _TDMR_INFO.size))
        pairs = list(zip(words[::2], words[1::2], strict=True))
        return cls(base, size, (pairs[0], pairs[1], pairs[2]), tuple(pairs[3:]))


def pamt_size(tdmr_size: int, page_size: int) -> int:
    """Bytes of PAMT for pages of `page_size` in a TDMR of `tdmr_size` bytes, whole 4 KiB pages."""
    return -(-tdmr_size // page_size * PAMT_ENTRY_SIZE // PAGE_SIZE) * PAGE_SIZE


def plan_tdmr(base: int, size: int, pamt_pa: int, usable: tuple[int, int]) -> TdmrInfo:
    """A TDMR over [base, base + size) whose PAMT begins at `pamt_pa` and whose only free part is `usable` (start,
    end).

    >>> plan_tdmr(0, 1 << 30, 0x100000, (0x800000, 0x4000000)).reserved
    ((0, 8388608), (67108864, 1006632960))
    """
    areas = []
    for page_size in PAMT_PAGE_SIZES:
        areas.append((pamt_pa, pamt_size(size, page_size)))
        pamt_pa += areas[-1][1]
    start, end = usable
    holes = ((0, start - base), (end - base, base + size - end))
    return TdmrInfo(base, size, (areas[0], areas[1], areas[2]), tuple(hole for hole in holes if hole[1]))


def read_tdmrs(m: ModuleContext, array_pa: int, count: int) -> list[Tdmr]:
    """The TDMRs of SYS.CONFIG: `count` addresses of TDMR_INFO at `array_pa`, checked one by one."""
    tdmrs: list[Tdmr] = []
    pamts: list[tuple[int, int]] = []
    free: list[tuple[int, int]] = []
    end = 0
    for index in range(count):
        pa = m.memory.read64(array_pa + 8 * index)
        info = TdmrInfo.read(m.memory, m.check_shared_pa(pa, 512, OperandId.TDMR_INFO_PA))
        if info.base % TDMR_GRANULE or info.size % TDMR_GRANULE or info.size == 0:
            raise Refused(TdxStatus.TDX_INVALID_TDMR | index)
        if (info.base + info.size) >> m.platform.pa_bits:
            raise Refused(TdxStatus.TDX_INVALID_TDMR | index)
        if info.base < end:
            raise Refused(TdxStatus.TDX_NON_ORDERED_TDMR | index)
        end = info.base + info.size
        reserved = _check_reserved(info, index)
        free += _free_ranges(info, reserved)
        if not all(_in_cmrs(m, start, stop) for start, stop in free):
            raise Refused(TdxStatus.TDX_TDMR_OUTSIDE_CMRS | index)
        pamts += _check_pamts(m, info, index)
        tdmrs.append(Tdmr(info.base, info.size, (info.pamt[0][0], info.pamt[1][0], info.pamt[2][0]), reserved))
        _check_overlap(pamts, free, index)
    return tdmrs


def _check_reserved(info: TdmrInfo, index: int) -> list[tuple[int, int]]:
    reserved: list[tuple[int, int]] = []
    end = 0
    for offset, size in info.reserved[:MAX_RESERVED_PER_TDMR]:
        if size == 0:
            break
        if offset % PAGE_SIZE or size % PAGE_SIZE or offset + size > info.size:
            raise Refused(TdxStatus.TDX_INVALID_RESERVED_IN_TDMR | index)
        if offset < end:
            raise Refused(TdxStatus.TDX_NON_ORDERED_RESERVED_IN_TDMR | index)
        end = offset + size
        reserved.append((offset, size))
    return reserved


def _free_ranges(info: TdmrInfo, reserved: list[tuple[int, int]]) -> list[tuple[int, int]]:
    ranges = []
    start = info.base
    for offset, size in [*reserved, (info.size, 0)]:
        if info.base + offset > start:
            ranges.append((start, info.base + offset))
        start = info.base + offset + size
    return ranges


def _in_cmrs(m: ModuleContext, start: int, end: int) -> bool:
    return any(base <= start and end <= base + size for base, size in m.platform.cmrs)


def _check_pamts(m: ModuleContext, info: TdmrInfo, index: int) -> list[tuple[int, int]]:
    ranges = []
    for (base, size), page_size in zip(info.pamt, PAMT_PAGE_SIZES, strict=True):
        if base % PAGE_SIZE or size % PAGE_SIZE or size < pamt_size(info.size, page_size):
            raise Refused(TdxStatus.TDX_INVALID_PAMT | index)
        if not _in_cmrs(m, base, base + size):
            raise Refused(TdxStatus.TDX_PAMT_OUTSIDE_CMRS | index)
        ranges.append((base, base + size))
    return ranges


def _check_overlap(pamts: list[tuple[int, int]], free: list[tuple[int, int]], index: int) -> None:
    """PAMT areas overlap neither each other nor memory that TDs may use."""
    ordered = sorted(pamts)
    among = any(second[0] < first[1] for first, second in itertools.pairwise(ordered))
    with_free = any(start < stop and begin < end for start, end in pamts for begin, stop in free)
    if among or with_free:
        raise Refused(TdxStatus.TDX_PAMT_OVERLAP | index)
