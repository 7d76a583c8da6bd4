"""Nested virtualization (arch/x86/kvm/vmx/nested.c): two VMCSs for a vCPU, and a shadow VMCS for its own hypervisor.

vmcs01 runs the guest L1, vmcs02 the guest's guest L2; `loaded_vmcs` names one of them. The shadow VMCS lets L1 execute
VMREAD and VMWRITE without exits; KVM loads it for a moment to copy fields, and does not tell `current_vmcs`.
"""

from __future__ import annotations

import msgspec

from cpu.cpu import Cpu
from cpu.layout import LoadedVmcs
from cpu.struct import NONE
from cpu.vmx import Field
from kvm.loaded_vmcs import (
    alloc_loaded_vmcs,
    free_loaded_vmcs,
    vmcs_clear,
    vmcs_read,
    vmcs_write,
    vmx_vcpu_load_vmcs,
    write_if_changed,
)
from kvm.vcpu import Vcpu
from kvm.vmcs_setup import initial_fields
from kvm.vmx import VmxVcpu

SHADOW_VMCS = 1 << 31
"""Bit of the first word of a VMCS region: this is a shadow VMCS."""

PRIMARY_SECONDARY_CONTROLS = 1 << 31
SECONDARY_VMCS_SHADOWING = 1 << 14

VMXERR_ENTRY_INVALID_CONTROL_FIELD = 7

SHADOWED_FIELDS = (Field.GUEST_RIP, Field.GUEST_RSP, Field.GUEST_RFLAGS)


class NestedState(Vcpu):
    """A vCPU with the nested state: which of its two VMCSs is selected."""

    __slots__ = ("selected",)

    def __init__(self, address: int) -> None:
        super().__init__(address)
        self.selected = self.vmcs01

    @property
    def loaded_vmcs(self) -> LoadedVmcs:
        """vmcs01 or vmcs02."""
        return LoadedVmcs(self.selected)


class Vmcs12(msgspec.Struct):
    """What L1 keeps of its guest's VMCS; `launched` and the last VMfail are for L1 to see."""

    fields: dict[int, int] = msgspec.field(default_factory=dict)
    launched: bool = False
    vmfail: int = 0


class NestedVcpu(VmxVcpu):
    """A vCPU whose guest is a hypervisor. `names_buddy`: the kernel is one from before May 2025, which at a switch
    tells `vmx_vcpu_load_vmcs` of the VMCS that it comes from.
    """

    state: NestedState

    def __init__(self, number: int, address: int, *, names_buddy: bool = False) -> None:
        super().__init__(number, NestedState(address))
        self.names_buddy = names_buddy
        self.vmcs12 = Vmcs12()
        self.shadow_page = 0
        self.need_vmcs12_to_shadow_sync = False

    @property
    def guest_mode(self) -> bool:
        """Whether L2 is selected."""
        return self.state.selected != self.state.vmcs01

    # Set up and tear down

    async def enter_vmx_operation(self, cpu: Cpu, vmcs02_page: int, shadow_page: int) -> None:
        """L1 has executed VMXON: vmcs02, and the shadow VMCS linked to vmcs01. The vCPU is loaded."""
        v02 = LoadedVmcs(self.state.vmcs02)
        await alloc_loaded_vmcs(cpu, v02, vmcs02_page)
        revision = cpu.vmx.config.vmcs_revision_id | SHADOW_VMCS
        await cpu.clear_page(shadow_page)
        await cpu.write_phys(shadow_page, revision.to_bytes(4, "little"))
        await vmcs_clear(cpu, shadow_page, "alloc")
        self.shadow_page = shadow_page
        await cpu.store(LoadedVmcs(self.state.vmcs01).shadow_vmcs, shadow_page)
        await self._set_shadowing(cpu, shadow_page)
        await self.vmx_switch_vmcs(cpu, v02)
        for field, value in initial_fields(cpu.vmx.config, cpu.number).items():
            await vmcs_write(cpu, field, value)
        await self.vmx_switch_vmcs(cpu, LoadedVmcs(self.state.vmcs01))

    async def free_nested(self, cpu: Cpu) -> None:
        """L1 is done with VMX: back to vmcs01, no shadow, no vmcs02. The vCPU is loaded."""
        if not self.shadow_page:
            return
        if self.guest_mode:
            await self.vmx_switch_vmcs(cpu, LoadedVmcs(self.state.vmcs01))
        await self._set_shadowing(cpu, NONE)
        await vmcs_clear(cpu, self.shadow_page)
        await cpu.store(LoadedVmcs(self.state.vmcs01).shadow_vmcs, 0)
        self.shadow_page = 0
        await free_loaded_vmcs(cpu, LoadedVmcs(self.state.vmcs02))

    async def destroy(self, cpu: Cpu) -> None:
        """vmx_vcpu_free: the nested state goes first, with the vCPU loaded."""
        await self.vcpu_load(cpu)
        await self.free_nested(cpu)
        await self.vcpu_put(cpu)
        await super().destroy(cpu)

    async def _set_shadowing(self, cpu: Cpu, link: int) -> None:
        """Turn the control "VMCS shadowing" of vmcs01 on, with the shadow at `link`, or off with NONE."""
        v = self.state.loaded_vmcs
        primary, on = await cpu.load(v.exec_control), link != NONE
        changed = primary | PRIMARY_SECONDARY_CONTROLS if on else primary & ~PRIMARY_SECONDARY_CONTROLS
        secondary = SECONDARY_VMCS_SHADOWING if on else 0
        await write_if_changed(cpu, v.secondary_exec_control, Field.SECONDARY_PROC_CONTROLS, secondary)
        await write_if_changed(cpu, v.exec_control, Field.PRIMARY_PROC_CONTROLS, changed)
        await vmcs_write(cpu, Field.VMCS_LINK_POINTER, link)
        self.need_vmcs12_to_shadow_sync = False

    # Switching

    async def vmx_switch_vmcs(self, cpu: Cpu, v: LoadedVmcs) -> None:
        """Select and load the other VMCS; it may be active on another CPU, which then gets a clear IPI."""
        if cpu.warn_on_once(self.state.selected == v.address, "vmx_switch_vmcs() to the VMCS at hand"):
            return
        await cpu.preempt_disable()
        await self._select(cpu, v)
        await cpu.preempt_enable()

    async def _select(self, cpu: Cpu, v: LoadedVmcs) -> None:
        buddy = self.state.loaded_vmcs if self.names_buddy else None
        self.state.selected = v.address
        self.entries = 0
        await vmx_vcpu_load_vmcs(cpu, self.number, v, "switch", buddy)

    async def copy_vmcs02_to_vmcs12_rare(self, cpu: Cpu) -> None:
        """Fetch the fields of vmcs02 that L1 seldom asks for: there and back under one preemption-off section."""
        await cpu.preempt_disable()
        await self._select(cpu, LoadedVmcs(self.state.vmcs02))
        self.vmcs12.fields[Field.GUEST_GDTR_BASE] = await vmcs_read(cpu, Field.GUEST_GDTR_BASE)
        await self._select(cpu, LoadedVmcs(self.state.vmcs01))
        await cpu.preempt_enable()

    # The shadow VMCS

    async def copy_shadow_to_vmcs12(self, cpu: Cpu) -> None:
        """Before emulating an L2 entry: what L1 wrote into the shadow."""
        shadow = await self._begin_shadow(cpu)
        if shadow:
            for field in SHADOWED_FIELDS:
                self.vmcs12.fields[field] = await vmcs_read(cpu, field)
            await self._end_shadow(cpu, shadow)

    async def prepare_switch_to_guest(self, cpu: Cpu) -> None:
        """What L2 has left in vmcs12 goes into the shadow before L1 runs again."""
        if self.need_vmcs12_to_shadow_sync:
            await self.copy_vmcs12_to_shadow(cpu)
            self.need_vmcs12_to_shadow_sync = False

    async def copy_vmcs12_to_shadow(self, cpu: Cpu) -> None:
        """Before entering L1: what it is to find in the shadow."""
        shadow = await self._begin_shadow(cpu)
        if shadow:
            for field in SHADOWED_FIELDS:
                await vmcs_write(cpu, field, self.vmcs12.fields.get(field, 0))
            await self._end_shadow(cpu, shadow)

    async def _begin_shadow(self, cpu: Cpu) -> int:
        """Preemption off, interrupts on; from here to the end `current_vmcs` is not what is current."""
        shadow = await cpu.load(LoadedVmcs(self.state.vmcs01).shadow_vmcs)
        if not cpu.warn_on_once(not shadow, "no shadow VMCS"):
            await cpu.preempt_disable()
            await cpu.vmptrld(shadow, "shadow")
        return shadow

    async def _end_shadow(self, cpu: Cpu, shadow: int) -> None:
        await vmcs_clear(cpu, shadow, "shadow")
        await cpu.vmptrld(await cpu.load(self.state.loaded_vmcs.vmcs), "shadow")
        await cpu.preempt_enable()

    # Running L2

    async def nested_vmx_run(self, cpu: Cpu) -> bool:
        """L1 executed VMLAUNCH or VMRESUME: enter L2 once; False if L1 sees VMfail instead.

        A VM-instruction error of the hardware entry never reaches user space: L1 is told error 7.
        """
        await self.copy_shadow_to_vmcs12(cpu)
        await self.vmx_switch_vmcs(cpu, LoadedVmcs(self.state.vmcs02))
        entered = await self._enter_l2(cpu)
        await self._nested_vmx_vmexit(cpu, entered)
        return entered

    async def _enter_l2(self, cpu: Cpu) -> bool:
        v = self.state.loaded_vmcs
        await cpu.preempt_disable()
        await cpu.local_irq_disable()
        for field in (Field.GUEST_RIP, Field.GUEST_RSP):
            await vmcs_write(cpu, field, self.vmcs12.fields.get(field, 0))
        launched, want = bool(await cpu.load(v.launched)), await cpu.load(v.vmcs)
        outcome, _ = await cpu.vmentry(self.number, want, launched=launched, first=True)
        if outcome.ok and not launched:
            await cpu.store_recorded(v.launched, 1, "launched_store", vmcs=want)
        await cpu.local_irq_enable()
        await cpu.preempt_enable()
        return outcome.ok

    async def _nested_vmx_vmexit(self, cpu: Cpu, entered: bool) -> None:
        """nested_vmx_vmexit: sync_vmcs02_to_vmcs12, back to vmcs01; after a VMfail nothing has changed for L1's guest.
        """
        if entered:
            for field in SHADOWED_FIELDS:
                self.vmcs12.fields[field] = await vmcs_read(cpu, field)
        await self.vmx_switch_vmcs(cpu, LoadedVmcs(self.state.vmcs01))
        self.vmcs12.vmfail = 0 if entered else VMXERR_ENTRY_INVALID_CONTROL_FIELD
        self.vmcs12.launched |= entered
        self.need_vmcs12_to_shadow_sync = True
