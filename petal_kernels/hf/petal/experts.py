"""PETAL's experts on the embeddings of a Q-Former, [queries; instruction]: once per forward, by a
hook on the embeddings; the padding mask is that of the model that owns them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from petal_kernels.hf.config import PetalConfig
from petal_kernels.hf.petal.layers import State
from petal_kernels.hf.petal.specs import Embeddings
from petal_kernels.hf.tokens import Tokens, named
from petal_kernels.nn.experts import InstructionExperts
from petal_kernels.nn.published import published_instruction


def build_experts(found: Embeddings, config: PetalConfig) -> InstructionExperts:
    """The experts that `config` asks for, where the embeddings are."""
    return InstructionExperts(
        found.width,
        config.experts,
        config.expert_r,
        gate=str(config.gate),
        top_k=config.top_k,
        router_input=config.router_input,
        router_noise=config.router_noise,
        tokens=str(config.tokens),
        keep=config.keep,
        mix=config.mix,
        init=config.expert_init,
        device=next(found.module.parameters()).device,
        dtype=config.dtype,
    )


# Plain functions that find their state through the module they run on, as in layers.py.


def enter_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the embeddings' owner: keeps what is known of its tokens."""
    state: State = module.__dict__["_petal_state"]
    if not state.enabled:
        return
    state.tokens = Tokens.entering((), named(module, args, kwargs), None, reader=state.reader)
    state.routings.clear()


def leave_model(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the owner, run after a failure too."""
    state: State = module.__dict__["_petal_state"]
    state.tokens = Tokens()


def serve_embeddings(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """Forward hook of the embeddings: what the experts make of them."""
    state: State = module.__dict__["_petal_state"]
    experts = state.adapter.experts
    if not state.enabled or experts is None:
        return None
    embeds = args[2] if len(args) > 2 else kwargs.get("query_embeds")
    queries = 0 if embeds is None else embeds.shape[1]
    if experts.tokens == "text" and queries == output.shape[1]:
        return None  # there is no instruction
    mask = state.tokens.counted(output, encoded=False)
    if state.published:
        served, routing = published_instruction(experts, output, queries, mask)
    else:
        served, routing = experts(output, queries, mask)
    state.routings[state.embeddings] = routing
    # Under autocast the stream of a post-LN stack is wider than its products.
    return served.to(output.dtype)
