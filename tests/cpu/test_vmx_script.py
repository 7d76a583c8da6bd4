"""Scripts: what `run_script` accepts, what it returns, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpu.vmx import ScriptError, run_script

EMPTY = {"error": None, "value": None, "vector": None, "exit": None}


def one(op: dict[str, Any], config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The result of a script of one operation."""
    return run_script(config or {}, [op])[0]


@pytest.mark.parametrize(
    ("op", "result"),
    [
        ({"op": "ping"}, {"status": "succeed", "value": "0x1"}),
        ({"op": "vmcall"}, {"status": "exception", "vector": 6}),
        ({"op": "cr4", "set": "0x2000"}, {"status": "succeed"}),
        ({"op": "cr4", "set": 8192}, {"status": "succeed"}),
        ({"op": "rdmsr", "msr": 0x3A}, {"status": "succeed", "value": "0x0"}),
        ({"op": "rdmsr", "msr": "0x12345"}, {"status": "exception", "vector": 13}),
        ({"op": "rdmsr", "msr": 0x3A, "mode": "cpl3"}, {"status": "exception", "vector": 13}),
        ({"op": "mem_read32", "pa": "0x3fffffc"}, {"status": "succeed", "value": "0x0"}),
        ({"op": "irq_count"}, {"status": "succeed", "value": "0x0"}),
        ({"op": "join"}, {"status": "no_response"}),
        ({"op": "ping", "async": True}, {"status": "posted"}),
        ({"op": "ipi", "to": 0, "kind": "init"}, {"status": "no_response"}),
    ],
)
def test_result_format(op: dict[str, Any], result: dict[str, Any]) -> None:
    """A result always has the five keys, null where they do not apply."""
    assert one(op) == EMPTY | result


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ({"op": "vmfunc"}, r"ops\[0\]: there is no operation 'vmfunc'"),
        ({"op": "vmxon"}, r"ops\[0\]: vmxon needs 'pa'"),
        ({"op": "vmxoff", "pa": 0}, r"ops\[0\]: vmxoff does not take 'pa'"),
        ({"op": "vmxon", "pa": "1000"}, r"ops\[0\]: .*regex"),
        ({"op": "vmxon", "pa": -1}, r"ops\[0\]: .*>= 0"),
        ({"op": "vmxon", "pa": 1 << 64}, "more than 64 bits"),
        ({"op": "vmxon", "pa": 0, "page": 0}, r"ops\[0\]: .*unknown field"),
        ({"op": "ping", "cpu": 1}, "there is no cpu 1"),
        ({"op": "ipi", "to": 2, "kind": "nmi"}, "there is no cpu 2"),
        ({"op": "ipi", "to": 0, "kind": "smi"}, "Invalid enum value"),
        ({"op": "setup_guest", "guest": "linux"}, "there is no guest 'linux'"),
        ({"op": "mem_fill", "pa": 0, "len": 1, "byte": 256}, "above 255"),
        ({"op": "mem_fill", "pa": 0, "len": "0xffffffffff", "byte": 0}, "above 64 MiB"),
    ],
)
def test_bad_operation_is_refused(op: dict[str, Any], message: str) -> None:
    """A wrong operation is one clear line that names it, and nothing runs."""
    with pytest.raises(ScriptError, match=message) as error:
        one(op)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cpu": 1}, "unknown field"),
        ({"cpus": 0}, ">= 1"),
        ({"maxphyaddr": 64}, "<= 52"),
        ({"vmcs_revision_id": "0x80000000"}, "31 bits"),
        ({"caps": {"basic": "0x0"}}, "'basic' does not name a capability MSR"),
        ({"caps": {"msr_3a": "0x5"}}, "'msr_3a' does not name a capability MSR"),
        ({"supported_fields": ["0x1000"]}, "no VMCS field can have the encoding 0x1000"),
    ],
)
def test_bad_config_is_refused(config: dict[str, Any], message: str) -> None:
    """A wrong configuration is one clear line."""
    with pytest.raises(ScriptError, match=message):
        one({"op": "ping"}, config)


def test_configuration_is_data() -> None:
    """Capability MSRs, the revision identifier and the address width come from the configuration."""
    config = {"maxphyaddr": 40, "caps": {"msr_480": "0x1000000000007", "msr_481": None}}
    ops: list[dict[str, Any]] = [
        {"op": "rdmsr", "msr": "0x480"},
        {"op": "rdmsr", "msr": "0x481"},
        {"op": "cr4", "set": "0x2000"},
        {"op": "wrmsr", "msr": "0x3a", "value": 5},
        {"op": "mem_write32", "pa": "0x1000", "value": 7},
        {"op": "vmxon", "pa": "0x10000001000"},
        {"op": "vmxon", "pa": "0x1000"},
    ]
    results = run_script(config, ops)
    assert results[0]["value"] == "0x1000000000007"
    assert results[1]["vector"] == 13
    assert [result["status"] for result in results[5:]] == ["fail_invalid", "succeed"]
    explicit = run_script({"vmcs_revision_id": 9}, [{"op": "rdmsr", "msr": "0x480"}])[0]
    assert int(explicit["value"], 16) & 0x7FFF_FFFF == 9


def test_memory_operations() -> None:
    """Fill, write and read meet in the same memory, on every processor."""
    results = run_script(
        {"cpus": 2},
        [
            {"op": "mem_fill", "pa": "0x1000", "len": 4096, "byte": "0xab"},
            {"op": "mem_write32", "pa": "0x1004", "value": "0x12345678"},
            {"op": "mem_read32", "pa": "0x1002", "cpu": 1},
        ],
    )
    assert results[2]["value"] == "0x5678abab"


def test_interrupts_are_counted() -> None:
    """Fixed interrupts and NMIs that reach a processor outside a guest are counted; a SIPI there is dropped."""
    results = run_script(
        {"cpus": 2},
        [
            {"op": "ipi", "to": 1, "kind": "fixed", "vector": 80},
            {"op": "ipi", "to": 1, "kind": "fixed", "vector": 80},
            {"op": "ipi", "to": 1, "kind": "nmi"},
            {"op": "ipi", "to": 1, "kind": "sipi", "vector": 1},
            {"op": "irq_count", "cpu": 1},
            {"op": "nmi_count", "cpu": 1},
            {"op": "ping", "cpu": 1},
        ],
    )
    assert [result["value"] for result in results[4:]] == ["0x2", "0x1", "0x1"]


def test_guest_that_a_processor_cannot_run() -> None:
    """A guest whose controls the processor lacks, and a RIP with no synthetic guest, are unsupported."""
    setup: list[dict[str, Any]] = [
        {"op": "cr4", "set": "0x2000"},
        {"op": "wrmsr", "msr": "0x3a", "value": 5},
        {"op": "vmxon", "pa": "0x1000"},
        {"op": "vmclear", "pa": "0x3000"},
        {"op": "vmptrld", "pa": "0x3000"},
    ]
    caps = {"msr_481": "0x3f00000016", "msr_486": "0x80000021", "msr_488": "0x2000"}
    without_timer = run_script({"caps": caps}, [*setup, {"op": "setup_guest", "guest": "preempt_zero"}])
    assert [result["status"] for result in without_timer] == ["succeed"] * 5 + ["unsupported"]
    elsewhere = run_script(
        {"vmcs_revision_id": 0},
        [
            *setup,
            {"op": "setup_guest", "guest": "vmcall"},
            {"op": "vmwrite", "field": "0x681e", "value": "0x1000"},
            {"op": "vmlaunch"},
        ],
    )
    assert elsewhere[-1]["status"] == "unsupported"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m cpu.vmx` with these arguments."""
    return subprocess.run([sys.executable, "-m", "cpu.vmx", *arguments], capture_output=True, text=True, check=False)


def test_command(tmp_path: Path) -> None:
    """The command prints the results as JSON; a bad script is one line on stderr and exit status 2."""
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"config": {}, "ops": [{"op": "ping"}]}))
    good = command(str(script))
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout) == [EMPTY | {"status": "succeed", "value": "0x1"}]
    script.write_text('{"config": {}, "ops": [{"op": "vmxon"}]}')
    bad = command(str(script))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.endswith("ops[0]: vmxon needs 'pa'\n")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]", '{"ops": []}', '{"config": {}, "ops": [1]}'])
def test_command_refuses_what_is_not_a_script(tmp_path: Path, content: str) -> None:
    """Something that is not a script at all: still one line and status 2."""
    script = tmp_path / "script.json"
    script.write_text(content)
    bad = command(str(script))
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
