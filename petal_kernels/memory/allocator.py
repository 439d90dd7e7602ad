"""What CUDA's caching allocator takes from the device for the blocks of a profile.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings, for one stream:

* a block is rounded up to 512 bytes; those of at most 1 MiB come from small segments of 2 MiB,
  others from segments of 20 MiB, or of their own size rounded up to 2 MiB where they have 10 MiB or
  more;
* a block takes the smallest free piece that holds it, of the pool for its size; what is left of the
  piece is free where it has 512 bytes, of large segments more than 1 MiB;
* what is let go joins its free neighbours of the segment.

A segment of which nothing is in use goes back to the device before the allocator gives up, so that
what a step needs is, at any time, the segments of which something is.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from petal_kernels.memory.records import MIB, Block

_SMALL = MIB
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_OWN_SEGMENT = 10 * MIB  # blocks from here on have one of their size
_STEP = 512


@dataclass
class _Segment:
    """One piece of the device's memory: its free parts by where they begin and end."""

    number: int
    size: int
    small: bool
    used: int = 0  # blocks in it
    begins: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)


class Allocator:
    """Blocks in segments. `needed` is what the device must have had until now."""

    def __init__(self) -> None:
        self.needed = 0
        self._now = 0  # bytes of segments that something is in
        self._segments: list[_Segment] = []
        # Free parts by size, then by where they are: the smallest that is large enough.
        self._free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}

    def take(self, size: int) -> tuple[int, int, int]:
        """A block: segment, where it begins, its size."""
        size = max(_STEP, -(-size // _STEP) * _STEP)
        small = size <= _SMALL
        free = self._free[small]
        at = bisect.bisect_left(free, (size, -1, -1))
        if at == len(free):
            self._open(size, small)
            at = bisect.bisect_left(free, (size, -1, -1))
        length, number, begin = free[at]
        segment = self._segments[number]
        self._remove(segment, begin, length)
        left = length - size
        if left >= _STEP if small else left > _SMALL:
            self._insert(segment, begin + size, left)
        else:
            size = length
        if not segment.used:
            self._now += segment.size
            self.needed = max(self.needed, self._now)
        segment.used += 1
        return number, begin, size

    def drop(self, block: tuple[int, int, int]) -> None:
        """A block is let go."""
        number, begin, size = block
        segment = self._segments[number]
        after = segment.begins.get(begin + size)
        if after is not None:
            self._remove(segment, begin + size, after)
            size += after
        before = segment.ends.get(begin)
        if before is not None:
            self._remove(segment, begin - before, before)
            begin, size = begin - before, size + before
        self._insert(segment, begin, size)
        segment.used -= 1
        if not segment.used:
            self._now -= segment.size

    def _open(self, size: int, small: bool) -> None:
        if small:
            whole = _SMALL_SEGMENT
        elif size < _OWN_SEGMENT:
            whole = _LARGE_SEGMENT
        else:
            whole = -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
        segment = _Segment(len(self._segments), whole, small)
        self._segments.append(segment)
        self._insert(segment, 0, whole)

    def _insert(self, segment: _Segment, begin: int, size: int) -> None:
        bisect.insort(self._free[segment.small], (size, segment.number, begin))
        segment.begins[begin] = size
        segment.ends[begin + size] = size

    def _remove(self, segment: _Segment, begin: int, size: int) -> None:
        free = self._free[segment.small]
        del free[bisect.bisect_left(free, (size, segment.number, begin))]
        del segment.begins[begin]
        del segment.ends[begin + size]


def needed_bytes(blocks: Iterable[Block]) -> int:
    """What the device must have for these blocks, in the order of a profile's timeline."""
    found = [b for b in blocks if b.bytes and (b.died is None or b.died > b.born)]
    events = [(block.born, 1, i) for i, block in enumerate(found)]
    # What goes at a step goes before what comes at it, as on the curve of live bytes.
    events += [(block.died, 0, i) for i, block in enumerate(found) if block.died is not None]
    return _run(sorted(events), found)


def _run(events: Sequence[tuple[int, int, int]], blocks: Sequence[Block]) -> int:
    allocator = Allocator()
    held: dict[int, tuple[int, int, int]] = {}
    for _, comes, i in events:
        if comes:
            held[i] = allocator.take(blocks[i].bytes)
        else:
            allocator.drop(held.pop(i))
    return allocator.needed
