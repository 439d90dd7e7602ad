"""Launch tables of ``lowrank_linear``'s Triton kernels, and the list of compiled forms they can ask
for.

A row is keyed by kernel, architecture bucket and size bucket: "small" has at most 2048 rows, "fp32"
is IEEE products without tensor cores. In the kernels that hold all columns of h at once, "_wide"
is more than 64, and "_many" a program that serves several down-projections. Architecture 0 is the
interpreter: tiles so small that every test has several programs on every axis. Nothing is tuned at
run time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from petal_kernels._runtime.triton_lib import Machine, Shipped, Tile, padded_rank, tile
from petal_kernels._runtime.triton_tuned import overlay
from petal_kernels.ops.lowrank_linear import triton_gemm_ext as gx
from petal_kernels.ops.lowrank_linear import triton_kernels as tk
from petal_kernels.ops.lowrank_linear import triton_kernels_bwd as tb
from petal_kernels.ops.lowrank_linear import triton_kernels_weights as tw

SMALL_ROWS = 2048
ARCHS = (80, 90, 100)
# Kernels that step through R in slices of at most this, so that any rank fits the same tile.
RANK_SLICE = 64
# Columns of h, each rank padded, that one program holds at most.
MAX_COLUMNS = 256

_SHRINK_80 = {
    "small": tile(4, 4, BLOCK_M=16, BLOCK_K=64),
    "large": tile(4, 4, BLOCK_M=64, BLOCK_K=64),
    "small_wide": tile(4, 3, BLOCK_M=16, BLOCK_K=32),
    "large_wide": tile(8, 3, BLOCK_M=64, BLOCK_K=32),
    "fp32": tile(4, 2, BLOCK_M=32, BLOCK_K=16),
    "fp32_wide": tile(8, 2, BLOCK_M=32, BLOCK_K=16),
}
_SHRINK_MANY = {
    "small_many": tile(4, 4, BLOCK_M=16, BLOCK_K=64),
    "large_many": tile(8, 3, BLOCK_M=64, BLOCK_K=64),
    "small_many_wide": tile(8, 3, BLOCK_M=16, BLOCK_K=32),
    "large_many_wide": tile(8, 3, BLOCK_M=64, BLOCK_K=32),
    "fp32_many": tile(8, 3, BLOCK_M=32, BLOCK_K=16),
    "fp32_many_wide": tile(8, 3, BLOCK_M=32, BLOCK_K=16),
}
_EXPAND_80 = {
    "small": tile(4, 2, BLOCK_M=32, BLOCK_O=64),
    "large": tile(8, 2, BLOCK_M=64, BLOCK_O=128),
    "fp32": tile(4, 2, BLOCK_M=32, BLOCK_O=64),
}
_EXPAND_90 = {**_EXPAND_80, "large": tile(8, 2, BLOCK_M=128, BLOCK_O=128)}
_THROUGH_MANY = {
    "small_many": tile(4, 2, BLOCK_M=32, BLOCK_O=64),
    "large_many": tile(8, 2, BLOCK_M=64, BLOCK_O=128),
    "fp32_many": tile(4, 2, BLOCK_M=32, BLOCK_O=64),
}
_DH_80 = {
    "small": tile(4, 4, BLOCK_M=16, BLOCK_O=64),
    "large": tile(4, 4, BLOCK_M=64, BLOCK_O=64),
    "small_wide": tile(4, 3, BLOCK_M=16, BLOCK_O=32),
    "large_wide": tile(8, 3, BLOCK_M=64, BLOCK_O=32),
    "fp32": tile(4, 2, BLOCK_M=32, BLOCK_O=16),
    "fp32_wide": tile(8, 2, BLOCK_M=32, BLOCK_O=16),
}
_TN_80 = {
    "small": tile(4, 3, BLOCK_M=64, BLOCK_O=64),
    "large": tile(4, 3, BLOCK_M=64, BLOCK_O=64),
    "small_wide": tile(8, 3, BLOCK_M=32, BLOCK_O=64),
    "large_wide": tile(8, 3, BLOCK_M=32, BLOCK_O=64),
    "fp32": tile(4, 2, BLOCK_M=16, BLOCK_O=32),
    "fp32_wide": tile(8, 2, BLOCK_M=16, BLOCK_O=32),
}
_TN_MANY = {
    "small_many": tile(8, 3, BLOCK_M=64, BLOCK_O=64),
    "large_many": tile(8, 3, BLOCK_M=64, BLOCK_O=64),
    "small_many_wide": tile(8, 3, BLOCK_M=32, BLOCK_O=64),
    "large_many_wide": tile(8, 3, BLOCK_M=32, BLOCK_O=64),
    "fp32_many": tile(8, 3, BLOCK_M=16, BLOCK_O=32),
    "fp32_many_wide": tile(8, 3, BLOCK_M=16, BLOCK_O=32),
}
_GEMM_80 = {
    "small": tile(4, 3, BLOCK_M=64, BLOCK_O=64, BLOCK_K=64, GROUP_M=8),
    "large": tile(8, 3, BLOCK_M=128, BLOCK_O=128, BLOCK_K=32, GROUP_M=8),
    "fp32": tile(4, 2, BLOCK_M=32, BLOCK_O=64, BLOCK_K=16, GROUP_M=8),
}
_DX_80 = {
    "small": tile(4, 3, BLOCK_M=64, BLOCK_O=64, BLOCK_K=64, GROUP_M=8),
    "large": tile(8, 3, BLOCK_M=128, BLOCK_O=32, BLOCK_K=128, GROUP_M=8),
    "fp32": tile(4, 2, BLOCK_M=32, BLOCK_O=16, BLOCK_K=64, GROUP_M=8),
}

_INTERPRETER = {
    "shrink": tile(1, 1, BLOCK_M=64, BLOCK_K=32),
    "expand": tile(1, 1, BLOCK_M=64, BLOCK_O=32),
    "dh": tile(1, 1, BLOCK_M=64, BLOCK_O=32),
    "through": tile(1, 1, BLOCK_M=64, BLOCK_O=32),
    "tn": tile(1, 1, BLOCK_M=64, BLOCK_O=32),
    "tn_x": tile(1, 1, BLOCK_M=64, BLOCK_O=32),
    "gemm_ext": tile(1, 1, BLOCK_M=64, BLOCK_O=32, BLOCK_K=32, GROUP_M=2),
    "dx": tile(1, 1, BLOCK_M=64, BLOCK_O=32, BLOCK_K=32, GROUP_M=2),
}

TABLE: dict[tuple[str, int], dict[str, Tile]] = {
    ("shrink", 80): {
        **_SHRINK_80,
        **_SHRINK_MANY,
        "large_many_wide": tile(8, 2, BLOCK_M=32, BLOCK_K=32),
    },
    ("shrink", 90): {**_SHRINK_80, **_SHRINK_MANY},
    ("shrink", 100): {
        **_SHRINK_80,
        **_SHRINK_MANY,
        "fp32_many_wide": tile(8, 2, BLOCK_M=16, BLOCK_K=16),
    },
    ("expand", 80): _EXPAND_80,
    ("expand", 90): _EXPAND_90,
    ("expand", 100): _EXPAND_90,
    ("dh", 80): {**_DH_80, "large": tile(8, 3, BLOCK_M=64, BLOCK_O=64)},
    ("dh", 90): _DH_80,
    ("dh", 100): {
        **_DH_80,
        "small": tile(4, 3, BLOCK_M=16, BLOCK_O=64),
        "small_wide": tile(8, 3, BLOCK_M=16, BLOCK_O=32),
        "fp32": tile(8, 2, BLOCK_M=32, BLOCK_O=16),
        "fp32_wide": tile(8, 3, BLOCK_M=32, BLOCK_O=16),
    },
    ("through", 80): {
        **_EXPAND_80,
        **_THROUGH_MANY,
        "large_many": tile(8, 2, BLOCK_M=64, BLOCK_O=64),
    },
    ("through", 90): {**_EXPAND_90, **_THROUGH_MANY},
    ("through", 100): {**_EXPAND_90, **_THROUGH_MANY},
    ("tn", 80): _TN_80,
    ("tn", 90): _TN_80,
    ("tn", 100): _TN_80,
    ("tn_x", 80): {
        **_TN_80,
        **_TN_MANY,
        "small_many_wide": tile(8, 3, BLOCK_M=32, BLOCK_O=32),
        "large_many_wide": tile(8, 3, BLOCK_M=32, BLOCK_O=32),
        "fp32_many_wide": tile(4, 2, BLOCK_M=16, BLOCK_O=32),
    },
    ("tn_x", 90): {**_TN_80, **_TN_MANY},
    ("tn_x", 100): {
        **_TN_80,
        **_TN_MANY,
        "fp32_many_wide": tile(4, 2, BLOCK_M=16, BLOCK_O=32),
    },
    ("gemm_ext", 80): _GEMM_80,
    ("gemm_ext", 90): {
        **_GEMM_80,
        "large": tile(8, 3, BLOCK_M=128, BLOCK_O=256, BLOCK_K=64, GROUP_M=8),
    },
    ("gemm_ext", 100): {
        **_GEMM_80,
        "large": tile(8, 3, BLOCK_M=128, BLOCK_O=256, BLOCK_K=64, GROUP_M=8),
        "fp32": tile(4, 3, BLOCK_M=32, BLOCK_O=64, BLOCK_K=16, GROUP_M=8),
    },
    ("dx", 80): _DX_80,
    ("dx", 90): {
        **_DX_80,
        "large": tile(8, 3, BLOCK_M=128, BLOCK_O=64, BLOCK_K=256, GROUP_M=8),
    },
    ("dx", 100): {
        **_DX_80,
        "large": tile(8, 3, BLOCK_M=128, BLOCK_O=64, BLOCK_K=128, GROUP_M=8),
    },
}
TABLE = overlay(TABLE, __file__)


def swaps(machine: Machine, rows: int) -> bool:
    """Whether shrink and dh compute the transposed product, whose rows are R: pays when row tiles
    are small."""
    return rows <= (130 if machine.arch == 0 else SMALL_ROWS)


@functools.lru_cache(maxsize=1024)
def choose(
    kernel: str, machine: Machine, rows: int, itemsize: int, rank: int, each: int = 1
) -> dict[str, Any]:
    """Launch keywords: the table's row and BLOCK_R, for programs that serve ``each``
    down-projections. Cached: treat the result as frozen."""
    padded = padded_rank(rank)
    whole = kernel in ("shrink", "dh", "tn", "tn_x")
    block_r = padded if whole else min(padded, RANK_SLICE)
    if machine.arch == 0:
        return {**_INTERPRETER[kernel].keywords(), "BLOCK_R": block_r}
    table = TABLE[kernel, machine.arch]
    size = "small" if rows <= SMALL_ROWS else "large"
    if itemsize == 4:
        size = "fp32"
    if each > 1:
        size += "_many"
    if whole and padded * each > RANK_SLICE:
        size += "_wide"
    return {**table[size].keywords(), "BLOCK_R": block_r}


_POINTERS = {
    "shrink": ("x", "u*", "h"),
    "expand": ("y*", "base*", "p*", "h"),
    "dh": ("dy*", "p*", "g"),
    "through": ("dx", "base", "p*", "dh"),
    "tn": ("big*", "x", "small", "dh", "part"),
    "tn_x": ("x", "dh", "part"),
    "gemm_ext": ("y*", "w*", "b*", "p*", "x", "h"),
    "dx": ("dx", "dy*", "w*", "dh", "u"),
    "reduce": ("part", "d*", "du"),
}
_PARAMETERS = ("p", "u", "d", "du")  # may be float32 beside 16-bit activations
_KERNELS = {
    "shrink": tk._lowrank_linear_shrink_kernel,
    "expand": tk._lowrank_linear_expand_kernel,
    "dh": tb._lowrank_linear_bwd_dh_kernel,
    "through": tb._lowrank_linear_bwd_through_kernel,
    "tn": tw._lowrank_linear_bwd_tn_kernel,
    "tn_x": tw._lowrank_linear_bwd_tn_x_kernel,
    "reduce": tw._lowrank_linear_bwd_reduce_kernel,
    "gemm_ext": gx._lowrank_linear_gemm_ext_kernel,
    "dx": gx._lowrank_linear_bwd_dx_kernel,
}
_UNROLLED = ("shrink", "tn_x")  # over the down-projections
# The constexpr switches worth compiling; each row is one compiled form.
_FORMS: dict[str, tuple[dict[str, bool], ...]] = {
    "shrink": ({"DROPOUT": False}, {"DROPOUT": True}),
    "expand": (
        {"HAS_BASE": True, "P_TRANSPOSED": False, "DROPOUT": True},
        {"HAS_BASE": True, "P_TRANSPOSED": True, "DROPOUT": False},
        {"HAS_BASE": False, "P_TRANSPOSED": True, "DROPOUT": True},
    ),
    "dh": (
        {"DROPOUT": True, "SEPARATE": False, "P_TRANSPOSED": False},
        {"DROPOUT": False, "SEPARATE": False, "P_TRANSPOSED": True},
        {"DROPOUT": True, "SEPARATE": True, "P_TRANSPOSED": False},
        {"DROPOUT": False, "SEPARATE": True, "P_TRANSPOSED": False},
    ),
    "through": (
        {"HAS_BASE": True, "P_TRANSPOSED": True, "DROPOUT": False},
        {"HAS_BASE": True, "P_TRANSPOSED": True, "DROPOUT": True},
    ),
    "tn": ({"DROPOUT": True}, {"DROPOUT": False}),
    "tn_x": ({"DROPOUT": False}, {"DROPOUT": True}),
    "gemm_ext": (
        {"HAS_BIAS": True, "W_TRANSPOSED": False, "P_TRANSPOSED": False, "DROPOUT": True},
        {"HAS_BIAS": False, "W_TRANSPOSED": True, "P_TRANSPOSED": True, "DROPOUT": False},
    ),
    "dx": ({"W_TRANSPOSED": False, "DROPOUT": True}, {"W_TRANSPOSED": True, "DROPOUT": False}),
    "reduce": ({"HAS_DOWN": True, "P_TRANSPOSED": False},),
}
# Ranks to compile, and how many down-projections one program serves, by the end of a size's name.
_RANKS = {
    "": ((16, 1), (64, 1)),
    "_wide": ((128, 1), (256, 1)),
    "_many": ((16, 3), (16, 4), (32, 2)),
    "_many_wide": ((32, 4), (64, 3), (64, 4)),
}
_LOOPED = ((16, 3), (64, 3))  # where slices of R are looped over, and the down-projections too


def _signature(kernel: str, element: str, parameter: str) -> dict[str, str]:
    """Argument types by name, of what the launcher passes."""
    types: dict[str, str] = {"rng_ptr": "*i64", "part_ptr": "*fp32"}
    for name in _POINTERS[kernel]:
        if name == "part":
            continue
        kind = "*" + (parameter if name.rstrip("*") in _PARAMETERS else element)
        names = [f"{name[:-1]}{i}" for i in range(4)] if name.endswith("*") else [name]
        types.update({f"{n}_ptr": kind for n in names})
    for n in ("keep_scale", *(f"alpha{i}" for i in range(4))):
        types[n] = "fp32"
    wanted = [a for a in _KERNELS[kernel].arg_names if not a.isupper() or a in "NDRK"]
    return {a: types.get(a, "i32") for a in wanted}


def shipped_configs() -> Iterator[Shipped]:
    """Every compiled form the tables can ask for: kernel x architecture x size x dtype x
    switches."""
    for (kernel, arch), sizes in TABLE.items():
        for size, row in sizes.items():
            element = "fp32" if size.startswith("fp32") else "bf16"
            suffix = size.removeprefix(size.partition("_")[0])
            looped = kernel == "through" and suffix == "_many"
            for rank in _LOOPED if looped else _RANKS[suffix]:
                for form in _FORMS[kernel]:
                    for parameter in _parameters(kernel, element, form):
                        yield _shipped(kernel, arch, size, row, element, parameter, rank, form)
    for arch in ARCHS:
        yield _shipped("reduce", arch, "all", REDUCE, "bf16", "fp32", (64, 1), _FORMS["reduce"][0])


def _parameters(kernel: str, element: str, form: dict[str, bool]) -> tuple[str, ...]:
    """The dtypes of U or P_k to compile: float32 is the default of trained parameters, P_k from
    ``mode_contract`` has the activations'. Where only one is listed, the launcher rounds."""
    if element == "fp32" or kernel in ("tn", "tn_x"):
        return (element,)
    if kernel in ("shrink", "dx"):
        return ("fp32",)
    casts = kernel == "gemm_ext" or form.get("SEPARATE", False)
    return (element,) if casts else (element, "fp32")


REDUCE = tile(4, 2, BLOCK_O=32)


def _shipped(
    kernel: str,
    arch: int,
    size: str,
    row: Tile,
    element: str,
    parameter: str,
    ranks: tuple[int, int],
    form: dict[str, bool],
) -> Shipped:
    rank, each = ranks
    constexprs: dict[str, Any] = {**dict(row.blocks), **form, "BLOCK_R": rank}
    if kernel in _UNROLLED:
        constexprs["DOWNS"] = each
    if kernel == "through" and each == 1:
        constexprs["K"] = 1  # the compiler makes it one, and there is no loop
    if kernel != "reduce":
        constexprs["PRECISION"] = "ieee"
    if kernel in ("shrink", "dh"):
        constexprs["SWAP"] = size.startswith("small")
    flags = "+".join(name.lower() for name, on in form.items() if on)
    if parameter != element:
        flags += " of fp32"
    return Shipped(
        f"{kernel} {element} r{rank}{'' if each == 1 else f'x{each}'} {size} {flags}",
        _KERNELS[kernel],
        _signature(kernel, element, parameter),
        constexprs,
        {"num_warps": row.warps, "num_stages": row.stages},
        (arch,),
        element != "fp32" and kernel != "reduce",
    )
