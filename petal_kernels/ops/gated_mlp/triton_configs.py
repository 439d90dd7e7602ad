"""Launch tables of ``gated_mlp``'s Triton kernels, and the compiled forms they can ask for.

A row is keyed by kernel, architecture bucket and the operands' bits; "rows" and "down" are the
backward kernel without a product and with one. None has been timed. Architecture 0 is the
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
from petal_kernels.ops.gated_mlp import triton_kernels as tk

ARCHS = (80, 90, 100)
# A program's share of R, so that any rank fits the same tile.
RANK_SLICE = 64

_ROWS: dict[str, dict[str, Tile]] = {
    "fwd": {
        "16": tile(4, 1, BLOCK_M=16, BLOCK_F=256),
        "32": tile(4, 1, BLOCK_M=16, BLOCK_F=128),
    },
    "rows": {
        "16": tile(4, 1, BLOCK_M=16, BLOCK_F=128),
        "32": tile(4, 1, BLOCK_M=16, BLOCK_F=64),
    },
    "down": {
        "16": tile(8, 3, BLOCK_M=32, BLOCK_F=128),
        "32": tile(8, 2, BLOCK_M=16, BLOCK_F=32),
    },
}
# Its register-fed tensor cores want a smaller tile.
_ROWS_80 = {
    **_ROWS,
    "down": _ROWS["down"] | {"16": tile(8, 3, BLOCK_M=32, BLOCK_F=64)},
}
_INTERPRETER = {
    "fwd": tile(1, 1, BLOCK_M=64, BLOCK_F=32),
    "rows": tile(1, 1, BLOCK_M=64, BLOCK_F=32),
    "down": tile(1, 1, BLOCK_M=64, BLOCK_F=32),
}
REDUCE = tile(4, 2, BLOCK=1024)
TABLE: dict[tuple[str, int], dict[str, Tile]] = {
    (kernel, arch): (_ROWS_80 if arch == 80 else _ROWS)[kernel]
    for arch in ARCHS
    for kernel in _ROWS
}
TABLE = overlay(TABLE, __file__)


@functools.lru_cache(maxsize=256)
def choose(kernel: str, machine: Machine, itemsize: int, rank: int = 0) -> dict[str, Any]:
    """Launch keywords: the table's row, and of backward BLOCK_R. Cached: treat the result as
    frozen."""
    blocks = {} if kernel == "fwd" else {"BLOCK_R": min(padded_rank(rank), RANK_SLICE)}
    if machine.arch == 0:
        return {**_INTERPRETER[kernel].keywords(), **blocks}
    return {**TABLE[kernel, machine.arch][str(8 * itemsize)].keywords(), **blocks}


_KERNELS = {
    "fwd": tk._gated_mlp_act_fwd_kernel,
    "rows": tk._gated_mlp_act_bwd_kernel,
    "down": tk._gated_mlp_act_bwd_kernel,
}
# What a compiled form lacks, beside the activation.
_PLAIN = ("u", "du")
_NO_PRODUCT = ("dh", "part", "rng")
_FORMS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "fwd": (("silu", ()), ("gelu_tanh", ()), ("gelu", _PLAIN)),
    "rows": (("silu", _NO_PRODUCT), ("gelu_tanh", _NO_PRODUCT), ("gelu", _PLAIN + _NO_PRODUCT)),
    "down": (
        ("silu", ()),
        ("silu", ("rng",)),
        ("gelu_tanh", ()),
        ("gelu", _PLAIN),
        ("silu", ("dp", "du")),
    ),
}
_TYPES = {"part": "*fp32", "rng": "*i64", "keep_scale": "fp32"}


def shipped_configs() -> Iterator[Shipped]:
    """The compiled forms that the tables ask for: kernel x architecture x dtype x form x rank; of
    fp16, whose code is bf16's, one."""
    for (kernel, arch), sizes in TABLE.items():
        for bits, row in sizes.items():
            element = "bf16" if bits == "16" else "fp32"
            for form in _FORMS[kernel]:
                for rank in (16, 64) if kernel == "down" else (16,):
                    yield _shipped(kernel, arch, row, element, form, rank)
    for arch in ARCHS:
        row = TABLE["down", arch]["16"]
        yield _shipped("down", arch, row, "fp16", _FORMS["down"][0], 64)
    yield from shipped_reduce(tk._gated_mlp_act_bwd_reduce_kernel, REDUCE, ARCHS)


def _shipped(
    kernel: str,
    arch: int,
    row: Tile,
    element: str,
    form: tuple[str, tuple[str, ...]],
    rank: int,
) -> Shipped:
    fn, (name, absent) = _KERNELS[kernel], form
    constexprs: dict[str, Any] = {
        "ACT": name, "PRECISION": "ieee", "BLOCK_R": rank, **dict(row.blocks)
    }  # fmt: skip
    constexprs = {n: v for n, v in constexprs.items() if n in fn.arg_names}
    lacks = "".join(f" no_{each}" for each in absent)
    return Shipped(
        f"{kernel} {element} r{rank} {name}{lacks}",
        fn,
        signature(fn, constexprs, absent, _TYPES, element),
        constexprs,
        {"num_warps": row.warps, "num_stages": row.stages},
        (arch,),
        kernel == "down" and element != "fp32",
    )
