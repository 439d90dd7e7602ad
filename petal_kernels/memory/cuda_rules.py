"""What CUDA would keep where fake tensors would follow the CPU's operators.

Fake tensors live on a CPU here, since fake CUDA tensors need a torch built for CUDA and a device.
Two operators keep other tensors there than on a GPU:

* scaled_dot_product_attention: on CUDA the fused kernels keep q, k, v, the mask if there is one (a
  mask of booleans as numbers of q's dtype, made for every call), the output and one float32 per row
  of scores (and two integers of the generator with dropout), whereas the CPU's fallback keeps
  probabilities of size L x L;
* dropout: on CUDA it keeps its mask, one byte per number; on the CPU, noise in x's own dtype.

Dropout in place and dropout of whole channels (dropout1d and its like, alpha_dropout) are the same
on both. A torch function mode exchanges the two where torch is entered, by whatever name they are
called, in this thread alone. It reaches into functions of torch that are made of others
(multi_head_attention_forward), and into backward, where checkpointed regions run again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
        out = _output(q, v.shape[-1])
        rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
        state = [q.new_empty((), dtype=torch.int64) for _ in range(2 if dropout > 0 else 0)]
        ctx.save_for_backward(q, k, v, mask, out, rows, *state)
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_rest = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def _output(q: Tensor, width: int) -> Tensor:
    """In q's own order in memory, as the fused kernels lay it out: where a token's heads lie side
    by side in q they do in the output, and joining them for the next linear copies nothing."""
    same = q.shape[-1] == width
    return torch.empty_like(q) if same else q.new_empty((*q.shape[:-1], width))


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
    if query.dtype == torch.float64:  # no fused kernel takes it: its probabilities are kept
        found: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
        return found
    q, k, v = (_as_autocast(t) for t in (query, key, value))
    mask = None if attn_mask is None else _as_autocast(attn_mask)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype)  # what a kernel adds to the scores, and keeps
    out: Tensor = KeptAttentionFunction.apply(q, k, v, mask, dropout_p)
    return out


def _as_autocast(t: Tensor) -> Tensor:
    """What autocast, which knows the operator that this stands for, makes of its arguments."""
    if not torch.is_autocast_enabled("cpu"):
        return t
    lowers = t.is_floating_point() and t.dtype != torch.float64
    return t.to(torch.get_autocast_dtype("cpu")) if lowers else t


def _dropout(input: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
    if not train or p in (0.0, 1.0):  # nothing to draw: no fused kernel there either
        return torch.dropout(input, p, train)
    return torch.native_dropout(input, p, True)[0]


_ATTENTION = torch.ops.aten.scaled_dot_product_attention
_DROPOUT = torch.ops.aten.dropout
_RULES: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: _attention,
    _ATTENTION: _attention,
    _ATTENTION.default: _attention,
    torch.dropout: _dropout,
    _DROPOUT: _dropout,
    _DROPOUT.default: _dropout,
}
# Functions of torch that call others of it; a mode sees a function, not what that calls.
_COMPOSED = ("torch.nn.functional", "torch.autograd")
_ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


class _Rules(TorchFunctionMode):
    """While entered, those two operators keep what they would on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._bodies: dict[Any, FunctionType | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        rule = _RULES.get(func) if func.__hash__ is not None else None
        if rule is not None and not _on_cuda(args, given):
            return rule(*args, **given)
        body = self._body(func)
        if body is None:
            return func(*args, **given)
        with self:
            return body(*args, **given)

    def _body(self, func: Any) -> FunctionType | None:
        """A composed function without its question whether a mode wants it: within, every other
        asks for itself.
        """
        if not isinstance(func, FunctionType):
            return None
        if func not in self._bodies:
            names = func.__globals__
            asks = [name for name in _ASKS if name in names]
            composed = func.__module__ in _COMPOSED or func is Tensor.backward
            body = None
            if composed and asks:
                own = names | dict.fromkeys(asks, _no)
                body = FunctionType(
                    func.__code__, own, func.__name__, func.__defaults__, func.__closure__
                )
                body.__kwdefaults__ = func.__kwdefaults__
            self._bodies[func] = body
        return self._bodies[func]


def _on_cuda(args: Any, kwargs: Any) -> bool:
    """Whether an operator has its real rule already."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    return any(t.is_cuda for t in tensors)


def unruled(model: Callable[..., Any], module: nn.Module | None) -> list[str]:
    """What of a model these rules do not reach, in words: TorchScript, which enters operators by
    another door, and recurrent layers, of which cuDNN keeps what it likes.
    """
    parts = {} if module is None else dict(module.named_modules())
    kinds = (torch.jit.ScriptModule, nn.RNNBase)
    names = ["the function"] if isinstance(model, torch.jit.ScriptFunction) else []
    names += [name or "the model itself" for name, m in parts.items() if isinstance(m, kinds)]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{', '.join(names[:3])}{more}: kept as on a CPU, CUDA's rule does not reach there"]


def _no(*_: Any) -> bool:
    return False


def cuda_rules() -> TorchFunctionMode:
    """A context in which attention and dropout keep what they would on a GPU."""
    return _Rules()
