"""Golden sequences on the kernel code itself: one CPU, a vCPU x, exact counts of VMX instructions."""

from __future__ import annotations

import pytest
from stepping import Stepped, module

from cpu.cpu import Cpu
from cpu.layout import BUFFERS, per_cpu
from cpu.struct import NONE, ListHead
from cpu.vmx import Field
from kvm.loaded_vmcs import free_loaded_vmcs, vmcs_write
from kvm.vmx import VmxVcpu
from seamldr.image import build_v2
from seamldr.update import seamldr_install_module, seamldr_version_show

pytestmark = pytest.mark.conformance("Golden sequences")
LAUNCH = pytest.mark.parametrize("launch", ["preserve", "clear"])
INFO_PAGE = BUFFERS + 0x10_0000


async def info(cpu: Cpu) -> int:
    """Another thread reads the version of P-SEAMLDR."""
    return (await seamldr_version_show(cpu, INFO_PAGE))[0]


async def load_run_put(cpu: Cpu, x: VmxVcpu) -> bool:
    """One KVM_RUN of one entry; whether the vCPU can go on."""
    await x.vcpu_load(cpu)
    await x.vcpu_enter_guest(cpu)
    await x.vcpu_put(cpu)
    return x.fail_reason is None


class History:
    """x is loaded, run and put once; then P-SEAMLDR is called on its CPU; then what the test adds."""

    def __init__(self, strategy: str, launch: str, **knobs: object) -> None:
        self.machine = Stepped(strategy, seamret_launch=launch, **knobs)
        self.x = self.machine.new_vcpu(0)
        self.machine.machine.records.clear()
        assert self.run_x()

    def run_x(self) -> bool:
        """Load, run, put x."""
        return bool(self.machine.run(lambda cpu: load_run_put(cpu, self.x), name="vcpu0"))

    def call(self) -> int:
        """SEAMLDR.INFO by another thread of this CPU."""
        return int(self.machine.run(info, name="reader"))

    def vmptrlds(self) -> int:
        """VMPTRLDs so far."""
        return self.machine.count("vmptrld")

    def entry_results(self) -> list[str]:
        """What each VM entry came to."""
        return [f"{r['insn']} {r['result']}" for r in self.machine.events("vmentry")]


@LAUNCH
def test_g1_without_repair_the_next_vmwrite_fails(launch: str) -> None:
    """`none`: the load believes the cached pointer, and the first VMWRITE finds no current VMCS."""
    history = History("none", launch)
    assert history.call() == 0

    async def load_and_write(cpu: Cpu) -> None:
        await history.x.vcpu_load(cpu)
        await vmcs_write(cpu, Field.GUEST_RIP, 1)

    history.machine.run(load_and_write)
    assert history.vmptrlds() == 1
    assert history.machine.count("vmwrite", result="invalid") == 1
    warnings = [r["text"] for r in history.machine.events("warn")]
    assert warnings == ["vmread failed: field=4400", "vmwrite failed: field=681e val=1 err=0"]


@LAUNCH
def test_g2_another_vcpu_between_heals_the_pointer_but_not_the_launch_state(launch: str) -> None:
    """`none`: loading y and then x executes VMPTRLD; a launch state that was cleared then shows as error 5."""
    history = History("none", launch)
    y = history.machine.new_vcpu(1)
    history.machine.machine.records.clear()
    history.run_x()
    before = history.vmptrlds()
    history.call()
    assert history.machine.run(lambda cpu: load_run_put(cpu, y))
    survived = history.run_x()
    assert history.vmptrlds() - before == 2
    assert survived == (launch == "preserve")
    assert history.entry_results()[-1] == ("vmresume ok" if launch == "preserve" else "vmresume valid:5")


@LAUNCH
def test_g3_save_restore_costs_one_vmptrld_in_the_call(launch: str) -> None:
    """`save-restore`: 1 + 1 VMPTRLDs; the pointer is right, the launch state only if SEAMRET kept it."""
    history = History("save-restore", launch)
    history.call()
    survived = history.run_x()
    assert [r["reason"] for r in history.machine.events("vmptrld")] == ["load", "restore"]
    assert survived == (launch == "preserve")
    assert history.entry_results()[-1] == ("vmresume ok" if launch == "preserve" else "vmresume valid:5")


@LAUNCH
def test_g4_forgetting_the_pointer_makes_kvm_reload(launch: str) -> None:
    """`clear-current-vmcs`: 2 VMPTRLDs, both by KVM."""
    history = History("clear-current-vmcs", launch)
    history.call()
    survived = history.run_x()
    assert [r["reason"] for r in history.machine.events("vmptrld")] == ["load", "load"]
    assert survived == (launch == "preserve")
    assert history.entry_results()[-1] == ("vmresume ok" if launch == "preserve" else "vmresume valid:5")


@LAUNCH
def test_g5_clearing_through_kvms_tracking_works_either_way(launch: str) -> None:
    """`vmclear-local`: VMCLEAR before the call, nothing current at entry, a full load and VMLAUNCH after it."""
    history = History("vmclear-local", launch)
    vmcs = history.machine.events("vmptrld")[0]["vmcs"]
    history.machine.machine.records.clear()
    history.call()
    names = [r["event"] for r in history.machine.events("vmclear", "seamcall_enter")]
    assert names == ["vmclear", "seamcall_enter"]
    assert history.machine.events("vmclear")[0]["vmcs"] == vmcs
    assert history.machine.events("seamcall_enter")[0]["cur"] == NONE
    head = ListHead(per_cpu(0).loaded_vmcss_on_cpu)
    assert history.machine.memory.load(head.next)[0] == head.address
    assert history.run_x()
    assert history.machine.count("ipi_send") == history.machine.count("csd_lock") == 0
    assert history.machine.count("list_add") == history.vmptrlds() == 1
    assert history.entry_results() == ["vmlaunch ok"]


@LAUNCH
def test_g6_refusing_touches_nothing(launch: str) -> None:
    """`refuse-on-erratum`: -EINVAL and a warning, no SEAMCALL, the pointer as it was."""
    history = History("refuse-on-erratum", launch)
    before = history.machine.cpu().vmx.cur
    assert history.call() == -22
    assert history.machine.count("warn") == 1
    assert history.machine.count("seamcall_enter") == 0
    assert history.machine.cpu().vmx.cur == before != NONE


FIXED = {
    "none": (1, "vmresume"),
    "refuse-on-erratum": (1, "vmresume"),
    "save-restore": (2, "vmresume"),
    "clear-current-vmcs": (2, "vmresume"),
    "vmclear-local": (2, "vmlaunch"),
}


@LAUNCH
@pytest.mark.parametrize("strategy", FIXED)
def test_g7_on_a_fixed_cpu_seamret_keeps_the_vmcs(strategy: str, launch: str) -> None:
    """IA32_VMX_BASIC[60] = 1: nothing is lost, and each strategy's own VMPTRLDs are all there are."""
    vmptrlds, insn = FIXED[strategy]
    history = History(strategy, launch, vmx_basic_bit60=1)
    current = history.machine.cpu().vmx.cur
    assert history.call() == 0
    returned = history.machine.events("seamcall_return")[0]
    assert (returned["cur"], returned["lost"]) == (NONE if strategy == "vmclear-local" else current, NONE)
    assert history.run_x()
    assert history.vmptrlds() == vmptrlds
    assert history.entry_results()[-1] == f"{insn} ok"


@LAUNCH
def test_g8_nothing_loaded_means_nothing_to_restore(launch: str) -> None:
    """`save-restore` with no VMCS ever loaded: VMPTRST stores all ones and no VMPTRLD follows."""
    machine = Stepped("save-restore", seamret_launch=launch)
    assert machine.run(info) == 0
    assert [r["value"] for r in machine.events("vmptrst")] == [NONE]
    assert machine.count("vmptrld") == 0


@LAUNCH
def test_g9_a_stopper_that_installs_between_two_slices_is_the_same_bug(launch: str) -> None:
    """`none`: x is preempted by the stopper, INSTALL runs, x goes on and finds no current VMCS."""
    machine = Stepped("none", seamret_launch=launch)
    x = machine.new_vcpu(0)
    image = build_v2(module("1.5.09"))
    machine.memory.write(BUFFERS + 0x20_0000, image)
    pages = tuple(range(BUFFERS + 0x20_0000, BUFFERS + 0x20_0000 + len(image), 4096))
    machine.machine.records.clear()

    async def run_x(cpu: Cpu) -> None:
        await x.vcpu_load(cpu)
        while x.fail_reason is None:
            await x.vcpu_enter_guest(cpu)

    async def install(cpu: Cpu) -> int:
        return await seamldr_install_module(cpu, pages, len(image), INFO_PAGE)

    vcpu = machine.start(run_x, name="vcpu0")
    for _ in range(400):
        machine.machine.step(0)
    vcpu.priority = type(vcpu.priority).VCPU
    worker = machine.start(install, name="kworker")
    machine.machine.run()
    assert worker.result == 0
    assert machine.count("seamcall_enter", name="SEAMLDR.INSTALL") == 1
    order = [r["event"] for r in machine.events("vcpu_put", "seamcall_return", "vcpu_load") if r.get("leaf", 1) & 1]
    assert "vcpu_put" in order and order.index("vcpu_put") < order.index("seamcall_return")
    assert machine.count("vmptrld") == 1
    assert machine.events("vcpu_load")[-1]["skipped"] == 1
    assert machine.count("vmwrite", result="invalid") + machine.count("vmread", result="invalid") > 0


@LAUNCH
def test_g10_destroying_the_vcpu_after_the_call_is_harmless(launch: str) -> None:
    """`clear-current-vmcs`: the pointer is NULL already, and VMCLEAR of the VMCS succeeds."""
    history = History("clear-current-vmcs", launch)
    history.call()
    assert history.machine.memory.load(per_cpu(0).current_vmcs)[0] == NONE
    history.machine.machine.records.clear()
    history.machine.run(lambda cpu: free_loaded_vmcs(cpu, history.x.state.loaded_vmcs))
    assert [(r["event"], r.get("result")) for r in history.machine.events("vmclear", "cv_write")] == [("vmclear", "ok")]
    assert history.machine.cpu().vmx.cur == NONE
