"""docs/knobs.md, from the knobs of `kvm.compose`: `python -m kvm.docs` writes it."""

from __future__ import annotations

import msgspec

from bus.docs import DOCS, page, table
from kvm.compose import CHOICES, Knobs

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
    "seamdb_size": ("How many modules may be installed, 1 to 1,048,576: entries of the SEAMDB of P-SEAMLDR.", {}),
    "fms": ("CPUID.1.EAX (family, model, stepping); an image has a table of those that it is for.", {}),
    "seamldr_profile": (
        "Which P-SEAMLDR.",
        {"P15": "as tdx-loader 1.5.02", "P20": "the same, but it takes the manifests of 2.0 modules"},
    ),
    "module_profile": (
        "Which TDX module is made for the boot and for the updates.",
        {"A": "handoff version 0", "B": "handoff version 1, with UPDATE_COMPATIBILITY"},
    ),
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


def main() -> None:
    """Write the page."""
    (DOCS / "knobs.md").write_text(knobs_page())


if __name__ == "__main__":
    main()
