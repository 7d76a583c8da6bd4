"""TDs that KVM builds on stepped machines, what an update does to a build, and how a build ends."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hazards import initialized, install, prefer, warnings
from stepping import Stepped
from tds import (
    PARAMS,
    TASK,
    build,
    build_steps,
    destroy,
    expected_mrtd,
    image,
    run_td,
    update,
)

from cpu.cpu import Cpu
from cpu.layout import TDX_STATE, td_page
from kvm.td_build import td_measurement, tdx_td_init
from kvm.tdx import next_chain
from kvm.vcpu import TdState, kvm_tdx_of, td_vcpu_of
from seamldr.tdx_call import Hooks
from seamldr.tdx_module import TdxModule

EINVAL, EIO, EAGAIN, EBUSY, ENODEV, ENOSPC = 22, 5, 11, 16, 19, 28
STATUS_SHUTDOWN = 0xC000_0506_0000_0000
B = {"module_profile": "B"}


def module_of(machine: Stepped) -> TdxModule:
    """The module that is there."""
    assert machine.seam.module is not None
    return machine.seam.module


def word(machine: Stepped, address: int) -> int:
    """A word of shared memory."""
    return machine.memory.load(address)[0]


def measurement(machine: Stepped, td: int = 0) -> bytes:
    """MRTD as the module tells it."""
    mrtd: bytes = machine.run(lambda cpu: td_measurement(cpu, td))
    return mrtd


def errors(machine: Stepped) -> list[tuple[str, int]]:
    """SEAMCALLs of builds that failed."""
    return [(record["leaf"], record["status"]) for record in machine.events("td_error")]


def ledger(machine: Stepped) -> tuple[object, ...]:
    """What a TD takes: pages, key ids, and what the kernel counts of them."""
    module = module_of(machine)
    return (
        {tdr: set(pages.entries) for tdr, pages in module.tds.pages.items()},
        set(module.state.system.kot),
        module.state.system.td_build_count,
        word(machine, TDX_STATE.guest_keyid_pool),
        word(machine, TDX_STATE.nr_keyids),
    )


# Build, run, end


@pytest.mark.parametrize("profile", ["A", "B"])
def test_a_td_is_built_runs_and_moves(profile: str) -> None:
    """It is measured as its pages are, its guest reports what KVM expects, and a flush IPI takes it to another CPU."""
    machine = Stepped("clear-current-vmcs", cpus=2, tds=1, module_profile=profile)
    build(machine)
    assert measurement(machine) == expected_mrtd()
    for cpu in (1, 0, 0, 1):
        assert machine.run(run_td(), cpu) is True
    vcpu = td_vcpu_of(TASK)
    chain = [0] * 4
    for counter in range(1, 17):
        chain = next_chain(chain, counter)
    assert word(machine, vcpu.counter) == 16
    assert [word(machine, vcpu.chain + 32 * at) for at in range(4)] == chain
    assert [(r["node"], r["status"]) for r in machine.events("td_flush")] == [("cpu0", 0), ("cpu1", 0), ("cpu0", 0)]
    assert machine.events("wrong_data", "td_error", "warn", "vcpu_dead") == []


def test_the_end_of_a_td_gives_everything_back() -> None:
    """Pages, key id and counts are as before the build, and the same key id and pages make the next TD."""
    machine = Stepped("clear-current-vmcs", cpus=2, tds=2, **B)
    before = ledger(machine)
    for cpu in (0, 1):
        build(machine, cpu=cpu)
        assert ledger(machine) != before
        assert machine.run(run_td(), cpu) is True
        assert machine.run(destroy(), 1 - cpu) is True
        assert ledger(machine) == before
    assert errors(machine) == []
    assert word(machine, kvm_tdx_of(0).state) == TdState.UNINITIALIZED


def test_two_tds_are_two() -> None:
    """Each has its key id, its pages and its guest's own state; the end of one leaves the other alone."""
    machine = Stepped("clear-current-vmcs", cpus=2, **B)
    build(machine, 0, cpu=0)
    build(machine, 1, cpu=1)
    assert len({word(machine, kvm_tdx_of(td).hkid) for td in (0, 1)}) == 2
    assert machine.run(run_td(0), 0) is True
    assert machine.run(destroy(0), 1) is True
    assert machine.run(run_td(1), 0) is True
    assert measurement(machine, 1) == expected_mrtd()
    assert machine.events("wrong_data") == []


def test_commands_in_a_wrong_order_are_refused() -> None:
    """Each ioctl fits one state of the TD; a second vCPU is not asked for. Nothing is harmed."""
    machine = Stepped("clear-current-vmcs", **B)
    steps = build_steps(machine)
    for name in ("vcpu", "memory", "finalize"):
        assert machine.run(steps[name]) == -EINVAL
    for name in ("init", "vcpu"):
        assert machine.run(steps[name]) == 0
        assert machine.run(steps[name]) == -EINVAL
    for name in ("memory", "finalize"):
        assert machine.run(steps[name]) == 0
    assert [machine.run(steps[name]) for name in ("init", "memory", "finalize")] == [-EINVAL] * 3
    assert measurement(machine) == expected_mrtd()
    assert errors(machine) == []


class Scarce(Hooks):
    """Hardware that is out of something for so many times."""

    def __init__(self, dry: int = 0, busy_engine: int = 0, interrupts: int = 0) -> None:
        self.dry, self.busy_engine, self.interrupts = dry, busy_engine, interrupts

    def entropy(self, lp: int) -> bool:
        self.dry -= 1
        return self.dry < 0

    def key_engine_ready(self, lp: int) -> bool:
        self.busy_engine -= 1
        return self.busy_engine < 0

    def interrupt_pending(self, lp: int) -> bool:
        self.interrupts -= 1
        return self.interrupts >= 0


@pytest.mark.parametrize(
    ("hooks", "errno", "error"),
    [
        (Scarce(dry=9), 0, []),
        (Scarce(dry=10), -EAGAIN, []),
        (Scarce(busy_engine=1), -EIO, [("TDH.MNG.KEY.CONFIG", 0x8000_0200_0000_00BB)]),
    ],
    ids=["entropy comes in time", "no entropy", "key engine busy"],
)
def test_what_is_scarce_while_a_td_begins(hooks: Hooks, errno: int, error: list[Any]) -> None:
    """Ten tries for entropy, then -EAGAIN; a busy key engine is -EIO. What was begun is taken back."""
    machine = Stepped("clear-current-vmcs", **B)
    before = ledger(machine)
    module_of(machine).hooks = hooks
    assert machine.run(build_steps(machine)["init"]) == errno
    assert errors(machine) == error
    if errno:
        assert ledger(machine) == before
    module_of(machine).hooks = Hooks()
    assert machine.run(build_steps(machine)["init"]) == (0 if errno else -EINVAL)


def test_no_entropy_for_the_key_is_asked_for_again_at_once() -> None:
    """TDX_KEY_GENERATION_FAILED goes away; it never reaches user space."""
    machine = Stepped("clear-current-vmcs", **B)

    class KeyOnly(Hooks):
        def __init__(self) -> None:
            self.calls = 0

        def entropy(self, lp: int) -> bool:
            self.calls += 1
            return self.calls not in (2, 3, 4)

    module_of(machine).hooks = KeyOnly()
    assert machine.run(build_steps(machine)["init"]) == 0
    statuses = [r["status"] for r in machine.events("seamcall_return") if r["name"] == "TDH.MNG.KEY.CONFIG"]
    assert statuses == [0x8000_0800_0000_0000] * 3 + [0]


def test_key_ids_run_out() -> None:
    """Without a free key id there is no TD: -ENOSPC, before any SEAMCALL."""
    machine = Stepped("clear-current-vmcs", **B)
    machine.memory.store(TDX_STATE.nr_guest_keyids, 1, 0)
    build(machine)
    machine.machine.records.clear()
    assert machine.run(lambda cpu: tdx_td_init(cpu, 1, PARAMS)) == -ENOSPC
    assert machine.events("seamcall_enter") == []


def test_an_interrupted_cache_write_back_is_resumed() -> None:
    """A host interrupt stops every call of TDH.PHYMEM.CACHE.WB; resumed, and not begun anew, it comes to its end."""
    machine = Stepped("clear-current-vmcs", **B)
    before = ledger(machine)
    build(machine)
    module_of(machine).hooks = Scarce(interrupts=100)
    assert machine.run(destroy()) is True
    statuses = [r["status"] for r in machine.events("seamcall_return") if r["name"] == "TDH.PHYMEM.CACHE.WB"]
    assert statuses == [0x8000_0003_0000_0000] * 3 + [0]
    assert ledger(machine) == before


def test_a_busy_td_is_busy_for_user_space() -> None:
    """FINALIZE and PAGE.ADD of a TD whose TDR another LP holds are -EBUSY; FINALIZE works when it lets go."""
    machine = Stepped("clear-current-vmcs", **B)
    steps = build_steps(machine)
    for name in ("init", "vcpu"):
        assert machine.run(steps[name]) == 0
    lock = module_of(machine).tds.tds[td_page(0, 0)].page_lock
    lock.try_shared(7)
    assert [machine.run(steps[name]) for name in ("finalize", "memory")] == [-EBUSY] * 2
    lock.release(7)
    assert machine.run(steps["finalize"]) == 0
    assert errors(machine) == []


def test_a_vcpu_that_was_never_initialized_is_not_flushed() -> None:
    """Its creation failed; at the end of the TD it leaves its CPU without TDH.VP.FLUSH, and nothing leaks."""
    machine = Stepped("clear-current-vmcs", cpus=2, **B)
    before = ledger(machine)
    steps = build_steps(machine)
    assert machine.run(steps["init"]) == 0
    lock = module_of(machine).tds.tds[td_page(0, 0)].page_lock
    lock.try_exclusive(7)
    assert machine.run(steps["vcpu"], 1) == -EIO
    lock.release(7)
    assert errors(machine) == [("TDH.VP.CREATE", 0x8000_0200_0000_0002)]
    assert machine.run(destroy(), 0) is True
    assert machine.events("td_flush", "warn") == []
    assert ledger(machine) == before


# Build versus update


def build_until_call(machine: Stepped, number: int) -> None:
    """Step, CPU 1 first, until so many SEAMCALLs have returned."""
    for _ in range(20_000):
        if machine.count("seamcall_return") >= number:
            return
        machine.machine.step(prefer(1)(machine.machine.ready()))
    raise AssertionError("it never happens")


@pytest.mark.parametrize("at", [1, 2, 8, 9, 12, 16, 19, 20, 21, 30, 36])
@pytest.mark.parametrize("profile", ["A", "B"])
def test_an_update_may_come_between_any_two_calls_of_a_build(profile: str, at: int) -> None:
    """With the same crypto library the build goes on where it was, to the right measurement and a TD that runs."""
    machine = Stepped("clear-current-vmcs", cpus=2, module_profile=profile)
    machine.machine.records.clear()
    steps = build_steps(machine)

    async def whole(cpu: Cpu) -> list[int]:
        return [await step(cpu) for step in steps.values()]

    thread = machine.start(whole, 1, "qemu")
    build_until_call(machine, at)
    assert thread.result is None
    worker = machine.start(install(machine, image("1.5.09", profile)), 0)  # type: ignore[arg-type]
    machine.machine.run()
    assert (worker.result, thread.result) == (0, [0, 0, 0, 0])
    (begun,) = machine.events("update_begin")
    before = [r["name"] for r in machine.events("seamcall_return") if r["ts"] <= begun["ts"]]
    assert len(before) in (at, at + 1)
    assert measurement(machine) == expected_mrtd()
    assert machine.run(run_td(), 0) is True
    assert machine.events("wrong_data", "td_error", "vcpu_dead") == []


IN_BUILD = ["init", "vcpu", "memory"]
"""Steps after which a TD is in build."""


def until(machine: Stepped, last: str, td: int = 0) -> None:
    """The steps of a build up to this one."""
    for name, step in build_steps(machine, td).items():
        assert machine.run(step, 1) == 0
        if name == last:
            return


def rest(machine: Stepped, last: str, td: int = 0) -> list[int]:
    """What the steps after this one return."""
    steps = build_steps(machine, td)
    names = list(steps)
    return [machine.run(steps[name], 1) for name in names[names.index(last) + 1 :]]


@pytest.mark.parametrize("last", IN_BUILD)
def test_detection_fails_the_build_that_an_update_has_cut(last: str) -> None:
    """A module with another crypto library, told to notice, refuses MR.FINALIZE; the next TD is built and runs."""
    machine = Stepped("clear-current-vmcs", cpus=2, tds=1, detect_compat_sensitive="if_supported", **B)
    before = ledger(machine)
    until(machine, last)
    assert update(machine, image("1.5.09", crypto=2)) == 0
    assert rest(machine, last)[-1] == -EIO
    assert errors(machine) == [("TDH.MR.FINALIZE", 0xC000_0622_0000_0000)]
    assert rest(machine, "init") == [-EIO] * 3, "a VM with a bug is good for nothing else"
    assert machine.run(destroy(), 0) is True
    assert ledger(machine) == before
    build(machine)
    assert measurement(machine) == expected_mrtd()
    assert machine.run(run_td(), 0) is True


@pytest.mark.parametrize("last", ["vcpu", "memory"])
def test_without_detection_the_measurement_is_silently_wrong(last: str) -> None:
    """Merged Linux: the build goes on, the TD runs, but it is not measured as its pages are."""
    machine = Stepped("clear-current-vmcs", cpus=2, **B)
    until(machine, last)
    assert update(machine, image("1.5.09", crypto=2)) == 0
    assert set(rest(machine, last)) == {0}
    assert measurement(machine) not in (b"", expected_mrtd())
    assert machine.run(run_td(), 0) is True
    assert machine.events("td_error", "log", "warn") == []


def test_detection_lets_pass_what_is_not_in_build() -> None:
    """TDs that are finished, and one that has not begun to measure, come through the same update unharmed."""
    machine = Stepped("clear-current-vmcs", cpus=2, detect_compat_sensitive="if_supported", **B)
    build(machine, 0)
    assert update(machine, image("1.5.09", crypto=2)) == 0
    build(machine, 1)
    for td in (0, 1):
        assert measurement(machine, td) == expected_mrtd()
        assert machine.run(run_td(td), td) is True
    assert errors(machine) == []


@pytest.mark.parametrize("last", IN_BUILD)
@pytest.mark.parametrize("knob", ["if_supported", "always"])
def test_avoidance_refuses_the_update_and_nothing_is_lost(knob: str, last: str) -> None:
    """SHUTDOWN says how many TDs are in build: -EBUSY; module, build and TDs go on; then the update succeeds."""
    machine = Stepped("clear-current-vmcs", cpus=2, tds=1, avoid_compat_sensitive=knob, **B)
    build(machine, 1)
    until(machine, last)
    before = ledger(machine)
    assert update(machine, image("1.5.09", crypto=2)) == -EBUSY
    assert [r["status"] for r in machine.events("seamcall_return") if r["name"] == "TDH.SYS.SHUTDOWN"] == [
        0x8000_0512_0001_0000
    ]
    assert (ledger(machine), initialized(machine)) == (before, 1)
    assert module_of(machine).identity.version == "1.5.08"
    assert machine.run(run_td(1), 0) is True
    assert set(rest(machine, last)) == {0}
    assert measurement(machine) == expected_mrtd()
    assert update(machine, image("1.5.09", crypto=2)) == 0
    for td in (0, 1):
        assert machine.run(run_td(td), 1) is True
    assert machine.events("td_error", "wrong_data") == []


def test_two_builds_count_two() -> None:
    """The count in the status is that of the TDs in build; each that ends, either way, takes one off."""
    machine = Stepped("clear-current-vmcs", cpus=2, avoid_compat_sensitive="always", **B)
    until(machine, "init", 0)
    until(machine, "vcpu", 1)

    def shutdown() -> int:
        errno = update(machine, image("1.5.09"))
        statuses = [r["status"] for r in machine.events("seamcall_return") if r["name"] == "TDH.SYS.SHUTDOWN"]
        return int(statuses[-1]) if errno == -EBUSY else errno

    assert shutdown() == 0x8000_0512_0002_0000
    assert machine.run(destroy(0), 0) is True
    assert shutdown() == 0x8000_0512_0001_0000
    assert rest(machine, "vcpu", 1) == [0, 0]
    assert shutdown() == 0


def test_a_module_that_cannot_avoid_refuses_every_update_if_always_asked() -> None:
    """Profile A takes bit 16 for a bad handoff version: -EIO, harmlessly; asked only if supported, it updates."""
    for knob, errno in (("always", -EIO), ("if_supported", 0)):
        machine = Stepped("clear-current-vmcs", cpus=2, avoid_compat_sensitive=knob)
        until(machine, "vcpu")
        assert update(machine, image("1.5.09", "A")) == errno
        assert rest(machine, "vcpu") == [0, 0]
        assert measurement(machine) == expected_mrtd()
        assert initialized(machine) == 1


# The documented loss


def test_a_build_that_the_loss_of_the_module_cuts() -> None:
    """After an update that failed for good every step fails, its key id and pages are leaked, and that is logged."""
    machine = Stepped("clear-current-vmcs", cpus=2, seamdb_size=1, **B)
    until(machine, "vcpu")
    assert update(machine, image("1.5.09")) == -EIO
    assert rest(machine, "vcpu") == [-EIO, -EIO]
    assert machine.run(destroy(), 1) is False
    assert errors(machine) == [
        ("TDH.MEM.SEPT.ADD", STATUS_SHUTDOWN),
        ("TDH.MNG.VPFLUSHDONE", STATUS_SHUTDOWN),
    ]
    hkid = word(machine, kvm_tdx_of(0).hkid)
    assert f"kvm_intel: HKID {hkid} is leaked." in [r["text"] for r in machine.events("log")]
    assert (word(machine, TDX_STATE.guest_keyid_pool), word(machine, TDX_STATE.nr_keyids)) == (1, 1)
    assert machine.run(build_steps(machine, 1)["init"], 0) == -EIO
    assert errors(machine)[-1] == ("TDH.MNG.CREATE", STATUS_SHUTDOWN)
    assert word(machine, TDX_STATE.nr_keyids) == 1, "what was never the module's is not leaked"


# Everything at once


def test_builds_runs_and_updates_in_any_order() -> None:
    """Twenty schedules: two builds, a TD that runs, two updates on three CPUs; nothing is lost, wrong or refused."""
    seen: Counter[str] = Counter()
    for seed in range(20):
        random = Random(seed)
        machine = Stepped("clear-current-vmcs", cpus=3, **B)
        build(machine, 2)
        machine.machine.records.clear()
        threads = [machine.start(_life(machine, td), td, f"qemu{td}") for td in (0, 1)]
        threads.append(machine.start(_runs(5), 2, "td2"))
        worker = machine.start(_updates(machine), random.randrange(3), "kworker")
        machine.machine.run(random.choice)
        assert [thread.result for thread in threads] == [True] * 3
        assert worker.result == [0, 0]
        assert machine.events("wrong_data", "td_error", "vcpu_dead") == []
        assert warnings(machine) == []
        for update_begin in machine.events("update_begin"):
            before = {r["node"] for r in machine.events("seamcall_return") if r["ts"] < update_begin["ts"]}
            seen["cut"] += len(before & {"cpu0", "cpu1"})
    assert seen["cut"] > 20


def _life(machine: Stepped, td: int) -> Any:
    async def body(cpu: Cpu) -> bool:
        for step in build_steps(machine, td).values():
            if await step(cpu):
                return False
        good: bool = await td_measurement(cpu, td) == expected_mrtd() and await run_td(td)(cpu)
        return good and bool(await destroy(td)(cpu))

    return body


def _runs(times: int) -> Any:
    async def body(cpu: Cpu) -> bool:
        return all([await run_td(2)(cpu) for _ in range(times)])

    return body


def _updates(machine: Stepped) -> Any:
    async def body(cpu: Cpu) -> list[int]:
        return [await install(machine, image(version))(cpu) for version in ("1.5.09", "1.5.10")]

    return body
