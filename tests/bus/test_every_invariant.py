"""Every invariant: a history in which it is put to the test and holds, one that differs in a detail and breaks it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from history import INFO, INSTALL, Run

from bus.events import NONE
from bus.invariants import INVARIANTS
from bus.ladder import COLUMNS, LINES

V = 0x12000
SHUTDOWN, UPDATE, SYS_INIT, SYS_RD = 52, 53, 33, 34
EBUSY = -16
ERROR = "firmware/tdx_module/error"
NODE = "devices/faux/tdx_host/firmware/tdx_module/data"

Case = Callable[[bool], Run]
CASES: dict[str, Case] = {}


def case(invariant: str) -> Callable[[Case], Case]:
    """A history that keeps the invariant, or, with `bad`, breaks it."""

    def note(make: Case) -> Case:
        CASES[invariant] = make
        return make

    return note


# VMCSs


def loaded() -> Run:
    """V is active, tracked and launched on CPU 0, and put."""
    return Run().cpu(0).vmclear(V, "alloc").cpu_store(V, NONE).track(V, 0).enter(V, "vmlaunch").put(V)


@case("I1")
def _(bad: bool) -> Run:
    run = loaded()
    return (run if bad else run.cpu(0, "irq", irqs=False).untrack(V)).cpu(1).load(V)


@case("I2")
def _(bad: bool) -> Run:
    run = loaded().cpu(0, "reader").begin(V).seamcall(INFO, lost=V)
    return (run if bad else run.cv(NONE)).end(NONE)


@case("I3")
def _(bad: bool) -> Run:
    run = loaded().cpu(0, "reader").call_none(V).cpu(0)
    return run.vcpu_load(V, skipped=True).vmread("invalid") if bad else run.load(V).enter(V)


@case("I5")
def _(bad: bool) -> Run:
    run = loaded() if not bad else Run(seamret_launch="clear").cpu(0).load(V).enter(V, "vmlaunch").put(V)
    run.cpu(0, "reader").begin(V).seamcall(INFO, lost=V).cv(NONE).end(NONE).cpu(0).load(V)
    return run.enter(V, result="valid:5" if bad else "ok")


@case("I7")
def _(bad: bool) -> Run:
    run = loaded() if bad else loaded().cpu(0, "irq", irqs=False).untrack(V).cpu(0)
    return run.write("vmxoff", active=int(bad), result="ok")


@case("I8")
def _(bad: bool) -> Run:
    run = Run().cpu(0).cpu_store(V, NONE)
    return run.load_as(V, 0) if bad else run.track(V, 0)


@case("I9")
def _(bad: bool) -> Run:
    run = loaded().cpu(0, "irq", irqs=False).cv(NONE)
    return (run if bad else run.vmclear(V)).write("list_del", vmcs=V).cpu_store(V, NONE)


@case("I10")
def _(bad: bool) -> Run:
    run = loaded() if bad else loaded().cpu(0, "irq", irqs=False).untrack(V)
    return run.cpu(0).write("vcpu_destroy", vcpu=0, vmcs=V)


@case("I11")
def _(bad: bool) -> Run:
    run = Run().cpu(0, "reader").begin(V).vmptrst(V).seamcall(INFO, lost=V)
    return run.vmptrld(V + 0x1000 * bad, reason="restore").end(V)


@case("I12")
def _(bad: bool) -> Run:
    return Run().cpu(0, "reader").begin(V).cpu(0, "reader", irqs=bad).vmptrst(V)


@case("I13")
def _(bad: bool) -> Run:
    run = loaded().cpu(0, "reader").begin(V).seamcall(INFO, lost=V)
    return run.cpu(0, "nmi", irqs=False).vmclear(V, "clear" if bad else "emergency")


@case("I14")
def _(bad: bool) -> Run:
    return loaded().wrong_data(V if bad else NONE, "GUEST_RIP" if bad else "td counter")


@case("I15")
def _(bad: bool) -> Run:
    return loaded().cpu(int(bad)).vmclear(V)


@case("I18")
def _(bad: bool) -> Run:
    return Run().cpu(0).write("vmxon", pa=0x9000, result="fault:6" if bad else "ok")


# P-SEAMLDR and locks


def queued() -> Run:
    """CPU 0 asked the lock service before CPU 1."""
    return Run().node("seamldr").queue(0, 1).queue(1, 1)


@case("I19")
def _(bad: bool) -> Run:
    run = Run().node("seamldr").seam_enter(0)
    return (run if bad else run.seam_return(0)).seam_enter(1, (1, 2), (1, 2))


@case("I20")
def _(bad: bool) -> Run:
    return Run().cpu(0, "reader").begin(V).node("seamldr").seam_enter(0, (0, 0) if bad else (1, 2), (1, 2))


@case("I21")
def _(bad: bool) -> Run:
    return Run().node("seamldr").seam_enter(0).seam_enter(1, admitted=0, alive=int(bad))


@case("I22")
def _(bad: bool) -> Run:
    return Run().cpu(0, "nmi" if bad else "reader", irqs=False).begin(NONE).seamcall(INFO).end(NONE)


@case("I23")
def _(bad: bool) -> Run:
    return Run(enforce_gate="on").cpu(0, "kworker").seamcall(INSTALL if bad else INFO)


@case("I24")
def _(bad: bool) -> Run:
    return queued().grant(1, 1, 1) if bad else queued().grant(0, 1, 1).release(0, 1).grant(1, 1, 2)


@case("I25")
def _(bad: bool) -> Run:
    run = Run().cpu(0, "reader").lock_request(1).lock_hold(1, 1)
    return (run if bad else run.lock_drop(1)).csd_lock(1, 7).csd_done(7)


@case("I26")
def _(bad: bool) -> Run:
    return Run().cpu(0, irqs=not bad).csd_lock(1, 7).csd_done(7)


@case("I28")
def _(bad: bool) -> Run:
    run = Run().cpu(0, "kworker").seamcall(SYS_RD, status=0 if bad else 0x8000_0203_0000_0000)
    return run.seamcall(SYS_RD, attempt=2)


@case("I50")
def _(bad: bool) -> Run:
    run = Run().cpu(1).lock_request(1).lock_hold(1, 1).cpu(0).lock_request(1)
    return (run if bad else run.cpu(1).lock_drop(1).cpu(0).lock_hold(1, 2)).finish()


@case("I57")
def _(bad: bool) -> Run:
    return queued().grant(0, 1, 5).release(0, 5).grant(1, 1, 5 + (not bad))


@case("I60")
def _(bad: bool) -> Run:
    run = Run().cpu(0, "reader").begin(NONE)
    return run.write("strategy_error", error="returned None", where="idea.py:9") if bad else run.end(NONE)


# Updates


def begun() -> Run:
    """An update of two CPUs has begun."""
    return Run().cpu(0, "kworker").update_begin()


def without_module() -> Run:
    """In an update: the old module is shut down, the new one is not there yet."""
    return begun().cpu(0, "stopper", irqs=False).seamcall(SHUTDOWN)


def flag(run: Run, initialized: int) -> Run:
    """The kernel says whether TDX is initialized."""
    return run.cpu(0, "stopper").write("module_init_flag", initialized=initialized, version="1.5.09")


def td_enter(run: Run, cpu: int, status: int = 0) -> Run:
    """TDH.VP.ENTER has returned."""
    return run.cpu(cpu, "td0").write("td_enter", vcpu=3, td=0, status=status, counter=1)


@case("I31")
def _(bad: bool) -> Run:
    run = begun().cpu(0, "stopper").ack("SHUTDOWN")
    return (run if bad else run.cpu(1, "stopper").ack("SHUTDOWN")).advance("CPU_INSTALL")


@case("I32")
def _(bad: bool) -> Run:
    run = begun().stage("SHUTDOWN", "CPU_INSTALL").cpu(0, "stopper", irqs=False)
    return run.enter_state("CPU_INIT" if bad else "CPU_INSTALL")


@case("I33")
def _(bad: bool) -> Run:
    return begun().cpu(int(bad), "stopper").seamcall(SHUTDOWN)


@case("I34")
def _(bad: bool) -> Run:
    return without_module().cpu(1, "vcpu0").seamcall(SYS_RD if bad else SYS_INIT)


@case("I35")
def _(bad: bool) -> Run:
    return begun().cpu(0, "stopper").seamcall(INSTALL).cpu(int(not bad), "stopper").seamcall(INSTALL)


@case("I36")
def _(bad: bool) -> Run:
    return begun().cpu(1, "stopper", irqs=bad).enter_state("SHUTDOWN")


@case("I37")
def _(bad: bool) -> Run:
    run = begun() if bad else begun().update_end(-5)
    return run.cpu(1, "idle").write("cpu_offline")


@case("I38")
def _(bad: bool) -> Run:
    run = without_module() if bad else flag(without_module(), 0)
    return run.cpu(0, "kworker").update_end(-5)


@case("I40")
def _(bad: bool) -> Run:
    run = Run().cpu(0, "kworker").write("admin_begin", request=1, kind="install")
    return (run.seamcall(SYS_RD) if bad else run).write("update_refused", errno=-22, why="no")


@case("I41")
def _(bad: bool) -> Run:
    return td_enter(flag(flag(Run(), 0), 1), 1, 0xC000_0608_0000_0000 if bad else 77)


@case("I43")
def _(bad: bool) -> Run:
    run = td_enter(Run(), 0)
    return td_enter(run if bad else run.cpu(0, "irq").write("td_flush", vcpu=3, status=0), 1)


@case("I52")
def _(bad: bool) -> Run:
    run = begun().cpu(0, "stopper", irqs=False).ack("SHUTDOWN", ret=-5)
    return (run if bad else run.update_end(-5)).finish()


@case("I56")
def _(bad: bool) -> Run:
    run = Run().cpu(0, "kworker").write("admin_begin", request=7, kind="offline")
    return (run if bad else run.write("admin_end", request=7, kind="offline", errno=0, text="")).finish()


@case("I61")
def _(bad: bool) -> Run:
    mrtd = ("cd" if bad else "ab") * 48
    return flag(Run(), 1).node("kvm").write("td_measured", td=2, mrtd=mrtd, expected="ab" * 48)


# The user's interface


@case("I39")
def _(bad: bool) -> Run:
    return flag(Run(), 1).read("version", "1.5.08" if bad else "1.5.09")


@case("I42")
def _(bad: bool) -> Run:
    run = Run().request(1, "read_version").info(1, 10).request(2, "read_version")
    return run.info(2, 9 if bad else 10)


@case("I45")
def _(bad: bool) -> Run:
    return Run().upload("transferring").upload("preparing" if bad else "programming")


@case("I46")
def _(bad: bool) -> Run:
    return Run().upload("transferring").read(ERROR, "", errno=0 if bad else EBUSY)


@case("I47")
def _(bad: bool) -> Run:
    return Run().upload("transferring").write("sysfs_write", path=NODE, value="", errno=0 if bad else EBUSY)


@case("I48")
def _(bad: bool) -> Run:
    return Run().node("kvm").write("sysfs_tree", sysinfo=1, features0=2, erratum=int(bad), files=[NODE])


# Interrupts, cross-calls, tasks, watchdogs


@case("I51")
def _(bad: bool) -> Run:
    run = Run().cpu(0).csd_lock(1, 7)
    return (run if bad else run.cpu(1, "irq").csd_run(0, 7).cpu(0).csd_done(7)).finish()


@case("I53")
def _(bad: bool) -> Run:
    run = Run().cpu(0, irqs=False).lock_request(1).lock_hold(1, 1)
    run = run.lock_request(2) if bad else run.lock_drop(1)
    text = "Watchdog detected hard LOCKUP on cpu 0"
    return run.cpu(1).write("hard_lockup", cpu=0, stuck_s=10.0, text=text).finish(not bad)


@case("I58")
def _(bad: bool) -> Run:
    run = Run().cpu(0).ipi_send(1, 5)
    return (run if bad else run.cpu(1).ipi_deliver(0, 5)).later().finish()


@case("I59")
def _(bad: bool) -> Run:
    run = Run().cpu(0).csd_lock(1, 7).cpu(1, "irq").csd_run(0, 7)
    return (run.csd_run(0, 7) if bad else run).cpu(0).csd_done(7).finish()


@case("I62")
def _(bad: bool) -> Run:
    run = Run().cpu(0, "idle").write("task_enqueue", task=3)
    return (run if bad else run.write("task_dequeue", task=3, to=1)).cpu(1, "idle").write("task_enqueue", task=3)


# What is checked


def test_no_invariant_is_without_a_case() -> None:
    """Whoever adds an invariant adds a case, and each case is of an invariant."""
    assert CASES.keys() == INVARIANTS.keys()


@pytest.mark.parametrize("id", INVARIANTS)
def test_a_history_that_puts_it_to_the_test_keeps_it(id: str) -> None:
    """It holds where what it is judged by has happened; those judged at the end alone see a wait that ends."""
    run = CASES[id](False)
    happened = {record["event"] for record in run.records}
    handled = set(INVARIANTS[id]().handlers()) - {"machine_begin", "strategy_error"}
    assert happened & handled or not handled
    assert id not in run.violated()


@pytest.mark.parametrize("id", INVARIANTS)
def test_a_history_that_breaks_it_is_told(id: str) -> None:
    """It is violated; its ladder has at least one event, the last of which is the effect, and fits a mail."""
    run = CASES[id](True)
    assert id in run.violated()
    lines = run.story(id).splitlines()
    assert run.rungs(id) and "X" in run.rungs(id)[-1]
    assert len(lines) <= LINES and max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize("id", INVARIANTS)
def test_it_says_what_it_is(id: str) -> None:
    """Each has a sentence, says where the rule comes from, and which strategy or fault breaks it."""
    invariant = INVARIANTS[id]
    assert invariant.id == id and invariant.slug == invariant.slug.lower()
    assert invariant.sentence.endswith(".") and len(invariant.source) > 5 and len(invariant.broken_by) > 5
    assert {*invariant.consequence_of} <= INVARIANTS.keys() - {id}
