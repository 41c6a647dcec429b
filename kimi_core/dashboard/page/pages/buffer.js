// What waits in the buffer now: how old it is, and which versions sampled it.

import { h, fill } from "../dom.js";
import { get } from "../data.js";
import { bars, strip } from "../chart.js";
import { bytes, link, number, percent } from "../format.js";

const ROWS = 300;

export async function bufferPage({ run }) {
  const node = h("section", {});
  let last = "";
  const update = async (isCurrent = () => true) => {
    const found = await get([run, "buffer"]), now = JSON.stringify(found);
    if (now === last || !isCurrent()) return;
    last = now;
    draw(node, run, found);
  };
  await update();
  return { node, refresh: update, crumbs: [{ text: "buffer" }], keys: { u: () => (location.hash = link(run)) } };
}

function draw(node, run, found) {
  const tile = (name, value, more) => h("div", { class: "tile" }, h("span", {}, name), h("b", {}, value), h("small", {}, more));
  const rows = [...found.rows].sort((a, b) => (a.end_reason != null) - (b.end_reason != null) || age(found, b) - age(found, a));
  fill(node,
    h("div", { class: "title" }, h("h1", {}, "Buffer now"), h("span", { class: "note" }, `version ${found.newest_version} is the newest that sampled here`)),
    h("div", { class: "tiles" },
      tile("wait to go on", number(found.unfinished), "responses that have not ended"),
      tile("ended", number(found.trajectories - found.unfinished), "kept until the next iteration begins"),
      tile("tokens", number(found.tokens), `in ${bytes(found.file_bytes)}`),
      tile("full", percent(1 - found.pages_free / found.pages), `${number(found.pages - found.pages_free)} of ${number(found.pages)} pages`)),
    h("div", { class: "panels two" },
      panel("age of all sampled tokens", found.ages), panel("age of those that wait", found.open_ages)),
    found.rows.length ? table(run, found, rows) : h("p", { class: "note" }, "The buffer is empty."));
}

function panel(name, ages) {
  const total = ages.reduce((sum, [, tokens]) => sum + tokens, 0);
  return h("figure", {}, h("figcaption", {}, h("b", {}, name), h("span", { class: "note" }, "versions behind the newest")),
    ages.length ? bars({
      counts: ages.map(([, tokens]) => tokens), labels: ages.map(([one]) => String(one)), height: 80,
      titles: ages.map(([one, tokens]) => `${one} versions behind: ${number(tokens)} tokens, ${percent(tokens / total)}`),
      className: (at) => `v${Math.min(ages[at][0], 7)}`,
    }) : h("p", { class: "note" }, "none"));
}

function age(found, row) {
  return row.segments.length ? found.newest_version - row.segments[0][0] : 0;
}

function table(run, found, rows) {
  const longest = Math.max(...rows.map((row) => row.length));
  const body = h("tbody", {});
  const grow = (from) => {
    body.append(...rows.slice(from, from + ROWS).map((row) => line(run, found, row, longest)));
    if (from + ROWS >= rows.length) return;
    const more = h("tr", {}, h("td", { colspan: 7 }, h("button", { click: () => (more.remove(), grow(from + ROWS)) }, `${number(rows.length - from - ROWS)} more`)));
    body.append(more);
  };
  grow(0);
  return h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "response"), h("th", { class: "n" }, "prompt"), h("th", { class: "n" }, "group"),
    h("th", {}, "state"), h("th", { class: "n" }, "tokens sampled"), h("th", { class: "n" }, "oldest"), h("th", { class: "wide" }, "versions that sampled it, oldest first"))), body);
}

function line(run, found, row, longest) {
  const sampled = row.segments.reduce((sum, [, count]) => sum + count, 0);
  const address = link(run, "buffer", row.trajectory_id), open = () => (location.hash = address);
  const parts = row.segments.map(([version, count]) => [count, `v${Math.min(found.newest_version - version, 7)}`, `version ${version}: ${count} tokens`]);
  return h("tr", { class: "opens", "data-row": true, tabindex: 0, click: open, keydown: (event) => event.key === "Enter" && open() },
    h("td", {}, h("a", { href: address }, String(row.trajectory_id))),
    h("td", { class: "n" }, String(row.prompt_id)), h("td", { class: "n" }, String(row.group_id)),
    h("td", {}, h("span", { class: `state ${row.end_reason ? "finished" : "running"}` }, row.end_reason ?? "waits")),
    h("td", { class: "n" }, number(sampled)), h("td", { class: "n" }, number(age(found, row))),
    h("td", { class: "wide" }, strip([...parts, [Math.max(0, longest - row.length), "nothing", ""]])));
}
