"""Who waits first is served first."""

import threading
from queue import SimpleQueue

import pytest

from kimi_core.sandbox import fair
from kimi_core.sandbox.fair import FairQueue


def test_takers_are_served_in_their_order() -> None:
    queue: FairQueue[int] = FairQueue()
    served: list[int] = []

    def take(number: int) -> None:
        queue.get(30)
        served.append(number)
        queue.put(0)

    threads = []
    for number in range(20):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        while len(queue._waiting) <= number:
            pass
    queue.put(0)
    for thread in threads:
        thread.join()
    assert served == list(range(20))
    assert len(queue) == 1


def test_whoever_is_interrupted_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    queue: FairQueue[str] = FairQueue()

    class Interrupted(SimpleQueue):
        def get(self, block: bool = True, timeout: float | None = None) -> str:
            if timeout is None:
                return super().get()
            if came[-1]:
                queue.put("a")
            raise KeyboardInterrupt

    monkeypatch.setattr(fair.queue, "SimpleQueue", Interrupted)
    came = []
    for after in (False, True):  # Before an item comes, and after.
        came.append(after)
        with pytest.raises(KeyboardInterrupt):
            queue.get(30)
        assert not queue._waiting
    assert queue.get(30) == "a"


def test_waiting_has_a_deadline_and_loses_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    with pytest.raises(TimeoutError):
        queue.get(0.01)
    queue.put("a")
    assert queue.get(0.01) == "a"
