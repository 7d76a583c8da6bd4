"""A SEAM side of two LPs with a module that runs, for tests: calls, updates, and restarts over the same memory."""

from __future__ import annotations

import functools

from pseamldr_bench import KEY

from bus.memory import PAGE_SIZE, PhysicalMemory
from cpu.layout import BUFFERS, memory_size
from seamldr.gate import Admission
from seamldr.identity import make_identity
from seamldr.image import ModuleImage
from seamldr.leaves import leaf_name
from seamldr.module_maker import make_module
from seamldr.seam import REGISTER_NAMES, SeamSide, platform_of
from seamldr.sigstruct import SigStruct, signer_hash
from seamldr.status import Scenario, SeamldrLeaf
from seamldr.structures import SeamldrParams
from seamldr.tdx_boot import TdHandle
from seamldr.tdx_leaves import TdhLeaf

LPS = 2
PARAMS, INFO, IMAGE = BUFFERS + 0x10_0000, BUFFERS + 0x11_0000, BUFFERS + 0x20_0000
MODULE_HV = 0x8900_0001_0000_0000
EXIT_TDCALL = 77


@functools.cache
def module(version: str) -> ModuleImage:
    """A signed module."""
    return make_module(make_identity(version), key=KEY)


class Side:
    """A SEAM side with module 1.5.08 running and `tds` TDs; `restart` puts a new one in its place, over its memory."""

    def __init__(self, tds: int = 0, memory: PhysicalMemory | None = None) -> None:
        self.memory = memory or PhysicalMemory.private(memory_size(LPS))
        trusted = signer_hash(SigStruct.decode(module("1.5.08").sigstruct))
        self.platform = platform_of(LPS, 0xC06F2, "P15", 16, (trusted,))
        self.seam = SeamSide(self.platform, self.memory)
        self.seam.load(module("1.5.08"), BUFFERS)
        self.seam.boot_module()
        self.tds: list[TdHandle] = self.seam.build_tds(tds)

    def restart(self) -> None:
        """The process is killed, and another takes over what is in the SEAM range."""
        self.seam = SeamSide(self.platform, self.memory)

    def call(self, lp: int, leaf: int, **registers: int) -> tuple[int, dict[str, int]]:
        """One SEAMCALL from enter to leave: RAX and the registers by name."""
        entry = self.seam.enter(lp, leaf, self.registers(**registers))
        assert entry.admission is Admission.ADMITTED
        rax, after = self.seam.leave(lp)
        return rax, dict(zip(REGISTER_NAMES, after, strict=False))

    def registers(self, **named: int) -> tuple[int, ...]:
        """Thirteen registers, some of them given."""
        return tuple(named.get(name, 0) for name in REGISTER_NAMES) + (0,) * 5

    def read(self, field: int) -> int:
        """TDH.SYS.RD."""
        status, registers = self.call(0, TdhLeaf.TDH_SYS_RD, rdx=field)
        assert status == 0
        return registers["r8"]

    def stage(self, version: str) -> None:
        """An image and its SEAMLDR_PARAMS, as the kernel leaves them in memory."""
        image = module(version)
        self.memory.write(IMAGE, image.sigstruct[:PAGE_SIZE] + image.module)
        pages = tuple(IMAGE + PAGE_SIZE * (1 + index) for index in range(image.module_pages))
        self.memory.write(PARAMS, SeamldrParams(IMAGE, len(pages), pages, Scenario.UPDATE).encode())

    def update_calls(self, version: str) -> list[tuple[int, int, int]]:
        """LP, leaf and RCX of all SEAMCALLs of a module update, whose image is staged."""
        self.stage(version)
        handoff = self.read(MODULE_HV)
        calls: list[tuple[int, int, int]] = [(0, TdhLeaf.TDH_SYS_SHUTDOWN, handoff)]
        calls += [(lp, SeamldrLeaf.INSTALL, PARAMS) for lp in range(LPS)]
        calls += [(0, TdhLeaf.TDH_SYS_INIT, 0)]
        calls += [(lp, TdhLeaf.TDH_SYS_LP_INIT, 0) for lp in range(LPS)]
        calls += [(0, TdhLeaf.TDH_SYS_UPDATE, 0)]
        return calls

    def update(self, version: str, *, restarts: bool) -> None:
        """A module update, with a restart after each of its SEAMCALLs if asked for."""
        for lp, leaf, rcx in self.update_calls(version):
            assert self.call(lp, leaf, rcx=rcx)[0] == 0, leaf_name(leaf)
            if restarts:
                self.restart()

    def run_td(self, lp: int, td: int = 0) -> tuple[int, int]:
        """Enter a TD until its next TDVMCALL: what the guest reports, its counter and the head of its chain."""
        rax, registers = self.call(lp, TdhLeaf.TDH_VP_ENTER, rcx=self.tds[td].vcpus[0])
        assert rax & 0xFFFF_FFFF == EXIT_TDCALL and not rax >> 62
        return registers["r12"], registers["r13"]
