"""The VMX instructions as operations, with their records, and the stores that KVM's tracking of a VMCS makes.

The unit decides each outcome; this file adds what makes an instruction an operation of the machine: the record, the
count, and the Lamport stamp of the VMCS region, which carries causality from the CPU that wrote a region to the one
that reads it.
"""

from __future__ import annotations

from bus.memory import PAGE_SIZE
from cpu.core import CpuCore, GuestExit, GuestRun, trap
from cpu.struct import NONE
from cpu.vmx import NO_VMCS, Field, Outcome, Status

REGION_STAMP = PAGE_SIZE - 16
"""Offset in a VMCS region of the Lamport time at which it was last loaded or written back."""

_WORDS = {Status.SUCCEED: "ok", Status.FAIL_INVALID: "invalid", Status.VM_EXIT: "ok"}


def result_word(outcome: Outcome) -> str:
    """The outcome as records spell it."""
    if outcome.status is Status.FAIL_VALID:
        return f"valid:{outcome.error}"
    if outcome.status is Status.EXCEPTION:
        return f"fault:{outcome.vector}"
    return _WORDS[outcome.status]


def field_name(encoding: int) -> str:
    """The field's name, or its encoding in hex."""
    try:
        return Field(encoding & ~1).name + ("_HIGH" if encoding & 1 else "")
    except ValueError:
        return f"{encoding:#x}"


class VmxOperations(CpuCore):
    """VMX instructions of one CPU."""

    async def vmxon(self, pa: int) -> Outcome:
        """VMXON with the region at `pa`."""
        outcome = self.vmx.vmxon(pa)
        self.emit("vmxon", pa=pa, result=result_word(outcome))
        await self.boundary()
        return outcome

    async def vmxoff(self) -> Outcome:
        """VMXOFF."""
        active = len(self.vmx.active)
        outcome = self.vmx.vmxoff()
        self.emit("vmxoff", active=active, result=result_word(outcome))
        await self.boundary()
        return outcome

    async def cr4_set_bits(self, bits: int) -> Outcome:
        """MOV to CR4 with more bits set."""
        outcome = self.vmx.mov_cr4(self.vmx.cr4 | bits)
        await self.give_way()
        return outcome

    async def cr4_clear_bits(self, bits: int) -> Outcome:
        """MOV to CR4 with some bits cleared; faults for VMXE inside VMX operation."""
        outcome = self.vmx.mov_cr4(self.vmx.cr4 & ~bits)
        await self.give_way()
        return outcome

    async def vmptrld(self, pa: int, reason: str = "strategy") -> Outcome:
        """VMPTRLD; `reason` is for the record."""
        self.clock.merge(self._region_stamp(pa))
        before = self.vmx.cur
        outcome = self.vmx.vmptrld(pa)
        self.count.vmptrld += 1
        time = self.emit("vmptrld", vmcs=pa, cur=before, result=result_word(outcome), reason=reason)
        self._stamp_region(pa, time, outcome)
        await self.give_way()
        return outcome

    async def vmclear(self, pa: int, reason: str = "strategy") -> Outcome:
        """VMCLEAR; `reason` is for the record."""
        self.clock.merge(self._region_stamp(pa))
        before = self.vmx.cur
        outcome = self.vmx.vmclear(pa)
        self.count.vmclear += 1
        time = self.emit("vmclear", vmcs=pa, cur=before, result=result_word(outcome), reason=reason)
        self._stamp_region(pa, time, outcome)
        await self.give_way()
        return outcome

    async def vmptrst(self) -> Outcome:
        """VMPTRST; the pointer is the outcome's value."""
        outcome = self.vmx.vmptrst()
        self.emit("vmptrst", value=outcome.value, result=result_word(outcome))
        await self.give_way()
        return outcome

    async def vmread(self, field: int) -> Outcome:
        """VMREAD; the value is the outcome's value."""
        outcome = self.vmx.vmread(field)
        self.count.vmread += 1
        if not outcome.ok or self.trace:
            self.count.vmread_errors += not outcome.ok
            self._field_record("vmread", field, outcome.value, outcome)
        self.budget -= 1
        if self.budget <= 0:
            await self.boundary()
        return outcome

    async def vmwrite(self, field: int, value: int) -> Outcome:
        """VMWRITE."""
        outcome = self.vmx.vmwrite(field, value)
        self.count.vmwrite += 1
        if not outcome.ok or self.trace:
            self.count.vmwrite_errors += not outcome.ok
            self._field_record("vmwrite", field, value, outcome)
        self.budget -= 1
        if self.budget <= 0:
            await self.boundary()
        return outcome

    async def vmentry(self, vcpu: int, want: int, *, launched: bool, first: bool) -> tuple[Outcome, GuestExit]:
        """VMRESUME if `launched`, else VMLAUNCH; on success the guest runs until it exits.

        `want` is the VMCS that the caller means to enter and `first` says whether it is the first entry since its
        load: both are for the record. The exit's fields are in the VMCS when this returns.
        """
        unit = self.vmx
        current = unit.cur
        outcome = unit.vmresume() if launched else unit.vmlaunch()
        if not outcome.ok or first or self.trace:
            self.count.entry_errors += not outcome.ok
            self.emit(
                "vmentry",
                insn="vmresume" if launched else "vmlaunch",
                vcpu=vcpu,
                vmcs=current,
                want=want,
                launched=int(launched),
                result=result_word(outcome),
            )
        if not outcome.ok or outcome.status is Status.VM_EXIT:
            await self.boundary()
            return outcome, GuestExit()
        self.nmi_due("in-guest")
        ended: GuestExit = await trap(GuestRun())
        self.kernel.guest(unit, ended)
        self.count.exits += 1
        return outcome, ended

    def _field_record(self, event: str, field: int, value: int, outcome: Outcome) -> None:
        current = self.vmx.cur
        self.emit(event, field=field, name=field_name(field), value=value, vmcs=current, result=result_word(outcome))

    def _region_stamp(self, pa: int) -> int:
        if pa % PAGE_SIZE or pa + PAGE_SIZE > self.memory.size:
            return 0
        return self.memory.read64(pa + REGION_STAMP)

    def _stamp_region(self, pa: int, time: int, outcome: Outcome) -> None:
        if outcome.ok:
            self.memory.write64(pa + REGION_STAMP, time)


assert NONE == NO_VMCS
