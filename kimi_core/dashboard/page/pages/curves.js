// The curves of one run, and of up to four with the difference of their settings.

import { h, fill } from "../dom.js";
import { get, metricsOf } from "../data.js";
import { lineChart } from "../chart.js";
import { duration, fixed, link, number, signed } from "../format.js";
import { MEANINGS } from "../meanings.js";

const FIRST = ["accuracy", "reward_mean", "length_mean", "zero_advantage_share", "entropy", "logprob_gap_mean"];
const LEFT_OUT = new Set(["kind", "iteration", "seed", "policy_version"]);

export async function curvesPage({ run, query }) {
  const state = { smooth: Number(query.get("smooth") ?? 5), search: query.get("search") ?? "" };
  const grid = h("div", { class: "grid" });
  const top = h("div", { class: "tiles" });
  let shown = { lines: null };
  const draw = () => drawGrid(grid, [[run, shown.lines]], state);
  const update = async (isCurrent = () => true) => {
    const found = await metricsOf(run);
    if (found.lines.length === shown.lines?.length && found.epoch === shown.epoch || !isCurrent()) return;
    shown = found;
    fill(top, tiles(found.lines, found.broken));
    draw();
  };
  await update();
  return { node: h("section", {}, top, controls(state, draw, "a click on a curve opens the iteration"), grid), refresh: update };
}

export async function comparePage({ runs, query }) {
  const chosen = runs.slice(0, 4);
  const state = { smooth: Number(query.get("smooth") ?? 5), search: query.get("search") ?? "" };
  const found = await Promise.all(chosen.map(async (run) => [run, (await metricsOf(run)).lines]));
  const settings = await Promise.all(chosen.map((run) => get([run, "settings"])));
  const grid = h("div", { class: "grid" });
  drawGrid(grid, found, state);
  const node = h("section", {}, h("h1", {}, "Compare"),
    h("table", { class: "compare" },
      h("thead", {}, h("tr", {}, h("th", {}, ""), chosen.map((run, at) =>
        h("th", { class: "n" }, h("i", { class: `key s${at}` }), h("a", { href: link(run) }, run))))),
      h("tbody", {}, results(found), differences(settings))),
    controls(state, () => drawGrid(grid, found, state)), grid);
  return { node };
}

function results(found) {
  const evaluations = found.map(([, lines]) => lines.filter((line) => line.kind === "evaluation"));
  const row = (name, value) => h("tr", {}, h("td", {}, name), evaluations.map((list) => h("td", { class: "n" }, value(list))));
  return [
    row("held out, greedy, before", (list) => fixed(list[0]?.accuracy_greedy)),
    row("held out, greedy, after", (list) => fixed(list.at(-1)?.accuracy_greedy)),
    row("length, before → after", (list) => list.length ? `${number(list[0].length_mean, 3)} → ${number(list.at(-1).length_mean, 3)}` : "–"),
  ];
}

function differences(settings) {
  const keys = [...new Set(settings.flatMap(Object.keys))].sort();
  const differ = keys.filter((key) => new Set(settings.map((one) => JSON.stringify(one[key]))).size > 1);
  const head = h("tr", { class: "part" }, h("td", { colspan: settings.length + 1 },
    differ.length ? "settings that differ" : "all settings are equal"));
  return [head, ...differ.map((key) => h("tr", {}, h("td", {}, h("code", {}, key)),
    settings.map((one) => h("td", { class: "n" }, one[key] === undefined ? "–" : JSON.stringify(one[key])))))];
}

function controls(state, redraw, note = "") {
  return h("div", { class: "controls" },
    h("input", { type: "search", placeholder: "search metrics", value: state.search, "aria-label": "search metrics",
      input: (event) => { state.search = event.target.value; redraw(); } }),
    h("label", {}, "smooth over ",
      h("input", { type: "range", min: 1, max: 50, value: state.smooth,
        input: (event) => { state.smooth = Number(event.target.value); event.target.nextSibling.textContent = state.smooth; redraw(); } }),
      h("output", {}, String(state.smooth)), " iterations"),
    h("span", { class: "note" }, note));
}

function tiles(lines, broken) {
  const iterations = lines.filter((line) => line.kind === "iteration");
  const evaluations = lines.filter((line) => line.kind === "evaluation");
  const [first, last, now] = [evaluations[0], evaluations.at(-1), iterations.at(-1)];
  const tile = (name, value, more = "") => h("div", { class: "tile" }, h("span", {}, name), h("b", {}, value), h("small", {}, more));
  if (!lines.length) return [tile("nothing yet", "–", "the run has not written a line")];
  return [
    tile("iterations", number(now?.iteration ?? 0), now ? `version ${now.policy_version}` : ""),
    tile("held out, greedy", fixed(last?.accuracy_greedy), first && last !== first ? `${fixed(first.accuracy_greedy)} before, ${signed(last.accuracy_greedy - first.accuracy_greedy)}` : `n ${last?.n ?? 0}`),
    tile("held out, sampled", fixed(last?.accuracy_sampled), first && last !== first ? `${fixed(first.accuracy_sampled)} before, ${signed(last.accuracy_sampled - first.accuracy_sampled)}` : ""),
    ...setTiles(first, last, tile),
    tile("length", number(last?.length_mean, 3), first && last !== first ? `${number(first.length_mean, 3)} before` : "tokens"),
    tile("an iteration takes", duration(now?.wall_s), now ? `${duration(now.rollout_s)} rollout, ${duration(now.train_s)} training` : ""),
    tile("sampled", number(iterations.reduce((sum, one) => sum + (one.tokens_sampled ?? 0), 0)), `tokens, ${number(now?.tokens_per_s, 3)} a second`),
    ...lines.filter((line) => line.kind === "change").map((line) => tile(`changed after ${line.iteration}`, line.setting, `${line.before} → ${line.now}`)),
    broken ? tile("damaged lines", number(broken), "left out") : null,
  ];
}

/** A tile for each other evaluation set. */
function setTiles(first, last, tile) {
  return Object.entries(last?.sets ?? {}).map(([name, one]) => {
    const before = first?.sets?.[name]?.accuracy_sampled;
    const chances = Object.entries(one.pass_at_k ?? {}).filter(([k]) => k !== "1").map(([k, chance]) => `pass@${k} ${fixed(chance)}`);
    const more = first === last || before == null ? `n ${one.n}` : `${fixed(before)} before, n ${one.n}`;
    return tile(`${name}, sampled`, fixed(one.accuracy_sampled), [more, ...chances].join(", "));
  });
}

/** [name, number] of all that a value holds, such as sets.gsm8k.accuracy_greedy. */
function leaves(name, value) {
  if (!value || typeof value !== "object") return [[name, value]];
  return Object.entries(value).flatMap(([part, inner]) => leaves(`${name}.${part}`, inner));
}

/** Metric → [[run, points, isEvaluation], ...]. */
function metricsIn(found) {
  const metrics = new Map();
  const add = (name, run, className, isEvaluation, point) => {
    const lines = metrics.get(name) ?? metrics.set(name, new Map()).get(name);
    const key = `${run} ${isEvaluation}`;
    const line = lines.get(key) ?? lines.set(key, { run, className, dots: isEvaluation, points: [] }).get(key);
    line.points.push(point);
  };
  found.forEach(([run, lines], at) => {
    for (const line of lines) {
      const isEvaluation = line.kind === "evaluation";
      if (!isEvaluation && line.kind !== "iteration") continue;
      for (const [key, value] of Object.entries(line)) {
        if (LEFT_OUT.has(key)) continue;
        for (const [name, v] of leaves(key, value)) {
          if (v != null && typeof v !== "number" && typeof v !== "boolean") continue;
          add(isEvaluation ? `evaluation.${name}` : name, run, `s${at}`, isEvaluation, [line.iteration, v == null ? null : Number(v)]);
        }
      }
    }
  });
  return metrics;
}

function drawGrid(grid, found, { smooth, search }) {
  const metrics = metricsIn(found), several = found.length > 1;
  const accuracy = [...(metrics.get("accuracy_sampled")?.values() ?? []), ...(metrics.get("evaluation.accuracy_greedy")?.values() ?? [])];
  const together = accuracy.map((one) => ({ ...one, name: several ? one.run : one.dots ? "held out, greedy" : "training, sampled",
    className: several || !one.dots ? one.className : "s1" }));
  const isLate = (name) => name.startsWith("evaluation.");
  const others = [...metrics.keys()].filter((name) => !FIRST.includes(name)).sort((a, b) => isLate(a) - isLate(b));
  const names = [...FIRST, ...others];
  const wanted = names.filter((name) => (metrics.has(name) || (name === "accuracy" && together.length)) && name.includes(search.toLowerCase()));
  if (!wanted.length) {
    fill(grid, h("p", { class: "note" }, search ? "No metric has that name." : "No iteration is done yet."));
    return;
  }
  fill(grid, wanted.map((name) => {
    const series = name === "accuracy" ? together : [...metrics.get(name).values()].map((one) => ({ ...one, name: several ? one.run : "" }));
    const values = series[0].points.filter(([, y]) => y != null), last = values.at(-1)?.[1];
    const [unit, meaning] = meaningOf(name);
    const pick = several ? null : (at) => (location.hash = link(found[0][0], "iteration", Math.max(1, at)));
    return h("figure", {}, h("figcaption", { title: meaning }, h("b", {}, name.replaceAll("_", " ")), h("span", { class: "note" }, unit),
        several ? null : h("span", { class: "last" }, legend(series), number(last))),
      lineChart({ series, smooth, pick }));
  }));
}

/** Unit and meaning of a metric, of another evaluation set, or of a part of it. */
function meaningOf(name) {
  const plain = name.replace("evaluation.", "").replace(/^sets\.[^.]+\./, "");
  return MEANINGS[plain] ?? MEANINGS[plain.split(".")[0]] ?? ["", ""];
}

function legend(series) {
  const named = series.filter((one) => one.name);
  return named.length < 2 ? null : named.map((one) => h("span", { class: "note" }, h("i", { class: `key ${one.className}` }), one.name));
}
