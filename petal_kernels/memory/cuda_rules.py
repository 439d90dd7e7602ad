"""What CUDA would keep where fake tensors would follow the CPU's operators.

Fake tensors live on a CPU here, since fake CUDA tensors need a torch built for CUDA and a device.
Two operators keep other tensors there than on a GPU:

* scaled_dot_product_attention: on CUDA the fused kernels keep q, k, v, the mask if there is one,
  the output and one float32 per row of scores (and two integers of the generator with dropout),
  whereas the CPU's fallback keeps probabilities of size L x L;
* dropout: on CUDA it keeps its mask, one byte per number; on the CPU, noise in x's own dtype.

They are exchanged in torch.nn.functional while a step runs, its backward included: a torch function
mode would be set aside during backward, where checkpointed regions run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petal_kernels._runtime.first_order import FirstOrderFunction

RULE = "attention and dropout keep what CUDA's operators keep"


class KeptAttentionFunction(FirstOrderFunction):
    """Shapes of fused attention: what it returns, what it keeps, what its backward allocates. No
    value is computed.
    """

    operator = "scaled_dot_product_attention"
    instead = 'profile the model with attn_implementation="eager"'

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
        state = [q.new_empty((), dtype=torch.int64) for _ in range(2 if dropout > 0 else 0)]
        ctx.save_for_backward(q, k, v, mask, out, rows, *state)
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_rest = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


@contextlib.contextmanager
def cuda_rules() -> Iterator[None]:
    """While entered, those two operators keep what they would on a GPU."""
    before = F.scaled_dot_product_attention, F.dropout
    F.scaled_dot_product_attention, F.dropout = _attention, _dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = before


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    out: Tensor = KeptAttentionFunction.apply(query, key, value, attn_mask, dropout_p)
    return out


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, True)[0]
