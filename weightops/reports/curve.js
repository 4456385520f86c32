"use strict";
const { points, estimates, chosen, axes, labels } = JSON.parse(document.getElementById("data").textContent);
const svg = document.getElementById("curve"), slider = document.getElementById("slider"), bars = document.getElementById("bars");
const [left, right, top_, bottom] = [52, 505, 22, 285], isShare = axes.factor === 100;
const percent = v => isShare ? (Math.round(1000 * v) / 10 || 0).toFixed(1) : String(Number(v.toPrecision(4)));
const place = axes.log ? Math.log10 : v => v; // perplexities are on a logarithmic scale
const put = (name, attributes, text) => { const e = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v); if (text !== undefined) e.textContent = text; svg.append(e); return e; };
const span = values => { const low = Math.min(...values), high = Math.max(...values), pad = Math.max(0.01, 0.06 * (high - low)); return [low - pad, high + pad]; };
const all = [...points, ...estimates], along = axes.percent ? place : v => v;
const [x0, x1] = span(all.map(p => along(p.x))), [y0, y1] = span(all.map(p => place(p.y)));
// round numbers, at most five of them
const ticks = (low, high) => { const raw = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(raw)), step = unit * [1, 2, 5, 10].find(m => m * unit >= raw);
  const first = Math.ceil(low / step), last = Math.floor(high / step), digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Array.from({ length: last - first + 1 }, (_, i) => [(first + i) * step, digits]); };
const label = ([v, digits], scale, log) => log ? String(Number((10 ** v).toPrecision(3))) : ((scale * v) || 0).toFixed(Math.max(0, digits - (scale === 100 ? 2 : 0)));
const across = v => left + (right - left) * (v - x0) / (x1 - x0), up = v => bottom - (bottom - top_) * (v - y0) / (y1 - y0);
const X = v => across(along(v)), Y = v => up(place(v));
const share = values => ticks(...values).filter(([v]) => !isShare || (v > -1e-9 && v < 1 + 1e-9));
for (const tick of share([y0, y1])) {
  put("line", { x1: left, x2: right, y1: up(tick[0]), y2: up(tick[0]), stroke: "var(--line)" });
  put("text", { x: left - 6, y: up(tick[0]) + 4, "text-anchor": "end" }, label(tick, axes.factor, axes.log));
}
for (const tick of axes.percent ? share([x0, x1]) : ticks(x0, x1).filter(([v]) => !axes.whole || Number.isInteger(v))) put("text", { x: across(tick[0]), y: bottom + 16, "text-anchor": "middle" }, axes.whole ? tick[0] : label(tick, axes.percent ? axes.factor : 1, axes.percent && axes.log));
put("text", { x: (left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, axes.x);
put("text", { x: 14, y: (top_ + bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(top_ + bottom) / 2})` }, axes.y);
if (axes.line) put("polyline", { points: points.map(p => `${X(p.x)},${Y(p.y)}`).join(" "), fill: "none", stroke: "var(--curve)", "stroke-width": 2 });
const told = p => `${p.name}: ${axes.y} ${percent(p.y)}` + (axes.percent ? `; ${axes.x} ${percent(p.x)}` : "");
const dot = (p, attributes, more = "") => put("circle", { cx: X(p.x), cy: Y(p.y), ...attributes })
  .append(Object.assign(document.createElementNS("http://www.w3.org/2000/svg", "title"), { textContent: told(p) + more }));
estimates.forEach(p => dot(p, { r: 4, fill: "var(--ground)", stroke: "var(--curve)" }, ` (on some of the ${axes.samples})`));
points.forEach((p, i) => dot(p, { r: i === chosen ? 7 : 4.5, fill: i === chosen ? "var(--chosen)" : "var(--curve)" }));
const ring = put("circle", { r: 11, fill: "none", stroke: "var(--ink)", "stroke-width": 2, "pointer-events": "none" });
// each label at the first place around its point where it covers no other one
const boxes = points.map(p => ({ x: X(p.x) - 5, y: Y(p.y) - 5, width: 10, height: 10 }));
const meets = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
for (const { index, text, kind } of labels) {
  const p = points[index], [x, y] = [X(p.x), Y(p.y)];
  const places = [5, -14, 26, -34, 46, -54, 66, 86, 106].flatMap(dy => [[14, dy, "start"], [-14, dy, "end"], [0, Math.abs(dy) < 9 ? -14 : dy, "middle"]]);
  const e = put("text", { class: `label ${kind}`, "pointer-events": "none" }, text);
  let best = [Infinity];
  for (const place of places) {
    const [dx, dy, anchor] = place;
    for (const [k, v] of Object.entries({ x: x + dx, y: y + dy, "text-anchor": anchor })) e.setAttribute(k, v);
    const b = e.getBBox(), outside = b.x < left - 40 || b.x + b.width > 519 || b.y < 0 || b.y + b.height > bottom;
    const cost = (outside ? 1000 : 0) + boxes.filter(other => meets(b, other)).length;
    if (cost < best[0]) best = [cost, place, b];
  }
  const [, [dx, dy, anchor], box] = best;
  for (const [k, v] of Object.entries({ x: x + dx, y: y + dy, "text-anchor": anchor })) e.setAttribute(k, v);
  boxes.push(box, box, box);
}
const base = points.find(p => p.base) || points[0];
function width(name, value) {
  const values = points.map(p => p.tasks[name]).filter(v => v !== undefined), low = Math.min(0, ...values), high = Math.max(...values);
  return 100 * (isShare ? value : (value - low) / (high - low || 1)) + "%";
}
function show() {
  const p = points[slider.value], name = p.name + (Number(slider.value) === chosen ? " (chosen)" : "");
  document.getElementById("alpha").textContent = name;
  slider.setAttribute("aria-valuetext", `${name}: ` + Object.entries(p.tasks).map(([task, value]) => `${task} ${percent(value)}${isShare ? " %" : ""}`).join(", "));
  ring.setAttribute("cx", X(p.x)); ring.setAttribute("cy", Y(p.y));
  bars.replaceChildren(...Object.entries(p.tasks).map(([name, value]) => {
    const row = document.createElement("div"), label = document.createElement("span"), track = document.createElement("div");
    const fill = document.createElement("i"), mark = document.createElement("u"), number = document.createElement("b");
    row.className = "bar"; track.className = "track"; label.textContent = name; number.textContent = percent(value);
    fill.style.width = width(name, value); mark.style.left = width(name, base.tasks[name]);
    track.append(fill, mark); row.append(label, track, number); return row;
  }));
}
const pick = i => { slider.value = i; show(); };
function follow(event) {
  const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const far = points.map(p => Math.hypot(X(p.x) - place.x, Y(p.y) - place.y));
  pick(far.indexOf(Math.min(...far)));
}
svg.addEventListener("pointerdown", event => { svg.setPointerCapture(event.pointerId); follow(event); });
svg.addEventListener("pointermove", event => { if (event.buttons) follow(event); });
slider.addEventListener("input", show); pick(chosen);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(e => { e.open = true; }));
