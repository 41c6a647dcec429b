"""Operations over long sequences, one a file; installed as ``kimi_core.kernels``."""

from kimi_core.kernels.linear_logprob import linear_logprob, linear_logprob_ref

__all__ = ["linear_logprob", "linear_logprob_ref"]
