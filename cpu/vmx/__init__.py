"""VMX of one logical processor: instructions, VMCSs, VM entry and exit, the events around them."""

from .config import Msr, VmxConfig
from .controls import Activity
from .errors import ExitReason, VmInstructionError
from .events import Delivery, Signal
from .exit import VmExit
from .fields import FIELD_TABLE, Field, FieldInfo, FieldType, Width
from .lp import CodeMode, VmxMode
from .outcome import ExitInfo, Outcome, Status, Vector
from .script import ScriptError, run_script
from .suspicions import Finding, Suspicion, find_suspicions
from .unit import VmxUnit
from .vmcs import NO_VMCS, LaunchState, Vmcs

__all__ = [
    "FIELD_TABLE",
    "NO_VMCS",
    "Activity",
    "CodeMode",
    "Delivery",
    "ExitInfo",
    "ExitReason",
    "Field",
    "FieldInfo",
    "FieldType",
    "Finding",
    "LaunchState",
    "Msr",
    "Outcome",
    "ScriptError",
    "Signal",
    "Status",
    "Suspicion",
    "Vector",
    "VmExit",
    "VmInstructionError",
    "Vmcs",
    "VmxConfig",
    "VmxMode",
    "VmxUnit",
    "Width",
    "find_suspicions",
    "run_script",
]
