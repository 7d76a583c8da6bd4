"""What is lost when an update fails after TDH.SYS.SHUTDOWN, on stepped machines: every TD, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hazards import IMAGE_AT, initialized, install, load_run_put
from stepping import Stepped, signing_key
from tds import build, build_steps, destroy, image, run_td

from bus.memory import PAGE_SIZE
from cpu.cpu import Cpu
from kvm.emergency import machine_crash_shutdown
from kvm.hotplug import kvm_exit
from seamldr.identity import make_identity
from seamldr.image import build_v2
from seamldr.module_maker import make_module
from seamldr.tdx_call import Hooks
from seamldr.tdx_handoff import HandoffHeader, write_header
from seamldr.tdx_state import SysState
from seamldr.update import read_module_version

EIO = 5
VMFAILINVALID = 0x8000_FF00_FFFF_0000
TDX_SYS_SHUTDOWN = 0xC000_0506_0000_0000
TDX_SYS_NOT_READY = 0xC000_0505_0000_0000

Moment = tuple[str, str]
"""Event and state or leaf at which something is spoilt."""


class OtherTsc(Hooks):
    """LP 1 has another IA32_TSC_ADJUST."""

    def tsc_adjust(self, lp: int) -> int:
        return lp


def nothing(machine: Stepped) -> None:
    """The image is bad enough."""


def page_hash(machine: Stepped) -> None:
    """A page of the module is not what its hash says."""
    machine.memory.write(IMAGE_AT + 3 * PAGE_SIZE, b"\x55" * 64)


def tsc(machine: Stepped) -> None:
    """LP 1 does not look like the LP of SYS.INIT any more."""
    assert machine.seam.module is not None
    machine.seam.module.hooks = OtherTsc()


def handoff(machine: Stepped) -> None:
    """There is no handoff to take over."""
    assert machine.seam.module is not None
    write_header(machine.memory, machine.seam.module.platform.handoff_pa, HandoffHeader())


def contradiction() -> bytes:
    """An image whose manifest says other things about handoff than the module itself."""
    return build_v2(make_module(make_identity("1.5.09", "B"), key=signing_key(), no_downgrade=0))


CASES: list[Any] = [
    pytest.param(
        1, image, nothing, ("update_begin", ""), ("SEAMLDR.INSTALL", 0x8000_0000_0000_0003), TDX_SYS_SHUTDOWN,
        id="no update left",
    ),
    pytest.param(
        9, lambda version: image(version, "A"), nothing, ("update_begin", ""),
        ("SEAMLDR.INSTALL", 0x8000_0000_0000_0004), TDX_SYS_SHUTDOWN, id="downgrade",
    ),
    pytest.param(
        9, image, page_hash, ("update_begin", ""), ("SEAMLDR.INSTALL", 0x8000_0000_0002_0001), VMFAILINVALID,
        id="bad page",
    ),
    pytest.param(
        9, lambda version: contradiction(), nothing, ("update_begin", ""),
        ("TDH.SYS.INIT", 0xC000_050A_0000_0000), TDX_SYS_NOT_READY, id="contradiction",
    ),
    pytest.param(
        9, image, tsc, ("seamcall_return", "TDH.SYS.INIT"), ("TDH.SYS.LP.INIT", 0xC000_0920_0000_003B),
        TDX_SYS_NOT_READY, id="unlike LPs",
    ),
    pytest.param(
        9, image, handoff, ("state_advance", "RUN_UPDATE"), ("TDH.SYS.UPDATE", 0xC000_0509_0000_0000),
        TDX_SYS_NOT_READY, id="no handoff",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("seamdb_size", "make", "spoil", "moment", "refusal", "entry"), CASES)
def test_tds_die_with_the_module_and_plain_guests_go_on(
    seamdb_size: int,
    make: Callable[[str], bytes],
    spoil: Callable[[Stepped], None],
    moment: Moment,
    refusal: tuple[str, int],
    entry: int,
) -> None:
    """Whichever step fails: the kernel has no module, a TD's entry brings the documented code, its vCPU is dead; the
    plain vCPU beside it goes on with its data intact, and the machine with it."""
    machine = Stepped("clear-current-vmcs", cpus=2, tds=1, seamdb_size=seamdb_size, module_profile="B")
    build(machine)
    assert machine.run(run_td(), 1) is True
    plain = machine.new_vcpu(3)
    assert machine.run(load_run_put(plain), 0) is True
    machine.machine.records.clear()

    worker = machine.start(install(machine, make("1.5.09")), 0, "kworker")
    step_to(machine, moment)
    spoil(machine)
    machine.machine.run()
    assert worker.result == -EIO
    failed = {(r["name"], r["status"]) for r in machine.events("seamcall_return") if r["status"]}
    assert failed == {refusal}
    assert initialized(machine) == 0
    assert [(r["initialized"]) for r in machine.events("module_init_flag")] == [0]

    assert machine.run(run_td(), 1) is False
    (dead,) = machine.events("td_enter")
    assert dead["status"] == entry
    assert [r["why"] for r in machine.events("vcpu_dead")] == [f"TDH.VP.ENTER failed: {entry:#018x}"]
    assert machine.run(destroy(), 0) is False, "key id and pages of a dead TD are leaked"
    assert machine.run(build_steps(machine, 1)["init"], 0) == -EIO
    assert machine.run(load_run_put(plain), 0) is True
    assert machine.run(load_run_put(plain), 1) is True
    assert machine.events("wrong_data") == []
    assert machine.judge().violations == ()


def step_to(machine: Stepped, moment: Moment) -> None:
    """Step until the record of this moment is written."""
    event, name = moment
    for _ in range(50_000):
        if any(not name or name in (r.get("name"), r.get("state")) for r in machine.events(event)):
            return
        machine.machine.step(min(machine.machine.ready()))
    raise AssertionError("it never happens")


def test_an_update_that_is_refused_before_the_shutdown_loses_nothing() -> None:
    """A bad frame is refused in the kernel, a bad handoff version by the module: TDs and module stay as they are."""
    for knobs, data, errno in (
        ({}, b"\0" * 8192, -22),
        ({"avoid_compat_sensitive": "always"}, image("1.5.09", "A"), -EIO),
    ):
        machine = Stepped("clear-current-vmcs", cpus=2, tds=1, **knobs)
        build(machine)
        assert machine.run(run_td(), 1) is True
        assert machine.run(install(machine, data)) == errno
        assert initialized(machine) == 1

        async def version(cpu: Cpu) -> int | None:
            return await read_module_version(cpu)

        assert machine.run(version) == 1 << 32 | 5 << 16 | 8
        assert machine.run(run_td(), 1) is True
        assert machine.events("vcpu_dead", "td_error", "wrong_data") == []


# The end of the kernel


class Interrupted(Hooks):
    """A host interrupt comes whenever the module looks, so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def interrupt_pending(self, lp: int) -> bool:
        self.times -= 1
        return self.times >= 0


def crashed(machine: Stepped) -> list[int]:
    """CPU 0 crashes; what TDH.SYS.DISABLE brought, call after call."""
    machine.machine.records.clear()
    machine.run(machine_crash_shutdown)
    return [r["status"] for r in machine.events("seamcall_return") if r["name"] == "TDH.SYS.DISABLE"]


def test_a_crash_disables_the_module_before_vmx_operation_ends() -> None:
    """A module that has TDH.SYS.DISABLE frees every TD, resumed after interrupts; then comes VMXOFF, and the next
    kernel finds the module as after power on."""
    machine = Stepped("clear-current-vmcs", cpus=2, tds=3, module_profile="B")
    build(machine)
    module = machine.seam.module
    assert module is not None
    module.identity = msgspec.structs.replace(module.identity, tdx_features0=module.identity.tdx_features0 | 1 << 53)
    module.hooks = Interrupted(2)
    assert crashed(machine) == [0x8000_0003_0000_0000] * 2 + [0]
    assert (module.tds.tds, module.state.system.kot, module.state.system.sys_state) == ({}, {}, SysState(0))
    events = [r["event"] for r in machine.events("seamcall_return", "vmxoff", cpu=0)]
    assert events.index("vmxoff") > max(at for at, event in enumerate(events) if event == "seamcall_return")
    assert machine.events("log") == []


def test_a_module_without_the_leaf_is_left_as_it_is() -> None:
    """The kernel calls it all the same, and logs that it failed."""
    machine = Stepped("clear-current-vmcs", cpus=2, tds=1)
    assert crashed(machine) == [0xC000_0100_0000_0000]
    assert [r["text"] for r in machine.events("log")] == ["virt/tdx: TDH.SYS.DISABLE failed: 0xc000010000000000"]
    assert machine.seam.module is not None and len(machine.seam.module.tds.tds) == 1


def test_outside_vmx_operation_a_crash_says_nothing() -> None:
    """With KVM owning VMXON and gone, SEAMCALL faults (#UD): a software code, which is not logged."""
    machine = Stepped("clear-current-vmcs", cpus=1, vmxon_owner="kvm")
    machine.run(kvm_exit)
    assert crashed(machine) == []
    assert machine.events("log") == []
