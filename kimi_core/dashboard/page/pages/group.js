// The k responses to one prompt next to each other, the reference on top.

import { h, oneLine, textBlock } from "../dom.js";
import { get, imageAddress } from "../data.js";
import { fixed, link, number, signed } from "../format.js";
import { pager } from "./iteration.js";

const SMALL = 64; // Pixels of a side up to which an image is enlarged.

export async function groupPage({ run, number: iteration, one: id }) {
  const found = await get([run, "iterations", iteration, "groups", id]);
  const responses = [...found.responses].sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity));
  const [before, after] = found.neighbours;
  const step = (by) => {
    const next = by < 0 ? before : after;
    if (next != null) location.hash = link(run, "iteration", iteration, "group", next);
  };
  const most = Math.max(...responses.map((one) => Math.abs(one.advantage ?? 0)), 1e-9);
  const node = h("section", {},
    h("div", { class: "title" }, h("h1", {}, `Group ${id}`), pager(step, before != null, after != null),
      h("span", { class: "note" }, `${responses.length} responses to prompt ${responses[0]?.prompt_id}, trained in iteration ${iteration}`)),
    h("div", { class: "reference" },
      h("div", {}, h("h2", {}, "prompt"), pictures(run, responses[0]?.images), textBlock(responses[0]?.prompt ?? "")),
      h("div", {}, h("h2", {}, "reference answer"), textBlock(responses[0]?.answer ?? ""))),
    h("div", { class: "cards" }, responses.map((response) => card(run, iteration, response, most))));
  return {
    node,
    crumbs: [{ text: `iteration ${iteration}`, href: link(run, "iteration", iteration) }, { text: `group ${id}` }],
    keys: { "[": () => step(-1), "]": () => step(1), u: () => (location.hash = link(run, "iteration", iteration)) },
  };
}

/** The images of a prompt, in the order of their places in it. */
export function pictures(run, digests) {
  if (!digests?.length) return null;
  return h("div", { class: "pictures" }, digests.map((digest, at) => h("img", {
    src: imageAddress(run, digest), alt: `image ${at + 1}`, title: `image ${at + 1}, SHA-256 ${digest}`,
    load: ({ target }) => target.classList.toggle("small", target.naturalHeight <= SMALL),
    error: ({ target }) => target.replaceWith(h("span", { class: "note" }, `image ${at + 1} was not kept`)),
  })));
}

function card(run, iteration, response, most) {
  const address = link(run, "iteration", iteration, "response", response.trajectory_id);
  const open = () => (location.hash = address);
  const tokens = response.versions.reduce((sum, [, count]) => sum + count, 0);
  const left = response.response_characters - response.response.length;
  return h("article", { class: `card ${verdict(response)}`, "data-row": true, tabindex: 0, keydown: (event) => event.key === "Enter" && open() },
    h("header", {},
      h("b", { class: "reward" }, response.reward == null ? "no verdict" : fixed(response.reward)),
      h("span", { class: "note" }, `${number(tokens)} tokens · ${response.end_reason ?? "open"}`),
      h("a", { href: address }, "tokens")),
    split(response),
    advantage(response.advantage, most),
    textBlock(response.response),
    left > 0 ? h("a", { href: address }, `${left.toLocaleString("en")} more characters`) : null,
    response.note ? h("p", { class: "note", title: "what the reward function says" }, oneLine(response.note, 300)) : null);
}

/** good, bad or unjudged: how a response is marked. */
export function verdict({ correctness }) {
  return correctness == null ? "unjudged" : correctness >= 0.5 ? "good" : "bad";
}

/** The reward as the sum that it is. */
export function split({ correctness, length_reward, penalty, reward, reward_parts }) {
  if (reward == null) return h("div", { class: "split" }, h("span", {}, "neither trained nor counted as wrong"));
  const parts = [["correct", fixed(correctness, 2)]];
  if (length_reward) parts.push(["length", signed(length_reward, 2)]);
  if (penalty) parts.push(["repeat", signed(-penalty, 2)]);
  const inside = Object.entries(reward_parts ?? {}).map(([name, value]) => [name, number(value, 3)]);
  return h("div", { class: "split" }, parts.map(([name, value]) => h("span", {}, name, " ", h("b", {}, value))),
    inside.map(([name, value]) => h("span", { class: "inside", title: "part of the correctness" }, oneLine(name, 40), " ", h("b", {}, value))));
}

function advantage(value, most) {
  if (value == null) return null;
  const bar = h("meter", { min: 0, max: most, value: Math.abs(value), class: value < 0 ? "negative" : "positive" });
  return h("div", { class: "advantage" }, h("span", {}, "advantage"), bar, h("b", {}, signed(value)));
}
