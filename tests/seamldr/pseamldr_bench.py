"""A P-SEAMLDR on four LPs with a kernel's hands around it, and stand-ins for the modules that Intel published.

Every call goes through the gate, and the loader is rebuilt from its encoded state after it, as after a restart.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from bus.memory import PhysicalMemory
from seamldr.entropy import PconfigStatus, RandomEntropy, RdrandUse, SeamopsStatus
from seamldr.gate import Admission, SeamGate
from seamldr.identity import make_identity
from seamldr.image import PAGE, ModuleImage
from seamldr.module_maker import make_module
from seamldr.platform import Platform
from seamldr.pseamldr import PSeamldr, Return
from seamldr.range_layout import handoff_pa
from seamldr.range_writer import Handoff
from seamldr.sigstruct import SigStruct, load_key, new_key, signer_hash
from seamldr.state import PSeamldrState
from seamldr.status import Flow, Scenario, SeamldrLeaf
from seamldr.structures import SeamldrParams

KEY = load_key((Path(__file__).parent / "signing_key.pem").read_bytes())
PARAMS_PA = 0x10_0000
SIGSTRUCT_PA = 0x20_0000
MODULE_PA = 0x40_0000
BUFFER_PA = 0x60_0000
MEMORY_SIZE = 0x4400_0000

# version: SEAMSVN, pages, RIP_OFFSET, GDT_IDT_OFFSET, CPUID table (as published by Intel)
XEON_4, XEON_5_6 = (0x806F8, 0xC06F0), (0x806F8, 0xC06F0, 0xA06F0)
PUBLISHED_SHAPES: dict[str, tuple[tuple[int, int], int, int, int, tuple[int, ...]]] = {
    "1.5.01": ((1, 4), 102, 0x38E24, 0x5C000, XEON_4),
    "1.5.05": ((1, 5), 102, 0x3922C, 0x5C000, XEON_5_6),
    "1.5.06": ((1, 6), 101, 0x33B70, 0x5A000, XEON_5_6),
    "1.5.08": ((1, 7), 101, 0x33D58, 0x5A000, XEON_5_6),
    "1.5.09": ((1, 8), 109, 0x35320, 0x60000, XEON_5_6),
    "1.5.13": ((1, 10), 109, 0x379DC, 0x4B000, XEON_5_6),
    "1.5.16": ((1, 11), 115, 0x3A35C, 0x50000, XEON_5_6),
    "2.0.02": ((3, 3), 131, 0x47158, 0x76000, (0xA06D0,)),
    "2.0.04": ((3, 4), 134, 0x4AB18, 0x78000, (0xA06D0, 0xA06E0)),
    "2.0.05": ((3, 4), 134, 0x4AAF8, 0x78000, (0xA06D0, 0xA06E0)),
    "2.0.08": ((3, 5), 146, 0x4F2F0, 0x69000, (0xA06D0, 0xA06E0)),
}
VERSION_BYTES_2_0_08 = bytes.fromhex("0800000272030000").ljust(24, b"\0")


@functools.cache
def published(version: str) -> ModuleImage:
    """A stand-in for a published module: same sizes, SVN and offsets, signed by the test key."""
    svn, pages, rip, table, cpuids = PUBLISHED_SHAPES[version]
    extra: dict[str, Any] = {"reserved3": VERSION_BYTES_2_0_08} if version.startswith("2") else {}
    return make_module(
        make_identity(version), key=KEY, svn=svn, pages=pages, rip_offset=rip, gdt_idt_offset=table,
        cpuid_table=cpuids, **extra,
    )  # fmt: skip


@functools.cache
def other_key() -> Any:
    """A key that nobody trusts."""
    return new_key()


def manifest(image: ModuleImage) -> SigStruct:
    """The manifest of an image."""
    return SigStruct.decode(image.sigstruct)


def with_manifest_bytes(image: ModuleImage, changes: dict[int, int]) -> ModuleImage:
    """The image with single manifest bytes replaced, the signature as it was."""
    page = bytearray(image.sigstruct)
    for offset, value in changes.items():
        page[offset] = value
    return ModuleImage(bytes(page), image.module)


def with_module(image: ModuleImage, module: bytes) -> ModuleImage:
    """The same manifest in front of another module."""
    return ModuleImage(image.sigstruct, module)


TRUSTED = signer_hash(manifest(published("1.5.08")))


class WatchedMemory(PhysicalMemory):
    """Memory in which another CPU may write as soon as an address was read; each watch acts once."""

    def __init__(self, size: int) -> None:
        super().__init__(mmap.mmap(-1, size))
        self.after_read: dict[int, Callable[[], None]] = {}

    def read(self, pa: int, length: int) -> bytes:
        data = super().read(pa, length)
        if pa in self.after_read:
            self.after_read.pop(pa)()
        return data


class BrokenEntropy(RandomEntropy):
    """Entropy that fails where and as often as `failures` says."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[Any, int] = {RdrandUse.CANARY: 0, RdrandUse.ASLR: 0, "seamdb": 0, "pconfig": 0}

    def _fails(self, use: Any) -> bool:
        self.failures[use] -= 1
        return self.failures[use] >= 0

    def rdrand(self, use: RdrandUse) -> int | None:
        return None if self._fails(use) else super().rdrand(use)

    def seamdb_insert(self) -> SeamopsStatus:
        return SeamopsStatus.ENTROPY_ERROR if self._fails("seamdb") else SeamopsStatus.SUCCESS

    def pconfig(self, package: int, key: int) -> PconfigStatus:
        return PconfigStatus.ENTROPY_ERROR if self._fails("pconfig") else PconfigStatus.SUCCESS


class LoaderBench:
    """One platform, its memory, its gate and its loader; `platform` is what differs from the baseline."""

    def __init__(self, **platform: Any) -> None:
        self.platform = Platform(**({"seamdb_size": 6, "trusted_signers": (TRUSTED,)} | platform))
        self.memory = WatchedMemory(MEMORY_SIZE)
        self.entropy = BrokenEntropy()
        self.loader = PSeamldr(self.platform, self.memory, hooks=self.entropy)
        self.gate = SeamGate(lambda: self.loader.seamextend)

    @property
    def state(self) -> PSeamldrState:
        return self.loader.state

    def call(self, lp: int, leaf: int, rcx: int = 0, **events: Any) -> Return:
        """A SEAMCALL to P-SEAMLDR that is admitted, and the invariants after it."""
        assert self.gate.enter(lp, leaf) is Admission.ADMITTED
        result = self.loader.call(lp, leaf, rcx, **events)
        self.gate.leave(lp)
        self.restart()
        self.check_invariants()
        return result

    def restart(self) -> None:
        """Build the loader again from what MessagePack carries."""
        encoded = msgspec.msgpack.encode(self.state)
        state = msgspec.msgpack.decode(encoded, type=PSeamldrState)
        assert state == self.state
        self.loader = PSeamldr(self.platform, self.memory, state, self.entropy)

    def check_invariants(self) -> None:
        """What holds between any two calls."""
        state, register = self.state, self.state.seamextend
        assert (state.current_flow is Flow.INSTALL) == bool(state.update_bitmap)
        if state.current_flow is not Flow.READY:
            assert not register.seam_ready
        if register.seam_ready:
            assert register.valid == 0x1FF
            assert state.installed is not None
            assert register.mrseam == state.installed.seamhash
        assert self.gate.state.owner is None

    def place(self, image: ModuleImage, scenario: int = Scenario.UPDATE) -> SeamldrParams:
        """Copy an image into memory, page by page, and describe it as the kernel does."""
        self.memory.write(SIGSTRUCT_PA, image.sigstruct)
        self.memory.write(MODULE_PA, image.module)
        pages = tuple(range(MODULE_PA, MODULE_PA + len(image.module), PAGE))
        return SeamldrParams(SIGSTRUCT_PA, len(pages), pages, scenario)

    def install_placed(
        self, params: SeamldrParams, lps: Iterable[int] | None = None, rcx: int = PARAMS_PA
    ) -> list[Return]:
        """INSTALL on each LP, all with the same RCX."""
        self.memory.write(PARAMS_PA, params.encode())
        order = self.platform.x2apic_ids if lps is None else lps
        return [self.call(lp, SeamldrLeaf.INSTALL, rcx) for lp in order]

    def install(self, image: ModuleImage, scenario: int = Scenario.UPDATE) -> Return:
        """A whole session with one image; all but the last LP see success."""
        *others, last = self.install_placed(self.place(image, scenario))
        assert all(result == Return(0, 0) for result in others)
        return last

    def load(self, image: ModuleImage) -> Return:
        return self.install(image, Scenario.LOAD)

    def load_baseline(self) -> None:
        """Module 1.5.06 loaded, then shut down with 4096 bytes of handoff data."""
        assert self.load(published("1.5.06")) == Return(0, 0)
        self.write_handoff()

    def write_handoff(self, valid: int = 1, hv: int = 0, size: int = 0x1000) -> None:
        """What TDH.SYS.SHUTDOWN writes."""
        payload = hashlib.shake_128(b"handoff").digest(size)
        self.memory.write(handoff_pa(self.platform), Handoff(valid, hv, size).encode() + payload)

    def cleanup(self) -> list[Return]:
        return [self.call(lp, SeamldrLeaf.CLEANUP) for lp in self.platform.x2apic_ids]

    def module_callable(self) -> bool:
        """Whether a SEAMCALL to the TDX module is admitted."""
        admitted = self.gate.enter(0, 0) is Admission.ADMITTED
        self.gate.leave(0)
        return admitted

    def range_digest(self) -> str:
        """Of all bytes of the module range that a module or loader may have written."""
        digest = hashlib.sha256()
        for start, end in self.state.range_in_use:
            digest.update(self.memory.read(start, end - start))
        return digest.hexdigest()


class Before:
    """What a recoverable failure must bring back."""

    def __init__(self, bench: LoaderBench) -> None:
        self.bench = bench
        self.seamextend = bench.state.seamextend
        self.installed = bench.state.installed
        self.range = bench.range_digest()
        self.generation = bench.state.generation

    def assert_closed(self) -> None:
        assert self.bench.state.current_flow is Flow.READY
        assert self.bench.state.update_bitmap == set()

    def assert_restored(self) -> None:
        self.assert_closed()
        state = self.bench.state
        assert (state.seamextend, state.installed, state.generation) == (
            self.seamextend, self.installed, self.generation,
        )  # fmt: skip
        assert self.bench.range_digest() == self.range
        assert self.bench.module_callable() == bool(self.seamextend.seam_ready)

    def assert_dead(self) -> None:
        self.assert_closed()
        register = self.bench.state.seamextend
        assert (register.valid, register.mrseam, register.attributes) == (0, bytes(48), 0)
        assert register.tee_tcb_svn[:2] == bytes(2)
        assert register.p_seamldr_ready
        assert self.bench.state.installed is None
        assert not self.bench.module_callable()

    def assert_installed(self, image: ModuleImage) -> None:
        self.assert_closed()
        wanted, register = manifest(image), self.bench.state.seamextend
        assert (register.valid, register.mrseam, register.mrsigner) == (0x1FF, wanted.seamhash, bytes(48))
        assert register.tee_tcb_svn[:2] == bytes((wanted.svn_minor, wanted.svn_major))
        assert self.bench.state.generation == self.generation + 1
        assert self.bench.module_callable()


