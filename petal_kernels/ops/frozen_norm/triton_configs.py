"""Launch tables of ``frozen_norm``'s Triton kernels, and the compiled forms they can ask for.

A row is keyed by kernel and architecture bucket. None has been timed. Architecture 0 is the
interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from petal_kernels._runtime.triton_lib import Machine, Shipped, Tile, signature, tile
from petal_kernels._runtime.triton_tuned import overlay
from petal_kernels.ops.frozen_norm import triton_kernels as tk

ARCHS = (80, 90, 100)
_ROW = tile(4, 2, BLOCK_M=2, BLOCK_K=1024)
_KERNELS = {"fwd": tk._frozen_norm_fwd_kernel, "bwd": tk._frozen_norm_bwd_kernel}
_INTERPRETER = dict.fromkeys(_KERNELS, tile(1, 1, BLOCK_M=32, BLOCK_K=64))
TABLE: dict[tuple[str, int], dict[str, Tile]] = {
    (kernel, arch): {"any": _ROW} for arch in ARCHS for kernel in _KERNELS
}
TABLE = overlay(TABLE, __file__)
# A kind's switches, in the order of KINDS.
_FORMS: dict[str, dict[str, Any]] = {
    "layer": {"CENTERED": True, "ROUNDED": False, "OFFSET": 0.0},
    "rms": {"CENTERED": False, "ROUNDED": True, "OFFSET": 0.0},
    "rms_once": {"CENTERED": False, "ROUNDED": False, "OFFSET": 0.0},
    "rms_plus_one": {"CENTERED": False, "ROUNDED": False, "OFFSET": 1.0},
}


@functools.lru_cache(maxsize=64)
def choose(kernel: str, machine: Machine) -> dict[str, Any]:
    """Launch keywords: the table's row. Cached: treat the result as frozen."""
    row = _INTERPRETER[kernel] if machine.arch == 0 else TABLE[kernel, machine.arch]["any"]
    return row.keywords()


def shipped_configs() -> Iterator[Shipped]:
    """Every compiled form the tables can ask for: kernel x architecture x dtype x kind."""
    for (kernel, arch), rows in TABLE.items():
        for element in ("bf16", "fp32"):
            for kind in _FORMS:
                yield _shipped(kernel, arch, element, rows["any"], kind)


def _shipped(kernel: str, arch: int, element: str, row: Tile, kind: str) -> Shipped:
    function = _KERNELS[kernel]
    switches = {k: v for k, v in _FORMS[kind].items() if k in function.arg_names}
    constexprs: dict[str, Any] = {**dict(row.blocks), **switches}
    absent = () if kind == "layer" or kernel == "bwd" else ("bias",)
    types = {"moments": "*fp32", "eps": "fp32"}
    return Shipped(
        f"{kernel} {element} {kind}",
        function,
        signature(function, constexprs, absent, types, element),
        constexprs,
        {"num_warps": row.warps, "num_stages": row.stages},
        (arch,),
        False,
    )
