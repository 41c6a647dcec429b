"""A name for a model by what training never changes."""

import hashlib
import json

from transformers import PreTrainedModel

VOLATILE_SETTINGS = ("_name_or_path", "transformers_version", "use_cache", "dtype")
"""Settings of a model that may differ between two copies of the same model."""


def fingerprint(model: PreTrainedModel) -> str:
    """Class, number of parameters, and a digest of settings and frozen parameters."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE_SETTINGS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            # In the precision that the weights have on a GPU and on a CPU alike.
            some = parameter.detach().flatten()[:1000].bfloat16().float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
    return f"{type(model).__name__}, {parameters} parameters, {digest.hexdigest()[:12]}"
