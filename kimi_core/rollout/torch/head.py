"""The output layer of the embedded engine."""

import torch


def head_logits(head: torch.nn.Module, hidden_bd: torch.Tensor) -> torch.Tensor:
    """``head(hidden_bd)``, ``[b, V]``.

    A large vocabulary on a CPU goes through oneDNN. For up to 256 rows this takes 0.7 to 0.8 of the
    time of torch's product, which packs the weights at every call. torch passes float32 to oneDNN
    only by the operator that its compiler emits.
    """
    if _large(head) and hidden_bd.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise.default
        return linear(hidden_bd, head.weight, head.bias, "none", [], "")
    return head(hidden_bd)


def _large(head: torch.nn.Module) -> bool:
    """Whether the product is worth the 2 ms that oneDNN takes for each new number of rows."""
    if type(head) is not torch.nn.Linear or head.weight.device.type != "cpu":
        return False
    return head.weight.numel() >= 1 << 24
