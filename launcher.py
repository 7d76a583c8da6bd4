"""Seamlab's command line: launch a machine of processes, try a way of calling P-SEAMLDR on it, read the verdict."""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from bus.plain import plain
from bus.report import console_for, print_comparison, print_run, print_stories
from bus.report_why import print_why, why_as_dict
from bus.snapshot import RunError, look, making_sense
from kvm.again import PLAN
from kvm.analyze_command import ANALYZE_ERRORS, add_analyze_arguments, add_report_arguments, write_reports
from kvm.chaos import Strike, plan_of, run_chaos
from kvm.chaos_command import add_chaos_arguments, read_plan
from kvm.chaos_report import print_strikes
from kvm.compose import KnobError, parse_knobs
from kvm.images import ModuleFileError, read_module
from kvm.machine import Machine, MachineError, OnProgress, Watch
from kvm.matrix import matrix_as_dict, matrix_knobs, measure, rows
from kvm.matrix_report import print_matrix
from kvm.plan import Fault, PlanError, write_plan
from kvm.scenes import SCENES
from kvm.summary import BAD_INPUT, SAFE, UNFINISHED, Summary, exit_status, summarize_run
from kvm.sysfs import SysfsError, sysfs_directory
from kvm.topology import Topology, TopologyError, parse_topology
from kvm.watching import Watching
from seamldr.commands import ModuleCommandError, inspect_module, make_module_file, verify_module
from seamldr.strategies import DEFAULT, STRATEGIES, StrategyError, find_strategy

UNTIL_INTERRUPTED_S = 86400.0
BAD = (
    *ANALYZE_ERRORS,
    TopologyError,
    ModuleFileError,
    PlanError,
    StrategyError,
    KnobError,
    SysfsError,
    ModuleCommandError,
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.command(parsed)
    except BAD as error:
        return _say(str(error), BAD_INPUT)
    except MachineError as error:
        return _say(str(error), UNFINISHED)
    except KeyboardInterrupt:
        return _say("interrupted; the machine has been taken down", UNFINISHED)
    except BrokenPipeError:
        return UNFINISHED
    return status


def entry() -> NoReturn:
    """The console script. SIGTERM means what Ctrl-C means, also where a shell has told us to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())


def _say(message: str, status: int) -> int:
    print(f"seamlab: {plain(' '.join(message.splitlines()))}", file=sys.stderr)
    return status


# run


def run_command(arguments: argparse.Namespace) -> int:
    """Launch one machine and judge it."""
    topology = _topology(arguments, arguments.strategy)
    faults = _faults(arguments.faults, topology) if arguments.faults else ()
    strikes: list[Strike] = []
    summary = _run(topology, arguments.strategy, faults, strikes, watch=arguments.watch)

    def tell(console: Console) -> None:
        if strikes:
            print_strikes(console, strikes)
        print_run(console, summary)

    _show(arguments, summary, tell)
    return exit_status(summary)


def _faults(path: str, topology: Topology) -> tuple[Fault, ...]:
    """The faults of a plan file, for a machine whose size is given on the command line."""
    faults = read_plan(path, topology.cpus).fault
    if topology.sysfs is not None:
        raise PlanError("--faults and --sysfs do not go together")
    return faults


def _run(
    topology: Topology,
    title: str,
    faults: tuple[Fault, ...] = (),
    strikes: list[Strike] | None = None,
    *,
    watch: bool = False,
) -> Summary:
    """One machine with progress, or all that `watch` shows, on stderr; its summary. What became of each fault is put
    into `strikes`.
    """
    topology.validate()
    _note_reframing(topology)
    if watch:
        with Watching(title) as watching:
            run_dir = trio.run(_live, topology, None, faults, strikes, watching.follow)
            watching.judging()
            return summarize_run(run_dir)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task(f"{title}: starting {topology.cpus} CPUs", total=None)

        def on_progress(facts: dict[str, int]) -> None:
            done, updates = facts.get("done", 0), facts.get("updates_done", 0)
            words = f"{title}: {done} requests, {updates} of {topology.updates} updates, {facts.get('moves', 0)} moves"
            progress.update(task, description=words)

        run_dir = trio.run(_live, topology, on_progress, faults, strikes)
        progress.update(task, description=f"{title}: judging the records")
        return summarize_run(run_dir)


async def _live(
    topology: Topology,
    on_progress: OnProgress | None,
    faults: tuple[Fault, ...],
    strikes: list[Strike] | None,
    watch: Watch | None = None,
) -> Path:
    if topology.sysfs is not None:
        return await _live_with_sysfs(topology, Path(topology.sysfs), on_progress, watch)
    if faults and strikes is not None:
        machine = Machine(topology, on_progress, watch)
        strikes.extend(await run_chaos(machine, faults))
        (machine.run_dir / PLAN).write_text(write_plan(plan_of(topology, faults)))
        return machine.run_dir
    async with Machine(topology, on_progress, watch) as machine:
        await machine.run_workload()
    return machine.run_dir


async def _live_with_sysfs(
    topology: Topology, tree: Path, on_progress: OnProgress | None, watch: Watch | None
) -> Path:
    """As `_live`; the first Ctrl-C ends the workload in order, or as stuck, and no file is left under `tree`."""
    said = False

    def tell_once(facts: dict[str, int]) -> None:
        nonlocal said
        if on_progress is not None:
            on_progress(facts)
        if facts.get("sysfs") and not said:
            said = True
            images = machine.run_dir / "modules"
            print(f"seamlab: update the module through {tree}; images are in {images}", file=sys.stderr, flush=True)

    machine = Machine(topology, tell_once, watch)
    with sysfs_directory(tree):
        async with machine, trio.open_nursery() as nursery:
            nursery.start_soon(_finish_on_interrupt, machine)
            await machine.run_workload()
            nursery.cancel_scope.cancel()
    return machine.run_dir


async def _finish_on_interrupt(machine: Machine) -> None:
    with trio.open_signal_receiver(signal.SIGINT) as interrupts:
        async for _ in interrupts:
            break
    await machine.finish()


def _note_reframing(topology: Topology) -> None:
    if topology.module is not None and read_module(topology.module)[1]:
        print(
            f"seamlab: {topology.module} is a version 1 container, which the merged kernel refuses; "
            "its pages are reframed into version 2",
            file=sys.stderr,
        )


def _topology(arguments: argparse.Namespace, strategy: str, run_dir: str | None = None) -> Topology:
    cpus = arguments.cpus if arguments.topology is None else parse_topology(arguments.topology)
    sysfs: str | None = getattr(arguments, "sysfs", None)
    topology = Topology(
        cpus=cpus,
        vcpus=2 * cpus if arguments.vcpus is None else arguments.vcpus,
        tds=arguments.tds,
        updates=_default(arguments.updates, 0 if sysfs else arguments.usual_updates),
        seconds=_default(arguments.seconds, UNTIL_INTERRUPTED_S if sysfs else arguments.usual_seconds),
        strategy=strategy,
        knobs=parse_knobs(arguments.knob),
        seed=arguments.seed,
        module=arguments.module,
        run_dir=run_dir or arguments.run_dir,
        trace=arguments.trace,
        sysfs=sysfs,
        fuse=getattr(arguments, "fuse", False),
    )
    topology.validate()
    return topology


def _default(given: Any, usual: Any) -> Any:
    return usual if given is None else given


def _show(arguments: argparse.Namespace, summary: Any, tell: Callable[[Console], None]) -> None:
    if arguments.json:
        print(msgspec.json.encode(summary).decode())
    else:
        tell(console_for(sys.stdout))


# compare


def compare_command(arguments: argparse.Namespace) -> int:
    """The same workload under each strategy, or the matrix of strategies and situations."""
    if arguments.matrix:
        return _matrix(arguments)
    names = arguments.strategies.split(",") if arguments.strategies else list(STRATEGIES)
    base = Path(arguments.run_dir) if arguments.run_dir else None
    topologies = {name: _topology(arguments, name, str(base / _file_name(name)) if base else None) for name in names}
    summaries = {name: _told(name, _run(topology, name)) for name, topology in topologies.items()}
    _show(arguments, {"schema": 1, "strategies": summaries}, lambda console: _print_comparison(console, summaries))
    write_reports(arguments, summaries)
    return SAFE if all(summary["verdict"] != "incomplete" for summary in summaries.values()) else UNFINISHED


def _matrix(arguments: argparse.Namespace) -> int:
    if arguments.junit or arguments.markdown:
        raise RunError("--junit and --markdown are about runs of strategies, not about the matrix")
    names = arguments.strategies.split(",") if arguments.strategies else None
    for name in names or []:
        find_strategy(name)
    chosen, knobs = rows(names), matrix_knobs(arguments.knob)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=len(chosen) * len(SCENES))

        def on_cell(row: str, column: str) -> None:
            progress.update(task, description=f"{row}: {column}", advance=1)

        matrix = measure(chosen, arguments.seed, on_cell, knobs=knobs)
    tell = functools.partial(print_matrix, matrix=matrix, seed=arguments.seed)
    _show(arguments, matrix_as_dict(matrix, arguments.seed), tell)
    return SAFE


def _told(name: str, summary: Summary) -> Summary:
    """Where there is no progress bar, say at least that a strategy is done."""
    if not sys.stderr.isatty():
        print(f"seamlab: {name}: {summary['verdict']}", file=sys.stderr, flush=True)
    return summary


def _file_name(strategy: str) -> str:
    return strategy.replace("/", "_").replace(":", "_")


def _print_comparison(console: Console, summaries: dict[str, Summary]) -> None:
    first = next(iter(summaries.values()))
    launch = first["knobs"]["seamret_launch"]
    size = f"{first['cpus']} CPUs, {first['vcpus']} vCPUs, {first['tds']} TDs, seed {first['seed']}"
    print_comparison(console, f"{size}, seamret_launch={launch}", summaries)
    for sentence in first["assumptions"]:
        console.print(Text(f"Assumed: {sentence}", style="dim"))
    for name, summary in summaries.items():
        if summary["violations"]:
            console.rule(Text(f"why {name} is unsafe", style="bold"), align="left")
            print_stories(console, summary)
        for sentence in summary["why"]:
            console.print(Text(f"{name}: {sentence}", style="yellow"))


# why


def why_command(arguments: argparse.Namespace) -> int:
    """Say what each process of a machine waits for."""
    with making_sense(Path(arguments.run)):
        why = look(Path(arguments.run))
    answer = why_as_dict(why, str(Path(arguments.run).resolve()))
    _show(arguments, answer, lambda console: print_why(console, why))
    return SAFE


# module


def module_make_command(arguments: argparse.Namespace) -> int:
    """Make and sign an image."""
    made = make_module_file(Path(arguments.file), arguments.version, arguments.profile, arguments.pages, arguments.v1)
    print(made)
    return SAFE


def module_inspect_command(arguments: argparse.Namespace) -> int:
    """Show every field of an image."""
    console_for(sys.stdout).print(inspect_module(Path(arguments.file)))
    return SAFE


def module_verify_command(arguments: argparse.Namespace) -> int:
    """Hold an image against every rule."""
    running = Path(arguments.running) if arguments.running else None
    table, accepted = verify_module(Path(arguments.file), arguments.fms, arguments.profile, running)
    console_for(sys.stdout).print(table)
    return SAFE if accepted else 1


# The parser


def _parser() -> Parser:
    parser = Parser(prog="seamlab", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="launch a machine, run guests and module updates, print the verdict")
    run.set_defaults(command=run_command)
    run.add_argument(
        "--strategy",
        default=DEFAULT,
        metavar="NAME|FILE.py:FUNCTION",
        help=f"how the kernel calls P-SEAMLDR: {', '.join(STRATEGIES)}, or a function of your own (default {DEFAULT})",
    )
    _machine_arguments(run, seconds=5.0, updates=2)
    run.add_argument(
        "--sysfs",
        metavar="DIR",
        help="files of the update's user interface under DIR, a new or empty one; unless told otherwise "
        "such a run makes no updates of its own and lasts until Ctrl-C",
    )
    run.add_argument(
        "--fuse",
        action="store_true",
        help="mount the files of --sysfs on DIR, so that reads and writes fail with the errno of the kernel",
    )
    run.add_argument("--faults", metavar="PLAN.toml", help="the faults of this plan strike the machine (see `chaos`)")
    run.add_argument("--watch", action="store_true", help="show the machine while it runs, on stderr")
    compare = commands.add_parser("compare", help="the same workload under each strategy, in one table")
    compare.set_defaults(command=compare_command)
    compare.add_argument("--strategies", metavar="A,B,...", help="which ones (default: the whole catalogue)")
    compare.add_argument(
        "--matrix", action="store_true", help="strategies by situations, measured on machines stepped in process"
    )
    add_report_arguments(compare)
    _machine_arguments(compare, seconds=1.5, updates=2)
    add_analyze_arguments(commands.add_parser("analyze", help="judge the records of a run again"))
    why = commands.add_parser("why", help="what each process waits for, and the cycle if there is one")
    why.set_defaults(command=why_command)
    why.add_argument("run", metavar="RUN", help="run directory, of a machine that runs or has ended")
    why.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    add_chaos_arguments(commands.add_parser("chaos", help="rounds of seeded faults, or a plan; every round judged"))
    _module_arguments(commands.add_parser("module", help="make, inspect or verify a TDX module image"))
    return parser


def _machine_arguments(parser: argparse.ArgumentParser, *, seconds: float, updates: int) -> None:
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--cpus", type=int, default=4, metavar="N", help="emulated CPUs, each a process (default 4)")
    size.add_argument("--topology", metavar="2s8c2t", help="sockets, cores and threads, instead of --cpus")
    add("--vcpus", type=int, metavar="N", help="vCPUs of plain guests (default: two for each CPU)")
    add("--tds", type=int, default=0, metavar="N", help="TDs with one vCPU each (default 0)")
    parser.set_defaults(usual_updates=updates, usual_seconds=seconds)
    add("--updates", type=int, metavar="N", help=f"module updates during the run (default {updates})")
    add("--seconds", type=float, metavar="S", help=f"length of the workload (default {seconds:g})")
    add("--module", metavar="FILE", help="image for the updates (default: made and signed on the spot)")
    add("--knob", action="append", default=[], metavar="NAME=VALUE", help="what the architecture leaves open; repeat")
    add("--seed", type=int, default=1, help="of the workload (default 1)")
    add("--run-dir", metavar="DIR", help="where records and summary go (default: a new one under runs/)")
    add("--trace", action="store_true", help="record every VMREAD, VMWRITE and VM entry")
    add("--json", action="store_true", help="print exactly one JSON object")


def number(text: str) -> int:
    """A whole number, hexadecimal with 0x."""
    return int(text, 0)


def _module_arguments(module: argparse.ArgumentParser) -> None:
    actions = module.add_subparsers(title="actions", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="make an image and sign it with a new key")
    make.set_defaults(command=module_make_command)
    make.add_argument("file", metavar="FILE")
    make.add_argument("--version", default="1.5.09", help="major.minor.update (default 1.5.09)")
    make.add_argument("--profile", choices=("A", "B"), default="A", help="handoff version 0 or 1 (default A)")
    make.add_argument("--pages", type=int, default=16, metavar="N", help="4 to 496 (default 16)")
    make.add_argument("--v1", action="store_true", help="the container that Intel ships, not the one that Linux reads")
    inspect = actions.add_parser("inspect", help="show every field of an image")
    inspect.set_defaults(command=module_inspect_command)
    inspect.add_argument("file", metavar="FILE")
    verify = actions.add_parser("verify", help="hold an image against every rule of kernel and P-SEAMLDR")
    verify.set_defaults(command=module_verify_command)
    verify.add_argument("file", metavar="FILE")
    verify.add_argument(
        "--fms", type=number, default=0xC06F2, metavar="N", help="CPUID.1.EAX of the platform (default 0xC06F2)"
    )
    verify.add_argument("--profile", choices=("P10", "P15", "P20"), default="P15", help="P-SEAMLDR (default P15)")
    verify.add_argument("--running", metavar="FILE", help="the module that runs and is replaced (default: none yet)")


if __name__ == "__main__":
    entry()
