"""Rows of tokens for tests of what a sample is: padded, packed, generated from; what was routed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.hf import tiny_experts, tiny_text

POOLED: dict[str, Any] = {"router_input": "pooled"}
READER = "router_input='pooled'"
DECODERS = ("llama", "mistral", "gemma2", "gpt2")
WINDOWED = ("llama", "mistral", "gemma2")  # gpt2 has no window; these take every kind of cache
PACKED = r"router_input='pooled': want one sample per row, .* got {}.*; use router_input='token'"


def attached(family: str, config: Any, implementation: str = "fused") -> tuple[Any, Any]:
    """In fp64; Gemma 2 computes its softmax in fp32, where an fp64 mask's least value is -inf."""
    model, attachment = tiny_experts.attached(family, config, implementation)
    return model.float() if family == "gemma2" else model, attachment


def routed(attachment: Any) -> dict[str, Tensor]:
    return {path: r.logits for path, r in attachment.routing().items()}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for path, logits in want.items():
        torch.testing.assert_close(got[path], logits, rtol=1e-5, atol=1e-5, msg=path)


def padded() -> tuple[Tensor, Tensor]:
    """Two prompts of 7 and of 4 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, tiny_text.VOCABULARY - 5, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """A row of two samples, of 5 and of 7 tokens; their position_ids, and the 4-D mask of both."""
    ids = torch.arange(5, 17)[None]
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    mask = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).tril().bool()[None, None]
    return ids, positions, mask


def generated(model: Any, ids: Tensor, mask: Tensor, cache: str | None, **more: Any) -> Tensor:
    kind = {"cache_implementation": cache} if cache else {"use_cache": False}
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **kind, **more},
    )
    return torch.stack(out.logits, 1)
