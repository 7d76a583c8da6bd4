"""VMCS field encodings (Intel SDM vol. 3D, appendix "Field Encoding in VMCS").

Bits of an encoding: 0 access type (1 = high half of a 64-bit field), 9:1 index, 11:10 type, 12 zero, 14:13 width.
`Field` holds the full-access encodings; the high half of a 64-bit field is `field | 1`.
"""

from __future__ import annotations

import enum

import msgspec


class Width(enum.IntEnum):
    """Bits 14:13 of an encoding."""

    WORD = 0
    QUADWORD = 1
    DOUBLEWORD = 2
    NATURAL = 3


class FieldType(enum.IntEnum):
    """Bits 11:10 of an encoding."""

    CONTROL = 0
    EXIT_INFORMATION = 1
    GUEST = 2
    HOST = 3


class Field(enum.IntEnum):
    """Full-access encodings of every architectural VMCS field."""

    # 16-bit control
    VIRTUAL_PROCESSOR_ID = 0x0000
    POSTED_INTR_NOTIFICATION_VECTOR = 0x0002
    EPTP_INDEX = 0x0004
    HLAT_PREFIX_SIZE = 0x0006
    LAST_PID_POINTER_INDEX = 0x0008
    VIRTUAL_TIMER_VECTOR = 0x000A
    # 16-bit guest state
    GUEST_ES_SELECTOR = 0x0800
    GUEST_CS_SELECTOR = 0x0802
    GUEST_SS_SELECTOR = 0x0804
    GUEST_DS_SELECTOR = 0x0806
    GUEST_FS_SELECTOR = 0x0808
    GUEST_GS_SELECTOR = 0x080A
    GUEST_LDTR_SELECTOR = 0x080C
    GUEST_TR_SELECTOR = 0x080E
    GUEST_INTERRUPT_STATUS = 0x0810
    PML_INDEX = 0x0812
    GUEST_UINV = 0x0814
    # 16-bit host state
    HOST_ES_SELECTOR = 0x0C00
    HOST_CS_SELECTOR = 0x0C02
    HOST_SS_SELECTOR = 0x0C04
    HOST_DS_SELECTOR = 0x0C06
    HOST_FS_SELECTOR = 0x0C08
    HOST_GS_SELECTOR = 0x0C0A
    HOST_TR_SELECTOR = 0x0C0C
    # 64-bit control
    IO_BITMAP_A_ADDR = 0x2000
    IO_BITMAP_B_ADDR = 0x2002
    MSR_BITMAP_ADDR = 0x2004
    VMEXIT_MSR_STORE_ADDR = 0x2006
    VMEXIT_MSR_LOAD_ADDR = 0x2008
    VMENTRY_MSR_LOAD_ADDR = 0x200A
    EXECUTIVE_VMCS_POINTER = 0x200C
    PML_ADDRESS = 0x200E
    TSC_OFFSET = 0x2010
    VIRTUAL_APIC_ADDR = 0x2012
    APIC_ACCESS_ADDR = 0x2014
    POSTED_INTR_DESC_ADDR = 0x2016
    VM_FUNCTION_CONTROLS = 0x2018
    EPT_POINTER = 0x201A
    EOI_EXIT_BITMAP_0 = 0x201C
    EOI_EXIT_BITMAP_1 = 0x201E
    EOI_EXIT_BITMAP_2 = 0x2020
    EOI_EXIT_BITMAP_3 = 0x2022
    EPTP_LIST_ADDR = 0x2024
    VMREAD_BITMAP_ADDR = 0x2026
    VMWRITE_BITMAP_ADDR = 0x2028
    VE_INFO_ADDR = 0x202A
    XSS_EXITING_BITMAP = 0x202C
    ENCLS_EXITING_BITMAP = 0x202E
    SPP_TABLE_POINTER = 0x2030
    TSC_MULTIPLIER = 0x2032
    TERTIARY_PROC_CONTROLS = 0x2034
    ENCLV_EXITING_BITMAP = 0x2036
    LOW_PASID_DIR_ADDR = 0x2038
    HIGH_PASID_DIR_ADDR = 0x203A
    SHARED_EPT_POINTER = 0x203C
    PCONFIG_EXITING_BITMAP = 0x203E
    HLAT_POINTER = 0x2040
    PID_POINTER_TABLE_ADDR = 0x2042
    SECONDARY_VMEXIT_CONTROLS = 0x2044
    IA32_SPEC_CTRL_MASK = 0x204A
    IA32_SPEC_CTRL_SHADOW = 0x204C
    GUEST_DEADLINE_SHADOW = 0x204E
    INJECTED_EVENT_DATA = 0x2052
    # 64-bit exit information
    GUEST_PHYSICAL_ADDRESS = 0x2400
    MSR_DATA = 0x2402
    ORIGINAL_EVENT_DATA = 0x2404
    # 64-bit guest state
    VMCS_LINK_POINTER = 0x2800
    GUEST_IA32_DEBUGCTL = 0x2802
    GUEST_IA32_PAT = 0x2804
    GUEST_IA32_EFER = 0x2806
    GUEST_IA32_PERF_GLOBAL_CTRL = 0x2808
    GUEST_PDPTE0 = 0x280A
    GUEST_PDPTE1 = 0x280C
    GUEST_PDPTE2 = 0x280E
    GUEST_PDPTE3 = 0x2810
    GUEST_IA32_BNDCFGS = 0x2812
    GUEST_IA32_RTIT_CTL = 0x2814
    GUEST_IA32_LBR_CTL = 0x2816
    GUEST_IA32_PKRS = 0x2818
    GUEST_FRED_CONFIG = 0x281A
    GUEST_FRED_RSP1 = 0x281C
    GUEST_FRED_RSP2 = 0x281E
    GUEST_FRED_RSP3 = 0x2820
    GUEST_FRED_STACK_LEVELS = 0x2822
    GUEST_FRED_SSP1 = 0x2824
    GUEST_FRED_SSP2 = 0x2826
    GUEST_FRED_SSP3 = 0x2828
    GUEST_IA32_SPEC_CTRL = 0x282E
    GUEST_DEADLINE = 0x2830
    # 64-bit host state
    HOST_IA32_PAT = 0x2C00
    HOST_IA32_EFER = 0x2C02
    HOST_IA32_PERF_GLOBAL_CTRL = 0x2C04
    HOST_IA32_PKRS = 0x2C06
    HOST_FRED_CONFIG = 0x2C08
    HOST_FRED_RSP1 = 0x2C0A
    HOST_FRED_RSP2 = 0x2C0C
    HOST_FRED_RSP3 = 0x2C0E
    HOST_FRED_STACK_LEVELS = 0x2C10
    HOST_FRED_SSP1 = 0x2C12
    HOST_FRED_SSP2 = 0x2C14
    HOST_FRED_SSP3 = 0x2C16
    HOST_IA32_SPEC_CTRL = 0x2C1A
    # 32-bit control
    PIN_BASED_CONTROLS = 0x4000
    PRIMARY_PROC_CONTROLS = 0x4002
    EXCEPTION_BITMAP = 0x4004
    PF_ERROR_CODE_MASK = 0x4006
    PF_ERROR_CODE_MATCH = 0x4008
    CR3_TARGET_COUNT = 0x400A
    PRIMARY_VMEXIT_CONTROLS = 0x400C
    VMEXIT_MSR_STORE_COUNT = 0x400E
    VMEXIT_MSR_LOAD_COUNT = 0x4010
    VMENTRY_CONTROLS = 0x4012
    VMENTRY_MSR_LOAD_COUNT = 0x4014
    VMENTRY_INTR_INFO = 0x4016
    VMENTRY_EXCEPTION_ERROR_CODE = 0x4018
    VMENTRY_INSTRUCTION_LENGTH = 0x401A
    TPR_THRESHOLD = 0x401C
    SECONDARY_PROC_CONTROLS = 0x401E
    PLE_GAP = 0x4020
    PLE_WINDOW = 0x4022
    INSTRUCTION_TIMEOUT = 0x4024
    TD_HKID = 0x4026
    # 32-bit exit information
    VM_INSTRUCTION_ERROR = 0x4400
    EXIT_REASON = 0x4402
    EXIT_INTR_INFO = 0x4404
    EXIT_INTR_ERROR_CODE = 0x4406
    IDT_VECTORING_INFO = 0x4408
    IDT_VECTORING_ERROR_CODE = 0x440A
    EXIT_INSTRUCTION_LENGTH = 0x440C
    EXIT_INSTRUCTION_INFO = 0x440E
    # 32-bit guest state
    GUEST_ES_LIMIT = 0x4800
    GUEST_CS_LIMIT = 0x4802
    GUEST_SS_LIMIT = 0x4804
    GUEST_DS_LIMIT = 0x4806
    GUEST_FS_LIMIT = 0x4808
    GUEST_GS_LIMIT = 0x480A
    GUEST_LDTR_LIMIT = 0x480C
    GUEST_TR_LIMIT = 0x480E
    GUEST_GDTR_LIMIT = 0x4810
    GUEST_IDTR_LIMIT = 0x4812
    GUEST_ES_ACCESS_RIGHTS = 0x4814
    GUEST_CS_ACCESS_RIGHTS = 0x4816
    GUEST_SS_ACCESS_RIGHTS = 0x4818
    GUEST_DS_ACCESS_RIGHTS = 0x481A
    GUEST_FS_ACCESS_RIGHTS = 0x481C
    GUEST_GS_ACCESS_RIGHTS = 0x481E
    GUEST_LDTR_ACCESS_RIGHTS = 0x4820
    GUEST_TR_ACCESS_RIGHTS = 0x4822
    GUEST_INTERRUPTIBILITY_STATE = 0x4824
    GUEST_ACTIVITY_STATE = 0x4826
    GUEST_SMBASE = 0x4828
    GUEST_IA32_SYSENTER_CS = 0x482A
    VMX_PREEMPTION_TIMER_VALUE = 0x482E
    # 32-bit host state
    HOST_IA32_SYSENTER_CS = 0x4C00
    # natural-width control
    CR0_GUEST_HOST_MASK = 0x6000
    CR4_GUEST_HOST_MASK = 0x6002
    CR0_READ_SHADOW = 0x6004
    CR4_READ_SHADOW = 0x6006
    CR3_TARGET_VALUE_0 = 0x6008
    CR3_TARGET_VALUE_1 = 0x600A
    CR3_TARGET_VALUE_2 = 0x600C
    CR3_TARGET_VALUE_3 = 0x600E
    # natural-width exit information
    EXIT_QUALIFICATION = 0x6400
    IO_RCX = 0x6402
    IO_RSI = 0x6404
    IO_RDI = 0x6406
    IO_RIP = 0x6408
    GUEST_LINEAR_ADDRESS = 0x640A
    # natural-width guest state
    GUEST_CR0 = 0x6800
    GUEST_CR3 = 0x6802
    GUEST_CR4 = 0x6804
    GUEST_ES_BASE = 0x6806
    GUEST_CS_BASE = 0x6808
    GUEST_SS_BASE = 0x680A
    GUEST_DS_BASE = 0x680C
    GUEST_FS_BASE = 0x680E
    GUEST_GS_BASE = 0x6810
    GUEST_LDTR_BASE = 0x6812
    GUEST_TR_BASE = 0x6814
    GUEST_GDTR_BASE = 0x6816
    GUEST_IDTR_BASE = 0x6818
    GUEST_DR7 = 0x681A
    GUEST_RSP = 0x681C
    GUEST_RIP = 0x681E
    GUEST_RFLAGS = 0x6820
    GUEST_PENDING_DEBUG_EXCEPTIONS = 0x6822
    GUEST_IA32_SYSENTER_ESP = 0x6824
    GUEST_IA32_SYSENTER_EIP = 0x6826
    GUEST_IA32_S_CET = 0x6828
    GUEST_SSP = 0x682A
    GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR = 0x682C
    # natural-width host state
    HOST_CR0 = 0x6C00
    HOST_CR3 = 0x6C02
    HOST_CR4 = 0x6C04
    HOST_FS_BASE = 0x6C06
    HOST_GS_BASE = 0x6C08
    HOST_TR_BASE = 0x6C0A
    HOST_GDTR_BASE = 0x6C0C
    HOST_IDTR_BASE = 0x6C0E
    HOST_IA32_SYSENTER_ESP = 0x6C10
    HOST_IA32_SYSENTER_EIP = 0x6C12
    HOST_RSP = 0x6C14
    HOST_RIP = 0x6C16
    HOST_IA32_S_CET = 0x6C18
    HOST_SSP = 0x6C1A
    HOST_IA32_INTERRUPT_SSP_TABLE_ADDR = 0x6C1C


# A field that is not named here exists on every processor with VMX.
_ONLY_IF = {
    "VPID": "VIRTUAL_PROCESSOR_ID",
    "posted interrupts": "POSTED_INTR_NOTIFICATION_VECTOR POSTED_INTR_DESC_ADDR",
    "EPT-violation #VE": "EPTP_INDEX VE_INFO_ADDR",
    "HLAT": "HLAT_PREFIX_SIZE HLAT_POINTER",
    "IPI virtualization": "LAST_PID_POINTER_INDEX PID_POINTER_TABLE_ADDR",
    "APIC-timer virtualization": "VIRTUAL_TIMER_VECTOR GUEST_DEADLINE_SHADOW GUEST_DEADLINE",
    "virtual-interrupt delivery": (
        "GUEST_INTERRUPT_STATUS EOI_EXIT_BITMAP_0 EOI_EXIT_BITMAP_1 EOI_EXIT_BITMAP_2 "
        "EOI_EXIT_BITMAP_3"
    ),
    "PML": "PML_INDEX PML_ADDRESS",
    "UINTR": "GUEST_UINV",
    "MSR bitmaps": "MSR_BITMAP_ADDR",
    "TPR shadow": "VIRTUAL_APIC_ADDR TPR_THRESHOLD",
    "virtualize APIC accesses": "APIC_ACCESS_ADDR",
    "VM functions": "VM_FUNCTION_CONTROLS",
    "EPT": "EPT_POINTER GUEST_PHYSICAL_ADDRESS GUEST_PDPTE0 GUEST_PDPTE1 GUEST_PDPTE2 GUEST_PDPTE3",
    "EPTP switching": "EPTP_LIST_ADDR",
    "VMCS shadowing": "VMREAD_BITMAP_ADDR VMWRITE_BITMAP_ADDR",
    "XSAVES": "XSS_EXITING_BITMAP",
    "ENCLS exiting": "ENCLS_EXITING_BITMAP",
    "sub-page permissions": "SPP_TABLE_POINTER",
    "TSC scaling": "TSC_MULTIPLIER",
    "tertiary controls": "TERTIARY_PROC_CONTROLS",
    "ENCLV exiting": "ENCLV_EXITING_BITMAP",
    "PASID translation": "LOW_PASID_DIR_ADDR HIGH_PASID_DIR_ADDR",
    "TDX (SEAM)": "SHARED_EPT_POINTER TD_HKID",
    "PCONFIG exiting": "PCONFIG_EXITING_BITMAP",
    "secondary exit controls": "SECONDARY_VMEXIT_CONTROLS",
    "IA32_SPEC_CTRL virtualization": (
        "IA32_SPEC_CTRL_MASK IA32_SPEC_CTRL_SHADOW GUEST_IA32_SPEC_CTRL HOST_IA32_SPEC_CTRL"
    ),
    "FRED": (
        "INJECTED_EVENT_DATA ORIGINAL_EVENT_DATA GUEST_FRED_CONFIG GUEST_FRED_RSP1 GUEST_FRED_RSP2 "
        "GUEST_FRED_RSP3 GUEST_FRED_STACK_LEVELS GUEST_FRED_SSP1 GUEST_FRED_SSP2 GUEST_FRED_SSP3 "
        "HOST_FRED_CONFIG HOST_FRED_RSP1 HOST_FRED_RSP2 HOST_FRED_RSP3 HOST_FRED_STACK_LEVELS "
        "HOST_FRED_SSP1 HOST_FRED_SSP2 HOST_FRED_SSP3"
    ),
    "MSR-list / MSR-immediate instructions": "MSR_DATA",
    "load/save PAT": "GUEST_IA32_PAT",
    "load/save EFER": "GUEST_IA32_EFER",
    "load PERF_GLOBAL_CTRL": "GUEST_IA32_PERF_GLOBAL_CTRL HOST_IA32_PERF_GLOBAL_CTRL",
    "MPX": "GUEST_IA32_BNDCFGS",
    "Intel PT in VMX": "GUEST_IA32_RTIT_CTL",
    "architectural LBR": "GUEST_IA32_LBR_CTL",
    "supervisor protection keys": "GUEST_IA32_PKRS HOST_IA32_PKRS",
    "load PAT": "HOST_IA32_PAT",
    "load EFER": "HOST_IA32_EFER",
    "secondary controls": "SECONDARY_PROC_CONTROLS",
    "PAUSE-loop exiting": "PLE_GAP PLE_WINDOW",
    "instruction timeout": "INSTRUCTION_TIMEOUT",
    "VMX-preemption timer": "VMX_PREEMPTION_TIMER_VALUE",
    "CET": (
        "GUEST_IA32_S_CET GUEST_SSP GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR HOST_IA32_S_CET HOST_SSP "
        "HOST_IA32_INTERRUPT_SSP_TABLE_ADDR"
    ),
}

_BITS = {Width.WORD: 16, Width.QUADWORD: 64, Width.DOUBLEWORD: 32, Width.NATURAL: 64}


class FieldInfo(msgspec.Struct, frozen=True):
    """What the architecture says of one field: `bits` is its size in bits on Intel 64, `feature` the CPU feature
    without which the encoding does not exist (empty: always there)."""

    width: Width
    bits: int
    type: FieldType
    read_only: bool
    feature: str


def width_of(encoding: int) -> Width:
    """Width class of an encoding.

    >>> width_of(Field.GUEST_RIP).name
    'NATURAL'
    """
    return Width(encoding >> 13 & 3)


def type_of(encoding: int) -> FieldType:
    """Type of the field that an encoding names."""
    return FieldType(encoding >> 10 & 3)


def index_of(encoding: int) -> int:
    """Bits 9:1, the number of the field among those of its width and type."""
    return encoding >> 1 & 0x1FF


def mask_of(encoding: int) -> int:
    """The bits that the field can hold, by its width class: 16, 32 or 64 ones."""
    return (1 << _BITS[width_of(encoding)]) - 1


def is_well_formed(encoding: int) -> bool:
    """Could name a field in full access: bits 0, 12 and 31:15 are zero."""
    return encoding >= 0 and encoding & ~0x6FFE == 0


def _table() -> dict[Field, FieldInfo]:
    features = {Field[name]: feature for feature, names in _ONLY_IF.items() for name in names.split()}
    return {
        field: FieldInfo(
            width=width_of(field),
            bits=_BITS[width_of(field)],
            type=type_of(field),
            read_only=type_of(field) is FieldType.EXIT_INFORMATION,
            feature=features.get(field, ""),
        )
        for field in Field
    }


FIELD_TABLE: dict[Field, FieldInfo] = _table()
