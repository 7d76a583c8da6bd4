"""What the bus costs: round trips and throughput, as ratios to blocking pyzmq in the same run.

    python tests/bench/bench_bus.py [ROUNDS]

Absolute times depend on the machine and its other load more than on the bus, so every round measures all variants, in
turning order, and the table gives the median over rounds of each variant's ratio to the two raw ones of its own round.
"""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from time import perf_counter

import trio
import zmq
from rich.console import Console
from rich.table import Table

from bus.clock import LamportClock
from bus.endpoint import Endpoint, open_endpoint
from bus.link import Identity
from bus.linkfaults import LinkRule
from bus.messages import Ring

ROOT = Path(__file__).resolve().parents[2]
TRIPS = 2000
FLOOD = 100_000
PAYLOAD = bytes(64)


# The bus


@contextlib.asynccontextmanager
async def endpoint(directory: str, node: str, other: str) -> AsyncIterator[Endpoint]:
    async with open_endpoint(Identity(node, 1), directory, bytes(16), LamportClock(), print) as end:
        end.member(other, 1, "online")
        yield end


async def bus_echo(directory: str) -> None:
    async with endpoint(directory, "echo", "main") as end:
        for _ in range(TRIPS):
            end.send("main", (await end.receive()).body)
        await end.flush()


async def bus_trips(directory: str) -> list[float]:
    times = []
    async with endpoint(directory, "main", "echo") as end:
        for n in range(TRIPS):
            began = perf_counter()
            end.send("echo", Ring(n))
            await end.receive()
            times.append(perf_counter() - began)
        await end.flush()
    return times


async def bus_flood(directory: str, rules: tuple[LinkRule, ...] = ()) -> None:
    async with endpoint(directory, "echo", "main") as end:
        end.set_link_faults(rules, 1)
        for n in range(FLOOD):
            end.send("main", Ring(n))
            if n % 64 == 0:
                end.drain_nowait()
                await trio.lowlevel.checkpoint()
        await end.flush()


async def bus_sink(directory: str, rules: tuple[LinkRule, ...] = ()) -> float:
    async with endpoint(directory, "main", "echo") as end:
        end.set_link_faults(rules, 2)
        await end.wait()
        began, count = perf_counter(), 0
        while count < FLOOD:
            await end.wait()
            count += len(end.drain_nowait())
        took = perf_counter() - began
        end.set_link_faults((), 0)  # the last acknowledgement gets through
        return took


BAD = (LinkRule(drop=0.1, duplicate=0.1),)


async def bad_bus_flood(directory: str) -> None:
    await bus_flood(directory, BAD)


async def bad_bus_sink(directory: str) -> float:
    return await bus_sink(directory, BAD)


# Blocking pyzmq, single frames and one-way sockets


@contextlib.contextmanager
def push_pull(directory: str, node: str, other: str):  # type: ignore[no-untyped-def]
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.set(zmq.RCVHWM, 0)
    outbox.set(zmq.SNDHWM, 0)
    inbox.bind(f"ipc://{directory}/{node}")
    outbox.connect(f"ipc://{directory}/{other}")
    yield inbox, outbox
    context.destroy(linger=1000)


async def push_pull_echo(directory: str) -> None:
    with push_pull(directory, "echo", "main") as (inbox, outbox):
        for _ in range(TRIPS):
            outbox.send(inbox.recv())


async def push_pull_trips(directory: str) -> list[float]:
    times = []
    with push_pull(directory, "main", "echo") as (inbox, outbox):
        for _ in range(TRIPS):
            began = perf_counter()
            outbox.send(PAYLOAD)
            inbox.recv()
            times.append(perf_counter() - began)
    return times


async def push_pull_flood(directory: str) -> None:
    with push_pull(directory, "echo", "main") as (inbox, outbox):
        for _ in range(FLOOD):
            outbox.send(PAYLOAD)
        inbox.recv()


async def push_pull_sink(directory: str) -> float:
    with push_pull(directory, "main", "echo") as (inbox, outbox):
        inbox.recv()
        began = perf_counter()
        for _ in range(FLOOD - 1):
            inbox.recv()
        took = perf_counter() - began
        outbox.send(b"")
    return took


# Blocking pyzmq, DEALER and ROUTER


@contextlib.contextmanager
def one_socket(directory: str, kind: int):  # type: ignore[no-untyped-def]
    context = zmq.Context()
    socket = context.socket(kind)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.SNDHWM, 0)
    if kind == zmq.ROUTER:
        socket.bind(f"ipc://{directory}/main")
    else:
        socket.connect(f"ipc://{directory}/main")
    yield socket
    context.destroy(linger=1000)


async def dealer_echo(directory: str) -> None:
    with one_socket(directory, zmq.DEALER) as dealer:
        dealer.send(b"here")
        for _ in range(TRIPS):
            dealer.send(dealer.recv())


async def router_trips(directory: str) -> list[float]:
    times = []
    with one_socket(directory, zmq.ROUTER) as router:
        name, _ = router.recv_multipart()
        for _ in range(TRIPS):
            began = perf_counter()
            router.send_multipart([name, PAYLOAD])
            router.recv_multipart()
            times.append(perf_counter() - began)
    return times


async def dealer_flood(directory: str) -> None:
    with one_socket(directory, zmq.DEALER) as dealer:
        for _ in range(FLOOD):
            dealer.send(PAYLOAD)
        dealer.recv()


async def router_sink(directory: str) -> float:
    with one_socket(directory, zmq.ROUTER) as router:
        name, _ = router.recv_multipart()
        began = perf_counter()
        for _ in range(FLOOD - 1):
            router.recv_multipart()
        took = perf_counter() - began
        router.send_multipart([name, b""])
    return took


TRIP = {
    "bus": (bus_trips, bus_echo),
    "PUSH/PULL": (push_pull_trips, push_pull_echo),
    "DEALER/ROUTER": (router_trips, dealer_echo),
}
FLOW = {
    "bus": (bus_sink, bus_flood),
    "bus, 10 % dropped, 10 % doubled": (bad_bus_sink, bad_bus_flood),
    "PUSH/PULL": (push_pull_sink, push_pull_flood),
    "DEALER/ROUTER": (router_sink, dealer_flood),
}
CHILDREN = {child.__name__: child for _, child in (*TRIP.values(), *FLOW.values())}
RAW = ("PUSH/PULL", "DEALER/ROUTER")


def measure(parent: Callable[[str], object], child: Callable[[str], object], cores: tuple[int, int]):  # type: ignore[no-untyped-def]
    """Run both sides, pinned to these cores, in a fresh directory."""
    directory = tempfile.mkdtemp(prefix="bus", dir="/tmp")
    command = [sys.executable, __file__, child.__name__, directory, str(cores[1])]
    process = subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores[0]})
    try:
        return trio.run(parent, directory)
    finally:
        os.sched_setaffinity(0, allowed)
        process.wait()
        shutil.rmtree(directory)


async def own_cost(directory: str) -> tuple[float, float]:
    """Microseconds for one `send`, and for one message of a drain."""
    count = 1000  # within the window of one link
    async with endpoint(directory, "a", "b") as a, endpoint(directory, "b", "a") as b:
        a.send("b", Ring(0))
        await b.receive()
        began = perf_counter()
        for n in range(count):
            a.send("b", Ring(n))
        sending = perf_counter() - began
        await trio.sleep(0.2)
        began, got = perf_counter(), 0
        while got < count:
            got += len(b.drain_nowait())
        return sending / count * 1e6, (perf_counter() - began) / count * 1e6


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[int(share * (len(times) - 1))] * 1e6


def ratios(rounds: list[dict[str, float]], name: str) -> list[str]:
    return [f"{statistics.median(one[name] / one[raw] for one in rounds):.2f}" for raw in RAW]


def add_rows(table: Table, what: str, unit: str, rounds: list[dict[str, float]]) -> None:
    for name in rounds[0]:
        table.add_row(
            what, name, f"{statistics.median(one[name] for one in rounds):,.0f} {unit}", *ratios(rounds, name)
        )


def main(rounds: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    same, two = (cores[0], cores[0]), (cores[0], cores[-1])
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(rounds):
        order = list(TRIP) if number % 2 else list(reversed(TRIP))
        for place, pinned in (("one core", same), ("two cores", two)):
            times = {name: measure(*TRIP[name], pinned) for name in order}
            for share in (0.5, 0.99):
                one = {name: percentile(times[name], share) for name in TRIP}
                results.setdefault((f"round trip, {place}, p{share * 100:.0f}", "us"), []).append(one)
        flows = list(FLOW) if number % 2 else list(reversed(FLOW))
        took = {name: measure(*FLOW[name], two) for name in flows}
        one = {name: FLOOD / took[name] / 1000 for name in FLOW}
        results.setdefault(("one way, two cores", "k/s"), []).append(one)
    table = Table("measure", "variant", "median", *(f"x {raw}" for raw in RAW), title="The bus against blocking pyzmq")
    for (what, unit), values in results.items():
        add_rows(table, what, unit, values)
        table.add_section()
    costs = []
    for _ in range(rounds):
        directory = tempfile.mkdtemp(prefix="bus", dir="/tmp")
        costs.append(trio.run(own_cost, directory))
        shutil.rmtree(directory)
    for index, what in enumerate(("own cost of a send", "own cost of a drained message")):
        table.add_row(what, "bus", f"{statistics.median(cost[index] for cost in costs):.1f} us", "", "")
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        os.sched_setaffinity(0, {int(sys.argv[3])})
        trio.run(CHILDREN[sys.argv[1]], sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else 5)
