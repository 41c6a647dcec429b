"""Which responses each update of an iteration trains on, and on which ranks."""

from dataclasses import dataclass, field

import numpy as np

from kimi_core.models.processors import Pixels
from kimi_core.models.vision import Images, to_send_with
from kimi_core.trainer.gap import Gap
from kimi_core.trainer.ranks import deal as deal_by_size
from kimi_core.types import Batch, TrainingBatch


@dataclass(frozen=True)
class Share:
    """What one rank trains on in an iteration. No rank gets the responses of the others."""

    batch: TrainingBatch
    """This rank's responses, of all updates."""
    updates: list[np.ndarray]
    """The responses of each update, int64 indices into ``batch``; there may be none."""
    sizes: list[int]
    """Responses of each update on all ranks together."""
    tokens: np.ndarray
    """Where each token of ``batch`` is in the batch of all ranks, int64 ``[T]``."""
    images: dict[int, Pixels] = field(default_factory=dict)
    """Pixels of the images in ``batch``, for a rank that cannot read them itself."""


def shares_of(
    batch: TrainingBatch, updates: list[np.ndarray], parts: int, images: Images | None = None
) -> list[Share]:
    """Deal the responses of each update by tokens, the longest first; one share for each part.

    Args:
        images: of the prompts; with several parts each share has the pixels that it needs.
    """
    sizes = [len(update) for update in updates]
    if parts == 1:
        return [Share(batch, updates, sizes, np.arange(len(batch.tokens.token_ids)))]
    dealt: list[list[np.ndarray]] = [[] for _ in range(parts)]
    for update in updates:
        hands = deal_by_size(batch.tokens.lengths[update].tolist(), parts)
        for mine, hand in zip(dealt, hands, strict=True):
            mine.append(update[np.array(hand, np.int64)])
    shares = []
    for mine in dealt:
        chosen = np.sort(np.concatenate(mine))
        places = [np.searchsorted(chosen, one) for one in mine]
        some = select(batch, chosen)
        sent = to_send_with(images, some.tokens.token_ids)
        shares.append(Share(some, places, sizes, tokens_of(batch.tokens, chosen), sent))
    return shares


def select(batch: TrainingBatch, sequences: np.ndarray) -> TrainingBatch:
    """Some responses of a batch; ``sequences`` are int64 indices."""
    groups = batch.group_ids[sequences]
    return TrainingBatch(
        tokens=select_tokens(batch.tokens, sequences),
        group_ids=groups,
        rewards=batch.rewards[sequences],
        correctness=batch.correctness[sequences],
        advantages=batch.advantages[sequences],
        ended_rewards={group: batch.ended_rewards[group] for group in np.unique(groups).tolist()},
    )


def select_tokens(batch: Batch, sequences: np.ndarray) -> Batch:
    """Some sequences of a batch; ``sequences`` are int64 indices."""
    tokens = tokens_of(batch, sequences)
    return Batch(
        token_ids=batch.token_ids[tokens],
        logprobs=batch.logprobs[tokens],
        mask=batch.mask[tokens],
        policy_versions=batch.policy_versions[tokens],
        cu_seqlens=np.cumsum([0, *batch.lengths[sequences]], dtype=np.int32),
    )


def tokens_of(batch: Batch, sequences: np.ndarray) -> np.ndarray:
    """Indices of the tokens of ``sequences``, one sequence after the other, int64."""
    lengths = batch.lengths[sequences].astype(np.int64)
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(batch.cu_seqlens[:-1][sequences] - before, lengths)


def ages_and_counted(
    tokens: Batch, version: int, max_staleness: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """How many versions each token lies back of ``version``, and whether it counts in the loss."""
    ages = version - tokens.policy_versions
    counted = tokens.mask > 0
    return ages, counted if max_staleness is None else counted & (ages <= max_staleness)


def deal(group_ids: np.ndarray, updates: int, seed: tuple[int, ...]) -> list[np.ndarray]:
    """Deal the responses of an iteration to its updates, in random order.

    A group stays together, so its prompt is computed in one update only. Each group goes to the
    update that has the fewest responses so far. With fewer groups than updates, responses are dealt
    one by one, so that each update has some.

    Args:
        group_ids: the group of each response, int ``[N]``, N at least 1.
        updates: at least 1.
        seed: decides the order.

    Returns at most ``updates`` shares, none of them empty: indices of responses, int64.
    """
    rng = np.random.default_rng(seed)
    names = np.unique(group_ids)
    if len(names) < updates:
        shares = np.array_split(rng.permutation(len(group_ids)), updates)
        return [share for share in shares if len(share)]
    dealt: list[list[np.ndarray]] = [[] for _ in range(updates)]
    sizes = [0] * updates
    for group in rng.permutation(names):
        members = np.flatnonzero(group_ids == group)
        fewest = sizes.index(min(sizes))
        dealt[fewest].append(members)
        sizes[fewest] += len(members)
    return [np.concatenate(members) for members in dealt]


@dataclass(frozen=True)
class PhaseOutcome:
    """What the ranks tell rank 0 of a training phase."""

    losses: list[float]
    norms: list[float]
    gap: Gap
    recomputed: bool
    entropy: float
    met: list[np.ndarray]
    """Log-probs and entropies of each share's tokens, float32 ``[2, T]``; NaN for a token that does
    not count."""
