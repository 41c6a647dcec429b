"""Names of a model's tensors in the files of a checkpoint. Models with images have others there."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

CONVERSIONS = "_weight_conversions"
"""Where transformers keeps with a loaded model how its files are named."""


def names_in_files(
    model: PreTrainedModel, names: Iterable[str], *, published: bool = False
) -> dict[str, str]:
    """Name of a tensor in the model → its name in a file; "": it is not in a file as it is.

    Args:
        published: as in the files of the family's published models, whose names an engine knows;
            otherwise as ``save_pretrained`` writes them.
    """
    stand_ins = {name: torch.empty(0) for name in names}
    before = getattr(model, CONVERSIONS, None)
    if published:
        setattr(model, CONVERSIONS, get_model_conversion_mapping(model, add_legacy=False))
    try:
        written = revert_weight_conversion(model, dict(stand_ins))
    finally:
        if published:
            setattr(model, CONVERSIONS, before)
    known = {id(tensor): name for name, tensor in written.items()}
    return {name: known.get(id(tensor), "") for name, tensor in stand_ins.items()}
