"""`--watch`: a task beside a running machine that looks at it a few times a second and shows what it sees on stderr.

On a terminal it is a view that changes in place and is gone at the end; elsewhere a line a second. Whatever it costs,
it is at most `SHARE` of one processor: if drawing is dear, it is drawn less often.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections import deque
from itertools import cycle, islice
from time import monotonic_ns, thread_time
from types import TracebackType
from typing import Any, Self

import trio
from rich.console import Console
from rich.live import Live
from rich.text import Text

from bus.spec import cpu_number
from kvm.machine import Machine
from kvm.observer import MachineObserver, Seen
from kvm.watch_view import Heading, draw, line_of

PERIOD_S = 0.25
LINE_PERIOD_S = 1.0
SHARE = 0.015
EVENTS = 40
ASKED = 16
"""Processes of which a look asks /proc whether they are stopped; those of many CPUs take turns."""


class Watching:
    """Shows one machine, whose `watch` is `follow`, while this context is entered."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._update = (0, False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            self._console.show_cursor(True)  # so that not even SIGKILL leaves a terminal without one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def judging(self) -> None:
        """The machine is gone, its records are judged."""
        if self._live is not None:
            self._live.update(Text(f"{self._title}: judging the records"), refresh=True)

    # Looking

    async def follow(self, machine: Machine) -> None:
        """Look and show, until cancelled or until nothing can be shown any more."""
        self._began_ns = monotonic_ns()
        self._machine = machine
        spec = machine.spec
        self._observer = MachineObserver(machine.memory, spec.cpus, spec.vcpus, spec.tds)
        self._turns = cycle(range(spec.cpus))
        self._stopped: set[int] = set()
        machine.node.recorder.watcher = self._happened
        with contextlib.suppress(OSError):  # a terminal that is gone is no reason to end a run
            while True:
                began = thread_time()
                self._look()
                cost = thread_time() - began
                period = LINE_PERIOD_S if self._live is None else PERIOD_S
                await trio.sleep(max(period, cost / SHARE))

    @trio.lowlevel.enable_ki_protection
    def _look(self) -> None:
        """Ctrl-C comes after it, not in the middle of a line."""
        seen = self._observer.look(monotonic_ns(), self._ask_stopped())
        self._note_updates(seen)
        heading = self._heading(seen)
        if self._live is None:
            print(f"seamlab: {line_of(seen, heading)}", file=sys.stderr, flush=True)
        else:
            width, height = self._console.size
            self._live.update(draw(seen, heading, tuple(self._events), width, height - 1), refresh=True)

    def _ask_stopped(self) -> frozenset[int]:
        """CPUs whose process stands by SIGSTOP, whoever sent it."""
        for number in islice(self._turns, min(ASKED, self._machine.spec.cpus)):
            process = self._machine.processes.get(f"cpu{number}")
            if process is not None and process.online and process.is_stopped():
                self._stopped.add(number)
            else:
                self._stopped.discard(number)
        return frozenset(self._stopped)

    def _heading(self, seen: Seen) -> Heading:
        machine, spec = self._machine, self._machine.spec
        sizes = [f"{spec.cpus} CPUs", f"{spec.vcpus} vCPUs", *([f"{spec.tds} TDs"] if spec.tds else [])]
        done, updates = machine.facts.get("updates_done", 0), machine.facts.get("updates", 0)
        return Heading("   ".join([self._title, *sizes]), self._phase(seen), done, max(updates, spec.workload.updates))

    def _phase(self, seen: Seen) -> str:
        machine = self._machine
        online = sum(process.online for process in machine.processes.values())
        if machine.ended:
            return f"going down, {online} processes left"
        if not seen.began_ns:
            return f"starting, {online} of {len(machine.spec.nodes())} processes online"
        ran, planned = (seen.now_ns - seen.began_ns) / 1e9, machine.spec.workload.duration_ns / 1e9
        return f"{ran:.1f} s of {planned:g}" if ran <= planned else f"{ran:.1f} s, finishing"

    # Events

    def _say(self, text: str) -> None:
        self._events.append(f"{(monotonic_ns() - self._began_ns) / 1e9:7.2f} s  {text}")

    def _happened(self, event: str, fields: dict[str, Any]) -> None:
        """The launcher has written a record."""
        match event:
            case "fault":
                self._say(f"fault: {fields['kind']} {fields['name']} {fields['what']}".rstrip())
            case "process_exit" if not fields["wanted"]:
                status = fields["status"]
                how = signal.Signals(-status).name if status < 0 else f"status {status}"
                self._say(f"{fields['name']} is dead ({how})")
            case "process_online" if fields["incarnation"] > 1:
                self._say(f"{fields['name']} is back, incarnation {fields['incarnation']}")
            case "process_waits" if cpu_number(fields["name"]) is not None:
                self._say(f"{fields['name']} {fields['what']}")
            case "machine_reset":
                self._say("power cycle")
            case "machine_end" if fields["why"]:
                self._say(f"the machine ends: {fields['why']}")

    def _note_updates(self, seen: Seen) -> None:
        """An update that was running at the last look and is over now."""
        update, (number, running) = seen.update, self._update
        if update.running and (number, running) != (update.number, True):
            self._say(f"update {update.number} begins")
        elif running and not update.running:
            where = f"fails at {update.stage.name} on {update.failed} CPUs" if update.failed else "is given up"
            self._say(f"update {update.number} {'is done' if update.over else where}")
        self._update = (update.number, update.running)
