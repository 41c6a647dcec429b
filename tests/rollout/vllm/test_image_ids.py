"""Token ids of contexts with images as vLLM takes them; vLLM itself is not needed."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.models.processors import PLACE
from kimi_core.rollout.vllm.images import _shortened, expanded

IMAGE = 9
WHOLE = {"alone": [PLACE] * 3, "between": [7, PLACE, PLACE, 8], "in two parts": [PLACE, 6, PLACE]}
SHORT = {"alone": [PLACE], "between": [7, PLACE, 8], "in two parts": [PLACE]}

pieces = st.lists(st.integers(0, 3).map(lambda n: -1 - n) | st.lists(st.integers(0, 5)), max_size=8)


@given(pieces, st.sampled_from(sorted(WHOLE)))
def test_each_image_is_one_token_and_expanding_gives_the_context_back(drawn, kind):
    def ids_of(number: int) -> list[int]:
        return [-1 - number if one == PLACE else one for one in WHOLE[kind]]

    numbers = [-1 - one for one in drawn if isinstance(one, int)]
    parts = [ids_of(-1 - one) if isinstance(one, int) else one for one in drawn]
    context = np.array([token for part in parts for token in part], np.int32)
    images = SimpleNamespace(processor=SimpleNamespace(short=SHORT[kind]), ids_of=ids_of)
    ids, found = _shortened(images, IMAGE, context)
    assert found == numbers and ids.count(IMAGE) == len(numbers)
    # What vLLM does: it replaces what stands in a text for an image.
    short = [IMAGE if one == PLACE else one for one in SHORT[kind]]
    again, at = [], 0
    while at < len(ids):
        if ids[at : at + len(short)] == short:
            again += [IMAGE if one == PLACE else one for one in WHOLE[kind]]
            at += len(short)
        else:
            again.append(ids[at])
            at += 1
    assert again == expanded(SimpleNamespace(image_token_id=IMAGE), context)
