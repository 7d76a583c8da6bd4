"""A VMCS, in memory and on chip.

The region in memory is 4 KiB:

    +0     revision identifier, bit 31 = shadow VMCS     ordinary memory: only software writes it
    +4     VMX-abort indicator                           written by a VMX abort
    +8     launch state, u64, one of `LaunchState`; anything else means that it was never VMCLEARed
    +16    the fields, a u64 each: control, host and guest state, then those of them that change from entry to entry
           (`VOLATILE`), exit information; each group in order of encoding; then the fields of the configuration that
           the architecture does not name
    +4080  not used by the processor

From VMPTRLD to VMCLEAR a logical processor works on its own copy, a `Vmcs`; memory holds what was last written back.
A processor that dies takes its copy with it.
"""

from __future__ import annotations

import enum
from array import array

from bus.memory import PhysicalMemory

from .config import MISC_VMWRITE_ANY, U64_MAX, VmxConfig
from .fields import Field, FieldType, is_well_formed, mask_of, type_of

NO_VMCS = U64_MAX
"""The current-VMCS pointer when there is none, as VMPTRST stores it."""

SHADOW_VMCS = 1 << 31
ABORT_OFFSET = 4
DATA_OFFSET = 8
DATA_END = 4080


class LaunchState(enum.IntEnum):
    """The launch-state word of a region. CORRUPTED: VMXOFF came before VMCLEAR, so the data on chip was lost."""

    UNKNOWN = 0
    CLEAR = int.from_bytes(b"clear", "little")
    LAUNCHED = int.from_bytes(b"launched", "little")
    CORRUPTED = int.from_bytes(b"corrupt", "little")


VOLATILE = frozenset(
    {
        Field.TSC_OFFSET,
        Field.VMENTRY_INTR_INFO,
        Field.VMENTRY_EXCEPTION_ERROR_CODE,
        Field.VMENTRY_INSTRUCTION_LENGTH,
        Field.VMCS_LINK_POINTER,
        Field.GUEST_INTERRUPTIBILITY_STATE,
        Field.GUEST_ACTIVITY_STATE,
        Field.VMX_PREEMPTION_TIMER_VALUE,
        Field.GUEST_CR3,
        Field.GUEST_RSP,
        Field.GUEST_RIP,
        Field.GUEST_RFLAGS,
        Field.GUEST_PENDING_DEBUG_EXCEPTIONS,
    }
)
"""Control and guest fields that usually differ between two VM entries of one guest."""

_GROUPS = (FieldType.CONTROL, FieldType.HOST, FieldType.GUEST, None, FieldType.EXIT_INFORMATION)


def _order(field: Field) -> tuple[int, int]:
    return _GROUPS.index(None if field in VOLATILE else type_of(field)), field


SLOT: dict[int, int] = {int(field): slot for slot, field in enumerate(sorted(Field, key=_order), start=1)}
"""Where each architectural field lies in `Vmcs.data`; slot 0 is the launch state."""

VOLATILE_START = min(SLOT[field] for field in VOLATILE)
"""Slots from 1 up to this one change seldom: what a VM entry found good there stays good until they differ."""

ERROR_SLOT = SLOT[Field.VM_INSTRUCTION_ERROR]


class Layout:
    """Which fields a configuration has, and where they lie. Raises ValueError for a field that cannot exist."""

    __slots__ = ("_mask", "full", "high", "size", "writable")

    def __init__(self, config: VmxConfig) -> None:
        supported = frozenset(SLOT) if config.supported_fields is None else config.supported_fields
        full = {field & ~1 if is_high_half(field) else field for field in supported}
        if bad := sorted(field for field in full if not is_well_formed(field)):
            raise ValueError(f"no VMCS field can have the encoding {bad[0]:#x}")
        extra = sorted(full - SLOT.keys())
        slots = SLOT | {field: len(SLOT) + 1 + number for number, field in enumerate(extra)}
        self.size = 8 * (len(slots) + 1)
        if DATA_OFFSET + self.size > DATA_END:
            raise ValueError(f"{len(extra)} fields beyond the architectural ones do not fit into a VMCS region")
        any_field = bool(config.misc & MISC_VMWRITE_ANY)
        self.full = {field: slots[field] for field in sorted(full)}
        self.high = {field | 1: slot for field, slot in self.full.items() if field >> 13 == 1}
        self.writable = {
            field: (slot, mask_of(field))
            for field, slot in self.full.items()
            if any_field or type_of(field) is not FieldType.EXIT_INFORMATION
        }
        words = array("Q", [U64_MAX, *map(mask_of, slots)])
        self._mask = int.from_bytes(words.tobytes(), "little")

    def load(self, memory: PhysicalMemory, pa: int) -> array[int]:
        """The launch state and fields of the region at `pa`, each no wider than its field can be."""
        raw = int.from_bytes(memory.read(pa + DATA_OFFSET, self.size), "little") & self._mask
        return array("Q", raw.to_bytes(self.size, "little"))


def is_high_half(encoding: int) -> bool:
    """The encoding is the high half of a 64-bit field."""
    return encoding & 1 == 1 and encoding >> 13 & 3 == 1


class Vmcs:
    """One processor's copy of the VMCS at physical address `pa`."""

    __slots__ = ("checked", "data", "pa")

    def __init__(self, pa: int, data: array[int]) -> None:
        self.pa = pa
        self.data = data
        self.checked: object = None
        """What the last VM entry found good, so that the next can skip most of its checks."""

    def __getitem__(self, field: int) -> int:
        return self.data[SLOT[field]]

    def __setitem__(self, field: int, value: int) -> None:
        self.data[SLOT[field]] = value & mask_of(field)

    @property
    def launch(self) -> LaunchState:
        """Launch state; UNKNOWN if the region never saw a VMCLEAR."""
        word = self.data[0]
        return LaunchState(word) if word in LaunchState._value2member_map_ else LaunchState.UNKNOWN

    @launch.setter
    def launch(self, state: LaunchState) -> None:
        self.data[0] = state

    def write_back(self, memory: PhysicalMemory) -> None:
        """Store launch state and fields into the region. The revision word is not touched."""
        memory.write(self.pa + DATA_OFFSET, self.data.tobytes())
