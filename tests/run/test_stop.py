"""Ctrl-C and SIGTERM during a run."""

import os
import signal
import threading
import time

import pytest

from kimi_core.cli import settings
from kimi_core.run.stop import Stopped, stop_on_signals


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_is_noted_and_the_second_interrupts(signum, status, capfd):
    before = signal.getsignal(signum)
    with stop_on_signals(60) as stop:
        assert not stop.is_set()
        stop.leave("2 of 6")  # No signal: nothing is raised.
        send(signum)
        assert stop.is_set()
        assert "a second signal interrupts at once" in capfd.readouterr().err
        with pytest.raises(Stopped, match="interrupted") as stopped:
            send(signum)
    assert stopped.value.status == status
    assert signal.getsignal(signum) is before
    with pytest.raises(Stopped, match=r"stopped at 2 of 6; --resume goes on"):
        stop.leave("2 of 6")


@pytest.mark.parametrize("grace_s", [0.2, 0.5])
def test_sigterm_gives_some_time(grace_s):
    started = time.monotonic()
    with stop_on_signals(grace_s):
        send(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            time.sleep(60)
    assert stopped.value.status == 143
    assert time.monotonic() - started >= grace_s


def test_other_threads_handle_no_signal():
    found = []

    def use():
        with stop_on_signals(1) as stop:
            found.append(stop.is_set())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_command_says_it_in_a_line(capsys):
    def stopped(config):
        raise Stopped(signal.SIGTERM, "stopped at 4 of 6")

    assert settings.with_config([], stopped) == 143
    assert capsys.readouterr().err == "stopped at 4 of 6; --resume goes on\n"
