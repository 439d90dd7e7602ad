"""Launch tables of ``expert_dispatch``'s Triton kernels, and the compiled forms they can ask for.

A row is keyed by kernel, architecture bucket and size bucket: "small" has at most 4096 rows, "wide"
a rank above 64, "fp32" IEEE products without tensor cores, "fp32_wide" those of a rank above 64.
The tiles are as large as compile without a spill; none has been timed. Architecture 0 is the
interpreter: tiles so small that every test has several programs on every axis.
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
from petal_kernels.ops.expert_dispatch import triton_kernels as tk
from petal_kernels.ops.expert_dispatch import triton_kernels_bwd as tb
from petal_kernels.ops.expert_dispatch import triton_kernels_weights as tw

SMALL_ROWS = 4096
ARCHS = (80, 90, 100)
WIDE_RANK = 64
SHIPPED_EXPERTS = 16

_ROUTE = {
    "small": tile(4, 3, BLOCK_M=32, BLOCK_K=64),
    "large": tile(4, 3, BLOCK_M=64, BLOCK_K=64),
    "wide": tile(4, 3, BLOCK_M=64, BLOCK_K=64),
    "fp32": tile(4, 2, BLOCK_M=32, BLOCK_K=32),
    "fp32_wide": tile(4, 2, BLOCK_M=32, BLOCK_K=32),
}
_SHRINK = {
    "small": tile(4, 3, BLOCK_M=32, BLOCK_K=64),
    "large": tile(4, 3, BLOCK_M=64, BLOCK_K=64),
    "wide": tile(8, 3, BLOCK_M=64, BLOCK_K=64),
    "fp32": tile(8, 2, BLOCK_M=16, BLOCK_K=16),
    "fp32_wide": tile(8, 1, BLOCK_M=16, BLOCK_K=16),
}
_FWD_80 = {
    "small": tile(8, 2, BLOCK_M=32, BLOCK_K=64, BLOCK_O=32),
    "large": tile(8, 2, BLOCK_M=64, BLOCK_K=64, BLOCK_O=64),
    "wide": tile(8, 2, BLOCK_M=32, BLOCK_K=32, BLOCK_O=32),
    "fp32": tile(8, 1, BLOCK_M=16, BLOCK_K=32, BLOCK_O=16),
    "fp32_wide": tile(8, 1, BLOCK_M=16, BLOCK_K=16, BLOCK_O=16),
}
_FWD_90 = {**_FWD_80, "fp32": tile(8, 1, BLOCK_M=16, BLOCK_K=16, BLOCK_O=16)}
_FWD_100 = {
    **_FWD_90,
    "large": tile(8, 2, BLOCK_M=32, BLOCK_K=64, BLOCK_O=32),
    "wide": tile(8, 2, BLOCK_M=32, BLOCK_K=32, BLOCK_O=64),
}
_SLOTS = {
    "small": tile(4, 2, BLOCK_M=32, BLOCK_O=64),
    "large": tile(8, 3, BLOCK_M=64, BLOCK_O=64),
    "wide": tile(8, 2, BLOCK_M=32, BLOCK_O=32),
    "fp32": tile(8, 2, BLOCK_M=16, BLOCK_O=16),
    "fp32_wide": tile(8, 1, BLOCK_M=16, BLOCK_O=16),
}
_ROWS_80 = {
    "small": tile(8, 2, BLOCK_M=32, BLOCK_O=64),
    "large": tile(8, 2, BLOCK_M=64, BLOCK_O=64),
    "wide": tile(8, 2, BLOCK_M=32, BLOCK_O=32),
    "fp32": tile(8, 1, BLOCK_M=16, BLOCK_O=16),
    "fp32_wide": tile(8, 1, BLOCK_M=16, BLOCK_O=16),
}
_ROWS_100 = {
    **_ROWS_80,
    "large": tile(8, 1, BLOCK_M=64, BLOCK_O=32),
    "wide": tile(8, 2, BLOCK_M=32, BLOCK_O=16),
    "fp32": tile(4, 1, BLOCK_M=16, BLOCK_O=16),
}
_WEIGHTS_80 = {
    "small": tile(4, 3, BLOCK_M=32, BLOCK_W=64),
    "large": tile(4, 3, BLOCK_M=64, BLOCK_W=64),
    "wide": tile(8, 2, BLOCK_M=32, BLOCK_W=64),
    "fp32": tile(8, 2, BLOCK_M=16, BLOCK_W=16),
    "fp32_wide": tile(8, 1, BLOCK_M=16, BLOCK_W=16),
}
_WEIGHTS_100 = {**_WEIGHTS_80, "wide": tile(8, 2, BLOCK_M=32, BLOCK_W=32)}
_INTERPRETER = {
    "route": tile(1, 1, BLOCK_M=64, BLOCK_K=32),
    "shrink": tile(1, 1, BLOCK_M=32, BLOCK_K=32),
    "fwd": tile(1, 1, BLOCK_M=64, BLOCK_K=32, BLOCK_O=32),
    "slots": tile(1, 1, BLOCK_M=32, BLOCK_O=16),
    "rows": tile(1, 1, BLOCK_M=64, BLOCK_O=32),
    "weights": tile(1, 1, BLOCK_M=64, BLOCK_W=32),
}
REDUCE = tile(4, 2, BLOCK=1024)
TABLE: dict[tuple[str, int], dict[str, Tile]] = {
    **{("route", arch): _ROUTE for arch in ARCHS},
    **{("shrink", arch): _SHRINK for arch in ARCHS},
    ("fwd", 80): _FWD_80,
    ("fwd", 90): _FWD_90,
    ("fwd", 100): _FWD_100,
    **{("slots", arch): _SLOTS for arch in ARCHS},
    ("rows", 80): _ROWS_80,
    ("rows", 90): _ROWS_80,
    ("rows", 100): _ROWS_100,
    ("weights", 80): _WEIGHTS_80,
    ("weights", 90): _WEIGHTS_80,
    ("weights", 100): _WEIGHTS_100,
}
TABLE = overlay(TABLE, __file__)


@functools.lru_cache(maxsize=1024)
def choose(
    kernel: str, machine: Machine, rows: int, itemsize: int, rank: int, experts: int
) -> dict[str, Any]:
    """Launch keywords: the table's row and the padded extents it takes. Cached: treat the result as
    frozen."""
    blocks = {"BLOCK_E": padded_rank(experts)}
    if kernel != "route":
        blocks["BLOCK_R"] = padded_rank(rank)
    if machine.arch == 0:
        return {**_INTERPRETER[kernel].keywords(), **blocks}
    if itemsize == 4:
        size = "fp32" if rank <= WIDE_RANK else "fp32_wide"
    else:
        size = "wide" if rank > WIDE_RANK else "small" if rows <= SMALL_ROWS else "large"
    return {**TABLE[kernel, machine.arch][size].keywords(), **blocks}


_KERNELS = {
    "route": tk._expert_dispatch_route_kernel,
    "shrink": tk._expert_dispatch_shrink_kernel,
    "fwd": tk._expert_dispatch_fwd_kernel,
    "slots": tb._expert_dispatch_bwd_slots_kernel,
    "rows": tb._expert_dispatch_bwd_rows_kernel,
    "weights": tw._expert_dispatch_bwd_weights_kernel,
}
# Argument types that do not follow from a row's dtype: trained parameters are float32 by default.
_TYPES = {
    **dict.fromkeys(("logits", "dl", "dlogits", "dg", "dgates"), "*fp32"),
    **dict.fromkeys(("down", "down_bias", "up", "up_bias", "router", "router_bias"), "*fp32"),
    "chosen": "*i8",
    "slot_of": "*i32",
    "order": "*i32",
    "offsets": "*i32",
    "keep": "fp32",
    "mix": "fp32",
}
# What each compiled form lacks, and its switches.
_SORT = ("slot_of", "order", "offsets")
_ROUTER = ("router", "router_bias", "noise", "logits", "dl", "dlogits")
_FORMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "softmax": (("chosen", "gates", "dgates", *_SORT), {"GATE": "softmax"}),
    "topk": (("gates", "dgates", *_SORT), {"GATE": "topk"}),
    "sorted": (("gates", "dgates"), {"GATE": "topk"}),
    "given": (_ROUTER + _SORT, {"GATE": "given"}),
    "shared": (("chosen", "gates", "dgates", *_SORT), {"GATE": "softmax", "SHARED": True}),
    "mean": (("chosen", "gates", "dgates", "dg", *_ROUTER, *_SORT), {"GATE": "mean"}),
}
_KERNEL_FORMS = {
    **dict.fromkeys(("route", "shrink", "slots"), ("sorted",)),
    **dict.fromkeys(("fwd", "rows"), tuple(_FORMS)),
    "weights": ("softmax", "topk", "sorted", "given"),  # whose code the others' is
}
# Left out, because they run but spill: ranks above 128, and "fp32_wide", for IEEE products hold
# whole operands in registers.
_RANKS = {"wide": (128,), "fp32": (64,), "fp32_wide": ()}


def _shipped(
    kernel: str, arch: int, size: str, row: Tile, rank: int, form: str, element: str, up: bool
) -> Shipped:
    fn = _KERNELS[kernel]
    absent, switches = _FORMS[form]
    absent += () if form == "sorted" else ("dg",)
    if kernel == "weights":
        absent += ("dl", "p_vector") if up else ("logits", "gates")
        absent += () if up or "router" not in absent else ("p_wide",)
    constexprs: dict[str, Any] = {
        "ACT": "gelu_tanh", "RENORM": True, "SHARED": False, "ADD_INPUT": True, "UP": up,
        "PRECISION": "ieee", "BLOCK_R": rank, "BLOCK_E": SHIPPED_EXPERTS, **dict(row.blocks),
        **switches,
    }  # fmt: skip
    constexprs = {n: v for n, v in constexprs.items() if n in fn.arg_names}
    label = ("_up" if up else "_down") if kernel == "weights" else ""
    return Shipped(
        f"{kernel}{label} {element} r{rank} {size} {form}",
        fn,
        signature(fn, constexprs, absent, _TYPES, element),
        constexprs,
        {"num_warps": row.warps, "num_stages": row.stages},
        (arch,),
        element != "fp32",
    )


def shipped_configs() -> Iterator[Shipped]:
    """The compiled forms that the tables ask for: kernel x architecture x size x rank x form; of
    rank 16 and of fp16, whose code is bf16's, those that differ most."""
    for (kernel, arch), sizes in TABLE.items():
        forms = _KERNEL_FORMS[kernel]
        for size, row in sizes.items():
            element = "fp32" if size.startswith("fp32") else "bf16"
            found = [
                (rank, form, element)
                for rank in _RANKS.get(size, (16, 64))
                for form in forms
                if rank > 16 or form in ("topk", "sorted")
            ]
            if size == "large":
                found.append((64, forms[0], "fp16"))
            for rank, form, kind in found:
                for up in (True, False) if kernel == "weights" else (True,):
                    yield _shipped(kernel, arch, size, row, rank, form, kind, up)
    yield from shipped_reduce(tw._expert_dispatch_bwd_reduce_kernel, REDUCE, ARCHS)
