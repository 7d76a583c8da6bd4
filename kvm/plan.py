"""A chaos plan: a machine and the faults that strike it, as a TOML file; plans that follow from a seed. A pure core.

    cpus = 4
    seconds = 1.5

    [[fault]]
    at = "resident"         # a point (`chaos --list-points`), or "time"
    nth = 2                 # the second time that it is reached
    do = "kill"             # kill, stop, slow, offline, or links
    target = "subject"      # the CPU that is at the point; or a process: "cpu3", "seamldr", "kvm"
    for_ms = 200            # then it is undone
    undo = "reset"          # what undoes a kill: replug, restart, reset or none

Errors name the line.
"""

from __future__ import annotations

import random
import re
import tomllib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bus.invariant import EXPLAINED_BY_DEATH
from bus.linkfaults import LinkRule
from bus.points import POINTS
from bus.spec import KVM, SEAMLDR
from kvm.compose import KnobError, Knobs, parse_knobs
from seamldr.strategies import DEFAULT, StrategyError, find_strategy

SUBJECT = "subject"
TIME = "time"
MAX_FAULTS = 64
MAX_PLAN_BYTES = 256 * 1024
_DEEP_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++\s*+\.\s*+){17}""")

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Milliseconds = Annotated[int, Meta(ge=0, le=3_600_000)]


class PlanError(ValueError):
    """The plan is not valid; the message says where and why."""


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One fault: when (`at` with `nth` and `cpu`, or `after_ms`), what, on whom, how long, and what undoes it."""

    at: str
    do: Literal["kill", "stop", "slow", "offline", "links"]
    target: str = SUBJECT
    nth: Count = 1
    cpu: Annotated[int, Meta(ge=0, lt=4096)] | None = None
    after_ms: Milliseconds = 0
    for_ms: Milliseconds = 100
    undo: Literal["replug", "restart", "reset", "none"] | None = None
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.3
    links: tuple[LinkRule, ...] = ()

    @property
    def brought_back_by(self) -> str:
        """What undoes a kill, if the plan does not say: a CPU is replugged, a service restarted."""
        return self.undo or ("restart" if self.target in (SEAMLDR, KVM) else "replug")

    def describe(self) -> str:
        """In a few words."""
        when = f"{self.after_ms} ms" if self.at == TIME else self.at + (f" #{self.nth}" if self.nth > 1 else "")
        who = self.target if self.target != SUBJECT or self.cpu is None else f"cpu{self.cpu}"
        words = f"{self.do} {who} at {when}" if self.do != "links" else f"links at {when}"
        return words + (f", then {self.brought_back_by}" if self.do == "kill" else f" for {self.for_ms} ms")


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One round: the machine and its faults. It follows from `seed` if it was made by `random_plan`."""

    seed: Annotated[int, Meta(ge=0)] = 1
    cpus: Annotated[int, Meta(ge=1, le=1024)] = 4
    vcpus: Annotated[int, Meta(ge=0, le=4096)] | None = None
    tds: Annotated[int, Meta(ge=0, le=64)] = 0
    updates: Annotated[int, Meta(ge=0, le=1000)] = 2
    seconds: Annotated[float, Meta(ge=0.1, le=86400)] = 1.5
    strategy: str = DEFAULT
    knobs: dict[str, str | int] = {}
    fault: Annotated[tuple[Fault, ...], Meta(max_length=MAX_FAULTS)] = ()

    def parsed_knobs(self) -> Knobs:
        """The knobs; raises `KnobError`."""
        return parse_knobs([f"{name}={value}" for name, value in self.knobs.items()])


# What faults explain


def explained_at(point: str) -> tuple[str, ...]:
    """The invariants that the kill of a CPU at this point may break, in the order of their numbers.

    They are the same at every point: whoever waits for a dead CPU, or counts on it in an update that begins later, is
    hit wherever it died. What it had locked or half done in SEAM is no excuse for anybody.
    """
    assert point == TIME or point in POINTS
    return tuple(sorted(EXPLAINED_BY_DEATH, key=lambda invariant: int(invariant[1:])))


def explained(fault: Fault) -> frozenset[str]:
    """The invariants that may be broken by this fault without anybody else being to blame."""
    return frozenset(explained_at(fault.at)) if fault.do == "kill" else frozenset()


# Reading and writing


def parse_plan(data: bytes, cpus: int | None = None) -> Plan:
    """The plan in a TOML file, on a machine of `cpus` CPUs if that is given; raises `PlanError` with the line."""
    if len(data) > MAX_PLAN_BYTES:
        raise PlanError(f"a plan has at most {MAX_PLAN_BYTES} bytes, this one {len(data)}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PlanError(f"line {line}: the plan is not UTF-8") from None
    try:
        plan = msgspec.convert(_read_toml(text), Plan)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(_syntax(str(error))) from None
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        raise PlanError(f"line {line_of(text, path.rstrip('`'), message)}: {_plain(message)}{_where(path)}") from None
    if cpus is not None:
        plan = msgspec.structs.replace(plan, cpus=cpus)
    _check(plan, text)
    return plan


def _read_toml(text: str) -> dict[str, Any]:
    """A plan is two tables deep; a key of thousands of parts would take the reader minutes."""
    if deep := _DEEP_KEY.search(text):
        line = text[: deep.start()].count("\n") + 1
        raise PlanError(f"line {line}: the plan is nested too deeply")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise PlanError("the plan is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits, a date that is none
        raise PlanError(f"the plan has a value that is none: {error}") from None


def _syntax(message: str) -> str:
    found = re.search(r" \(at line (\d+), column \d+\)", message)
    return f"line {found[1]}: {message[: found.start()]}" if found else message


def _plain(message: str) -> str:
    return message.replace("Object", "The plan")


def _where(path: str) -> str:
    name = path.rstrip("`").removeprefix("$").lstrip(".")
    return f" (in {name})" if name else ""


def line_of(text: str, path: str, message: str = "") -> int:
    """The line of a TOML text where the value at a path like `$.fault[1].nth` stands.

    A field that the message names, but the path does not, is looked for below the path's table.
    """
    named = re.search(r"unknown field `(\w+)`", message)
    keys = re.findall(r"\.(\w+)|\[(\d+)\]|\[`?\.\.\.`?\]", path)
    words = [key or index for key, index in keys] + ([named[1]] if named else [])
    lines = text.splitlines()
    at = 0
    if words[:1] == ["fault"] and len(words) > 1 and words[1].isdigit():
        at = _nth_table(lines, int(words[1]))
        words = words[2:]
    for word in words:
        at = next((n for n in range(at, len(lines)) if re.match(rf"\s*\[?{word}\b", lines[n])), at)
    return at + 1


def _nth_table(lines: list[str], nth: int) -> int:
    headers = [n for n, line in enumerate(lines) if re.match(r"\s*\[\[\s*fault\s*\]\]", line)]
    return headers[nth] if nth < len(headers) else 0


def _check(plan: Plan, text: str) -> None:
    """What types cannot say."""
    try:
        find_strategy(plan.strategy)
    except StrategyError as error:
        raise PlanError(f"line {line_of(text, '$.strategy')}: {error}") from None
    try:
        plan.parsed_knobs()
    except KnobError as error:
        raise PlanError(f"line {line_of(text, '$.knobs')}: {error}") from None
    for number, fault in enumerate(plan.fault):
        for name, wrong in complaints(fault, plan.cpus):
            raise PlanError(f"line {line_of(text, f'$.fault[{number}].{name}')}: {wrong}")


def complaints(fault: Fault, cpus: int) -> list[tuple[str, str]]:
    """What is wrong with a fault on a machine of that size: (field, sentence)."""
    wrong: list[tuple[str, str]] = []
    nodes = {SEAMLDR, KVM, *(f"cpu{number}" for number in range(cpus))}
    if fault.at != TIME and fault.at not in POINTS:
        wrong.append(("at", f"no point {fault.at!r}; `seamlab chaos --list-points` prints them, or say {TIME!r}"))
    if fault.target != SUBJECT and fault.target not in nodes:
        wrong.append(("target", f"no process {fault.target!r} in a machine of {cpus} CPUs"))
    if fault.target == SUBJECT and fault.at == TIME and fault.do != "links":
        wrong.append(("target", "a fault at a time has no subject; name a target, such as cpu1"))
    if fault.cpu is not None and fault.cpu >= cpus:
        wrong.append(("cpu", f"there is no CPU {fault.cpu} in a machine of {cpus}"))
    if (fault.do == "links") != bool(fault.links):
        wrong.append(("links", "links go with do = \"links\", and only with it"))
    if fault.do == "offline" and fault.target in (SEAMLDR, KVM, "cpu0"):
        wrong.append(("target", f"{fault.target} cannot go offline"))
    if fault.undo is not None and fault.do != "kill":
        wrong.append(("undo", "undo says how a kill is undone; the other faults end by themselves"))
    if fault.undo == "replug" and fault.target in (SEAMLDR, KVM):
        wrong.append(("undo", f"{fault.target} is restarted, not replugged"))
    return wrong


def write_plan(plan: Plan) -> str:
    """The plan as TOML; `parse_plan` reads the same plan from it."""
    fields = msgspec.to_builtins(plan)
    faults, knobs = fields.pop("fault", ()), fields.pop("knobs", {})
    lines = [f"{name} = {_toml(value)}" for name, value in fields.items()]
    if knobs:
        lines += ["", "[knobs]", *(f"{name} = {_toml(value)}" for name, value in knobs.items())]
    for fault in faults:
        lines += ["", "[[fault]]", *(f"{name} = {_toml(value)}" for name, value in fault.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return msgspec.json.encode(value).decode()


# Plans from a seed


CALM_POINTS = (
    "before-acquire",
    "waiting",
    "granted",
    "holding",
    "after-seamret",
    "before-release",
    "ipi-pending",
    "ipi-answer",
    "migration",
    "in-guest",
)
UPDATE_POINTS = ("mid-install", "update-shutdown", "between-shutdown-and-update", "update-init", "run-update")


def random_plan(
    seed: int, *, cpus: int = 8, strategy: str = DEFAULT, knobs: dict[str, str | int] | None = None
) -> Plan:
    """The plan of a round. It follows from its arguments alone; every fault in it is undone.

    A round with CPU hotplug has interrupts off in KVM's offline callback, if `knobs` does not say: with interrupts on
    Linux has a window there of its own (hazard H14b), which is no fault's doing.
    """
    rng = random.Random(seed)
    tds = rng.choice((0, 0, 1, 2))
    faults = tuple(_random_fault(rng, cpus, tds) for _ in range(rng.randint(1, 4)))
    settings: dict[str, str | int] = {"offline_irqs": "off"} if any(fault.do == "offline" for fault in faults) else {}
    settings.update(knobs or {})
    return Plan(
        seed=seed, cpus=cpus, vcpus=2 * cpus, tds=tds, updates=rng.randint(1, 3), strategy=strategy,
        knobs=settings, fault=faults,
    )  # fmt: skip


def _random_fault(rng: random.Random, cpus: int, tds: int) -> Fault:
    draw = rng.random()
    if draw < 0.15:
        return _random_links(rng)
    if draw < 0.25:
        target = rng.choice((SEAMLDR, KVM))
        do = rng.choice(("kill", "stop"))
        return _timed(rng, do, target) if rng.random() < 0.5 else _pointed(rng, do, target, cpus, tds)
    if draw < 0.33 and cpus > 1:
        return _timed(rng, "offline", f"cpu{rng.randrange(1, cpus)}")
    do = rng.choice(("kill", "kill", "stop", "stop", "slow"))
    if rng.random() < 0.2:
        return _timed(rng, do, f"cpu{rng.randrange(cpus)}")
    return _pointed(rng, do, SUBJECT, cpus, tds)


def _timed(rng: random.Random, do: Any, target: str) -> Fault:
    return Fault(TIME, do, target, after_ms=rng.randrange(50, 1200), for_ms=rng.randrange(20, 300))


def _pointed(rng: random.Random, do: Any, target: str, cpus: int, tds: int) -> Fault:
    draw = rng.random()
    if draw < 0.25:
        at = rng.choice(UPDATE_POINTS)
    elif draw < 0.32:
        at = "resident"
    elif draw < 0.4 and tds:
        at = rng.choice(("in-td", "td-build"))
    else:
        at = rng.choice(CALM_POINTS)
    in_seam = at in ("resident", "mid-install", "in-td")
    undo: Any = "reset" if do == "kill" and target == SUBJECT and in_seam else None
    nth = rng.randint(1, cpus if at == "mid-install" else 4)
    cpu = rng.randrange(cpus) if rng.random() < 0.3 else None
    return Fault(at, do, target, nth=nth, cpu=cpu, for_ms=rng.randrange(20, 300), undo=undo)


def _random_links(rng: random.Random) -> Fault:
    source, target = rng.choice((("*", "*"), ("cpu*", SEAMLDR), (SEAMLDR, "cpu*"), ("cpu*", "cpu*"), ("cpu0", "*")))
    kind = rng.choice(("loss", "delay", "partition"))
    if kind == "loss":
        rule = LinkRule(source, target, drop=rng.choice((0.05, 0.1, 0.3)), duplicate=rng.choice((0.0, 0.1, 0.3)))
    elif kind == "delay":
        delay, jitter = rng.randrange(1, 20) * 1_000_000, rng.randrange(20) * 1_000_000
        rule = LinkRule(source, target, delay_ns=delay, jitter_ns=jitter)
    else:
        rule = LinkRule(source, target, partition=rng.choice(("one-way", "two-way")))
    return Fault(TIME, "links", after_ms=rng.randrange(50, 1000), for_ms=rng.randrange(50, 500), links=(rule,))


# Smaller plans


def smaller(plan: Plan) -> list[Plan]:
    """Plans that are one step smaller: without one fault, with half the CPUs or one less, no TDs, one update."""
    change = msgspec.structs.replace
    steps = [change(plan, fault=plan.fault[:at] + plan.fault[at + 1 :]) for at in range(len(plan.fault))]
    fewer = dict.fromkeys(cpus for cpus in (plan.cpus // 2, plan.cpus - 1) if cpus >= 2)
    fits = [cpus for cpus in fewer if not any(complaints(fault, cpus) for fault in plan.fault)]
    steps += [change(plan, cpus=cpus, vcpus=2 * cpus) for cpus in fits]
    if plan.tds:
        steps.append(change(plan, tds=0))
    if plan.updates > 1:
        steps.append(change(plan, updates=1))
    return steps
