"""Which form ``expert_dispatch`` takes: decided by shapes alone, never by timing.

stationary  a block of tokens stays where it is and passes through the experts; one that no
            token of the block chose is skipped. z is [N, E r]. Every dense gate; gates shared
            by a sample's tokens, where whole blocks choose alike; token top-k while E r is
            small: half-empty products cost less than moving rows.
sorted      tokens are sorted by expert (stable, on the device), each expert multiplies its own
            rows alone; z is [N k, r] in sorted order. Token top-k where E r is large; on a CPU,
            where products are the cost, that is soon.
"""

from __future__ import annotations

PLANS = ("stationary", "sorted")

# E * r up to which a masked product over all experts beats a gather on a GPU, for k = 2: it costs
# 4 E r d flops a token, the gather (3 k + 1) d numbers to move. A model, not yet measured.
STATIONARY_WIDTH = 512

# Moving a row to an expert and back costs as much on a CPU as so many columns of its products.
# Measured (AVX-512, N = 4096, d = 768, fp32): right for each of 31 triples E 2 .. 16, r 2 .. 64,
# k 1 .. 4.
MOVING_WIDTH = 16


def choose(device: str, experts: int, rank: int, top_k: int, tokens_per_gate: int) -> str:
    """The plan for a device type; ``top_k`` is 0 where every expert is used."""
    if top_k == 0 or top_k == experts:
        return "stationary"
    if device == "cpu":
        return "stationary" if experts * rank < top_k * (rank + MOVING_WIDTH) else "sorted"
    small = experts * rank <= STATIONARY_WIDTH
    return "stationary" if small or tokens_per_gate > 1 else "sorted"
