// Every prompt that was trained: its success over time, and how the curriculum weighs it.

import { h, fill, oneLine } from "../dom.js";
import { NoData, get } from "../data.js";
import { bars, sparkline } from "../chart.js";
import { fixed, link, number } from "../format.js";

const ROWS = 200;
const BINS = 10;

const COLUMNS = {
  prompt_id: "id", prompt: "prompt", times: "trained", curve: "success over time", first: "first", last: "last",
  success_rate: "rate", weight: "weight", difficulty: "difficulty",
};

export async function promptsPage({ run, query }) {
  const state = { by: query.get("by") ?? "weight", down: true, search: query.get("search") ?? "", chosen: { success_rate: [], weight: [] } };
  const node = h("section", {});
  let count = -1;
  const update = async (isCurrent = () => true) => {
    const { prompts, is_recorded: isRecorded } = await get([run, "prompts"]);
    if (!isRecorded) throw new NoData("This run has no prompts.jsonl: its first iteration has not ended, or an older version wrote it.");
    const total = prompts.reduce((sum, one) => sum + one.history.length, 0);
    if (total === count || !isCurrent()) return;
    count = total;
    draw(node, run, prompts.map(withTimes), state);
  };
  await update();
  return { node, refresh: update, crumbs: [{ text: "prompts" }], keys: { u: () => (location.hash = link(run)) } };
}

function withTimes(one) {
  return { ...one, times: one.history.length, first: one.history[0][1], last: one.history.at(-1)[1] };
}

function draw(node, run, prompts, state) {
  const table = h("div", {}), rates = h("div", {}), weights = h("div", {});
  const redraw = () => {
    fill(rates, histogram(prompts, "success_rate", state, redraw));
    fill(weights, histogram(prompts, "weight", state, redraw));
    fill(table, tableOf(run, prompts, state, redraw));
  };
  redraw();
  fill(node, h("div", { class: "title" }, h("h1", {}, "Prompts"), h("span", { class: "note" }, `${number(prompts.length)} were trained`)),
    h("div", { class: "panels two" },
      panel("success rates now", "the curriculum's estimate; a click keeps those prompts", rates),
      panel("weights now", "chance to be drawn next, not normalised", weights)),
    h("div", { class: "controls" }, h("input", { type: "search", placeholder: "search prompts", value: state.search, "aria-label": "search prompts",
      input: (event) => { state.search = event.target.value; redraw(); } })), table);
}

function panel(name, note, content) {
  return h("figure", {}, h("figcaption", {}, h("b", {}, name), h("span", { class: "note" }, note)), content);
}

const bin = (value) => Math.min(BINS - 1, Math.floor((value ?? 0) * BINS));

function histogram(prompts, name, state, redraw) {
  const counts = Array(BINS).fill(0);
  for (const one of prompts) counts[bin(one[name])]++;
  const chosen = state.chosen[name];
  return bars({
    counts, chosen, height: 80, labels: counts.map((_, at) => fixed(at / BINS, 1)),
    titles: counts.map((count, at) => `${count} prompts with ${fixed(at / BINS, 1)} to ${fixed((at + 1) / BINS, 1)}`),
    pick: (at) => {
      state.chosen[name] = chosen.includes(at) ? chosen.filter((one) => one !== at) : [...chosen, at];
      redraw();
    },
  });
}

function tableOf(run, prompts, state, redraw) {
  const isChosen = (one) => Object.entries(state.chosen).every(([name, bins]) => !bins.length || bins.includes(bin(one[name])));
  const wanted = prompts.filter((one) => isChosen(one) &&
    String(one.prompt).toLowerCase().includes(state.search.toLowerCase()));
  const key = (one) => (state.by === "curve" ? one.last - one.first : one[state.by]);
  wanted.sort((a, b) => (state.down ? -1 : 1) * (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
  const sort = (name) => () => {
    state.down = state.by === name ? !state.down : true;
    state.by = name;
    redraw();
  };
  const end = prompts.reduce((most, one) => Math.max(most, one.history.at(-1)[0]), 1);
  const body = h("tbody", {});
  const grow = (from) => {
    body.append(...wanted.slice(from, from + ROWS).map((one) => row(run, one, end)));
    if (from + ROWS >= wanted.length) return;
    const more = h("tr", {}, h("td", { colspan: 9 }, h("button", { click: () => (more.remove(), grow(from + ROWS)) }, `${number(wanted.length - from - ROWS)} more`)));
    body.append(more);
  };
  grow(0);
  if (!wanted.length) return h("p", { class: "note" }, "No prompt is like that.");
  return h("table", {}, h("thead", {}, h("tr", {}, Object.entries(COLUMNS).map(([name, title]) =>
    h("th", { class: ["prompt", "curve"].includes(name) ? "" : "n", "aria-sort": state.by === name ? (state.down ? "descending" : "ascending") : "none" },
      h("button", { class: "sort", click: sort(name) }, title, state.by === name ? (state.down ? " ↓" : " ↑") : ""))))), body);
}

function row(run, one, end) {
  const last = one.history.at(-1)[0], open = () => (location.hash = link(run, "iteration", last));
  return h("tr", { class: "opens", "data-row": true, tabindex: 0, title: `opens iteration ${last}, which trained it last`, click: open, keydown: (event) => event.key === "Enter" && open() },
    h("td", { class: "n" }, String(one.prompt_id)),
    h("td", { class: "prompt" }, oneLine(String(one.prompt), 70)),
    h("td", { class: "n" }, number(one.times)),
    h("td", {}, sparkline(one.history, { end, title: one.history.map(([at, right]) => `${at}: ${fixed(right, 2)}`).join(", ") })),
    h("td", { class: "n" }, fixed(one.first, 2)), h("td", { class: "n" }, fixed(one.last, 2)),
    h("td", { class: "n" }, fixed(one.success_rate, 2)), h("td", { class: "n" }, fixed(one.weight, 2)), h("td", { class: "n" }, fixed(one.difficulty, 2)));
}
