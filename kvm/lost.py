"""vCPUs that are lost with a dead CPU. Not Linux, where whoever loads one waits for an IPI that nobody answers.

What the CPU had of a VMCS in its own cache, and the association of a TD vCPU with it, died with it. The word that
names the CPU (`loaded_vmcs.cpu`, `vcpu_tdx.cpu`) then says "lost" for good, so that nobody takes what RAM holds for
the vCPU's state, also when the CPU lives again.
"""

from __future__ import annotations

from cpu.cpu import Cpu
from cpu.layout import MAX_CPUS, MAX_TDS, LoadedVmcs, per_cpu
from cpu.struct import NONE
from kvm.vcpu import td_vcpu_of, vcpu_of


def lost_with(number: int) -> int:
    """The value of a word that names a CPU, when what is there was lost with that CPU."""
    return NONE - 1 - number


def lost_cpu(value: int) -> int | None:
    """The CPU with which it was lost, if the value of such a word says so."""
    number = NONE - 1 - value
    return number if 0 <= number < MAX_CPUS else None


async def is_lost(cpu: Cpu, word: int, owner: int, errno: int) -> bool:
    """Whether what `word` said is on `owner` is lost, after a call to that CPU ended with `errno`."""
    if errno and await cpu.load(per_cpu(owner).dead):
        await cpu.store(word, lost_with(owner))
        return True
    # It may live again; then its new process has said what was lost, before it took any call.
    return lost_cpu(await cpu.load(word)) is not None


async def lose_vcpus(cpu: Cpu, vcpus: int, tds: int) -> None:
    """A new process of this CPU: whatever the one that died had active or associated here is lost."""
    for task in range(vcpus + (MAX_TDS if tds else 0)):
        if task < vcpus:
            vcpu = vcpu_of(task)
            words = [v.cpu for v in map(LoadedVmcs, (vcpu.vmcs01, vcpu.vmcs02)) if await cpu.load(v.vmcs)]
        else:
            td_vcpu = td_vcpu_of(task)
            words = [td_vcpu.cpu] if await cpu.load(td_vcpu.tdvpr) else []
        for word in words:
            if await cpu.load(word) == cpu.number:
                await cpu.store(word, lost_with(cpu.number))
