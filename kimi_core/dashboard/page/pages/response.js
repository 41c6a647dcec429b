// One response, token by token, from an iteration's file or from the buffer of the running run.

import { h, fill, shown, textBlock } from "../dom.js";
import { get } from "../data.js";
import { strip } from "../chart.js";
import { MODES, gaps, versionsOf } from "../colours.js";
import { fixed, link, number, signed } from "../format.js";
import { pager } from "./iteration.js";
import { pictures, split, verdict } from "./group.js";

const PART = 4000; // Tokens that are drawn at once; more come when they are scrolled to.

export async function responsePage({ run, number: iteration, one: id, query, inBuffer = false }) {
  const record = await get(inBuffer ? [run, "buffer", id] : [run, "iterations", iteration, "responses", id]);
  const address = inBuffer ? link(run, "buffer", id) : link(run, "iteration", iteration, "response", id);
  const view = tokenView(record, query.get("colour") ?? "logprob", (mode) =>
    history.replaceState(null, "", `${address}?colour=${mode}`));
  const [before, after] = record.neighbours ?? [null, null];
  const step = (by) => {
    const next = by < 0 ? before : after;
    if (next != null) location.hash = link(run, "iteration", iteration, "response", next) + `?colour=${view.mode()}`;
  };
  const up = inBuffer ? link(run, "buffer") : link(run, "iteration", iteration, "group", record.group_id);
  const node = h("section", {},
    h("div", { class: "title" }, h("h1", {}, `Response ${id}`), inBuffer ? null : pager(step, before != null, after != null),
      h("span", { class: "note" }, about(record, iteration, inBuffer))),
    h("div", { class: "reader" },
      h("div", {},
        h("h2", {}, "prompt"), pictures(run, record.images), textBlock(record.prompt ?? "The run has no tokenizer.json, so the buffer's tokens have no text."),
        h("h2", {}, "response"), view.controls, view.node),
      h("aside", {}, side(record, inBuffer))));
  const crumbs = inBuffer ? [{ text: "buffer", href: up }]
    : [{ text: `iteration ${iteration}`, href: link(run, "iteration", iteration) }, { text: `group ${record.group_id}`, href: up }];
  const modes = Object.keys(MODES);
  return {
    node, crumbs: [...crumbs, { text: `response ${id}` }],
    keys: { "[": () => step(-1), "]": () => step(1), u: () => (location.hash = up),
      ArrowLeft: () => view.move(-1), ArrowRight: () => view.move(1), Escape: () => view.move(0),
      ...Object.fromEntries(modes.map((mode, at) => [String(at + 1), () => view.colour(mode)])) },
  };
}

function about(record, iteration, inBuffer) {
  const tokens = record.versions.reduce((sum, [, count]) => sum + count, 0);
  return `to prompt ${record.prompt_id}, group ${record.group_id} · ${number(tokens)} tokens · ended by ${record.end_reason ?? "nothing yet"} · ` +
    (inBuffer ? "in the buffer now" : `trained in iteration ${iteration}`);
}

function side(record, inBuffer) {
  const total = record.versions.reduce((sum, [, count]) => sum + count, 0);
  const differences = gaps(record).filter((gap) => gap != null).map(Math.abs);
  const logprobs = record.engine_logprobs ?? [];
  const facts = [
    ["mean log-prob", logprobs.length ? fixed(logprobs.reduce((a, b) => a + b, 0) / logprobs.length) : "not recorded"],
    ["mismatch, mean", differences.length ? number(differences.reduce((a, b) => a + b, 0) / differences.length, 2) : "–"],
    ["mismatch, most", differences.length ? number(differences.reduce((a, b) => Math.max(a, b), 0), 2) : "–"],
  ];
  const list = (lines) => h("dl", { class: "facts" }, lines.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  const judged = inBuffer ? [] : [
    h("h2", {}, "verdict"),
    h("p", { class: `verdict ${verdict(record)}` }, h("b", {}, record.reward == null ? "no verdict" : fixed(record.reward)),
      record.advantage == null ? "" : ` advantage ${signed(record.advantage)}`),
    split(record),
    record.note ? [h("h2", {}, "what the reward function says"), textBlock(record.note, { class: "note" })] : null,
    h("h2", {}, "reference answer"), textBlock(record.answer ?? "")];
  return [judged,
    h("h2", {}, "who sampled it"),
    strip(record.versions.map(([version, count]) => [count, `v${version % 8}`, `version ${version}: ${count} tokens`])),
    list(record.versions.slice(-12).map(([version, count]) => [`version ${version}`, `${number(count)} of ${number(total)} tokens`])),
    h("h2", {}, "log-probs"), list(facts)];
}

/** The tokens with their colours, and the numbers of the one that is pointed at. */
function tokenView(record, first, changed) {
  const texts = record.token_texts ?? record.token_ids?.map((id) => `${id} `);
  if (!texts?.length) {
    const why = "Tokens are not recorded in this run: trajectories.tokens is false.";
    return { node: textBlock(record.response ?? ""), controls: h("p", { class: "note" }, why), mode: () => first, colour: () => {}, move: () => {} };
  }
  let mode = MODES[first] ? first : "logprob", spans = [], selected = -1;
  const box = h("pre", { class: "text tokens" }), tip = h("div", { class: "tip", hidden: true }), controls = h("div", { class: "controls" });
  const grow = (from) => {
    const end = Math.min(texts.length, from + PART), classes = MODES[mode].classes(record);
    const part = document.createDocumentFragment();
    for (let at = from; at < end; at++) {
      const span = h("span", { class: `t ${classes[at] ?? ""}`, "data-at": at }, tokenText(texts[at]));
      spans.push(span);
      part.append(span);
    }
    box.append(part);
    if (end === texts.length) return;
    const more = h("button", { class: "more", click: () => (watch.disconnect(), more.remove(), grow(end)) }, `${number(texts.length - end)} more tokens`);
    const watch = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && more.click());
    box.append(more);
    watch.observe(more);
  };
  const colour = (name) => {
    mode = name;
    const classes = MODES[mode].classes(record);
    spans.forEach((span, at) => (span.className = `t ${classes[at] ?? ""}`));
    fill(controls, chooser(record, mode, (next) => (colour(next), changed(next))));
  };
  const point = (at) => {
    spans[selected]?.classList.remove("selected");
    selected = at;
    tip.hidden = !spans[at];
    if (!spans[at]) return;
    spans[at].classList.add("selected");
    fill(tip, numbersOf(record, at, texts[at]));
    const place = spans[at].getClientRects()[0] ?? spans[at].getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 12))}px`;
    tip.style.top = place.bottom + tip.offsetHeight + 12 > innerHeight ? `${place.top - tip.offsetHeight - 6}px` : `${place.bottom + 6}px`;
  };
  box.addEventListener("mouseover", (event) => event.target.closest("[data-at]") && point(Number(event.target.closest("[data-at]").dataset.at)));
  box.addEventListener("mouseleave", () => point(-1));
  grow(0);
  colour(mode);
  const move = (by) => {
    if (!by) return point(-1);
    point(Math.max(0, Math.min(spans.length - 1, selected + by)));
    spans[selected].scrollIntoView({ block: "nearest" });
  };
  return { node: h("div", {}, box, tip), controls, mode: () => mode, colour: (name) => (colour(name), changed(name)), move };
}

/** Line feeds get a sign, and a token without text is shown as a thin mark. */
function tokenText(text) {
  if (text === "") return h("span", { class: "escape" }, "·");
  if (!text.includes("\n")) return shown(text);
  return text.split("\n").flatMap((part, at) => (at ? [h("span", { class: "escape" }, "⏎"), "\n", ...shown(part)] : shown(part)));
}

function chooser(record, mode, choose) {
  const { legend, title } = MODES[mode];
  return [
    h("div", { class: "modes", role: "radiogroup", "aria-label": "colour of the tokens" }, Object.entries(MODES).map(([key, one], at) =>
      h("button", { role: "radio", "aria-checked": String(key === mode), class: key === mode ? "here" : "", title: `${one.title} (${at + 1})`, click: () => choose(key) }, one.name))),
    h("span", { class: "legend", title }, legend(record).map(([name, text]) => h("span", {}, h("i", { class: `t ${name}` }), text)))];
}

function numbersOf(record, at, text) {
  const engine = record.engine_logprobs?.[at], trainer = record.trainer_logprobs?.[at];
  const lines = [
    ["token", `${at + 1} of ${record.token_ids.length}, id ${record.token_ids[at]}`],
    ["engine", engine == null ? "–" : `${engine.toFixed(4)} nats, p ${number(Math.exp(engine), 3)}`],
    ["trainer", trainer == null ? "not counted" : `${trainer.toFixed(4)} nats`],
    ["difference", trainer == null ? "–" : number(trainer - engine, 3)],
    ["version", String(versionsOf(record)[at])],
  ];
  return [h("code", {}, shown(JSON.stringify(text))), h("dl", { class: "facts" }, lines.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))];
}
