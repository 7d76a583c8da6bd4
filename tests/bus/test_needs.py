"""Which invariant needs which field is read off the code, and is what the code does."""

from __future__ import annotations

from typing import Any

import pytest
from history import INFO, Run

from bus.events import EVENTS
from bus.invariant import IF_FAILED
from bus.invariants import INVARIANTS
from bus.needs import STATE, needs
from bus.records import COMMON_FIELDS, CPU_FIELDS, Record
from bus.shadow import Shadow

V = 0x12000


class Spy(dict[str, Any]):
    """A record that notes which of its fields are read while `reader` is set."""

    reader = ""
    reads: set[tuple[str, str, str]]

    def __getitem__(self, field: str) -> Any:
        self.note(field)
        return super().__getitem__(field)

    def get(self, field: str, default: Any = None) -> Any:
        self.note(field)
        return super().get(field, default)

    def note(self, field: str) -> None:
        if Spy.reader and field not in COMMON_FIELDS | CPU_FIELDS:
            self.reads.add((super().__getitem__("event"), field, Spy.reader))


def reads(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str, str]]:
    """(event, field, who read it) over a whole history; the stories of violations are not told."""
    found: set[tuple[str, str, str]] = set()
    monkeypatch.setattr(Spy, "reads", found, raising=False)
    shadow, invariants = Shadow({}), [invariant() for invariant in INVARIANTS.values()]
    for invariant in invariants:
        monkeypatch.setattr(invariant, "violated", lambda *_: None)
    for record in map(Spy, records):
        for invariant in invariants:
            handler = invariant.handlers().get(dict.__getitem__(record, "event"))
            if handler is not None and not (record["event"] in IF_FAILED and record["result"] == "ok"):
                Spy.reader = invariant.id
                handler(record, shadow)
                Spy.reader = ""
        Spy.reader = STATE
        shadow.apply(record)
        Spy.reader = ""
    return found


def history() -> Run:
    """A history in which most kinds of records happen."""
    run = Run().cpu(0).track(V, 0).enter(V, "vmlaunch").put(V).cpu(0, "reader").lock_request(1)
    run.node("seamldr").queue(0, 1).grant(0, 1, 1).cpu(0, "reader").lock_hold(1, 1).begin(V).seamcall(INFO, lost=V)
    run.vmptrst(V).vmptrld(V, reason="restore").end(V).lock_drop(1).node("seamldr").release(0, 1)
    run.cpu(0).vcpu_load(V, skipped=True).vmread("invalid").enter(V, result="valid:5").wrong_data(V, "GUEST_RIP").put(V)
    run.cpu(1).csd_lock(0, 7).cpu(0, "irq", irqs=False).untrack(V).csd_run(1, 7).cpu(1).csd_done(7).track(V, 1)
    run.ipi_send(0, 5).cpu(0).ipi_deliver(1, 5).cpu(0, "stopper", irqs=False).update_begin()
    run.stage("SHUTDOWN", "CPU_INSTALL").cpu(0, "stopper").update_end().admin("install")
    run.cpu(0).write("vmxoff", active=0, result="ok").write("vcpu_destroy", vcpu=0, vmcs=V)
    run.node("seamldr").seam_enter(0).seam_return(0).restart().claim(0, 9, 1).restore(0, 9, 1).expire(0, 9, 1)
    run.upload("receiving").read("version", "1.5.7").request(3, "read_version").info(3, 10)
    return run.exit("cpu1", wanted=False, status=-9).finish()


def test_nothing_is_read_that_the_table_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an invariant or the state reads of a record while a history goes by, it is said to need."""
    found = reads(history().records, monkeypatch)
    assert len(found) > 120
    told = {(event, field, who) for (event, field), names in needs().items() for who in names}
    kept = {(event, field) for event, field, who in told if who == STATE}
    assert {one for one in found - told if one[:2] not in kept and one[1] in EVENTS[one[0]].fields} == set()


def test_what_is_needed_is_in_the_event_table() -> None:
    """Only fields and events that there are, only invariants that there are."""
    for (event, field), who in needs().items():
        assert field in ("", *EVENTS[event].fields) and {*who} <= {STATE, *INVARIANTS}


def test_every_invariant_needs_something() -> None:
    """An invariant looks at events, or at the state, at the end."""
    looking = {who for names in needs().values() for who in names}
    assert INVARIANTS.keys() - looking <= {"I50", "I51"}


@pytest.mark.parametrize(
    ("event", "field", "who"),
    [
        ("seamcall_return", "lost", [STATE]),
        ("seamcall_return", "status", ["I28", "I33", "I34", "I35", "I38"]),
        ("cv_write", "old", []),
        ("lock_claim", "asked", ["I24"]),
    ],
)
def test_fields_are_followed_through_helpers_and_kept_records(event: str, field: str, who: list[str]) -> None:
    """Through functions that get the record, and records that are read later under another name."""
    assert needs().get((event, field), []) == who
