"""Triton building blocks of two or more operators: masked tiles, a projection, activations, the
dropout tile, sums of partials; and the host's view of the device.

Masked lanes of a tile read zero, rows are addressed in 64 bits, an absent tensor is None.

``dropout_keep`` draws the keep mask of ``_runtime/philox.py`` for a tile: one Philox4x32-7 call
serves eight columns, its four words split into 16-bit lanes that are joined back in column order.
Importing this file needs the triton package, nothing else: no device is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_POINTERS = 4
# Partial sums larger than this leave the L2 cache of the smallest device the tables serve well (an
# eighth of 50 MB).
MAX_PARTIAL_BYTES = 6 << 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements: in a row of partial sums every section starts on a 64-byte boundary.
ALIGNED = tl.constexpr(16)
_GELU_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_GELU_CUBE = tl.constexpr(0.044715)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def dropout_keep(  # type: ignore[no-untyped-def]
    seed, stream, offs_m, col0, COLS: tl.constexpr, threshold
):
    """Keep mask ``[len(offs_m), COLS]`` of columns ``col0 ..``; ``col0`` is a multiple of 8.

    ``stream`` is the generator's offset plus the stream's number, ``offs_m`` int64 rows.
    """
    GROUPS: tl.constexpr = COLS // 8
    row_lo = (offs_m & 0xFFFFFFFF).to(tl.uint32)[:, None]
    row_hi = (offs_m >> 32).to(tl.uint32)[:, None]
    group = (col0 // 8 + tl.arange(0, GROUPS)).to(tl.uint32)[None, :]
    # Fully shaped counters: the first rounds would otherwise run on [M, 1] and [1, G] vectors,
    # whose layouts differ from the tile's and cost conversions.
    row_lo, group = tl.broadcast(row_lo, group)
    row_hi, group = tl.broadcast(row_hi, group)
    last = tl.zeros_like(group) + (stream & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, row_lo, row_hi, group, last, 7)
    # join appends the fastest axis: first the word's high index bit, then its low one, then the
    # half.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.join(words & 0xFFFF, words >> 16)
    keep = lanes.to(tl.int32) >= threshold
    return tl.reshape(keep, (offs_m.shape[0], COLS))


@triton.jit
def pick(k, a, b, c, d):  # type: ignore[no-untyped-def]
    """The k-th of four scalars (sizes, strides or pointers of one type), k known only at run
    time."""
    return tl.where(k == 0, a, tl.where(k == 1, b, tl.where(k == 2, c, d)))


@triton.jit
def activate(q, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation, in fp32."""
    if ACT == "relu":
        q = tl.where(q < 0, 0.0, q)  # a NaN passes
    elif ACT == "silu":
        q *= tl.sigmoid(q)
    elif ACT == "gelu_tanh":
        # (1 + tanh k) / 2 is sigmoid(2 k), without the cancellation.
        q *= tl.sigmoid((q + q * q * q * _GELU_CUBE) * _GELU_SLOPE)
    elif ACT == "gelu":
        q *= 0.5 * (1.0 + tl.erf(q * _SQRT_HALF))
    return q


@triton.jit
def activate_backward(q, d, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """d times the activation's derivative at q; sigmoid(-t) is 1 - sigmoid(t), not cancelled."""
    if ACT == "relu":
        d = tl.where(q <= 0, 0.0, d)
    elif ACT == "silu":
        d = d * tl.sigmoid(q) * (1.0 + q * tl.sigmoid(-q))
    elif ACT == "gelu_tanh":
        t = (q + q * q * q * _GELU_CUBE) * _GELU_SLOPE
        slope = (1.0 + q * q * (3.0 * _GELU_CUBE)) * _GELU_SLOPE
        d = d * tl.sigmoid(t) * (1.0 + q * tl.sigmoid(-t) * slope)
    elif ACT == "gelu":
        density = tl.exp(-0.5 * q * q) * _DENSITY
        d *= 0.5 * (1.0 + tl.erf(q * _SQRT_HALF)) + q * density
    return d


@triton.jit
def load_tile(ptr, stride, offs_i, offs_j, mask_i, J):  # type: ignore[no-untyped-def]
    """Rows offs_i, columns offs_j < J of a matrix with unit column stride."""
    offs = offs_i.to(tl.int64)[:, None] * stride + offs_j[None, :]
    return tl.load(ptr + offs, mask=mask_i[:, None] & (offs_j < J)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, stride, offs_i, offs_j, mask_i, J, tile):  # type: ignore[no-untyped-def]
    """The same for a store, in the matrix's dtype."""
    offs = offs_i.to(tl.int64)[:, None] * stride + offs_j[None, :]
    mask = mask_i[:, None] & (offs_j < J)[None, :]
    tl.store(ptr + offs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, offs, n):  # type: ignore[no-untyped-def]
    """A vector's elements in fp32; zeros where there is no vector."""
    if ptr is None:
        vector = tl.zeros(offs.shape, tl.float32)
    else:
        vector = tl.load(ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    return vector


@triton.jit
def project(  # type: ignore[no-untyped-def]
    x_ptr,
    stride,
    w_ptr,
    bias_ptr,
    offs_m,
    mask_m,
    D,
    R,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """x w^T + bias in fp32, [BLOCK_M, BLOCK_R]."""
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((offs_m.shape[0], BLOCK_R), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride, offs_m, offs_k, mask_m, D)  # [M, K]
        w = load_tile(w_ptr, D, offs_r, offs_k, offs_r < R, D).to(x.dtype)  # [R, K]
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc + load_vector(bias_ptr, offs_r, R)[None, :]


@triton.jit
def sum_section(  # type: ignore[no-untyped-def]
    d_ptr, index, size, start, part_ptr, stride_part, splits, BLOCK: tl.constexpr
):
    """Sum one parameter's partials in the order of the splits; where the next section starts."""
    if d_ptr is not None:
        if tl.program_id(1) == index:
            offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            part = part_ptr + start + offs
            acc = tl.zeros((BLOCK,), tl.float32)
            for _ in range(splits):
                acc += tl.load(part, mask=offs < size, other=0.0)
                part += stride_part
            tl.store(d_ptr + offs, acc.to(d_ptr.dtype.element_ty), mask=offs < size)
        start += tl.cdiv(size, ALIGNED) * ALIGNED
    return start


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: fixed when the kernel files are first
    imported."""
    return not isinstance(pick, triton.JITFunction)


def device_reasons(*tensors: Tensor | None, dtypes: Iterable[torch.dtype] = ()) -> list[str]:
    """Why Triton kernels cannot run on these tensors (or write these dtypes), whatever the
    operator."""
    reasons = []
    present = [t for t in tensors if t is not None]
    dtypes = dict.fromkeys((*(t.dtype for t in present), *dtypes))
    for dtype in dtypes:
        if dtype not in DTYPES:
            reasons.append(f"has no {str(dtype).removeprefix('torch.')} kernels")
    device = present[0].device
    if interpreted():
        if device.type != "cpu":
            reasons.append("the interpreter (TRITON_INTERPRET=1) needs CPU tensors")
        if torch.bfloat16 in dtypes:
            reasons.append("the interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly")
    elif device.type != "cuda":
        reasons.append("needs a CUDA device (or TRITON_INTERPRET=1)")
    elif _capability(device.index or 0) < (8, 0):
        reasons.append("needs compute capability 8.0 or newer")
    return reasons


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return major, minor


@dataclass(frozen=True)
class Machine:
    """What launch tables are keyed by: ``arch`` is 80, 90, 100, or 0 for the interpreter's small
    tiles."""

    arch: int
    processors: int


_INTERPRETER = Machine(0, 2)


@functools.cache
def _cuda_machine(index: int) -> Machine:
    major, _ = _capability(index)
    # 8.x and the consumer chips (12.x) share mma.sync and at least 99 KiB of shared memory per
    # block.
    arch = {9: 90, 10: 100, 11: 100}.get(major, 80)
    return Machine(arch, torch.cuda.get_device_properties(index).multi_processor_count)


def machine(t: Tensor) -> Machine:
    """The machine a tensor lies on."""
    return _INTERPRETER if t.device.type == "cpu" else _cuda_machine(t.device.index or 0)


def row_splits(where: Machine, rows: int, tiles: int, block_m: int, bytes_per_split: int) -> int:
    """How many ways to split a sum over rows: two programs per processor, partials that stay in L2,
    two tiles each."""
    if where.arch == 0:
        return min(3, -(-rows // block_m))
    wanted = -(-2 * where.processors // tiles)
    return max(1, min(wanted, rows // (2 * block_m), MAX_PARTIAL_BYTES // bytes_per_split))


def precision() -> str:
    """``input_precision`` of fp32 products: IEEE unless torch was told otherwise, by either of its
    interfaces."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that a tile spans for ``rank`` columns."""
    padded: int = triton.next_power_of_2(rank)
    return max(16, padded)


def four(values: list[Any]) -> list[Any]:
    """Pad per-output arguments to the kernels' four slots; the padding is never selected."""
    return values + values[:1] * (MAX_POINTERS - len(values))


@dataclass(frozen=True)
class Tile:
    """One launch configuration: block sizes by constexpr name, warps and pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    def keywords(self) -> dict[str, Any]:
        """As keyword arguments of a launch."""
        return {**dict(self.blocks), "num_warps": self.warps, "num_stages": self.stages}


def tile(warps: int, stages: int, **blocks: int) -> Tile:
    """A row of a launch table."""
    return Tile(tuple(blocks.items()), warps, stages)


@dataclass(frozen=True)
class Shipped:
    """One compiled form that a launch table can ask for; the cross-compile check walks these."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    archs: tuple[int, ...]
    tensor_cores: bool


def signature(
    kernel: Any,
    constexprs: dict[str, Any],
    absent: Collection[str],
    types: dict[str, str],
    like: str,
) -> dict[str, str]:
    """Argument types by name. Pointers (``*_ptr``) are named without that ending: those ``absent``
    are added to ``constexprs`` as None, those without a row in ``types`` are fp32 where they begin
    with ``p_`` (partial sums) and else ``like``; other arguments are i32."""
    found = {}
    for name in kernel.arg_names:
        pointer = name.removesuffix("_ptr")
        if name in constexprs:
            continue
        if pointer in absent:
            constexprs[name] = None
        elif name == pointer:
            found[name] = types.get(name, "i32")
        else:
            found[name] = types.get(pointer, "*fp32" if pointer.startswith("p_") else f"*{like}")
    return found


def shipped_reduce(kernel: Any, row: Tile, archs: Sequence[int]) -> list[Shipped]:
    """The compiled forms of a sum of fp32 partial sums, one per architecture."""
    types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    for name, _ in row.blocks:
        del types[name]
    options = {"num_warps": row.warps, "num_stages": row.stages}
    return [
        Shipped("reduce fp32", kernel, types, dict(row.blocks), options, (arch,), False)
        for arch in archs
    ]


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one: Triton launches on the current device, whatever its
    arguments."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()
