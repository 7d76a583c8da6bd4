"""What KVM keeps of a vCPU, in shared memory: it outlives the process of the CPU that runs it."""

from __future__ import annotations

from cpu.layout import LoadedVmcs, Task, task_address
from cpu.struct import Word


class Vcpu(Task):
    """`struct vcpu_vmx` and its `loaded_vmcs`.

    `rip`, `rsp` and `cookie` are KVM's copies of what the VMCS must hold: the guest's registers by the guest's rule,
    and a value that KVM itself wrote. `regs_dirty` says that `rip` waits to be written before the next entry.
    """

    created = Word()
    dead = Word()
    preempted = Word()
    exits = Word()
    rip = Word()
    rsp = Word()
    cookie = Word()
    regs_dirty = Word()
    tlb_flush = Word()
    vmcs01 = Word(LoadedVmcs.SIZE // 32)
    vmcs02 = Word(LoadedVmcs.SIZE // 32)

    @property
    def loaded_vmcs(self) -> LoadedVmcs:
        """The VMCS selected for this vCPU."""
        return LoadedVmcs(self.vmcs01)


class TdVcpu(Task):
    """`struct vcpu_tdx`. `counter` and `chain` are KVM's copies of what the guest must report next."""

    number = Word()
    dead = Word()
    td = Word()
    tdvpr = Word()
    cpu = Word()
    cpu_list = Word(2)
    counter = Word()
    chain = Word(4)
    exits = Word()


def vcpu_of(task: int) -> Vcpu:
    """The vCPU of a task number."""
    return Vcpu(task_address(task))


def td_vcpu_of(task: int) -> TdVcpu:
    """The TD vCPU of a task number."""
    return TdVcpu(task_address(task))
