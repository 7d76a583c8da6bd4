"""The VMCS of a new vCPU (init_vmcs, vmx_set_constant_host_state): a 64-bit host, a 64-bit guest, few exits."""

from __future__ import annotations

from cpu.struct import NONE
from cpu.vmx import Field, Msr, VmxConfig

PIN_EXTERNAL_INTERRUPT = 1 << 0
PIN_NMI = 1 << 3
PIN_VIRTUAL_NMIS = 1 << 5
PRIMARY_HLT = 1 << 7
PRIMARY_UNCONDITIONAL_IO = 1 << 24
EXIT_HOST_64 = 1 << 9
EXIT_ACK_INTERRUPT = 1 << 15
ENTRY_IA32E_GUEST = 1 << 9

CR0 = 0x8005_0033
CR4 = 0x2020
HOST_RIP = 0xFFFF_FFFF_8100_0000
HOST_CR3 = 0x1000
GUEST_CR3 = 0x2000
CODE64, DATA, LDT_UNUSABLE, TSS_BUSY = 0xA09B, 0xC093, 0x1_0000, 0x8B


def initial_fields(config: VmxConfig, cpu: int) -> dict[Field, int]:
    """Field to value, every field that VM entry checks; `cpu` is where the host state is for."""
    return _controls(config) | _host(cpu) | _guest()


def _controls(config: VmxConfig) -> dict[Field, int]:
    def adjust(msr: Msr, wanted: int) -> int:
        return config.control_limits(msr).adjust(wanted)

    pin = PIN_EXTERNAL_INTERRUPT | PIN_NMI | PIN_VIRTUAL_NMIS
    primary = PRIMARY_HLT | PRIMARY_UNCONDITIONAL_IO
    return {
        Field.PIN_BASED_CONTROLS: adjust(Msr.IA32_VMX_PINBASED_CTLS, pin),
        Field.PRIMARY_PROC_CONTROLS: adjust(Msr.IA32_VMX_PROCBASED_CTLS, primary),
        Field.PRIMARY_VMEXIT_CONTROLS: adjust(Msr.IA32_VMX_EXIT_CTLS, EXIT_HOST_64 | EXIT_ACK_INTERRUPT),
        Field.VMENTRY_CONTROLS: adjust(Msr.IA32_VMX_ENTRY_CTLS, ENTRY_IA32E_GUEST),
        Field.EXCEPTION_BITMAP: 0,
        Field.CR3_TARGET_COUNT: 0,
        Field.VMEXIT_MSR_STORE_COUNT: 0,
        Field.VMEXIT_MSR_LOAD_COUNT: 0,
        Field.VMENTRY_MSR_LOAD_COUNT: 0,
        Field.VMENTRY_INTR_INFO: 0,
    }


def _host(cpu: int) -> dict[Field, int]:
    return {
        Field.HOST_CR0: CR0,
        Field.HOST_CR3: HOST_CR3,
        Field.HOST_CR4: CR4,
        Field.HOST_CS_SELECTOR: 0x10,
        Field.HOST_SS_SELECTOR: 0x18,
        Field.HOST_DS_SELECTOR: 0,
        Field.HOST_ES_SELECTOR: 0,
        Field.HOST_FS_SELECTOR: 0,
        Field.HOST_GS_SELECTOR: 0,
        Field.HOST_TR_SELECTOR: 0x40,
        Field.HOST_FS_BASE: 0,
        Field.HOST_GS_BASE: 0xFFFF_8880_0000_0000 + cpu * 0x10_0000,
        Field.HOST_IDTR_BASE: 0xFFFF_FE00_0000_0000,
        Field.HOST_IA32_SYSENTER_CS: 0,
        Field.HOST_IA32_SYSENTER_EIP: HOST_RIP,
        Field.HOST_RIP: HOST_RIP,
    }


def _guest() -> dict[Field, int]:
    fields = {
        Field.GUEST_CR0: CR0,
        Field.GUEST_CR3: GUEST_CR3,
        Field.GUEST_CR4: CR4,
        Field.GUEST_DR7: 0x400,
        Field.GUEST_RFLAGS: 2,
        Field.GUEST_ACTIVITY_STATE: 0,
        Field.GUEST_INTERRUPTIBILITY_STATE: 0,
        Field.GUEST_PENDING_DEBUG_EXCEPTIONS: 0,
        Field.GUEST_IA32_DEBUGCTL: 0,
        Field.GUEST_IA32_SYSENTER_CS: 0,
        Field.GUEST_IA32_SYSENTER_ESP: 0,
        Field.GUEST_IA32_SYSENTER_EIP: 0,
        Field.VMCS_LINK_POINTER: NONE,
        Field.GUEST_GDTR_BASE: 0x5000,
        Field.GUEST_GDTR_LIMIT: 0x7F,
        Field.GUEST_IDTR_BASE: 0x6000,
        Field.GUEST_IDTR_LIMIT: 0xFFF,
    }
    for name, selector, rights, limit in (
        ("CS", 0x10, CODE64, 0xFFFF_FFFF),
        ("SS", 0x18, DATA, 0xFFFF_FFFF),
        ("DS", 0x18, DATA, 0xFFFF_FFFF),
        ("ES", 0x18, DATA, 0xFFFF_FFFF),
        ("FS", 0x18, DATA, 0xFFFF_FFFF),
        ("GS", 0x18, DATA, 0xFFFF_FFFF),
        ("LDTR", 0, LDT_UNUSABLE, 0),
        ("TR", 0x40, TSS_BUSY, 0x67),
    ):
        fields[Field[f"GUEST_{name}_SELECTOR"]] = selector
        fields[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = rights
        fields[Field[f"GUEST_{name}_LIMIT"]] = limit
        fields[Field[f"GUEST_{name}_BASE"]] = 0
    return fields
