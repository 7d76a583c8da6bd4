"""A process that sends numbered messages to one node and leaves when all are acknowledged.

Arguments: directory, own node, target node, how many.
"""

import sys

import trio

from bus.clock import LamportClock
from bus.endpoint import open_endpoint
from bus.link import Identity
from bus.messages import Ring


def on_refused(reason: str, head: bytes) -> None:
    raise SystemExit(f"refused: {reason} {head!r}")


async def main(directory: str, node: str, target: str, count: int) -> None:
    async with open_endpoint(Identity(node, 1), directory, b"k" * 16, LamportClock(), on_refused) as endpoint:
        for first in range(0, count, 500):
            for number in range(first, min(first + 500, count)):
                endpoint.send(target, Ring(number))
            endpoint.drain_nowait()
            await trio.lowlevel.checkpoint()
        await endpoint.flush()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
