"""Whether P-SEAMLDR accepts a manifest: format, signer, SVN, processor, signature, in its order.

Source: Intel P-SEAMLDR (tdx-loader 1.5.02), seamldr_install.c. The first rule that fails decides the status; the RSA
signature is looked at last, so a tampered manifest shows whichever earlier rule it breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from seamldr.platform import PAGE, LoaderProfile, Platform
from seamldr.sigstruct import MAX_CPUID_ENTRIES, RSA_EXPONENT, SigStruct, signer_hash, verify_signature
from seamldr.status import Scenario, SeamldrStatus

FAULT_WRAPPER_SIZE = 512
_VERSION_BYTES = 7
"""Of the last reserved field, which manifests of 2.0 modules use for a version."""


class ManifestContext(msgspec.Struct, frozen=True):
    """What a manifest is judged against. `current_svn` is the u16 of the module that runs or ran, major high."""

    platform: Platform
    scenario: Scenario
    image_size: int
    current_svn: int = 0
    dirty: bool = False


class ManifestRule(msgspec.Struct, frozen=True):
    """One rule: its number in the loader's order, what it demands, and the verdict on a manifest."""

    number: int
    title: str
    verdict: Callable[[SigStruct, ManifestContext], SeamldrStatus]


def check_manifest(sigstruct: SigStruct, context: ManifestContext) -> SeamldrStatus:
    """The status of the first rule that fails, or SUCCESS."""
    for rule in manifest_rules(context.platform.profile):
        status = rule.verdict(sigstruct, context)
        if status:
            return status
    return SeamldrStatus.SUCCESS


def manifest_rules(profile: LoaderProfile) -> tuple[ManifestRule, ...]:
    """The rules of a loader, in the order in which it applies them."""
    return _P10_RULES if profile is LoaderProfile.P10 else _P15_RULES


def _demand(
    holds: Callable[[SigStruct, ManifestContext], bool], status: SeamldrStatus = SeamldrStatus.EBADSIG
) -> Callable[[SigStruct, ManifestContext], SeamldrStatus]:
    return lambda sigstruct, context: SeamldrStatus.SUCCESS if holds(sigstruct, context) else status


def _reserved_zero(s: SigStruct, context: ManifestContext) -> bool:
    reserved3 = s.reserved3[_VERSION_BYTES:] if context.platform.profile is LoaderProfile.P20 else s.reserved3
    return not (any(s.reserved0) or any(s.reserved1) or s.reserved2 or any(reserved3))


def _reserved_zero_p10(s: SigStruct, context: ManifestContext) -> bool:
    """The first loader knows none of the fields behind PAMT_ENTRY_SIZE_1G."""
    return not any(s.reserved0) and not any(s.encode()[978:1024])


def _svn(s: SigStruct, context: ManifestContext) -> SeamldrStatus:
    major, minor = divmod(context.current_svn, 256)
    if context.scenario is Scenario.UPDATE:
        if s.svn_major != major:
            return SeamldrStatus.EUNSUPPORTED
        return SeamldrStatus.EBADSIG if s.svn_minor < minor else SeamldrStatus.SUCCESS
    if context.dirty and (s.svn_major != major or s.svn_minor < minor):
        return SeamldrStatus.ECLEANUPREQ
    return SeamldrStatus.SUCCESS


def _covers_all_sockets(s: SigStruct, context: ManifestContext) -> bool:
    """Steppings do not matter; an empty table covers everything here."""
    if s.cpuid_table_size == 0:
        return True
    known = {entry >> 4 for entry in s.cpuid_entries}
    return all(fms >> 4 in known for fms in context.platform.fms)


_FORMAT = (
    ManifestRule(
        2,
        "HEADER_TYPE 6, HEADER_LENGTH E1H, HEADER_VERSION 10000H",
        _demand(lambda s, c: (s.header_type, s.header_length, s.header_version) == (6, 0xE1, 0x1_0000)),
    ),
    ManifestRule(
        3,
        "KEY_SIZE 60H, EXPONENT_SIZE 1, MODULUS_SIZE 60H",
        _demand(lambda s, c: (s.key_size, s.exponent_size, s.modulus_size) == (0x60, 1, 0x60)),
    ),
    ManifestRule(
        4,
        "MODULE_VENDOR 8086H, MODULE_TYPE[30:0] 0, ATTRIBUTES 0",
        _demand(lambda s, c: s.module_vendor == 0x8086 and not s.module_type & 0x7FFF_FFFF and not s.attributes),
    ),
    ManifestRule(5, "SIZE 200H", _demand(lambda s, c: s.size == 0x200)),
    ManifestRule(6, "CPUID_TABLE_SIZE at most 255", _demand(lambda s, c: s.cpuid_table_size <= MAX_CPUID_ENTRIES)),
    ManifestRule(7, "EXPONENT 10001H", _demand(lambda s, c: s.exponent == RSA_EXPONENT)),
)
_SIGNER = (
    ManifestRule(
        11, "SHA-384 of the modulus is a trusted signer", _demand(lambda s, c: c.platform.trusts(signer_hash(s)))
    ),
    ManifestRule(
        12,
        "debug-signed only on a platform unlocked for debug",
        _demand(lambda s, c: not s.debug_signed or c.platform.sgx_debug_unlocked),
    ),
)
_CPU = ManifestRule(
    17, "the CPUID table covers every socket", _demand(_covers_all_sockets, SeamldrStatus.EUNSUPCPU)
)
_RSA = ManifestRule(19, "the RSA-3072 signature holds", _demand(lambda s, c: verify_signature(s)))

_P15_RULES = (
    ManifestRule(1, "reserved fields are zero", _demand(_reserved_zero)),
    *_FORMAT,
    ManifestRule(8, "MIN_UPDATE_HV at most MODULE_HV", _demand(lambda s, c: s.min_update_hv <= s.module_hv)),
    ManifestRule(9, "GDT_IDT_OFFSET is a multiple of 4096", _demand(lambda s, c: s.gdt_idt_offset % PAGE == 0)),
    ManifestRule(
        10,
        "GDT_IDT_OFFSET and FAULT_WRAPPER_OFFSET are both zero or both not",
        _demand(lambda s, c: bool(s.gdt_idt_offset) == bool(s.fault_wrapper_offset)),
    ),
    *_SIGNER,
    ManifestRule(
        13, "the major SVN is not 0", _demand(lambda s, c: s.svn_major != 0, SeamldrStatus.EUNSUPPORTED)
    ),
    ManifestRule(14, "the SVN follows the module that runs or ran", _svn),
    ManifestRule(
        15,
        "GDT_IDT_OFFSET leaves a page of the image",
        _demand(lambda s, c: s.gdt_idt_offset == 0 or s.gdt_idt_offset <= c.image_size - PAGE),
    ),
    ManifestRule(
        16,
        "FAULT_WRAPPER_OFFSET leaves 512 bytes of the image",
        _demand(
            lambda s, c: s.fault_wrapper_offset == 0 or s.fault_wrapper_offset <= c.image_size - FAULT_WRAPPER_SIZE
        ),
    ),
    _CPU,
    ManifestRule(
        18,
        "a production module names its processors",
        _demand(lambda s, c: s.debug_signed or s.cpuid_table_size > 0),
    ),
    _RSA,
)

_P10_RULES = (
    ManifestRule(1, "reserved fields are zero, 46 bytes from 978 among them", _demand(_reserved_zero_p10)),
    *_FORMAT,
    *_SIGNER,
    ManifestRule(
        14,
        "an UPDATE does not lower the 16-bit SVN",
        _demand(lambda s, c: c.scenario is not Scenario.UPDATE or s.seamsvn >= c.current_svn),
    ),
    _CPU,
    _RSA,
)


def verdicts(sigstruct: SigStruct, context: ManifestContext) -> Iterator[tuple[ManifestRule, SeamldrStatus]]:
    """Every rule with its own verdict, also behind the first that fails."""
    for rule in manifest_rules(context.platform.profile):
        yield rule, rule.verdict(sigstruct, context)
