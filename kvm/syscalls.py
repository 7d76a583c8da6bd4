"""The kernel as user space reaches it: requests to CPUs and their answers, and the words that anybody may read.

What user space's files do (`kvm.sysfs`), what the owners of TDs ask for, and what an operator types ends up here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from errno import EIO, ENXIO

import trio

from bus.files import read_file_within
from bus.memory import PAGE_SIZE, PhysicalMemory
from bus.messages import AdminDone, Body, BuildTd, Do, Hotplug, InstallModule, ReadVersion
from bus.node import Node
from cpu.layout import TDX_STATE, per_cpu
from kvm.compose import Knobs, kernel
from kvm.pages import PagePool
from kvm.requests import Requests
from kvm.sysfs import LARGEST_IMAGE, SysfsTree
from seamldr.image import MAX_FILE
from seamldr.structures import SeamldrInfo
from seamldr.update import version_text
from seamldr.upload import Support


class Syscalls:
    """Base of the KVM process. `facts` are counts that the launcher is told; `sysfs` the tree of files, if it is there.
    """

    def __init__(self, node: Node, memory: PhysicalMemory) -> None:
        self.node = node
        self.emit = node.emit
        self.spec = node.spec
        self.memory = memory
        incarnation = node.identity.incarnation
        self.pool = PagePool(node.spec.seed, incarnation)
        self.requests = Requests(self.pool, incarnation)
        self.facts = {"requests": 0, "done": 0, "stale": 0, "updates": 0, "updates_done": 0}
        self.changed = trio.Event()
        self.sysfs: SysfsTree | None = None
        self._leaving: set[int] = set()
        self._rng = random.Random(node.spec.seed)
        self._worker = trio.Lock()

    def count(self, fact: str, by: int = 1) -> None:
        """`by` more of something that the launcher is told."""
        self.facts[fact] += by
        self.wake()

    def wake(self) -> None:
        """Something has changed: whoever waits in `until` looks again."""
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds."""
        while not condition():
            await self.changed.wait()

    def new_request(self, kind: str, cpu: int, pages: list[int], *, wanted: bool = False) -> int:
        """The number of a new request, which is on record."""
        request = self.requests.new(cpu, pages, wanted=wanted)
        self.facts["requests"] += 1
        self.node.emit("request", request=request, kind=kind, cpu=cpu)
        return request

    # The kernel behind the files of the user's interface

    async def install(self, image: bytes, length: int, cpu: int | None = None) -> int:
        """Have the image installed by a worker on `cpu`, or on some CPU; 0 or a negative errno. One at a time."""
        async with self._worker:
            count = max(1, -(-len(image) // PAGE_SIZE))
            pages = self.pool.take(count + 1)
            for at, page in enumerate(pages[:count]):
                self.memory.write(page, image[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])
            self.facts["updates"] += 1

            def message(request: int) -> InstallModule:
                return InstallModule(request, length, tuple(pages[:count]), pages[count])

            done = await self.ask("install", pages, message, cpu=cpu)
            self.count("updates_done")
        if self.sysfs is not None:
            self.sysfs.refresh()
        return done.errno

    async def settled(self) -> None:
        """Return when no install runs."""
        async with self._worker:
            pass

    async def seamldr_info(self) -> tuple[int, SeamldrInfo | None]:
        """What SEAMLDR.INFO says on some CPU; the errno if it failed, 0 or negative."""
        (page,) = self.pool.take(1)
        done = await self.ask("read_version", [page], lambda request: ReadVersion(request, page))
        info = None if done.errno else SeamldrInfo.decode(self.memory.read(page, PAGE_SIZE))
        remaining = info.num_remaining_updates if info else 0
        self.emit("seamldr_info", request=done.request, errno=done.errno, remaining=remaining)
        return done.errno, info

    async def td_command(self, command: str, td: int, task: int, contents: Iterable[bytes] = ()) -> AdminDone:
        """Have some CPU do one step in the life of a TD; `contents` go to pages of user space before."""
        contents = list(contents)
        pages = self.pool.take(len(contents))
        for page, content in zip(pages, contents, strict=True):
            self.memory.write(page, content)
        return await self.ask(
            f"td_{command}", pages, lambda request: BuildTd(request, command, td, task, tuple(pages))
        )

    def version(self) -> str | None:
        """The module's version as the kernel knows it; None if TDX is not initialized."""
        return version_text(self.load(TDX_STATE.version)) if self.load(TDX_STATE.initialized) else None

    def all_online(self) -> bool:
        """Whether every CPU is online."""
        return all(self.load(per_cpu(cpu).online) for cpu in range(self.spec.cpus))

    def log(self, text: str) -> None:
        """A line of the kernel log."""
        self.node.emit("log", text=text)

    def refuse(self, error: int, why: str) -> None:
        """Record an update that was refused before any CPU heard of it."""
        request = self.new_request("install", 0, [])
        self.requests.end(AdminDone(request, error, why))
        self.node.emit("admin_begin", request=request, kind="install")
        self.node.emit("update_refused", errno=error, why=why)
        self.node.emit("admin_end", request=request, kind="install", errno=error, text=why)

    def support(self) -> Support:
        """What this kernel knows when its driver is loaded; with the gate off it does not mind the SEAMRET erratum."""
        knobs = Knobs(**self.spec.knobs)
        gate = kernel(self.spec.strategy, knobs, self.spec.cpus).knobs["enforce_gate"]
        sysinfo, features0 = bool(self.load(TDX_STATE.initialized)), self.load(TDX_STATE.features0)
        return Support(sysinfo, features0, bool(gate and not knobs.vmx_basic_bit60))

    async def ask(
        self, kind: str, pages: list[int], message: Callable[[int], Body], *, cpu: int | None = None, but: int = -1
    ) -> AdminDone:
        """Send a CPU a request and wait for its answer: `cpu` if it can take one, else any, not `but`.

        `pages` belong to the request, and are free again when the answer is there. -ENXIO if the CPU dies over it, or
        if there is none.
        """
        usable = sorted(self.usable() - {but})
        if not usable:
            self.pool.give(pages)
            return AdminDone(0, -ENXIO, "no CPU is active")
        chosen = cpu if cpu in usable else self._rng.choice(usable)
        request = self.new_request(kind, chosen, pages, wanted=True)
        self.node.endpoint.send(f"cpu{chosen}", message(request))
        try:
            await self.until(lambda: self.requests.open[request].done is not None)
        except trio.Cancelled:
            self.requests.forget(request)
            raise
        done = self.requests.answer(request)
        assert done is not None
        return done

    def usable(self) -> set[int]:
        """CPUs that take requests and tasks: online, not dead, not on their way out."""
        areas = {cpu: per_cpu(cpu) for cpu in range(self.spec.cpus) if cpu not in self._leaving}
        return {cpu for cpu, area in areas.items() if self.load(area.active) and not self.load(area.dead)}

    def load(self, word: int) -> int:
        """The value of a word of the kernel's."""
        value, stamp = self.memory.load(word)
        self.node.clock.merge(stamp)
        return value

    def store(self, word: int, value: int) -> None:
        """Store a word that is user space's own."""
        self.memory.store(word, value, self.node.clock.tick())

    # What an operator asks for

    async def obey(self, do: Do) -> tuple[int, str]:
        """What an operator asks for; 0 or a negative errno, and a text."""
        if do.what in ("offline", "online"):
            async with self._worker:  # user space takes no CPU away from an update
                done = await self._hotplug(do.cpu, online=do.what == "online")
        elif do.what == "read":
            (page,) = self.pool.take(1)
            done = await self.ask("read_version", [page], lambda request: ReadVersion(request, page), cpu=do.cpu)
        else:
            try:
                image = file_content(do.path)
            except OSError as error:
                return -(error.errno or EIO), str(error)
            return await self.install(image[:LARGEST_IMAGE], len(image), do.cpu), ""
        return done.errno, done.text

    async def _hotplug(self, cpu: int, *, online: bool) -> AdminDone:
        """Write to the `online` file of a CPU. What it does for user space ends before: a worker cannot be moved."""
        if not online:
            self._leaving.add(cpu)
            await self.until(lambda: not self.requests.on(cpu))
        kind = "online" if online else "offline"
        done = await self.ask(kind, [], lambda request: Hotplug(request, cpu, online), but=cpu)
        self._leaving.discard(cpu)
        return done


def file_content(path: str) -> bytes:
    """All of an image file; raises `OSError`."""
    return read_file_within(path, MAX_FILE)
