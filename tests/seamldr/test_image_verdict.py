"""The report and the table that a person gets about an image file."""

from __future__ import annotations

import pytest
from pseamldr_bench import KEY, TRUSTED, manifest, other_key, published, with_manifest_bytes, with_module

from seamldr.identity import make_identity
from seamldr.image import PAGE, ImageError, ModuleImage, build_v1, build_v2
from seamldr.module_maker import make_module, resign
from seamldr.platform import LoaderProfile, Platform
from seamldr.status import Scenario
from seamldr.verdict import describe_image, verify_image

GOOD = published("1.5.08")
PLATFORM = Platform(trusted_signers=(TRUSTED,))


def outcome(blob: bytes, platform: Platform = PLATFORM, **arguments: object) -> tuple[str, str] | None:
    """Rule and code of the first failure."""
    failure = verify_image(blob, platform, **arguments).first_failure  # type: ignore[arg-type]
    return failure and (failure.rule, failure.outcome)


def test_good_image() -> None:
    """A good image passes every rule, in the machine's order."""
    report = verify_image(build_v2(GOOD), PLATFORM)
    assert report.accepted
    rules = [finding.rule for finding in report.findings]
    assert rules[:6] == ["kernel 1", "kernel 3", "kernel 4", "kernel 5", "kernel 6", "kernel 7"]
    assert rules[9:28] == [f"manifest {number}" for number in range(1, 20)]
    assert rules[28:] == ["size", "mapping", "mapping", "hash", "elf"]


FAILURES = {
    "no-image": (b"hello", ("kernel 1", "-EINVAL")),
    "v1": (build_v1(GOOD), ("kernel 3", "-EINVAL")),
    "no-module": (build_v2(ModuleImage(GOOD.sigstruct, b"")), ("params", "EBADPARAM")),
    "no-sigstruct": (build_v2(ModuleImage(b"", GOOD.module)), ("params", "EBADSIG")),
    "header-type": (build_v2(with_manifest_bytes(GOOD, {0: 5})), ("manifest 2", "EBADSIG")),
    "signer": (build_v2(resign(GOOD, other_key())), ("manifest 11", "EBADSIG")),
    "svn": (build_v2(resign(GOOD, KEY, svn_major=0)), ("manifest 13", "EUNSUPPORTED")),
    "cpu": (build_v2(published("2.0.08")), ("manifest 1", "EBADSIG")),
    "signature": (build_v2(with_manifest_bytes(GOOD, {20: 0})), ("manifest 19", "EBADSIG")),
    "hash": (build_v2(with_module(GOOD, GOOD.module[:-1] + b"\0")), ("hash", "EBADHASH")),
    "elf": (build_v2(make_module(key=KEY, image=b"\x90" * PAGE, gdt_idt_offset=0)), ("elf", "EBADPARAM")),
}


@pytest.mark.parametrize(("blob", "failure"), FAILURES.values(), ids=FAILURES.keys())
def test_first_failure(blob: bytes, failure: tuple[str, str]) -> None:
    """The report names the rule at which the machine stops, and its code."""
    assert outcome(blob) == failure


def test_v1_is_judged_further() -> None:
    """A shipped file fails the kernel's checks only."""
    failed = {finding.rule for finding in verify_image(build_v1(GOOD), PLATFORM).findings if not finding.ok}
    assert failed == {"kernel 3", "kernel 4", "kernel 5", "kernel 6"}


def test_small_range() -> None:
    """A range below the minimum, and one in which page tables run out."""
    small = Platform(trusted_signers=(TRUSTED,), p_seamldr_base=0x4024_4000)
    assert outcome(build_v2(GOOD), small) == ("size", "ENOMEM")
    tight = Platform(trusted_signers=(TRUSTED,), p_seamldr_base=0x4024_5000)
    assert outcome(build_v2(GOOD), tight) == ("mapping", "ENOMEM")
    fatal = Platform(trusted_signers=(TRUSTED,), p_seamldr_base=0x4024_8000)
    assert outcome(build_v2(GOOD), fatal) == ("mapping", "UD2")


def update(blob: ModuleImage, running: ModuleImage | None) -> tuple[str, str] | None:
    return outcome(build_v2(blob), scenario=Scenario.UPDATE, running=running)


def test_update() -> None:
    """An UPDATE is judged against the module that runs."""
    assert update(GOOD, None) == ("params", "EBADPARAM")
    assert update(GOOD, published("1.5.06")) is None
    assert update(GOOD, published("1.5.16")) == ("manifest 14", "EBADSIG")
    newer = make_module(make_identity("1.5.17", "B"), key=KEY)
    assert update(newer, GOOD) is None
    assert update(GOOD, newer) == ("handoff", "EBADHANDOFF")


def test_p10_rules() -> None:
    """The first loader asks for no ELF image and refuses the later fields."""
    platform = Platform(profile=LoaderProfile.P10, trusted_signers=(TRUSTED,))
    assert outcome(build_v2(GOOD), platform) == ("manifest 1", "EBADSIG")
    fields = {"num_handoff_pages": 0, "gdt_idt_offset": 0, "fault_wrapper_offset": 0}
    assert outcome(build_v2(make_module(key=KEY, image=b"\x90" * PAGE, **fields)), platform) is None


def test_describe() -> None:
    """Rows of field, value, meaning: container, every manifest field, identity."""
    rows = {field: (value, meaning) for field, value, meaning in describe_image(build_v1(GOOD))}
    assert rows["container"] == ("0x0100", "the shipped form, not read by Linux")
    assert rows["checksum"][1] == "16-bit words add up to 0"
    assert rows["module pages"] == ("101", "413696 bytes")
    assert rows["MODULE_TYPE"] == ("0x0", "production-signed")
    assert rows["DATE"] == ("0x20240725", "2024-07-25")
    assert rows["SVN_MINOR"] == ("0x7", "SEAMSVN 1.7")
    assert rows["NUM_HANDOFF_PAGES"] == ("0xd", "14 pages")
    assert rows["CPUID_TABLE"][1] == "806F8 C06F0 A06F0"
    assert rows["MODULUS"][1] == f"signer {TRUSTED}, not Intel's"
    assert rows["SIGNATURE"][1] == "holds"
    assert rows["SEAMHASH"] == (manifest(GOOD).seamhash.hex(), "SHA-384 of the module")
    assert rows["RESERVED3"][0] == "24 zero bytes"
    assert rows["module version"] == ("1.5.08", "")
    assert rows["module profile"] == ("A", "handoff version 0")


def test_describe_defects() -> None:
    """A file with defects is still described, and its defects are told."""
    broken = with_module(with_manifest_bytes(GOOD, {15: 0x80, 3000: 1}), GOOD.module[:-1] + b"\0")
    blob = bytearray(build_v2(broken))
    blob[2] ^= 1
    rows = {field: (value, meaning) for field, value, meaning in describe_image(bytes(blob))}
    assert rows["container"][1] == "read by Linux"
    assert rows["checksum"][1].startswith("words add up to")
    assert rows["MODULE_TYPE"][1] == "debug-signed"
    assert rows["SIGNATURE"][1] == "does not hold"
    assert rows["SEAMHASH"][1] == "not the SHA-384 of the module"
    assert rows["rest of the page"][0] == "not zero"


def test_describe_nothing() -> None:
    """A file that is no image raises; one without a manifest has container rows only."""
    with pytest.raises(ImageError):
        describe_image(b"\0" * 5000)
    assert len(describe_image(build_v2(ModuleImage(b"", GOOD.module)))) == 4
