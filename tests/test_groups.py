"""Tests that share something run in one worker."""

import pytest


@pytest.mark.xdist_group("shared")
def test_workers_know_the_groups(request):
    """xdist appends them to the names of tests; a version of pytest kept it from doing so."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("no workers here")
    assert request.node.nodeid.endswith("@shared")
