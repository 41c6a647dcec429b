"""A queue whose takers are served in the order in which they came."""

import threading
from collections import deque
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First come, first served, also among those who wait.

    ``queue.Queue`` lets a thread that puts an item back take it again before those who wait for it:
    of 64 threads on two slots, some got theirs at once and some after a hundred others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[Item] = deque()
        self._waiting: deque[Future[Item]] = deque()

    def __len__(self) -> int:
        """How many items lie here."""
        return len(self._items)

    def put(self, item: Item) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set_result(item)
            else:
                self._items.append(item)

    def get(self, timeout_s: float) -> Item:
        """Raises TimeoutError when there was nothing for ``timeout_s``."""
        with self._lock:
            if self._items:  # Then nobody waits.
                return self._items.popleft()
            turn: Future[Item] = Future()
            self._waiting.append(turn)
        try:
            return turn.result(timeout_s)
        except TimeoutError:
            with self._lock:
                if turn.done():  # Just now.
                    return turn.result()
                self._waiting.remove(turn)
            raise
