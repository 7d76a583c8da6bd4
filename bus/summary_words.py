"""Parts of a summary in words, for tables of any kind."""

from __future__ import annotations

from typing import Any

Summary = dict[str, Any]


def own_violations(summary: Summary) -> list[str]:
    """Ids of the invariants that broke by themselves."""
    return [v["invariant"] for v in summary["violations"] if not v["follows_from"]]


def broken_text(summary: Summary) -> str:
    """Ids of the invariants that broke by themselves, then those that follow: "I2, I3 (so I14, I18)"."""
    follow = [v["invariant"] for v in summary["violations"] if v["follows_from"]]
    return ", ".join(own_violations(summary)) + (f" (so {', '.join(follow)})" if follow else "")


def all_refused(summary: Summary) -> bool:
    """Whether the run is safe because every update was refused."""
    updates = summary["updates"]
    return bool(summary["verdict"] == "safe" and updates["refused"] and updates["refused"] == updates["requested"])


def errors_text(summary: Summary) -> str:
    """Failed VMREADs, VMWRITEs and VM entries."""
    vmx = summary["vmx"]
    return f"{vmx['vmread_errors']} / {vmx['vmwrite_errors']} / {vmx['entry_errors']}"


def updates_text(summary: Summary) -> str:
    """Updates that succeeded of those requested, and what became of the others."""
    updates = summary["updates"]
    rest = [f"{updates[word]} {word}" for word in ("failed", "refused") if updates[word]]
    return f"{updates['succeeded']} of {updates['requested']}" + "".join(f", {part}" for part in rest)


def updates_word(summary: Summary) -> str:
    """ "2 done", "2 refused", "1 done, 1 failed"."""
    updates = summary["updates"]
    words = (("done", updates["succeeded"]), ("failed", updates["failed"]), ("refused", updates["refused"]))
    return ", ".join(f"{count} {word}" for word, count in words if count) or "none"


def cost_text(summary: Summary) -> str:
    """VMPTRLDs and VMCLEARs that the strategy cost, for each P-SEAMLDR call."""
    cost = summary["cost"]
    calls = cost["calls"] or 1
    return f"{cost['extra_vmptrld'] / calls:.2f} / {cost['extra_vmclear'] / calls:.2f}"


def times_text(count: int) -> str:
    """ "1 time", "2 times"."""
    return f"{count} time" + ("s" if count != 1 else "")
