"""Verdicts as JUnit XML, which CI systems show: a suite a run, a test case an invariant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from bus.invariants import INVARIANTS
from bus.summary_words import times_text

Summary = dict[str, Any]

JUDGED = "the run can be judged"
"""The one test case that is no invariant. It ends in an error if the verdict is "incomplete": that is no pass."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(runs: Mapping[str, Summary]) -> bytes:
    """The runs' verdicts, by name, as one document in UTF-8."""
    root = Element("testsuites", name="seamlab")
    suites = [_suite(root, name, summary) for name, summary in runs.items()]
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in suites)))
    indent(root)
    document: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _suite(root: Element, name: str, summary: Summary) -> Element:
    suite = SubElement(root, "testsuite", name=_clean(name), time=f"{summary['seconds']['total']:.3f}")
    properties = SubElement(suite, "properties")
    for key in ("verdict", "strategy", "seed", "cpus", "vcpus", "tds", "run_dir"):
        SubElement(properties, "property", name=key, value=_clean(str(summary.get(key))))
    _judged(suite, name, summary)
    violations = {violation["invariant"]: violation for violation in summary["violations"]}
    for id, invariant in INVARIANTS.items():
        case = _case(suite, name, f"{id} {invariant.slug}")
        if id in violations:
            _fail(case, violations[id])
    incomplete = summary["verdict"] == "incomplete"
    for key, count in (("tests", len(INVARIANTS) + 1), ("failures", len(violations)), ("errors", int(incomplete))):
        suite.set(key, str(count))
    suite.set("skipped", "0")
    SubElement(suite, "system-out").text = _clean("\n".join([*summary["excused"], *summary["notes"]]))
    return suite


def _case(suite: Element, name: str, what: str) -> Element:
    return SubElement(suite, "testcase", classname=_clean(f"seamlab.{name}"), name=what, time="0")


def _judged(suite: Element, name: str, summary: Summary) -> None:
    case = _case(suite, name, JUDGED)
    if summary["verdict"] == "incomplete":
        why = _clean("\n".join(summary["why"]))
        SubElement(case, "error", type="incomplete", message=why.partition("\n")[0]).text = why


def _fail(case: Element, violation: dict[str, Any]) -> None:
    """The failure of an invariant: its message is what happened, its text the story."""
    first = violation["first"]
    message = f"{first['why']} ({times_text(violation['count'])})"
    if violation["follows_from"]:
        message += f"; follows from {', '.join(violation['follows_from'])}"
    SubElement(case, "failure", type=violation["slug"], message=_clean(message)).text = _clean("\n".join(first["text"]))


def _clean(text: str) -> str:
    """Text without the characters that XML 1.0 has no way to write."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
