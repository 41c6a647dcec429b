// Builds elements. Text becomes text nodes; nothing here parses markup, so a response that holds
// HTML is shown and never run.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props` are attributes; functions in it listen to the event of that name. */
export function h(tag, props, ...children) {
  return filled(document.createElement(tag), props, children);
}

/** An SVG element, as `h`. */
export function svg(tag, props, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "value") element.value = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child != null && child !== false) element.append(child);
  }
}

/** Replace what an element holds. */
export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

// Control, format, unassigned and private characters, and line separators: none of them shows, and
// some reorder or hide what stands around them. Line feed and tab do no harm.
const HIDDEN = /(?![\n\t])[\p{C}\p{Zl}\p{Zp}]/gu;

/** Nodes that show a text of a model; what does not show becomes an escape such as \u202e. */
export function shown(text) {
  const nodes = [];
  let start = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > start) nodes.push(text.slice(start, found.index));
    nodes.push(h("span", { class: "escape" }, escaped(found[0].codePointAt(0))));
    start = found.index + found[0].length;
  }
  if (start < text.length) nodes.push(text.slice(start));
  return nodes;
}

/** The same as a string, for titles and lists. Line feeds become ⏎. */
export function oneLine(text, length = 160) {
  const cut = text.length > length ? text.slice(0, length) + "…" : text;
  return cut
    .replace(HIDDEN, (found) => escaped(found.codePointAt(0)))
    .replace(/\n/g, "⏎")
    .replace(/\t/g, " ");
}

function escaped(code) {
  if (code < 0x100) return "\\x" + code.toString(16).padStart(2, "0");
  return code < 0x10000 ? "\\u" + code.toString(16).padStart(4, "0") : "\\U" + code.toString(16).padStart(8, "0");
}

const PART = 200_000;

/** A block with a text of a model. Of a very long one, a part at a time. */
export function textBlock(text, props = {}) {
  const block = h("pre", { ...props, class: `text ${props.class ?? ""}` });
  const grow = (start) => {
    const end = Math.min(text.length, start + PART);
    block.append(...shown(text.slice(start, end)));
    if (end === text.length) return;
    const left = (text.length - end).toLocaleString("en");
    const more = h("button", { class: "more", click: () => (more.remove(), grow(end)) },
      `${left} more characters`);
    block.append(more);
  };
  grow(0);
  return block;
}
