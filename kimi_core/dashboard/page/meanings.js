// Unit and meaning of each metric, as docs/metrics.md has them; tests/dashboard compares the names.

export const MEANINGS = {
  accuracy: ["0–1", "training prompts as sampled, and held-out prompts"],
  wall_s: ["s", "wall-clock time from start to end, without evaluation"],
  cpu_s: ["s", "CPU time of the process, all threads"],
  rollout_s: ["s", "wall-clock time of the rollout phase"],
  train_s: ["s", "wall-clock time of the training phase"],
  accuracy_sampled: ["0–1", "mean correctness of the responses trained, as sampled"],
  length_mean: ["tokens", "mean length of the responses trained"],
  tokens_sampled: ["tokens", "output tokens sampled"],
  tokens_per_s: ["tokens/s", "output tokens per second of the rollout phase"],
  tokens_stale_share: ["0–1", "share of the trained tokens that an older version sampled"],
  max_staleness: ["versions", "age of the oldest token trained"],
  logprob_gap_mean: ["nats", "mean |Δ log-prob| between engine and trainer on this iteration's tokens"],
  logprob_gap_max: ["nats", "the largest of these differences"],
  reference_recomputed: ["bool", "the gap exceeded its limit, so the trainer recomputed the reference"],
  entropy: ["nats", "mean −log-prob of the sampled tokens: an estimate of the policy's entropy per token"],
  zero_advantage_share: ["0–1", "share of the trained responses whose advantage is 0: they teach nothing"],
  logprob_gap_over_limit_share: ["0–1", "share of this iteration's tokens whose own gap exceeds the limit"],
  accuracy_greedy: ["0–1", "mean correctness of one response per prompt, the most likely token each time"],
  n: ["prompts", "number of held-out prompts; it bounds what a difference can mean"],
};
