"""A TD vCPU (arch/x86/kvm/vmx/tdx.c): it has no VMCS of KVM's, but belongs to at most one LP."""

from __future__ import annotations

import hashlib

from bus.memory import WORD_SIZE
from cpu.cpu import Cpu
from cpu.lists import list_add, list_del
from cpu.smp import smp_call_function_single
from cpu.struct import NONE
from kvm.lost import is_lost, lost_cpu
from kvm.run_queue import resume_user_mode
from kvm.vcpu import TdVcpu
from seamldr.seamcall import TdxModuleArgs, sc_retry, seamcall_ret
from seamldr.tdx_leaves import TdhLeaf

EXITS_PER_RUN = 4
EXIT_REASON_TDCALL = 77
TDX_VCPU_NOT_ASSOCIATED = 0x8000_0702_0000_0000
STATUS_MASK = 0xFFFF_FFFF_0000_0000
TDX_OPERAND_BUSY = 0x8000_0200_0000_0000


def next_chain(words: list[int], counter: int) -> list[int]:
    """KVM's copy of the guest's hash chain, four u64, moved by one unit of guest work."""
    chain = b"".join(word.to_bytes(8, "little") for word in words)
    digest = hashlib.sha256(chain + counter.to_bytes(8, "little")).digest()
    return [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 32, 8)]


async def tdh(cpu: Cpu, leaf: TdhLeaf, **registers: int) -> int:
    """A SEAMCALL of which only the status matters."""
    status, _ = await seamcall_ret(cpu, leaf, TdxModuleArgs(**registers))
    return status


def pr_tdx_error(cpu: Cpu, td: int, leaf: TdhLeaf, status: int) -> None:
    """A SEAMCALL for a TD has failed."""
    cpu.pr_err(f"kvm_intel: SEAMCALL {leaf.name} failed: 0x{status:016x}")
    cpu.emit("td_error", td=td, leaf=leaf.name.replace("_", "."), status=status)


class VmxTdVcpu:
    """One TD vCPU while it is on a CPU: its preempt notifier, and what lives in the thread's own stack."""

    def __init__(self, number: int, state: TdVcpu) -> None:
        self.number = number
        self.state = state
        self.entries = 0
        self.alive = True
        self.lost_with: int | None = None
        """The dead CPU with which it was associated."""

    async def vcpu_load(self, cpu: Cpu) -> bool:
        """vcpu_load. False if the vCPU is lost with a dead CPU."""
        await cpu.preempt_disable()
        cpu.thread.notifier = self
        loaded = await self._tdx_vcpu_load(cpu)
        if not loaded:
            cpu.thread.notifier = None
        await cpu.preempt_enable()
        return loaded

    async def vcpu_put(self, cpu: Cpu) -> None:
        """vcpu_put: a TD vCPU stays associated with its LP."""
        await cpu.preempt_disable()
        cpu.thread.notifier = None
        await cpu.preempt_enable()

    async def sched_in(self, cpu: Cpu) -> None:
        """kvm_sched_in."""
        await self._tdx_vcpu_load(cpu)

    async def sched_out(self, cpu: Cpu) -> None:
        """kvm_sched_out: nothing to save."""
        await cpu.give_way()

    async def _tdx_vcpu_load(self, cpu: Cpu) -> bool:
        """tdx_vcpu_load: flush on the CPU it was on, then join this CPU's list.

        On a dead CPU TDH.VP.FLUSH never runs, so the module lets no other have the vCPU: False.
        """
        state = self.state
        self.entries = 0
        owner = await cpu.load(state.cpu)
        if owner == cpu.number:
            return True
        if owner != NONE and not await flush_on(cpu, state, owner):
            self.lost_with = lost_cpu(await cpu.load(state.cpu))
            cpu.emit("vcpu_lost", vcpu=self.number, vmcs=NONE, cpu=self.lost_with)
            return False
        await cpu.local_irq_disable()
        await list_add(cpu, state.cpu_list, cpu.percpu.associated_tdvcpus)
        await cpu.store(state.cpu, cpu.number)
        await cpu.local_irq_enable()
        return True

    async def run(self, cpu: Cpu) -> bool:
        """KVM_RUN for a few exits; False if the TD cannot go on."""
        if not await self.vcpu_load(cpu):
            return False
        for _ in range(EXITS_PER_RUN):
            await cpu.preempt_disable()
            await cpu.local_irq_disable()
            status, registers = await self._enter(cpu)
            await cpu.local_irq_enable()
            await cpu.preempt_enable()
            if not await self._handle_exit(cpu, status, registers):
                break
        await self.vcpu_put(cpu)
        return self.alive

    async def _enter(self, cpu: Cpu) -> tuple[int, tuple[int, ...]]:
        """TDH.VP.ENTER, IRQs off."""
        args = TdxModuleArgs(rcx=await cpu.load(self.state.tdvpr))
        status, registers = await sc_retry(cpu, TdhLeaf.TDH_VP_ENTER, args, guest=True)
        if not self.entries or status >> 63:
            counter = await cpu.load(self.state.counter)
            td = await cpu.load(self.state.td)
            cpu.emit("td_enter", vcpu=self.number, td=td, status=status, counter=counter)
        self.entries += 1
        cpu.count.exits += not status >> 63
        return status, registers

    async def _handle_exit(self, cpu: Cpu, status: int, registers: tuple[int, ...]) -> bool:
        """Check what the guest reports against KVM's copies; False ends this KVM_RUN."""
        state = self.state
        if status >> 62:
            if status & STATUS_MASK == TDX_OPERAND_BUSY:
                return False
            self.alive = False
            await cpu.store(state.dead, 1)
            why = f"TDH.VP.ENTER failed: {status:#018x}"
            cpu.emit("vcpu_dead", vcpu=self.number, vmcs=NONE, why=why, hardware_reason=0)
            return False
        if status & 0xFFFF_FFFF != EXIT_REASON_TDCALL:
            return True
        counter, chain = registers[6], registers[7]
        expected = await cpu.load(state.counter) + 1
        words = [await cpu.load(state.chain + WORD_SIZE * at) for at in range(4)]
        following = next_chain(words, expected)
        if counter != expected:
            self._wrong(cpu, "td counter", expected, counter)
        elif chain != following[0]:
            self._wrong(cpu, "td chain", following[0], chain)
        for at, word in enumerate(following):
            await cpu.store(state.chain + WORD_SIZE * at, word)
        await cpu.store(state.counter, expected)
        await cpu.store(state.exits, await cpu.load(state.exits) + 1)
        return True

    def _wrong(self, cpu: Cpu, what: str, expected: int, got: int) -> None:
        cpu.emit("wrong_data", vcpu=self.number, vmcs=NONE, what=what, expected=expected, got=got)


async def flush_on(cpu: Cpu, state: TdVcpu, owner: int) -> bool:
    """TDH.VP.FLUSH on the CPU that has the vCPU, by a waiting IPI; False if it is lost with a dead CPU."""
    if lost_cpu(owner) is not None:
        return False
    ret = await smp_call_function_single(cpu, owner, "tdx_flush_vp", state.address)
    return not await is_lost(cpu, state.cpu, owner, ret)


async def tdx_flush_vp(cpu: Cpu, address: int) -> None:
    """IPI handler on the LP that holds the vCPU: TDH.VP.FLUSH if it was initialized, leave the list, publish cpu = -1.

    IRQs off.
    """
    state = TdVcpu(address)
    if await cpu.load(state.cpu) != cpu.number:
        return
    tdvpr = await cpu.load(state.tdvpr)
    if tdvpr:
        status, _ = await seamcall_ret(cpu, TdhLeaf.TDH_VP_FLUSH, TdxModuleArgs(rcx=tdvpr))
        cpu.emit("td_flush", vcpu=await cpu.load(state.number), status=status)
        cpu.warn_on_once(status not in (0, TDX_VCPU_NOT_ASSOCIATED), f"TDH.VP.FLUSH failed: {status:#018x}")
    await list_del(cpu, state.cpu_list)
    await cpu.store(state.cpu, NONE)


async def td_vcpu_thread(cpu: Cpu, vcpu: VmxTdVcpu) -> str:
    """User space's loop around KVM_RUN; why it ended: "moved", "stopped", "dead" or "lost with CPU n"."""
    alive = True
    while alive and await resume_user_mode(cpu):
        alive = await vcpu.run(cpu)
    if vcpu.lost_with is not None:
        return f"lost with CPU {vcpu.lost_with}"
    if cpu.thread.stopping:
        return "stopped"
    return "moved" if alive else "dead"
