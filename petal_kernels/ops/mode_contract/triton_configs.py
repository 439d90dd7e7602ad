"""Launch tables of ``mode_contract``'s Triton kernels, and the compiled forms they can ask for.

A row is keyed by kernel, architecture bucket and the inputs' bits; kernels of fp32 sums have one
row. None has been timed. Architecture 0 is the interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from petal_kernels._runtime.triton_lib import Machine, Shipped, Tile, tile
from petal_kernels._runtime.triton_tuned import overlay
from petal_kernels.ops.mode_contract import triton_kernels as tk

ARCHS = (80, 90, 100)
_ROWS: dict[str, dict[str, Tile]] = {
    "fwd": {
        "16": tile(4, 2, BLOCK_K=64, BLOCK_O=64, BLOCK_B=32, BLOCK_C=64),
        "32": tile(8, 2, BLOCK_K=64, BLOCK_O=128, BLOCK_B=16, BLOCK_C=16),
    },
    "bwd_slab": {
        "16": tile(8, 2, BLOCK_K=64, BLOCK_O=64, BLOCK_B=64),
        "32": tile(8, 2, BLOCK_K=32, BLOCK_O=16, BLOCK_B=64),
    },
    "bwd_up": {
        "16": tile(4, 2, BLOCK_K=32, BLOCK_O=64, BLOCK_B=64, BLOCK_C=32),
        "32": tile(8, 2, BLOCK_K=32, BLOCK_O=64, BLOCK_B=64, BLOCK_C=16),
    },
    "sum": {"32": tile(4, 1, BLOCK=512)},
    "cp_fwd": {"32": tile(4, 1, BLOCK_A=16, BLOCK_O=128)},
    "cp_bwd_modes": {"32": tile(4, 1, BLOCK_A=16, BLOCK_O=128)},
    "cp_bwd_core": {"32": tile(1, 1, BLOCK_A=32)},
    "cp_bwd_up": {"32": tile(4, 1, BLOCK_A=16, BLOCK_O=64)},
}
# Its register-fed tensor cores want smaller 16-bit tiles.
_ROWS_80 = {
    **_ROWS,
    "fwd": _ROWS["fwd"] | {"16": tile(8, 2, BLOCK_K=64, BLOCK_O=64, BLOCK_B=16, BLOCK_C=64)},
    "bwd_slab": _ROWS["bwd_slab"] | {"16": tile(8, 2, BLOCK_K=32, BLOCK_O=64, BLOCK_B=32)},
}
_INTERPRETER = {
    "fwd": tile(1, 1, BLOCK_K=64, BLOCK_O=128, BLOCK_B=32, BLOCK_C=32),
    "bwd_slab": tile(1, 1, BLOCK_K=64, BLOCK_O=128, BLOCK_B=32),
    "bwd_up": tile(1, 1, BLOCK_K=64, BLOCK_O=128, BLOCK_B=32, BLOCK_C=32),
    "sum": tile(1, 1, BLOCK=1024),
    "cp_fwd": tile(1, 1, BLOCK_A=32, BLOCK_O=128),
    "cp_bwd_modes": tile(1, 1, BLOCK_A=32, BLOCK_O=128),
    "cp_bwd_core": tile(1, 1, BLOCK_A=16),
    "cp_bwd_up": tile(1, 1, BLOCK_A=32, BLOCK_O=128),
}
TABLE: dict[tuple[str, int], dict[str, Tile]] = {
    (kernel, arch): (_ROWS_80 if arch == 80 else _ROWS)[kernel]
    for arch in ARCHS
    for kernel in _ROWS
}
TABLE = overlay(TABLE, __file__)


@functools.lru_cache(maxsize=256)
def choose(kernel: str, machine: Machine, itemsize: int) -> dict[str, Any]:
    """Launch keywords: the table's row. Cached: treat the result as frozen."""
    if machine.arch == 0:
        return _INTERPRETER[kernel].keywords()
    rows = TABLE[kernel, machine.arch]
    size = str(8 * itemsize)
    return rows[size if size in rows else "32"].keywords()


_KERNELS = {
    "fwd": tk._mode_contract_fwd_kernel,
    "bwd_slab": tk._mode_contract_bwd_slab_kernel,
    "bwd_up": tk._mode_contract_bwd_up_kernel,
    "sum": tk._mode_contract_bwd_sum_kernel,
    "cp_fwd": tk._mode_contract_cp_fwd_kernel,
    "cp_bwd_modes": tk._mode_contract_cp_bwd_modes_kernel,
    "cp_bwd_core": tk._mode_contract_cp_bwd_core_kernel,
    "cp_bwd_up": tk._mode_contract_cp_bwd_up_kernel,
}
_FORMS: dict[str, tuple[dict[str, bool], ...]] = {
    "fwd": ({"FOLD": True}, {"FOLD": False}),
    "bwd_slab": (
        {"FOLD": True, "NEED_CORE": True, "NEED_MODES": True},
        {"FOLD": False, "NEED_CORE": True, "NEED_MODES": True},
    ),
    "cp_fwd": ({"FOLD": True}, {"FOLD": False}),
    "cp_bwd_modes": ({"FOLD": True, "NEED_MODES": True},),
}


def shipped_configs() -> Iterator[Shipped]:
    """Every compiled form the tables can ask for: kernel x architecture x dtype x switches."""
    for (kernel, arch), rows in TABLE.items():
        for bits, row in rows.items():
            for form in _FORMS.get(kernel, ({},)):
                yield _shipped(kernel, arch, bits, row, form)


def _shipped(kernel: str, arch: int, bits: str, row: Tile, form: dict[str, bool]) -> Shipped:
    element = "bf16" if bits == "16" else "fp32"
    tensor_cores = bits == "16"
    constexprs: dict[str, Any] = {**dict(row.blocks), **form}
    names = _KERNELS[kernel].arg_names
    if "PRECISION" in names:
        constexprs["PRECISION"] = "ieee"
        constexprs["FOLD_PRECISION"] = "tf32x3" if tensor_cores else "ieee"
    if "stride_vb" in names:
        constexprs["stride_vb"] = 1  # V contiguous: the launcher specialises on it
    pointers = {n: "*" + element for n in names if n.endswith("_ptr")}
    pointers.update({n: "*fp32" for n in ("part_ptr", "diagonal_ptr") if n in pointers})
    flags = "+".join(name.lower() for name, on in form.items() if on)
    return Shipped(
        f"{kernel} {element} {flags}".rstrip(),
        _KERNELS[kernel],
        {
            n: pointers.get(n, "fp32" if n == "scale" else "i32")
            for n in names
            if n not in constexprs
        },
        constexprs,
        {"num_warps": row.warps, "num_stages": row.stages},
        (arch,),
        tensor_cores,
    )
