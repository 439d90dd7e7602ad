"""What attachments with experts share: routings of the last forward, losses, rows of reports."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels._runtime.backends import explain
from petal_kernels.hf.attachment import Attachment
from petal_kernels.hf.report import Row, choice_in_words
from petal_kernels.nn.experts import LowRankExperts
from petal_kernels.nn.gated_adapter import Near
from petal_kernels.ops.expert_dispatch import expert_dispatch
from petal_kernels.ops.expert_dispatch.routing import Routing

_TYPICAL_SHAPE = 8, 128  # samples, tokens: for which the planner is asked


class Routings(dict[str, Routing]):
    """Of the last forward, by place. They carry graphs: a copied model starts without."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Routings, ()


class RoutedAttachment(Attachment):
    """An attachment that may have experts."""

    @property
    @abstractmethod
    def _routings(self) -> Routings: ...

    @abstractmethod
    def _experts(self) -> Mapping[str, LowRankExperts]:
        """The experts by the path of their place."""

    def routing(self) -> dict[str, Routing]:
        """How the last forward was routed, by the path of the place: logits (with their graph in
        training) and choices."""
        self._need_attached("routing")
        if not self._experts():
            raise ValueError("routing: want an attachment with experts, got none in this config")
        if not self._routings:
            raise RuntimeError(
                "routing: want a forward since attach, got none; run the model first (outside "
                "`disabled()`)"
            )
        return dict(self._routings)

    def auxiliary_loss(self, balance: float = 0.01, z: float = 0.001) -> Tensor:
        """balance * load-balance loss + z * z-loss of the last forward, summed over the places."""
        checks.check_number("balance", balance)
        checks.check_number("z", z)
        terms = []
        for path, routing in self.routing().items():
            module = self._experts()[path]
            if routing.logits is None or module.router is None:
                raise ValueError(
                    f"auxiliary_loss: want a trained router (gate='softmax'), got gate="
                    f"{module.gate!r}"
                )
            trains = module.training and module.router.requires_grad and torch.is_grad_enabled()
            if trains and not routing.logits.requires_grad:
                raise RuntimeError(
                    f"auxiliary_loss: want logits with a graph, got none at {path}: the forward "
                    "ran without gradients, as the first pass of reentrant checkpointing does; "
                    "use gradient_checkpointing_enable({'use_reentrant': False})"
                )
            terms.append(balance * routing.load_balance_loss() + z * routing.z_loss())
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def expert_usage(self) -> dict[str, Tensor]:
        """[E], sums to 1: the share of each expert in the last forward, by the path of the place;
        on the device, without a synchronisation."""
        usage = {}
        for path, routing in self.routing().items():
            module = self._experts()[path]
            if module.gate == "mean":
                share = 1.0 / module.experts
                usage[path] = torch.full((module.experts,), share, device=module.up.device)
            else:
                usage[path] = routing.usage()
        return usage

    def detach(self) -> nn.Module:
        model = super().detach()
        self._routings.clear()
        return model


def expert_row(
    path: str, role: str, module: LowRankExperts, implementation: str, place: nn.Module
) -> Row:
    """The row of one place in a report, as it would run now on activations of its dtype."""
    shape = f"{module.in_features} -> {module.out_features}, {module.experts} x r {module.r}"
    gate = f"{module.gate}, top {module.top_k}" if module.top_k else module.gate
    backend, why = "eager", "eager: the published form, one expert at a time"
    if implementation == "fused":
        floating = (p.dtype for p in place.parameters() if p.is_floating_point())
        backend, why = _backend(module, next(floating, torch.float32))
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Row(path, role, f"{shape}, {gate}", backend, why, count)


def _backend(module: LowRankExperts, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that a typical call runs on, and why not a preferred one."""
    near = Near(dtype, module.up.device)
    like: dict[str, Any] = {"dtype": dtype, "device": module.up.device}
    x = torch.empty(*_TYPICAL_SHAPE, module.in_features, **like)
    routed: dict[str, Any] = {"gate": module.gate}
    if module.gate == "softmax":
        routed |= {"router": near.optional(module.router), "top_k": module.top_k}
        routed["router_input"] = module.router_input
    elif module.gate == "domain":
        indices = torch.zeros(*_TYPICAL_SHAPE, 1, dtype=torch.int64, device=x.device)
        routed = {"gate": "given", "indices": indices}
    weights = [near.optional(p) for p in (module.down, module.up, module.down_bias, module.up_bias)]
    base = torch.empty(*_TYPICAL_SHAPE, module.out_features, **like)
    try:
        with torch.enable_grad():
            found = explain(
                expert_dispatch, x, *weights, base=base, activation=module.activation, **routed
            )
    except RuntimeError as error:  # a backend asked for by name that cannot run here
        return "none", str(error)
    return choice_in_words(found)
