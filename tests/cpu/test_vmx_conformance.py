"""The conformance table of the VMX unit: one test a row, through `run_script` and, for SEAM, through the unit.

A row is written in a small notation, one operation a line: `name arguments [:modifier ...] [@cpu] -> result`. Results:
OK, a value, VFI (VMfailInvalid), VF(n), #UD, #GP, #PF, exit(reason), none (the processor does not answer), posted.
X and X1 are the VMXON regions of CPU 0 and 1, A and B VMCS regions, P is a page without a revision identifier, M is
bit MAXPHYADDR, TIMER the RIP at which the guest `preempt_zero` begins.
"""

from __future__ import annotations

from typing import Any

import pytest

from bus.memory import PhysicalMemory
from cpu.vmx import Field, LaunchState, Status, VmxConfig, VmxMode, VmxUnit, run_script
from cpu.vmx.config import DEFAULT_CAPS
from cpu.vmx.guests import GUESTS, ROM, host_fields, named_fields

REVISION = 0x13
SYMBOLS = {"X": 0x1000, "X1": 0x2000, "A": 0x3000, "B": 0x4000, "P": 0x5000, "M": 1 << 52, "REV": REVISION}
SYMBOLS["TIMER"] = ROM + 0x1000 * list(GUESTS).index("preempt_zero")
ARGUMENTS = {
    "cr0": ("clear",),
    "cr4": ("clear",),
    "vmxe": (),
    "rdmsr": ("msr",),
    "wrmsr": ("msr", "value"),
    "mem_write32": ("pa", "value"),
    "vmxon": ("pa",),
    "vmptrld": ("pa",),
    "vmclear": ("pa",),
    "vmread": ("field",),
    "vmwrite": ("field", "value"),
    "invept": ("type", "desc_lo", "desc_hi"),
    "invvpid": ("type", "desc_lo", "desc_hi"),
    "setup_guest": ("guest",),
    "ipi": ("to", "kind", "vector"),
}
WORDS = frozenset({"guest", "kind"})
PLAIN = frozenset({"to"})

REGIONS = "".join(f"mem_write32 {page} REV -> OK\n" for page in ("X", "X1", "A", "B"))
ENABLED = REGIONS + "vmxe -> OK\nwrmsr 0x3a 5 -> OK\n"
ROOT = ENABLED + "vmxon X -> OK\n"
CUR_A = ROOT + "vmclear A -> OK\nvmclear B -> OK\nvmptrld A -> OK\n"
VALID_A = CUR_A + "setup_guest vmcall -> OK\n"
LAUNCHED_A = VALID_A + "vmlaunch -> exit(0x12)\n"
ENABLED_1 = "vmxe @1 -> OK\nwrmsr 0x3a 5 @1 -> OK\n"
ROOT_1 = ENABLED_1 + "vmxon X1 @1 -> OK\n"
BOTH_ROOT = ROOT + ROOT_1
CUR_A_1 = REGIONS + ROOT_1 + "vmclear A @1 -> OK\nvmptrld A @1 -> OK\n"

NO_SHADOWING = {"msr_48b": DEFAULT_CAPS[0x48B] & ~(1 << 46)}
NO_WRITE_ANY = {"msr_485": DEFAULT_CAPS[0x485] & ~(1 << 29)}


def guest_in_cpu1(name: str) -> str:
    """CPU 1 is in the guest `name`, started and not waited for."""
    return CUR_A_1 + f"setup_guest {name} @1 -> OK\nvmlaunch :async @1 -> posted\njoin @1 -> none\n"


ROWS: dict[str, tuple[str, str]] = {
    "01": (REGIONS, "vmxon X -> #UD"),
    "02": (REGIONS, "vmxon X :cpl3 -> #UD"),
    "03": (ENABLED, "vmxon X :cpl3 -> #GP"),
    "04": (REGIONS + "vmxe -> OK\n", "vmxon X -> #GP"),
    "05": (REGIONS + "vmxe -> OK\nwrmsr 0x3a 4 -> OK\n", "vmxon X -> #GP"),
    "06": (REGIONS + "vmxe -> OK\nwrmsr 0x3a 1 -> OK\n", "vmxon X -> #GP"),
    "07": (ENABLED, "wrmsr 0x3a 5 -> #GP\nwrmsr 0x3a 0 -> #GP\nrdmsr 0x3a -> 5"),
    "08": (ENABLED + "cr0 0x20 -> OK\n", "vmxon X -> #GP"),
    "09": (ENABLED, "vmxon X :compat -> #UD"),
    "10": (ENABLED, "vmxon X+8 -> VFI"),
    "11": (ENABLED, "vmxon X+M -> VFI"),
    "12": (ENABLED + "mem_write32 X 0x14 -> OK\n", "vmxon X -> VFI"),
    "13": (ENABLED + "mem_write32 X 0x80000013 -> OK\n", "vmxon X -> VFI"),
    "14": (ENABLED, "vmxon X -> OK\nvmptrst -> ~0"),
    "15": (
        ENABLED,
        "vmxoff -> #UD\nvmptrld A -> #UD\nvmptrst -> #UD\nvmclear A -> #UD\nvmread 0x4400 -> #UD\n"
        "vmwrite 0x4400 0 -> #UD\nvmlaunch -> #UD\nvmresume -> #UD\nvmcall -> #UD",
    ),
    "16": (ENABLED, "vmread 0x4400 :cpl3 -> #UD"),
    "17": (
        CUR_A,
        "vmxon X :cpl3 -> #GP\nvmxoff :cpl3 -> #GP\nvmptrld A :cpl3 -> #GP\nvmptrst :cpl3 -> #GP\n"
        "vmclear A :cpl3 -> #GP\nvmread 0x681e :cpl3 -> #GP\nvmwrite 0x681e 0 :cpl3 -> #GP\nvmlaunch :cpl3 -> #GP\n"
        "vmresume :cpl3 -> #GP\nvmcall :cpl3 -> #GP\ninvept 2 0 0 :cpl3 -> #GP\ninvvpid 2 0 0 :cpl3 -> #GP",
    ),
    "18": (
        CUR_A,
        "vmxon X :compat -> #UD\nvmxoff :compat -> #UD\nvmptrld A :compat -> #UD\nvmptrst :compat -> #UD\n"
        "vmclear A :compat -> #UD\nvmread 0x681e :compat -> #UD\nvmwrite 0x681e 0 :compat -> #UD\n"
        "vmlaunch :compat -> #UD\nvmresume :compat -> #UD\nvmcall :compat -> #UD\ninvept 2 0 0 :compat -> #UD\n"
        "invvpid 2 0 0 :compat -> #UD",
    ),
    "19": (ROOT, "vmxon X -> VFI\nvmxon A+1 -> VFI"),
    "20": (CUR_A, "vmxon X -> VF(15)\nvmxon X+1 -> VF(15)\nvmread 0x4400 -> 15"),
    "21": (ROOT, "vmptrst -> ~0"),
    "22": (ROOT, "vmread 0x681e -> VFI\nvmread 0x7ffe -> VFI\nvmwrite 0x681e 1 -> VFI\nvmwrite 0x7ffe 1 -> VFI"),
    "23": (ROOT, "vmlaunch -> VFI\nvmresume -> VFI"),
    "24": (ROOT, "vmlaunch :movss -> VFI"),
    "25": (ROOT, "vmptrld A+1 -> VFI\nvmptrld X -> VFI\nvmclear X -> VFI"),
    "26": (CUR_A, "vmptrld B+1 -> VF(9)\nvmread 0x4400 -> 9\nvmptrst -> A"),
    "27": (CUR_A, "vmptrld B+M -> VF(9)"),
    "28": (CUR_A, "vmptrld X -> VF(10)"),
    "29": (CUR_A, "vmptrld X+8 -> VF(9)"),
    "30": (CUR_A + "mem_write32 X 0 -> OK\n", "vmptrld X -> VF(10)"),
    "31": (CUR_A + "mem_write32 B 0x12 -> OK\n", "vmptrld B -> VF(11)\nvmread 0x4400 -> 11\nvmptrst -> A"),
    "32": (CUR_A + "mem_write32 B 0x80000013 -> OK\n", "vmptrld B -> VF(11)"),
    "33": (CUR_A + "mem_write32 B 0x80000013 -> OK\n", "vmptrld B -> OK\nvmptrst -> B"),
    "34": (
        VALID_A + "vmclear A -> OK\nmem_write32 A 0x80000013 -> OK\nvmptrld A -> OK\n",
        "vmlaunch -> VFI\nvmresume -> VFI\nvmlaunch :movss -> VFI\nvmread 0x4400 -> 0\nvmptrst -> A",
    ),
    "35": (CUR_A + "mem_write32 B 0x80000013 -> OK\nvmptrld B -> OK\n", "vmwrite 0x681e 7 -> OK\nvmread 0x681e -> 7"),
    "36": (CUR_A, "vmptrld A -> OK\nvmptrst -> A"),
    "37": (CUR_A, "vmptrld B -> OK\nvmptrst -> B"),
    "38": (CUR_A, "vmclear A+4 -> VF(2)"),
    "39": (CUR_A, "vmclear X -> VF(3)"),
    "40": (CUR_A, "vmclear A -> OK\nvmptrst -> ~0"),
    "41": (CUR_A + "vmptrld B -> OK\nvmptrld A -> OK\n", "vmclear B -> OK\nvmptrst -> A"),
    "42": (CUR_A, "vmclear P -> OK\nvmptrst -> A"),
    "43": (CUR_A, "vmread 0x7ffe -> VF(12)\nvmread 0x4400 -> 12"),
    "44": (CUR_A, "vmread 0x10000681e -> VF(12)\nvmwrite 0x10000681e 1 -> VF(12)\nvmread 0x681e -> 0"),
    "45": (CUR_A, "vmread 0x4401 -> VF(12)\nvmwrite 0x4003 1 -> VF(12)\nvmread 0x681f -> VF(12)"),
    "46": (CUR_A, "vmwrite 0x4402 1 -> VF(13)\nvmread 0x4402 -> 0\nvmread 0x4400 -> 13"),
    "47": (CUR_A, "vmwrite 0x4402 1 -> OK\nvmread 0x4402 -> 1"),
    "48": (CUR_A, "vmwrite 0x800 0x12345 -> OK\nvmread 0x800 -> 0x2345"),
    "49": (
        CUR_A + "vmwrite 0x2010 0x1111222233334444 -> OK\n",
        "vmwrite 0x2011 5 -> OK\nvmread 0x2010 -> 0x0000000533334444\nvmread 0x2011 -> 5",
    ),
    "50": (CUR_A + "vmread 0x7ffe -> VF(12)\n", "vmwrite 0x681e 1 -> OK\nvmread 0x4400 -> 12"),
    "51": (
        CUR_A + "vmptrld B+1 -> VF(9)\nvmptrld B -> OK\n",
        "vmread 0x4400 -> 0\nvmptrld A -> OK\nvmread 0x4400 -> 9",
    ),
    "52": (CUR_A, "vmlaunch -> VF(7|8)\nvmresume -> VF(5)"),
    "53": (VALID_A, "vmresume -> VF(5)"),
    "54": (VALID_A, "vmlaunch -> exit(0x12)\nvmlaunch -> VF(4)"),
    "55": (LAUNCHED_A, "vmlaunch -> VF(4)"),
    "56": (LAUNCHED_A, "vmresume -> exit(0x12)"),
    "57": (LAUNCHED_A, "vmlaunch :movss -> VF(26)"),
    "58": (VALID_A + "vmwrite 0x6820 0 -> OK\n", "vmlaunch -> exit(0x80000021)\nvmread 0x4402 -> 0x80000021"),
    "59": (VALID_A + "vmwrite 0x6820 0 -> OK\nvmlaunch -> exit(0x80000021)\n", "vmresume -> VF(5)"),
    "60": (LAUNCHED_A, "vmclear A -> OK\nvmptrld A -> OK\nvmresume -> VF(5)"),
    "61": (LAUNCHED_A, "vmptrld B -> OK\nvmptrld A -> OK\nvmresume -> exit(0x12)"),
    "62": (
        CUR_A + "vmwrite 0x681e 0x1234 -> OK\n",
        "vmclear A -> OK\nvmptrld A -> OK\nvmread 0x681e -> 0x1234",
    ),
    "63": (CUR_A, "vmcall -> VF(1)\nvmread 0x4400 -> 1\nvmptrst -> A"),
    "64": (ROOT, "vmcall -> VFI"),
    "65": (CUR_A, "vmxoff -> OK\nvmxon X -> OK\nvmptrst -> ~0"),
    "66": (ROOT, "cr4 0x2000 -> #GP\nvmptrst -> ~0\nvmxoff -> OK\ncr4 0x2000 -> OK"),
    "67": (ROOT, "cr0 0x20 -> #GP\nvmxoff -> OK\ncr0 0x20 -> OK\nvmxon X -> #GP"),
    "68": (
        LAUNCHED_A + "vmclear A -> OK\n" + ROOT_1,
        "vmptrld A @1 -> OK\nvmresume @1 -> VF(5)\nvmlaunch @1 -> exit(0x12)",
    ),
    "69": (CUR_A + ROOT_1 + "vmptrld B @1 -> OK\n", "vmptrst @1 -> B\nvmptrst -> A"),
    "70": (BOTH_ROOT, "vmptrld X1 -> OK\nvmptrst -> X1"),
    "71": (BOTH_ROOT, "ipi 1 init 0 -> OK\nping @1 -> 1\nvmptrst @1 -> ~0"),
    "72": (
        BOTH_ROOT + "ipi 1 init 0 -> OK\n",
        "vmxoff @1 -> none\nping @1 -> none\nipi 1 sipi 0x12 -> OK\nping @1 -> 1",
    ),
    "73": (
        CUR_A_1 + "setup_guest vmcall @1 -> OK\nipi 1 init 0 -> OK\n",
        "vmlaunch @1 -> exit(3)\nvmlaunch @1 -> VF(4)\nvmresume @1 -> exit(0x12)",
    ),
    "74": (
        guest_in_cpu1("spin"),
        "ipi 1 init 0 -> OK\njoin @1 -> exit(3)\nvmptrst @1 -> A\nvmxoff @1 -> OK\nping @1 -> 1",
    ),
    "75": (guest_in_cpu1("wait_sipi"), "ipi 1 sipi 0x12 -> OK\njoin @1 -> exit(4)\nvmread 0x6400 @1 -> 0x12"),
    "76": (guest_in_cpu1("spin"), "ipi 1 sipi 0x12 -> OK\njoin @1 -> none\nipi 1 init 0 -> OK\njoin @1 -> exit(3)"),
    "77": (
        REGIONS + ENABLED_1 + "ipi 1 init 0 -> OK\nping @1 -> none\n",
        "ipi 1 sipi 0x12 -> OK\nping @1 -> 1\nvmxon X1 @1 -> #UD\nrdmsr 0x3a @1 -> 5",
    ),
    "78": (guest_in_cpu1("spin_nmi"), "ipi 1 nmi 0 -> OK\njoin @1 -> exit(0)\nvmread 0x4404 @1 -> 0x80000202"),
    "79": (
        guest_in_cpu1("spin_extint"),
        "ipi 1 fixed 0x50 -> OK\njoin @1 -> exit(1)\nvmread 0x6820 @1 -> 2\nirq_count @1 -> 1",
    ),
    "80": (
        CUR_A + "setup_guest preempt_zero -> OK\nvmread 0x681e -> TIMER\n",
        "vmlaunch -> exit(0x34)\nvmread 0x440c -> 0\nvmread 0x6400 -> 0\nvmread 0x681e -> TIMER",
    ),
    "81": (
        CUR_A,
        "setup_guest vmxon -> OK\nvmlaunch -> exit(27)\nsetup_guest vmptrld -> OK\nvmresume -> exit(21)\n"
        "setup_guest vmclear -> OK\nvmresume -> exit(19)\nsetup_guest vmlaunch -> OK\nvmresume -> exit(20)",
    ),
    "82": (CUR_A, "invept 0 0 0 -> VF(28)"),
    "83": (CUR_A, "invvpid 1 0 0 -> VF(28)"),
}
CAPS: dict[str, dict[str, int]] = {"32": NO_SHADOWING, "46": NO_WRITE_ANY}


def number(text: str) -> int:
    """A number, a symbol, or a sum of them; ~0 is all ones."""
    if text == "~0":
        return 0xFFFF_FFFF_FFFF_FFFF
    return sum(SYMBOLS[part] if part in SYMBOLS else int(part, 0) for part in text.split("+"))


def operation(text: str) -> dict[str, Any]:
    """One operation of the notation as `run_script` takes it."""
    name, *words = text.split()
    values = [word for word in words if word[0] not in ":@"]
    op: dict[str, Any] = {"op": name}
    for key, word in zip(ARGUMENTS.get(name, ()), values, strict=True):
        op[key] = word if key in WORDS else int(word) if key in PLAIN else f"{number(word):#x}"
    for word in words:
        if word.startswith("@"):
            op["cpu"] = int(word[1:])
        elif word in (":cpl3", ":compat"):
            op["mode"] = word[1:]
        elif word.startswith(":"):
            op[word[1:]] = True
    if name == "vmxe":
        op |= {"op": "cr4", "set": "0x2000"}
    return op


def agrees(result: dict[str, Any], expected: str) -> bool:
    """A result is what the notation says."""
    status: str = result["status"]
    if expected.startswith("VF("):
        return status == "fail_valid" and str(result["error"]) in expected[3:-1].split("|")
    if expected.startswith("exit("):
        return status == "vm_exit" and int(result["exit"]["reason"], 16) == int(expected[5:-1], 0)
    if expected.startswith("#"):
        return status == "exception" and result["vector"] == {"#UD": 6, "#GP": 13, "#PF": 14}[expected]
    plain = {"OK": "succeed", "VFI": "fail_invalid", "none": "no_response", "posted": "posted"}
    if expected in plain:
        return status == plain[expected]
    return status == "succeed" and int(result["value"], 16) == number(expected)


def check(text: str, caps: dict[str, int] | None = None) -> None:
    """Run the operations of `text` and compare every result."""
    lines = [line.split(" -> ") for line in text.strip().splitlines()]
    full = {f"msr_{msr:x}": f"{value:#x}" for msr, value in DEFAULT_CAPS.items()}
    config: dict[str, Any] = {"maxphyaddr": 52, "vmcs_revision_id": REVISION, "cpus": 2}
    config["caps"] = full | {name: f"{value:#x}" for name, value in (caps or {}).items()}
    results = run_script(config, [operation(line[0]) for line in lines])
    wrong = [(line, got) for line, got in zip(lines, results, strict=True) if not agrees(got, line[1])]
    assert wrong == []


@pytest.mark.conformance("VMX instructions")
@pytest.mark.parametrize("row", [pytest.param(row, id=f"row-{row}") for row in ROWS])
def test_conformance_row(row: str) -> None:
    """The instruction or event does in this state what the architecture says."""
    state, operations = ROWS[row]
    check(state + operations, CAPS.get(row))


# Rows 84 to 88: SEAM calls, on the unit


def launched(bit60: bool) -> VmxUnit:
    """Root operation, VMCS A current and launched."""
    memory = PhysicalMemory.private(1 << 20)
    unit = VmxUnit(VmxConfig().with_basic_bit60(bit60), memory)
    unit.reset_to_vmx_ready()
    memory.write32(SYMBOLS["X"], REVISION)
    memory.write32(SYMBOLS["A"], REVISION)
    outcomes = [unit.vmxon(SYMBOLS["X"]), unit.vmclear(SYMBOLS["A"]), unit.vmptrld(SYMBOLS["A"])]
    outcomes += [unit.vmwrite(field, value) for field, value in named_fields(unit, "vmcall").items()]
    outcomes.append(unit.vmlaunch())
    assert all(outcome.ok for outcome in outcomes)
    unit.vm_exit(18, instruction_length=3)
    return unit


def pseamldr_call(unit: VmxUnit) -> int:
    """SEAMCALL to the P-SEAMLDR, and back."""
    assert unit.seamcall_check(1 << 63) is None
    return unit.seamret_pseamldr("clear", "current_only")


@pytest.mark.conformance("VMX instructions", 84)
def test_pseamldr_call_loses_the_current_vmcs() -> None:
    """With IA32_VMX_BASIC[60] = 0 there is no current VMCS after SEAMRET from the P-SEAMLDR."""
    unit = launched(bit60=False)
    assert pseamldr_call(unit) == SYMBOLS["A"]
    assert unit.vmptrst().value == number("~0")
    assert unit.vmread(0x681E).status is Status.FAIL_INVALID


@pytest.mark.conformance("VMX instructions", 85)
def test_lost_vmcs_is_clear() -> None:
    """Reloading the lost VMCS is not enough for VMRESUME: its launch state is clear."""
    unit = launched(bit60=False)
    pseamldr_call(unit)
    assert unit.vmptrld(SYMBOLS["A"]).ok
    assert unit.vmresume().error == 5
    assert unit.vmlaunch().ok


@pytest.mark.conformance("VMX instructions", 86)
def test_bit60_keeps_the_vmcs() -> None:
    """With IA32_VMX_BASIC[60] = 1 a P-SEAMLDR call leaves pointer and launch state alone."""
    unit = launched(bit60=True)
    assert pseamldr_call(unit) == number("~0")
    assert unit.vmread(0x681E).ok
    assert unit.vmresume().ok


@pytest.mark.conformance("VMX instructions", 87)
@pytest.mark.parametrize("bit60", [False, True])
def test_tdx_module_call_keeps_the_vmcs(bit60: bool) -> None:
    """A TDX-module call, which ends without the P-SEAMLDR's SEAMRET, changes nothing for the caller."""
    unit = launched(bit60)
    assert unit.seamcall_check(0) is None
    assert unit.vmread(0x681E).ok
    assert unit.vmresume().ok


@pytest.mark.conformance("VMX instructions", 88)
def test_seamcall_that_fails_invalid_changes_nothing() -> None:
    """A SEAMCALL that never entered SEAM leaves the current VMCS current and launched."""
    unit = launched(bit60=False)
    assert unit.seamcall_check(1 << 63) is None
    assert unit.vmread(0x681E).ok
    assert unit.vmptrst().value == SYMBOLS["A"]
    assert unit.current is not None and unit.current.launch is LaunchState.LAUNCHED


@pytest.mark.conformance("VMX instructions", 58)
def test_a_guest_that_cannot_be_entered() -> None:
    """A VM-entry failure continues at the host's RIP, in root operation; the VMCS is still clear."""
    unit = launched(bit60=False)
    assert unit.vmclear(SYMBOLS["A"]).ok and unit.vmptrld(SYMBOLS["A"]).ok
    unit.rip = 0
    assert unit.vmwrite(Field.GUEST_RFLAGS, 0).ok
    outcome = unit.vmlaunch()
    assert outcome.exit is not None and outcome.exit.reason == 0x8000_0021
    assert (unit.rip, unit.mode) == (host_fields(unit)[Field.HOST_RIP], VmxMode.ROOT)
    assert unit.current is not None and unit.current.launch is LaunchState.CLEAR


def test_every_row_has_a_test() -> None:
    """Rows 1 to 83 are in the table of this file."""
    assert sorted(ROWS) == [f"{row:02}" for row in range(1, 84)]
