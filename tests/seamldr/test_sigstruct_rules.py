"""The manifest: its layout, the order of the loader's rules, and what tampering with each byte shows."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pseamldr_bench import KEY, PUBLISHED_SHAPES, TRUSTED, manifest, other_key, published

from seamldr.manifest import ManifestContext, check_manifest, manifest_rules, verdicts
from seamldr.module_maker import resign
from seamldr.platform import LoaderProfile, Platform
from seamldr.sigstruct import (
    PRODUCTION_SIGNER,
    SIGSTRUCT_SIZE,
    SigStruct,
    load_key,
    pack_cpuid_table,
    signed_message,
    verify_signature,
)
from seamldr.status import Scenario, SeamldrStatus

OK, EBADSIG, EUNSUPCPU = SeamldrStatus.SUCCESS, SeamldrStatus.EBADSIG, SeamldrStatus.EUNSUPCPU
EUNSUPPORTED, ECLEANUPREQ = SeamldrStatus.EUNSUPPORTED, SeamldrStatus.ECLEANUPREQ
GOOD = manifest(published("1.5.08"))
IMAGE_SIZE = len(published("1.5.08").module)


def platform(profile: LoaderProfile = LoaderProfile.P15, *fms: int) -> Platform:
    fms = fms or (0xC06F2,)
    return Platform(profile=profile, fms=fms, num_lps=4 * len(fms), trusted_signers=(TRUSTED,))


def context(scenario: Scenario = Scenario.LOAD, svn: int = 0, dirty: bool = False, **extra: Any) -> ManifestContext:
    return ManifestContext(extra.get("platform", platform()), scenario, extra.get("size", IMAGE_SIZE), svn, dirty)


def first_rule(sigstruct: SigStruct, where: ManifestContext) -> tuple[int, SeamldrStatus]:
    """Number and status of the first rule that fails; 0 if none does."""
    return next(((rule.number, status) for rule, status in verdicts(sigstruct, where) if status), (0, OK))


FIELD_OFFSETS = {
    "header_type": 0, "module_type": 12, "exponent_size": 36, "modulus": 128, "exponent": 512, "signature": 516,
    "seamhash": 900, "svn_minor": 948, "svn_major": 949, "attributes": 950, "rip_offset": 958, "num_stack_pages": 962,
    "num_keyhole_pages": 964, "max_tdmrs": 968, "reserved1": 978, "module_hv": 984, "no_downgrade": 988,
    "num_handoff_pages": 990, "gdt_idt_offset": 992, "fault_wrapper_offset": 996, "reserved3": 1000,
    "cpuid_table_size": 1024, "cpuid_table": 1028,
}  # fmt: skip


@pytest.mark.parametrize(("field", "offset"), FIELD_OFFSETS.items())
def test_layout(field: str, offset: int) -> None:
    """A field lies at its documented offset: changing it changes no byte before, and the first byte there."""
    value = getattr(GOOD, field)
    changed = value ^ 1 if isinstance(value, int) else bytes((value[0] ^ 1,)) + value[1:]
    old, new = GOOD.encode(), msgspec.structs.replace(GOOD, **{field: changed}).encode()
    assert next(i for i in range(SIGSTRUCT_SIZE) if old[i] != new[i]) == offset


def test_round_trip() -> None:
    """Decoding and encoding any 2048 bytes gives them back; the signed message is 1276 bytes."""
    data = bytes(range(256)) * 8
    assert SigStruct.decode(data).encode() == data
    assert signed_message(data) == data[:128] + data[900:]
    assert len(signed_message(data)) == 1276
    with pytest.raises(ValueError, match="2048"):
        SigStruct.decode(data[:-1])


RULES: list[tuple[int, SeamldrStatus, dict[str, Any]]] = [
    (1, EBADSIG, {"reserved0": b"\1" + bytes(87)}),
    (1, EBADSIG, {"reserved1": bytes(5) + b"\1"}),
    (1, EBADSIG, {"reserved2": 0x80}),
    (1, EBADSIG, {"reserved3": bytes(23) + b"\1"}),
    (2, EBADSIG, {"header_type": 5}),
    (2, EBADSIG, {"header_length": 0xE0}),
    (2, EBADSIG, {"header_version": 0x2_0000}),
    (3, EBADSIG, {"key_size": 0x40}),
    (3, EBADSIG, {"modulus_size": 0x40}),
    (3, EBADSIG, {"exponent_size": 2}),
    (4, EBADSIG, {"module_vendor": 0x1022}),
    (4, EBADSIG, {"module_type": 0x8000_0001}),
    (4, EBADSIG, {"attributes": 1 << 63}),
    (5, EBADSIG, {"size": 0x1FF}),
    (6, EBADSIG, {"cpuid_table_size": 256}),
    (7, EBADSIG, {"exponent": 3}),
    (8, EBADSIG, {"min_update_hv": 2, "module_hv": 1}),
    (9, EBADSIG, {"gdt_idt_offset": 0x5A800}),
    (10, EBADSIG, {"gdt_idt_offset": 0}),
    (10, EBADSIG, {"fault_wrapper_offset": 0}),
    (12, EBADSIG, {"module_type": 0x8000_0000}),
    (13, EUNSUPPORTED, {"svn_major": 0}),
    (15, EBADSIG, {"gdt_idt_offset": IMAGE_SIZE}),
    (15, EBADSIG, {"gdt_idt_offset": 0xFFFF_F000}),
    (16, EBADSIG, {"fault_wrapper_offset": IMAGE_SIZE - 511}),
    (17, EUNSUPCPU, {"cpuid_table": pack_cpuid_table((0x806F8, 0xA06F0, 0xB06F0))}),
    (18, EBADSIG, {"cpuid_table_size": 0}),
    (0, OK, {"gdt_idt_offset": 0, "fault_wrapper_offset": 0}),
    (0, OK, {"gdt_idt_offset": IMAGE_SIZE - 4096}),
    (0, OK, {"fault_wrapper_offset": IMAGE_SIZE - 512}),
    (0, OK, {"cpuid_table_size": 255, "cpuid_table": pack_cpuid_table((0,) * 254 + (0xC06F0,))}),
    (0, OK, {"max_tdmrs": 0xFFFF, "rip_offset": 0xFFFF_FFFF, "date": 0, "no_downgrade": 0xFF}),
]


@pytest.mark.conformance("Module manifests")
@pytest.mark.parametrize(
    ("rule", "status", "fields"), RULES, ids=[f"row-rule{rule}" if rule else "fine" for rule, _, _ in RULES]
)
def test_rule(rule: int, status: SeamldrStatus, fields: dict[str, Any]) -> None:
    """A validly signed manifest with one defect breaks exactly the rule that is meant for it."""
    sigstruct = manifest(resign(published("1.5.08"), KEY, **fields))
    assert first_rule(sigstruct, context()) == (rule, status)
    assert check_manifest(sigstruct, context()) == status


@pytest.mark.conformance("Module manifests", "rule11")
def test_untrusted_signer() -> None:
    """Rule 11: a valid signature by another key does not help."""
    sigstruct = manifest(resign(published("1.5.08"), other_key()))
    assert verify_signature(sigstruct)
    assert first_rule(sigstruct, context()) == (11, EBADSIG)


def test_intel_is_always_trusted() -> None:
    """The production signer is trusted whatever else is."""
    assert Platform().trusts(PRODUCTION_SIGNER)
    assert platform().trusts(PRODUCTION_SIGNER)
    assert not Platform().trusts(TRUSTED)


@pytest.mark.conformance("Module manifests", "rule19")
@pytest.mark.parametrize("value", ["zero", "one", "n-1", "n", "all-ones", "twice"])
def test_signature_values(value: str) -> None:
    """Degenerate signatures, and the good one plus the modulus, do not verify."""
    n = int.from_bytes(GOOD.modulus, "little")
    good = int.from_bytes(GOOD.signature, "little")
    number = {"zero": 0, "one": 1, "n-1": n - 1, "n": n, "all-ones": (1 << 3072) - 1, "twice": good + n}[value]
    sigstruct = msgspec.structs.replace(GOOD, signature=number.to_bytes(384, "little"))
    assert first_rule(sigstruct, context()) == (19, EBADSIG)


@pytest.mark.parametrize("modulus", [0, 1, 2, 1 << 3071, (1 << 3072) - 1], ids=hex)
def test_modulus_values(modulus: int) -> None:
    """A modulus that is no RSA modulus never verifies, and never raises, even if its hash were trusted."""
    assert not verify_signature(msgspec.structs.replace(GOOD, modulus=modulus.to_bytes(384, "little")))


TAMPERING: dict[range, tuple[int, SeamldrStatus]] = {
    range(12): (2, EBADSIG), range(12, 20): (4, EBADSIG), range(20, 24): (19, EBADSIG), range(24, 28): (5, EBADSIG),
    range(28, 40): (3, EBADSIG), range(40, 128): (1, EBADSIG), range(128, 512): (11, EBADSIG),
    range(512, 516): (7, EBADSIG), range(516, 949): (19, EBADSIG), range(949, 950): (13, EUNSUPPORTED),
    range(950, 958): (4, EBADSIG), range(958, 978): (19, EBADSIG), range(978, 984): (1, EBADSIG),
    range(984, 986): (19, EBADSIG), range(986, 988): (8, EBADSIG), range(988, 989): (19, EBADSIG),
    range(989, 990): (1, EBADSIG), range(990, 992): (19, EBADSIG), range(992, 994): (9, EBADSIG),
    range(994, 995): (19, EBADSIG), range(995, 996): (15, EBADSIG), range(996, 999): (19, EBADSIG),
    range(999, 1000): (16, EBADSIG), range(1000, 1024): (1, EBADSIG), range(1024, 1025): (19, EBADSIG),
    range(1025, 1028): (6, EBADSIG), range(1028, 1033): (19, EBADSIG), range(1033, 1036): (17, EUNSUPCPU),
    range(1036, 2048): (19, EBADSIG),
}  # fmt: skip


@pytest.mark.conformance("Module manifests")
@pytest.mark.parametrize(("where", "verdict"), TAMPERING.items(), ids=[f"row-bytes{w[0]}_{w[-1]}" for w in TAMPERING])
def test_tampering(where: range, verdict: tuple[int, SeamldrStatus]) -> None:
    """Flipping bit 0 of any byte gives this verdict by this rule."""
    data = bytearray(published("1.5.08").sigstruct)
    for offset in where:
        data[offset] ^= 1
        assert first_rule(SigStruct.decode(data), context()) == verdict, offset
        data[offset] ^= 1


def test_tampering_covers_all() -> None:
    """The table of tampering has every byte once."""
    assert [offset for where in TAMPERING for offset in where] == list(range(SIGSTRUCT_SIZE))


SERIES_1_5 = [version for version in PUBLISHED_SHAPES if version.startswith("1")]
SERIES_2_0 = [version for version in PUBLISHED_SHAPES if version.startswith("2")]
P15, P20 = LoaderProfile.P15, LoaderProfile.P20
# CPUID.1.EAX, loader: verdicts on 1.5.01, 1.5.05 to 1.5.16, 2.0.02, 2.0.04 and later
PLATFORMS = [
    (0x806F8, P15, OK, OK, EBADSIG, EBADSIG),
    (0xC06F2, P15, OK, OK, EBADSIG, EBADSIG),
    (0xA06F3, P15, EUNSUPCPU, OK, EBADSIG, EBADSIG),
    (0xA06D1, P15, EUNSUPCPU, EUNSUPCPU, EBADSIG, EBADSIG),
    (0x806F8, P20, OK, OK, EUNSUPCPU, EUNSUPCPU),
    (0xC06F2, P20, OK, OK, EUNSUPCPU, EUNSUPCPU),
    (0xA06F3, P20, EUNSUPCPU, OK, EUNSUPCPU, EUNSUPCPU),
    (0xA06D1, P20, EUNSUPCPU, EUNSUPCPU, OK, OK),
    (0xA06E1, P20, EUNSUPCPU, EUNSUPCPU, EUNSUPCPU, OK),
]


@pytest.mark.conformance("Module manifests")
@pytest.mark.parametrize("row", PLATFORMS, ids=lambda row: f"row-{row[0]:X}_{row[1]}")
@pytest.mark.parametrize("version", PUBLISHED_SHAPES)
def test_load_by_platform(row: tuple[Any, ...], version: str) -> None:
    """A fresh LOAD of each published shape on each processor."""
    column = {"1.5.01": 2, "2.0.02": 4}.get(version, 3 if version in SERIES_1_5 else 5)
    image = published(version)
    where = context(platform=platform(row[1], row[0]), size=len(image.module))
    assert check_manifest(manifest(image), where) == row[column]


def expected_update(old: str, new: str, profile: LoaderProfile) -> SeamldrStatus:
    """By the published SVNs: same series, and not lower."""
    if profile is P15 and new in SERIES_2_0:
        return EBADSIG
    (old_major, old_minor), (new_major, new_minor) = PUBLISHED_SHAPES[old][0], PUBLISHED_SHAPES[new][0]
    if old_major != new_major:
        return EUNSUPPORTED
    return EBADSIG if new_minor < old_minor else OK


@pytest.mark.conformance("Module manifests", "rule14")
@pytest.mark.parametrize("profile", [P15, P20])
@pytest.mark.parametrize("new", PUBLISHED_SHAPES)
@pytest.mark.parametrize("old", PUBLISHED_SHAPES)
def test_update_between(old: str, new: str, profile: LoaderProfile) -> None:
    """An UPDATE from each published shape to each other, on a processor that the new one lists."""
    image = published(new)
    fms = 0xA06D1 if new in SERIES_2_0 else 0xC06F2
    where = context(
        Scenario.UPDATE, manifest(published(old)).seamsvn, platform=platform(profile, fms), size=len(image.module)
    )
    assert check_manifest(manifest(image), where) == expected_update(old, new, profile)


@pytest.mark.conformance("Module manifests", "rule14")
@pytest.mark.parametrize(
    ("svn", "dirty", "status"),
    [
        (0x0108, True, ECLEANUPREQ),
        (0x0108, False, OK),
        (0x0107, True, OK),
        (0x0206, True, ECLEANUPREQ),
        (0, True, ECLEANUPREQ),
    ],
)
def test_load_after_other(svn: int, dirty: bool, status: SeamldrStatus) -> None:
    """LOAD of SVN 1.7 over what ran before: only while something is dirty is it compared."""
    assert check_manifest(GOOD, context(Scenario.LOAD, svn, dirty)) == status


@pytest.mark.parametrize("sockets", [(0xC06F2, 0x806F4), (0xC06F2, 0xA06D1)], ids=["both", "one"])
def test_every_socket_must_be_covered(sockets: tuple[int, int]) -> None:
    """Rule 17 asks for an entry for each socket."""
    status = check_manifest(GOOD, context(platform=platform(P15, *sockets)))
    assert status == (OK if sockets[1] == 0x806F4 else EUNSUPCPU)


@pytest.mark.parametrize(("offset", "rule"), [(1000, 0), (1001, 0), (1006, 0), (1007, 1), (1023, 1)])
def test_p20_version_bytes(offset: int, rule: int) -> None:
    """A 2.0 loader takes bytes 1000 to 1006, which carry a version there."""
    reserved3 = bytearray(24)
    reserved3[offset - 1000] = 8
    sigstruct = manifest(resign(published("1.5.08"), KEY, reserved3=bytes(reserved3)))
    assert first_rule(sigstruct, context(platform=platform(P20)))[0] == rule


def test_rules_of_the_first_loader() -> None:
    """It knows neither handoff versions nor an interrupt table, and compares one SVN of 16 bits."""
    assert [rule.number for rule in manifest_rules(LoaderProfile.P10)] == [1, 2, 3, 4, 5, 6, 7, 11, 12, 14, 17, 19]
    old = msgspec.structs.replace(
        GOOD, num_handoff_pages=0, gdt_idt_offset=0, fault_wrapper_offset=0, min_update_hv=0, svn_major=0
    )
    update = context(Scenario.UPDATE, 0x0008, platform=platform(LoaderProfile.P10))
    assert first_rule(old, update) == (14, EBADSIG)
    assert first_rule(msgspec.structs.replace(old, svn_major=2), update) == (19, EBADSIG)


def test_key_files() -> None:
    """Only an unencrypted RSA-3072 key signs modules."""
    wrong = [
        ec.generate_private_key(ec.SECP256R1()),
        rsa.generate_private_key(65537, 2048),
    ]
    for key in wrong:
        with pytest.raises(ValueError, match="RSA-3072"):
            load_key(pem(key))
    with pytest.raises(ValueError, match="encrypted"):
        load_key(pem(KEY, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(ValueError):
        load_key(b"no key")
    assert load_key(pem(KEY)).private_numbers() == KEY.private_numbers()


def pem(key: Any, encryption: Any = None) -> bytes:
    data: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption or serialization.NoEncryption()
    )
    return data


def test_too_many_cpuids() -> None:
    """A table has room for 255 entries."""
    assert len(pack_cpuid_table((1,) * 255)) == 1020
    assert struct.unpack_from("<I", pack_cpuid_table((0xC06F2,))) == (0xC06F2,)
    with pytest.raises(ValueError, match="255"):
        pack_cpuid_table((1,) * 256)
