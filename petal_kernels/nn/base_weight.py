"""The weight of a base, for what is computed from the weight itself: its rows' norms, its
decompositions.

A base that must be called, not read, for its outputs (hooked, of another class) may still lend its
values here. One without values (on meta, partitioned, offloaded) cannot, and a quantised weight
only where its class has a `dequantize` of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels.nn.frozen_linear import is_conv1d
from petal_kernels.nn.routed_lora import linear_features

# Elements of a 16-bit weight that are widened at a time: no second weight is ever there.
BLOCK = 1 << 22


def base_weight(base: nn.Module) -> Tensor | str:
    """W [out, in] in any strides and a floating dtype, or why it cannot be had. A quantised one is
    dequantised for the call."""
    weight = base._parameters.get("weight")
    if weight is None:
        return f"base is a {type(base).__name__} without a weight of its own"
    if not isinstance(base, nn.Linear) and not is_conv1d(base):
        return f"base is a {type(base).__name__}, whose weight may lie in any order"
    if hasattr(weight, "ds_id"):
        return "base weight is partitioned by DeepSpeed"
    if weight.is_meta:
        return "base weight has no values (it is on device meta)"
    found: Tensor = weight
    plain = type(weight) in (nn.Parameter, Tensor) or type(weight).__name__ == "FakeTensor"
    if not plain:
        # torch's own method takes any integers for values.
        own = getattr(type(weight), "dequantize", torch.Tensor.dequantize)
        if own is torch.Tensor.dequantize:
            return f"base weight is a {type(weight).__name__}, which has no dequantize()"
        with torch.no_grad():
            found = weight.dequantize()
    matrix = found if isinstance(base, nn.Linear) else found.t()
    width, out = linear_features(base)
    if matrix.dtype not in checks.FLOATING or matrix.shape != (out, width):
        dtype = checks.dtype_name(matrix.dtype)
        return f"base weight is {dtype} of shape {list(matrix.shape)}, not [{out}, {width}]"
    return matrix


def wide_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of a weight in the dtype of sums, in blocks where that is another one."""
    if weight.dtype == dtype:
        yield weight
        return
    out, width = weight.shape
    step = max(1, BLOCK // max(1, width))
    for first in range(0, out, step):
        yield weight[first : first + step].to(dtype)
