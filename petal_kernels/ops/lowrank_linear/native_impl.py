"""``lowrank_linear`` on the C++ CPU kernels (``csrc/lowrank_linear_cpu_kernel.h``).

Blocks of rows stay in cache while everything is done to them: the shrink, the masks, the update and, in plan
``augment``, the base product in the same accumulators, so that y is written once. The products are register-tiled
for skinny matrices; 16-bit blocks and weights are widened to fp32 once, and results are rounded once.

    update   base by the library, or given; then one read-modify-write pass for the update
    augment  y_k = [x | m_k] [W_k | P_k]^T by the kernels themselves: no second pass, and no 16-bit library GEMM

Limits: CPU tensors, fp32, fp16 or bf16. Numerics: fp32 accumulation in index order; h (and h core_k) are rounded to
x's dtype, nothing else is rounded before a result. Parameters are used as they are, without rounding to x's dtype.
The weight gradients are fp32 partials over a split of the rows that depends on N alone, summed in order: the same
bits for any number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import device, philox

PLANS = ("update", "augment")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SITES = {"bottleneck": 0, "input": 1, "mode": 2}


def unsupported(
    x: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
    base: Sequence[Tensor],
    core: Tensor | None,
    dropout: float,
    dropout_at: str,
    plan: str,
) -> list[str]:
    """Every reason for not running on these tensors."""
    reasons = []
    if plan not in ("auto", *PLANS):
        reasons.append(f"has no plan {plan!r}")
    if plan == "augment" and not weights:
        reasons.append("plan 'augment' needs the base's weights")
    given = [t for t in (x, down, hidden, core, *ups, *weights, *base) if t is not None]
    if any(t.device.type != "cpu" for t in given):
        reasons.append("needs CPU tensors")
    wrong = sorted({str(t.dtype) for t in given if t.dtype not in _DTYPES})
    if wrong:
        reasons.append(f"has no kernels for {', '.join(wrong)}")
    return reasons


@functools.cache
def _library_multiplies(dtype: torch.dtype) -> bool:
    """Whether base products of this dtype go to the library in backward, where no plan is asked for.

    The kernels beat it in fp32 up to AVX2, and in 16 bits wherever the CPU has no native 16-bit products
    (``benchmarks/run.py``); AVX-512 machines keep the library's tuned kernels.
    """
    if dtype == torch.float32:
        return str(torch.ops.petal_native.cpu_isa("")) == "avx512"
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and native_bf16()
    return False


def native_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _dropout(rng: Tensor | None, p: float) -> tuple[int, float]:
    return (0, 1.0) if rng is None else (philox.threshold(p), philox.keep_scale(p))


def forward(
    x: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    base: Sequence[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    plan: str,
) -> tuple[list[Tensor], Tensor]:
    """Outputs [N, O_k] and h [N, R]."""
    device.load_cpu_library()
    like = x if hidden is None else hidden
    assert like is not None
    rows = like.shape[0]
    ys: list[Tensor]
    if weights and plan == "update":
        assert x is not None
        ys = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        base, weights, biases = ys, [], []
    else:
        ys = [like.new_empty((rows, up.shape[0])) for up in ups]
    h = like.new_empty((rows, ups[0].shape[1])) if hidden is None else hidden
    torch.ops.petal_native.lowrank_linear_forward(
        x,
        down,
        hidden,
        list(ups),
        list(weights),
        list(biases) if weights else [],
        list(base),
        core,
        rng,
        scale,
        *_dropout(rng, dropout),
        _SITES[dropout_at],
        ys,
        h if hidden is None else None,
    )
    return ys, h


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor,
    down: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    need_dx: bool,
    need_ddown: bool,
    need_dups: bool,
    need_dcore: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor] | None, Tensor | None]:
    """dx, dh, ddown, dups, dcore. dh is formed in memory only where the bottleneck was given (no ``down``)."""
    device.load_cpu_library()
    dx: Tensor | None = None
    dx_has_base = False
    rows = h.shape[0]
    if need_dx and (down is not None or weights):
        width = weights[0].shape[1] if weights else (down.shape[1] if down is not None else 0)
        if weights and _library_multiplies(h.dtype):
            dx = torch.mm(dys[0], weights[0])
            for dy, w in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, w)
            dx_has_base = True
            weights = []
        else:
            dx = h.new_empty((rows, width))
    dh = h.new_empty((rows, h.shape[1])) if down is None else None
    ddown = torch.empty_like(down) if down is not None and need_ddown else None
    dups = [torch.empty_like(up) for up in ups] if need_dups else None
    dcore = torch.empty_like(core) if core is not None and need_dcore else None
    torch.ops.petal_native.lowrank_linear_backward(
        list(dys),
        x,
        h,
        down,
        list(ups),
        list(weights) if need_dx else [],
        core,
        rng,
        scale,
        *_dropout(rng, dropout),
        _SITES[dropout_at],
        dx_has_base,
        dx,
        dh,
        ddown,
        dups or [],
        dcore,
    )
    return dx, dh, ddown, dups, dcore
