/* The timeline. Times are microseconds since the machine began. A lane is columns of numbers in time order, so what is
   in view, and what is under the pointer, is found by binary search. */

const GUTTER = 92;
const LEAST_SPAN = 4;
const NEAR = 5;

const $ = (id) => document.getElementById(id);
const root = document.documentElement;

// Data

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function sums(steps) {
  const out = new Float64Array(steps.length);
  let at = 0;
  for (let i = 0; i < steps.length; i++) out[i] = at += steps[i];
  return out;
}

function spans(row) {
  const begin = sums(row.begin);
  return { ...row, begin, end: begin.map((from, i) => from + row.length[i]) };
}

function laneOf(row) {
  return { ...spans(row), state: Uint8Array.from(row.state), ts: sums(row.ts), clock: sums(row.clock) };
}

/* How many of the sorted times are not after t. */
function upTo(times, t) {
  let low = 0, high = times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] <= t) low = middle + 1; else high = middle;
  }
  return low;
}

function intervalAt(lane, t) {
  const i = upTo(lane.begin, t) - 1;
  return i >= 0 && t <= lane.end[i] ? i : -1;
}

function ms(us) {
  return (us / 1000).toLocaleString("en", { minimumFractionDigits: 3, maximumFractionDigits: 3 }) + " ms";
}

// State of the page

let data, lanes, locks, arrows;
let view, height;
let cursor = null, brush = null;

/* Of the part beside the gutter, and how far the lanes are scrolled: as of the last drawing, since to ask is slow. */
let width = 1, scrolled = 0;
const toX = (t) => GUTTER + (t - view.from) / (view.to - view.from) * width;
const toT = (x) => view.from + (x - GUTTER) / width * (view.to - view.from);
const rowAt = (y) => Math.floor((y + scrolled) / height);
const yOf = (row) => row * height - scrolled;

function show(from, to) {
  const span = Math.min(Math.max(to - from, LEAST_SPAN), data.end);
  from = Math.min(Math.max(from, 0), data.end - span);
  view = { from, to: from + span };
  redraw();
}

function zoom(factor, t) {
  show(t - (t - view.from) * factor, t + (view.to - t) * factor);
}

function pan(part) {
  const by = (view.to - view.from) * part;
  show(view.from + by, view.to + by);
}

function pin(row, t) {
  cursor = { row, t };
  if (t < view.from || t > view.to) {
    const half = (view.to - view.from) / 2;
    show(t - half, t + half);
  }
  const scroll = $("scroll"), least = (row + 1) * height - scroll.clientHeight;
  scroll.scrollTop = Math.max(least, Math.min(row * height, scroll.scrollTop));
  draw();
  $("details").textContent = describe(row, t).join("\n");
}

// What is where

function record(lane, i) {
  return `${lane.clock[i]} ${data.strings[lane.text[i]]}`;
}

function describe(row, t) {
  const lane = lanes[row], lines = [], i = intervalAt(lane, t), at = upTo(lane.ts, t) - 1;
  if (i < 0) {
    lines.push(`${lane.node} at ${ms(t)}: no process`);
  } else {
    const what = data.strings[lane.what[i]];
    lines.push(`${lane.node} at ${ms(t)}: ${data.states[lane.state[i]]}${what ? ", " + what : ""}`);
    lines.push(`since ${ms(lane.begin[i])} for ${ms(lane.end[i] - lane.begin[i])}`);
    const first = upTo(lane.ts, lane.begin[i]) - 1;
    if (first >= 0 && lane.ts[first] === lane.begin[i]) lines.push(`began with ${record(lane, first)}`);
    if (first === at) return lines.concat(near(row, t));
  }
  if (at >= 0) lines.push(`last record ${record(lane, at)}, at ${ms(lane.ts[at])}`);
  return lines.concat(near(row, t));
}

/* Marks and ends of arrows within a few pixels. */
function near(row, t) {
  const reach = NEAR / width * (view.to - view.from), lines = [];
  for (const [at, time, story] of data.told) {
    if (at === row && Math.abs(time - t) <= reach) lines.push(`story of ${data.stories[story]}`);
  }
  for (const [at, time, kind, text] of data.marks) {
    if (at === row && Math.abs(time - t) <= reach) lines.push(`${data.kinds[kind]} at ${ms(time)}: ${data.strings[text]}`);
  }
  for (const i of drawn) {
    const { source, sent, target, taken, text } = arrows;
    if (source[i] === row && Math.abs(sent[i] - t) <= reach || target[i] === row && Math.abs(taken[i] - t) <= reach) {
      const way = `${lanes[source[i]].node} to ${lanes[target[i]].node}`;
      lines.push(`${data.strings[text[i]]}: ${way}, ${ms(sent[i])} to ${ms(taken[i])}, ${ms(taken[i] - sent[i])}`);
    }
  }
  return lines.length > 6 ? [...lines.slice(0, 5), `and ${lines.length - 5} more`] : lines;
}

function describeHead(y, t) {
  const band = Math.floor((y - RULER) / BAND) - (data.stages.length ? 1 : 0);
  if (y >= RULER && band < 0) {
    return data.stages.filter(([from, to]) => from <= t && t <= to)
      .map(([from, to, update, name]) => `update ${update}: ${name}\nsince ${ms(from)} for ${ms(to - from)}`);
  }
  const held = locks[band], i = held ? intervalAt(held, t) : -1;
  if (i < 0) return [];
  return [`${held.lock} is granted to ${lanes[held.row[i]].node}`, `since ${ms(held.begin[i])} for ${ms(held.end[i] - held.begin[i])}`];
}

// Pointer and keys

function tip(event, lines) {
  const box = $("tip");
  box.hidden = !lines.length;
  if (box.hidden) return;
  box.textContent = lines.join("\n");
  const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
  const below = event.clientY + 18 + box.offsetHeight < innerHeight;
  box.style.left = Math.max(4, left) + "px";
  box.style.top = (below ? event.clientY + 18 : event.clientY - box.offsetHeight - 12) + "px";
}

function listenLanes() {
  const canvas = $("lanes"), scroll = $("scroll");
  let grip = null;
  canvas.addEventListener("pointerdown", (event) => {
    grip = { x: event.offsetX, from: view.from, to: view.to, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const row = rowAt(event.offsetY);
    if (grip && (grip.moved ||= Math.abs(event.offsetX - grip.x) > 3)) {
      const by = (grip.x - event.offsetX) / width * (grip.to - grip.from);
      show(grip.from + by, grip.to + by);
      tip(event, []);
    } else {
      tip(event, event.offsetX >= GUTTER && row < lanes.length ? describe(row, toT(event.offsetX)) : []);
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    const row = rowAt(event.offsetY);
    if (grip && !grip.moved && row < lanes.length) pin(row, toT(Math.max(GUTTER, event.offsetX)));
    grip = null;
  });
  for (const gone of ["pointerleave", "pointercancel"]) canvas.addEventListener(gone, (event) => {
    grip = null;
    tip(event, []);
  });
  const wheel = (event) => {
    const across = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(event.deltaY / 300), toT(Math.max(GUTTER, event.offsetX)));
    else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(across / width);
    else return;
    event.preventDefault();
  };
  canvas.addEventListener("wheel", wheel, { passive: false });
  $("head").addEventListener("wheel", wheel, { passive: false });
  $("head").addEventListener("pointermove", (event) => tip(event, describeHead(event.offsetY, toT(event.offsetX))));
  $("head").addEventListener("pointerleave", (event) => tip(event, []));
  scroll.addEventListener("scroll", redraw);
  scroll.addEventListener("keydown", onKey);
}

function listenOverview() {
  const canvas = $("overview"), at = (event) => Math.max(0, Math.min(1, (event.offsetX - GUTTER) / width)) * data.end;
  canvas.addEventListener("pointerdown", (event) => {
    brush = [at(event), at(event)];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!brush) return;
    brush[1] = at(event);
    redraw();
  });
  canvas.addEventListener("pointerup", () => {
    if (!brush) return;
    const [from, to] = [Math.min(...brush), Math.max(...brush)], half = (view.to - view.from) / 2;
    brush = null;
    if ((to - from) / data.end * width > 3) show(from, to); else show(from - half, from + half);
  });
}

function step(by) {
  const here = cursor ?? { row: Math.max(0, lanes.findIndex((lane) => lane.node === "cpu0")), t: view.from };
  const times = lanes[here.row].ts;
  const next = by > 0 ? upTo(times, here.t) : upTo(times, here.t - 1e-3) - 1;
  pin(here.row, times[Math.max(0, Math.min(times.length - 1, next))] ?? here.t);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !lanes.length) return;
  const middle = cursor && cursor.t >= view.from && cursor.t <= view.to ? cursor.t : (view.from + view.to) / 2;
  const row = cursor?.row ?? -1;
  const keys = {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    ArrowUp: () => pin(Math.max(0, row - 1), middle),
    ArrowDown: () => pin(Math.min(lanes.length - 1, row + 1), middle),
    "+": () => zoom(0.5, middle),
    "=": () => zoom(0.5, middle),
    "-": () => zoom(2, middle),
    a: () => pan(-0.25),
    d: () => pan(0.25),
    0: () => show(0, data.end),
    Home: () => show(0, data.end),
  };
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function find(text) {
  const wanted = new Set(data.strings.flatMap((string, i) => string.includes(text) ? [i] : []));
  const here = cursor ?? { row: -1, t: view.from - 1 };
  let best = null;
  lanes.forEach((lane, row) => {
    for (let i = upTo(lane.ts, here.t - 1e-3); i < lane.ts.length && !(best && lane.ts[i] >= best.t); i++) {
      if (wanted.has(lane.text[i]) && (lane.ts[i] > here.t || row > here.row)) {
        best = { row, t: lane.ts[i] };
        break;
      }
    }
  });
  if (best) pin(best.row, best.t);
  $("said").textContent = best ? "" : "no further record has this text";
}

function tell(story) {
  const told = data.told.filter((event) => event[2] === story), times = told.map((event) => event[1]);
  const margin = Math.max(500, (Math.max(...times) - Math.min(...times)) * 0.4);
  show(Math.min(...times) - margin, Math.max(...times) + margin);
  const [row, t] = told[told.length - 1];
  pin(row, t);
  $("timeline-title").scrollIntoView();
}

function listen() {
  listenLanes();
  listenOverview();
  const middle = () => (view.from + view.to) / 2;
  $("zoom-in").addEventListener("click", () => zoom(0.5, middle()));
  $("zoom-out").addEventListener("click", () => zoom(2, middle()));
  $("fit").addEventListener("click", () => show(0, data.end));
  $("show-ipi").addEventListener("change", redraw);
  $("show-grant").addEventListener("change", redraw);
  $("find").addEventListener("submit", (event) => {
    event.preventDefault();
    find($("query").value);
  });
  for (const button of document.querySelectorAll("[data-story]")) {
    button.addEventListener("click", () => tell(Number(button.dataset.story)));
  }
  new ResizeObserver(redraw).observe($("scroll"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readStyle();
    redraw();
  });
  addEventListener("hashchange", follow);
}

/* #t=FROM-TO shows a part (milliseconds), &lane=NODE&at=T points at something, &story=N tells a story, &grants=1 too. */
function follow() {
  const hash = new URLSearchParams(location.hash.slice(1));
  if (hash.has("grants")) $("show-grant").checked = hash.get("grants") === "1";
  if (hash.has("t")) show(...hash.get("t").split("-").map((t) => Number(t) * 1000));
  const row = lanes.findIndex((lane) => lane.node === hash.get("lane"));
  if (row >= 0) pin(row, Number(hash.get("at")) * 1000);
  if (hash.has("story")) tell(Number(hash.get("story")));
}

async function start() {
  const began = performance.now();
  data = await unpack($("data").textContent);
  lanes = data.lanes.map(laneOf);
  locks = data.locks.map(spans);
  arrows = { ...data.arrows, sent: sums(data.arrows.sent) };
  arrows.taken = arrows.sent.map((sent, i) => sent + arrows.length[i]);
  height = Math.max(12, Math.min(26, Math.floor(innerHeight * 0.6 / lanes.length)));
  $("spacer").style.height = lanes.length * height + "px";
  view = { from: 0, to: data.end };
  readStyle();
  measure();
  listen();
  follow();
  const unpacked = performance.now();
  draw();
  Object.assign(root.dataset, {
    ready: "yes",
    lanes: lanes.length,
    records: lanes.reduce((sum, lane) => sum + lane.ts.length, 0),
    intervals: lanes.reduce((sum, lane) => sum + lane.begin.length, 0),
    unpackMs: Math.round(unpacked - began),
    drawMs: Math.round(performance.now() - unpacked),
  });
}

start().catch((error) => {
  $("details").textContent = `The timeline cannot be shown: ${error}`;
  console.error(error);
});
