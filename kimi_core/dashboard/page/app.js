// The frame around every page: address → page, header, keyboard, theme, and following live runs.

import { h, fill } from "./dom.js";
import { NoData, isBundle } from "./data.js";
import { link } from "./format.js";
import { runsPage } from "./pages/runs.js";
import { curvesPage, comparePage } from "./pages/curves.js";
import { iterationPage } from "./pages/iteration.js";
import { groupPage } from "./pages/group.js";
import { responsePage } from "./pages/response.js";
import { bufferPage } from "./pages/buffer.js";
import { promptsPage } from "./pages/prompts.js";

const FOLLOW_MS = 2000;

const KEYS = [
  ["j k", "next, previous row"],
  ["Enter", "open the row"],
  ["[ ]", "previous, next iteration, group or response"],
  ["u", "up: response, group, iteration, run"],
  ["r c i b p", "runs, curves, iterations, buffer, prompts"],
  ["1 … 5", "what colours the tokens"],
  ["← →", "previous, next token"],
  ["/", "search"],
  ["d", "dark or light"],
  ["?", "this list"],
];

const header = h("header", {});
const main = h("main", { tabindex: -1 });
const help = h("dialog", { class: "help" },
  h("h2", {}, "Keys"),
  h("dl", {}, KEYS.map(([keys, what]) => [
    h("dt", {}, keys.split(" ").map((key) => h("kbd", {}, key))), h("dd", {}, what)])),
  h("form", { method: "dialog" }, h("button", {}, "Close")));

let page = { keys: {} };
let turn = 0;

/** The parts of an address: "#/run/a%2Fb/iteration/3?by=age" → { parts, query }. */
export function parsed(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").filter(Boolean).map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  return { parts, query: new URLSearchParams(query) };
}

function pageFor({ parts, query }) {
  const [kind, run, view = "curves", number, part, one] = parts;
  if (kind === "compare" && run) return comparePage({ runs: parts.slice(1), query });
  if (kind !== "run" || !run) return runsPage({ query });
  const at = { run, query, number: Number(number), one: Number(one) };
  if (view === "iteration" && part === "group") return groupPage(at);
  if (view === "iteration" && part === "response") return responsePage(at);
  if (view === "iteration") return iterationPage({ ...at, number: number ? at.number : null });
  if (view === "buffer" && number) return responsePage({ run, query, one: Number(number), inBuffer: true });
  if (view === "buffer") return bufferPage(at);
  if (view === "prompts") return promptsPage(at);
  return curvesPage(at);
}

async function show() {
  const mine = ++turn, address = parsed(location.hash);
  let next;
  try {
    next = await pageFor(address);
  } catch (error) {
    if (!(error instanceof NoData)) console.error(error);
    next = { node: problem(error), crumbs: [] };
  }
  if (mine !== turn) return; // Somebody went on meanwhile.
  page = { keys: {}, crumbs: [], ...next };
  fill(header, ...heading(address, page.crumbs));
  fill(main, page.node);
  document.title = ["kimi", ...address.parts.slice(1, 2), ...page.crumbs.map((c) => c.text)].join(" · ");
  main.querySelector("[autofocus]")?.focus();
  document.body.dataset.ready = location.hash || "#/";
}

function problem(error) {
  return h("section", { class: "empty" }, h("h1", {}, "Nothing to show"),
    h("p", {}, error.message || String(error)), h("p", {}, h("a", { href: "#/" }, "All runs")));
}

function heading({ parts }, crumbs) {
  const [kind, run, view = "curves"] = parts;
  const tabs = kind === "run" && run ? ["curves", "iteration", "buffer", "prompts"] : [];
  return [
    h("a", { class: "brand", href: "#/", title: "All runs (r)" }, "kimi"),
    h("nav", { class: "crumbs" },
      kind === "run" ? h("a", { href: link(run) }, run) : h("span", {}, kind === "compare" ? "compare" : "runs"),
      crumbs.map(({ text, href }) => [h("i", {}, "/"), href ? h("a", { href }, text) : h("span", {}, text)])),
    h("nav", { class: "tabs" }, tabs.map((name) => h("a", {
      href: link(run, name), class: name === view ? "here" : "", "aria-current": name === view ? "page" : null,
    }, name === "iteration" ? "iterations" : name))),
    h("div", { class: "tools" },
      isBundle() ? h("span", { class: "note" }, "static copy") : null,
      h("button", { click: toggleTheme, title: "Dark or light (d)", "aria-label": "Dark or light" }, "◐"),
      h("button", { click: () => help.showModal(), title: "Keys (?)", "aria-label": "Keys" }, "?")),
  ];
}

// ---- Theme: the system's, unless one was chosen. A page from a file may have no storage.

function storedTheme(value) {
  try {
    if (value) localStorage.setItem("theme", value);
    return localStorage.getItem("theme");
  } catch {
    return value ?? null;
  }
}

function toggleTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = document.documentElement.dataset.theme ?? system;
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  storedTheme(document.documentElement.dataset.theme);
}

// ---- Keyboard

function moveRow(step) {
  const rows = [...main.querySelectorAll("[data-row]")];
  if (!rows.length) return;
  const at = rows.indexOf(document.activeElement);
  const next = rows[Math.min(rows.length - 1, Math.max(0, at < 0 ? 0 : at + step))];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
}

function goTo(view) {
  const { parts } = parsed(location.hash);
  location.hash = view === "" || parts[0] !== "run" ? "#/" : link(parts[1], view);
}

const COMMON = {
  j: () => moveRow(1),
  k: () => moveRow(-1),
  r: () => goTo(""),
  c: () => goTo("curves"),
  i: () => goTo("iteration"),
  b: () => goTo("buffer"),
  p: () => goTo("prompts"),
  d: toggleTheme,
  "?": () => help.showModal(),
  "/": () => main.querySelector("input[type=search]")?.focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target.matches?.("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const action = page.keys[event.key] ?? COMMON[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

// ---- A live run is followed while somebody looks.

async function follow() {
  const mine = turn;
  try {
    if (document.visibilityState === "visible" && !isBundle()) await page.refresh?.(() => mine === turn);
  } catch (error) {
    if (!(error instanceof NoData)) console.error(error);
  }
  setTimeout(follow, FOLLOW_MS);
}

if (storedTheme()) document.documentElement.dataset.theme = storedTheme();
document.body.append(header, main, help);
addEventListener("hashchange", show);
show();
setTimeout(follow, FOLLOW_MS);
