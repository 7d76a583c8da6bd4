"""The SEAM side of the platform: the processor's gate, P-SEAMLDR and the TDX module, as one core.

A SEAMCALL is `enter`, a residence that the shell times, and `leave`, which brings the registers of SEAMRET. Each is one
step: its state, its entry in the journal and its stores to memory are kept in the SEAM range in one commit, and then
the stores are made. A process that takes over finds every step done or not begun.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from bus.memory import PAGE_SIZE, PhysicalMemory
from cpu.layout import (
    BUFFERS_END,
    P_SEAMLDR_SIZE,
    PAMT,
    SEAMRR_BASE,
    TD_PAGES_END,
    TDMR,
    TDMR_SIZE,
    seamrr_size,
)
from seamldr.gate import Admission, GateState, SeamGate
from seamldr.identity import ModuleIdentity
from seamldr.image import ModuleImage
from seamldr.journal import Journal, Registers, SeamCall
from seamldr.platform import LoaderProfile, Platform
from seamldr.pseamldr import PSeamldr
from seamldr.seam_store import SeamStore
from seamldr.state import PSeamldrState
from seamldr.status import Fatal, Scenario, SeamldrLeaf
from seamldr.step_memory import StepMemory, Store
from seamldr.structures import SeamldrParams
from seamldr.tdx_boot import TdHandle, boot, born_finalized
from seamldr.tdx_call import ModuleDead
from seamldr.tdx_call import Registers as ModuleRegisters
from seamldr.tdx_module import ExitReason, TdxModule, decode
from seamldr.tdx_platform import ModulePlatform
from seamldr.tdx_state import ModuleState, TdMemory
from seamldr.tdx_tdmr import PAMT_PAGE_SIZES, TdmrInfo, pamt_size

STORE_OFFSET = 1 << 20
STORE_SIZE = 16 << 20
SCRATCH = BUFFERS_END - 16 * PAGE_SIZE
"""Host pages that firmware uses before the machine runs."""

REGISTER_NAMES = ("rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13")
STORES = "stores"
"""Record of the stores that the last step has yet to make."""
LOCK = "lock"
"""Kind of the records in which the lock service, which shares this process, keeps what must outlive it."""
OWN_RECORDS = ("gate", "pseamldr", "call", STORES, LOCK)
"""Kinds of records that are not the TDX module's."""

_stores = msgspec.msgpack.Decoder(list[Store])
_NOTHING = msgspec.msgpack.encode([])


def platform_of(cpus: int, fms: int, profile: str, seamdb_size: int, trusted: tuple[str, ...]) -> Platform:
    """The platform of a machine with `cpus` LPs in one package."""
    size = seamrr_size(cpus)
    return Platform(
        profile=LoaderProfile(profile),
        num_lps=cpus,
        fms=(fms,),
        keyid_bits=7,
        seamrr_base=SEAMRR_BASE,
        seamrr_size=size,
        p_seamldr_base=SEAMRR_BASE + size - P_SEAMLDR_SIZE,
        p_seamldr_size=P_SEAMLDR_SIZE,
        seamdb_size=seamdb_size,
        trusted_signers=trusted,
        cmrs=((0, SEAMRR_BASE), (PAMT, TDMR + TDMR_SIZE - PAMT)),
    )


class Entry(msgspec.Struct, frozen=True):
    """How a SEAMCALL began: admitted or not, and whether a TD guest runs until `leave`."""

    admission: Admission
    guest: bool = False


class SeamSide:
    """The one SEAM side of a machine."""

    def __init__(self, platform: Platform, memory: PhysicalMemory) -> None:
        self.platform = platform
        self.memory = StepMemory(memory)
        self.store = SeamStore(memory, platform.p_seamldr_base + STORE_OFFSET, STORE_SIZE)
        self.journal = Journal()
        kept = self.store.records()
        self.memory.stores = _stores.decode(kept.get(STORES, _NOTHING))
        self._settle()
        state = msgspec.msgpack.decode(kept["pseamldr"], type=PSeamldrState) if "pseamldr" in kept else None
        gate = msgspec.msgpack.decode(kept["gate"], type=GateState) if "gate" in kept else None
        self.loader = PSeamldr(platform, self.memory, state)
        self.gate = SeamGate(lambda: self.loader.seamextend, gate)
        self.module: TdxModule | None = self._kept_module(kept)
        for name, data in kept.items():
            if name.startswith("call:"):
                self.journal.remember(name, data)

    # Before the machine runs

    def load(self, image: ModuleImage, staging: int) -> None:
        """What firmware does at boot: LOAD the module through every LP, by way of pages at `staging`. Raises Fatal."""
        pages = image.sigstruct[:PAGE_SIZE] + image.module
        self.memory.write(staging, pages)
        first = staging + PAGE_SIZE
        addresses = tuple(range(first, first + len(image.module), PAGE_SIZE))
        params = SeamldrParams(staging, len(addresses), addresses, Scenario.LOAD)
        self.memory.write(SCRATCH, params.encode())
        for lp in self.platform.x2apic_ids:
            answer = self.loader.call(lp, SeamldrLeaf.INSTALL, SCRATCH)
            if answer.rax:
                raise Fatal(f"the module that the machine starts with is refused: {answer.rax.name}")
        self._after_install()

    def boot_module(self) -> None:
        """Bring the loaded module up, with one TDMR of 1 GiB."""
        assert self.module is not None
        areas, at = [], PAMT
        for page_size in PAMT_PAGE_SIZES:
            size = pamt_size(TDMR_SIZE, page_size)
            areas.append((at, size))
            at += size
        boot(self.module, [TdmrInfo(TDMR, TDMR_SIZE, (areas[0], areas[1], areas[2]))], scratch_pa=SCRATCH)
        self.keep()

    def build_tds(self, count: int) -> list[TdHandle]:
        """`count` finalized TDs with one vCPU each, bound to no LP, in pages that KVM does not use."""
        assert self.module is not None
        pages: Iterator[int] = iter(range(TD_PAGES_END, TDMR + TDMR_SIZE, PAGE_SIZE))
        first = self.module.platform.first_private_hkid + 1
        module = self.module
        tds = [
            born_finalized(module, hkid=first + index, pages=pages, scratch_pa=SCRATCH) for index in range(count)
        ]
        self.keep()
        return tds

    # SEAMCALL and SEAMRET

    @property
    def inside(self) -> int | None:
        """The LP inside P-SEAMLDR."""
        return self.gate.state.owner

    def enter(self, lp: int, rax: int, registers: Registers, *, incarnation: int = 0, call: int = 0) -> Entry:
        """SEAMCALL number `call` by an LP that is not in SEAM. Not admitted: VMfailInvalid, nothing has happened."""
        self.journal.begin(lp, SeamCall(incarnation, call, rax, registers))
        entry = self._enter(lp, rax, registers)
        if entry.admission is not Admission.ADMITTED:
            self.journal.end(lp, None)
        self.keep()
        return entry

    def _enter(self, lp: int, rax: int, registers: Registers) -> Entry:
        if not rax >> 63 and self.module is None:
            return Entry(Admission.NOT_LOADED)
        admission = self.gate.enter(lp, rax)
        if admission is not Admission.ADMITTED or rax >> 63:
            return Entry(admission)
        try:
            self._enter_module(lp, rax, registers)
        except ModuleDead:
            self.gate.shutdown(lp)
            return Entry(Admission.SEAM_DEAD)
        return Entry(admission, self.journal.calls[lp].guest)

    def _enter_module(self, lp: int, rax: int, registers: Registers) -> None:
        """Make the module call; it is over when the LP leaves, unless a guest runs now."""
        assert self.module is not None
        arguments = ModuleRegisters(**dict(zip(REGISTER_NAMES, registers, strict=False)))
        result = self.module.seamcall(lp, rax, arguments)
        call = self.journal.calls[lp]
        call.guest = result.running is not None
        if not call.guest:
            call.answer = (result.rax, _with(registers, result.out))

    def leave(self, lp: int, *, interrupted: bool = False, nmi: bool = False) -> tuple[int, Registers]:
        """SEAMRET: RAX and the registers. A guest that ran ends by an interrupt, or by a TDVMCALL of its own.

        Raises Fatal if P-SEAMLDR died of the call; the gate then stays shut for all.
        """
        call = self.journal.inside(lp)
        assert call is not None
        try:
            if call.rax >> 63:
                answer = self.loader.call(lp, call.rax, call.registers[0])
                self._after_install()
                out = {} if answer.rdx is None else {"rdx": answer.rdx}
                result = (int(answer.rax), _with(call.registers, out))
            else:
                result = call.answer or self._leave_guest(lp, call.registers, interrupted, nmi)
        except (Fatal, ModuleDead) as error:
            self.leave_dead(lp)
            raise Fatal(str(error)) from error
        self.gate.leave(lp)
        self.journal.end(lp, result)
        self.keep()
        return result

    def _leave_guest(self, lp: int, registers: Registers, interrupted: bool, nmi: bool) -> tuple[int, Registers]:
        module = self.module
        assert module is not None
        if nmi or interrupted:
            result = module.td_exit(lp, ExitReason.EXCEPTION_NMI if nmi else ExitReason.EXTERNAL_INTERRUPT)
        else:
            module.guest_step(lp)
            result = module.td_exit(lp, ExitReason.TDCALL)
        return result.rax, _with(registers, result.out)

    def leave_dead(self, lp: int) -> bool:
        """The LP's process died; True if it was in SEAM, which is then gone until the machine is reset."""
        if self.journal.inside(lp) is None:
            return False
        self.journal.end(lp, None)
        self.gate.shutdown(lp)
        self.keep()
        return True

    # The module that is in place

    def _after_install(self) -> None:
        """After an INSTALL that succeeded there is a new module, with the memory of the TDs as it was."""
        installed = self.loader.installed
        if installed is None:
            if not self.loader.seam_ready and not self.loader.state.update_bitmap:
                self.module = None
            return
        if self.module is not None and self.module.platform.seamdb_index == installed.generation:
            return
        tds = self.module.tds if self.module is not None else TdMemory()
        self.module = self._module(installed.identity, installed.generation, ModuleState(), tds)
        self.module.dirty.update({"system", *(f"lp:{lp}" for lp in self.platform.x2apic_ids)})

    def _module(self, identity: ModuleIdentity, generation: int, state: ModuleState, tds: TdMemory) -> TdxModule:
        platform = ModulePlatform.installed(self.platform, self.memory, generation)
        return TdxModule(identity, platform, self.memory, state, tds)

    def _kept_module(self, kept: dict[str, bytes]) -> TdxModule | None:
        installed = self.loader.installed
        if installed is None:
            return None
        state, tds = ModuleState(), TdMemory()
        for name, data in kept.items():
            if name.partition(":")[0] not in OWN_RECORDS:
                decode(state, tds, name, data)
        return self._module(installed.identity, installed.generation, state, tds)

    def keep(self) -> None:
        """End of a step: what changed goes to the SEAM range, all at once, then its stores are made."""
        changed = {
            "gate": msgspec.msgpack.encode(self.gate.state),
            "pseamldr": msgspec.msgpack.encode(self.loader.state),
            STORES: msgspec.msgpack.encode(self.memory.stores) if self.memory.stores else b"",
        }
        if self.module is not None:
            changed |= {name: self.module.encode(name) for name in sorted(self.module.dirty)}
            self.module.dirty.clear()
        self.store.commit(changed | self.journal.records())
        self._settle()

    def _settle(self) -> None:
        if self.memory.stores:
            self.memory.settle()
            self.store.commit({STORES: b""})


def _with(registers: Registers, out: dict[str, int]) -> Registers:
    """The registers with those that SEAM wrote."""
    return tuple(out.get(name, registers[at]) for at, name in enumerate(REGISTER_NAMES)) + tuple(registers[8:])
