"""The exit status of a driver, and what it prints."""

from kimi_core import cli


def test_an_interrupt_is_one_line_and_status_130(capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    given = cli.parser(None).parse_args([])
    assert cli.main(given, interrupted) == 130
    assert capsys.readouterr().err.splitlines() == [
        "interrupted: --resume goes on from the last state, if one was saved"
    ]


def test_config_and_overrides_in_any_order():
    seen = []
    given = cli.parser(None).parse_args(["seed=3", "configs/smollm2.toml", "trainer.tau=0.5"])
    assert cli.main(given, seen.append) == 0
    assert (seen[0].name, seen[0].seed, seen[0].trainer.tau) == ("smollm2", 3, 0.5)


def test_two_configs_are_one_too_many(capsys):
    given = cli.parser(None).parse_args(["configs/think.toml", "configs/smollm2.toml"])
    assert cli.main(given, lambda config: None) == 2
    assert "One config at a time, not 2" in capsys.readouterr().err
