"""Context parallelism as the policy sees it: this rank's columns of a micro-batch.

The ranks of a group get the same micro-batches. Each computes 1/n of the columns, and the head for
the wanted tokens that these predict. Then the log-probs are united, so that whatever is computed
from them is the same on every rank of the group, and the gradient flows to a rank's own tokens.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_core.trainer.packing import MicroBatch


@dataclass(frozen=True)
class ContextParallel:
    """The group of ranks that share the columns of this rank's micro-batches."""

    group: dist.ProcessGroup

    def cut(self, micro: MicroBatch) -> tuple[MicroBatch, Tensor]:
        """This rank's columns, and which wanted tokens they predict, int64.

        The row, which is in the layout ``end_to_end``, is padded to a multiple of the ranks.
        """
        assert micro.packing is not None
        ranks, rank = self.group.size(), self.group.rank()
        columns = micro.ids_rl.shape[1]
        width = -(-columns // ranks)
        padding = (0, width * ranks - columns)
        own = slice(rank * width, (rank + 1) * width)
        mine_t = ((micro.column_t >= own.start) & (micro.column_t < own.stop)).nonzero()[:, 0]
        part = replace(
            micro,
            ids_rl=torch.nn.functional.pad(micro.ids_rl, padding)[:, own],
            positions_rl=torch.nn.functional.pad(micro.positions_rl, padding)[:, own],
            row_t=micro.row_t[mine_t],
            column_t=micro.column_t[mine_t] - own.start,
            ids_t=micro.ids_t[mine_t],
            packing=replace(micro.packing, columns=columns, group=self.group),
        )
        return part, mine_t

    def unite(self, own_n: Tensor, mine_t: Tensor, tokens: int) -> Tensor:
        """The log-probs of all ``tokens`` wanted tokens from each rank's ``own_n``.

        Raises:
            FloatingPointError: one of them is NaN; every rank of the group raises it.
        """
        own_t = own_n.new_zeros(tokens).index_copy(0, mine_t, own_n)
        all_t = own_t.detach().clone()
        dist.all_reduce(all_t, group=self.group)
        if bad := int(all_t.isnan().sum()):
            raise FloatingPointError(f"{bad} of {tokens} log-probs are NaN")
        return own_t + (all_t - own_t.detach())
