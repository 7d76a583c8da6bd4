"""What records cost: to write one, and to judge a run of very many, as ratios to msgspec alone in the same round.

    python tests/bench/bench_records.py [ROUNDS [RECORDS [RUN ...]]]

CPU time, not wall time: other work on the computer changes both sides of a ratio alike, more or less. The runs that
are judged: RECORDS synthetic records of a machine without --trace, a live machine traced for ten seconds, and any RUN
directory that is given.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic_ns, process_time

import msgspec
import structlog
import trio
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bus.clock import LamportClock  # noqa: E402
from bus.events import NONE  # noqa: E402
from bus.judge import judge  # noqa: E402
from bus.merge import Notes, merge_entries, merge_run  # noqa: E402
from bus.records import Record, open_records  # noqa: E402
from kvm.machine import Machine  # noqa: E402
from kvm.topology import Topology  # noqa: E402

ROUNDS, RECORDS, WRITES = 3, 1_000_000, 20_000
CPUS, INFO = 8, 1 << 63
FIELDS = {"vcpu": 3, "vmcs": 0x8003000, "via": "load", "skipped": 1, "migrated": 0}
CONTEXT = {"ctx": "vcpu3", "irqs": 1}


# Writing


def write_ours(path: str) -> float:
    """Seconds for `WRITES` records of `bus.records`: structlog, stamped, one system call each."""
    recorder = open_records(path, "cpu0", LamportClock())
    recorder.context = lambda: CONTEXT
    began = process_time()
    for _ in range(WRITES):
        recorder.emit("vcpu_load", **FIELDS)
    return process_time() - began


def write_default(path: str) -> float:
    """The same through structlog as it comes: PrintLogger, TimeStamper, JSONRenderer."""
    processors = [structlog.processors.TimeStamper(fmt="iso"), structlog.processors.JSONRenderer()]
    with open(path, "w") as file:
        logger = structlog.wrap_logger(structlog.PrintLogger(file), processors, cache_logger_on_first_use=True)
        bound = logger.bind(node="cpu0", pid=os.getpid())
        began = process_time()
        for number in range(WRITES):
            bound.info("vcpu_load", clock=number, seq=number, **CONTEXT, **FIELDS)
        return process_time() - began


def write_bare(path: str) -> float:
    """The same bytes by msgspec and os.write alone."""
    encode = msgspec.json.Encoder().encode
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    began = process_time()
    for n in range(WRITES):
        common = {"ts": monotonic_ns(), "clock": n, "node": "cpu0", "pid": 5, "seq": n, "event": "vcpu_load"}
        os.write(fd, encode({**common, **CONTEXT, **FIELDS}) + b"\n")
    took = process_time() - began
    os.close(fd)
    return took


WRITERS: dict[str, Callable[[str], float]] = {
    "msgspec and os.write alone": write_bare,
    "bus.records": write_ours,
    "structlog's default JSON": write_default,
}


# Runs


def synthetic(run_dir: Path, count: int) -> Path:
    """About `count` records of a machine on which every vCPU comes back to where a call took its VMCS; it is safe."""
    (run_dir / "records").mkdir(parents=True)
    encode = msgspec.json.Encoder().encode
    seqs: dict[str, int] = {}
    files = {node: (run_dir / "records" / f"{node}.jsonl").open("wb") for node in ("launcher", "seamldr", *_cpus())}
    for clock, record in enumerate(_history(count), 1):
        node = record["node"]
        seqs[node] = seqs.get(node, 0) + 1
        stamp = {"ts": clock * 1000, "clock": clock, "node": node, "pid": 100, "seq": seqs[node]}
        files[node].write(encode(stamp | record) + b"\n")
    for file in files.values():
        file.close()
    return run_dir


def _cpus() -> list[str]:
    return [f"cpu{number}" for number in range(CPUS)]


def _history(count: int) -> Iterator[Record]:
    machine = {"strategy": "clear-current-vmcs", "knobs": {}, "seed": 1, "cpus": CPUS, "vcpus": CPUS}
    yield {"node": "launcher", "event": "machine_begin", **machine, "tds": 0, "updates": 0}
    for node in _cpus():
        yield {"node": "launcher", "event": "process_online", "name": node, "incarnation": 1}
    for number in range(count // 23):
        yield from _cycle(number % CPUS, number + 1)
    yield {"node": "launcher", "event": "machine_end", "finished": True, "why": ""}


def _cycle(cpu: int, number: int) -> Iterator[Record]:
    """A call that takes the current VMCS, with its lock, and twice a load, an entry and a put."""
    v, lock, token = 0x8001000 + cpu * 0x2000, {"lock": "seamldr_lock"}, {"epoch": 1, "number": number}
    leaf, request = {"leaf": INFO, "name": "SEAMLDR.INFO"}, {"request": number}

    def at(ctx: str, event: str, **fields: object) -> Record:
        return {"node": f"cpu{cpu}", "event": event, "ctx": ctx, "irqs": int(ctx != "reader"), **fields}

    def service(event: str, **fields: object) -> Record:
        return {"node": "seamldr", "event": event, **fields}

    for skipped in (0, 1):
        if not skipped:
            yield at("vcpu0", "cv_write", old=NONE, new=v)
            yield at("vcpu0", "vmptrld", vmcs=v, cur=NONE, result="ok", reason="load")
        yield at("vcpu0", "vcpu_load", vcpu=cpu, vmcs=v, via="load", skipped=skipped, migrated=0)
        insn = "vmresume" if skipped or number > CPUS else "vmlaunch"
        yield at("vcpu0", "vmentry", insn=insn, vcpu=cpu, vmcs=v, want=v, launched=1, result="ok")
        yield at("vcpu0", "vcpu_put", vcpu=cpu, vmcs=v, via="put", entries=1)
    yield at("reader", "admin_begin", kind="read_version", **request)
    yield at("reader", "lock_request", level=0, **lock, **request)
    yield service("lock_queue", by=cpu, level=0, depth=1, **lock, **request)
    yield service("lock_grant", to=cpu, waited_ns=1000, holders=1, **lock, **request, **token)
    yield at("reader", "lock_hold", waited_ns=2000, **lock, **request, **token)
    yield at("reader", "strategy_begin", cur=v, **leaf)
    yield at("reader", "seamcall_enter", attempt=1, cur=v, **leaf, **token)
    holder = {"holder_epoch": 1, "holder_number": number}
    yield service("seam_enter", by=cpu, admitted=1, alive=1, inside=1, **leaf, **token, **holder)
    yield service("seam_return", by=cpu, status=0, inside=0, **leaf)
    yield at("reader", "seamcall_return", entered=1, status=0, cur=NONE, lost=v, **leaf)
    yield at("reader", "cv_write", old=v, new=NONE)
    yield at("reader", "strategy_end", leaf=INFO, errno=0, cur=NONE)
    yield at("reader", "lock_drop", **lock, **token)
    yield service("lock_release", by=cpu, stale=0, **lock, **token)
    yield at("reader", "admin_end", kind="read_version", errno=0, text="", **request)


async def _traced(run_dir: Path) -> Path:
    async with Machine(Topology(cpus=CPUS, vcpus=2 * CPUS, seconds=10, trace=True, run_dir=str(run_dir))) as machine:
        await machine.run_workload()
    return machine.run_dir


# Reading


def decode_alone(run_dir: Path) -> int:
    """The floor: msgspec makes dictionaries of all lines, file after file."""
    decoder, count = msgspec.json.Decoder(dict), 0
    for path in (run_dir / "records").glob("*.jsonl"):
        rest = b""
        with path.open("rb") as file:
            while data := file.read(64 * 1024):
                whole, _, rest = (rest + data).rpartition(b"\n")
                count += len(decoder.decode_lines(whole))
    return count


def exhaust(items: Iterable[object]) -> int:
    return sum(1 for _ in items)


READERS: dict[str, Callable[[Path], int]] = {
    "msgspec alone": decode_alone,
    "merged, common fields": lambda run_dir: exhaust(merge_entries(run_dir, Notes())),
    "merged, whole": lambda run_dir: exhaust(merge_run(run_dir, Notes())),
    "judged": lambda run_dir: judge(run_dir).statistics.records,
}


def measure(run_dir: Path, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Records of the run, and seconds by reader and round."""
    count = 0
    took: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(rounds):
        for name, read in READERS.items():
            began = process_time()
            count = read(run_dir)
            took[name].append(process_time() - began)
    return count, took


def add_rows(table: Table, what: str, count: int, took: dict[str, list[float]]) -> None:
    """A row a variant: rate and cost, and the ratio to the first."""
    floor = next(iter(took.values()))
    for name, seconds in took.items():
        middle = statistics.median(seconds)
        ratio = statistics.median(one / other for one, other in zip(seconds, floor, strict=True))
        table.add_row(what, name, f"{count / middle:,.0f} /s", f"{middle / count * 1e6:.2f} us", f"{ratio:.2f}")
    table.add_section()


def main(rounds: int, records: int, runs: list[str]) -> None:
    """Measure and print the table."""
    table = Table("what", "how", "rate", "each", "x first", title="Records: CPU time")
    with tempfile.TemporaryDirectory() as directory:
        writes: dict[str, list[float]] = {name: [] for name in WRITERS}
        for number in range(rounds):
            for name, write in WRITERS.items():
                writes[name].append(write(f"{directory}/{name.split()[0]}{number}"))
        add_rows(table, "write a record", WRITES, writes)
        paths = [synthetic(Path(directory, "synthetic"), records), trio.run(_traced, Path(directory, "traced"))]
        names = ["synthetic run", "live run, traced", *runs]
        for name, path in zip(names, [*paths, *map(Path, runs)], strict=True):
            count, took = measure(path, rounds)
            add_rows(table, f"{name}, {count:,} records", count, took)
    Console(width=110).print(table)
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    words = sys.argv[1:]
    main(int(words[0]) if words else ROUNDS, int(words[1]) if len(words) > 1 else RECORDS, words[2:])
