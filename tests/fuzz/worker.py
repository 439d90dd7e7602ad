"""One process of a run: checks the cases it is told to, and says what came of them.

Reads a chunk per line from stdin, ``{"profile", "operator", "seed", "first", "count"}``, and writes
a line of JSON for each. Before each case its index goes to the file named on the command line, so
that whoever started this process knows which case ended it.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

BACKENDS = {"cpu": ("torch", "native"), "triton": ("triton",), "cuda": ("torch",)}


class Place:
    """The index of the case in progress, where another process can read it."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)

    def put(self, index: int) -> None:
        """Write the index."""
        self._map[:8] = index.to_bytes(8, "little", signed=True)

    @staticmethod
    def read(path: Path) -> int:
        """The index last written; -1: none yet."""
        return int.from_bytes(path.read_bytes()[:8], "little", signed=True)


def prepare(profile: str) -> None:
    """Set up this process for a profile: one thread, poisoned memory, emulated kernels."""
    if profile == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    # torch.empty is filled with NaN, so that an element which no kernel writes is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    if profile == "triton":
        from tests.ops import triton_audit

        triton_audit.hasten_interpreter()
    if profile == "cuda":
        from tests.fuzz import emulated

        emulated.replace()


def run_chunk(
    operator: str, seed: int, first: int, count: int, profile: str, place: Place | None = None
) -> dict[str, Any]:
    """Check a range of cases."""
    from tests.fuzz.check import check

    calls: Counter[str] = Counter()
    seconds, looks, cramped, declined = 0.0, 0, 0, Counter[str]()
    failures = []
    for index in range(first, first + count):
        if place is not None:
            place.put(index)
        begin = time.perf_counter()
        try:
            found = check(operator, seed, index, BACKENDS[profile], profile)
        except Exception:
            text = traceback.format_exc(limit=-3)
            failures.append({"index": index, "faults": [f"the fuzzer itself: {text}"]})
            continue
        finally:
            seconds += time.perf_counter() - begin
        calls.update(found.ran)
        declined.update(list(found.declined))
        looks += found.second_look
        cramped += found.no_headroom
        if found.faults:
            failures.append({"index": index, "faults": found.faults[:6]})
    return {
        "operator": operator,
        "profile": profile,
        "seed": seed,
        "first": first,
        "count": count,
        "calls": dict(calls),
        "declined": dict(declined),
        "second_looks": looks,
        "no_headroom": cramped,
        "seconds": seconds,
        "failures": failures,
    }


def main() -> None:
    """Serve chunks until stdin ends."""
    profile, path = sys.argv[1], Path(sys.argv[2])
    prepare(profile)
    place = Place(path)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        chunk = json.loads(line)
        print(json.dumps(run_chunk(**chunk, place=place)), flush=True)


if __name__ == "__main__":
    main()
