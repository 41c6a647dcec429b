"""A queue that serves waiting threads in the order in which they came."""

import queue
import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First come, first served, also among waiting threads.

    With ``queue.Queue`` a thread that puts an item back can take it before the threads that wait
    for it. Of 64 threads on two slots, some got theirs at once and some after a hundred others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[Item] = deque()
        self._waiting: deque[queue.SimpleQueue[Item]] = deque()

    def __len__(self) -> int:
        """Number of items that no thread has taken."""
        return len(self._items)

    def put(self, item: Item) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().put(item)
            else:
                self._items.append(item)

    def get(self, timeout_s: float) -> Item:
        """Take the next item. Raises TimeoutError if none came within ``timeout_s``."""
        with self._lock:
            if self._items:  # Then no thread waits.
                return self._items.popleft()
            turn: queue.SimpleQueue[Item] = queue.SimpleQueue()
            self._waiting.append(turn)
        try:
            return turn.get(timeout=timeout_s)
        except queue.Empty:
            if self._leave(turn):
                raise TimeoutError(f"no item came within {timeout_s:g} s") from None
            return turn.get()
        except BaseException:  # Ctrl-C: no item may be put where no thread waits.
            if not self._leave(turn):
                self.put(turn.get())
            raise

    def _leave(self, turn: "queue.SimpleQueue[Item]") -> bool:
        """Stop waiting. False if the item has come just now."""
        with self._lock:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            return True
