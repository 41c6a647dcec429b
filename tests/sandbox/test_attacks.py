"""Hostile programs: each is contained and named, and neither parent nor neighbour notices."""

import pytest
from sandbox.attacks import ATTACKS, CONTAINED, PRELUDE, Attack

from kimi_core.sandbox import Limits, Pool, Status


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_contained(pool: Pool, attack: Attack, weak: bool) -> None:
    if attack.needs_cgroup and weak:
        pytest.skip("no cgroup for this user: memory of this kind is not watched")
    result = pool.run(PRELUDE + attack.source, limits=Limits(**attack.limits))
    assert b"escaped" not in result.stdout, result.stdout
    assert result.status is attack.status, result
    if attack.status is Status.OK:
        assert result.stdout == CONTAINED, result
    if attack.exit_code is not None:
        assert result.exit_code == attack.exit_code
    after = pool.run("print(6 * 7)")
    assert (after.status, after.stdout) == (Status.OK, b"42\n")
