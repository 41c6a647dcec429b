"""An iteration and an evaluation, as a run records them."""

from kimi_core.metrics import EvaluationMetrics, IterationMetrics

ITERATION = IterationMetrics(
    iteration=12, policy_version=11, wall_s=2.8, cpu_s=5.1, rollout_s=1.0, train_s=1.7,
    reward_mean=0.61, accuracy_sampled=0.63, length_mean=48.2, tokens_sampled=1834,
    tokens_per_s=1834.2, decode_steps=96, trajectories_finished=220, trajectories_unfinished=30,
    repeat_stops=1, samples_trained=220, samples_trained_total=2640, tokens_stale_share=0.1,
    max_staleness=2, logprob_gap_mean=1.2e-6, logprob_gap_max=3.1e-5, reference_recomputed=False,
    loss=0.4, grad_norm=0.9, entropy=0.5, zero_advantage_share=0.2,
    logprob_gap_over_limit_share=0.0,
)  # fmt: skip
EVALUATION = EvaluationMetrics(
    iteration=0, policy_version=0, accuracy_greedy=0.5, accuracy_sampled=0.4, length_mean=30.5,
    n=500, seed=1, wall_s=2.0,
)  # fmt: skip
