"""What KVM keeps of a vCPU, in shared memory: it outlives the process of the CPU that runs it."""

from __future__ import annotations

import enum

from cpu.layout import LoadedVmcs, Task, task_address, td_address
from cpu.struct import KernelStruct, Word


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


class TdState(enum.IntEnum):
    """enum kvm_tdx_state."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNABLE = 2


class KvmTdx(KernelStruct):
    """`struct kvm_tdx`: a TD that KVM builds. `nr_pages` of its pages belong to the module, the TDR first; `hkid` is
    its key id, 0 for none; `vcpu` the address of its vCPU, 0 for none. `result` is what a cross-call for it brought.
    """

    state = Word()
    vm_bugged = Word()
    hkid = Word()
    nr_pages = Word()
    vcpu = Word()
    result = Word()


def kvm_tdx_of(td: int) -> KvmTdx:
    """The TD of a number."""
    return KvmTdx(td_address(td))


def vcpu_of(task: int) -> Vcpu:
    """The vCPU of a task number."""
    return Vcpu(task_address(task))


def td_vcpu_of(task: int) -> TdVcpu:
    """The TD vCPU of a task number."""
    return TdVcpu(task_address(task))
