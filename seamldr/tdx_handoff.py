"""The handoff area: the first pages of the module's data region, which an update leaves in place.

Header of 8 bytes {u8 valid, u8 reserved, u16 handoff version, u32 payload size} and then the tables in fixed places:

    0008H  KOT     2048 x {u32 write-back package bitmap, u8 state, 3 pad}
    4008H  WBT     8 x {u64 resume block, 2048 x u8 key id flag, u8 mutex, 7 pad}
    8088H  TDMRs   64 x {base, size, 3 PAMT bases, bytes initialised, u64 mutex, 8 pad, 16 x {offset, size}}
    D088H  u32 number of TDMRs, u16 global key id, u32 bitmap of configured packages
    D092H  u8 dynamic PAMT, u16 TD_BUILD_COUNT, u16 MIG_INTERRUPTED_COUNT   (handoff version 1 and later)

Source: Intel TDX module, `src/common/helpers/preserving.c` and `src/common/data_structures/preserving_defs.h`; the
inside of table entries is simplified.
"""

from __future__ import annotations

import struct

import msgspec

from bus.memory import PhysicalMemory
from seamldr.tdx_state import (
    MAX_KEYIDS,
    MAX_PKGS,
    MAX_TDMRS,
    KotEntry,
    KotState,
    SystemData,
    Tdmr,
    WbtEntry,
)

HEADER = struct.Struct("<BxHI")
_KOT = struct.Struct("<IB3x")
_WBT = struct.Struct(f"<Q{MAX_KEYIDS}sB7x")
_TDMR = struct.Struct("<7Q8x32Q")
_SCALARS = struct.Struct("<IHI")
_SCALARS_HV1 = struct.Struct("<BHH")

KOT_OFFSET = 0x8
WBT_OFFSET = 0x4008
TDMR_OFFSET = 0x8088
SCALARS_OFFSET = 0xD088
SCALARS_HV1_OFFSET = 0xD092
HANDOFF_PAGES = 14
PAYLOAD_SIZE_HV0 = SCALARS_HV1_OFFSET - KOT_OFFSET
PAYLOAD_SIZE_HV1 = HANDOFF_PAGES * 4096 - KOT_OFFSET


class HandoffHeader(msgspec.Struct, frozen=True):
    """The header as found in memory; `size` is that of the payload, in bytes."""

    valid: int = 0
    hv: int = 0
    size: int = 0


def read_header(memory: PhysicalMemory, pa: int) -> HandoffHeader:
    """The header of the handoff area at `pa`."""
    return HandoffHeader(*HEADER.unpack(memory.read(pa, HEADER.size)))


def write_header(memory: PhysicalMemory, pa: int, header: HandoffHeader) -> None:
    """Store the header of the handoff area at `pa`."""
    memory.write(pa, HEADER.pack(header.valid, header.hv, header.size))


def payload_size(hv: int) -> int:
    """Payload bytes of handoff version `hv`."""
    return PAYLOAD_SIZE_HV0 if hv == 0 else PAYLOAD_SIZE_HV1


def write_payload(memory: PhysicalMemory, pa: int, hv: int, system: SystemData) -> None:
    """Store the tables of `system` in the format of handoff version `hv` behind the header at `pa`."""
    area = bytearray(KOT_OFFSET + payload_size(hv))
    for hkid, entry in system.kot.items():
        _KOT.pack_into(area, KOT_OFFSET + hkid * _KOT.size, entry.wb_bitmap, entry.state)
    for pkg, wbt in enumerate(system.wbt):
        flags = bytearray(MAX_KEYIDS)
        for hkid in wbt.hkids:
            flags[hkid] = 1
        _WBT.pack_into(area, WBT_OFFSET + pkg * _WBT.size, wbt.resume_block, bytes(flags), 0)
    for index, tdmr in enumerate(system.tdmrs):
        areas = [word for area_ in tdmr.reserved for word in area_]
        areas += [0] * (32 - len(areas))
        offset = TDMR_OFFSET + index * _TDMR.size
        _TDMR.pack_into(area, offset, tdmr.base, tdmr.size, *tdmr.pamt, tdmr.initialized, 0, *areas)
    scalars = (len(system.tdmrs), system.global_hkid, system.pkg_config_bitmap)
    _SCALARS.pack_into(area, SCALARS_OFFSET, *scalars)
    if hv >= 1:
        counts = (system.dynamic_pamt, system.td_build_count, system.mig_interrupted_count)
        _SCALARS_HV1.pack_into(area, SCALARS_HV1_OFFSET, *counts)
    memory.write(pa + KOT_OFFSET, bytes(area[KOT_OFFSET:]))


def read_payload(memory: PhysicalMemory, pa: int, hv: int, num_pkgs: int, system: SystemData) -> None:
    """Load the tables behind the header at `pa` into `system`; what handoff version 0 does not have is zero."""
    area = memory.read(pa, KOT_OFFSET + payload_size(hv))
    kot = _KOT.iter_unpack(area[KOT_OFFSET:WBT_OFFSET])
    system.kot = {hkid: KotEntry(KotState(state & 3), bitmap) for hkid, (bitmap, state) in enumerate(kot) if state & 3}
    wbt = list(_WBT.iter_unpack(area[WBT_OFFSET:TDMR_OFFSET]))[: min(num_pkgs, MAX_PKGS)]
    system.wbt = [WbtEntry(block, [hkid for hkid, flag in enumerate(flags) if flag]) for block, flags, _ in wbt]
    count, system.global_hkid, system.pkg_config_bitmap = _SCALARS.unpack_from(area, SCALARS_OFFSET)
    entries = _TDMR.iter_unpack(area[TDMR_OFFSET : TDMR_OFFSET + min(count, MAX_TDMRS) * _TDMR.size])
    system.tdmrs = [_tdmr(entry) for entry in entries]
    dynamic, builds, migrations = _SCALARS_HV1.unpack_from(area, SCALARS_HV1_OFFSET) if hv >= 1 else (0, 0, 0)
    system.dynamic_pamt = bool(dynamic)
    system.td_build_count = builds
    system.mig_interrupted_count = migrations


def _tdmr(words: tuple[int, ...]) -> Tdmr:
    base, size, pamt_1g, pamt_2m, pamt_4k, initialized, _mutex, *areas = words
    reserved = [area for area in zip(areas[::2], areas[1::2], strict=True) if area[1]]
    return Tdmr(base, size, (pamt_1g, pamt_2m, pamt_4k), reserved, initialized)
