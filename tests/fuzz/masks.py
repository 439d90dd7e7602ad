"""The dropout masks from their documented definition, in numpy.

Philox4x32 with 7 rounds (Salmon et al., SC 2011); key: the halves of the seed; counter: (row low,
row high, column // 8, (offset + stream) mod 2^32); the four words are eight 16-bit lanes, low half
first, lane j for column 8 * (column // 8) + j; kept where lane >= round(65536 p) (at most 65535),
and multiplied by the inverse of the probability that this leaves, as float32.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_M = np.uint64(0xFFFFFFFF)
_32, _16, _LOW = np.uint64(32), np.uint64(16), np.uint64(0xFFFF)


def dropped_of_65536(p: float) -> int:
    """How many of the 65536 lane values are dropped."""
    return min(round(p * 65536), 65535)


def multiplier(p: float) -> float:
    """Of a kept element."""
    return float(np.float32(65536.0 / (65536 - dropped_of_65536(p))))


def kept(rng: tuple[int, int], p: float, streams: int, rows: int, columns: int) -> Tensor:
    """Bool [streams, rows, columns]."""
    seed, offset = (v % (1 << 64) for v in rng)
    groups = (columns + 7) // 8
    shape = (streams, rows, groups)
    row = np.arange(rows, dtype=np.uint64)[None, :, None]
    words = [
        np.broadcast_to(row & _M, shape),
        np.broadcast_to(row >> _32, shape),
        np.broadcast_to(np.arange(groups, dtype=np.uint64), shape),
        np.broadcast_to(
            np.array([(offset + s) % (1 << 32) for s in range(streams)], dtype=np.uint64)[
                :, None, None
            ],
            shape,
        ),
    ]
    low, high = seed % (1 << 32), seed >> 32
    for _ in range(7):
        first = words[0] * np.uint64(0xD2511F53)
        second = words[2] * np.uint64(0xCD9E8D57)
        words = [
            (second >> _32) ^ words[1] ^ np.uint64(low),
            second & _M,
            (first >> _32) ^ words[3] ^ np.uint64(high),
            first & _M,
        ]
        low, high = (low + 0x9E3779B9) % (1 << 32), (high + 0xBB67AE85) % (1 << 32)
    lanes = np.empty((*shape, 8), dtype=np.uint64)
    for i, word in enumerate(words):
        lanes[..., 2 * i] = word & _LOW
        lanes[..., 2 * i + 1] = word >> _16
    keep = lanes.reshape(streams, rows, groups * 8)[:, :, :columns] >= dropped_of_65536(p)
    return torch.from_numpy(np.ascontiguousarray(keep))
