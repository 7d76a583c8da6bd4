"""A process that exchanges IPIs with others while its frames are dropped and repeated, and checks what it gets.

Arguments: directory, own node, the others (comma-separated), IPIs for each of them, probability of drop and of
duplication, seed. It prints `heard` and its counts when it has everything and everyone has what it sent, and leaves
when its standard input is closed: its last acknowledgements, too, may have to be repeated.
"""

import sys

import msgspec
import trio

from bus.clock import LamportClock
from bus.endpoint import Endpoint, open_endpoint
from bus.link import Delivery, Identity
from bus.linkfaults import LinkRule
from bus.messages import Ipi

BURST = 64
AT_MOST_S = 120


def on_refused(reason: str, head: bytes) -> None:
    raise SystemExit(f"refused: {reason} {head!r}")


class Counter:
    """IPIs by source; the vector is the number of the IPI, modulo 256, and so is the end of its id."""

    def __init__(self, others: list[str]) -> None:
        self.heard = dict.fromkeys(others, 0)

    def take(self, delivery: Delivery) -> None:
        node, number = delivery.source.node, self.heard[delivery.source.node]
        if delivery.body != Ipi(number % 256) or not delivery.id.endswith(f":{number + 1}"):
            raise SystemExit(f"{node} sent {delivery} where its IPI {number} should come")
        self.heard[node] += 1


async def send(endpoint: Endpoint, counter: Counter, count: int) -> None:
    for first in range(0, count, BURST):
        for node in counter.heard:
            for number in range(first, min(first + BURST, count)):
                endpoint.send(node, Ipi(number % 256))
        for delivery in endpoint.drain_nowait():
            counter.take(delivery)
        await trio.lowlevel.checkpoint()


async def receive(endpoint: Endpoint, counter: Counter, count: int) -> None:
    while min(counter.heard.values()) < count:
        await endpoint.wait()
        for delivery in endpoint.drain_nowait():
            counter.take(delivery)


async def serve(endpoint: Endpoint) -> None:
    while True:
        await endpoint.wait()
        for delivery in endpoint.drain_nowait():
            raise SystemExit(f"{delivery} is one too many")


async def main(directory: str, node: str, others: str, count: int, share: float, seed: int) -> None:
    counter = Counter(others.split(","))
    async with open_endpoint(Identity(node, 1), directory, b"k" * 16, LamportClock(), on_refused) as endpoint:
        endpoint.expect(counter.heard)
        if share:
            endpoint.set_link_faults([LinkRule(drop=share, duplicate=share)], seed)
        with trio.fail_after(AT_MOST_S):
            await send(endpoint, counter, count)
            await receive(endpoint, counter, count)
            await endpoint.flush()
        print("heard", msgspec.json.encode(endpoint.statistics()).decode(), flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, endpoint)
            await trio.to_thread.run_sync(sys.stdin.read)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    directory, node, others, count, share, seed = sys.argv[1:]
    trio.run(main, directory, node, others, int(count), float(share), int(seed))
