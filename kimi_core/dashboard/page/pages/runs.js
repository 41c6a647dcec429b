// All runs: state, progress, accuracy before and after; up to four are compared.

import { h, fill } from "../dom.js";
import { get } from "../data.js";
import { sparkline } from "../chart.js";
import { ago, duration, fixed, link, number, signed } from "../format.js";

const MOST = 4;

export async function runsPage() {
  const chosen = new Set();
  const node = h("section", {});
  const update = async (isCurrent = () => true) => {
    const found = await get([]);
    if (isCurrent() && !node.contains(document.activeElement?.closest?.("tr, input"))) draw(node, found, chosen);
  };
  await update();
  return { node, refresh: update };
}

function draw(node, { folder, runs }, chosen) {
  if (!runs.length) {
    fill(node, h("div", { class: "empty" }, h("h1", {}, "No runs yet"),
      h("p", {}, "There is no run in ", h("code", {}, folder), ". Start one with ", h("code", {}, "kimi train"),
        "; it shows up here.")));
    return;
  }
  const compare = h("a", { class: "button", hidden: true }, "compare");
  const tell = () => {
    compare.hidden = chosen.size < 2;
    compare.textContent = `compare ${chosen.size}`;
    compare.href = "#/compare/" + [...chosen].map(encodeURIComponent).join("/");
  };
  const running = runs.filter((run) => run.state === "running").length;
  fill(node,
    h("div", { class: "title" }, h("h1", {}, "Runs"),
      h("span", { class: "note" }, `${runs.length} in ${folder}, ${running} running`), compare),
    h("table", {},
      h("thead", {}, h("tr", {}, h("th", { title: `Choose up to ${MOST}` }), h("th", {}, "run"), h("th", {}, "state"),
        h("th", {}, "iteration"), h("th", { class: "n" }, "left"), h("th", {}, "accuracy, as sampled"),
        h("th", { class: "n", title: "Held-out prompts, the most likely token each time" }, "before"),
        h("th", { class: "n" }, "after"), h("th", { class: "n" }, "change"), h("th", { class: "n" }, "length"),
        h("th", { class: "n" }, "trained"), h("th", { class: "n" }, "time"), h("th", { class: "n" }, "last written"))),
      h("tbody", {}, runs.map((run) => row(run, chosen, tell)))));
  tell();
}

function row(run, chosen, tell) {
  const box = h("input", { type: "checkbox", "aria-label": `compare ${run.name}`, click: (event) => {
    event.stopPropagation();
    if (event.target.checked && chosen.size >= MOST) event.target.checked = false;
    chosen[event.target.checked ? "add" : "delete"](run.name);
    tell();
  } });
  box.checked = chosen.has(run.name);
  const [before, after] = [run.before, run.after];
  const change = before && after ? after.accuracy_greedy - before.accuracy_greedy : null;
  const open = () => (location.hash = link(run.name));
  return h("tr", { class: "opens", "data-row": true, tabindex: 0, click: open,
    keydown: (event) => event.key === "Enter" && open() },
  h("td", {}, box),
  h("td", {}, h("a", { href: link(run.name) }, run.name),
    h("div", { class: "note" }, [run.model, run.task].filter(Boolean).join(" · ")), problems(run)),
  h("td", {}, h("span", { class: `state ${run.state}` }, run.state)),
  h("td", {}, progress(run)),
  h("td", { class: "n" }, run.state === "running" ? duration(run.eta_s) : ""),
  h("td", {}, sparkline(run.curve, { end: run.iterations ?? run.iteration, title: "accuracy of the responses trained, by iteration" })),
  h("td", { class: "n" }, fixed(before?.accuracy_greedy)),
  h("td", { class: "n" }, fixed(after?.accuracy_greedy)),
  h("td", { class: `n ${change > 0 ? "good" : change < 0 ? "bad" : ""}` }, signed(change)),
  h("td", { class: "n" }, before ? `${number(before.length_mean, 3)}${after ? " → " + number(after.length_mean, 3) : ""}` : "–"),
  h("td", { class: "n" }, number(run.samples_trained)),
  h("td", { class: "n" }, duration(run.wall_s || null)),
  h("td", { class: "n note" }, ago(run.updated)));
}

function progress(run) {
  if (!run.iterations) return number(run.iteration);
  const bar = h("progress", { max: run.iterations, value: run.iteration });
  const text = !run.iteration && run.state === "running" ? "starting" : `${run.iteration} / ${run.iterations}`;
  return h("span", { class: "progress" }, bar, text);
}

function problems(run) {
  const found = [];
  if (run.error) found.push(run.error);
  if (run.broken_lines) found.push(`${run.broken_lines} damaged lines in metrics.jsonl`);
  return found.map((text) => h("div", { class: "bad" }, text));
}
