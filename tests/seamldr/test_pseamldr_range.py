"""What P-SEAMLDR does with the module range: sizes, thresholds, and the content of an installed module."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import msgspec
import pytest
from pseamldr_bench import LoaderBench, RdrandUse, manifest, published

from seamldr import elf
from seamldr.identity import make_identity
from seamldr.platform import Platform
from seamldr.range_layout import LinearBases, RangeLayout, plan_range
from seamldr.range_writer import TransferVmcs
from seamldr.status import Fatal, Scenario, SeamldrLeaf

MakeBench = Callable[..., LoaderBench]
# LPs: minimum, extra pages up to which it is ENOMEM, extra pages from which it works
THRESHOLDS = {
    "1.5.08": {4: (0x24_5000, 2, 7), 8: (0x25_E000, 1, 7), 64: (0x3B_C000, 0, 7), 256: (0x87_0000, 0, 5)},
    "2.0.08": {4: (0x25_C000, 2, 7), 8: (0x27_5000, 1, 7), 64: (0x3D_3000, 0, 7), 256: (0x88_7000, 0, 5)},
}


def plan(lps: int, version: str, size: int) -> RangeLayout:
    image = published(version)
    return plan_range(Platform(num_lps=lps, p_seamldr_base=0x4000_0000 + size), manifest(image), image.module_pages)


@pytest.mark.parametrize("lps", [4, 8, 64, 256])
@pytest.mark.parametrize("version", THRESHOLDS)
def test_thresholds(version: str, lps: int) -> None:
    """The smallest range, and by how many pages page tables still miss it."""
    minimum, enomem_below, ok_from = THRESHOLDS[version][lps]
    assert plan(lps, version, 0x0100_0000).minimum == minimum
    for extra in range(9):
        layout = plan(lps, version, minimum + extra * 4096)
        assert (layout.spare_table_pages < layout.tables_before_keyhole) == (extra < enomem_below)
        assert (layout.spare_table_pages < layout.tables) == (extra < ok_from)


def test_worked_example() -> None:
    """Addresses on the baseline platform."""
    layout = plan(4, "1.5.08", 0x0200_0000)
    assert (layout.vmcs_pa, layout.data_pa) == (0x4000_1000, 0x4000_5000)
    assert layout.data_pa + layout.data_size == 0x4003_1000
    assert (layout.pml4_pa, layout.stack_pa, layout.code_pa) == (0x41DF_3000, 0x41DF_4000, 0x41E0_0000)


def test_keyhole_exhaustion_is_fatal(make_bench: MakeBench) -> None:
    """A range that is too small only for the keyhole page tables ends in UD2."""
    bench = make_bench(p_seamldr_base=0x4000_0000 + 0x24_5000 + 2 * 4096)
    params = bench.place(published("1.5.08"), Scenario.LOAD)
    bench.install_placed(params, (0, 1, 2))
    with pytest.raises(Fatal, match="keyhole"):
        bench.install_placed(params, (3,))


def test_full_database_is_fatal(make_bench: MakeBench) -> None:
    """A module history database without room cannot even take a first LOAD."""
    bench = make_bench(seamdb_size=0)
    with pytest.raises(Fatal, match="SEAMDB"):
        bench.load(published("1.5.08"))


def test_sys_info_table(bench: LoaderBench) -> None:
    """Regions and handoff fields of the module in SYS_INFO_TABLE."""
    page = bench.memory.read(0x4000_0000, 4096)
    assert struct.unpack_from("<QII", page) == (0, 4, 1)
    regions = struct.unpack_from("<12Q", page, 2056)
    assert regions[1::2] == (101 * 4096, 0x2_C000, 0xC000, 0x20_0000, 0x1000, 1)
    assert [base & ~(0x7FFC << 32) for base in regions[:8:2]] == [
        0xFFFF_8000_0000_0000, 0xFFFF_8003_0000_0000, 0xFFFF_8001_0000_0000, 0xFFFF_8002_0000_0000,
    ]  # fmt: skip
    assert regions[10:] == (1, 1)
    assert struct.unpack_from("<HHBBH", page, 2152) == (0, 0, 0, 0, 13)


def test_linear_bases_share_their_random_bits() -> None:
    """Bits 46:34 are random and the same in all bases."""
    bases = LinearBases.randomize(0xFFFF_FFFF_FFFF_FFFF)
    assert (bases.code, bases.keyhole_edit) == (0xFFFF_FFFC_0000_0000, 0x0000_7FFD_0000_0000)
    assert LinearBases.randomize(0).sysinfo == 0xFFFF_8003_FFFF_0000
    assert bases.code & ~LinearBases.randomize(0).code == 0x7FFC << 32


def test_transfer_vmcss(bench: LoaderBench) -> None:
    """One per x2APIC ID: entry point, stacks and TLS of that LP."""
    code, data, stack = (bench.memory.read64(0x4000_0000 + at) for at in (2056, 2072, 2088))
    sigstruct = manifest(published("1.5.06"))
    for lp in range(4):
        vmcs = TransferVmcs.decode(bench.memory.read(0x4000_1000 + lp * 4096, 64))
        assert vmcs.rip == code + sigstruct.rip_offset
        assert vmcs.gs_base == data + 14 * 4096 + lp * 2 * 4096
        assert (vmcs.rsp, vmcs.ssp) == (stack + lp * 3 * 4096 + 2 * 4096 - 8, stack + (lp + 1) * 3 * 4096 - 8)
        assert (vmcs.idtr_base, vmcs.gdtr_base) == (code + 0x5A000, code + 0x5A800)


def test_code_region(bench: LoaderBench) -> None:
    """The image lies at the start of the code region, relocated and with its interrupt gates aimed."""
    image, code = published("1.5.06"), bench.memory.read64(0x4000_0000 + 2056)
    expected = bytearray(image.module)
    assert elf.relocate(expected, code) == 49
    placed = bench.memory.read(0x41E0_0000, len(image.module))
    assert placed[:0x5A000] == expected[:0x5A000]
    assert placed[0x5A000 + 512 :] == expected[0x5A000 + 512 :]
    for vector in range(32):
        low, _, _, _, middle, high, _ = struct.unpack_from("<HHBBHII", placed, 0x5A000 + 16 * vector)
        assert low | middle << 16 | high << 32 == code + 0x33CD0 + 16 * vector


def test_update_wipes_all_but_handoff(bench: LoaderBench) -> None:
    """An UPDATE keeps exactly header and data, and zeroes what the old module left around them."""
    kept = bench.memory.read(0x4000_5000, 8 + 0x1000)
    bench.memory.write(0x4000_5000 + 8 + 0x1000, b"\xee" * 0x1_0000)
    bench.memory.write(0x41DF_4000, b"\xee" * 0xC000)
    bench.memory.write(0x4000_1000 + 64, b"\xee" * 100)
    bench.install(published("1.5.08"))
    assert bench.memory.read(0x4000_5000, 8 + 0x1000) == kept
    rest = bench.memory.read(0x4000_6008, 0x4003_1000 - 0x4000_6008)
    assert (rest, bench.memory.read(0x41DF_4000, 0xC000)) == (bytes(len(rest)), bytes(0xC000))
    assert bench.memory.read(0x4000_1000 + 64, 100) == bytes(100)


def test_smaller_module_leaves_nothing_of_a_larger(make_bench: MakeBench) -> None:
    """After a LOAD of a shorter image the code region holds zeros behind it."""
    bench = make_bench()
    bench.load(published("1.5.01"))
    bench.load(published("1.5.06"))
    assert bench.memory.read(0x41E0_0000 + 101 * 4096, 4096) == bytes(4096)


def test_aslr_follows_the_random_number(make_bench: MakeBench) -> None:
    """Two loads get different linear bases from the same source."""
    bench = make_bench()
    bases = set()
    for _ in range(2):
        bench.load(published("1.5.06"))
        bases.add(bench.memory.read64(0x4000_0000 + 2056))
    assert len(bases) == 2


def test_installed_says_who_it_is(bench: LoaderBench) -> None:
    """`installed` carries the identity from the image and the handoff fields; the generation counts installs."""
    module = bench.loader.installed
    assert module is not None
    assert module.identity == make_identity("1.5.06")
    assert (module.seamsvn, module.num_handoff_pages, module.generation) == (0x0106, 13, 1)
    assert module.seamhash == hashlib.sha384(published("1.5.06").module).digest()
    bench.install(published("1.5.08"))
    assert bench.loader.installed is not None
    assert (bench.loader.installed.identity.version, bench.loader.generation) == ("1.5.08", 2)


def test_installed_stays_while_a_session_is_open(bench: LoaderBench) -> None:
    """An open session may still restore the old module, so it is still the one that is installed."""
    bench.call(0, SeamldrLeaf.INSTALL)
    assert bench.loader.installed is not None
    assert not bench.loader.seam_ready


def test_failed_install_uses_no_update(bench: LoaderBench) -> None:
    """A recoverable failure leaves the count and the module history as they were."""
    history = (bench.state.num_remaining_updates, bench.state.seamdb_entries, bench.state.seamdb_nonce)
    bench.entropy.failures[RdrandUse.ASLR] = 1
    bench.install(published("1.5.08"))
    assert (bench.state.num_remaining_updates, bench.state.seamdb_entries, bench.state.seamdb_nonce) == history


def test_platform_is_a_message() -> None:
    """A platform survives MessagePack, as the service hands it over."""
    platform = Platform(fms=(0xC06F2, 0x806F8), num_lps=8, cmrs=((0, 0x4000_0000),))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(platform), type=Platform) == platform
