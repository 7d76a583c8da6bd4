"""Rules of the TDX module as tables: versions of leaves, bring-up, handoff versions, values of status codes."""

from __future__ import annotations

import functools
import itertools

import msgspec
import pytest
from tdx_bench import HANDOFF, HV0, HV1, HV1_NEXT, SCRATCH, TDMR, Host

from seamldr.identity import ModuleIdentity
from seamldr.tdx_boot import init_lps, must
from seamldr.tdx_call import Hooks
from seamldr.tdx_call import Registers as ModuleRegisters
from seamldr.tdx_handoff import HandoffHeader, write_header
from seamldr.tdx_leaves import TdhLeaf as L
from seamldr.tdx_module import TdxModule
from seamldr.tdx_platform import ModulePlatform
from seamldr.tdx_state import SysState
from seamldr.tdx_status import TdxStatus

Registers = dict[str, int]


# Versions


VERSIONED = {HV0: {3, 11, 23, 26, 30}, HV1: {3, 11, 23, 26, 30, 22, 33, 45, 53}}


@pytest.mark.parametrize("identity", VERSIONED, ids=["A", "B"])
def test_which_leaves_have_a_version_1(identity: ModuleIdentity) -> None:
    """Any other leaf refuses it whatever the rest; none of those that have one knows a version 2."""
    for leaf in range(70):
        status = Host(identity).call(0, leaf | 1 << 16, rcx=0x123)
        assert (status == TdxStatus.TDX_OPERAND_INVALID) == (leaf not in VERSIONED[identity]), leaf
    for leaf in VERSIONED[identity] - {45, 53}:
        assert Host(identity).call(0, leaf | 2 << 16) == TdxStatus.TDX_OPERAND_INVALID, leaf


# Bring-up


def configured_by(host: Host, version: int = 0, **registers: int) -> int:
    """SYS.CONFIG of a module in SYSINIT_DONE with one good TDMR."""
    init_lps(host.tdx)
    TDMR.write(host.memory, 0x2000)
    host.memory.write64(SCRATCH, 0x2000)
    return host.call(0, L.TDH_SYS_CONFIG, version, **{"rcx": SCRATCH, "rdx": 1, "r8": 32, **registers})


@pytest.mark.parametrize(
    ("identity", "version", "registers", "status"),
    [
        (HV1, 1, {"r9": 1 << 47}, 0),
        (HV1, 1, {"r9": 1 << 3 | 1 << 46}, 0xC000_0100_0000_0009),
        (HV1, 1, {"r10": 1}, 0xC000_0100_0000_000A),
        (HV1, 0, {"r9": 1 << 46, "r10": 1}, 0),
        (HV1, 0, {"r8": 32 | 1 << 16}, 0),
        (HV1, 0, {"r8": 32 | 1 << 17}, 0xC000_0100_0000_0008),
        (HV0, 0, {"r8": 32 | 1 << 16}, 0xC000_0100_0000_0008),
        (HV0, 1, {}, 0xC000_0100_0000_0000),
    ],
)
def test_flags_of_sys_config(identity: ModuleIdentity, version: int, registers: Registers, status: int) -> None:
    """Version 1 takes enabling flags that are features of the module; bit 16 of R8 is dynamic PAMT, in profile B."""
    host = Host(identity, up=False)
    assert configured_by(host, version, **registers) == status
    assert host.state == (SysState.SYSINIT_DONE if status else SysState.SYSCONFIG_DONE)
    if status == 0:
        assert host.tdx.state.system.update_compatibility == bool(version and registers.get("r9"))


@pytest.mark.parametrize("rcx", [0x1000, 1 << 30, 1 << 46, 33 << 40])
def test_tdmr_init_takes_the_base_of_a_tdmr(rcx: int) -> None:
    """Anything else is OPERAND_INVALID in RCX; a TDMR that another LP initialises is busy."""
    host = Host(HV1, up=False)
    assert configured_by(host) == 0
    must(host.tdx, 0, L.TDH_SYS_KEY_CONFIG)
    assert host.call(0, L.TDH_SYS_TDMR_INIT, rcx=rcx) == 0xC000_0100_0000_0001
    host.tdx.state.system.tdmrs[0].mutex.try_exclusive(2)
    assert host.call(0, L.TDH_SYS_TDMR_INIT, rcx=0) == 0x8000_0200_0000_0001
    host.tdx.state.system.tdmrs[0].mutex.release(2)
    assert host.call(0, L.TDH_SYS_TDMR_INIT, rcx=0) == 0


def module_on(**platform: object) -> TdxModule:
    """A fresh module on another platform."""
    host = Host(HV1, up=False)
    changed: ModulePlatform = msgspec.structs.replace(host.platform, **platform)
    return TdxModule(HV1, changed, host.memory, hooks=Hooks())


@pytest.mark.parametrize("cmrs", [((0x1000, 0x1000), (0, 0x1000)), ((0, 0x2000), (0x1000, 0x1000)), ((0, 0x800),)])
def test_sys_init_wants_memory_ranges_that_make_sense(cmrs: tuple[tuple[int, int], ...]) -> None:
    """CMRs out of order, overlapping or not made of pages are TDX_CMR_LIST_INVALID."""
    assert module_on(cmrs=cmrs).seamcall(0, L.TDH_SYS_INIT, ModuleRegisters()).rax == 0xC000_0A22_0000_0000


def test_lp_init_knows_eight_packages() -> None:
    """An LP of a ninth is refused under its number."""
    module = module_on(pkg_of_lp={0: 0, 1: 8})
    assert module.seamcall(0, L.TDH_SYS_INIT, ModuleRegisters()).rax == 0
    assert module.seamcall(1, L.TDH_SYS_LP_INIT, ModuleRegisters()).rax == 0xC000_0906_0000_0008


# Handoff versions


@functools.cache
def identities() -> list[ModuleIdentity]:
    """Modules with every combination of handoff versions up to 2."""
    return [
        msgspec.structs.replace(HV1, module_hv=native, min_update_hv=least, no_downgrade=strict)
        for native, least, strict in itertools.product(range(3), range(3), (False, True))
        if least <= native
    ]


def test_which_handoff_version_a_module_produces() -> None:
    """From the oldest that it knows to its own, or only its own if it does not downgrade; else RCX is at fault."""
    for identity, wanted in itertools.product(identities(), range(4)):
        least = identity.module_hv if identity.no_downgrade else identity.min_update_hv
        expected = 0 if least <= wanted <= identity.module_hv else 0xC000_0100_0000_0001
        assert Host(identity).shutdown(wanted) == expected, (identity.module_hv, identity.min_update_hv, wanted)


def test_which_handoff_version_a_module_takes() -> None:
    """From the oldest that it knows to its own; else TDX_SYS_INVALID_HANDOFF, and the handoff stays for another."""
    for identity, offered in itertools.product(identities(), range(4)):
        host = Host()
        assert host.shutdown() == 0
        host.install(identity)
        init_lps(host.tdx)
        write_header(host.memory, HANDOFF, HandoffHeader(1, offered, 57336 if offered else 53386))
        good = identity.min_update_hv <= offered <= identity.module_hv
        assert host.call(0, L.TDH_SYS_UPDATE) == (0 if good else 0xC000_0509_0000_0000)
        assert host.memory.read(HANDOFF, 1) == (b"\0" if good else b"\1")


# Status codes


STATUSES = """
TDX_SUCCESS 0x0000000000000000
TDX_NON_RECOVERABLE_VCPU 0x4000000100000000
TDX_NON_RECOVERABLE_TD 0x6000000200000000
TDX_INTERRUPTED_RESUMABLE 0x8000000300000000
TDX_INTERRUPTED_RESTARTABLE 0x8000000400000000
TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE 0x6000000500000000
TDX_INVALID_RESUMPTION 0xC000000600000000
TDX_OPERAND_INVALID 0xC000010000000000
TDX_OPERAND_ADDR_RANGE_ERROR 0xC000010100000000
TDX_OPERAND_BUSY 0x8000020000000000
TDX_PREVIOUS_TLB_EPOCH_BUSY 0x8000020100000000
TDX_SYS_BUSY 0x8000020200000000
TDX_RND_NO_ENTROPY 0x8000020300000000
TDX_OPERAND_BUSY_HOST_PRIORITY 0x8000020400000000
TDX_HOST_PRIORITY_BUSY_TIMEOUT 0x9000020500000000
TDX_INTERRUPTED_BUSY 0x8000020600000000
TDX_PAGE_METADATA_INCORRECT 0xC000030000000000
TDX_PAGE_ALREADY_FREE 0x0000030100000000
TDX_PAGE_NOT_OWNED_BY_TD 0xC000030200000000
TDX_PAGE_NOT_FREE 0xC000030300000000
TDX_TD_ASSOCIATED_PAGES_EXIST 0xC000040000000000
TDX_SYS_INIT_NOT_PENDING 0xC000050000000000
TDX_SYS_LP_INIT_NOT_DONE 0xC000050200000000
TDX_SYS_LP_INIT_DONE 0xC000050300000000
TDX_SYS_NOT_READY 0xC000050500000000
TDX_SYS_SHUTDOWN 0xC000050600000000
TDX_SYS_KEY_CONFIG_NOT_PENDING 0xC000050700000000
TDX_SYS_STATE_INCORRECT 0xC000050800000000
TDX_SYS_INVALID_HANDOFF 0xC000050900000000
TDX_SYS_INCOMPATIBLE_SIGSTRUCT 0xC000050A00000000
TDX_SYS_LP_INIT_NOT_PENDING 0xC000050B00000000
TDX_SYS_CONFIG_NOT_PENDING 0xC000050C00000000
TDX_INCOMPATIBLE_SEAM_CAPABILITIES 0xC000050D00000000
TDX_CRYPTO_SELF_TEST_FAILED 0xC000051100000000
TDX_UPDATE_COMPATIBILITY_SENSITIVE 0x8000051200000000
TDX_TD_FATAL 0xE000060400000000
TDX_TD_NON_DEBUG 0xC000060500000000
TDX_TDCS_NOT_ALLOCATED 0xC000060600000000
TDX_LIFECYCLE_STATE_INCORRECT 0xC000060700000000
TDX_OP_STATE_INCORRECT 0xC000060800000000
TDX_NO_VCPUS 0xC000060900000000
TDX_TDCX_NUM_INCORRECT 0xC000061000000000
TDX_X2APIC_ID_NOT_UNIQUE 0xC000062100000000
TDX_INCOMPATIBLE_MRTD_CONTEXT 0xC000062200000000
TDX_VCPU_STATE_INCORRECT 0xC000070000000000
TDX_VCPU_ASSOCIATED 0x8000070100000000
TDX_VCPU_NOT_ASSOCIATED 0x8000070200000000
TDX_MAX_VCPUS_EXCEEDED 0xC000070500000000
TDX_TSC_ROLLBACK 0xC000070600000000
TDX_KEY_GENERATION_FAILED 0x8000080000000000
TDX_TD_KEYS_NOT_CONFIGURED 0x8000081000000000
TDX_KEY_STATE_INCORRECT 0xC000081100000000
TDX_KEY_CONFIGURED 0x0000081500000000
TDX_WBCACHE_NOT_COMPLETE 0x8000081700000000
TDX_HKID_NOT_FREE 0xC000082000000000
TDX_NO_HKID_READY_TO_WBCACHE 0x0000082100000000
TDX_WBCACHE_RESUME_ERROR 0xC000082300000000
TDX_FLUSHVP_NOT_DONE 0x8000082400000000
TDX_INCORRECT_CPUID_VALUE 0xC000090000000000
TDX_INCONSISTENT_CPUID_FIELD 0xC000090200000000
TDX_INVALID_PKG_ID 0xC000090600000000
TDX_INCONSISTENT_MSR 0xC000092000000000
TDX_INCORRECT_MSR_VALUE 0xC000092100000000
TDX_INVALID_TDMR 0xC0000A0000000000
TDX_TDMR_ALREADY_INITIALIZED 0x00000A0300000000
TDX_INVALID_PAMT 0xC0000A1000000000
TDX_CMR_LIST_INVALID 0xC0000A2200000000
TDX_EPT_WALK_FAILED 0xC0000B0000000000
TDX_GPA_RANGE_NOT_BLOCKED 0xC0000B0600000000
TDX_TLB_TRACKING_NOT_DONE 0xC0000B0800000000
TDX_EPT_ENTRY_STATE_INCORRECT 0xC0000B0D00000000
TDX_METADATA_FIELD_ID_INCORRECT 0xC0000C0000000000
TDX_METADATA_FIELD_NOT_WRITABLE 0xC0000C0100000000
TDX_METADATA_FIELD_NOT_READABLE 0xC0000C0200000000
TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT 0x00000C0B00000000
TDX_INCOMPATIBLE_MBMD_MAC_CONTEXT 0xC0000E2200000000
TDX_CONNECT_INVALID_STATE 0xC0000F4600000000
"""


def test_the_values_of_all_status_codes() -> None:
    """Name and value as the module's header has them."""
    for line in STATUSES.split("\n"):
        if line:
            name, value = line.split()
            assert TdxStatus[name] == int(value, 16)


def test_the_next_module_may_be_the_same_build() -> None:
    """An update to the very version that runs is one like any other."""
    host = Host()
    td = host.td(associate=(1,))
    host.update(HV1)
    host.update(HV1_NEXT)
    assert host.run(1, td.vcpus[0]).out["r12"] == 1
