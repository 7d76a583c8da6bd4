"""All that a strategy needs: `from seamldr.api import ...`.

A strategy is `async def seamldr_call(cpu, fn, args)`: make the SEAMCALL, leave this CPU's VMCS as KVM believes it is,
and return 0 or a negative errno. Every `await` is one machine operation, and the only place where an interrupt, an
NMI, a preemption or another CPU may come in.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, EIO, ENODEV

from cpu.cpu import Cpu, current_vmcs
from cpu.layout import LoadedVmcs, scratch_vmcs
from cpu.lists import ListWalk
from cpu.struct import NONE, container_of
from seamldr.call import is_seamldr_call, seamldr_lock
from seamldr.seamcall import TdxModuleArgs, seamcall_prerr
from seamldr.status import SeamldrLeaf

__all__ = [
    "EBUSY",
    "EINVAL",
    "EIO",
    "ENODEV",
    "NO_VMCS",
    "Cpu",
    "LoadedVmcs",
    "SeamldrLeaf",
    "TdxModuleArgs",
    "boot_cpu_has_bug",
    "current_vmcs",
    "for_each_loaded_vmcs",
    "is_seamldr_call",
    "loaded_vmcs_clear_current",
    "scratch_vmcs",
    "seamcall_prerr",
    "seamldr_lock",
    "vmclear",
    "vmclear_local_loaded_vmcss",
    "vmptrld",
    "vmptrst",
]

NO_VMCS = NONE
"""What VMPTRST stores when there is no current VMCS."""

VMX_BASIC = 0x480
VMX_BASIC_NO_SEAMRET_INVD_VMCS = 1 << 60


async def vmptrst(cpu: Cpu) -> int | None:
    """VMPTRST: the current-VMCS pointer, NO_VMCS if there is none; None if the instruction faulted."""
    outcome = await cpu.vmptrst()
    return outcome.value if outcome.ok else None


async def vmptrld(cpu: Cpu, vmcs: int, reason: str = "restore") -> int:
    """VMPTRLD: 0 or -EIO."""
    return 0 if (await cpu.vmptrld(vmcs, reason)).ok else -EIO


async def vmclear(cpu: Cpu, vmcs: int, reason: str = "strategy") -> int:
    """VMCLEAR: 0 or -EIO. KVM's tracking is not told."""
    return 0 if (await cpu.vmclear(vmcs, reason)).ok else -EIO


class for_each_loaded_vmcs:
    """`async for v in for_each_loaded_vmcs(cpu)`: every loaded_vmcs on this CPU's list; it may be unlinked."""

    def __init__(self, cpu: Cpu) -> None:
        self.walk = ListWalk(cpu, cpu.percpu.loaded_vmcss_on_cpu)

    def __aiter__(self) -> for_each_loaded_vmcs:
        return self

    async def __anext__(self) -> LoadedVmcs:
        return container_of(await self.walk.__anext__(), LoadedVmcs, "link")


async def vmclear_local_loaded_vmcss(cpu: Cpu) -> None:
    """KVM's own function: clear every VMCS of this CPU and reset its tracking. IRQs off."""
    await cpu.static_call("vmclear_local_loaded_vmcss")


async def loaded_vmcs_clear_current(cpu: Cpu) -> None:
    """KVM's `__loaded_vmcs_clear` on the VMCS that it believes is current here, if any. IRQs off."""
    await cpu.static_call("loaded_vmcs_clear_current")


def boot_cpu_has_bug(cpu: Cpu) -> bool:
    """X86_BUG_SEAMRET_INVD_VMCS: IA32_VMX_BASIC bit 60 is 0."""
    return not cpu.vmx.rdmsr(VMX_BASIC).value & VMX_BASIC_NO_SEAMRET_INVD_VMCS
