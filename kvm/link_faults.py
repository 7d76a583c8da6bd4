"""Faults on the links of a live machine: the launcher tells every process what to do to the frames that leave it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import trio

from bus.linkfaults import LinkRule, is_exempt
from bus.messages import SetLinkFaults
from kvm.fleet import Fleet

IN_FORCE_S = 1.0
"""How long to wait for processes that do not answer; they obey when they go on."""


class FaultyLinks(Fleet):
    """Base of `Machine`: its link faults. A process that is started later gets those in force."""

    def __init__(self) -> None:
        super().__init__()
        self.link_rules: tuple[LinkRule, ...] = ()
        self._link_seed = 0

    async def set_link_faults(self, rules: Sequence[LinkRule], seed: int | None = None) -> None:
        """From now on these faults on the links of the machine, and no others; () for none.

        Returns when every process that runs has obeyed. `seed` of what is drawn, by default the machine's. Raises
        `ValueError` on a rule that applies to no link.
        """
        check_rules(rules, self.processes)
        self.link_rules = tuple(rules)
        self._link_seed = self.spec.seed if seed is None else seed
        what = msgspec.json.encode(rules).decode()
        self.node.emit("fault", kind="links", name="", incarnation=0, what=what)
        nodes = [name for name, process in self.processes.items() if not process.gone.is_set()]
        self._tell(nodes)
        with trio.move_on_after(IN_FORCE_S):
            await self.node.endpoint.flush([node for node in nodes if not self.processes[node].is_stopped()])

    def _tell(self, nodes: Iterable[str]) -> None:
        for node in nodes:
            self.node.endpoint.send(node, SetLinkFaults(self.link_rules, self._link_seed))

    async def _bring_up(self, nodes: list[str]) -> None:
        await super()._bring_up(nodes)
        if self.link_rules:
            self._tell(nodes)


def check_rules(rules: Sequence[LinkRule], nodes: Iterable[str]) -> None:
    """Raises `ValueError` on a rule that applies to no link between two of these nodes."""
    pairs = [(source, target) for source in nodes for target in nodes if not is_exempt(source, target)]
    for number, rule in enumerate(rules, 1):
        if not any(rule.applies(source, target) for source, target in pairs):
            raise ValueError(
                f"link rule {number} applies to no link of this machine: from {rule.source!r} to {rule.target!r}"
            )
