"""The router's arithmetic in plain torch: choice, weights, sort, and what is read off a routing.

N x E numbers and N x k indices, a hundredth of the activations: kernels compute the same inside,
and the definition, the torch backend, pooled routers and the losses use these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def choose(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row, as bool [..., E]; of equal ones the first experts.

    NaN is above everything, as in ``torch.sort``.
    """
    order = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, True)


def gates(logits: Tensor, chosen: Tensor | None, renormalize: bool) -> Tensor:
    """softmax(logits); with a choice, over the chosen alone, or (not ``renormalize``) over all and
    0 elsewhere. Differentiable."""
    if chosen is None:
        return logits.softmax(-1)
    others = ~chosen
    if renormalize:
        logits = logits.masked_fill(others, float("-inf"))
    return logits.softmax(-1).masked_fill(others, 0.0)


def gates_backward(
    dgates: Tensor, logits: Tensor, chosen: Tensor | None, renormalize: bool
) -> Tensor:
    """dlogits of ``gates``: g_e (dg_e - sum_j g_j dg_j), with the softmax over all in place of g
    outside the sum where it is not renormalised."""
    g = gates(logits, chosen, renormalize)
    if chosen is not None:
        dgates = dgates.masked_fill(~chosen, 0.0)
    inner = (g * dgates).sum(-1, keepdim=True)
    if chosen is None or renormalize:
        return g * (dgates - inner)
    return logits.softmax(-1) * (dgates - inner)


def sort_by_expert(chosen: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Tokens by expert: a stable counting sort, without a host synchronisation.

    ``chosen`` is bool [N, E] with at most ``slots`` entries set. Returns int32 order [slots]: the
    tokens of expert 0 in their order, then those of expert 1, ..., and -1 behind the last; and
    int32 offsets [E + 1]: where each expert's slots begin, and the end.
    """
    n, experts = chosen.shape
    by_expert = chosen.t().reshape(-1)
    slot = by_expert.cumsum(0) - 1
    tokens = torch.arange(n, dtype=torch.int32, device=chosen.device).repeat(experts)
    order = tokens.new_full((slots + 1,), -1)
    order = order.scatter(0, slot.masked_fill(~by_expert, slots), tokens)[:slots]
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=chosen.device)
    offsets[1:] = chosen.sum(0).cumsum(0)
    return order, offsets


class Routing(NamedTuple):
    """How one call was routed: tensors on the device, for losses and logs; nothing is synchronised.

    ``logits`` [..., E] fp32 with the noise added, differentiable, or None without a router;
    ``chosen`` bool [..., E], or None where every expert is used. The leading dims are x's, or
    ``[B]`` where a sample's tokens share their experts.
    """

    logits: Tensor | None
    chosen: Tensor | None

    def _logits(self, what: str) -> Tensor:
        if self.logits is None:
            raise ValueError(f"{what}: want a routing by a router's logits, got given gates")
        return self.logits

    def load_balance_loss(self) -> Tensor:
        """E * sum_e f_e p_e, 1 when balanced: f_e is ``usage`` (no gradient), p_e the expert's mean
        probability (Switch Transformer, arXiv 2101.03961, equation 4)."""
        logits = self._logits("load_balance_loss")
        experts = logits.shape[-1]
        p = logits.softmax(-1).reshape(-1, experts).mean(0)
        return experts * (self.usage() * p).sum()

    def z_loss(self) -> Tensor:
        """The mean of logsumexp(logits) squared (ST-MoE, arXiv 2202.08906, equation 5)."""
        return torch.logsumexp(self._logits("z_loss"), -1).square().mean()

    def usage(self) -> Tensor:
        """[E] fp32, sums to 1: the share of choices of each expert; where all are used, the mean
        probability."""
        if self.chosen is not None:
            counts = self.chosen.reshape(-1, self.chosen.shape[-1]).sum(0).float()
            return counts / counts.sum().clamp_min(1)
        logits = self._logits("usage").detach()
        return logits.softmax(-1).reshape(-1, logits.shape[-1]).mean(0).float()
