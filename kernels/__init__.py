"""Operations over long sequences, one a file; installed as ``kimi_core.kernels``."""

from kimi_core.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from kimi_core.kernels.omd_loss import OmdLoss, omd_loss, omd_loss_ref

__all__ = ["OmdLoss", "linear_logprob", "linear_logprob_ref", "omd_loss", "omd_loss_ref"]
