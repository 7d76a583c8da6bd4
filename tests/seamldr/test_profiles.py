"""The three loaders: which modules each takes, and what a machine with each of them can do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from pseamldr_bench import KEY, PUBLISHED_SHAPES, TRUSTED, LoaderBench, manifest, published

from bus.memory import PhysicalMemory
from bus.records import Record
from cpu.layout import BUFFERS, memory_size
from kvm.compose import KnobError, Knobs, parse_knobs
from kvm.images import Images
from kvm.machine import Machine
from kvm.topology import Topology
from seamldr.identity import make_identity
from seamldr.image import build_v1, build_v2, parse
from seamldr.module_maker import make_module
from seamldr.platform import LoaderProfile, Platform
from seamldr.pseamldr import Return
from seamldr.seam import SeamSide, platform_of
from seamldr.status import Fatal, SeamldrStatus
from seamldr.tdx_boot import BootError
from seamldr.verdict import verify_image

P10, P15, P20 = LoaderProfile
XEON_6 = 0xA06D1


@pytest.mark.parametrize("version", PUBLISHED_SHAPES)
def test_the_first_loader_takes_no_published_module(version: str) -> None:
    """All of them use manifest bytes that have to be zero for P10."""
    image = build_v2(published(version))
    report = verify_image(image, Platform(profile=P10, fms=(XEON_6,), trusted_signers=(TRUSTED,)))
    assert report.first_failure is not None
    assert (report.first_failure.rule, report.first_failure.outcome) == ("manifest 1", "EBADSIG")


def test_a_module_of_today_does_not_start_under_the_first_loader() -> None:
    """Reworked for P10 it is loaded, but P10 tells it of no room for handoff data, and TDH.SYS.INIT refuses."""
    seam = SeamSide(platform_of(2, 0xC06F2, P10, 16, (TRUSTED,)), PhysicalMemory.private(memory_size(2)))
    with pytest.raises(Fatal, match="EBADSIG"):
        seam.load(published("1.5.08"), BUFFERS)
    fields = {"num_handoff_pages": 0, "gdt_idt_offset": 0, "fault_wrapper_offset": 0}
    seam = SeamSide(platform_of(2, 0xC06F2, P10, 16, (TRUSTED,)), PhysicalMemory.private(memory_size(2)))
    seam.load(make_module(key=KEY, **fields), BUFFERS)
    with pytest.raises(BootError, match="INCOMPATIBLE_SIGSTRUCT"):
        seam.boot_module()


def test_the_first_loader_is_no_knob() -> None:
    """A machine needs a loader that can update a module under running TDs."""
    with pytest.raises(KnobError, match="P15, P20, not 'P10'"):
        parse_knobs(["seamldr_profile=P10"])


@pytest.mark.parametrize(("profile", "keyids"), [(P10, 30), (P15, 31), (P20, 31)])
def test_key_ids_in_addresses(profile: LoaderProfile, keyids: int) -> None:
    """P10 stops one KeyID earlier, and at what the bits without TDX's own can count; the last good one is `keyids`."""
    platform = Platform(profile=profile)
    taken = [keyid for keyid in range(64) if platform.hpa_ok(keyid << 40 | 0x1000, 0x1000)]
    assert taken == list(range(keyids + 1))
    few = Platform(profile=profile, tdx_reserved_keyid_bits=3)
    assert few.hpa_ok(7 << 40, 0x1000)
    assert few.hpa_ok(8 << 40, 0x1000) == (profile is not P10)


@pytest.mark.parametrize("profile", [P15, P20])
def test_2_0_rules_are_those_of_1_5_but_for_the_version_bytes(profile: LoaderProfile) -> None:
    """A made 2.0 module carries its version where Intel's do; only P20 takes it, and then updates it like any other."""
    first, second = (make_module(make_identity(version), key=KEY) for version in ("2.0.08", "2.0.09"))
    assert manifest(second).reserved3[:4] == bytes((9, 0, 0, 2))
    assert manifest(published("2.0.08")).encode()[1000:1004] == manifest(first).encode()[1000:1004]
    bench = LoaderBench(profile=profile, fms=(XEON_6,))
    if profile is P15:
        assert bench.load(first) == Return(SeamldrStatus.EBADSIG, 0)
        return
    assert bench.load(first) == Return(0, 0)
    bench.write_handoff()
    assert bench.install(second) == Return(0, 0)
    assert bench.install(make_module(key=KEY, cpuid_table=(XEON_6,))) == Return(SeamldrStatus.EUNSUPPORTED, 0)
    bench.memory.close()


def boot_and_updates(tmp_path: Path, loader: str, given: str | None) -> list[tuple[str, int]]:
    """SEAMSVN, major first, and version of the image that boots and of two updates."""
    images = Images(
        tmp_path / "modules", planned=2, profile="A", loader=loader, fms=XEON_6, given=given, upload=False
    )
    files = [images.boot, *images.planned]
    return [manifest(parse(Path(file).read_bytes())).seamsvn for file in files]


def test_a_machine_starts_with_a_module_of_its_loaders_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2.0 under P20, unless an image of the 1.5 series is to be installed; 1.5 under P15 whatever is to come."""
    monkeypatch.setattr("kvm.images.new_key", lambda: KEY)
    given = {}
    for version in ("1.5.16", "2.0.08"):
        given[version] = str(tmp_path / f"{version}.bin")
        Path(given[version]).write_bytes(build_v1(published(version)))
    cases = [("P15", None), ("P20", None), ("P15", "2.0.08"), ("P20", "2.0.08"), ("P20", "1.5.16")]
    series = []
    for number, (loader, version) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        svns = boot_and_updates(tmp_path / str(number), loader, given[version] if version else None)
        series.append([svn >> 8 for svn in svns])
    assert series == [[1, 1, 1], [3, 3, 3], [1, 3, 3], [3, 3, 3], [1, 1, 1]]


@pytest.mark.slow
async def test_a_machine_with_the_2_0_loader_boots_and_updates(tmp_path: Path) -> None:
    """On processes, with a TD that runs: two updates later the 2.0 module is two versions on."""
    knobs = Knobs(seamldr_profile=P20)
    topology = Topology(cpus=2, vcpus=2, tds=1, updates=2, seconds=0.6, knobs=knobs, run_dir=str(tmp_path / "run"))
    async with Machine(topology) as machine:
        await machine.run_workload()
    judgement = machine.check()
    assert (judgement.statistics.updates.succeeded, judgement.violations) == (2, ())
    told = [r for r in records_of(tmp_path / "run") if r["event"] == "module_init_flag" and r["initialized"]]
    assert [r["version"] for r in told] == ["2.0.05", "2.0.06"]


def records_of(run_dir: Path) -> Iterator[Record]:
    """All records of a run."""
    for path in sorted((run_dir / "records").glob("*.jsonl")):
        yield from map(msgspec.json.decode, path.read_bytes().splitlines())
