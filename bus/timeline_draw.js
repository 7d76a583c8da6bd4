"use strict";
/* What the timeline draws, on three canvases: the whole run, the ruler with updates and locks, and the lanes. */

const OVERVIEW = 46, RULER = 20, BAND = 18;  // heights
/* At most so many arrows are drawn. */
const ARROWS = 1000;
const COLORS = ["guest", "kernel", "lock", "pseamldr", "seam", "stopped", "idle", "offline", "dead", "sigstopped", "runs"];
const HATCHED = new Set(["offline", "dead", "sigstopped"]);
const MARKS = { fault: "\u25bc fault", failure: "\u2715 failure", warning: "\u25cf kernel warning" };
const FONT = "11px system-ui, 'DejaVu Sans', sans-serif";

let style = {}, overview = null, drawn = [], pending = false;

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
  const most = Math.floor((w - 8) / 6.6);
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
      box(g, from, to, y, style.accent, 0.3 + 0.3 * (names.indexOf(name) % 2), `${update} ${name}`);
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
