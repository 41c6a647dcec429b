"""Settings: what is refused, what is said about keys that moved, and what can be unset."""

import pytest

from kimi_core.config import Config
from kimi_core.run.config_file import DROPPED, MOVED, load_config


@pytest.mark.parametrize("key", MOVED)
def test_a_key_that_moved_is_named_with_its_new_place(key):
    with pytest.raises(ValueError, match=rf"{key} = 7: this key is now {MOVED[key]}"):
        load_config(None, [f"{key}=7"])


@pytest.mark.parametrize("key", DROPPED)
def test_a_key_that_is_gone_is_named_with_what_holds_now(key):
    with pytest.raises(ValueError, match=rf"{key} = 7: this key is gone; .*(\d|half)"):
        load_config(None, [f"{key}=7"])


def test_old_keys_in_a_file_are_named_too(tmp_path):
    (tmp_path / "old.toml").write_text("[model]\nlayers = 2\n[trainer]\nnormalize = 'length'\n")
    with pytest.raises(ValueError, match="is now") as fault:
        load_config(tmp_path / "old.toml")
    assert str(fault.value).splitlines() == [
        "model.layers = 2: this key is now model.scratch.layers",
        "trainer.normalize = 'length': this key is now trainer.ablation.normalize",
    ]


def test_none_unsets_what_can_be_unset(tmp_path):
    (tmp_path / "a.toml").write_text("[rollout]\ntoken_budget = 24\n")
    assert load_config(tmp_path / "a.toml").rollout.token_budget == 24
    assert load_config(tmp_path / "a.toml", ["rollout.token_budget=none"]) == Config()


def test_none_stays_a_text_where_a_text_is_wanted():
    assert load_config(None, ["sft.data=none"]).sft.data == "none"
    assert load_config(None, ["trainer.ablation.normalize=none"]) == Config()


def test_none_is_refused_where_nothing_can_be_unset():
    with pytest.raises(ValueError, match=r"seed = 'none': Input should be a valid integer"):
        load_config(None, ["seed=none"])
