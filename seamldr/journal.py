"""The journal of SEAMCALLs: the last call of each LP, what became of it, and whose it was. A pure core.

A CPU whose call got no answer, because the process that serves SEAM died, sends the same call again, with the same
number. The journal is kept with the state that the call changed, in one commit; so whoever takes over knows whether
the call was refused, is inside, or is over, and its effects happen exactly once.
"""

from __future__ import annotations

import msgspec

Registers = tuple[int, ...]
Answer = tuple[int, Registers]
"""RAX and the other registers of SEAMRET."""


class SeamCall(msgspec.Struct, array_like=True):
    """A SEAMCALL number `call` of a CPU in its `incarnation`.

    While the LP is inside, `over` is False; a call of the TDX module has its `answer` all the same, unless it runs a
    `guest`. `entered` False is VMfailInvalid.
    """

    incarnation: int
    call: int
    rax: int
    registers: Registers
    entered: bool = True
    guest: bool = False
    over: bool = False
    answer: Answer | None = None

    @property
    def result(self) -> Answer:
        """What the CPU gets when the call is over: its own registers if SEAM was not entered."""
        return self.answer or (self.rax, self.registers)


class Journal:
    """The last call of each LP; `changed` are LPs whose entry is not kept yet."""

    def __init__(self) -> None:
        self.calls: dict[int, SeamCall] = {}
        self.changed: set[int] = set()

    def begin(self, lp: int, call: SeamCall) -> None:
        """A new call, in the place of the last."""
        self.calls[lp] = call
        self.changed.add(lp)

    def inside(self, lp: int) -> SeamCall | None:
        """The call that the LP is in."""
        call = self.calls.get(lp)
        return call if call is not None and not call.over else None

    def end(self, lp: int, answer: Answer | None) -> None:
        """The call of the LP is over; without an answer it ended in VMfailInvalid."""
        call = self.calls[lp]
        call.over, call.entered, call.answer = True, answer is not None, answer
        self.changed.add(lp)

    def find(self, lp: int, incarnation: int, call: int) -> SeamCall | None:
        """The entry of this very call, if it is the LP's last."""
        found = self.calls.get(lp)
        return found if found is not None and (found.incarnation, found.call) == (incarnation, call) else None

    def records(self) -> dict[str, bytes]:
        """What changed since the last time, by record name."""
        records = {f"call:{lp}": msgspec.msgpack.encode(self.calls[lp]) for lp in self.changed}
        self.changed.clear()
        return records

    def remember(self, name: str, data: bytes) -> None:
        """Take in a record of `records`."""
        self.calls[int(name.removeprefix("call:"))] = msgspec.msgpack.decode(data, type=SeamCall)
