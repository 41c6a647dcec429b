// How the tokens of a response are coloured. A mode gives each token a class, and says what it means.

import { number } from "./format.js";

const SURPRISE = [0.05, 0.2, 0.5, 1, 2, 3, 5];
const MISMATCH = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1];

/** Which step of `edges` a value is on: 0 below the first. */
function step(edges, value) {
  const at = edges.findIndex((edge) => value < edge);
  return at < 0 ? edges.length : at;
}

function legendOf(prefix, edges) {
  return [...edges.map((edge, at) => [`${prefix}${at}`, `< ${number(edge)}`]), [`${prefix}${edges.length}`, "more"]];
}

/** What differs between trainer and engine, per token; null where one of them is missing. */
export function gaps(record) {
  const { engine_logprobs: engine = [], trainer_logprobs: trainer = [] } = record;
  return engine.map((one, at) => (trainer[at] == null ? null : trainer[at] - one));
}

/** For each token, the policy version that sampled it. */
export function versionsOf(record) {
  return record.versions.flatMap(([version, count]) => Array(count).fill(version));
}

/** For each token, the number of its segment. */
function segmentsOf(record) {
  return record.versions.flatMap(([, count], at) => Array(count).fill(at));
}

export const MODES = {
  logprob: {
    name: "log-prob", title: "−log-prob when the engine sampled the token, nats: how surprising it was",
    classes: (record) => (record.engine_logprobs ?? []).map((value) => `q${step(SURPRISE, -value)}`),
    legend: () => legendOf("q", SURPRISE),
  },
  mismatch: {
    name: "mismatch", title: "|trainer − engine| log-prob of the token, nats; the second update's includes the first one's",
    classes: (record) => gaps(record).map((gap) => (gap == null ? "missing" : `m${step(MISMATCH, Math.abs(gap))}`)),
    legend: () => [...legendOf("m", MISMATCH), ["missing", "not counted"]],
  },
  entropy: {
    name: "entropy", title: "entropy of the trainer's distribution at the token, nats: how open the choice was",
    classes: (record) => (record.token_ids ?? []).map((_, at) => (record.entropies?.[at] == null ? "missing" : `q${step(SURPRISE, record.entropies[at])}`)),
    legend: () => [...legendOf("q", SURPRISE), ["missing", "not recorded"]],
  },
  version: {
    name: "version", title: "policy version that sampled the token",
    classes: (record) => versionsOf(record).map((version) => `v${version % 8}`),
    legend: (record) => [...new Set(record.versions.map(([version]) => version))].map((v) => [`v${v % 8}`, `version ${v}`]),
  },
  segment: {
    name: "segment", title: "stretch of the response that one iteration sampled",
    classes: (record) => segmentsOf(record).map((at) => (at % 2 ? "v1" : "v0")),
    legend: (record) => record.versions.map(([version, count], at) => [at % 2 ? "v1" : "v0", `${at + 1}: ${count} tokens, version ${version}`]).slice(0, 12),
  },
};
