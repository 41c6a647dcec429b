// One iteration: its rewards, groups and ages. A click on a bar of rewards keeps the groups with it.

import { h, svg, fill, oneLine } from "../dom.js";
import { NoData, get, metricsOf } from "../data.js";
import { bars } from "../chart.js";
import { fixed, link, mean, number, percent, signed, spread } from "../format.js";

const BINS = 20;
const ROWS = 200;

const ORDERS = {
  spread: ["spread of rewards", (a, b) => b.spread - a.spread],
  hard: ["hardest first", (a, b) => a.reward - b.reward],
  easy: ["easiest first", (a, b) => b.reward - a.reward],
  length: ["longest first", (a, b) => b.tokens - a.tokens],
  age: ["oldest first", (a, b) => b.age - a.age],
  group: ["by group", (a, b) => a.id - b.id],
};

export async function iterationPage({ run, number: asked, query }) {
  const all = await get([run, "iterations"]);
  if (!all.length) throw new NoData("No responses are written yet: a run writes those of an iteration when the iteration ends, unless trajectories.every is 0.");
  const now = asked ?? all.at(-1), at = all.indexOf(now);
  const [found, { lines }] = await Promise.all([get([run, "iterations", now]), metricsOf(run)]);
  const metrics = lines.find((line) => line.kind === "iteration" && line.iteration === now);
  const groups = groupsOf(found);
  const state = { bins: [], order: query.get("by") ?? "spread", search: "", teaching: false };
  const table = h("div", {}), histogram = h("div", {});
  const draw = () => {
    fill(histogram, rewards(found.columns.reward, state, draw));
    fill(table, groupTable(run, now, groups, state));
  };
  draw();
  const step = (by) => all[at + by] && (location.hash = link(run, "iteration", all[at + by]));
  const node = h("section", {},
    h("div", { class: "title" }, h("h1", {}, `Iteration ${now}`), pager(step, at > 0, at + 1 < all.length),
      jump(all, now, run), h("span", { class: "note" }, summary(found, metrics))),
    h("div", { class: "panels" },
      panel("rewards", "of every response; a click keeps the groups with such a response", histogram),
      panel("ages of the tokens", "versions between sampling and training", ages(found.ages)),
      panel("this iteration", "", facts(found, groups, metrics))),
    filters(state, draw), table);
  return {
    node, crumbs: [{ text: `iteration ${now}` }],
    keys: { "[": () => step(-1), "]": () => step(1), u: () => (location.hash = link(run)) },
  };
}

export function pager(step, hasBefore, hasAfter) {
  return h("span", { class: "pager" },
    h("button", { disabled: !hasBefore, click: () => step(-1), "aria-label": "previous", title: "previous ([)" }, "‹"),
    h("button", { disabled: !hasAfter, click: () => step(1), "aria-label": "next", title: "next (])" }, "›"));
}

function panel(name, note, ...content) {
  return h("figure", {}, h("figcaption", {}, h("b", {}, name), h("span", { class: "note" }, note)), content);
}

function jump(all, now, run) {
  const choice = h("select", { "aria-label": "iteration", change: (event) => (location.hash = link(run, "iteration", event.target.value)) },
    all.map((one) => h("option", { value: one, selected: one === now }, `${one}`)));
  choice.value = String(now);
  return choice;
}

function groupsOf({ columns, prompts }) {
  const groups = new Map();
  columns.group_id.forEach((id, at) => {
    const group = groups.get(id) ?? groups.set(id, { id, rows: [] }).get(id);
    group.rows.push(at);
  });
  return [...groups.values()].map(({ id, rows }) => {
    const judged = rows.filter((at) => columns.reward[at] != null);
    const of = (name) => judged.map((at) => columns[name][at]);
    return {
      id, k: rows.length, rewards: of("reward"), reward: mean(of("reward")) ?? -Infinity, spread: spread(of("reward")) ?? 0,
      right: mean(of("correctness")), tokens: mean(rows.map((at) => columns.tokens[at])),
      age: Math.max(...rows.map((at) => columns.age[at])), teaches: of("advantage").some((one) => one !== 0),
      unjudged: rows.length - judged.length, promptId: prompts[id]?.[0], prompt: prompts[id]?.[1] ?? "",
    };
  });
}

function summary({ columns, broken }, metrics) {
  const parts = [`${number(columns.reward.length)} responses`, `${number(columns.tokens.reduce((a, b) => a + b, 0))} tokens`];
  if (metrics) parts.push(`version ${metrics.policy_version} sampled`);
  if (broken) parts.push(`${broken} damaged lines left out`);
  return parts.join(" · ");
}

function binsOf(values) {
  const there = values.filter((value) => value != null);
  let low = Infinity, high = -Infinity;
  for (const value of there) (low = Math.min(low, value)), (high = Math.max(high, value));
  if (!there.length) return { low: 0, width: 1, counts: [] };
  const width = (high - low || 1) / BINS;
  const counts = Array(BINS).fill(0);
  for (const value of there) counts[Math.min(BINS - 1, Math.floor((value - low) / width))]++;
  return { low, width, counts };
}

function rewards(values, state, draw) {
  const { low, width, counts } = binsOf(values);
  if (!counts.length) return h("p", { class: "note" }, "no response has a verdict");
  state.range = (at) => [low + at * width, at === BINS - 1 ? Infinity : low + (at + 1) * width];
  const edge = (at) => fixed(low + at * width, 2);
  return bars({
    counts, chosen: state.bins,
    labels: counts.map((_, at) => (at % 5 === 0 ? edge(at) : at === BINS - 1 ? edge(BINS) : "")),
    titles: counts.map((count, at) => `${count} responses with a reward of ${edge(at)} to ${edge(at + 1)}`),
    pick: (at) => {
      state.bins = state.bins.includes(at) ? state.bins.filter((one) => one !== at) : [...state.bins, at];
      draw();
    },
  });
}

function ages(found) {
  const most = found.reduce((sum, [, tokens]) => sum + tokens, 0);
  return bars({
    counts: found.map(([, tokens]) => tokens), labels: found.map(([age]) => String(age)),
    titles: found.map(([age, tokens]) => `age ${age}: ${number(tokens)} tokens, ${percent(tokens / most)}`),
    className: (at) => `v${Math.min(found[at][0], 7)}`,
  });
}

function facts({ columns }, groups, metrics) {
  const judged = columns.advantage.filter((one) => one != null);
  const lines = [
    ["without advantage", percent(judged.length ? judged.filter((one) => one === 0).length / judged.length : null)],
    ["groups that teach", `${groups.filter((one) => one.teaches).length} of ${groups.length}`],
    ["right", percent(mean(columns.correctness.filter((one) => one != null)))],
    ["mean reward", fixed(mean(columns.reward.filter((one) => one != null)))],
    ["mean length", number(mean(columns.tokens), 3)],
    ["ended by", [...new Set(columns.end_reason)].map((why) => `${why} ${columns.end_reason.filter((one) => one === why).length}`).join(", ")],
    ["without verdict", number(columns.reward.length - judged.length)],
  ];
  if (metrics) lines.push(["mismatch, mean", number(metrics.logprob_gap_mean, 2)], ["entropy", number(metrics.entropy, 3)]);
  return h("dl", { class: "facts" }, lines.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

function filters(state, draw) {
  return h("div", { class: "controls" },
    h("input", { type: "search", placeholder: "search prompts", "aria-label": "search prompts", input: (event) => { state.search = event.target.value; draw(); } }),
    h("label", {}, "order ", h("select", { change: (event) => { state.order = event.target.value; draw(); } },
      Object.entries(ORDERS).map(([key, [name]]) => h("option", { value: key, selected: key === state.order }, name)))),
    h("label", {}, h("input", { type: "checkbox", change: (event) => { state.teaching = event.target.checked; draw(); } }), " with an advantage only"));
}

function groupTable(run, now, groups, state) {
  const inRange = (group) => !state.bins.length || group.rewards.some((reward) => state.bins.some((bin) => {
    const [low, high] = state.range(bin);
    return reward >= low && reward < high;
  }));
  const wanted = groups.filter((group) => inRange(group) && (!state.teaching || group.teaches) &&
    group.prompt.toLowerCase().includes(state.search.toLowerCase())).sort((ORDERS[state.order] ?? ORDERS.spread)[1]);
  const [low, high] = extent(groups.flatMap((group) => group.rewards));
  const body = h("tbody", {});
  const grow = (from) => {
    body.append(...wanted.slice(from, from + ROWS).map((group) => row(run, now, group, low, high)));
    if (from + ROWS < wanted.length) {
      const more = h("tr", {}, h("td", { colspan: 9 }, h("button", { click: () => (more.remove(), grow(from + ROWS)) }, `${wanted.length - from - ROWS} more groups`)));
      body.append(more);
    }
  };
  grow(0);
  if (!wanted.length) return h("p", { class: "note" }, "No group is like that.");
  return h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "group"), h("th", {}, "prompt"), h("th", { class: "n" }, "k"),
    h("th", {}, "rewards"), h("th", { class: "n" }, "mean"), h("th", { class: "n" }, "spread"), h("th", { class: "n" }, "right"),
    h("th", { class: "n" }, "tokens"), h("th", { class: "n" }, "age"))), body);
}

function row(run, now, group, low, high) {
  const open = () => (location.hash = link(run, "iteration", now, "group", group.id));
  return h("tr", { class: `opens ${group.teaches ? "" : "faint"}`, "data-row": true, tabindex: 0, click: open, keydown: (event) => event.key === "Enter" && open() },
    h("td", {}, h("a", { href: link(run, "iteration", now, "group", group.id) }, String(group.id))),
    h("td", { class: "prompt" }, oneLine(group.prompt, 90)),
    h("td", { class: "n" }, String(group.k)),
    h("td", {}, dots(group.rewards, low, high)),
    h("td", { class: "n" }, group.rewards.length ? fixed(group.reward) : "–"),
    h("td", { class: "n" }, fixed(group.spread)),
    h("td", { class: "n" }, percent(group.right), group.unjudged ? h("span", { class: "bad" }, ` ${group.unjudged}?`) : null),
    h("td", { class: "n" }, number(group.tokens, 3)),
    h("td", { class: "n" }, String(group.age)));
}

/** The rewards of a group as dots on a common axis; the area of a dot is how many have it. */
function dots(values, low, high) {
  const counted = new Map();
  for (const value of values) counted.set(value, (counted.get(value) ?? 0) + 1);
  const x = (value) => 8 + ((value - low) / (high - low || 1)) * 104;
  return svg("svg", { class: "dots", width: 120, height: 16 },
    svg("line", { class: "grid", x1: 5, x2: 115, y1: 8, y2: 8 }),
    [...counted].map(([value, count]) => svg("circle", { cx: x(value), cy: 8, r: 1.7 + 1.5 * Math.sqrt(count) },
      svg("title", {}, `${count} with ${number(value, 3)}`))));
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) (low = Math.min(low, value)), (high = Math.max(high, value));
  return [low, high];
}
