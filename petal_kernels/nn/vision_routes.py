"""Vision features beside rows: what a route wants of them, and routes between tokens, with as many
of vision as of text.

    add, mul   q = z + v, q = z * v      variant="release", V = L: element by element, as the
                                         released code of routing functions does (arXiv 2403.09377)
    xt         q = z (z^T v)             z z^T v of the released code, with a true transpose: its
                                         own reshape mixes tokens and channels

with z [B, L, r], v [B, V, r] through the same down-projection. The operator's own routes need one
vector or one matrix of each sample; these are formed here, r wide, and given to it as its
bottleneck.
"""

from __future__ import annotations

from torch import Tensor

from petal_kernels.nn.arguments import check_rows

BETWEEN_TOKENS = ("xt",)  # whatever the variant
ONE_EACH = ("add", "mul")  # in "release", where V > 1


def joins(route: str, variant: str, vision: Tensor | None) -> bool:
    """Whether a route is formed here."""
    if vision is None or route in BETWEEN_TOKENS:
        return vision is not None
    return variant == "release" and route in ONE_EACH and vision.shape[1] > 1


def joined(route: str, z: Tensor, vision: Tensor) -> Tensor:
    """q [B, L, r] of z [B, L, r] and `vision` [B, L, r]."""
    if route == "xt":
        return z @ (z.mT @ vision)
    return z + vision if route == "add" else z * vision


def check_vision(
    vision: Tensor | None, route: str, rank: int, like: Tensor, variant: str
) -> None:
    """Raise unless `vision` is what the route wants beside the rows `like`: [B, V, rank], or None
    without a route."""
    if route == "none":
        if vision is not None:
            got = type(vision).__name__
            raise ValueError(f"vision: want None with route='none', got a {got}")
        return
    if vision is None:
        raise TypeError(f"vision: want a Tensor with route={route!r}, got None")
    check_rows("vision", vision, rank, lead=("B", "V"))
    if vision.is_meta and not like.is_meta:
        raise ValueError("vision: want a tensor with values, got one on device meta")
    if vision.shape[1] < 1:
        raise ValueError(f"vision: want V >= 1, got {list(vision.shape)}")
    if like.shape[0] != vision.shape[0] and (not len(vision) or like.shape[0] % len(vision)):
        raise ValueError(
            f"vision: want features for a batch that divides the hidden states' {like.shape[0]}, "
            f"got {vision.shape[0]}"
        )
    check_tokens(route, variant, vision.shape[1], like.shape[1])


def expand_vision(vision: Tensor, like: Tensor) -> Tensor:
    """`vision` [B, V, r] for the batch of `like`: repeated where that is a multiple of B."""
    want, have = like.shape[0], vision.shape[0]
    return vision if want == have else vision.repeat_interleave(want // have, dim=0)


def check_tokens(route: str, variant: str, tokens: int, length: int) -> None:
    """ValueError where a route of that variant has no meaning for V = `tokens` and L = `length`."""
    if route in BETWEEN_TOKENS:
        wanted = [length]
    elif variant == "release" and route in ONE_EACH:
        wanted = sorted({1, length})
    elif variant == "release" and route == "expand":
        wanted = [1]
    else:
        return
    if tokens not in wanted:
        of = f"route={route!r}" + (f", variant={variant!r}" if variant == "release" else "")
        raise ValueError(
            f"vision: want V = {' or '.join(map(str, wanted))} tokens with {of} for L = {length} "
            f"hidden states, got {tokens}"
        )
