"""What `--watch` shows: a machine as it was seen, drawn for a terminal of a given size, or told in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from rich.text import Text

from cpu.board import SPENT_IN, Doing
from kvm.observer import CpuSeen, Seen, UpdateSeen
from seamldr.lock_board import LockRow
from seamldr.update import ModuleUpdateState

LABEL = 8
STAGES = tuple(ModuleUpdateState)[1:]
GROUP = 8
"""CPUs of a grid that stand together."""
GRID_LABEL = 5
MIN_EVENTS = 3
"""Lines that the table leaves for events; if it cannot, there is a grid instead."""


class Look(msgspec.Struct, frozen=True):
    """How a state looks: its name, a letter for cells and for terminals without colours, and its colour."""

    name: str
    letter: str
    color: str
    loud: bool = True
    """Its cell in a grid shows the letter."""
    dark: bool = False
    """The colour is too dark for words."""

    @property
    def key(self) -> str:
        """Style of its letter on its colour."""
        return f"bold {'black' if self.loud else 'white'} on {self.color}"


LOOKS: dict[Doing, Look] = {
    Doing.GUEST: Look("guest", "g", "green4", loud=False),
    Doing.KERNEL: Look("kernel", "k", "dodger_blue2", loud=False),
    Doing.LOCK: Look("waits for lock", "L", "gold1"),
    Doing.P_SEAMLDR: Look("P-SEAMLDR", "P", "magenta2"),
    Doing.SEAM: Look("TDX module, TD", "T", "dark_cyan"),
    Doing.STOPPED: Look("stop_machine", "s", "orange4", loud=False),
    Doing.WAITS: Look("waits for CPU", "w", "dark_orange"),
    Doing.IDLE: Look("idle", ".", "grey30", loud=False, dark=True),
    Doing.STANDS: Look("stands still", "!", "grey93"),
    Doing.SIGSTOPPED: Look("SIGSTOPped", "Z", "indian_red1"),
    Doing.DEAD: Look("dead", "X", "red3"),
    Doing.OFFLINE: Look("offline", "-", "grey11", loud=False, dark=True),
}


class Heading(msgspec.Struct, frozen=True):
    """What the launcher knows: the machine in words, what it is at, updates done and asked for."""

    machine: str
    phase: str
    updates_done: int = 0
    updates: int = 0


def draw(seen: Seen, heading: Heading, events: Sequence[str], width: int, height: int) -> Text:
    """The machine on at most `height` lines of `width` columns: a row a CPU if there is room for it, else a grid."""
    head = [_title(heading, seen, width), _rates(seen), _locks(seen.locks), _update(seen, heading)]
    room = height - len(head)
    legend = _legend(seen, width, bars=True)
    if len(seen.cpus) + 2 + len(legend) + MIN_EVENTS <= room:
        body = [Text(), _table_head(width), *(_table_row(cpu, width) for cpu in seen.cpus), *legend]
    else:
        legend = _legend(seen, width)
        body = [*_grid(seen.cpus, width, room - len(legend)), *legend]
    if len(body) + 1 + MIN_EVENTS < room and body[0].plain:
        body.insert(0, Text())
    left = room - len(body)
    tail = [Text(f" {event}", style="bright_black" if at else "") for at, event in enumerate(reversed(events))]
    if left > len(tail) > 0:
        body.append(Text())
        left -= 1
    lines = [*head, *body, *tail[: max(0, left)]][:height]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def line_of(seen: Seen, heading: Heading) -> str:
    """The same in one line, for where there is no terminal."""
    states = seen.states()
    counts = ", ".join(f"{states[doing]} {LOOKS[doing].name}" for doing in LOOKS if states[doing])
    rates = f"{seen.per_s.exits:,.0f} exits/s, {seen.per_s.calls:.0f} P-SEAMLDR calls/s"
    parts = [heading.phase, counts, rates, _locks(seen.locks).plain[LABEL:]]
    if seen.update.number:
        parts.append(f"update {_progress(seen.update)}")
    if seen.totals.errors:
        parts.append(f"{seen.totals.errors} VMX errors")
    return "; ".join(parts)


# The head


def _title(heading: Heading, seen: Seen, width: int) -> Text:
    room = max(0, width - len(heading.phase) - 2)
    left = f"{heading.machine}   module {seen.module or 'down'}"[:room]
    return Text().append(left.ljust(room) + "  ", style="bold").append(heading.phase, style="bold green")


def _labelled(label: str) -> Text:
    return Text().append(label.ljust(LABEL), style="dim")


def _rates(seen: Seen) -> Text:
    rates = seen.per_s
    text = _labelled("rates").append(
        f"exits {rates.exits:,.0f}/s   P-SEAMLDR {rates.calls:.0f}/s   IPIs {rates.ipis:,.0f}/s   "
        f"grants {rates.grants:.0f}/s, wait {time_text(seen.wait_ns)}"
    )
    if seen.totals.errors or seen.dead_vcpus:
        text.append(f"   {seen.totals.errors:.0f} VMX errors, {seen.dead_vcpus} vCPUs dead", style="bold red")
    return text


def _locks(locks: Iterable[LockRow]) -> Text:
    """The first lock that was ever asked for is seamldr_lock, unless the strategy has others: it is always there."""
    text = _labelled("locks")
    busy = [lock for lock in locks if lock.holder is not None or lock.waiting]
    for at, lock in enumerate(sorted(busy, key=lambda lock: lock.name != "seamldr_lock")):
        text.append("   " if at else "").append(lock.name, style="bold").append(" ")
        text.append("free" if lock.holder is None else f"cpu{lock.holder}", style=LOOKS[Doing.P_SEAMLDR].color)
        if lock.waiting:
            more = " ..." if lock.waiters > len(lock.waiting) else ""
            queue = " ".join(f"cpu{cpu}" for cpu in lock.waiting)
            text.append(f", {lock.waiters} wait: {queue}{more}", style=LOOKS[Doing.LOCK].color)
    return text if busy else text.append("nobody holds one")


def _update(seen: Seen, heading: Heading) -> Text:
    update = seen.update
    text = _labelled("update").append(f"{heading.updates_done} of {heading.updates} ended  ")
    if update.number and not update.running:
        text.append(f" {_progress(update)}", style="red" if update.failed else "")
    elif update.running:
        text.append(f" {update.number}:")
        for stage in STAGES:
            if stage is update.stage and not update.gathers:
                style = "bold red" if update.failed else "bold yellow"
                text.append(f" {stage.name} {update.acked}/{update.online}", style=style)
            else:
                text.append(f" {stage.name}", style="green" if stage < update.stage else "dim")
    if update.gathers or (update.stop and not update.running):
        text.append(f"   stop_machine: {update.stop.name} {update.stopped}/{update.stopping}", style="yellow")
    return text


def _progress(update: UpdateSeen) -> str:
    """ "2: CPU_INSTALL 3/8" """
    if update.over:
        return f"{update.number}: done"
    words = f"{update.number}: {update.stage.name} {update.acked}/{update.online}"
    if update.failed:
        return f"{words}, failed on {update.failed}"
    return words if update.running else f"{words}, not running"


# A row a CPU

_COLUMNS = (("CPU", 4), ("does", 15), ("for", 7), ("what", 19), ("exits/s", 7), ("calls", 5), ("tasks", 5))


def _table_head(width: int) -> Text:
    text = Text(style="dim")
    for name, columns in _COLUMNS:
        text.append(name.rjust(columns) + " " if name not in ("does", "what") else name.ljust(columns))
    return text.append("last second"[: max(0, width - text.cell_len)])


def _table_row(cpu: CpuSeen, width: int) -> Text:
    look = LOOKS[cpu.doing]
    numbers = (f"{cpu.exits_per_s:7.0f}", f"{cpu.calls:5}", f"{cpu.tasks:5}")
    text = Text(f"{cpu.number:4} ")
    text.append(look.name.ljust(15), style="dim" if look.dark else look.color)
    text.append(f"{time_text(cpu.for_ns):>7} {cpu.what[:18]:19}{' '.join(numbers)} ")
    if cpu.errors:
        text.append(f"{cpu.errors} errors ", style="bold red")
    return text.append_text(_bar(cpu.shares, width - text.cell_len - 1))


def _bar(shares: Sequence[float], cells: int) -> Text:
    """Shares of the last second, side by side; each cell has its letter, which shows where there are no colours."""
    text, done, past = Text(), 0, 0.0
    for doing, share in zip(SPENT_IN, shares, strict=False):
        past += share
        upto = round(past * max(0, cells))
        color = LOOKS[doing].color
        text.append(LOOKS[doing].letter * (upto - done), style=f"{color} on {color}")
        done = upto
    return text


# A cell a CPU


def _grid(cpus: Sequence[CpuSeen], width: int, height: int) -> list[Text]:
    """Cells in groups, as wide as fit; if not even single letters fit, the first rows and how many CPUs are missing."""
    for cell in (2, 1):
        groups = max(1, (width - GRID_LABEL + 1) // (GROUP * cell + 1))
        per_row = GROUP << (groups.bit_length() - 1)
        rows = [_grid_row(cpus[at : at + per_row], cell) for at in range(0, len(cpus), per_row)]
        if len(rows) <= height:
            return rows
    shown = max(0, height - 1)
    missing = len(cpus) - shown * per_row
    return [*rows[:shown], Text(f"{'':{GRID_LABEL}}and {missing} CPUs more", style="dim")]


def _grid_row(cpus: Sequence[CpuSeen], cell: int) -> Text:
    text = Text(f"{cpus[0].number:{GRID_LABEL - 1}} ", style="")
    run, last = "", ""
    for at, cpu in enumerate(cpus):
        look = LOOKS[cpu.doing]
        style = look.key if look.loud else f"{look.color} on {look.color}"
        if at and at % GROUP == 0:
            text.append(run, style=last).append(" ")
            run = ""
        elif style != last:
            text.append(run, style=last)
            run = ""
        run, last = run + look.letter.ljust(cell), style
    return text.append(run, style=last)


def _legend(seen: Seen, width: int, *, bars: bool = False) -> list[Text]:
    """The states to be seen, also in bars if there are `bars`, with their number of CPUs; as many lines as needed."""
    lines = [Text(" " * GRID_LABEL)]
    shares = [cpu.shares for cpu in seen.cpus if cpu.shares] if bars else []
    barred = {doing for doing, column in zip(SPENT_IN, zip(*shares, strict=True), strict=False) if max(column) > 0.01}
    states = seen.states()
    for doing, look in LOOKS.items():
        count = states[doing]
        if not count and doing not in barred:
            continue
        entry = Text().append(look.letter, style=look.key).append(f" {look.name} {count}  ")
        if lines[-1].cell_len + entry.cell_len > width + 2:
            lines.append(Text(" " * GRID_LABEL))
        lines[-1].append_text(entry)
    for line in lines:
        line.rstrip()
    return lines


def time_text(ns: float) -> str:
    """
    >>> [time_text(ns) for ns in (0, 340_000, 12_000_000, 1_230_000_000, 75e9)]
    ['0.0 ms', '0.3 ms', '12 ms', '1.2 s', '75 s']
    """
    value, unit = (ns / 1e6, "ms") if ns < 1e9 else (ns / 1e9, "s")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
