"""What attachments with experts offer: how the last forward was routed, losses, usage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from petal_kernels._runtime import checks
from petal_kernels.ops.expert_dispatch.routing import Routing

if TYPE_CHECKING:
    from petal_kernels.hf.method import Method


class Routings(dict[str, Routing]):
    """Of one forward, by place. They carry graphs: a copied model starts without."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Routings, ()


class Routed:
    """The part of an `Attachment` that concerns experts."""

    method: Method

    def _need_attached(self, what: str) -> None:
        raise NotImplementedError

    def routing(self) -> dict[str, Routing]:
        """How the forward that began last was routed, by the path of the place: logits (with their
        graph in training) and choices."""
        self._need_attached("routing")
        if not self.method.experts():
            raise ValueError("routing: want an attachment with experts, got none in this config")
        if not self.method.routings:
            raise RuntimeError(
                "routing: want a forward since attach, got none; run the model first (outside "
                "`disabled()`)"
            )
        return dict(self.method.routings)

    def auxiliary_loss(self, balance: float = 0.01, z: float = 0.001) -> Tensor:
        """balance * load-balance loss + z * z-loss of the last forward, summed over the places."""
        checks.check_number("balance", balance)
        checks.check_number("z", z)
        terms = []
        for path, routing in self.routing().items():
            module = self.method.experts()[path]
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
            module = self.method.experts()[path]
            if module.gate == "mean":
                share = 1.0 / module.experts
                usage[path] = torch.full((module.experts,), share, device=module.up.device)
            else:
                usage[path] = routing.usage()
        return usage
