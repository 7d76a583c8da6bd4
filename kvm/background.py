"""Small trio helpers of the launcher: a deadline on an event, and tasks that outlive a cancelled block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


async def within(seconds: float, event: trio.Event) -> bool:
    """Wait for the event, at most that long; whether it came."""
    with trio.move_on_after(seconds):
        await event.wait()
    return event.is_set()


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks end with the block, not before: they go on while a block that is cancelled cleans up.

    What ends it early is raised as itself, not in a group.
    """

    async def serve(task_status: trio.TaskStatus[trio.Nursery]) -> None:
        await trio.lowlevel.checkpoint()  # if the block is cancelled already, not to begin is the only chance
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                task_status.started(nursery)
                await trio.sleep_forever()

    try:
        async with trio.open_nursery() as outer:
            nursery: trio.Nursery = await outer.start(serve)
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _unwrapped(group) from None


def _unwrapped(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """A group without its cancellations: its exception itself if it is one, and Ctrl-C before all others."""
    if group.subgroup(KeyboardInterrupt):
        return KeyboardInterrupt()
    rest: BaseException = group.split(trio.Cancelled)[1] or group
    while isinstance(rest, BaseExceptionGroup) and len(rest.exceptions) == 1:
        rest = rest.exceptions[0]
    return rest
