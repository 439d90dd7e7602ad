"""Launch tables of ``gated_bottleneck``'s Triton kernels, and the compiled forms they can ask for.

A row is keyed by kernel, architecture bucket and size bucket: "small" has at most 4096 rows,
"_gated" has the large gate's second bottleneck, "wide" a rank above 128, "fp32" IEEE products
without tensor cores, "fp32_wide" those of a rank above 64. The tiles are as large as compile
without a spill; none has been timed. Architecture 0 is the interpreter: tiles so small that every
test has several programs on every axis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from petal_kernels._runtime.triton_lib import (
    Machine,
    Shipped,
    Tile,
    padded_rank,
    shipped_reduce,
    signature,
    tile,
)
from petal_kernels._runtime.triton_tuned import overlay
from petal_kernels.ops.gated_bottleneck import triton_kernels as tk
from petal_kernels.ops.gated_bottleneck import triton_kernels_bwd as tb
from petal_kernels.ops.gated_bottleneck import triton_kernels_weights as tw

SMALL_ROWS = 4096
ARCHS = (80, 90, 100)
WIDE_RANK = 128
FP32_RANK = 64

_FWD_80 = {
    "small": tile(4, 2, BLOCK_M=32, BLOCK_K=64, BLOCK_O=32, BLOCK_V=16),
    "large": tile(8, 2, BLOCK_M=64, BLOCK_K=64, BLOCK_O=32, BLOCK_V=16),
    "small_gated": tile(4, 2, BLOCK_M=32, BLOCK_K=64, BLOCK_O=32, BLOCK_V=16),
    "large_gated": tile(8, 2, BLOCK_M=64, BLOCK_K=64, BLOCK_O=32, BLOCK_V=16),
    "wide": tile(8, 2, BLOCK_M=32, BLOCK_K=32, BLOCK_O=16, BLOCK_V=16),
    "wide_gated": tile(8, 2, BLOCK_M=32, BLOCK_K=32, BLOCK_O=16, BLOCK_V=16),
    "fp32": tile(8, 2, BLOCK_M=16, BLOCK_K=16, BLOCK_O=16, BLOCK_V=16),
    "fp32_gated": tile(8, 2, BLOCK_M=16, BLOCK_K=16, BLOCK_O=16, BLOCK_V=16),
    "fp32_wide": tile(8, 1, BLOCK_M=16, BLOCK_K=16, BLOCK_O=16, BLOCK_V=16),
}
_ROWS_80 = {
    "small": tile(4, 2, BLOCK_M=32, BLOCK_O=32, BLOCK_V=16),
    "large": tile(4, 2, BLOCK_M=32, BLOCK_O=32, BLOCK_V=16),
    "small_gated": tile(8, 2, BLOCK_M=32, BLOCK_O=16, BLOCK_V=16),
    "large_gated": tile(8, 2, BLOCK_M=32, BLOCK_O=16, BLOCK_V=16),
    "wide": tile(8, 2, BLOCK_M=16, BLOCK_O=16, BLOCK_V=16),
    "wide_gated": tile(8, 2, BLOCK_M=16, BLOCK_O=16, BLOCK_V=16),
    "fp32": tile(4, 1, BLOCK_M=16, BLOCK_O=16, BLOCK_V=16),
    "fp32_gated": tile(8, 1, BLOCK_M=16, BLOCK_O=16, BLOCK_V=16),
    "fp32_wide": tile(8, 1, BLOCK_M=16, BLOCK_O=16, BLOCK_V=16),
}
_ROWS_90 = {
    **_ROWS_80,
    "small": tile(8, 2, BLOCK_M=64, BLOCK_O=32, BLOCK_V=16),
    "large": tile(8, 2, BLOCK_M=64, BLOCK_O=32, BLOCK_V=16),
}
_ROWS_100 = {
    **_ROWS_90,
    "wide": tile(8, 1, BLOCK_M=16, BLOCK_O=16, BLOCK_V=16),
}
_WEIGHTS_80 = {
    "small": tile(8, 2, BLOCK_M=32, BLOCK_W=32),
    "large": tile(8, 2, BLOCK_M=32, BLOCK_W=32),
    "small_gated": tile(8, 2, BLOCK_M=16, BLOCK_W=16),
    "large_gated": tile(8, 2, BLOCK_M=16, BLOCK_W=16),
    "wide": tile(8, 3, BLOCK_M=16, BLOCK_W=16),
    "wide_gated": tile(8, 3, BLOCK_M=16, BLOCK_W=16),
    "fp32": tile(8, 1, BLOCK_M=16, BLOCK_W=16),
    "fp32_gated": tile(8, 1, BLOCK_M=16, BLOCK_W=16),
    "fp32_wide": tile(8, 1, BLOCK_M=16, BLOCK_W=16),
}
_WEIGHTS_100 = {
    **_WEIGHTS_80,
    "small": tile(8, 3, BLOCK_M=16, BLOCK_W=32),
    "large": tile(8, 3, BLOCK_M=16, BLOCK_W=32),
    "fp32_gated": tile(8, 2, BLOCK_M=16, BLOCK_W=16),
}
_WEIGHTS_90 = {
    **_WEIGHTS_100,
    "small_gated": tile(8, 3, BLOCK_M=16, BLOCK_W=32),
    "large_gated": tile(8, 3, BLOCK_M=16, BLOCK_W=32),
}
_INTERPRETER = {
    "fwd": tile(1, 1, BLOCK_M=64, BLOCK_K=32, BLOCK_O=32, BLOCK_V=32),
    "rows": tile(1, 1, BLOCK_M=64, BLOCK_O=16, BLOCK_V=32),
    "weights": tile(1, 1, BLOCK_M=64, BLOCK_W=32),
}
REDUCE = tile(4, 2, BLOCK=1024)

TABLE: dict[tuple[str, int], dict[str, Tile]] = {
    ("fwd", 80): _FWD_80,
    ("fwd", 90): _FWD_80,
    ("fwd", 100): _FWD_80,
    ("rows", 80): _ROWS_80,
    ("rows", 90): _ROWS_90,
    ("rows", 100): _ROWS_100,
    ("weights", 80): _WEIGHTS_80,
    ("weights", 90): _WEIGHTS_90,
    ("weights", 100): _WEIGHTS_100,
}
TABLE = overlay(TABLE, __file__)


@functools.lru_cache(maxsize=1024)
def choose(
    kernel: str, machine: Machine, rows: int, itemsize: int, rank: int, gate_rank: int
) -> dict[str, Any]:
    """Launch keywords: the table's row, BLOCK_R and BLOCK_G. Cached: treat the result as frozen."""
    blocks = {"BLOCK_R": padded_rank(rank), "BLOCK_G": padded_rank(gate_rank)}
    if machine.arch == 0:
        return {**_INTERPRETER[kernel].keywords(), **blocks}
    widest = max(rank, gate_rank)
    if itemsize == 4:
        size = "fp32" if widest <= FP32_RANK else "fp32_wide"
    else:
        size = "wide" if widest > WIDE_RANK else "small" if rows <= SMALL_ROWS else "large"
    if gate_rank and size != "fp32_wide":
        size += "_gated"
    return {**TABLE[kernel, machine.arch][size].keywords(), **blocks}


_KERNELS = {
    "fwd": tk._gated_bottleneck_fwd_kernel,
    "rows": tb._gated_bottleneck_bwd_rows_kernel,
    "weights": tw._gated_bottleneck_bwd_weights_kernel,
    "reduce": tw._gated_bottleneck_bwd_reduce_kernel,
}
# Argument types that do not follow from a row's dtype: trained parameters are float32 by default.
_TYPES = {
    **dict.fromkeys(("logits", "moments", "sums", "weight_a", "token_weights", "part"), "*fp32"),
    **dict.fromkeys(("down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias"), "*fp32"),
    **dict.fromkeys(("gate_down", "gate_down_bias", "gate_up", "gate_up_bias"), "*fp32"),
    **dict.fromkeys(("gate_weight", "gate_bias"), "*fp32"),
    "rng": "*i64",
    "scale": "fp32",
    "eps": "fp32",
}
# What each compiled form has: (gate, route, norm and residual, further switches). Pointers of what
# it lacks are None. A product beside the large gate, which no method has, is left out: it spills.
_FORMS: dict[str, tuple[str, str, bool, dict[str, bool]]] = {
    "adapter": ("none", "none", False, {}),
    "large": ("large", "none", True, {}),
    "middleX": ("middleX", "outer", True, {}),
    "middleY": ("middleY", "mul", True, {}),
    "small-first": ("small", "none", True, {"LOGITS": True, "SUMS": True, "GRADS": False}),
    "small": ("small", "none", True, {"LOGITS": False, "SUMS": False, "GRADS": True}),
    "product": ("none", "product", False, {}),
    "square": ("none", "product", False, {}),
}
# IEEE products hold whole operands in registers: "fp32_wide" runs, but spills, and is left out.
_RANKS = {
    "wide": (256,),
    "wide_gated": (256,),
    "fp32": (FP32_RANK,),
    "fp32_gated": (FP32_RANK,),
    "fp32_wide": (),
}
_KERNEL_FORMS = {
    "fwd": tuple(_FORMS),
    "rows": tuple(_FORMS),
    "weights": ("adapter", "large", "middleX", "middleY", "small"),
}


def _absent(kernel: str, form: str) -> set[str]:
    """Pointers that are None in a form."""
    gate, route, norm, _ = _FORMS[form]
    row_gate = gate in ("middleX", "small")
    absent = {"weight_a"}
    if gate != "large":
        absent |= {"zg", "gate_down", "gate_down_bias", "gate_up", "gate_up_bias", "dzg", "ag"}
    if not row_gate:
        absent |= {"logits", "gate_bias", "token_weights"}
    if gate in ("none", "large"):
        absent |= {"gate_weight"}
    if not norm:
        absent |= {"moments", "norm_weight", "norm_bias", "residual", "dresidual"}
    if not (norm or row_gate):
        absent |= {"sums", "dgate_input"}
    if route == "none":
        absent |= {"left", "dq"}
    if route not in ("outer", "product") or form == "square":
        absent |= {"right"}
    if kernel == "fwd" and form == "small-first":
        absent |= {"out", "moments"}
    if kernel == "fwd" and form == "small":
        absent |= {"x", "down", "down_bias"}
    if kernel == "weights" and norm:
        absent |= {"x", "gate_input"}
    return absent | {f"p_{n}" for n in absent}


def _shipped(kernel: str, arch: int, size: str, row: Tile, rank: int, form: str) -> Shipped:
    fn = _KERNELS[kernel]
    element = "fp32" if size.startswith("fp32") else "bf16"
    gate, route, _, switches = _FORMS[form]
    constexprs: dict[str, Any] = {
        "ACT": "gelu_tanh", "ROUTE": route, "RELU": route == "product", "GATE": gate,
        "LINEAR": False, "LOGITS": True, "SEES_OUTPUT": False, "SUMS": True, "GRADS": True,
        "OUT": True, "ADD_INPUT": True, "ADD_GATE_INPUT": True, "PRECISION": "ieee",
        "BLOCK_R": rank, "BLOCK_G": rank, **dict(row.blocks), **switches,
    }  # fmt: skip
    constexprs = {n: v for n, v in constexprs.items() if n in fn.arg_names}
    return Shipped(
        f"{kernel} {element} r{rank} {size} {form}",
        fn,
        signature(fn, constexprs, _absent(kernel, form), _TYPES, element),
        constexprs,
        {"num_warps": row.warps, "num_stages": row.stages},
        (arch,),
        element != "fp32",
    )


def shipped_configs() -> Iterator[Shipped]:
    """Every compiled form the tables can ask for: kernel x architecture x size x rank x form."""
    for (kernel, arch), sizes in TABLE.items():
        for size, row in sizes.items():
            for rank in _RANKS.get(size, (16, 128)):
                for form in _KERNEL_FORMS[kernel]:
                    if size.endswith("_gated") == (_FORMS[form][0] == "large"):
                        yield _shipped(kernel, arch, size, row, rank, form)
    yield from shipped_reduce(_KERNELS["reduce"], REDUCE, ARCHS)
