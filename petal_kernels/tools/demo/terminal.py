"""The demo at a terminal: headings, a progress bar that becomes plain lines where there is no
terminal, and Ctrl-C.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from petal_kernels._runtime.columns import columns

_WIDTH = 28


def heading(text: str) -> None:
    """Print a section title."""
    print(f"\n{text}", flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and figures to the right."""
    return columns(header, rows, right=range(1, len(header)))


class Progress:
    """Bar with percentage, a note and the time left; `start` > 0 when a run goes on from a
    checkpoint.
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.start = label, total, start
        self.began = time.perf_counter()
        self.drawn = 0.0
        self.tenth = -1
        self.terminal = sys.stdout.isatty()

    def update(self, done: int, note: str = "") -> None:
        now = time.perf_counter()
        last = done >= self.total
        if self.terminal:
            if now - self.drawn < 0.1 and not last:
                return
            self.drawn = now
            print(f"\r{self._line(done, note, now)}\x1b[K", end="\n" if last else "", flush=True)
            return
        tenth = 10 * done // max(1, self.total)
        if tenth != self.tenth:
            self.tenth = tenth
            print(self._line(done, note, now), flush=True)

    def close(self) -> None:
        """Ends an unfinished bar, so that what is printed next starts on its own line."""
        if self.terminal:
            print(flush=True)

    def _line(self, done: int, note: str, now: float) -> str:
        share = done / max(1, self.total)
        filled = round(share * _WIDTH)
        bar = "#" * filled + "-" * (_WIDTH - filled)
        made = done - self.start
        spent = now - self.began
        left = f"{spent / made * (self.total - done):.0f} s left" if made > 0 else ""
        return f"  {self.label} [{bar}] {done}/{self.total}  {note}  {left}".rstrip()


def ticker(label: str) -> Callable[[int, int], None]:
    """A function of (done, total) that draws a bar; it learns the total from its first call."""
    progress: list[Progress] = []

    def tick(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress(label, total))
        progress[0].update(done)

    return tick


class Interrupt:
    """Between `with` and its end, the first Ctrl-C only sets `asked`; the second one raises."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def guard(self) -> Iterator[Interrupt]:
        # Python lets only the main thread set a handler; elsewhere Ctrl-C never arrives.
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)
