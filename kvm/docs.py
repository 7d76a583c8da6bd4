"""docs/knobs.md and docs/points.md, from `kvm.compose` and `bus.points`: `python -m kvm.docs` writes them."""

from __future__ import annotations

import msgspec

from bus.docs import DOCS, page, table
from bus.points import POINTS
from bus.spec import SEAMLDR
from kvm.compose import CHOICES, Knobs
from kvm.hazard_table import HAZARDS
from kvm.plan import explained_at

HEAD = """# Knobs

A knob is what the architecture leaves open, what processors differ in, or what the kernel could do otherwise. Give
`--knob NAME=VALUE`, as often as you like, to `run` and `compare`. Every summary repeats the values under `knobs`, and
says under `assumptions` what the verdict takes for granted about the processor.

    seamlab run --strategy none --knob vmx_basic_bit60=1
    seamlab compare --strategies decoy,vmclear-local --knob seamret_launch=clear --knob seamret_scope=all_active_on_lp

A knob that does not exist, or a value that it cannot have, is one line on stderr and exit status 2.
"""

MEANINGS: dict[str, tuple[str, dict[str, str]]] = {
    "seamret_launch": (
        "What SEAMRET from P-SEAMLDR does, besides taking the current-VMCS pointer, on a CPU with the erratum.",
        {
            "preserve": "the VMCS is written back and stays active and launched",
            "clear": "its launch state becomes clear and it is no longer active on the CPU, as after VMCLEAR",
        },
    ),
    "seamret_scope": (
        "Which VMCSs `seamret_launch=clear` hits.",
        {"current_only": "the current one", "all_active_on_lp": "every VMCS that is active on the CPU"},
    ),
    "vmx_basic_bit60": (
        "Bit 60 of IA32_VMX_BASIC.",
        {"0": "the CPU has the erratum", "1": "SEAMRET from P-SEAMLDR keeps the current VMCS"},
    ),
    "nmi_inject": (
        "Where in a P-SEAMLDR call, or in a guest's run, the NMI of a performance counter arrives.",
        {
            "off": "nowhere",
            "sampled": "at every point below, each time that it has been passed a fixed number of times",
            "in-guest": "while the guest runs",
            "before-vmptrst": "before a strategy saves the current VMCS",
            "after-vmptrst": "after it has",
            "in-seam": "while the CPU is in P-SEAMLDR; the NMI waits for SEAMRET",
            "after-seamret": "after SEAMRET, before the strategy repairs anything",
            "after-repair": "after the strategy's repair",
        },
    ),
    "call_context": (
        "Who reads `seamldr_version`, and so calls P-SEAMLDR.",
        {
            "task": "a kernel thread, as in Linux",
            "irq": "the handler of an interrupt that lands on top of whatever runs, a loaded vCPU too; not Linux",
            "nmi": "the NMI handler; not Linux",
        },
    ),
    "preemption": (
        "Preemption model of the kernel.",
        {
            "none": "a thread of the kernel keeps the CPU until it sleeps, ends or returns to user space",
            "voluntary": "as `none`, and it also gives way where Linux has `might_sleep()`",
            "full": "preempted between any two operations, if the preempt count is 0 and interrupts are on",
            "lazy": "only the stopper preempts so; other threads wait as with `none`",
            "rt": "as `full`, and a plain spinlock is a lock that sleeps; a raw one, such as seamldr_lock, is not",
        },
    ),
    "vmxon_owner": (
        "Who executes VMXON and VMXOFF.",
        {
            "core": "the core kernel, which counts the users of VMX operation; a TDX host always stays in it",
            "kvm": "KVM alone, as before that series: without KVM no SEAMCALL is possible",
        },
    ),
    "offline_irqs": (
        "Interrupts in KVM's CPU-offline callback, which clears every VMCS of the CPU.",
        {"on": "on, as in Linux: a clear IPI may come in the middle", "off": "off"},
    ),
    "enforce_gate": (
        "Whether the kernel refuses module updates on a CPU with the erratum.",
        {"auto": "only with the strategy `refuse-on-erratum`", "on": "yes", "off": "no"},
    ),
    "avoid_compat_sensitive": (
        "Whether TDH.SYS.SHUTDOWN is asked to refuse while a TD is being built.",
        {
            "off": "no, as merged",
            "if_supported": "if TDX_FEATURES0 of the running module has UPDATE_COMPATIBILITY (bit 47)",
            "always": "yes; a module that does not know the flag refuses every update",
        },
    ),
    "detect_compat_sensitive": (
        "Whether TDH.SYS.UPDATE is asked to fail the build of a TD whose measurement the new module cannot go on with.",
        {
            "off": "no, as merged: the measurement of such a TD is silently wrong",
            "if_supported": "if TDX_FEATURES0, as read at boot, has UPDATE_COMPATIBILITY (bit 47); no Linux did this",
        },
    ),
    "seamdb_size": ("How many modules may be installed, 1 to 1,048,576: entries of the SEAMDB of P-SEAMLDR.", {}),
    "fms": ("CPUID.1.EAX (family, model, stepping); an image has a table of those that it is for.", {}),
    "seamldr_profile": (
        "Which P-SEAMLDR. The first one, P10, is no choice: it keeps no handoff data, so no module could be updated.",
        {
            "P15": "as tdx-loader 1.5.02; the machine starts with a 1.5 module",
            "P20": "the same, but it takes the manifests of 2.0 modules, and the machine starts with one",
        },
    ),
    "module_profile": (
        "Which TDX module is made for the boot and for the updates.",
        {"A": "handoff version 0", "B": "handoff version 1, with UPDATE_COMPATIBILITY"},
    ),
    "watchdog_thresh": (
        "Seconds after which the watchdog reports a hard lockup, after twice that a soft one: 0 to 60, 0 is off. "
        "More than 64 CPUs get more time, in proportion.",
        {},
    ),
    "lock_policy": (
        "What others do when a CPU dies that holds a lock or owes them an answer.",
        {
            "release": "its lock goes to the next waiter, under a higher token; a wait for its answer ends with -ENXIO",
            "hang": "nobody gets its lock and a wait for its answer never ends, as in Linux",
            "lease": "as `release`; and a live CPU loses the lock after `lease_ms` if another waits, unless it is in "
            "P-SEAMLDR. If it then calls P-SEAMLDR as the holder, it is halted",
        },
    ),
    "lease_ms": ("With `lock_policy=lease`: milliseconds that a holder may keep the lock while another waits.", {}),
}
"""What each knob means, and each of its values. Every knob and every value must be here."""


def knobs_page() -> str:
    """docs/knobs.md; raises KeyError if a knob or a value has no meaning here."""
    fields = {field.name: field for field in msgspec.structs.fields(Knobs)}
    rows = []
    for name, field in fields.items():
        sentence, values = MEANINGS[name]
        meanings = "<br>".join(f"`{value}`: {values[value]}" for value in CHOICES.get(name, ()))
        default = f"{field.default:#x}" if name == "fms" else f"{field.default}"
        rows.append((f"`{name}`", f"`{default}`", sentence, meanings or "a whole number, hexadecimal with 0x"))
    return page("kvm.docs", HEAD, table(("knob", "default", "what it is", "values"), rows))


POINTS_HEAD = """# Points at which a fault can strike

The `at` of a fault in a [chaos](chaos.md) plan, the `point` of `machine.standing`. The one who sees it stands still
there while the fault strikes. The last column is the allow-list: the [invariants](invariants.md) that may be broken by
a kill at this point without anybody else being to blame. A kill explains no other, and what is not a kill (stop, slow,
offline, links) explains none.
"""


def points_page() -> str:
    """docs/points.md."""
    rows = [("`time`", "After `after_ms` milliseconds of work.", "", ", ".join(explained_at("time")))]
    for name, point in POINTS.items():
        seen_by = "seamldr" if point.seen_by == SEAMLDR else "the CPU"
        rows.append((f"`{name}`", point.sentence, seen_by, ", ".join(explained_at(name))))
    return page("kvm.docs", POINTS_HEAD, table(("at", "when that is", "seen by", "a kill explains"), rows))


HAZARDS_HEAD = """# Hazards

What can go wrong around a P-SEAMLDR call, a module update or a CPU that comes and goes, each as a short history of a
few CPUs that are stepped operation by operation, on the same kernel code, processors and firmware as the live machine:

    $ python -m kvm.hazards H10
    H10 two-callers
      Two CPUs call at the same time.
      To see: the second finds P_SEAMLDR_MUTEX taken: VMfailInvalid, -ENODEV.
      unserialized: bites
          errnos of the two readers: (0, -19)
      ...
      save-restore: held
          errnos of the two readers: (0, 0)

Without arguments all are played, in a few seconds; several may be named, by id or by name. Each is played in several
cases: with what it *bites*, so that its observable is there, and with what *holds* it off. Exit status 0: every case
came out as the table says; 1: one did not; 2: there is no such hazard.

A case names a [strategy](strategies.md), what else it sets ([knobs](knobs.md)), or one of the mistaken ways in
`seamldr/mutants.py`, which can also be run on a live machine:

    seamlab run --strategy seamldr/mutants.py:save_restore_irqs_on

H33's other half, messages that are dropped, doubled or out of order, is what the links between processes mask
([S6](machine.md)). Hazards of processes that are killed or stopped are played by [chaos](chaos.md).
"""


def hazards_page() -> str:
    """docs/hazards.md."""
    rows = []
    for hazard in HAZARDS:
        bites, holds = (
            "<br>".join(f"`{case.label}`" for case in hazard.cases if case.bites is wanted) for wanted in (True, False)
        )
        what = f"{hazard.history}<br>*To see:* {hazard.observable}.<br>*From:* {hazard.source}."
        rows.append((hazard.id, hazard.slug, what, bites, holds))
    return page("kvm.docs", HAZARDS_HEAD, table(("", "name", "what happens", "bites", "is held off by"), rows))


def main() -> None:
    """Write the pages."""
    (DOCS / "hazards.md").write_text(hazards_page())
    (DOCS / "knobs.md").write_text(knobs_page())
    (DOCS / "points.md").write_text(points_page())


if __name__ == "__main__":
    main()
