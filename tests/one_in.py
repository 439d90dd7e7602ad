"""``@pytest.mark.one_in(n)``: `make test` runs one in n of a test's rows, `make test-all` all.

Which: every n-th, one further to the right after each n rows, so that in a grid whose last axis has
n values each of these comes up; and each test starts elsewhere, so that the tests of a file that
share their rows leave out different ones. ``one_in(n, of="triton")`` counts only the rows whose id
says so, and keeps the others.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

import pytest


def chosen(index: int, n: int, name: str) -> bool:
    """Whether the row of this index is one that always runs."""
    return (index + index // n) % n == zlib.crc32(name.encode()) % n


def mark_others(items: Iterable[pytest.Item]) -> None:
    """Give what is not chosen the marker ``spare``."""
    seen = defaultdict[str, int](int)
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is None or mark.kwargs.get("of", "") not in item.name:
            continue
        name = item.nodeid.partition("[")[0]
        if not chosen(seen[name], mark.args[0], name):
            item.add_marker("spare")
        seen[name] += 1
