"""The dropout generator: one counter-based definition, in plain torch, that every backend
reproduces bit for bit.

A mask is a pure function of a state and a position, so it is never stored: backward draws it again.

* state ``rng``: int64 tensor ``[2] = (seed, offset)`` on the device of the activations. It is read
  where it lies, never copied to the host, so a captured CUDA graph that redraws it redraws the
  masks.
* generator: Philox4x32 (Salmon et al., SC 2011) with 7 rounds; key = the low and high half of
  ``seed``; counter = ``(row low 32 bits, row high 32 bits, column // 8, (offset + stream) mod
  2**32)``.
* lanes: the four 32-bit words are eight 16-bit lanes, low half first; lane j serves column ``8 *
  (column // 8) + j``.
* decision: an element is kept where ``lane >= threshold(p)`` and multiplied by ``keep_scale(p)``.
  The probability is thereby a multiple of 1/65536 and the scale its exact inverse, the same float32
  everywhere.

``row`` is the flat token index, ``stream`` tells the masks of one call apart (output k, or 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
LANES = 8
LEVELS = 1 << 16

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85


def check_probability(p: float, name: str = "dropout") -> None:
    """Raise unless ``0 <= p < 1``."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name}: want a float, got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name}: want 0 <= {name} < 1, got {p}")


def threshold(p: float) -> int:
    """Lanes below this are dropped: p rounded to a multiple of 1/65536, at most 65535/65536."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by: 65536 / (65536 - threshold), to be rounded to
    float32."""
    return LEVELS / (LEVELS - threshold(p))


def draw(device: torch.device) -> Tensor:
    """A fresh state from torch's default generator of ``device``.

    ``torch.manual_seed`` fixes it, activation checkpointing restores it, a CUDA graph advances it;
    there is no host synchronisation.
    """
    return torch.randint(0, 1 << 62, (2,), dtype=torch.int64, device=device)


def _round(c: list[Tensor], k0: Tensor, k1: Tensor) -> list[Tensor]:
    # int64 products wrap modulo 2**64; the two halves read off below are nevertheless exact.
    p0 = c[0] * _MULTIPLIER_0
    p1 = c[2] * _MULTIPLIER_1
    return [
        ((p1 >> 32) & _MASK32) ^ c[1] ^ k0,
        p1 & _MASK32,
        ((p0 >> 32) & _MASK32) ^ c[3] ^ k1,
        p0 & _MASK32,
    ]


def lanes(rng: Tensor, streams: int, rows: int, cols: int, first: int = 0) -> Tensor:
    """The raw 16-bit lanes of ``streams`` streams from the ``first``: int64 ``[streams, rows,
    cols]``."""
    device = rng.device
    seed, offset = rng[0], rng[1]
    groups = -(-cols // LANES)
    row = torch.arange(rows, device=device, dtype=torch.int64).view(1, rows, 1)
    group = torch.arange(groups, device=device, dtype=torch.int64).view(1, 1, groups)
    stream = first + torch.arange(streams, device=device, dtype=torch.int64).view(streams, 1, 1)
    shape = (streams, rows, groups)
    c = [
        (row & _MASK32).expand(shape),
        (row >> 32).expand(shape),
        group.expand(shape),
        ((offset + stream) & _MASK32).expand(shape),
    ]
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS):
        c = _round(c, k0, k1)
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    words = torch.stack(c, dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return halves.reshape(streams, rows, groups * LANES)[:, :, :cols]


def keep_masks(rng: Tensor, p: float, streams: int, rows: int, cols: int) -> Tensor:
    """The boolean keep masks of streams ``0 .. streams - 1``: ``[streams, rows, cols]``."""
    return lanes(rng, streams, rows, cols) >= threshold(p)


def scaled_masks(
    rng: Tensor, p: float, streams: int, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """The masks as multipliers, 0 or ``keep_scale(p)``: ``[streams, rows, cols]`` in ``dtype``."""
    scale = torch.tensor(keep_scale(p), dtype=torch.float32).item()
    return keep_masks(rng, p, streams, rows, cols).to(dtype) * scale


def scaled_mask(
    rng: Tensor, p: float, stream: int, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """The mask of one stream as multipliers: ``[rows, cols]`` in ``dtype``."""
    scale = torch.tensor(keep_scale(p), dtype=torch.float32).item()
    return (lanes(rng, 1, rows, cols, stream)[0] >= threshold(p)).to(dtype) * scale
