"""The kernel of a machine, put together: knobs from words, the processor that follows, and what is patched in."""

from __future__ import annotations

import msgspec
import pytest

from cpu.apic import Vector
from cpu.vmx import Msr
from kvm.compose import CHOICES, KnobError, Knobs, kernel, parse_knobs, vmx_config
from seamldr.strategies import STRATEGIES, StrategyError

NAMES = [field.name for field in msgspec.structs.fields(Knobs)]


def test_no_words_are_the_defaults() -> None:
    """The CPU with the erratum, SEAMRET that preserves the launch state of others, the gate up to the strategy."""
    knobs = parse_knobs([])
    assert knobs == Knobs()
    assert (knobs.seamret_launch, knobs.seamret_scope, knobs.vmx_basic_bit60) == ("preserve", "current_only", 0)
    assert (knobs.avoid_compat_sensitive, knobs.seamdb_size) == ("off", 65536)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_can_be_chosen(name: str) -> None:
    """Each listed value of a knob is accepted, and is what the knob then has; the default is one of them."""
    for value in CHOICES[name]:
        assert str(getattr(parse_knobs([f"{name}={value}"]), name)) == value
    assert str(getattr(Knobs(), name)) in CHOICES[name]


def test_numbers_in_any_base_and_the_last_word_wins() -> None:
    """Integers may be decimal or hexadecimal; a knob that is given twice has its last value."""
    assert parse_knobs(["fms=0xA06D1"]).fms == 0xA06D1
    assert parse_knobs(["seamdb_size=7", "seamdb_size=8"]).seamdb_size == 8


WRONG = {
    "no such knob": ("colour=red", "no knob 'colour=red'; give NAME=VALUE with one of seamret_launch"),
    "no value": ("seamret_launch", "no knob 'seamret_launch'"),
    "nothing": ("", "no knob ''"),
    "no such value": ("seamret_launch=keep", "knob seamret_launch is one of preserve, clear, not 'keep'"),
    "empty value": ("seamret_launch=", "is one of preserve, clear, not ''"),
    "two": ("vmx_basic_bit60=2", "is one of 0, 1, not '2'"),
    "hexadecimal bit": ("vmx_basic_bit60=0x1", "is one of 0, 1"),
    "not a number": ("fms=intel", "knob fms is a whole number, not 'intel'"),
    "a fraction": ("seamdb_size=1.5", "whole number"),
    "zero": ("seamdb_size=0", "knob seamdb_size is 1 to 1048576, not 0"),
    "too many": ("seamdb_size=1048577", "1 to 1048576"),
    "no lease": ("lease_ms=0", "knob lease_ms is 1 to 3600000, not 0"),
    "a policy": ("lock_policy=steal", "release, hang, lease"),
    "too wide": ("fms=0x100000000", "knob fms is a CPUID.1.EAX of 32 bits"),
    "negative": ("fms=-1", "32 bits"),
}


@pytest.mark.parametrize("word, says", WRONG.values(), ids=WRONG.keys())
def test_a_bad_word_says_what_is_allowed(word: str, says: str) -> None:
    """One line that names the knob and its values."""
    with pytest.raises(KnobError) as raised:
        parse_knobs([word])
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_every_knob_can_be_set_by_a_word() -> None:
    """Knobs travel as words and back."""
    knobs = Knobs()
    assert parse_knobs([f"{name}={getattr(knobs, name)}" for name in NAMES]) == knobs
    assert CHOICES.keys() <= set(NAMES)


@pytest.mark.parametrize("bit", [0, 1])
def test_the_processor_has_the_erratum_or_not(bit: int) -> None:
    """vmx_basic_bit60 is bit 60 of IA32_VMX_BASIC, and changes nothing else."""
    config = vmx_config(parse_knobs([f"vmx_basic_bit60={bit}"]))
    assert config.basic >> 60 & 1 == bit
    assert config.with_basic_bit60(False) == vmx_config(Knobs())
    assert config.control_limits(Msr.IA32_VMX_PINBASED_CTLS) == vmx_config(Knobs()).control_limits(
        Msr.IA32_VMX_PINBASED_CTLS
    )


GATES = [
    ("auto", "refuse-on-erratum", True),
    ("auto", "none", False),
    ("on", "none", True),
    ("off", "refuse-on-erratum", False),
]


@pytest.mark.parametrize("gate, strategy, on", GATES)
def test_the_gate(gate: str, strategy: str, on: bool) -> None:
    """`auto` is on for refuse-on-erratum alone; otherwise the knob says it."""
    assert kernel(strategy, Knobs(enforce_gate=gate), 2).knobs["enforce_gate"] is on


def test_functions_of_a_kernel_have_numbers() -> None:
    """What one CPU asks another to run travels as a number and is found again, the same in every kernel."""
    one, two = kernel("none", Knobs(), 2), kernel("decoy", Knobs(), 8)
    for name, function in one.functions.items():
        assert two.function_named(one.function_number(name)) == (name, function)
    assert {"__loaded_vmcs_clear", "tdx_flush_vp", "do_seamldr_install_module"} <= one.functions.keys()
    with pytest.raises(ValueError, match="nothing"):
        one.function_number("nothing")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_strategy_is_patched_in(strategy: str) -> None:
    """The static call goes to the strategy that was named; all upcalls of strategies have a target."""
    made = kernel(strategy, Knobs(), 4)
    assert made.static_calls["seamldr_strategy"] is STRATEGIES[strategy]
    assert {"vmclear_local_loaded_vmcss", "loaded_vmcs_clear_current"} <= made.static_calls.keys()
    assert {Vector.CALL_FUNCTION_SINGLE, Vector.RESCHEDULE} <= made.interrupts.keys() and made.num_cpus == 4


def test_there_is_no_kernel_without_a_strategy() -> None:
    """A name that is none is an error at composition."""
    with pytest.raises(StrategyError, match="no strategy 'magic'"):
        kernel("magic", Knobs(), 1)
