// Charts as SVG: lines over iterations, bars, and sparklines. They take their colours from CSS.

import { svg, h, fill } from "./dom.js";
import { number } from "./format.js";

const LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;

/**
 * Lines over a common x. A click calls `pick` with the nearest x that has a value.
 * series: [{ name, points: [[x, y], ...], className, dots }]; y may be null.
 */
export function lineChart({ series, height = 150, smooth = 1, pick, marked }) {
  const box = h("div", { class: "chart" });
  const draw = () => {
    const width = box.clientWidth || 360;
    fill(box, drawn({ series, height, width, smooth, pick, marked }));
  };
  new ResizeObserver(draw).observe(box);
  return box;
}

function drawn({ series, height, width, smooth, pick, marked }) {
  const smoothed = series.map((one) => ({ ...one, line: one.dots ? one.points : moving(one.points, smooth) }));
  const all = series.flatMap((one) => one.points.filter(([, y]) => y != null));
  if (!all.length) return h("div", { class: "none" }, "not measured");
  const [x, y] = [scale(all.map((p) => p[0]), LEFT, width - RIGHT, 0),
    scale(all.map((p) => p[1]), height - BOTTOM, TOP, 0.06)];
  const root = svg("svg", { width, height, role: "img" });
  for (const tick of ticks(y.low, y.high, 4)) {
    root.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: LEFT - 6, y: y(tick) + 3.5, "text-anchor": "end" }, number(tick, 3)));
  }
  for (const tick of ticks(x.low, x.high, Math.max(2, width / 90)).filter(Number.isInteger)) {
    root.append(svg("text", { class: "tick", x: x(tick), y: height - 5, "text-anchor": "middle" }, number(tick)));
  }
  if (marked != null) root.append(svg("line", { class: "marked", x1: x(marked), x2: x(marked), y1: TOP, y2: height - BOTTOM }));
  for (const one of smoothed) {
    if (smooth > 1 && !one.dots) root.append(path(one.points, x, y, `raw ${one.className}`));
    root.append(path(one.line, x, y, `line ${one.className}`));
    if (one.dots || one.points.length === 1) {
      for (const [px, py] of one.points.filter((p) => p[1] != null)) {
        root.append(svg("circle", { class: `dot ${one.className}`, cx: x(px), cy: y(py), r: 2.6 }));
      }
    }
  }
  hover(root, { series: smoothed, x, y, height, width, pick });
  return root;
}

/** A line that follows the pointer, with the values there. */
function hover(root, { series, x, y, height, width, pick }) {
  const xs = [...new Set(series.flatMap((one) => one.points.map((p) => p[0])))].sort((a, b) => a - b);
  const cursor = svg("g", { class: "cursor" });
  root.append(cursor);
  const nearest = (event) => {
    const at = x.inverse(event.clientX - root.getBoundingClientRect().left);
    return xs.reduce((best, one) => (Math.abs(one - at) < Math.abs(best - at) ? one : best));
  };
  root.addEventListener("mousemove", (event) => {
    const at = nearest(event), right = x(at) > width / 2;
    const values = series.map((one) => [one, one.line.find((p) => p[0] === at)?.[1]]).filter(([, v]) => v != null);
    const label = (text, row, className) => svg("text", { class: className, x: x(at) + (right ? -7 : 7),
      y: TOP + 10 + 13 * row, "text-anchor": right ? "end" : "start" }, text);
    fill(cursor, svg("line", { x1: x(at), x2: x(at), y1: TOP, y2: height - BOTTOM }),
      label(`iteration ${at}`, 0, "where"),
      values.map(([one, value], row) => [
        svg("circle", { class: `dot ${one.className}`, cx: x(at), cy: y(value), r: 3 }),
        label((one.name ? `${one.name} ` : "") + number(value), row + 1, `value ${one.className}`)]));
  });
  root.addEventListener("mouseleave", () => fill(cursor));
  if (pick) {
    root.classList.add("picks");
    root.addEventListener("click", (event) => pick(nearest(event)));
  }
}

/** Mean over the last `window` points. */
function moving(points, window) {
  const recent = [];
  return points.map(([x, y]) => {
    if (y == null) return [x, y];
    recent.push(y);
    if (recent.length > window) recent.shift();
    return [x, recent.reduce((a, b) => a + b, 0) / recent.length];
  });
}

/** Of many points in one pixel column, the lowest and the highest are drawn. */
function path(points, x, y, className) {
  const columns = new Map();
  for (const [px, py] of points) {
    if (py == null) continue;
    const at = Math.round(x(px) * 2) / 2, top = y(py), found = columns.get(at);
    if (!found) columns.set(at, [top, top]);
    else columns.set(at, [Math.min(found[0], top), Math.max(found[1], top)]);
  }
  const places = [...columns].flatMap(([at, [a, b]]) => (a === b ? [[at, a]] : [[at, a], [at, b]]));
  const d = places.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
  return svg("path", { class: className, d });
}

function scale(values, from, to, margin) {
  let low = Infinity, high = -Infinity;
  for (const value of values) (low = Math.min(low, value)), (high = Math.max(high, value));
  if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  const room = (high - low) * margin;
  [low, high] = [low - room, high + room];
  const at = (value) => from + ((value - low) / (high - low)) * (to - from);
  return Object.assign(at, { low, high, inverse: (px) => low + ((px - from) / (to - from)) * (high - low) });
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** Bars with a count each; a click or Enter on one calls `pick` with its index. */
export function bars({ counts, labels, titles, chosen = [], pick, height = 140, className = () => "" }) {
  const most = Math.max(1, ...counts);
  return h("div", { class: "bars" }, counts.map((count, at) =>
    h("button", {
      class: `bar ${chosen.includes(at) ? "chosen" : ""} ${className(at)}`,
      title: titles[at], "aria-label": titles[at], disabled: !pick, click: () => pick?.(at),
    },
    svg("svg", { width: "100%", height, preserveAspectRatio: "none", viewBox: `0 0 10 ${height}` },
      svg("rect", { x: 0.6, width: 8.8, y: height - Math.max(count ? 2 : 0, (count / most) * (height - 4)),
        height: Math.max(count ? 2 : 0, (count / most) * (height - 4)) })),
    h("span", {}, labels[at]))));
}

/** A small line without axes over points [iteration, value in 0…1], from 1 to `end`. */
export function sparkline(points, { end, title = "" }) {
  const there = points.filter(([, v]) => v != null), width = 110, height = 22;
  const x = (at) => 3 + ((at - 1) / Math.max(1, end - 1)) * (width - 6);
  const y = (v) => height - 3 - v * (height - 6);
  const d = there.map(([i, v], n) => `${n ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  const last = there.at(-1);
  return svg("svg", { class: "spark", width, height, role: "img", "aria-label": title },
    title ? svg("title", {}, title) : null,
    svg("line", { class: "grid", x1: 0, x2: width, y1: height - 3, y2: height - 3 }),
    svg("path", { class: "line s0", d }),
    there.length < 6 ? there.map(([at, v]) => svg("circle", { class: "dot s0", cx: x(at), cy: y(v), r: 1.4 })) : null,
    last ? svg("circle", { class: "dot s0", cx: x(last[0]), cy: y(last[1]), r: 2 }) : null);
}

/** One bar cut into parts: [[share, className, title], ...]. */
export function strip(parts, props = {}) {
  const whole = parts.reduce((sum, [share]) => sum + share, 0) || 1;
  let at = 0;
  return svg("svg", { class: "strip", width: "100%", height: 10, preserveAspectRatio: "none", viewBox: "0 0 1000 10", ...props },
    parts.map(([share, className, title]) => {
      const width = (share / whole) * 1000;
      at += width;
      return svg("rect", { class: className, x: at - width, y: 0, width: Math.max(0, width - 1), height: 10 },
        svg("title", {}, title));
    }));
}
