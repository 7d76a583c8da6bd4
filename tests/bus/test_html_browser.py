"""The page in a real browser: a headless Chromium loads it, and says what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from history import Run
from synthetic import Synthetic

from bus.html import Page
from bus.judge import judge_records
from bus.picture import Painter
from bus.records import Record

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser is installed, none of {', '.join(NAMES)}")

A = 0x8003000


def page_of(records: list[Record], judged: int | None = None) -> str:
    """The page of records in causal order; with the verdict of all, or of the first ones, which is quicker."""
    painter, page = Painter(), Page()
    for record in records:
        painter.see(record)
        page.see(record)
    return page.render(judge_records(records[:judged]).as_dict() | {"run_dir": "run"}, painter.finish())


class Shown:
    """What the browser shows of a page after it was loaded and `script` has run in it."""

    def __init__(self, page: str, folder: Path, *, at: str = "", script: str = "") -> None:
        file = folder / "page.html"
        file.write_text(page.replace("</body>", f"<script>{WHEN_READY % script}</script></body>"))
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=20000"]
        command += ["--enable-logging=stderr", "--dump-dom", f"{file.as_uri()}#{at}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        self.dom = done.stdout
        self.console = re.findall(r"CONSOLE.*", done.stderr)
        self.facts = dict(re.findall(r'data-([\w-]+)="([^"]*)"', re.findall(r"<html[^>]*>", self.dom)[0]))

    def text(self, id: str) -> str:
        """Text of an element without children."""
        (found,) = re.findall(rf'id="{id}"[^>]*>([^<]*)<', self.dom)
        return unescape(found)


WHEN_READY = """
addEventListener("load", async () => {
  while (!document.documentElement.dataset.ready) await new Promise((done) => setTimeout(done, 20));
  await new Promise((done) => setTimeout(done, 100));
  %s
});
"""


def scene() -> list[Record]:
    """A run with an IPI, an update, a lock that is waited for, a violation, and a CPU that dies."""
    run = Run(updates=1).cpu(1).write("task_enqueue", task=1).cpu(0).write("task_enqueue", task=0).load(A).enter(A)
    run.ipi_send(1, 7).cpu(1).ipi_deliver(0, 7).cpu(0, "reader").call_none(A).cpu(0).vcpu_load(A, skipped=True)
    run.vmread("invalid").later(1).cpu(1, "kworker").update_begin().lock_request(1).later(1)
    run.node("seamldr").grant(1, 1, 1).cpu(1, "kworker").lock_hold(1, 1).advance("DONE").update_end().later(1)
    run.node("launcher").write("fault", kind="kill", name="cpu1", incarnation=1, what="")
    return run.exit("cpu1", wanted=False, status=-9).later(1).finish().records


def test_lanes_are_shown_without_an_error(tmp_path: Path) -> None:
    """The page loads with nothing on the console, has a lane for each process, and a legend of what there is."""
    shown = Shown(page_of(scene()), tmp_path)
    assert shown.console == []
    assert shown.facts["ready"] == "yes" and shown.facts["lanes"] == "4"
    for word in ("guest", "waits for a lock", "dead", "▼ fault", "✕ failure", "◆ event of a story"):
        assert f"{word}</li>" in shown.dom
    assert "SIGSTOPped</li>" not in shown.dom


PLACES = {
    "lane=cpu0&at=7.5": ["cpu0 at 7.500 ms: guest, vcpu0", "since 6.000 ms for", "began with 7 vcpu0 vmentry"],
    "lane=cpu1&at=500": ["cpu1 at 500.000 ms: kernel", "last record 9 vcpu0 ipi_deliver", "at 8.000 ms"],
    "lane=cpu1&at=1500": ["waits for a lock, seamldr_lock", "began with", "lock_request"],
    "lane=cpu1&at=3500": ["cpu1 at 3,500.000 ms: dead, by signal 9"],
    "t=6-9&lane=cpu0&at=7": ["IPI, vector 0xfb: cpu0 to cpu1, 7.000 ms to 8.000 ms, 1.000 ms"],
    "t=3000-3100&lane=cpu1&at=3021": ["fault at 3,021.000 ms: "],
    "t=3000-3100&lane=cpu0&at=3000.2": ["last record", "result=invalid, at 14.000 ms"],
    "story=1": ["kernel", "VMREAD EXIT_REASON: VMfailInvalid", "story of I3"],
}


def test_a_place_is_told(tmp_path: Path) -> None:
    """A place that the address names: what the lane does, since when, the records, marks and arrows there."""
    script = f"""
    const told = [];
    for (const place of {json.dumps(list(PLACES))}) {{
      history.replaceState(null, "", "#" + place);
      follow();
      told.push($("details").textContent);
    }}
    document.documentElement.dataset.out = JSON.stringify(told);
    """
    shown = Shown(page_of(scene()), tmp_path, at=next(iter(PLACES)), script=script)
    assert shown.console == []
    told = json.loads(unescape(shown.facts["out"]))
    for text, (place, says) in zip(told, PLACES.items(), strict=True):
        for words in says:
            assert words in text, f"{place}: {text}"


def test_pointer_and_keys(tmp_path: Path) -> None:
    """Pointing shows a tip, a click pins it, keys go on from there, the wheel zooms, find goes to a record."""
    script = """
    const out = [], canvas = $("lanes"), box = canvas.getBoundingClientRect();
    const at = (type, row, t, more = {}) => new (type === "wheel" ? WheelEvent : PointerEvent)(type, { bubbles: true,
      cancelable: true, pointerId: 1, clientX: box.left + toX(t), clientY: box.top + yOf(row) + 3, ...more });
    canvas.setPointerCapture = () => {};
    const row = lanes.findIndex((lane) => lane.node === "cpu1");
    canvas.dispatchEvent(at("pointermove", row, 1500e3));
    out.push($("tip").hidden, $("tip").textContent.split("\\n")[0]);
    canvas.dispatchEvent(at("pointerdown", row, 1500e3));
    canvas.dispatchEvent(at("pointerup", row, 1500e3));
    out.push($("details").textContent.split("\\n")[0]);
    const key = (name) => $("scroll").dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
    key("ArrowRight");
    out.push($("details").textContent.split("\\n")[0]);
    key("ArrowUp");
    out.push($("details").textContent.split(" ")[0]);
    key("+");
    out.push(Math.round((view.to - view.from) / data.end * 100));
    canvas.dispatchEvent(at("wheel", row, 2000e3, { ctrlKey: true, deltaY: -300 }));
    out.push(view.to - view.from < data.end / 3);
    key("0");
    out.push(view.to - view.from === data.end);
    $("query").value = "result=invalid";
    $("find").requestSubmit();
    cursor = { row: -1, t: -1 };
    $("find").requestSubmit();
    out.push($("details").textContent);
    document.documentElement.dataset.out = JSON.stringify(out);
    """
    shown = Shown(page_of(scene()), tmp_path, script=script)
    assert shown.console == []
    hidden, tip, pinned, after, up, zoomed, wheel, fit, found = json.loads(unescape(shown.facts["out"]))
    assert hidden is False and tip.startswith("cpu1 at 1,") and "waits for a lock, seamldr_lock" in tip
    assert pinned == tip
    assert after.startswith("cpu1 at 2,0") and "kernel" in after
    assert up == "cpu0" and zoomed == 50 and wheel is True and fit is True
    assert "result=invalid" in found


def test_it_is_usable_with_256_lanes_and_200_000_events(tmp_path: Path) -> None:
    """All lanes and records are there; a place in the middle of the run is told."""
    script = """
    show(data.end * 0.4, data.end * 0.41);
    pin(lanes.findIndex((lane) => lane.node === "cpu200"), data.end * 0.405);
    draw();
    """
    shown = Shown(page_of(list(Synthetic(256).records(200_000)), judged=1000), tmp_path, script=script)
    assert shown.console == []
    assert shown.facts["lanes"] == "258" and int(shown.facts["records"]) > 200_000
    assert int(shown.facts["intervals"]) > 100_000
    assert re.match(r"cpu200 at \d+\.\d{3} ms: waits for a lock, seamldr_lock", shown.text("details"))
