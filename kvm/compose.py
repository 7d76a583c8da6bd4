"""The kernel of a machine, put together: which code runs on a CPU, with which strategy and knobs."""

from __future__ import annotations

from typing import Any

import msgspec

from cpu.apic import Vector
from cpu.core import NMI_PERIODS, Kernel
from cpu.irq_work import sysvec_irq_work
from cpu.nmi_watchdog import watchdog_hrtimer_fn
from cpu.smp import generic_smp_call_function_single_interrupt, sysvec_reschedule_ipi
from cpu.vmx import VmxConfig
from kvm.emergency import vmx_emergency_disable_virtualization_cpu
from kvm.guest import run_guest
from kvm.hotplug import kvm_disable_virtualization_cpu, kvm_enable_virtualization_cpu, take_cpu_down
from kvm.loaded_vmcs import clear_on_this_cpu, loaded_vmcs_clear_current, vmclear_local_loaded_vmcss
from kvm.perf import default_do_nmi
from kvm.td_build import tdx_do_tdh_mng_key_config
from kvm.td_destroy import smp_func_do_phymem_cache_wb
from kvm.tdx import tdx_flush_vp
from seamldr.strategies import Strategy, find_strategy
from seamldr.update import do_seamldr_install_module

MAXPHYADDR = 46
MAX_LEASE_MS = 3_600_000


class Knobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the architecture leaves open, or the kernel could do otherwise; each a `--knob NAME=VALUE`.

    `seamret_launch` and `seamret_scope`: what SEAMRET from P-SEAMLDR does to VMCSs on a CPU whose IA32_VMX_BASIC has
    bit 60 (`vmx_basic_bit60`) clear. `nmi_inject`: a performance-counter NMI arrives at this point of every P-SEAMLDR
    call (or guest run), or by a fixed count at each of them. `call_context`: who calls P-SEAMLDR to read the version: a
    thread, the handler of an interrupt that lands on what runs, or the NMI handler. `preemption`: the model that the
    kernel is built with. `vmxon_owner`: the core kernel counts users of VMX operation (the VMXON series), or KVM alone
    executes VMXON and VMXOFF (before it). `offline_irqs`: interrupts in KVM's CPU-offline callback. `enforce_gate`: the
    kernel refuses updates on a CPU with the erratum; "auto" is on for the strategy `refuse-on-erratum` alone.
    `avoid_compat_sensitive`: TDH.SYS.SHUTDOWN is asked to refuse while a TD is being built; `detect_compat_sensitive`:
    TDH.SYS.UPDATE is asked to fail the build of such a TD later. `seamdb_size`: modules that may be installed. `fms`:
    CPUID.1.EAX. `seamldr_profile`, `module_profile`: which firmware. `watchdog_thresh`: seconds, 0 for no watchdog.
    `lock_policy`: who gets the lock of a dead holder, and whether a wait for a dead CPU ends; with "lease" a live
    holder loses the lock after `lease_ms` if somebody waits. Only "hang" is Linux.
    """

    seamret_launch: str = "preserve"
    seamret_scope: str = "current_only"
    vmx_basic_bit60: int = 0
    nmi_inject: str = "off"
    call_context: str = "task"
    preemption: str = "full"
    vmxon_owner: str = "core"
    offline_irqs: str = "on"
    enforce_gate: str = "auto"
    avoid_compat_sensitive: str = "off"
    detect_compat_sensitive: str = "off"
    seamdb_size: int = 65536
    fms: int = 0xC06F2
    seamldr_profile: str = "P15"
    module_profile: str = "A"
    watchdog_thresh: int = 10
    lock_policy: str = "release"
    lease_ms: int = 1000


CHOICES: dict[str, tuple[str, ...]] = {
    "seamret_launch": ("preserve", "clear"),
    "seamret_scope": ("current_only", "all_active_on_lp"),
    "vmx_basic_bit60": ("0", "1"),
    "nmi_inject": ("off", "sampled", *NMI_PERIODS),
    "call_context": ("task", "irq", "nmi"),
    "preemption": ("none", "voluntary", "full", "lazy", "rt"),
    "vmxon_owner": ("core", "kvm"),
    "offline_irqs": ("on", "off"),
    "enforce_gate": ("auto", "on", "off"),
    "avoid_compat_sensitive": ("off", "if_supported", "always"),
    "detect_compat_sensitive": ("off", "if_supported"),
    "seamldr_profile": ("P15", "P20"),
    "module_profile": ("A", "B"),
    "lock_policy": ("release", "hang", "lease"),
}
"""The values that a knob may have; the other knobs are integers."""


class KnobError(ValueError):
    """A knob that does not exist, or a value that it cannot have."""


def parse_knobs(settings: list[str]) -> Knobs:
    """Knobs from NAME=VALUE words; raises `KnobError`."""
    values: dict[str, Any] = {}
    known = {field.name: field.type for field in msgspec.structs.fields(Knobs)}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in known:
            raise KnobError(f"no knob {setting!r}; give NAME=VALUE with one of {', '.join(known)}")
        if name in CHOICES and value not in CHOICES[name]:
            raise KnobError(f"knob {name} is one of {', '.join(CHOICES[name])}, not {value!r}")
        try:
            values[name] = int(value, 0) if known[name] is int else value
        except ValueError:
            raise KnobError(f"knob {name} is a whole number, not {value!r}") from None
    knobs = Knobs(**values)
    if not 1 <= knobs.seamdb_size <= 1 << 20:
        raise KnobError(f"knob seamdb_size is 1 to {1 << 20}, not {knobs.seamdb_size}")
    if not 0 <= knobs.watchdog_thresh <= 60:
        raise KnobError(f"knob watchdog_thresh is 0 to 60, not {knobs.watchdog_thresh}")
    if not 1 <= knobs.lease_ms <= MAX_LEASE_MS:
        raise KnobError(f"knob lease_ms is 1 to {MAX_LEASE_MS}, not {knobs.lease_ms}")
    if not 0 < knobs.fms < 1 << 32:
        raise KnobError(f"knob fms is a CPUID.1.EAX of 32 bits, not {knobs.fms:#x}")
    return knobs


def vmx_config(knobs: Knobs) -> VmxConfig:
    """The processor model of every CPU of the machine."""
    config = msgspec.structs.replace(VmxConfig(), maxphyaddr=MAXPHYADDR)
    return config.with_basic_bit60(bool(knobs.vmx_basic_bit60))


def kernel(strategy: str | Strategy, knobs: Knobs, num_cpus: int) -> Kernel:
    """The kernel that every CPU of the machine runs; `strategy` is a name or the function itself.

    Raises `StrategyError` if there is no such strategy.
    """
    settings = msgspec.structs.asdict(knobs)
    gate = knobs.enforce_gate
    settings["enforce_gate"] = strategy == "refuse-on-erratum" if gate == "auto" else gate == "on"
    return Kernel(
        interrupts={
            Vector.CALL_FUNCTION_SINGLE: generic_smp_call_function_single_interrupt,
            Vector.IRQ_WORK: sysvec_irq_work,
            Vector.RESCHEDULE: sysvec_reschedule_ipi,
            Vector.LOCAL_TIMER: watchdog_hrtimer_fn,
        },
        nmi=default_do_nmi,
        functions={
            "__loaded_vmcs_clear": clear_on_this_cpu,
            "tdx_flush_vp": tdx_flush_vp,
            "tdx_do_tdh_mng_key_config": tdx_do_tdh_mng_key_config,
            "smp_func_do_phymem_cache_wb": smp_func_do_phymem_cache_wb,
            "do_seamldr_install_module": do_seamldr_install_module,
            "kvm_enable_virtualization_cpu": kvm_enable_virtualization_cpu,
            "kvm_disable_virtualization_cpu": kvm_disable_virtualization_cpu,
            "take_cpu_down": take_cpu_down,
        },
        static_calls={
            "seamldr_strategy": find_strategy(strategy) if isinstance(strategy, str) else strategy,
            "vmclear_local_loaded_vmcss": vmclear_local_loaded_vmcss,
            "emergency_disable_virtualization_cpu": vmx_emergency_disable_virtualization_cpu,
            "loaded_vmcs_clear_current": loaded_vmcs_clear_current,
        },
        guest=run_guest,
        knobs=settings,
        num_cpus=num_cpus,
    )
