"""Fuzz targets in the ordinary tests: their corpora and a fixed number of random edits."""

import pytest
from fuzz import targets


@pytest.mark.parametrize("name", targets.TARGETS)
def test_no_input_breaks_it(name):
    assert targets.edit_for(name, 20, most=150) > len(targets.corpus(name))
