"""DoRA on one frozen linear: a magnitude m for every output's row of W + s B A.

    y = g (x W^T + s x A^T B^T) + bias,    g = m / |W + s B A|,    a norm of each row,

which PEFT computes, the norm taken as a constant (section 4.3 of the paper). With dropout in
training PEFT drops the input of the magnitude's part of the base too; with F(x) = x W^T:

    y = F(x) + bias + (g - 1) F(drop(x)) + g s drop(x) A^T B^T
      = F(x - drop(x)) + bias + g (F(drop(x)) + s drop(x) A^T B^T),    one mask in all places.

Neither W + s B A nor anything else of its size is formed: with w and b the rows of W and B

    |w + s b A|^2 = |w|^2 + 2 s b . (A w) + s^2 b (A A^T) b^T,

|w|^2 once for each state of W, and W A^T [O, r], the only product that reads W, in every forward
(in evaluation too: `merge` is what spares it). Its square loses (|w|^2 + |s b A|^2) / |w + s b A|^2
roundings of fp32: a row that its update all but cancels has no exact norm here.

Kept for backward without dropout: what LoRA keeps and the product u = x W^T + s x A^T B^T [N, O],
which the gradient of m is of; with dropout drop(x) and its mask instead of x. The gain is a pass of
its own, which reads u and writes y (backward reads dy twice and u, and writes du). An epilogue of
`lowrank_linear` would save that read of u: of 16-bit values, by an H200's roof (4.8 TB/s, 800
TFLOP/s), 170 / D of the base product's time, 4 % at D = 4096, for one more operand and output in
every backend of that operator. It is not there.

Source: Liu et al., "DoRA", 2024.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from petal_kernels._runtime.autocast import autocast_off
from petal_kernels._runtime.first_order import FirstOrderFunction
from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels.nn.arguments import check_rows, check_values
from petal_kernels.nn.base_weight import BLOCK, base_weight, wide_blocks
from petal_kernels.nn.frozen_linear import compute_dtype, near
from petal_kernels.nn.lora import LoRALinear, Operands, frozen_operands

# What a module remembers of its base for the next call; not its state.
KEPT = ("_held", "_known")


class DoRALinear(LoRALinear):
    """A frozen linear with a low-rank update and a trained magnitude of each output.

    Arguments as LoRALinear's. The magnitude begins as the norms of the rows of W + s B A, so that
    it changes nothing at step 0. The base lends its weight for the norms even where it is called:
    one that has none to give (`base_weight`) is refused.
    """

    @torch.no_grad()
    def reset_parameters(self, init: bool | str = True) -> None:
        """A and B anew, and the magnitude that they and the base's weight have."""
        weight = base_weight(self.base)
        if isinstance(weight, str):
            raise ValueError(f"base: want one whose weight has norms for DoRA, got none: {weight}")
        self._know()
        super().reset_parameters(init)
        if "magnitude" not in self._parameters:
            self.magnitude = nn.Parameter(self.up.new_empty(self.out_features))
        self.magnitude.copy_(self.norms())

    # -- the gain ---------------------------------------------------------------------------------

    def gain(self) -> Tensor:
        """m / |W + s B A| [out]; the norm is a constant to autograd."""
        norms = self.norms()
        return self.magnitude.to(norms) / norms

    @torch.no_grad()
    def norms(self) -> Tensor:
        """|W + s B A| of every row [out], in the dtype of sums, on the base's device."""
        weight, s = self._weight(), self.scale
        dtype = torch.promote_types(wide_dtype(weight.dtype), wide_dtype(self.down.dtype))
        with autocast_off(weight):
            down, up = (t.to(dtype) for t in self._factors(dtype, weight.device))
            mixed = torch.cat([block @ down.mT for block in wide_blocks(weight, dtype)])
            cross = 2 * s * mixed + s * s * (up @ (down @ down.mT))
            return (self._squares(weight, dtype) + (up * cross).sum(1)).sqrt()

    def _weight(self) -> Tensor:
        weight = base_weight(self.base)
        if isinstance(weight, str):
            raise RuntimeError(f"DoRA needs the norms of its base's weight: {weight}")
        return weight

    def _squares(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """|w|^2 of every row, kept for as long as the weight is the tensor that it was at the
        start, in the same state. FSDP's, which it writes without a trace, is another tensor; a
        compiled graph, which cannot ask for the state, and inference mode form it again too."""
        own = self.base._parameters["weight"]
        if torch.compiler.is_compiling() or type(own) is not nn.Parameter or own.is_inference():
            return _row_squares(weight, dtype)
        if self.__dict__["_known"]() is not own:
            return _row_squares(weight, dtype)
        # An address alone may be another memory's by now; the reference keeps no memory.
        memory = (StorageWeakRef(own.untyped_storage()), own.data_ptr(), own.stride())
        state = (memory, own._version, own.dtype, own.device, dtype)
        held = self.__dict__.get("_held")
        if held is not None and held[0] == state:
            kept: Tensor = held[1]
            return kept
        found = _row_squares(weight, dtype)
        if type(found) is Tensor:  # a dry run has no values to keep
            self.__dict__["_held"] = (state, found)
        return found

    def _know(self) -> None:
        """Remembers the base's weight, without holding it."""
        own = self.base._parameters["weight"]
        self.__dict__["_known"] = _nothing if own is None else weakref.ref(own)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._know()

    # -- calls ------------------------------------------------------------------------------------

    def delta(self, dtype: torch.dtype) -> Tensor:
        """What is added to the weight [out, in] where nothing is dropped."""
        update = super().delta(dtype)
        weight = self._weight().to(update)
        return self.gain().to(update).unsqueeze(1) * (weight + update) - weight

    def operands(
        self, dtype: torch.dtype, device: torch.device, bias: Tensor | None = None
    ) -> Operands | str:
        """As LoRALinear's, with the gain."""
        found = super().operands(dtype, device, bias)
        if isinstance(found, str):
            return found
        if found.dropout:
            return "dropout leaves out a part of the base's input too"
        return found._replace(gain=self.gain().to(device))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """base(x) with the update and the magnitude; `bias` [out] in place of the base's own."""
        check_values("x", check_rows("x", x, self.in_features), self.down)
        dtype = compute_dtype(x)
        found = self.operands(dtype, x.device, bias)
        rows = x if x.dtype == dtype else x.to(dtype)
        if isinstance(found, Operands):
            assert found.down is not None
            assert found.up is not None
            assert found.gain is not None
            base = {"weights": [found.weight]}
            u = self._update(rows, found.down, found.up, dropout=0.0, **base)
            return gained(u, found.gain, found.bias)
        gain = self.gain().to(x.device)
        factors = self._factors(dtype, x.device)
        if self.dropout and self.training:
            return self._with_dropout(x, rows, bias, gain, factors)
        y = self._called(x, bias)
        own = self._bias_of(y, bias)
        u = self._added(y if own is None else y - own, rows, *factors, dropout=0.0)
        return gained(u, gain, own)

    def _with_dropout(
        self,
        x: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        gain: Tensor,
        factors: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The second formula above."""
        found = frozen_operands(self.base, rows.dtype, rows.device, bias)
        y = self._called(x, bias) if isinstance(found, str) else None
        kept = F.dropout(rows, self.dropout, True)
        with autocast_off(x):
            if isinstance(found, Operands):
                u = self._update(kept, *factors, weights=[found.weight], dropout=0.0)
                rest = F.linear(rows - kept, found.weight, found.bias)
            else:
                assert y is not None
                base = F.linear(kept, self._weight().to(rows))
                u = self._added(base, kept, *factors, dropout=0.0)
                rest = y - base.to(y.dtype)
        if self.first_down is not None and self.first_up is not None:
            first = (near(p, rows.dtype, rows.device) for p in (self.first_down, self.first_up))
            rest = self._added(rest, rows - kept, *first, scale=-self.scale, dropout=0.0)
        return rest + gained(u, gain, None).to(rest.dtype)

    def _bias_of(self, y: Tensor, bias: Tensor | None) -> Tensor | None:
        """The bias that is in `y`."""
        own = self.base._parameters.get("bias") if bias is None else bias
        return None if own is None else own.to(y)


def _nothing() -> None:
    """A reference to no weight."""


def _row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    blocks = [torch.linalg.vector_norm(b, dim=1) for b in wide_blocks(weight, dtype)]
    return torch.cat(blocks).square()


def gained(u: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """u * gain + bias along the last dim, summed in the gain's dtype and rounded once to u's."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (u, gain, bias)):
        y: Tensor = _GainFunction.apply(u, gain, bias)
        return y
    return _gained(u, gain, bias)


def _gained(u: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.empty_like(u)
    if bias is None:
        return torch.mul(u, gain, out=y)
    return torch.addcmul(bias, u, gain, out=y)


class _GainFunction(FirstOrderFunction):
    """Saves u and the gain."""

    operator = "DoRALinear"
    instead = 'pk.attach(..., implementation="published")'

    @staticmethod
    def forward(ctx: Any, u: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, gain)
        ctx.bias = None if bias is None else bias.dtype
        return _gained(u, gain, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        u, gain = ctx.saved_tensors
        need_u, need_gain, need_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dgain = _products(rows, u.reshape(rows.shape), gain) if need_gain else None
        dbias = rows.sum(0, dtype=gain.dtype).to(ctx.bias) if need_bias else None
        return _gained(dy, gain) if need_u else None, dgain, dbias


def _products(dy: Tensor, u: Tensor, gain: Tensor) -> Tensor:
    """The column sums of dy * u in the gain's dtype, without a second matrix of their size: a
    compiler joins the two steps, elsewhere they take blocks of rows."""
    if torch.compiler.is_compiling():
        return (dy.to(gain) * u).sum(0)
    total = torch.zeros_like(gain)
    step = max(1, BLOCK // max(1, dy.shape[1]))
    for first in range(0, dy.shape[0], step):
        block = slice(first, first + step)
        total += (dy[block].to(gain) * u[block]).sum(0)
    return total
