"""Tests that share something run in one worker."""

import pytest


def test_workers_know_the_groups(request):
    """xdist appends them to the names of tests; a version of pytest kept it from doing so."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("no workers here")
    grouped = [one for one in request.session.items if one.get_closest_marker("xdist_group")]
    assert all("@" in one.nodeid for one in grouped)
