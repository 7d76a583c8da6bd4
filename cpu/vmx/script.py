"""Scripts: the VMX unit driven from data, for checks against other implementations and against hardware.

`run_script` takes a configuration and a list of operations and returns one result per operation. All are plain JSON
values; addresses and numbers wider than 32 bits are hex strings, smaller numbers may be either. `python -m cpu.vmx`
runs a file that holds `{"config": {...}, "ops": [...]}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from bus.memory import PhysicalMemory

from .bench import DEVICE_VECTOR, BenchProcessor
from .config import BASIC_REVISION, CAPABILITY_MSRS, DEFAULT_CAPS, U64_MAX, Msr, VmxConfig
from .fields import Field
from .guests import DEFECTS, GUESTS, UnsupportedGuest, named_fields
from .lp import CodeMode
from .outcome import SUCCEED, ExitInfo, Outcome, Status
from .steps import NoGuest
from .unit import VmxUnit

MEMORY_SIZE = 64 << 20
"""Bytes of zeroed memory that a script starts with."""

_Natural = Annotated[int, msgspec.Meta(ge=0)]
_Number = _Natural | Annotated[str, msgspec.Meta(pattern=r"^0x[0-9a-fA-F]{1,16}$")]


class ScriptError(ValueError):
    """The script is not one; the message, a single line, says where and why."""


class Op(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One operation: its parameters (`PARAMETERS` says which it takes) and its modifiers."""

    op: str
    cpu: _Natural = 0
    set: _Number | None = None
    clear: _Number | None = None
    msr: _Number | None = None
    value: _Number | None = None
    pa: _Number | None = None
    len: _Number | None = None
    byte: _Number | None = None
    field: _Number | None = None
    type: _Number | None = None
    desc_lo: _Number | None = None
    desc_hi: _Number | None = None
    to: _Natural | None = None
    kind: Literal["init", "sipi", "nmi", "fixed"] | None = None
    vector: _Number | None = None
    guest: str | None = None
    mode: Literal["cpl3", "compat"] | None = None
    movss: bool = False
    unmapped: bool = False
    memform: bool = False
    pending_irq: bool | _Number | None = None
    posted: bool = msgspec.field(name="async", default=False)

    def number(self, name: str) -> int:
        """The parameter `name` as an integer, 0 if it is not given."""
        return _number(getattr(self, name))

    @property
    def waiting_vector(self) -> int | None:
        """The interrupt that waits while the operation executes."""
        if self.pending_irq is True:
            return self.number("vector") or DEVICE_VECTOR
        return _number(self.pending_irq) if self.pending_irq else None


class ScriptConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `config` of a script. What is left out or null is as in `VmxConfig`."""

    maxphyaddr: Annotated[int, msgspec.Meta(ge=32, le=52)] | None = None
    vmcs_revision_id: _Number | None = None
    caps: dict[str, _Number | None] | None = None
    supported_fields: list[_Number] | None = None
    cpus: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a script file."""

    config: dict[str, Any]
    ops: list[dict[str, Any]]


# Required parameters, then optional ones. Every operation takes `cpu` and the modifiers.
PARAMETERS: dict[str, tuple[str, str]] = {
    "cr0": ("", "set clear"),
    "cr4": ("", "set clear"),
    "rdmsr": ("msr", ""),
    "wrmsr": ("msr value", ""),
    "mem_read32": ("pa", ""),
    "mem_write32": ("pa value", ""),
    "mem_fill": ("pa len byte", ""),
    "vmxon": ("pa", ""),
    "vmptrld": ("pa", ""),
    "vmclear": ("pa", ""),
    "vmptrst": ("", ""),
    "vmxoff": ("", ""),
    "vmread": ("field", ""),
    "vmwrite": ("field value", ""),
    "invept": ("type", "desc_lo desc_hi"),
    "invvpid": ("type", "desc_lo desc_hi"),
    "vmcall": ("", ""),
    "vmlaunch": ("", "vector"),
    "vmresume": ("", "vector"),
    "ipi": ("to kind", "vector"),
    "nmi_count": ("", ""),
    "irq_count": ("", ""),
    "ping": ("", ""),
    "join": ("", ""),
    "advance_rip": ("", ""),
    "setup_guest": ("guest", ""),
}
_MODIFIERS = frozenset({"op", "cpu", "mode", "movss", "unmapped", "memform", "pending_irq", "posted"})
_NUMBERS = frozenset(
    {"set", "clear", "msr", "value", "pa", "len", "byte", "field", "type", "desc_lo", "desc_hi", "vector"}
)
_WITH_VALUE = frozenset({"rdmsr", "mem_read32", "vmptrst", "vmread", "nmi_count", "irq_count", "ping"})

_INSTRUCTIONS: dict[str, Callable[[Op, VmxUnit], Outcome]] = {
    "cr0": lambda op, unit: unit.mov_cr0((unit.cr0 | op.number("set")) & ~op.number("clear")),
    "cr4": lambda op, unit: unit.mov_cr4((unit.cr4 | op.number("set")) & ~op.number("clear")),
    "rdmsr": lambda op, unit: unit.rdmsr(op.number("msr")),
    "wrmsr": lambda op, unit: unit.wrmsr(op.number("msr"), op.number("value")),
    "vmxon": lambda op, unit: unit.vmxon(op.number("pa"), op.unmapped),
    "vmptrld": lambda op, unit: unit.vmptrld(op.number("pa"), op.unmapped),
    "vmclear": lambda op, unit: unit.vmclear(op.number("pa"), op.unmapped),
    "vmptrst": lambda op, unit: unit.vmptrst(op.unmapped),
    "vmxoff": lambda op, unit: unit.vmxoff(),
    "vmread": lambda op, unit: unit.vmread(op.number("field"), op.unmapped),
    "vmwrite": lambda op, unit: unit.vmwrite(op.number("field"), op.number("value"), op.unmapped),
    "invept": lambda op, unit: unit.invept(*_descriptor(op), op.unmapped),
    "invvpid": lambda op, unit: unit.invvpid(*_descriptor(op), op.unmapped),
    "vmcall": lambda op, unit: unit.vmcall(),
    "vmlaunch": lambda op, unit: unit.vmlaunch(),
    "vmresume": lambda op, unit: unit.vmresume(),
    "advance_rip": lambda op, unit: _advance_rip(unit),
    "setup_guest": lambda op, unit: _setup_guest(unit, op.guest or ""),
    "mem_read32": lambda op, unit: Outcome(Status.SUCCEED, value=unit.memory.read32(op.number("pa"))),
    "mem_write32": lambda op, unit: _store(unit, op.number("pa"), op.number("value").to_bytes(8, "little")[:4]),
    "mem_fill": lambda op, unit: _store(unit, op.number("pa"), bytes([op.number("byte")]) * op.number("len")),
    "ping": lambda op, unit: Outcome(Status.SUCCEED, value=1),
}


def run_script(config: dict[str, Any], ops: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run `ops` on processors as `config` describes them; one result per operation, in order.

    Every processor starts in long mode at CPL 0 with CR4.VMXE clear and IA32_FEATURE_CONTROL zero; they share 64 MiB
    of zeroed memory. An operation that a processor does not come back from (its guest runs on, it waits for a SIPI,
    it shut down) has status no_response, and if it ends later, `join` has its result. Raises ScriptError.

    >>> run_script({}, [{"op": "vmcall"}])[0]["status"]
    'exception'
    """
    settings = _convert(config, ScriptConfig, "config")
    script = [_check(_convert(op, Op, f"ops[{number}]"), number, settings.cpus) for number, op in enumerate(ops)]
    memory = PhysicalMemory.private(MEMORY_SIZE)
    try:
        processors = [BenchProcessor(_vmx_config(settings), memory) for _ in range(settings.cpus)]
    except ValueError as error:
        raise ScriptError(f"config: {error}") from None
    return [_run(op, processors) for op in script]


def _convert(value: object, kind: type[Any], where: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ScriptError(f"{where}: {error}") from None


def _number(value: int | str | None) -> int:
    number = int(value, 16) if isinstance(value, str) else value or 0
    if number > U64_MAX:
        raise ScriptError(f"{number:#x} has more than 64 bits")
    return number


def _check(op: Op, number: int, cpus: int) -> Op:
    where = f"ops[{number}]"
    if op.op not in PARAMETERS:
        raise ScriptError(f"{where}: there is no operation {op.op!r}")
    required, optional = (set(names.split()) for names in PARAMETERS[op.op])
    given = {name for name in op.__struct_fields__ if getattr(op, name) is not None} - _MODIFIERS
    if missing := sorted(required - given):
        raise ScriptError(f"{where}: {op.op} needs {missing[0]!r}")
    if surplus := sorted(given - required - optional):
        raise ScriptError(f"{where}: {op.op} does not take {surplus[0]!r}")
    if max(op.cpu, op.to or 0) >= cpus:
        raise ScriptError(f"{where}: there is no cpu {max(op.cpu, op.to or 0)}")
    if op.guest is not None and op.guest not in GUESTS and op.guest not in DEFECTS:
        raise ScriptError(f"{where}: there is no guest {op.guest!r}")
    numbers = {name: op.number(name) for name in given & _NUMBERS}
    small = max(numbers.get("byte", 0), numbers.get("vector", 0), op.waiting_vector or 0)
    if small > 255 or numbers.get("len", 0) > MEMORY_SIZE:
        raise ScriptError(f"{where}: a byte or vector above 255, or a length above 64 MiB")
    return op


def _vmx_config(settings: ScriptConfig) -> VmxConfig:
    revision = None if settings.vmcs_revision_id is None else _number(settings.vmcs_revision_id)
    if settings.caps is not None:
        caps = {_msr_index(name): _number(value) for name, value in settings.caps.items() if value is not None}
    else:
        caps = dict(DEFAULT_CAPS)
        if revision is not None:
            caps[Msr.IA32_VMX_BASIC] = caps[Msr.IA32_VMX_BASIC] & ~BASIC_REVISION | revision
    if revision is None:
        revision = caps.get(Msr.IA32_VMX_BASIC, 0) & BASIC_REVISION
    if revision > BASIC_REVISION:
        raise ScriptError(f"config: a VMCS revision identifier has 31 bits, {revision:#x} has more")
    fields = settings.supported_fields
    return VmxConfig(
        maxphyaddr=settings.maxphyaddr or VmxConfig().maxphyaddr,
        vmcs_revision_id=revision,
        caps=caps,
        supported_fields=None if fields is None else frozenset(map(_number, fields)),
    )


def _msr_index(name: str) -> int:
    digits = name.removeprefix("msr_")
    try:
        index = int(digits, 16)
    except ValueError:
        index = 0
    if digits == name or index not in CAPABILITY_MSRS:
        raise ScriptError(f"config: caps: {name!r} does not name a capability MSR, as 'msr_480' does")
    return index


# Execution


def _run(op: Op, processors: list[BenchProcessor]) -> dict[str, Any]:
    processor = processors[op.cpu]
    if op.op in ("nmi_count", "irq_count"):
        count = processor.nmi_count if op.op == "nmi_count" else processor.irq_count
        return _result(op, Outcome(Status.SUCCEED, value=count))
    if op.op == "join":
        outcome, processor.result = processor.result, None
        return _result(op, outcome)
    try:
        outcome = _execute(op, processor, processors)
    except (UnsupportedGuest, NoGuest):
        return _status("unsupported")
    if op.posted:
        processor.result = outcome
        return _status("posted")
    return _result(op, outcome)


def _execute(op: Op, processor: BenchProcessor, processors: list[BenchProcessor]) -> Outcome | None:
    if op.op == "ipi":
        if not processor.answers:
            return None
        processors[op.to or 0].receive(op.kind or "", op.number("vector"))
        return SUCCEED if processor.answers else None
    unit = processor.unit
    if processor.answers:
        unit.mov_ss_blocking = op.movss
        unit.cpl = 3 if op.mode == "cpl3" else 0
        unit.code_mode = CodeMode.COMPATIBILITY if op.mode == "compat" else CodeMode.LONG
    outcome = processor.execute(lambda unit: _INSTRUCTIONS[op.op](op, unit), op.waiting_vector)
    unit.mov_ss_blocking = False
    if processor.answers:
        unit.cpl = 0
        unit.code_mode = CodeMode.LONG
        if op.mode or (outcome and outcome.status is Status.EXCEPTION):
            processor.iret()
    return outcome


def _descriptor(op: Op) -> tuple[int, int, int]:
    return op.number("type"), op.number("desc_lo"), op.number("desc_hi")


def _store(unit: VmxUnit, pa: int, data: bytes) -> Outcome:
    unit.memory.write(pa, data)
    return SUCCEED


def _advance_rip(unit: VmxUnit) -> Outcome:
    length = unit.vmread(Field.EXIT_INSTRUCTION_LENGTH)
    rip = unit.vmread(Field.GUEST_RIP)
    return unit.vmwrite(Field.GUEST_RIP, rip.value + length.value) if length.ok and rip.ok else length


def _setup_guest(unit: VmxUnit, name: str) -> Outcome:
    for field, value in named_fields(unit, name).items():
        if field in unit.layout.full and not (outcome := unit.vmwrite(field, value)).ok:
            return outcome
    return SUCCEED


# Results


def _result(op: Op, outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return _status("no_response")
    result = _status(outcome.status.value)
    if outcome.status is Status.FAIL_VALID:
        result["error"] = int(outcome.error)
    elif outcome.status is Status.EXCEPTION:
        result["vector"] = int(outcome.vector)
    elif outcome.ok and op.op in _WITH_VALUE:
        result["value"] = f"{outcome.value:#x}"
    if outcome.exit is not None:
        result["exit"] = _exit(outcome.exit)
    return result


def _status(status: str) -> dict[str, Any]:
    return {"status": status, "error": None, "value": None, "vector": None, "exit": None}


def _exit(info: ExitInfo) -> dict[str, str]:
    return {
        "reason": f"{info.reason:#x}",
        "qualification": f"{info.qualification:#x}",
        "instr_len": f"{info.instruction_length:#x}",
        "intr_info": f"{info.intr_info:#x}",
        "activity": f"{info.activity:#x}",
    }
