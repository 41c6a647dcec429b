// Where the pages get their data: from the server, or from the scripts of a bundle.

const KEPT = 60; // Answers about finished iterations, which never change.
const cache = new Map();

/** An answer that says why there is no data. */
export class NoData extends Error {}

export const isBundle = () => "KIMI_BUNDLE" in globalThis;

/** The data at a path such as ["think", "iterations", 12]. */
export async function get(path, query = "") {
  const key = JSON.stringify(path);
  if (cache.has(key)) return cache.get(key);
  const answer = isBundle() ? await fromBundle(path) : await fromServer(path, query);
  const isFixed = isBundle() || (path[1] === "iterations" && path.length > 2);
  if (isFixed) {
    cache.set(key, answer);
    if (cache.size > KEPT) cache.delete(cache.keys().next().value);
  }
  return answer;
}

async function fromServer(path, query) {
  const address = ["data", "runs", ...path].map(encodeURIComponent).join("/");
  let response;
  try {
    response = await fetch(address.replaceAll("%2F", "/") + query);
  } catch {
    throw new NoData("The server does not answer. Is `kimi dashboard` still running?");
  }
  const answer = await response.json();
  if (!response.ok) throw new NoData(answer.error);
  return answer;
}

/** Where an image of a prompt is, by its SHA-256. */
export function imageAddress(run, digest) {
  if (isBundle()) return `data/${globalThis.KIMI_BUNDLE.runs.indexOf(run)}/images/${digest}.png`;
  return `data/runs/${encodeURIComponent(run).replaceAll("%2F", "/")}/images/${digest}.png`;
}

const waiting = new Map();

// A page from a file may not fetch, so each answer of a bundle is a script that calls this.
globalThis.kimiData = (key, value) => waiting.get(key)?.(value);

function fromBundle([run, ...rest]) {
  const { runs } = globalThis.KIMI_BUNDLE;
  const key = run === undefined ? "runs" : [runs.indexOf(run), ...rest].join("/");
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    const end = () => (waiting.delete(key), script.remove());
    waiting.set(key, (value) => (end(), resolve(value)));
    script.onerror = () => (end(), reject(new NoData("This bundle does not hold that page.")));
    script.src = `data/${key}.js`;
    document.head.append(script);
  });
}

const followed = new Map();

/** All lines of a run's metrics.jsonl so far; only new ones are fetched. */
export async function metricsOf(run) {
  const known = followed.get(run) ?? { epoch: -1, lines: [] };
  const after = known.lines.length;
  const answer = await get([run, "metrics"], `?epoch=${known.epoch}&after=${after}`);
  const lines = [...known.lines.slice(0, answer.start), ...answer.lines];
  const found = { epoch: answer.epoch, lines, broken: answer.broken_lines };
  if (!isBundle()) followed.set(run, found);
  return found;
}
