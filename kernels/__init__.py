"""Operations over long sequences, one a file; installed as ``kimi_core.kernels``."""

from kimi_core.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from kimi_core.kernels.omd_loss import OmdLoss, omd_loss, omd_loss_ref
from kimi_core.kernels.omd_terms import mirror_descent, response_norms
from kimi_core.kernels.tiles import Head

__all__ = [
    "Head",
    "OmdLoss",
    "linear_logprob",
    "linear_logprob_ref",
    "mirror_descent",
    "omd_loss",
    "omd_loss_ref",
    "response_norms",
]
