"""Long random sequences on two processors, compared with a second model that fits on a page.

The model is a dictionary of regions (memory), and for each processor a dictionary of copies. It knows nothing of
formats, fast paths or remembered checks.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bus.memory import PhysicalMemory
from cpu.vmx import NO_VMCS, Field, Outcome, Status, VmxConfig, VmxMode, VmxUnit
from cpu.vmx.guests import named_fields

VMXON = (0x1000, 0x2000)
REGIONS = (0x3000, 0x4000, 0x5000)
FIELDS = {int(Field.TSC_OFFSET): 64, int(Field.GUEST_RSP): 64, int(Field.EXCEPTION_BITMAP): 32, 0x800: 16}
ERROR = int(Field.VM_INSTRUCTION_ERROR)
BAD_FIELDS = (0x7FFE, 0x4401, 0x1_0000_2010)

Copy = dict[Any, Any]
Result = tuple[str, int]
OK: Result = ("succeed", 0)

cpus = st.integers(0, 1)
addresses = st.sampled_from([*REGIONS, *VMXON, 0x3004, 1 << 52])


class Model:
    """What two processors and their memory do. A copy is {"launch": ..., field: value, ...}."""

    def __init__(self) -> None:
        self.memory: dict[int, Copy] = {
            page: {"launch": "unknown" if page in VMXON else "clear", ERROR: 0} | dict.fromkeys(FIELDS, 0)
            for page in REGIONS + VMXON
        }
        self.active: list[dict[int, Copy]] = [{}, {}]
        self.cur = [NO_VMCS, NO_VMCS]
        self.on = [False, False]

    def fail(self, cpu: int, error: int) -> Result:
        if self.cur[cpu] == NO_VMCS:
            return "fail_invalid", 0
        self.active[cpu][self.cur[cpu]][ERROR] = error
        return "fail_valid", error

    def write_back(self, cpu: int, page: int) -> None:
        self.memory[page] = dict(self.active[cpu][page])

    def vmxon(self, cpu: int) -> Result:
        if self.on[cpu]:
            return self.fail(cpu, 15)
        self.on[cpu] = True
        return OK

    def vmxoff(self, cpu: int) -> Result:
        if not self.on[cpu]:
            return "exception", 6
        for page in self.active[cpu]:
            self.memory[page] = self.memory[page] | {"launch": "corrupted"}
        self.active[cpu], self.cur[cpu], self.on[cpu] = {}, NO_VMCS, False
        return OK

    def address(self, cpu: int, pa: int, errors: tuple[int, int]) -> Result | None:
        if not self.on[cpu]:
            return "exception", 6
        if pa % 4096 or pa >> 52:
            return self.fail(cpu, errors[0])
        return self.fail(cpu, errors[1]) if pa == VMXON[cpu] else None

    def vmptrld(self, cpu: int, pa: int) -> Result:
        if failed := self.address(cpu, pa, (9, 10)):
            return failed
        self.active[cpu].setdefault(pa, dict(self.memory[pa]))
        self.cur[cpu] = pa
        return OK

    def vmclear(self, cpu: int, pa: int) -> Result:
        if failed := self.address(cpu, pa, (2, 3)):
            return failed
        if pa in self.active[cpu]:
            self.write_back(cpu, pa)
            del self.active[cpu][pa]
        self.memory[pa] = self.memory[pa] | {"launch": "clear"}
        if self.cur[cpu] == pa:
            self.cur[cpu] = NO_VMCS
        return OK

    def access(self, cpu: int, field: int, value: int | None) -> Result:
        if not self.on[cpu]:
            return "exception", 6
        if self.cur[cpu] == NO_VMCS:
            return "fail_invalid", 0
        copy = self.active[cpu][self.cur[cpu]]
        if field not in copy:
            return self.fail(cpu, 12)
        if value is None:
            return "succeed", copy[field]
        copy[field] = value % (1 << FIELDS[field])
        return OK

    def enter(self, cpu: int, launch: bool) -> Result:
        if not self.on[cpu]:
            return "exception", 6
        if self.cur[cpu] == NO_VMCS:
            return "fail_invalid", 0
        copy = self.active[cpu][self.cur[cpu]]
        if launch and copy["launch"] != "clear":
            return self.fail(cpu, 4)
        if not launch and copy["launch"] != "launched":
            return self.fail(cpu, 6 if copy["launch"] == "corrupted" else 5)
        if self.cur[cpu] in VMXON:
            return self.fail(cpu, 7)
        copy["launch"] = "launched"
        return OK

    def seamret(self, cpu: int, clear: bool, everything: bool) -> int:
        lost = self.cur[cpu]
        for page in list(self.active[cpu]):
            if everything or page == lost:
                if clear:
                    self.active[cpu][page]["launch"] = "clear"
                self.write_back(cpu, page)
                if clear:
                    del self.active[cpu][page]
        self.cur[cpu] = NO_VMCS
        return lost


def shown(outcome: Outcome) -> Result:
    """An outcome as the model gives it."""
    return outcome.status.value, outcome.error or outcome.vector or outcome.value


class TwoProcessors(RuleBasedStateMachine):
    """Two units over one memory, and the model beside them."""

    @initialize()
    def power_on(self) -> None:
        """Two ready processors; valid guests in the three VMCS regions."""
        self.memory = PhysicalMemory.private(1 << 16)
        self.units = [self.new_unit(), self.new_unit()]
        for page in REGIONS + VMXON:
            self.memory.write32(page, self.units[0].config.vmcs_revision_id)
        unit = self.units[0]
        assert unit.vmxon(VMXON[0]).ok
        for page in REGIONS:
            assert unit.vmclear(page).ok and unit.vmptrld(page).ok
            for field, value in named_fields(unit, "vmcall").items():
                assert unit.vmwrite(field, 0 if field in FIELDS else value).ok
            assert unit.vmclear(page).ok
        assert unit.vmxoff().ok
        self.model = Model()

    def new_unit(self) -> VmxUnit:
        """A processor that may execute VMXON."""
        unit = VmxUnit(VmxConfig(), self.memory)
        unit.reset_to_vmx_ready()
        return unit

    @rule(cpu=cpus)
    def vmxon(self, cpu: int) -> None:
        """VMXON with the processor's own region."""
        assert shown(self.units[cpu].vmxon(VMXON[cpu])) == self.model.vmxon(cpu)

    @rule(cpu=cpus)
    def vmxoff(self, cpu: int) -> None:
        """VMXOFF, whatever is still active."""
        assert shown(self.units[cpu].vmxoff()) == self.model.vmxoff(cpu)

    @rule(cpu=cpus, pa=addresses)
    def vmptrld(self, cpu: int, pa: int) -> None:
        """VMPTRLD of anything."""
        assert shown(self.units[cpu].vmptrld(pa)) == self.model.vmptrld(cpu, pa)

    @rule(cpu=cpus, pa=st.sampled_from(REGIONS))
    def vmptrld_region(self, cpu: int, pa: int) -> None:
        """VMPTRLD of a VMCS, more often than of anything."""
        assert shown(self.units[cpu].vmptrld(pa)) == self.model.vmptrld(cpu, pa)

    @rule(cpu=cpus, pa=addresses)
    def vmclear(self, cpu: int, pa: int) -> None:
        """VMCLEAR of anything."""
        assert shown(self.units[cpu].vmclear(pa)) == self.model.vmclear(cpu, pa)

    @rule(cpu=cpus, field=st.sampled_from([*FIELDS, ERROR, *BAD_FIELDS]))
    def vmread(self, cpu: int, field: int) -> None:
        """VMREAD of a field, of the error field, or of no field."""
        assert shown(self.units[cpu].vmread(field)) == self.model.access(cpu, field, None)

    @rule(cpu=cpus, field=st.sampled_from([*FIELDS, *BAD_FIELDS]), value=st.integers(0, (1 << 64) - 1))
    def vmwrite(self, cpu: int, field: int, value: int) -> None:
        """VMWRITE of a value that may be too wide."""
        assert shown(self.units[cpu].vmwrite(field, value)) == self.model.access(cpu, field, value)

    @rule(cpu=cpus, launch=st.booleans())
    def enter(self, cpu: int, launch: bool) -> None:
        """VMLAUNCH or VMRESUME, and if the guest runs, an exit."""
        unit = self.units[cpu]
        outcome = unit.vmlaunch() if launch else unit.vmresume()
        assert shown(outcome) == self.model.enter(cpu, launch)
        if unit.mode is VmxMode.NON_ROOT:
            assert unit.vm_exit(18, instruction_length=3).status is Status.VM_EXIT

    @rule(cpu=cpus, clear=st.booleans(), everything=st.booleans())
    def pseamldr_call(self, cpu: int, clear: bool, everything: bool) -> None:
        """A P-SEAMLDR call on a processor with the erratum, in all four variants."""
        unit = self.units[cpu]
        if unit.seamcall_check(1 << 63) is not None:
            assert not self.model.on[cpu]
            return
        knobs = "clear" if clear else "preserve", "all_active_on_lp" if everything else "current_only"
        assert unit.seamret_pseamldr(*knobs) == self.model.seamret(cpu, clear, everything)

    @rule(cpu=cpus)
    def power_loss(self, cpu: int) -> None:
        """The processor is killed and replaced: its copies are gone, memory stays."""
        self.units[cpu] = self.new_unit()
        self.model.active[cpu], self.model.cur[cpu], self.model.on[cpu] = {}, NO_VMCS, False

    @invariant()
    def same_state(self) -> None:
        """Pointer, active set, launch states and mode agree; the current VMCS is active."""
        for cpu, unit in enumerate(self.units):
            assert unit.cur == self.model.cur[cpu]
            assert (unit.mode is VmxMode.ROOT) == self.model.on[cpu]
            assert {page: vmcs.launch.name.lower() for page, vmcs in unit.active.items()} == {
                page: copy["launch"] for page, copy in self.model.active[cpu].items()
            }
            assert unit.cur == NO_VMCS or unit.current is unit.active[unit.cur]


TestTwoProcessors = TwoProcessors.TestCase
TestTwoProcessors.settings = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=120,
    stateful_step_count=60,
    suppress_health_check=list(HealthCheck),
)
