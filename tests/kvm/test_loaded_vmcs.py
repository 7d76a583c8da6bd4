"""KVM's tracking of VMCSs against the processors: every legal state, every way from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cpu.cpu import Cpu
from cpu.layout import LoadedVmcs, per_cpu, scratch_vmcs
from cpu.struct import NONE, ListHead, container_of
from cpu.vmx import Field, LaunchState
from kvm.hardware import cpu_down, cpu_up
from kvm.loaded_vmcs import (
    alloc_loaded_vmcs,
    clear_on_this_cpu,
    free_loaded_vmcs,
    loaded_vmcs_clear,
    loaded_vmcs_clear_current,
    vmclear_local_loaded_vmcss,
    vmcs_read,
    vmcs_write,
    write_if_changed,
)
from kvm.stepped import Stepped
from kvm.vmx import VmxVcpu


def machine(cpus: int = 2, vcpus: int = 2) -> tuple[Stepped, list[VmxVcpu]]:
    """A machine with some vCPUs that are current nowhere, but still active on CPU 0 where they were made."""
    stepped = Stepped("none", cpus=cpus)
    made = [stepped.new_vcpu(task) for task in range(vcpus)]
    for vcpu in made:
        run(stepped, loaded_vmcs_clear, vcpu.state.loaded_vmcs)
    stepped.machine.records.clear()
    return stepped, made


def run(stepped: Stepped, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any, number: int = 0) -> None:
    """Run kernel code with these arguments on a CPU until the machine sleeps."""
    stepped.run(lambda cpu: function(cpu, *arguments), number)


def value(stepped: Stepped, word: int) -> int:
    """A word of memory."""
    return stepped.memory.load(word)[0]


def on_list(stepped: Stepped, number: int) -> list[int]:
    """Addresses of the VMCSs on a CPU's list."""
    head, found = per_cpu(number).loaded_vmcss_on_cpu, []
    at = value(stepped, ListHead(head).next)
    while at != head:
        found.append(value(stepped, container_of(at, LoadedVmcs, "link").vmcs))
        at = value(stepped, ListHead(at).next)
    return found


def check(stepped: Stepped, vcpus: list[VmxVcpu], online: set[int]) -> None:
    """Each loaded_vmcs is in a legal state: what KVM says of it is what the processors say."""
    for vcpu in vcpus:
        v = vcpu.state.loaded_vmcs
        vmcs, owner = value(stepped, v.vmcs), value(stepped, v.cpu)
        active = {n for n in online if vmcs in stepped.cpu(n).vmx.active}
        listed = {n for n in online if vmcs in on_list(stepped, n)}
        assert active == listed == ({owner} - {NONE})
        if owner == NONE:
            assert value(stepped, v.launched) == 0
        else:
            launched = stepped.cpu(owner).vmx.active[vmcs].launch is LaunchState.LAUNCHED
            assert value(stepped, v.launched) == launched
    for number in online:
        current = value(stepped, per_cpu(number).current_vmcs)
        assert current == NONE or current == stepped.cpu(number).vmx.cur


async def load(cpu: Cpu, vcpu: VmxVcpu) -> None:
    """vcpu_load and vcpu_put."""
    await vcpu.vcpu_load(cpu)
    await vcpu.vcpu_put(cpu)


# Loading


def test_the_first_load_in_its_order() -> None:
    """List, then the cached pointer, then VMPTRLD, then the host's own fields, and `cpu` last."""
    stepped, (x, _) = machine()
    vmcs = value(stepped, x.state.loaded_vmcs.vmcs)
    stepped.cpu(1).trace = True
    stepped.run(lambda cpu: load(cpu, x), 1)
    order = ["list_add", "cv_write", "vmptrld", "vmwrite", "vmwrite", "vmwrite", "cpu_store", "vcpu_load"]
    assert [r["event"] for r in stepped.events(*order)] == order
    names = [r["name"] for r in stepped.events("vmwrite")]
    assert names == ["HOST_TR_BASE", "HOST_GDTR_BASE", "HOST_IA32_SYSENTER_ESP"]
    assert on_list(stepped, 1) == [vmcs] and value(stepped, x.state.loaded_vmcs.cpu) == 1
    assert value(stepped, per_cpu(1).current_vmcs) == stepped.cpu(1).vmx.cur == vmcs


def test_a_vmcs_that_is_believed_to_be_current_is_not_loaded_again() -> None:
    """After a put the VMCS stays active and current; loading it again does nothing at all to the processor."""
    stepped, (x, _) = machine()
    stepped.run(lambda cpu: load(cpu, x))
    stepped.machine.records.clear()
    stepped.cpu().trace = True
    stepped.run(lambda cpu: load(cpu, x))
    assert {r["event"] for r in stepped.machine.records} == {"vcpu_load", "vcpu_put"}
    assert [(r["skipped"], r["migrated"]) for r in stepped.events("vcpu_load")] == [(1, 0)]


def test_switching_between_two_reloads_and_clears_nothing() -> None:
    """Both stay active and on the list; the one that comes back needs a VMPTRLD only."""
    stepped, (x, y) = machine()
    for vcpu in (x, y, x):
        run(stepped, load, vcpu)
    assert stepped.count("vmptrld") == 3 and stepped.count("vmclear") == stepped.count("ipi_send") == 0
    assert [(r["skipped"], r["migrated"]) for r in stepped.events("vcpu_load")] == [(0, 1), (0, 1), (0, 0)]
    assert len(on_list(stepped, 0)) == 2
    check(stepped, [x, y], {0, 1})


def test_migration_clears_on_the_old_cpu_by_a_waiting_ipi() -> None:
    """The destination asks; the old CPU forgets the pointer, clears, unlinks, publishes -1 and then `launched` 0."""
    stepped, (x, _) = machine()
    vmcs = value(stepped, x.state.loaded_vmcs.vmcs)
    stepped.run(lambda cpu: load(cpu, x), 0)
    stepped.machine.records.clear()
    stepped.run(lambda cpu: load(cpu, x), 1)
    on_old = ["cv_write", "vmclear", "list_del", "cpu_store", "launched_store"]
    assert [r["event"] for r in stepped.events(*on_old, cpu=0)] == on_old
    order = [(r["node"], r["event"]) for r in stepped.events("launched_store", "csd_done", "list_add", "vmptrld")]
    assert order == [("cpu0", "launched_store"), ("cpu1", "csd_done"), ("cpu1", "list_add"), ("cpu1", "vmptrld")]
    assert (on_list(stepped, 0), on_list(stepped, 1)) == ([], [vmcs])
    check(stepped, [x], {0, 1})


def test_between_the_two_stores_the_vmcs_is_free_and_still_launched() -> None:
    """The window of __loaded_vmcs_clear: `cpu` is -1 before `launched` is 0, each store an operation of its own."""
    stepped, (x, _) = machine()
    v = x.state.loaded_vmcs
    stepped.run(lambda cpu: load(cpu, x))
    stepped.memory.store(v.launched, 1, 1)
    stepped.start(lambda cpu: clear_on_this_cpu(cpu, v.address))
    seen: list[tuple[int, int]] = []
    while stepped.machine.ready():
        stepped.machine.step(0)
        state = (value(stepped, v.cpu), value(stepped, v.launched))
        if not seen or seen[-1] != state:
            seen.append(state)
    assert seen == [(0, 1), (NONE, 1), (NONE, 0)]


def test_between_the_pointer_and_vmptrld_the_pointer_is_ahead() -> None:
    """The window of vmx_vcpu_load_vmcs: current_vmcs names the VMCS one operation before the processor has it."""
    stepped, (x, _) = machine()
    vmcs = value(stepped, x.state.loaded_vmcs.vmcs)
    stepped.start(lambda cpu: load(cpu, x))
    ahead = 0
    while stepped.machine.ready():
        stepped.machine.step(0)
        ahead += value(stepped, per_cpu(0).current_vmcs) == vmcs != stepped.cpu().vmx.cur
    assert ahead == 1


def test_a_vmwrite_that_is_lost_is_never_repaired() -> None:
    """KVM's write-through cache says that the host field is written, although there was no current VMCS to write to."""
    stepped, (x, _) = machine()
    stepped.run(lambda cpu: load(cpu, x))
    stepped.cpu().vmx.make_current(None)

    async def write(cpu: Cpu) -> None:
        for _ in range(2):
            await write_if_changed(cpu, x.state.loaded_vmcs.host_cr3, Field.HOST_CR3, 0x7000)

    stepped.run(write)
    assert stepped.count("vmwrite", result="invalid") == 1
    assert value(stepped, x.state.loaded_vmcs.host_cr3) == 0x7000
    texts = [r["text"] for r in stepped.events("warn")]
    assert texts == ["vmread failed: field=4400", "vmwrite failed: field=6c02 val=7000 err=0"]


def test_a_failed_vmread_reads_as_zero() -> None:
    """Execution goes on with 0, and the warning comes once."""
    stepped, _ = machine()

    async def read(cpu: Cpu) -> list[int]:
        return [await vmcs_read(cpu, Field.GUEST_RIP) for _ in range(3)]

    assert stepped.run(read) == [0, 0, 0]
    assert stepped.count("warn") == 1 and stepped.count("vmread") == 3


# Clearing


def test_only_the_owner_clears() -> None:
    """__loaded_vmcs_clear on another CPU than `cpu` names returns at once."""
    stepped, (x, _) = machine()
    stepped.run(lambda cpu: load(cpu, x), 0)
    stepped.machine.records.clear()
    stepped.run(lambda cpu: clear_on_this_cpu(cpu, x.state.loaded_vmcs.address), 1)
    assert stepped.machine.records == [] and value(stepped, x.state.loaded_vmcs.cpu) == 0


def test_clearing_another_than_the_current_one_keeps_the_pointer() -> None:
    """current_vmcs is forgotten only if it names the VMCS that is cleared."""
    stepped, (x, y) = machine()
    for vcpu in (x, y):
        run(stepped, load, vcpu)
    stepped.machine.records.clear()
    stepped.run(lambda cpu: loaded_vmcs_clear(cpu, x.state.loaded_vmcs))
    current = value(stepped, y.state.loaded_vmcs.vmcs)
    assert value(stepped, per_cpu(0).current_vmcs) == stepped.cpu().vmx.cur == current
    assert stepped.count("cv_write") == 0 and on_list(stepped, 0) == [current]
    check(stepped, [x, y], {0, 1})


def test_a_shadow_vmcs_is_cleared_only_if_its_vmcs_was_launched() -> None:
    """The shadow VMCS follows its VMCS, as in __loaded_vmcs_clear."""
    for launched in (0, 1):
        stepped, (x, _) = machine()
        v = x.state.loaded_vmcs
        run(stepped, load, x)
        stepped.memory.store(v.shadow_vmcs, scratch_vmcs(0), 1)
        stepped.memory.store(v.launched, launched, 1)
        stepped.machine.records.clear()
        run(stepped, loaded_vmcs_clear, v)
        cleared = [r["vmcs"] for r in stepped.events("vmclear")]
        assert cleared == [value(stepped, v.vmcs), scratch_vmcs(0)][: 1 + launched]


def test_the_local_sweep_clears_everything_of_this_cpu_and_nothing_of_others() -> None:
    """vmclear_local_loaded_vmcss empties the list, although each entry unlinks itself on the way."""
    stepped, vcpus = machine(vcpus=4)
    for vcpu in vcpus:
        run(stepped, load, vcpu, number=vcpu.number // 3)
    stepped.run(vmclear_local_loaded_vmcss)
    assert on_list(stepped, 0) == [] and len(on_list(stepped, 1)) == 1
    assert stepped.cpu().vmx.active == {} and value(stepped, per_cpu(0).current_vmcs) == NONE
    check(stepped, vcpus, {0, 1})


def test_clearing_the_current_one_leaves_the_others() -> None:
    """loaded_vmcs_clear_current touches the VMCS that current_vmcs names, or none if it is NULL."""
    stepped, (x, y) = machine()
    for vcpu in (x, y):
        run(stepped, load, vcpu)
    for _ in range(2):
        stepped.run(loaded_vmcs_clear_current)
        assert on_list(stepped, 0) == [value(stepped, x.state.loaded_vmcs.vmcs)]
    check(stepped, [x, y], {0, 1})


# Allocation and hotplug


def test_a_new_vmcs_is_inactive() -> None:
    """alloc_loaded_vmcs writes the revision, clears the page and starts every copy from nothing."""
    stepped, (x, _) = machine()
    v, page = x.state.loaded_vmcs, value(stepped, x.state.loaded_vmcs.vmcs)
    stepped.memory.write(page, b"\xaa" * 4096)
    stepped.run(lambda cpu: alloc_loaded_vmcs(cpu, v, page))
    assert stepped.memory.read32(page) == stepped.cpu().vmx.config.vmcs_revision_id
    words = (v.shadow_vmcs, v.cpu, v.launched, v.host_rsp, v.host_cr3)
    assert [value(stepped, word) for word in words] == [0, NONE, 0, 0, 0]
    check(stepped, [x], {0, 1})


def test_freeing_clears_wherever_it_is_and_only_once() -> None:
    """A VMCS that is active on another CPU is cleared there first; what is freed is not touched again."""
    stepped, (x, _) = machine()
    stepped.run(lambda cpu: load(cpu, x), 1)
    stepped.machine.records.clear()
    for _ in range(2):
        stepped.run(lambda cpu: free_loaded_vmcs(cpu, x.state.loaded_vmcs), 0)
    assert [r["node"] for r in stepped.events("vmclear")] == ["cpu1"]
    assert value(stepped, x.state.loaded_vmcs.vmcs) == 0 and on_list(stepped, 1) == []


def test_a_cpu_that_goes_offline_takes_no_vmcs_with_it() -> None:
    """cpu_down sweeps before VMXOFF; afterwards the vCPU loads elsewhere without an IPI, its data as they were."""
    stepped, (x, _) = machine()

    async def write(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        await vmcs_write(cpu, Field.CR0_READ_SHADOW, 0x1234)
        await x.vcpu_put(cpu)

    stepped.run(write, 1)
    stepped.run(cpu_down, 1)
    assert [(r["active"], r["result"]) for r in stepped.events("vmxoff")] == [(0, "ok")]
    assert value(stepped, per_cpu(1).online) == 0
    stepped.machine.records.clear()

    async def read(cpu: Cpu) -> int:
        await x.vcpu_load(cpu)
        return await vmcs_read(cpu, Field.CR0_READ_SHADOW)

    assert stepped.run(read, 0) == 0x1234
    assert stepped.count("ipi_send") == 0
    stepped.run(cpu_up, 1)
    stepped.run(lambda cpu: load(cpu, x), 1)
    check(stepped, [x], {0, 1})


def test_an_owner_that_is_offline_is_not_waited_for() -> None:
    """-ENXIO of the cross-call is ignored: the load goes on."""
    stepped, (x, _) = machine()
    stepped.run(lambda cpu: load(cpu, x), 1)
    stepped.memory.store(per_cpu(1).online, 0, 1)
    stepped.run(lambda cpu: load(cpu, x), 0)
    assert value(stepped, x.state.loaded_vmcs.cpu) == 0 and stepped.count("ipi_send") == 0


# Any history

KINDS = ["load", "load", "load", "clear", "sweep", "bounce"]
STEP = st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=40, deadline=None)
@given(st.lists(STEP, max_size=15))
def test_tracking_is_true_after_any_history(steps: list[tuple[str, int, int]]) -> None:
    """Loads, moves, clears, sweeps and CPUs that go and come: KVM and the processors agree, and no data is lost."""
    stepped, vcpus = machine(cpus=3, vcpus=3)
    written: dict[int, int] = {}

    async def use(cpu: Cpu, vcpu: VmxVcpu, cookie: int) -> None:
        await vcpu.vcpu_load(cpu)
        assert await vmcs_read(cpu, Field.TSC_OFFSET) == written.get(vcpu.number, 0)
        await vmcs_write(cpu, Field.TSC_OFFSET, cookie)
        await vcpu.vcpu_put(cpu)
        written[vcpu.number] = cookie

    for cookie, (what, number, task) in enumerate(steps, 1):
        vcpu = vcpus[task]
        if what == "load":
            run(stepped, use, vcpu, cookie, number=number)
        elif what == "clear":
            run(stepped, loaded_vmcs_clear, vcpu.state.loaded_vmcs, number=number)
        elif what == "sweep":
            stepped.run(vmclear_local_loaded_vmcss, number)
        else:
            stepped.run(cpu_down, number)
            stepped.run(cpu_up, number)
        check(stepped, vcpus, {0, 1, 2})
    assert written.keys() <= {0, 1, 2} and stepped.count("warn") == 0
