"use strict";
/* The timeline. Times are microseconds since the machine began. A lane is columns of numbers in time order, so what is
   in view, and what is under the pointer, is found by binary search. */

const GUTTER = 92;
const RULER = 20, BAND = 18;
const LEAST_SPAN = 4;
const ARROWS = 1000;
const NEAR = 5;
const COLORS = ["guest", "kernel", "lock", "pseamldr", "seam", "stopped", "idle", "offline", "dead", "sigstopped", "runs"];
const HATCHED = new Set(["offline", "dead", "sigstopped"]);
const MARKS = { fault: "\u25bc fault", failure: "\u2715 failure", warning: "\u25cf kernel warning" };
const FONT = "11px system-ui, 'DejaVu Sans', sans-serif";

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

let data, lanes, view, height, cursor = null, brush = null, style = {}, locks, arrows, drawn = [], overview = null, pending = false;

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
  $("details").textContent = describe(row, t).join("\n");
  redraw();
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
  for (const [at, time, kind, text] of data.marks) {
    if (at === row && Math.abs(time - t) <= reach) lines.push(`${data.kinds[kind]} at ${ms(time)}: ${data.strings[text]}`);
  }
  for (const [at, time, story] of data.told) {
    if (at === row && Math.abs(time - t) <= reach) lines.push(`story of ${data.stories[story]}`);
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

// Drawing

function sized(canvas, w, h) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(w * scale);
  canvas.height = Math.round(h * scale);
  canvas.style.height = h + "px";
  const g = canvas.getContext("2d");
  g.scale(scale, scale);
  g.font = FONT;
  g.textBaseline = "middle";
  return g;
}

function readStyle() {
  const css = getComputedStyle(root), g = document.createElement("canvas").getContext("2d");
  style = {};
  for (const name of [...COLORS, ...Object.keys(MARKS), "story", "ipi", "grant", "ink", "dim", "line", "stripe", "card", "on-state", "accent"]) {
    style[name] = css.getPropertyValue("--" + name).trim();
  }
  overview = null;
  style.fills = COLORS.map((name) => HATCHED.has(name) ? hatch(g, style[name]) : style[name]);
  legend();
}

function hatch(g, color) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const t = tile.getContext("2d");
  t.fillStyle = color;
  t.fillRect(0, 0, 6, 6);
  t.strokeStyle = style.card || "#fff8";
  t.globalAlpha = 0.45;
  t.lineWidth = 1.4;
  for (const x of [-6, 0, 6]) {
    t.moveTo(x, 6);
    t.lineTo(x + 6, 0);
  }
  t.stroke();
  return g.createPattern(tile, "repeat");
}

function legend() {
  const used = new Set(lanes.flatMap((lane) => [...new Set(lane.state)]));
  const items = data.states.map((name, state) => [name, state]).filter(([, state]) => used.has(state)).map(([name, state]) => {
    const item = document.createElement("li"), chip = document.createElement("canvas");
    chip.width = 14;
    chip.height = 12;
    const g = chip.getContext("2d");
    g.fillStyle = style.fills[state];
    g.fillRect(0, 0, 14, 12);
    item.append(chip, name);
    return item;
  });
  for (const [kind, text] of Object.entries(MARKS)) {
    if (!data.marks.some((mark) => data.kinds[mark[2]] === kind)) continue;
    const item = document.createElement("li");
    item.textContent = text;
    item.style.color = style[kind];
    items.push(item);
  }
  if (data.told.length) {
    const item = document.createElement("li");
    item.textContent = "\u25c6 event of a story";
    items.push(item);
  }
  $("legend").replaceChildren(...items);
}

function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    draw();
  });
}

function measure() {
  width = Math.max(1, $("scroll").clientWidth - GUTTER);
  scrolled = $("scroll").scrollTop;
}

function draw() {
  measure();
  drawOverview();
  drawHead();
  drawLanes();
}

/* States of one lane from x to x. Of those that share a pixel, the one that lasts longest in it is shown. */
function drawLane(g, lane, y, h) {
  const n = lane.begin.length, right = GUTTER + width, weights = new Float64Array(COLORS.length);
  let pixel = -1, start = 0, end = 0, state = -1;
  const put = () => {
    if (state >= 0) {
      g.fillStyle = style.fills[state];
      g.fillRect(start, y, end - start, h);
    }
    state = -1;
  };
  const span = (from, to, s) => {
    if (s !== state || from > end + 0.01) {
      put();
      state = s;
      start = from;
    }
    end = to;
  };
  const flush = () => {
    if (pixel < 0) return;
    let most = 0;
    for (let s = 1; s < weights.length; s++) if (weights[s] > weights[most]) most = s;
    span(pixel, pixel + 1, most);
    weights.fill(0);
    pixel = -1;
  };
  for (let i = Math.max(0, upTo(lane.begin, view.from) - 1); i < n && lane.begin[i] < view.to; i++) {
    const from = Math.max(GUTTER, toX(lane.begin[i])), to = Math.min(right, toX(lane.end[i]));
    if (to < from) continue;
    if (to - from < 1) {
      if (Math.floor(from) !== pixel) flush();
      pixel = Math.floor(from);
      weights[lane.state[i]] += to - from + 1e-6;
      continue;
    }
    flush();
    span(from, to, lane.state[i]);
    if (to - from > 46 && h >= 12) {
      put();
      label(g, words(lane, i), from, to - from, y + h / 2, lane.state[i]);
    }
  }
  flush();
  put();
}

function words(lane, i) {
  const what = data.strings[lane.what[i]], state = data.states[lane.state[i]];
  return HATCHED.has(COLORS[lane.state[i]]) ? `${state} ${what}` : what || state;
}

function label(g, text, x, w, y, state) {
  const most = Math.floor((w - 8) / 5.9);
  g.fillStyle = ["idle", "runs", "offline"].includes(COLORS[state]) ? style.dim : style["on-state"];
  g.fillText(text.length > most ? text.slice(0, most - 1) + "\u2026" : text, x + 4, y);
}

function drawLanes() {
  const scroll = $("scroll"), h = Math.min(scroll.clientHeight, lanes.length * height);
  const g = sized($("lanes"), GUTTER + width, h);
  const first = Math.floor(scrolled / height), last = Math.min(lanes.length - 1, rowAt(h));
  for (let row = first; row <= last; row++) {
    const y = yOf(row);
    if (row % 2) {
      g.fillStyle = style.stripe;
      g.fillRect(0, y, GUTTER + width, height);
    }
    if (cursor?.row === row) {
      g.fillStyle = style.accent;
      g.fillRect(0, y, 3, height);
    }
    g.fillStyle = cursor?.row === row ? style.ink : style.dim;
    g.fillText(lanes[row].node, 8, y + height / 2);
    drawLane(g, lanes[row], y + 1, height - 2);
    drawRecords(g, lanes[row], y + height - 4);
  }
  g.save();
  g.beginPath();
  g.rect(GUTTER, 0, width, h);
  g.clip();
  drawArrows(g, first, last);
  drawMarks(g, first, last);
  if (cursor) {
    g.fillStyle = style.accent;
    g.fillRect(toX(cursor.t) - 0.5, 0, 1, h);
  }
  g.restore();
}

function drawRecords(g, lane, y) {
  const from = upTo(lane.ts, view.from - 1), to = upTo(lane.ts, view.to);
  if (to - from > width / 6 || height < 14) return;
  g.fillStyle = style.ink;
  for (let i = from; i < to; i++) g.fillRect(toX(lane.ts[i]) - 0.5, y, 1, 3);
}

function drawArrows(g, first, last) {
  const shown = { ipi: $("show-ipi").checked, grant: $("show-grant").checked };
  const { kind, source, sent, target, taken } = arrows;
  drawn = [];
  for (let i = 0; i < sent.length && sent[i] <= view.to; i++) {
    if (taken[i] >= view.from && shown[kind[i]] && Math.max(source[i], target[i]) >= first
      && Math.min(source[i], target[i]) <= last) drawn.push(i);
  }
  const all = drawn.length, step = Math.ceil(all / ARROWS);
  if (step > 1) drawn = drawn.filter((_, i) => i % step === 0);
  $("said").textContent = step > 1 ? `${drawn.length} of ${all} arrows drawn: zoom in for more` : "";
  for (const name of ["ipi", "grant"]) strokeArrows(g, style[name], drawn.filter((i) => kind[i] === name));
}

function strokeArrows(g, color, chosen) {
  const lines = new Path2D(), heads = new Path2D(), middle = height / 2;
  for (const i of chosen) {
    const x0 = toX(arrows.sent[i]), y0 = yOf(arrows.source[i]) + middle;
    const x1 = toX(arrows.taken[i]), y1 = yOf(arrows.target[i]) + middle, angle = Math.atan2(y1 - y0, x1 - x0);
    lines.moveTo(x0, y0);
    lines.lineTo(x1, y1);
    heads.moveTo(x1, y1);
    for (const turn of [2.7, -2.7]) heads.lineTo(x1 + 6 * Math.cos(angle + turn), y1 + 6 * Math.sin(angle + turn));
  }
  g.strokeStyle = g.fillStyle = color;
  g.lineWidth = 1.2;
  g.stroke(lines);
  g.fill(heads);
}

function drawMarks(g, first, last) {
  const seen = new Set();
  const fresh = (row, t, kind) => {
    const key = `${row} ${Math.round(toX(t) / 3)} ${kind}`;
    return row >= first && row <= last && t >= view.from && t <= view.to && !seen.has(key) && seen.add(key);
  };
  for (const [row, t, kind] of data.marks) {
    if (fresh(row, t, kind)) symbol(g, data.kinds[kind], toX(t), yOf(row) + height / 2);
  }
  for (const [row, t] of data.told) {
    if (fresh(row, t, "story")) symbol(g, "story", toX(t), yOf(row) + height / 2);
  }
}

function symbol(g, kind, x, y) {
  g.fillStyle = g.strokeStyle = style[kind];
  g.beginPath();
  if (kind === "fault") {
    g.moveTo(x - 5, y - 7);
    g.lineTo(x + 5, y - 7);
    g.lineTo(x, y + 2);
  } else if (kind === "failure") {
    g.lineWidth = 2;
    g.moveTo(x - 3.5, y - 3.5);
    g.lineTo(x + 3.5, y + 3.5);
    g.moveTo(x + 3.5, y - 3.5);
    g.lineTo(x - 3.5, y + 3.5);
    g.stroke();
    return;
  } else if (kind === "warning") {
    g.arc(x, y, 3, 0, 7);
  } else {
    for (const [dx, dy] of [[0, -6], [5, 0], [0, 6], [-5, 0]]) g.lineTo(x + dx, y + dy);
    g.closePath();
  }
  g.fill();
  g.lineWidth = 1;
  g.strokeStyle = style.card;
  g.stroke();
}

function drawHead() {
  const bands = locks.length + (data.stages.length ? 1 : 0);
  const g = sized($("head"), GUTTER + width, RULER + bands * BAND), span = view.to - view.from;
  const step = tick(span / (width / 110));
  g.fillStyle = style.dim;
  for (let t = Math.ceil(view.from / step) * step; t <= view.to; t += step) {
    g.fillText(ms(t).replace(/\.?0+ /, " "), toX(t) + 3, 9);
    g.fillRect(toX(t), 2, 1, RULER - 4);
  }
  let y = RULER;
  if (data.stages.length) {
    g.fillStyle = style.dim;
    g.fillText("update", 8, y + BAND / 2);
    const names = [...new Set(data.stages.map((stage) => stage[3]))];
    for (const [from, to, update, name] of data.stages) {
      box(g, from, to, y, style.accent, 0.35 + 0.5 * (names.indexOf(name) % 2), `${update} ${name}`);
    }
    y += BAND;
  }
  for (const held of locks) {
    g.fillStyle = style.dim;
    g.fillText(held.lock.length > 13 ? held.lock.slice(0, 12) + "\u2026" : held.lock, 8, y + BAND / 2);
    let done = -1;
    for (let i = upTo(held.end, view.from); i < held.begin.length && held.begin[i] <= view.to; i++) {
      if (toX(held.end[i]) < done) continue;
      box(g, held.begin[i], held.end[i], y, style.lock, 0.55 + 0.4 * (i % 2), lanes[held.row[i]].node);
      done = Math.floor(toX(held.end[i])) + 1;
    }
    y += BAND;
  }
}

function tick(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((n) => n * power).find((step) => step >= least);
}

function box(g, from, to, y, color, alpha, text) {
  if (to < view.from || from > view.to) return;
  const x = Math.max(GUTTER, toX(from)), w = Math.max(1, Math.min(GUTTER + width, toX(to)) - x);
  g.globalAlpha = alpha;
  g.fillStyle = color;
  g.fillRect(x, y + 1, w, BAND - 3);
  g.globalAlpha = 1;
  g.fillStyle = style.ink;
  if (w > 6 * text.length + 8) g.fillText(text, x + 4, y + BAND / 2);
}

/* The whole run: how many CPUs are in each state, updates on top of it, and what part is in view. */
const OVERVIEW = 46;

function shares() {
  const bins = Math.max(1, Math.floor(width)), scale = bins / data.end;
  const columns = Array.from({ length: COLORS.length }, () => new Float32Array(bins));
  for (const lane of lanes) {
    if (!lane.node.startsWith("cpu")) continue;
    for (let i = 0; i < lane.begin.length; i++) {
      const from = lane.begin[i] * scale, to = lane.end[i] * scale, column = columns[lane.state[i]];
      for (let bin = Math.floor(from); bin < to && bin < bins; bin++) {
        column[bin] += Math.min(to, bin + 1) - Math.max(from, bin);
      }
    }
  }
  return columns;
}

function paintOverview(g) {
  const cpus = Math.max(1, lanes.filter((lane) => lane.node.startsWith("cpu")).length), h = OVERVIEW - 8;
  const columns = shares();
  g.fillStyle = style.dim;
  g.fillText("whole run", 8, OVERVIEW / 2);
  for (let bin = 0; bin < columns[0].length; bin++) {
    let y = OVERVIEW;
    columns.forEach((column, state) => {
      const part = column[bin] / cpus * h;
      if (!part) return;
      g.fillStyle = style.fills[state];
      g.fillRect(GUTTER + bin, y - part, 1, part);
      y -= part;
    });
  }
  const at = (t) => GUTTER + t / data.end * width;
  g.fillStyle = style.accent;
  for (const [from, to] of data.stages) g.fillRect(at(from), 0, Math.max(1, at(to) - at(from)), 4);
  for (const [, t, kind] of data.marks) {
    g.fillStyle = style[data.kinds[kind]];
    g.fillRect(at(t) - 0.5, 5, 1.5, 7);
  }
}

function drawOverview() {
  const full = GUTTER + width, at = (t) => GUTTER + t / data.end * width;
  if (overview?.style.width !== full + "px") {
    overview = document.createElement("canvas");
    overview.style.width = full + "px";
    paintOverview(sized(overview, full, OVERVIEW));
  }
  const g = sized($("overview"), full, OVERVIEW);
  g.drawImage(overview, 0, 0, full, OVERVIEW);
  const [from, to] = brush ? [Math.min(...brush), Math.max(...brush)] : [view.from, view.to];
  g.fillStyle = style.card;
  g.globalAlpha = 0.68;
  g.fillRect(GUTTER, 0, at(from) - GUTTER, OVERVIEW);
  g.fillRect(at(to), 0, GUTTER + width - at(to), OVERVIEW);
  g.globalAlpha = 1;
  g.strokeStyle = style.accent;
  g.strokeRect(at(from) + 0.5, 0.5, Math.max(1, at(to) - at(from) - 1), OVERVIEW - 1);
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
  if (event.ctrlKey || event.metaKey || event.altKey) return;
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
