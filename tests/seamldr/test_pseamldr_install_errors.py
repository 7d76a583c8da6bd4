"""Conformance rows 53 to 111, and 124 and 125: what the last LP's INSTALL returns, and what is left afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
from pseamldr_bench import (
    KEY,
    MODULE_PA,
    PARAMS_PA,
    SIGSTRUCT_PA,
    Before,
    LoaderBench,
    RdrandUse,
    manifest,
    other_key,
    published,
    with_manifest_bytes,
    with_module,
)  # fmt: skip

from seamldr import elf
from seamldr.identity import ModuleIdentity
from seamldr.image import PAGE, ModuleImage, build_v2, check_framing
from seamldr.module_maker import make_elf, make_module, resign
from seamldr.platform import LoaderProfile
from seamldr.pseamldr import Return
from seamldr.range_layout import plan_range
from seamldr.status import Scenario, SeamldrStatus

EBADPARAM, EBADSIG, EBADHASH = SeamldrStatus.EBADPARAM, SeamldrStatus.EBADSIG, SeamldrStatus.EBADHASH
EUNSUPCPU, ECLEANUPREQ = SeamldrStatus.EUNSUPCPU, SeamldrStatus.ECLEANUPREQ
Attempt = Callable[[LoaderBench], Return]
RESTORED, DEAD, INSTALLED = "restored", "dead", "installed"


class Row(NamedTuple):
    """`attempt` runs one whole session and gives what the last LP saw; `setup` may change the baseline first."""

    status: int
    rdx: int
    outcome: str
    attempt: Attempt
    setup: Callable[[LoaderBench], None] = lambda bench: None
    first: bool = False
    platform: dict[str, Any] = {}  # noqa: RUF012


def update(image: ModuleImage | None = None, scenario: int = Scenario.UPDATE, **changes: Any) -> Attempt:
    """A session with 1.5.08 or `image`, with `changes` in SEAMLDR_PARAMS."""

    def attempt(bench: LoaderBench) -> Return:
        params = bench.place(image or published("1.5.08"), scenario)
        return bench.install_placed(msgspec.structs.replace(params, **changes))[-1]

    return attempt


def load(image: ModuleImage) -> Attempt:
    return update(image, Scenario.LOAD)


def at(rcx: int) -> Attempt:
    """1.5.08 with this RCX on every LP."""
    return lambda bench: bench.install_placed(bench.place(published("1.5.08")), rcx=rcx)[-1]


def pages_with(index: int, pa: int, version: str = "1.5.08") -> tuple[int, ...]:
    """The page list with one entry replaced."""
    pages = [MODULE_PA + PAGE * i for i in range(published(version).module_pages)]
    pages[index:] = [pa, *pages[index + 1 :]]
    return tuple(pages)


def signed(version: str = "1.5.08", **fields: Any) -> ModuleImage:
    """A good image with one manifest field changed and a valid signature over it."""
    return resign(published(version), KEY, **fields)


def with_reserved_byte(bench: LoaderBench) -> Return:
    """Each byte of SEAMLDR_PARAMS[16, 120) in turn."""
    results = []
    for offset in range(104):
        reserved = bytearray(104)
        reserved[offset] = 1
        results.append(update(reserved=bytes(reserved))(bench))
    assert len(set(map(str, results))) == 1
    return results[-1]


def flip(module: bytes, offset: int) -> bytes:
    return module[:offset] + bytes((module[offset] ^ 1,)) + module[offset + 1 :]


def broken(version: str, at_byte: int) -> ModuleImage:
    """The published module with one bit of the image flipped."""
    return with_module(published(version), flip(published(version).module, at_byte))


def truncated(pages: int) -> ModuleImage:
    image = published("1.5.08")
    return with_module(image, image.module[: pages * PAGE])


def swapped(bench: LoaderBench) -> Return:
    pages = list(pages_with(0, MODULE_PA))
    pages[7], pages[8] = pages[8], pages[7]
    return update(pages=tuple(pages))(bench)


def not_elf() -> ModuleImage:
    return make_module(key=KEY, image=b"\x90" * 0x4000, gdt_idt_offset=0x3000)


def wrong_relocation() -> ModuleImage:
    """Relocation type R_X86_64_64 in the first entry of an image that is otherwise in order."""
    image = make_elf(ModuleIdentity(), 6)
    rela = next(section for section in elf.section_headers(image) if section.type == elf.SHT_RELA)
    return make_module(key=KEY, image=image[: rela.offset + 8] + b"\1" + image[rela.offset + 9 :])


def handoff(**header: int) -> Callable[[LoaderBench], None]:
    return lambda bench: bench.write_handoff(**header)


def no_updates_left(bench: LoaderBench) -> None:
    bench.state.num_remaining_updates = 0


def no_updates_and_no_handoff(bench: LoaderBench) -> None:
    no_updates_left(bench)
    bench.write_handoff(valid=0)


def fail(use: Any, times: int) -> Callable[[LoaderBench], None]:
    return lambda bench: bench.entropy.failures.update({use: times})


MINIMUM_1_5 = 0x24_5000
"""Smallest module range that a 1.5 module asks for on four LPs."""


def range_of(size: int) -> dict[str, int]:
    return {"p_seamldr_base": 0x4000_0000 + size}


FORMAT_DEFECTS: dict[str, dict[str, Any]] = {
    "row-65": {"reserved0": b"\0" * 87 + b"\1"},
    "row-65-reserved1": {"reserved1": b"\1" + bytes(5)},
    "row-65-reserved2": {"reserved2": 1},
    "row-65-reserved3": {"reserved3": b"\1" + bytes(23)},
    "row-66-type": {"header_type": 5},
    "row-66-length": {"header_length": 0xE0},
    "row-66-version": {"header_version": 0x2_0000},
    "row-67": {"key_size": 0x40},
    "row-67-modulus": {"modulus_size": 0x40},
    "row-67-exponent": {"exponent_size": 2},
    "row-68": {"module_vendor": 0x1022},
    "row-69": {"attributes": 1},
    "row-69-type": {"module_type": 1},
    "row-69-size": {"size": 0x201},
    "row-70": {"exponent": 3},
    "row-71": {"cpuid_table_size": 256},
    "row-72": {"module_hv": 1, "min_update_hv": 2},
    "row-73": {"gdt_idt_offset": 0x5A800},
    "row-74": {"gdt_idt_offset": 0},
    "row-74-reverse": {"fault_wrapper_offset": 0},
    "row-76": {"module_type": 0x8000_0000},
    "row-87": {"cpuid_table_size": 0},
}

ROWS: dict[str, Row] = {
    "row-53-alignment": Row(EBADPARAM, 0, RESTORED, at(PARAMS_PA + 0x800)),
    "row-53-seamrr": Row(EBADPARAM, 0, RESTORED, at(0x4000_0000)),
    "row-53-keyid": Row(EBADPARAM, 0, RESTORED, at(32 << 40 | PARAMS_PA)),
    "row-53-width": Row(EBADPARAM, 0, RESTORED, at(1 << 46 | PARAMS_PA)),
    "row-53-shared-keyid": Row(0, 0, INSTALLED, at(31 << 40 | PARAMS_PA)),
    "row-54": Row(EBADPARAM, 0, RESTORED, update(version=1)),
    "row-55": Row(EBADPARAM, 0, RESTORED, with_reserved_byte),
    "row-56": Row(EBADPARAM, 0, RESTORED, update(scenario=2)),
    "row-57": Row(EBADPARAM, 0, RESTORED, update(num_module_pages=0)),
    "row-58": Row(EBADPARAM, 0, RESTORED, update(num_module_pages=497)),
    "row-59": Row(EBADPARAM, 0, RESTORED, update(pages=pages_with(5, MODULE_PA + 1))),
    "row-60": Row(EBADPARAM, 0, RESTORED, update(pages=pages_with(100, 0x4100_0000))),
    "row-61": Row(0, 0, INSTALLED, update(pages=pages_with(101, 0x4100_0001))),
    "row-62": Row(EBADPARAM, 0, RESTORED, update(sigstruct_pa=SIGSTRUCT_PA + 2048)),
    "row-63": Row(EBADPARAM, 0, RESTORED, update(), first=True),
    "row-64": Row(EBADPARAM, 0, RESTORED, update(signed(header_type=5), scenario=2)),
    **{name: Row(EBADSIG, 0, RESTORED, update(signed(**fields))) for name, fields in FORMAT_DEFECTS.items()},
    "row-75": Row(EBADSIG, 0, RESTORED, update(resign(published("1.5.08"), other_key()))),
    "row-76-unlocked": Row(
        0, 0, INSTALLED, update(signed(module_type=0x8000_0000)), platform={"sgx_debug_unlocked": True}
    ),
    "row-76-unlocked-no-table": Row(
        0, 0, INSTALLED, update(signed(module_type=0x8000_0000, cpuid_table_size=0)),
        platform={"sgx_debug_unlocked": True},
    ),
    "row-77": Row(SeamldrStatus.EUNSUPPORTED, 0, RESTORED, update(signed(svn_major=0))),
    "row-78": Row(
        SeamldrStatus.EUNSUPPORTED, 0, RESTORED, update(signed(svn_major=3)),
        platform={"profile": LoaderProfile.P20},
    ),
    "row-79": Row(EBADSIG, 0, RESTORED, update(published("1.5.05"))),
    "row-80": Row(0, 0, INSTALLED, update(published("1.5.06"))),
    "row-81": Row(ECLEANUPREQ, 0, RESTORED, load(published("1.5.05"))),
    "row-81-major": Row(ECLEANUPREQ, 0, RESTORED, load(signed(svn_major=2))),
    "row-82": Row(0, 0, INSTALLED, load(published("1.5.08"))),
    "row-83": Row(EBADSIG, 0, RESTORED, update(truncated(90))),
    "row-84": Row(EBADHASH, 1, DEAD, update(truncated(91))),
    "row-85": Row(EUNSUPCPU, 0, RESTORED, load(published("1.5.08")), first=True, platform={"fms": (0xA06D1,)}),
    "row-86": Row(
        EUNSUPCPU, 0, RESTORED, load(published("1.5.08")), first=True,
        platform={"fms": (0xC06F2, 0xA06D1)},
    ),
    "row-86-both": Row(0, 0, INSTALLED, load(published("1.5.08")), first=True, platform={"fms": (0xC06F2, 0xA06F3)}),
    "row-88": Row(0, 0, INSTALLED, load(published("1.5.08")), first=True, platform={"fms": (0xC06FF,)}),
    "row-89": Row(EBADSIG, 0, RESTORED, update(with_manifest_bytes(published("1.5.08"), {
        600: published("1.5.08").sigstruct[600] ^ 0x10,
    }))),
    "row-90": Row(EBADSIG, 0, RESTORED, load(published("2.0.08")), first=True, platform={"fms": (0xA06E1,)}),
    "row-90-p20": Row(
        0, 0, INSTALLED, load(published("2.0.08")), first=True,
        platform={"fms": (0xA06E1,), "profile": LoaderProfile.P20},
    ),
    "row-91": Row(EUNSUPCPU, 0, RESTORED, update(with_manifest_bytes(published("1.5.08"), {1033: 0x07}))),
    "row-92": Row(0, 0, INSTALLED, update(with_manifest_bytes(published("1.5.08"), {3000: 1}))),
    "row-93": Row(SeamldrStatus.ENOENTROPY, 0, RESTORED, update(), setup=fail(RdrandUse.ASLR, 1)),
    "row-94": Row(
        SeamldrStatus.ENOMEM, 0, RESTORED, load(published("1.5.08")), first=True, platform=range_of(MINIMUM_1_5 - PAGE)
    ),
    "row-95": Row(SeamldrStatus.ENOMEM, 1, DEAD, load(published("1.5.08")), first=True, platform=range_of(MINIMUM_1_5)),
    "row-95-enough": Row(
        0, 0, INSTALLED, load(published("1.5.08")), first=True, platform=range_of(MINIMUM_1_5 + 7 * PAGE)
    ),
    "row-96": Row(SeamldrStatus.EBADCALL, 0, RESTORED, update(), setup=no_updates_left),
    "row-97": Row(SeamldrStatus.EBADHANDOFF, 0, RESTORED, update(), setup=handoff(valid=0)),
    "row-98": Row(SeamldrStatus.EBADHANDOFF, 0, RESTORED, update(), setup=handoff(size=14 * PAGE - 7)),
    "row-99": Row(0, 0, INSTALLED, update(), setup=handoff(size=14 * PAGE - 8)),
    "row-99-empty": Row(0, 0, INSTALLED, update(), setup=handoff(size=0, valid=0x80)),
    "row-100": Row(SeamldrStatus.EBADHANDOFF, 0, RESTORED, update(), setup=handoff(hv=1)),
    "row-100-newer": Row(0, 0, INSTALLED, update(signed(module_hv=1)), setup=handoff(hv=1)),
    "row-101": Row(SeamldrStatus.EBADHANDOFF, 0, RESTORED, update(signed(module_hv=1, min_update_hv=1))),
    "row-102": Row(SeamldrStatus.EBADCALL, 0, RESTORED, update(), setup=no_updates_and_no_handoff),
    "row-103": Row(EBADHASH, 1, DEAD, update(broken("1.5.08", 70_000))),
    "row-104": Row(
        EBADHASH, 1, DEAD, update(with_module(published("1.5.08"), published("1.5.08").module + bytes(PAGE)))
    ),
    "row-105": Row(EBADHASH, 1, DEAD, swapped),
    "row-106": Row(EBADPARAM, 1, DEAD, update(not_elf())),
    "row-107": Row(EBADPARAM, 1, DEAD, update(wrong_relocation())),
    "row-103-first-byte": Row(EBADHASH, 1, DEAD, update(broken("1.5.08", 0))),
}  # fmt: skip


@pytest.mark.conformance("P-SEAMLDR calls")
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_install(make_bench: Callable[..., LoaderBench], row: Row) -> None:
    """The last LP sees exactly this status and RDX, and the platform is restored, dead or renewed."""
    bench = make_bench(**row.platform)
    if not row.first:
        bench.load_baseline()
    row.setup(bench)
    before = Before(bench)
    assert row.attempt(bench) == Return(row.status, row.rdx)
    if row.outcome == RESTORED:
        before.assert_restored()
    elif row.outcome == DEAD:
        before.assert_dead()
    else:
        before.assert_closed()
        assert bench.module_callable()
        assert bench.state.generation == before.generation + 1


@pytest.mark.conformance("P-SEAMLDR calls", 82)
def test_load_while_dirty_loses_handoff(bench: LoaderBench) -> None:
    """A LOAD over a running module wipes the handoff data and starts the history again."""
    image = published("1.5.08")
    before = Before(bench)
    assert bench.load(image) == Return(0, 0)
    before.assert_installed(image)
    assert bench.memory.read(0x4000_5000, 0x1008) == bytes(0x1008)
    assert (bench.state.num_remaining_updates, bench.state.seamdb_entries) == (5, 1)


@pytest.mark.conformance("P-SEAMLDR calls", 97)
def test_module_still_runs_without_handoff(bench: LoaderBench) -> None:
    """After EBADHANDOFF the running module goes on with all it had in the range."""
    bench.write_handoff(valid=0)
    bench.memory.write(0x4000_1000 + 2 * PAGE, b"transfer VMCS of LP 2")
    before = Before(bench)
    bench.install(published("1.5.08"))
    before.assert_restored()
    assert bench.memory.read(0x4000_3000, 21) == b"transfer VMCS of LP 2"


@pytest.mark.conformance("P-SEAMLDR calls", 108)
def test_seamdb_without_entropy(bench: LoaderBench) -> None:
    """Five failed inserts leave the new identity without SEAM_READY, and nothing counted."""
    bench.entropy.failures["seamdb"] = 5
    bench.state.key_dirty = [False] * 8
    image = published("1.5.08")
    before = Before(bench)
    assert bench.install(image) == Return(SeamldrStatus.ENOENTROPY, 1)
    before.assert_closed()
    register = bench.state.seamextend
    assert (register.mrseam, register.valid, register.seam_ready) == (manifest(image).seamhash, 0x1FF, 0)
    assert (bench.state.num_remaining_updates, bench.state.key_dirty[0]) == (5, False)
    assert bench.memory.read(0x4000_0000 + 2152, 8) == bytes(8)
    assert bench.loader.installed is None
    assert bench.state.generation == before.generation


@pytest.mark.conformance("P-SEAMLDR calls", 108)
def test_seamdb_entropy_late(bench: LoaderBench) -> None:
    """The fifth attempt still counts."""
    bench.entropy.failures["seamdb"] = 4
    assert bench.install(published("1.5.08")) == Return(0, 0)


@pytest.mark.conformance("P-SEAMLDR calls", 109)
def test_load_after_death(bench: LoaderBench) -> None:
    """After an unrecoverable failure LOAD wants a CLEANUP and UPDATE has nothing to update."""
    bench.install(broken("1.5.08", 5 * PAGE))
    assert bench.load(published("1.5.16")) == Return(ECLEANUPREQ, 0)
    assert bench.install(published("1.5.16")) == Return(EBADPARAM, 0)
    assert not bench.module_callable()


@pytest.mark.conformance("P-SEAMLDR calls", 110)
def test_load_after_cleanup(bench: LoaderBench) -> None:
    """CLEANUP on all LPs, then LOAD."""
    bench.install(broken("1.5.08", 5 * PAGE))
    assert bench.cleanup() == [Return(0)] * 4
    before = Before(bench)
    assert bench.load(published("1.5.01")) == Return(0, 0)
    before.assert_installed(published("1.5.01"))


@pytest.mark.conformance("P-SEAMLDR calls", 111)
def test_load_after_failed_first_load(make_bench: Callable[..., LoaderBench]) -> None:
    """On a fresh platform a failed first LOAD does not ask for a CLEANUP."""
    bench = make_bench()
    assert bench.load(broken("1.5.06", 5 * PAGE)) == Return(EBADHASH, 1)
    assert bench.load(published("1.5.06")) == Return(0, 0)


@pytest.mark.conformance("Image files")
@pytest.mark.parametrize(
    ("image", "status"),
    [
        pytest.param(ModuleImage(published("1.5.08").sigstruct, b""), EBADPARAM, id="row-124"),
        pytest.param(ModuleImage(b"", published("1.5.08").module), EBADSIG, id="row-125"),
    ],
)
def test_passes_the_kernel(bench: LoaderBench, image: ModuleImage, status: SeamldrStatus) -> None:
    """A file with no pages of one kind passes the kernel's checks and fails at the last INSTALL."""
    accepted = check_framing(build_v2(image))
    before = Before(bench)
    params = bench.place(accepted)
    if not accepted.sigstruct:
        params = msgspec.structs.replace(params, sigstruct_pa=0)
    assert bench.install_placed(params)[-1] == Return(status, 0)
    before.assert_restored()


def p10_module(**fields: Any) -> ModuleImage:
    """A module as the first loader knows it: none of the later fields, no interrupt table."""
    old = {"num_handoff_pages": 0, "gdt_idt_offset": 0, "fault_wrapper_offset": 0}
    return make_module(key=KEY, **({"cpuid_table": ()} | old | fields))


def p10_cases() -> Iterator[Any]:
    good = p10_module()
    yield pytest.param(good, Scenario.LOAD, Return(0, 0), id="empty-cpuid-table")
    yield pytest.param(good, Scenario.UPDATE, Return(0, 0), id="no-handoff-asked")
    yield pytest.param(resign(good, KEY, svn_minor=6), Scenario.UPDATE, Return(EBADSIG, 0), id="lower-svn")
    yield pytest.param(resign(good, KEY, svn_minor=0, svn_major=2), Scenario.UPDATE, Return(0, 0), id="svn-as-u16")
    yield pytest.param(resign(good, KEY, svn_minor=1), Scenario.LOAD, Return(0, 0), id="load-any-svn")
    yield pytest.param(published("1.5.08"), Scenario.LOAD, Return(EBADSIG, 0), id="newer-fields")
    yield pytest.param(p10_module(image=b"\x90" * PAGE), Scenario.UPDATE, Return(0, 0), id="no-elf-needed")


@pytest.mark.parametrize(("image", "scenario", "expected"), list(p10_cases()))
def test_p10(make_bench: Callable[..., LoaderBench], image: ModuleImage, scenario: int, expected: Return) -> None:
    """The first loader's own rules."""
    bench = make_bench(profile=LoaderProfile.P10)
    assert bench.load(p10_module()) == Return(0, 0)
    bench.memory.write(0x4000_5000, b"\1")
    assert bench.install(image, scenario) == expected
    kept = bench.memory.read(0x4000_5000, 1) == b"\1"
    assert kept == bool(expected.rax)


@pytest.mark.conformance("P-SEAMLDR calls", 57)
def test_p10_takes_no_pages(make_bench: Callable[..., LoaderBench]) -> None:
    """NUM_MODULE_PAGES 0 passes the first loader's parameter check and fails at the hash."""
    bench = make_bench(profile=LoaderProfile.P10)
    params = msgspec.structs.replace(bench.place(p10_module(), Scenario.LOAD), num_module_pages=0)
    assert bench.install_placed(params)[-1] == Return(EBADHASH, 1)


def test_minimum_is_the_published_one(bench: LoaderBench) -> None:
    """The range of rows 94 and 95 is the smallest that the layout asks for."""
    assert plan_range(bench.platform, manifest(published("1.5.08")), 101).minimum == MINIMUM_1_5
