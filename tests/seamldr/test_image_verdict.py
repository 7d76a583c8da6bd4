"""The report and the table that a person gets about an image file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pseamldr_bench import KEY, TRUSTED, manifest, other_key, published, with_manifest_bytes, with_module

from seamldr.commands import ModuleCommandError, verify_module
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


P20 = Platform(profile=LoaderProfile.P20, fms=(0xA06D1,), trusted_signers=(TRUSTED,))
# New and running module, what P-SEAMLDR 2.0 says, on a processor that both list
SECOND_SERIES = [
    ("2.0.08", "2.0.05", None),
    ("2.0.05", "2.0.04", None),
    ("2.0.04", "2.0.05", None),
    ("2.0.08", "2.0.08", None),
    ("2.0.02", "2.0.04", ("manifest 14", "EBADSIG")),
    ("2.0.05", "2.0.08", ("manifest 14", "EBADSIG")),
    ("2.0.08", "1.5.16", ("manifest 14", "EUNSUPPORTED")),
]


@pytest.mark.parametrize(("new", "old", "failure"), SECOND_SERIES)
def test_update_within_the_second_series(new: str, old: str, failure: tuple[str, str] | None) -> None:
    """A 2.0 image replaces a running 2.0 module whose minor SVN is not higher, and no module of another major SVN."""
    blob = build_v2(published(new))
    assert outcome(blob, P20, scenario=Scenario.UPDATE, running=published(old)) == failure


def test_what_is_assumed() -> None:
    """A report says for which loader, processor and running module it holds."""
    assert verify_image(build_v2(GOOD), PLATFORM).assumed == (
        "P-SEAMLDR P15 on CPU C06F2H, a LOAD with no module before it"
    )
    report = verify_image(build_v2(published("2.0.08")), P20, Scenario.UPDATE, published("2.0.05"))
    assert report.assumed == (
        "P-SEAMLDR P20 on CPU A06D1H, an UPDATE of module 2.0.05 with SVN 3.4, shut down with handoff version 0"
    )
    assert verify_image(b"", PLATFORM, Scenario.UPDATE).assumed.endswith("an UPDATE with no module to replace")
    stranger = make_module(key=KEY, image=b"\x90" * PAGE, gdt_idt_offset=0)
    assert "of an unknown module with SVN 1.7" in verify_image(b"", PLATFORM, Scenario.UPDATE, stranger).assumed


def files(tmp_path: Path, **images: bytes) -> Iterator[Path]:
    """Image files, each with the test key's hash beside it."""
    for name, blob in images.items():
        path = tmp_path / name
        path.write_bytes(blob)
        (tmp_path / f"{name}.signer").write_text(TRUSTED + "\n")
        yield path


def test_the_command_judges_an_update(tmp_path: Path) -> None:
    """`module verify` loads a first module, or updates the one in another file, in either container, and says which."""
    blobs = {"new": build_v2(published("2.0.05")), "old": build_v1(published("2.0.08")), "bad": b"no image"}
    new, old, bad = files(tmp_path, **blobs)
    table, accepted = verify_module(new, 0xA06D1, "P20")
    assert accepted and str(table.title).endswith("new: would be installed")
    assert "a LOAD with no module before it" in str(table.caption)
    table, accepted = verify_module(new, 0xA06D1, "P20", old)
    assert not accepted and str(table.title).endswith("the SVN follows the module that runs or ran (EBADSIG)")
    assert "an UPDATE of module 2.0.08 with SVN 3.5" in str(table.caption)
    table, accepted = verify_module(old, 0xA06D1, "P20", new)
    assert not accepted and str(table.title).endswith("(-EINVAL); as version 2 it would be installed")
    with pytest.raises(ModuleCommandError, match=r"old cannot be running there: reserved fields are zero \(EBADSIG\)"):
        verify_module(new, 0xA06D1, "P15", old)
    with pytest.raises(ModuleCommandError, match="bad is not a TDX module image"):
        verify_module(new, 0xA06D1, "P20", bad)
    with pytest.raises(ModuleCommandError, match="cannot be read"):
        verify_module(new, 0xA06D1, "P20", tmp_path / "gone")


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
