"""Mixtures of low-rank experts: PETAL's instruction experts, mixtures of adapters and of LoRA.

    InstructionExperts  e' = keep e + mix sum_j g_j (B_j (A_j e + a_j) + b_j)   on embeddings
    ExpertAdapter       h + s sum_j g_j (B_j act(A_j h + a_j) + b_j)            on a module's output
    ExpertLoRALinear    base(x) + alpha / r sum_j g_j B_j (A_j x)               on a linear

Gates g: "softmax" (a trained router, zero at first, so that step 0 is the mean; with `top_k` only
the largest), "mean", or "domain": the caller says by an integer for each token which expert serves
it (Context-PEFT: one for image tokens, one for text). Each forward is one operator call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels.nn.arguments import (
    check_choice,
    check_index,
    check_module,
    check_rows,
    check_size,
    check_values,
)
from petal_kernels.nn.frozen_linear import check_input
from petal_kernels.nn.gated_adapter import INIT_STD
from petal_kernels.nn.low_rank_experts import GATES, TOKENS, LowRankExperts
from petal_kernels.nn.routed_lora import linear_features
from petal_kernels.ops.expert_dispatch.routing import Routing


class InstructionExperts(LowRankExperts):
    """PETAL's experts on the embeddings of a Q-Former, [queries; instruction].

    tokens  "text": the learned queries pass by (the paper's figure); "all" (the released code)
    keep, mix  0.6 and 0.4; at step 0 the embedding is then about 0.6 e
    init    "normal": weights N(0, 0.02^2), biases zero, as released; "identity": up-projections
            zero and keep = 1, so that step 0 changes nothing
    gate    the paper's figure shows a trained gate without a formula: "softmax" of a router is our
            reading of it, "mean" the released code
    """

    def __init__(
        self,
        features: int,
        experts: int = 6,
        r: int = 64,
        *,
        gate: str = "softmax",
        top_k: int | None = None,
        router_input: str = "token",
        router_noise: float = 0.0,
        tokens: str = "text",
        keep: float | None = None,
        mix: float = 0.4,
        init: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_choice("gate", gate, GATES[:2])
        check_size("features", features)
        super().__init__(
            features,
            features,
            experts,
            r,
            gate=gate,
            top_k=top_k,
            router_input=router_input,
            router_noise=router_noise,
            device=device,
            dtype=dtype,
        )
        check_choice("tokens", tokens, TOKENS)
        check_choice("init", init, ("normal", "identity"))
        if keep is not None:
            checks.check_number("keep", keep)
        if init == "identity" and keep not in (None, 1.0):
            raise ValueError(f"keep: want 1.0 with init='identity', got {keep}")
        default = 0.6 if init == "normal" else 1.0
        self.tokens, self.init = tokens, init
        self.keep = default if keep is None else checks.check_number("keep", keep)
        self.mix = checks.check_number("mix", mix)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        self.down.normal_(0.0, INIT_STD)
        if self.init == "normal":
            self.up.normal_(0.0, INIT_STD)

    def forward(
        self, embeddings: Tensor, queries: int = 0, mask: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """The enhanced embeddings [B, T, features], and the routing of the tokens that were served.

        queries  how many leading tokens are learned queries (left alone with tokens="text")
        mask     [B, T], nonzero where a token counts for a pooled router
        """
        check_rows("embeddings", embeddings, self.in_features, lead=("B", "T"))
        check_index("queries", queries, embeddings.shape[1] + 1)
        if mask is not None:
            checks.check_mask("mask", mask, tuple(embeddings.shape[:-1]))
        first = queries if self.tokens == "text" else 0
        served = embeddings[:, first:] if first else embeddings
        out, routing = self.combine(
            served,
            base="input",
            keep=self.keep,
            mix=self.mix,
            mask=None if mask is None else mask[:, first:],
            training=self.training,
        )
        if first:
            out = torch.cat((embeddings[:, :first].to(out.dtype), out), dim=1)
        return out, routing

    def extra_repr(self) -> str:
        tail = f"tokens={self.tokens!r}, keep={self.keep}, mix={self.mix}"
        return f"{super().extra_repr()}, {tail}"


class ExpertAdapter(LowRankExperts):
    """A mixture of bottleneck adapters on a module's output; up-projections are zero at first."""

    def __init__(
        self,
        features: int,
        experts: int,
        r: int,
        *,
        gate: str = "softmax",
        top_k: int | None = None,
        router_input: str = "token",
        router_noise: float = 0.0,
        activation: str = "gelu_tanh",
        shared_down: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_size("features", features)
        checks.check_number("scale", scale)
        super().__init__(
            features,
            features,
            experts,
            r,
            gate=gate,
            top_k=top_k,
            router_input=router_input,
            router_noise=router_noise,
            activation=activation,
            shared_down=shared_down,
            device=device,
            dtype=dtype,
        )
        self.scale = float(scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        bound = 1.0 / math.sqrt(self.in_features)
        self.down.uniform_(-bound, bound)

    def forward(
        self, h: Tensor, *, mask: Tensor | None = None, domain: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """The adapted h [..., features], and its routing.

        mask    [B, L], nonzero where a token counts for a pooled router
        domain  integers [..., tokens] or [B], the expert of each token or sample (gate="domain")
        """
        self._check(h, None, mask, domain, "h")
        return self.combine(
            h,
            base="input",
            keep=1.0,
            mix=self.scale,
            mask=mask,
            domain=domain,
            training=self.training,
        )


class ExpertLoRALinear(LowRankExperts):
    """A frozen linear and a mixture of low-rank updates of it; up-projections are zero at first.

    base    anything called like a linear, with `in_features` and `out_features` (or Conv1D's
            `nx`, `nf`); a child unless `own_base` is False
    alpha   the update is scaled by alpha / r (default alpha = r)
    device  of the update; that of the base by default
    """

    base: nn.Module

    def __init__(
        self,
        base: nn.Module,
        experts: int,
        r: int,
        *,
        gate: str = "softmax",
        top_k: int | None = None,
        router_input: str = "token",
        router_noise: float = 0.0,
        shared_down: bool = False,
        alpha: float | None = None,
        own_base: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        in_features, out_features = linear_features(check_module("base", base))
        checks.check_bool("own_base", own_base)
        if alpha is not None:
            checks.check_number("alpha", alpha)
        super().__init__(
            in_features,
            out_features,
            experts,
            r,
            gate=gate,
            top_k=top_k,
            router_input=router_input,
            router_noise=router_noise,
            shared_down=shared_down,
            bias=False,
            device=next((p.device for p in base.parameters()), None) if device is None else device,
            dtype=dtype,
        )
        if own_base:
            self.base = base
        else:
            self.__dict__["base"] = base
        self.scale = 1.0 if alpha is None else float(alpha) / r
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.in_features)
        self.down.uniform_(-bound, bound)
        self.up.zero_()
        if self.router is not None:
            self.router.zero_()

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, domain: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """base(x) updated [..., out_features], and its routing; arguments as ExpertAdapter's."""
        return self.adapted(self.base, x, mask=mask, domain=domain)

    def adapted(
        self,
        base: nn.Module,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        domain: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """The same on top of `base`."""
        check_module("base", base)
        self._check(x, None, mask, domain)
        check_values("x", x, self.down)
        check_input(x, base)
        return self.combine(
            x,
            base=base(x),
            keep=1.0,
            mix=self.scale,
            mask=mask,
            domain=domain,
            training=self.training,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"
