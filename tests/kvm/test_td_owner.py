"""User space that builds TDs: what it asks for and when, and what it makes of the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from bus.memory import PAGE_SIZE
from bus.messages import AdminDone
from bus.spec import Workload
from cpu.layout import MAX_TDS
from kvm.td_owner import PAGES, RUNS, TdOwner, contents
from kvm.workload import BUILDS, Build, Update, timeline
from seamldr.tdx_td import mrtd_of

MS = 1_000_000
LIFE = ["init_vm", "init_vcpu", "init_mem_region", "finalize_vm", *["run"] * RUNS, "destroy"]


class Scripted:
    """A KVM process whose answers a test sets: errnos by command, in turn; then 0."""

    spec = SimpleNamespace(vcpus=4, tds=2)

    def __init__(self, mrtd: str = "", **errnos: list[int]) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.facts: Counter[str] = Counter()
        self.records: list[dict[str, Any]] = []
        self.running: str | None = "1.5.08"
        self.errnos = errnos
        self.mrtd = mrtd
        self.waited = 0

    async def td_command(self, command: str, td: int, task: int, contents: Iterable[bytes] = ()) -> AdminDone:
        self.asked.append((command, td, task))
        left = self.errnos.get(command, [])
        errno = left.pop(0) if left else 0
        return AdminDone(1, errno, self.mrtd or right(td) if command == "finalize_vm" and not errno else "")

    async def next_update(self) -> None:
        self.waited += 1
        assert self.asked[-1][0] == "init_mem_region"

    def emit(self, event: str, **fields: Any) -> int:
        self.records.append({"event": event, **fields})
        return 0

    def count(self, fact: str, by: int = 1) -> None:
        self.facts[fact] += by

    def version(self) -> str | None:
        return self.running


def right(td: int) -> str:
    """What a TD must measure."""
    return mrtd_of({PAGE_SIZE * index: page for index, page in enumerate(contents(td))}).hex()


def live(user: Scripted, *, over_update: bool = False) -> TdOwner:
    """One build and what follows from it."""
    owner = TdOwner(user)  # type: ignore[arg-type]
    trio.run(owner.live, Build(over_update))
    return owner


@pytest.mark.parametrize("over_update", [False, True])
def test_a_life_of_a_td(over_update: bool) -> None:
    """Built, run, ended, in this order, as one TD with one vCPU; it waits for an update if told to."""
    user = Scripted()
    owner = live(user, over_update=over_update)
    assert user.asked == [(command, 2, 6) for command in LIFE]
    assert user.records == [{"event": "td_measured", "td": 2, "mrtd": right(2), "expected": right(2)}]
    assert user.facts == {"tds_begun": 1, "tds_built": 1, "tds_ended": 1}
    assert (user.waited, owner.in_build, owner.not_waiting) == (over_update, 0, 0)


def test_a_build_that_fails_is_tried_once_more_with_another_td() -> None:
    """The first TD is ended, the second lives; after a second failure nothing more is tried."""
    user = Scripted(finalize_vm=[-5])
    live(user)
    assert [command for command, td, _ in user.asked if td == 2] == [*LIFE[:4], "destroy"]
    assert [command for command, td, _ in user.asked if td == 3] == LIFE
    assert user.facts == {"tds_begun": 2, "tds_failed": 1, "tds_built": 1, "tds_ended": 2}
    again = Scripted(init_vm=[-5] * 9)
    live(again)
    assert [command for command, *_ in again.asked] == ["init_vm", "destroy"] * 2


def test_what_leaks_is_not_used_again() -> None:
    """The number of a TD whose end failed is gone for good; that of another comes back when it is its turn."""
    user = Scripted(destroy=[-5])
    owner = TdOwner(user)  # type: ignore[arg-type]

    async def many() -> None:
        for _ in range(MAX_TDS):
            await owner.live(Build(False))

    trio.run(many)
    used = [td for command, td, _ in user.asked if command == "init_vm"]
    assert used[: MAX_TDS - 2] == list(range(2, MAX_TDS)) and used[MAX_TDS - 2 :] == [3, 4]


def test_without_a_module_nothing_is_tried() -> None:
    """After an update that failed for good no TD is begun."""
    user = Scripted()
    user.running = None
    live(user)
    assert user.asked == []


def test_the_owner_tells_what_was_measured_wrongly() -> None:
    """Both values go on record."""
    user = Scripted(mrtd="00" * 48)
    live(user)
    (record,) = user.records
    assert (record["mrtd"], record["expected"]) == ("00" * 48, right(2))


def test_no_two_tds_start_with_the_same_pages() -> None:
    """Whole pages, all different."""
    pages = [page for td in range(MAX_TDS) for page in contents(td)]
    assert {len(page) for page in pages} == {PAGE_SIZE} and len(set(pages)) == MAX_TDS * PAGES


# When


def planned(updates: int, *, builds: bool = True, ms: int = 1000) -> list[tuple[int, Any]]:
    """The timeline of a run."""
    workload = Workload(duration_ns=ms * MS, updates=updates, guest_ns=1, action_ns=5 * MS)
    return list(timeline(workload, 3, 4, 2, builds=builds))


@pytest.mark.parametrize("updates", [0, 1, 2, 7, 8, 9, 50, 1000])
def test_tds_are_built_in_front_of_updates(updates: int) -> None:
    """Each build begins a little before an update and waits for it by turns; there are not more than BUILDS."""
    actions = planned(updates)
    assert [at for at, _ in actions] == sorted(at for at, _ in actions)
    found = [action for _, action in actions if isinstance(action, Build)]
    assert 1 <= len(found) <= BUILDS
    assert [build.over_update for build in found] == [bool(updates) and at % 2 == 0 for at in range(len(found))]
    order = [action for _, action in actions if isinstance(action, Build | Update)]
    if updates:
        assert all(isinstance(after, Update) for before, after in pairwise(order) if isinstance(before, Build))


def test_builds_change_nothing_else() -> None:
    """Without TDs the timeline is that of the seed alone."""
    with_builds = [item for item in planned(5) if not isinstance(item[1], Build)]
    assert with_builds == planned(5, builds=False)
