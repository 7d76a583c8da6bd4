"""JUnit XML: what CI shows of a run."""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import Element, fromstring

from history import Run

from bus.invariants import INVARIANTS
from bus.junit import JUDGED, junit_xml

A = 0x8001000


def suites(**runs: Run) -> tuple[Element, list[Element]]:
    """The document about some histories, and its suites."""
    root = fromstring(junit_xml({name: summary(run) for name, run in runs.items()}))
    return root, root.findall("testsuite")


def summary(run: Run) -> dict[str, Any]:
    """The summary of a history."""
    return run.judge().as_dict() | {"run_dir": "/runs/one"}


def unsafe() -> Run:
    """A call that takes a VMCS away, which is read afterwards."""
    return Run().cpu(0).load(A).call_none(A).vcpu_load(A, skipped=True).vmread("invalid").finish()


def safe() -> Run:
    """A call that takes a VMCS away, which is loaded again."""
    run = Run().cpu(0).load(A).begin(A).seamcall(1 << 63, lost=A).cv(2**64 - 1).end(2**64 - 1)
    return run.load(A).finish()


def test_a_test_case_an_invariant() -> None:
    """Each invariant is a test case of the run's suite; those that held have no failure."""
    root, (suite,) = suites(none=safe())
    cases = [case.get("name") for case in suite.findall("testcase")]
    assert cases == [JUDGED, *(f"{id} {invariant.slug}" for id, invariant in INVARIANTS.items())]
    assert root.get("failures") == root.get("errors") == suite.get("failures") == "0"
    assert suite.get("tests") == root.get("tests") == str(len(INVARIANTS) + 1)
    assert suite.findall("testcase/failure") == suite.findall("testcase/error") == []


def test_a_violation_is_a_failure_with_its_story() -> None:
    """The failure of an invariant has the story as text; one that follows from another says so."""
    run = unsafe()
    root, (suite,) = suites(none=run)
    failures = {case.get("name"): case.find("failure") for case in suite.findall("testcase") if len(case)}
    assert root.get("failures") == suite.get("failures") == str(len(failures)) and len(failures) > 2
    failure = failures["I3 current-vmcs-needed"]
    assert failure is not None and failure.text == run.story("I3")
    assert failure.get("message") == "VMREAD on cpu0 with no current VMCS (1 time)"
    follows = failures["I18 no-vmx-errors"]
    assert follows is not None and "follows from I2, I3" in str(follows.get("message"))


def test_an_incomplete_run_is_no_pass() -> None:
    """A run that proves nothing has an error, so that CI does not show green."""
    root, (suite,) = suites(none=Run().finish())
    assert root.get("errors") == suite.get("errors") == "1"
    error = suite.find(f"testcase[@name='{JUDGED}']/error")
    assert error is not None and "nothing was put to the test" in str(error.get("message"))


def test_strategies_are_suites() -> None:
    """Each strategy of a comparison is a suite, and the totals are their sums."""
    root, found = suites(none=unsafe(), sweep=unsafe(), idle=Run().finish())
    assert [suite.get("name") for suite in found] == ["none", "sweep", "idle"]
    assert int(str(root.get("failures"))) == 2 * int(str(found[0].get("failures"))) and root.get("errors") == "1"
    assert {case.get("classname") for case in found[1].findall("testcase")} == {"seamlab.sweep"}


def test_text_that_xml_cannot_write_is_replaced() -> None:
    """Control characters, markup and lone surrogates in a story or a name leave the document well-formed."""
    told = summary(unsafe())
    told["violations"][0]["first"]["why"] = "a\x00b <tag> & \"quote\" \ud800"
    told["notes"] = ["\x1b[31mred"]
    root = fromstring(junit_xml({"x\x07.py:f": told}))
    message = next(str(failure.get("message")) for failure in root.iter("failure"))
    assert message.startswith("a\N{REPLACEMENT CHARACTER}b <tag> & \"quote\" \N{REPLACEMENT CHARACTER} (")
    assert "[31mred" in str(root.findtext("testsuite/system-out"))
