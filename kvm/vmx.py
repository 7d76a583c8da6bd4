"""A VMX vCPU: load, run, exit handling, put (arch/x86/kvm/vmx/vmx.c, virt/kvm/kvm_main.c)."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from cpu.cpu import Cpu
from cpu.smp import handle_irq, handle_nmi
from cpu.vmx import Field, Outcome, Status
from kvm.guest import (
    EXIT_REASON_EXCEPTION_NMI,
    EXIT_REASON_EXTERNAL_INTERRUPT,
    STACK,
    TEXT,
    exit_of,
    guest_step,
    next_rip,
)
from kvm.loaded_vmcs import (
    alloc_loaded_vmcs,
    free_loaded_vmcs,
    vmcs_read,
    vmcs_write,
    vmx_vcpu_load_vmcs,
    write_if_changed,
)
from kvm.lost import lost_cpu
from kvm.run_queue import resume_user_mode
from kvm.vcpu import Vcpu
from kvm.virt import kvm_spurious_fault
from kvm.vmcs_setup import initial_fields

EXITS_PER_RUN = 4
"""VM exits handled in one KVM_RUN before user space gets its turn."""

INTR_INFO_NMI = 0x8000_0200
VM_ENTRY_FAILED = 1 << 31
HOST_STACK = 0xFFFF_C900_0000_0000


KVM_HANDLING_NONE, KVM_HANDLING_IRQ, KVM_HANDLING_NMI = 0, 1, 2


class VmxVcpu:
    """One vCPU while it is on a CPU: its preempt notifier, and what lives in the thread's own stack."""

    def __init__(self, number: int, state: Vcpu) -> None:
        self.number = number
        self.state = state
        self.entries = 0
        self.fail_reason: int | None = None
        self.lost_with: int | None = None
        """The dead CPU that had its VMCS."""
        self.handling_intr_from_guest = KVM_HANDLING_NONE

    # Load and put

    async def vcpu_load(self, cpu: Cpu) -> bool:
        """vcpu_load: preempt_notifier_register and the arch load. False if the vCPU is lost with a dead CPU."""
        await cpu.preempt_disable()
        cpu.thread.notifier = self
        loaded = await self._vmx_vcpu_load(cpu, "load")
        if not loaded:
            cpu.thread.notifier = None
        await cpu.preempt_enable()
        return loaded

    async def vcpu_put(self, cpu: Cpu) -> None:
        """vcpu_put: the arch put; the VMCS stays active and current here."""
        await cpu.preempt_disable()
        await self._vmx_vcpu_put(cpu, "put")
        cpu.thread.notifier = None
        await cpu.preempt_enable()

    async def sched_in(self, cpu: Cpu) -> None:
        """kvm_sched_in."""
        await cpu.store(self.state.preempted, 0)
        await self._vmx_vcpu_load(cpu, "sched_in")

    async def sched_out(self, cpu: Cpu) -> None:
        """kvm_sched_out: the put of a preempted vCPU reads its privilege level out of the VMCS."""
        await cpu.store(self.state.preempted, 1)
        await vmcs_read(cpu, Field.GUEST_SS_ACCESS_RIGHTS)
        await self._vmx_vcpu_put(cpu, "sched_out")

    async def _vmx_vcpu_load(self, cpu: Cpu, via: str) -> bool:
        self.entries = 0
        return await vmx_vcpu_load_vmcs(cpu, self.number, self.state.loaded_vmcs, via)

    async def _vmx_vcpu_put(self, cpu: Cpu, via: str) -> None:
        vmcs = await cpu.load(self.state.loaded_vmcs.vmcs)
        cpu.emit("vcpu_put", vcpu=self.number, vmcs=vmcs, via=via, entries=self.entries)

    # Create and destroy

    async def create(self, cpu: Cpu, page: int) -> None:
        """vmx_vcpu_create and the first reset: a VMCS with every field that an entry needs."""
        state = self.state
        await alloc_loaded_vmcs(cpu, state.loaded_vmcs, page)
        cpu.emit("vcpu_create", vcpu=self.number, vmcs=page)
        for word, value in ((state.rip, TEXT), (state.rsp, STACK), (state.cookie, 0), (state.exits, 0)):
            await cpu.store(word, value)
        await self.vcpu_load(cpu)
        fields = initial_fields(cpu.vmx.config, cpu.number)
        for field, value in fields.items():
            await vmcs_write(cpu, field, value)
        await cpu.store(state.loaded_vmcs.exec_control, fields[Field.PRIMARY_PROC_CONTROLS])
        await vmcs_write(cpu, Field.GUEST_RIP, TEXT)
        await vmcs_write(cpu, Field.GUEST_RSP, STACK)
        await vmcs_write(cpu, Field.CR0_READ_SHADOW, 0)
        await self.vcpu_put(cpu)
        await cpu.store(state.created, 1)

    async def destroy(self, cpu: Cpu) -> None:
        """vmx_vcpu_free."""
        vmcs = await cpu.load(self.state.loaded_vmcs.vmcs)
        await free_loaded_vmcs(cpu, self.state.loaded_vmcs)
        await cpu.store(self.state.created, 0)
        cpu.emit("vcpu_destroy", vcpu=self.number, vmcs=vmcs)

    # Run

    async def run(self, cpu: Cpu) -> bool:
        """KVM_RUN for a few exits; False if the vCPU cannot go on (KVM_EXIT_FAIL_ENTRY, or it is lost)."""
        if not await self.vcpu_load(cpu):
            self.lost_with = lost_cpu(await cpu.load(self.state.loaded_vmcs.cpu))
            return False
        for _ in range(EXITS_PER_RUN):
            if not await self.vcpu_enter_guest(cpu):
                break
        await self.vcpu_put(cpu)
        return self.fail_reason is None

    async def vcpu_enter_guest(self, cpu: Cpu) -> bool:
        """One entry and the handling of its exit."""
        await cpu.cond_resched()
        await cpu.preempt_disable()
        await self.prepare_switch_to_guest(cpu)
        await cpu.local_irq_disable()
        reason = await self._vmx_vcpu_run(cpu)
        await self._short_irq_window(cpu)
        await cpu.local_irq_enable()
        await cpu.preempt_enable()
        if reason is None:
            return False
        await self._handle_exit(cpu, reason)
        return True

    async def prepare_switch_to_guest(self, cpu: Cpu) -> None:
        """vmx_prepare_switch_to_guest, preemption off: nothing, for a vCPU that is not nested."""

    async def _vmx_vcpu_run(self, cpu: Cpu) -> int | None:
        """vmx_vcpu_run and the exit handling that needs IRQs off; the basic exit reason, None if the entry failed."""
        state, v = self.state, self.state.loaded_vmcs
        if await cpu.load(state.regs_dirty):
            await vmcs_write(cpu, Field.GUEST_RIP, await cpu.load(state.rip))
            await cpu.store(state.regs_dirty, 0)
        await write_if_changed(cpu, v.host_cr3, Field.HOST_CR3, 0x1000 * (2 + self.number))
        await write_if_changed(cpu, v.host_rsp, Field.HOST_RSP, HOST_STACK + self.number * 0x4000)
        launched = bool(await cpu.load(v.launched))
        want = await cpu.load(v.vmcs)
        outcome, ended = await cpu.vmentry(self.number, want, launched=launched, first=not self.entries)
        if not outcome.ok:
            await self._fail_entry(cpu, outcome)
            return None
        self.entries += 1
        reason = await vmcs_read(cpu, Field.EXIT_REASON)
        if ended.nmi:
            await self._handle(KVM_HANDLING_NMI, handle_nmi(cpu))
        if reason & VM_ENTRY_FAILED:
            await self._dead(cpu, f"VM entry failed, exit reason {reason:#x}", 0)
            return None
        if not launched:
            await cpu.store_recorded(v.launched, 1, "launched_store", vmcs=want)
        await vmcs_read(cpu, Field.IDT_VECTORING_INFO)
        if ended.vector:
            vector = (await vmcs_read(cpu, Field.EXIT_INTR_INFO)) & 0xFF or ended.vector
            await self._handle(KVM_HANDLING_IRQ, handle_irq(cpu, vector))
        return reason

    async def _handle(self, kind: int, handler: Coroutine[Any, Any, None]) -> None:
        """Service what ended the guest's run; perf then accounts a sample to the guest."""
        self.handling_intr_from_guest = kind
        await handler
        self.handling_intr_from_guest = KVM_HANDLING_NONE

    async def _short_irq_window(self, cpu: Cpu) -> None:
        """vcpu_enter_guest: interrupts that are pending now are accounted to the guest."""
        self.handling_intr_from_guest = KVM_HANDLING_IRQ
        await cpu.local_irq_enable()
        await cpu.local_irq_disable()
        self.handling_intr_from_guest = KVM_HANDLING_NONE

    async def _fail_entry(self, cpu: Cpu, outcome: Outcome) -> None:
        if outcome.status is Status.EXCEPTION:
            # VMX operation has ended under us; fine if the machine goes down, says the fixup of the entry.
            await kvm_spurious_fault(cpu)
            await self._dead(cpu, "VM entry faulted", 0)
            return
        error = await vmcs_read(cpu, Field.VM_INSTRUCTION_ERROR)
        word = "VMfailInvalid" if outcome.status is Status.FAIL_INVALID else f"VM-instruction error {outcome.error}"
        await self._dead(cpu, f"KVM_EXIT_FAIL_ENTRY: {word}", error)

    async def _dead(self, cpu: Cpu, why: str, hardware_reason: int) -> None:
        self.fail_reason = hardware_reason
        await cpu.store(self.state.dead, 1)
        vmcs = await cpu.load(self.state.loaded_vmcs.vmcs)
        cpu.emit("vcpu_dead", vcpu=self.number, vmcs=vmcs, why=why, hardware_reason=hardware_reason)

    async def _handle_exit(self, cpu: Cpu, reason: int) -> None:
        """vmx_handle_exit, preemption on: check what the VMCS says against KVM's copies, emulate, move on."""
        state = self.state
        await cpu.might_resched()
        if reason in (EXIT_REASON_EXCEPTION_NMI, EXIT_REASON_EXTERNAL_INTERRUPT):
            return
        rip, rsp = guest_step(await cpu.load(state.rip), await cpu.load(state.rsp))
        cookie = await cpu.load(state.cookie)
        await self._expect(cpu, Field.GUEST_RIP, rip)
        await self._expect(cpu, Field.GUEST_RSP, rsp)
        await self._expect(cpu, Field.CR0_READ_SHADOW, cookie)
        length = await vmcs_read(cpu, Field.EXIT_INSTRUCTION_LENGTH)
        if (reason, length) != exit_of(rip):
            await self._wrong(cpu, "EXIT_REASON", exit_of(rip)[0], reason)
        await vmcs_write(cpu, Field.CR0_READ_SHADOW, cookie + 1)
        await cpu.store(state.cookie, cookie + 1)
        await cpu.store(state.rsp, rsp)
        await cpu.store(state.rip, next_rip(rip, exit_of(rip)[1]))
        await cpu.store(state.regs_dirty, 1)
        await cpu.store(state.exits, await cpu.load(state.exits) + 1)

    async def _expect(self, cpu: Cpu, field: Field, expected: int) -> None:
        """Compare a field with KVM's copy; a wrong one is put right, so that each loss is reported once."""
        got = await vmcs_read(cpu, field)
        if got != expected:
            await self._wrong(cpu, field.name, expected, got)
            await vmcs_write(cpu, field, expected)

    async def _wrong(self, cpu: Cpu, what: str, expected: int, got: int) -> None:
        vmcs = await cpu.load(self.state.loaded_vmcs.vmcs)
        cpu.emit("wrong_data", vcpu=self.number, vmcs=vmcs, what=what, expected=expected, got=got)


async def vcpu_thread(cpu: Cpu, vcpu: VmxVcpu, page: int) -> str:
    """User space's loop around KVM_RUN; why it ended: "moved", "stopped", "dead" or "lost with CPU n".

    The head of the loop is the only place where the thread moves to another CPU or ends.
    """
    if not await cpu.load(vcpu.state.created):
        await vcpu.create(cpu, page)
    alive = True
    while alive and await resume_user_mode(cpu):
        alive = await vcpu.run(cpu)
    if vcpu.lost_with is not None:
        return f"lost with CPU {vcpu.lost_with}"
    if cpu.thread.stopping:
        await vcpu.destroy(cpu)
        return "stopped"
    return "moved" if alive else "dead"


