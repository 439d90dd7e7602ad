"""A base whose linears are quantised as bitsandbytes stores them: bytes and shapes, no values.

==========  ====================================================  ===============================
weights     bytes of a weight of O x D                            what a call does
==========  ====================================================  ===============================
int8        O D, and 4 O: a float32 scale for each row            keeps its input for backward,
            (Int8Params, LLM.int8())                              which decodes the weight
nf4         O D / 2; 4 for each block of 64 numbers (absmax); a   decodes the weight, in forward
            table of 16 float32 (Params4bit, QuantState)          and in backward
nf4-double  the same with 1 for each block of 64; 4 for each 256  the same
            of these, 4, and 1024 (compress_statistics=True: its
            own copy of a table of 256 float32)
==========  ====================================================  ===============================

As transformers does it, every linear but output heads; embeddings, norms and convolutions stay as
they are. One weight at a time is decoded, in the input's dtype. Sources: bitsandbytes 0.50.2,
MatMul8bitLt and MatMul4Bit in autograd/_functions.py, quantize_4bit in functional.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime.first_order import FirstOrderFunction
from petal_kernels.hf.linears import output_heads

KINDS = ("full", "int8", "nf4", "nf4-double")
_BLOCK, _BLOCKS = 64, 256  # numbers that share a scale, and scales that do
_CODES, _SCALES = 16, 256  # entries of the tables of numbers and of scales


def weight_bytes(outs: int, width: int, kind: str) -> int:
    """Bytes of a weight [outs, width] with its scales."""
    numbers = outs * width
    if kind == "int8":
        return numbers + 4 * outs
    blocks = -(-numbers // _BLOCK)
    scales = 4 * blocks
    if kind == "nf4-double":
        scales = blocks + 4 * -(-blocks // _BLOCKS) + 4 + 4 * _SCALES
    return -(-numbers // 2) + scales + 4 * _CODES


class _Call(FirstOrderFunction):
    """What a product with a quantised weight allocates and keeps; no value is computed."""

    operator = "petal-kernels memory --base"

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, outs: int, keeps_input: bool) -> Tensor:
        ctx.save_for_backward(weight, *([x] if keeps_input else []))
        ctx.width = x.shape[-1]
        # int8: x in 8 bits and the sums in 32; 4 bits: the weight in x's dtype.
        if keeps_input:
            used = [x.new_empty(x.shape, dtype=torch.int8)]
            used += [x.new_empty(*x.shape[:-1], outs, dtype=torch.int32)]
        else:
            used = [x.new_empty(outs, x.shape[-1])]
        y = x.new_empty(*x.shape[:-1], outs)
        del used
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (dy,) = grads
        decoded = dy.new_empty(dy.shape[-1], ctx.width)
        dx = dy.new_empty(*dy.shape[:-1], ctx.width)
        del decoded
        return dx, None, None, None


class QuantisedLinear(nn.Module):
    """A frozen linear by the bytes of its weight."""

    def __init__(self, base: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.kind = kind
        size = weight_bytes(base.out_features, base.in_features, kind)
        codes = torch.empty(size, dtype=torch.uint8, device=base.weight.device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., O]."""
        y: Tensor = _Call.apply(x, self.weight, self.out_features, self.kind == "int8")
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def quantise(model: nn.Module, kind: str) -> None:
    """Every linear of `model` but its output heads, in place; what is tied to another stays."""
    heads = {id(head) for head in output_heads(model)}
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and id(module) not in heads:
            model.set_submodule(path, QuantisedLinear(module, kind).train(module.training))
