"""Invariants about the module update: I31, I32, I33, I35, I37, I52."""

from __future__ import annotations

from collections import Counter

from bus.invariant import EXPLAINED_BY_DEATH, Invariant
from bus.records import Record
from bus.shadow import P_SEAMLDR, STAGES, Shadow, UpdateShadow, cpu_node, stage_rank
from bus.waits import Ending

LEAD = "cpu0"
"""The CPU that does what is done once per update."""

SEAMLDR_INSTALL = P_SEAMLDR | 1
TDH_SYS_INIT = 33
TDH_SYS_LP_INIT = 35
TDH_SYS_SHUTDOWN = 52
TDH_SYS_UPDATE = 53
RND_NO_ENTROPY = 0x80000203
"""Upper half of a TDX status after which the kernel executes the same SEAMCALL again."""

_NAMES = {TDH_SYS_SHUTDOWN: "TDH.SYS.SHUTDOWN", TDH_SYS_UPDATE: "TDH.SYS.UPDATE"}


def leaf_number(rax: int) -> int:
    """Leaf of a SEAMCALL without version bits: P-SEAMLDR leaves keep bit 63."""
    return rax if rax & P_SEAMLDR else rax & 0xFFFF


def executed(record: Record) -> bool:
    """Whether a `seamcall_return` tells of a call that was entered and is not simply made again."""
    return bool(record["entered"]) and record["status"] >> 32 != RND_NO_ENTROPY


class StagesInOrder(Invariant):
    """Judged at each acknowledgement and each advance."""

    id = "I31"
    slug = "stages-in-order"
    sentence = (
        "The stage of an update never goes back, and moves on by one only when every CPU that takes part "
        "has acknowledged it exactly once and none has failed."
    )
    source = "kernel seamldr.c, update_ctrl"
    broken_by = "an acknowledgement lost or counted twice"

    def on_ack(self, record: Record, shadow: Shadow) -> None:
        update = shadow.open_update()
        if update is not None and update.acks.get(stage_rank(record["state"]), Counter())[record["node"]]:
            self.violated(
                f"{record['node']} acknowledged {record['state']} twice", ("update", update.begin), ("again", record)
            )

    def on_state_advance(self, record: Record, shadow: Shadow) -> None:
        update = shadow.open_update()
        if update is None or update.begin["update"] != record["update"]:
            return
        rank = stage_rank(record["state"])
        why = self._why_not(update, rank)
        if why:
            self.violated(f"the update went to {record['state']} {why}", ("update", update.begin), ("moved", record))

    def _why_not(self, update: UpdateShadow, rank: int) -> str:
        if rank != update.rank + 1:
            return f"from {STAGES[min(update.rank, len(STAGES) - 1)]}"
        if update.failed:
            return "although a CPU had failed"
        if not update.acknowledged(update.rank):
            acks = len(update.acks.get(update.rank, ()))
            return f"after {acks} of {update.size} acknowledgements"
        return ""


class NoEarlyWork(Invariant):
    """Judged where a CPU starts the work of a stage."""

    id = "I32"
    slug = "no-early-work"
    sentence = "No CPU starts the work of a stage before every CPU has acknowledged the stage before."
    source = "kernel seamldr.c, the loop over update stages"
    broken_by = "an acknowledgement lost or counted twice"
    consequence_of = ("I31",)

    def on_state_enter(self, record: Record, shadow: Shadow) -> None:
        update = shadow.open_update()
        rank = stage_rank(record["state"])
        if update is None or update.begin["update"] != record["update"] or rank <= 1:
            return
        if not update.acknowledged(rank - 1):
            self.violated(
                f"{record['node']} started {record['state']} before all had acknowledged {STAGES[rank - 1]}",
                ("stage", update.advance or update.begin),
                ("early", record),
            )


class LeadWorksOnce(Invariant):
    """Judged where the two SEAMCALLs of the lead CPU return."""

    id = "I33"
    slug = "lead-once"
    sentence = "TDH.SYS.SHUTDOWN and TDH.SYS.UPDATE are executed once per update, by CPU 0."
    source = "kernel seamldr.c, stages SHUTDOWN and RUN_UPDATE"
    broken_by = "a lead that is started again and repeats its work"

    def __init__(self) -> None:
        super().__init__()
        self._done: dict[tuple[int, int], Record] = {}

    def on_seamcall_return(self, record: Record, shadow: Shadow) -> None:
        leaf = leaf_number(record["leaf"])
        if leaf not in _NAMES or not executed(record):
            return
        update = shadow.open_update()
        if update is None:
            self.violated(f"{_NAMES[leaf]} on {record['node']} outside an update", ("executed", record))
            return
        before = self._done.setdefault((update.begin["update"], leaf), record)
        if before is not record:
            self.violated(f"{_NAMES[leaf]} executed twice in one update", ("first", before), ("again", record))
        elif record["node"] != LEAD:
            self.violated(
                f"{_NAMES[leaf]} executed by {record['node']}", ("update", update.begin), ("executed", record)
            )


class EachCpuOnce(Invariant):
    """Judged where the SEAMCALLs of an update return; calls that were not entered do not count."""

    id = "I35"
    slug = "each-cpu-once"
    sentence = (
        "In one update each CPU executes SEAMLDR.INSTALL and TDH.SYS.LP.INIT at most once, "
        "and TDH.SYS.INIT is executed exactly once."
    )
    source = "SEAMLDR.INSTALL and TDH.SYS.LP.INIT: once per logical processor"
    broken_by = "a retry after a failure; a message delivered twice"

    def __init__(self) -> None:
        super().__init__()
        self._done: dict[tuple[int, str], Record] = {}

    def on_update_begin(self, record: Record, shadow: Shadow) -> None:
        self._done.clear()

    def on_seamcall_return(self, record: Record, shadow: Shadow) -> None:
        update = shadow.open_update()
        leaf = leaf_number(record["leaf"])
        if update is None or leaf not in (SEAMLDR_INSTALL, TDH_SYS_INIT, TDH_SYS_LP_INIT) or not executed(record):
            return
        who = "" if leaf == TDH_SYS_INIT else record["node"]
        before = self._done.setdefault((leaf, who), record)
        if before is not record:
            why = f"{record['name']} executed twice in one update"
            self._broken(shadow, why, ("first", before), ("again", record))

    def _broken(self, shadow: Shadow, why: str, *parts: tuple[str, Record]) -> None:
        if any(node.startswith("cpu") for node in shadow.dead):
            self.excused.append(f"{why}: {EXPLAINED_BY_DEATH[self.id]}")
        else:
            self.violated(why, *parts)

    def on_update_end(self, record: Record, shadow: Shadow) -> None:
        if record["ret"] == 0 and shadow.open_update() is not None and (TDH_SYS_INIT, "") not in self._done:
            self._broken(shadow, "an update succeeded without TDH.SYS.INIT", ("ended", record))


class OnlineSetConstant(Invariant):
    """What happens after `machine_end` is the machine being taken down, and does not count."""

    id = "I37"
    slug = "online-set-constant"
    sentence = "The set of online CPUs is the same from the reset of update control to the end of stop_machine."
    source = "kernel seamldr_install_module(): cpus_read_lock()"
    broken_by = "CPU hotplug during an update; a CPU that dies"

    def __init__(self) -> None:
        super().__init__()
        self._changes: list[tuple[UpdateShadow, Record]] = []

    def _change(self, record: Record, shadow: Shadow) -> None:
        update = shadow.open_update()
        if update is not None and not shadow.ended:
            self._changes.append((update, record))

    on_cpu_online = on_cpu_offline = _change

    def on_process_exit(self, record: Record, shadow: Shadow) -> None:
        if not record["wanted"] and record["name"].startswith("cpu"):
            self._change(record, shadow)

    def at_end(self, ending: Ending) -> None:
        for update, record in self._changes:
            node = record.get("name", record["node"])
            if node in ending.shadow.dead:
                self.excused.append(f"{node} changed the online set: {EXPLAINED_BY_DEATH[self.id]}")
            else:
                word = record["event"].removeprefix("cpu_")
                self.violated(f"{node} went {word} during an update", ("update", update.begin), (word, record))


class UpdatesEnd(Invariant):
    """Judged when the history is over."""

    id = "I52"
    slug = "updates-end"
    sentence = "Every update that has begun ends, well or badly, and all CPUs leave its callback."
    source = "kernel stop_machine(); hazards: a CPU that never acknowledges, a failure that others do not learn of"
    broken_by = "a deadlock; a CPU that stops; a lost acknowledgement"
    consequence_of = ("I31", "I50", "I51", "I58")

    def __init__(self) -> None:
        super().__init__()
        self._last: Record | None = None

    def on_ack(self, record: Record, shadow: Shadow) -> None:
        self._last = record

    def at_end(self, ending: Ending) -> None:
        shadow = ending.shadow
        update = shadow.open_update()
        if update is None:
            return
        online = update.online if update.online is not None else shadow.cpus.keys()
        number = update.begin["update"]
        dead = sorted(shadow.dead & {cpu_node(cpu) for cpu in online})
        if dead:
            self.excused.append(f"update {number} did not end, {dead[0]} is dead: {EXPLAINED_BY_DEATH[self.id]}")
        elif shadow.finished or ending.stuck_nodes & set(online):
            self.violated(
                f"update {number} never ended; its stage is {STAGES[min(update.rank, len(STAGES) - 1)]}",
                ("begun", update.begin),
                ("last ack", self._last),
                *ending.parts,
            )
        else:
            self.suspects.append(f"update {number} had not ended when the run was cut")


UPDATE_INVARIANTS: tuple[type[Invariant], ...] = (
    StagesInOrder,
    NoEarlyWork,
    LeadWorksOnce,
    EachCpuOnce,
    OnlineSetConstant,
    UpdatesEnd,
)
