"""Mutated files, manifests, parameters and call sequences: nothing wrong is accepted, nothing undocumented is raised.

SEAMLAB_FUZZ sets how many mutated files are tried, 100,000 unless it is set; the other loops follow in proportion.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pseamldr_bench import BUFFER_PA, KEY, PARAMS_PA, TRUSTED, LoaderBench, RdrandUse, manifest

from seamldr import elf
from seamldr.identity import identity_of
from seamldr.image import PAGE, ImageError, ModuleImage, build_v1, build_v2, check_framing, parse
from seamldr.manifest import ManifestContext, check_manifest
from seamldr.module_maker import make_module, resign
from seamldr.platform import Platform
from seamldr.sigstruct import SIGSTRUCT_SIZE, SigStruct
from seamldr.status import Fatal, Flow, Scenario, SeamldrLeaf, SeamldrStatus
from seamldr.verdict import verify_image

MUTATIONS = int(os.environ.get("SEAMLAB_FUZZ", "100000"))
SMALL = make_module(key=KEY, pages=4)
LOAD = ManifestContext(Platform(trusted_signers=(TRUSTED,)), Scenario.LOAD, len(SMALL.module))
INTERESTING = (0, 1, 0xFF, 0x100, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
few = settings(
    derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck)
)


def mutate(rng: random.Random, data: bytes, size: int) -> bytes:
    """One to four changes in the first `size` bytes; now and then none that matters."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(size - 4)
        match rng.randrange(4):
            case 0:
                mutant[at] ^= 1 << rng.randrange(8)
            case 1:
                mutant[at] = rng.randrange(256)
            case 2:
                struct.pack_into("<I", mutant, at, rng.choice(INTERESTING))
            case 3:
                source = rng.randrange(size - 4)
                mutant[at : at + 4] = mutant[source : source + 4]
    return bytes(mutant)


def installed(blob: bytes) -> bool:
    """Whether the file passes kernel and P-SEAMLDR, by the checks that they run, up to the first that fails."""
    try:
        image = check_framing(blob)
    except ImageError:
        return False
    context = msgspec.structs.replace(LOAD, image_size=len(image.module))
    if not image.sigstruct or check_manifest(SigStruct.decode(image.sigstruct), context):
        return False
    if hashlib.sha384(image.module).digest() != SigStruct.decode(image.sigstruct).seamhash:
        return False
    elf.relocate(bytearray(image.module), 0)
    return True


def test_mutated_files() -> None:
    """A file is installed exactly if only its checksum or bytes that nobody reads changed; else it is refused."""
    rng = random.Random(5)
    good = build_v2(SMALL)
    unread = (slice(2, 4), slice(PAGE + SIGSTRUCT_SIZE, 2 * PAGE))
    parts = ((0, 64), (0, PAGE), (PAGE, SIGSTRUCT_SIZE), (PAGE, PAGE), (2 * PAGE, 0xD00), (0, len(good)))
    passed = 0
    for _ in range(MUTATIONS):
        start, size = rng.choice(parts)
        blob = good[:start] + mutate(rng, good[start : start + size], size) + good[start + size :]
        if rng.random() < 0.05:
            blob = rng.choice((blob[: rng.randrange(len(blob))], blob + bytes(rng.choice((1, PAGE)))))
        same = bytearray(blob)
        for part in unread:
            same[part] = good[part]
        assert installed(blob) == (same == good), blob.hex()
        passed += same == good
    assert 0 < passed < MUTATIONS // 10


def test_mutated_manifests() -> None:
    """A manifest is accepted exactly if no byte of it changed."""
    rng = random.Random(1)
    good = SMALL.sigstruct[:SIGSTRUCT_SIZE]
    accepted = 0
    for _ in range(MUTATIONS // 20):
        mutant = mutate(rng, good, SIGSTRUCT_SIZE)
        status = check_manifest(SigStruct.decode(mutant), LOAD)
        assert (status == SeamldrStatus.SUCCESS) == (mutant == good), mutant.hex()
        accepted += not status
    assert accepted < MUTATIONS // 20


def kernel_accepts(blob: bytes) -> bool:
    """The kernel's checks, written a second time."""
    if len(blob) < PAGE or blob[:2] != b"\0\2" or blob[4:12] != b"TDX-BLOB" or any(blob[20:PAGE]):
        return False
    sigstruct, module = int.from_bytes(blob[12:16], "little"), int.from_bytes(blob[16:20], "little")
    return sigstruct <= 1 and module <= 496 and len(blob) == (1 + sigstruct + module) * PAGE


@pytest.mark.parametrize("build", [build_v1, build_v2])
def test_mutated_headers(build: object) -> None:
    """The kernel's checks accept exactly what they should; readers raise ImageError or nothing."""
    rng = random.Random(2)
    good = build(SMALL)  # type: ignore[operator]
    for _ in range(MUTATIONS // 100):
        blob = mutate(rng, good, rng.choice((24, 64, PAGE)))
        blob = rng.choice((blob, blob, blob[: rng.randrange(len(blob))], blob + bytes(rng.choice((1, PAGE)))))
        try:
            check_framing(blob)
            accepted = True
        except ImageError:
            accepted = False
        assert accepted == kernel_accepts(blob)
        try:
            image = parse(blob, with_checksum=False)
            assert blob[PAGE:] == image.sigstruct + image.module
        except ImageError:
            pass


def test_mutated_files_are_judged() -> None:
    """A report never raises, and accepts a file exactly if only its checksum or the unread bytes changed."""
    rng = random.Random(3)
    good = build_v2(SMALL)
    read = [*range(2), *range(4, PAGE + SIGSTRUCT_SIZE), *range(2 * PAGE, len(good))]
    for _ in range(MUTATIONS // 500):
        blob = mutate(rng, good, len(good))
        same = all(blob[i] == good[i] for i in read) if blob != good else True
        assert verify_image(blob, LOAD.platform).accepted == same


def test_mutated_elf() -> None:
    """Relocation raises ElfError or keeps the size; the identity of any image can be asked."""
    rng = random.Random(4)
    sigstruct = manifest(SMALL)
    refused = 0
    for _ in range(MUTATIONS // 100):
        mutant = mutate(rng, SMALL.module, rng.choice((64, 320, 0xD00)))
        image = bytearray(mutant)
        try:
            elf.relocate(image, 0xFFFF_8000_0000_0000)
        except elf.ElfError:
            refused += 1
        assert len(image) == len(mutant)
        assert identity_of(sigstruct, mutant).profile in ("A", "B")
    assert refused


@contextmanager
def loaded_bench() -> Iterator[LoaderBench]:
    """A bench with the small module loaded and shut down."""
    bench = LoaderBench()
    try:
        bench.load(SMALL)
        bench.write_handoff()
        yield bench
    finally:
        bench.memory.close()


edges = st.sampled_from(INTERESTING)
fields = st.fixed_dictionaries(
    {},
    optional={
        "svn_major": st.integers(0, 3),
        "svn_minor": st.integers(0, 255),
        "rip_offset": edges,
        "num_stack_pages": st.integers(0, 255),
        "num_tls_pages": st.integers(0, 255),
        "num_keyhole_pages": st.integers(0, 0xFFFF),
        "num_global_data_pages": st.integers(0, 0xFFFF),
        "module_hv": st.integers(0, 0xFFFF),
        "min_update_hv": st.integers(0, 2),
        "no_downgrade": st.integers(0, 255),
        "num_handoff_pages": st.integers(0, 0xFFFF),
        "gdt_idt_offset": st.sampled_from((0, PAGE, 3 * PAGE, 4 * PAGE, 0xFFFF_F000)),
        "fault_wrapper_offset": edges,
        "cpuid_table_size": st.integers(0, 256),
        "module_type": edges,
    },
)


@few
@given(changes=fields, scenario=st.sampled_from(Scenario), data=st.data())
def test_signed_but_wild(changes: dict[str, int], scenario: Scenario, data: st.DataObject) -> None:
    """Any validly signed manifest, over an ELF image with wild bytes in it, gives a status or UD2."""
    rng = random.Random(data.draw(st.integers(0, 1 << 32)))
    module = mutate(rng, SMALL.module, 0xD00) if rng.random() < 0.3 else SMALL.module
    image = resign(ModuleImage(SMALL.sigstruct, module), KEY, seamhash=hashlib.sha384(module).digest(), **changes)
    with loaded_bench() as bench:
        try:
            result = bench.install(image, scenario)
        except Fatal:
            return
        assert result.rdx == int(bench.state.installed is None)
        assert bench.state.current_flow is Flow.READY
        assert bench.module_callable() == (result.rdx == 0)


@few
@given(seed=st.integers(0, 1 << 32))
def test_mutated_params(seed: int) -> None:
    """A mutated SEAMLDR_PARAMS page gives a status, and only an intact start of it installs."""
    rng = random.Random(seed)
    with loaded_bench() as bench:
        good = bench.place(SMALL).encode()
        mutant = mutate(rng, good, rng.choice((16, 128, 200, PAGE)))
        bench.memory.write(PARAMS_PA, mutant)
        result = [bench.call(lp, SeamldrLeaf.INSTALL, PARAMS_PA) for lp in range(4)][-1]
        used = 128 + 8 * SMALL.module_pages
        intact = mutant[:4] + mutant[8:used] == good[:4] + good[8:used]
        if result.rax == SeamldrStatus.SUCCESS:
            assert intact and int.from_bytes(mutant[4:8], "little") in (0, 1)
        elif intact:
            assert int.from_bytes(mutant[4:8], "little") > 1


calls = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([*SeamldrLeaf, SeamldrLeaf.INSTALL, SeamldrLeaf.INSTALL, SeamldrLeaf.CLEANUP]),
        st.sampled_from([PARAMS_PA, PARAMS_PA, BUFFER_PA, 0x4000_0000]),
        st.sampled_from([0, 0, 1, 2]),
        st.sampled_from([None, None, None, RdrandUse.ASLR, "seamdb", "pconfig"]),
    ),
    max_size=40,
)


@few
@given(sequence=calls, ready=st.booleans())
def test_any_sequence(sequence: list[tuple[int, SeamldrLeaf, int, int, object]], ready: bool) -> None:
    """Any sequence of calls keeps the invariants, which the bench checks after each, and never ends in UD2."""
    with loaded_bench() as bench:
        if not ready:
            bench.cleanup()
        params = bench.place(SMALL, Scenario.UPDATE if ready else Scenario.LOAD)
        bench.memory.write(PARAMS_PA, params.encode())
        for lp, leaf, rcx, pending, failure in sequence:
            if not bench.loader.p_seamldr_ready:
                break
            bench.entropy.failures |= dict.fromkeys(bench.entropy.failures, 0)
            if failure is not None:
                bench.entropy.failures[failure] = 5
            result = bench.call(lp, leaf, rcx, interrupts_pending=pending)
            assert (result.rdx is None) == (leaf != SeamldrLeaf.INSTALL)
            bench.write_handoff()


def test_state_starts_small() -> None:
    """The encoded state stays small enough to be rewritten at every call."""
    with loaded_bench() as bench:
        assert len(msgspec.msgpack.encode(bench.state)) < 2048
