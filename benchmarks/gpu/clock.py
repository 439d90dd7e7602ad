"""The run's time, and each stage's part of it."""

from __future__ import annotations

import time


class Clock:
    """A deadline. A stage gets its share of what is left; what it does not use, the later ones
    have."""

    def __init__(self, seconds: float) -> None:
        self._begin = time.monotonic()
        self._end = self._begin + seconds

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def left(self) -> float:
        """Seconds until the end, negative after it."""
        return self._end - time.monotonic()

    def part(self, share: float, of: float) -> float:
        """When a stage must begin no further case: ``share`` of ``of`` of what is left."""
        return time.monotonic() + max(self.left(), 0.0) * share / of

    def show(self) -> str:
        """``elapsed/total`` as minutes and seconds."""
        return f"{_minutes(self.elapsed())}/{_minutes(self._end - self._begin)}"


def _minutes(seconds: float) -> str:
    whole = max(int(seconds), 0)
    return f"{whole // 60:2}:{whole % 60:02}"
