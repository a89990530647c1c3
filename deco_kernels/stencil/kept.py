"""What is made once and kept, and how much of it?"""

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")
BUDGET = 256 << 20  # bytes: the geometries of a training, but not all that there are


class Kept(Generic[T]):
    """Values by key. When they are more than ``budget`` bytes, the oldest are dropped.

    Args:
        size: bytes of a value.
        before_drop: called with every value that is dropped.
    """

    def __init__(
        self,
        size: Callable[[T], int],
        before_drop: Callable[[T], None] | None = None,
        budget: int = BUDGET,
    ) -> None:
        self._size, self._before_drop, self._budget = size, before_drop, budget
        self._values: dict[Hashable, T] = {}
        self._bytes, self._lock = 0, Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        value = self._values.get(key)
        if value is not None:
            return value
        value = make()
        with self._lock:
            kept = self._values.setdefault(key, value)
            if kept is value:
                self._bytes += self._size(value)
                self._drop()
        return kept

    def _drop(self) -> None:
        while self._bytes > self._budget and len(self._values) > 1:  # the newest stays
            oldest = self._values.pop(next(iter(self._values)))
            self._bytes -= self._size(oldest)
            if self._before_drop is not None:
                self._before_drop(oldest)
