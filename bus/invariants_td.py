"""Invariants about TDs that are built while the machine runs: I61."""

from __future__ import annotations

from bus.invariant import Invariant
from bus.records import Record
from bus.shadow import Shadow


class TrueMeasurement(Invariant):
    """Judged where the owner of a TD compares what the module measured with what it gave."""

    id = "I61"
    slug = "true-measurement"
    sentence = "A TD whose build succeeds is measured as the pages that it was built of."
    source = "TDX module, TDH.MR.EXTEND and TDH.MR.FINALIZE; erratum of TD-preserving update during TD build"
    broken_by = (
        "an update during a TD build, to a module with another crypto library, that is neither avoided "
        "(`avoid_compat_sensitive`) nor detected (`detect_compat_sensitive`)"
    )

    def __init__(self) -> None:
        super().__init__()
        self._module: Record | None = None

    def on_module_init_flag(self, record: Record, shadow: Shadow) -> None:
        self._module = record

    def on_td_measured(self, record: Record, shadow: Shadow) -> None:
        if record["mrtd"] != record["expected"]:
            got, expected = record["mrtd"][:16] or "nothing", record["expected"][:16]
            self.violated(
                f"TD {record['td']} is measured as {got}..., not as {expected}...",
                ("module", self._module),
                ("measured", record),
            )


TD_INVARIANTS: tuple[type[Invariant], ...] = (TrueMeasurement,)
