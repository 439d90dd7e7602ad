"""What a sample is: packed rows are refused where one choice is taken per row, else right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.hf.tokens import Tokens
from tests.hf import tiny_experts
from tests.hf.tiny_experts import adapter, batch, lora
from tests.hf.tiny_rows import (
    DECODERS,
    PACKED,
    POOLED,
    attached,
    generated,
    packed,
    padded,
    routed,
    same,
)


@pytest.mark.parametrize("implementation", ["fused", "published"])
@pytest.mark.parametrize("family", DECODERS)
def test_packed_rows_are_refused_by_a_pooled_router(family: str, implementation: str) -> None:
    model, attachment = attached(family, lora(**POOLED), implementation)
    ids, positions, mask = packed()
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    for given, met in (
        ({"position_ids": positions}, "position_ids that start anew inside a row"),
        ({"attention_mask": mask}, "an attention_mask that parts a row"),
        ({"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, "cu_seq_lens_q of 2 samples in 1 rows"),
        ({"seq_idx": (positions.cumsum(1) > 9).int()}, "seq_idx that changes inside a row"),
    ):
        with pytest.raises(ValueError, match=PACKED.format(met)), torch.no_grad():
            model(ids, use_cache=False, **given)
    with torch.no_grad(), attachment.disabled():
        model(ids, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("config", [lora(), lora(gate="mean"), lora(gate="domain")])
def test_packed_rows_are_right_where_every_token_is_routed(family: str, config: Any) -> None:
    model, attachment = attached(family, config)
    ids, positions, mask = packed()
    parts = ids.split((5, 7), dim=1)

    def run(x: Tensor, **given: Any) -> Tensor:
        with torch.no_grad():
            if config.gate != "domain":
                return model(x, use_cache=False, **given).logits
            with attachment.domains(x % tiny_experts.EXPERTS):
                return model(x, use_cache=False, **given).logits

    alone = torch.cat([run(part) for part in parts], dim=1)
    torch.testing.assert_close(run(ids, position_ids=positions), alone)
    if family in ("llama", "gpt2"):  # the others' own masks have a window or are to be added
        got = run(ids, position_ids=positions, attention_mask=mask)
        torch.testing.assert_close(got, alone)


@pytest.mark.parametrize(("family", "gate"), [("bart", "small"), ("t5", "small"), ("bert", None)])
def test_an_encoders_packed_rows_are_refused(family: str, gate: str | None) -> None:
    config = pk.VLPetConfig(r=4, gate="small") if gate else adapter(**POOLED)
    model, _ = attached(family, config)
    stack: Any = model.bert if family == "bert" else model.get_encoder()
    mask = torch.block_diag(torch.ones(5, 5), torch.zeros(2, 2), torch.ones(5, 5)).bool()
    names = ("gate='small'", "another gate") if gate else ("router_input='pooled'", "router_input")
    with pytest.raises(ValueError, match=f"{names[0]}: want one sample .*; use {names[1]}"):
        stack(packed()[0], attention_mask=mask[None, None])


def test_what_is_one_sample_is_not_refused() -> None:
    """Positions that go on, that start behind padding or behind a cache, and a prefix seen whole;
    of one sample in each row the ends may be given."""
    model, _ = attached("llama", lora(**POOLED))
    ids, mask = padded()
    behind = (mask.cumsum(1) - 1).clamp(min=0)
    prefix = torch.ones(7, 7).tril().bool()
    prefix[:3, :3] = True
    one = torch.tensor([0, 7], dtype=torch.int32)
    with torch.no_grad():
        model(ids, position_ids=torch.arange(7)[None], use_cache=False)
        model(ids, position_ids=torch.arange(4, 11).repeat(2, 1), use_cache=False)
        model(ids, position_ids=behind, attention_mask=mask, use_cache=False)
        model(ids, attention_mask=prefix[None, None], use_cache=False)
        model(ids[:1], cu_seq_lens_q=one, cu_seq_lens_k=one, use_cache=False)
        generated(model, ids, mask, None)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_cross_attentions_mask_that_parts_a_row_is_refused(family: str) -> None:
    model, attachment = attached(family, lora(**POOLED))
    values = batch(family)
    ids, mask = values["input_ids"], values["attention_mask"]
    encoded = model.get_encoder()(ids, attention_mask=mask)[0]
    given = {"encoder_outputs": (encoded,), "decoder_input_ids": ids[:, :4]}
    wide = mask.bool()[:, None, None].repeat(1, 1, 4, 1)
    with torch.no_grad():
        model(attention_mask=mask, **given)
        want = routed(attachment)
        model(attention_mask=wide, **given)
        same(routed(attachment), want)
        wide[0, 0, 2:, :3] = False
        with pytest.raises(ValueError, match="got an encoder_attention_mask that parts a row"):
            model(attention_mask=wide, **given)


def test_masks_of_another_kind_and_pieces_of_rows_are_refused() -> None:
    x = torch.zeros(2, 4, 8)
    for mask, met in (
        (object(), r"got a object \(with flex attention: load the model with attn_impl"),
        (torch.ones(2, 4, 4), r"got \[2, 4, 4\]"),
        (torch.ones(2, 1, 4, 4).long(), "booleans or floats to add, got torch.int64"),
        (torch.ones(2, 1, 3, 4).bool(), r"attention_mask \[B, 1, 4, positions\], got \[2, 1, 3"),
    ):
        with pytest.raises(ValueError, match=met):
            Tokens.entering((x,), {"attention_mask": mask}, None, reader="gate='small'")
        Tokens.entering((x,), {"attention_mask": mask}, None)  # nobody reads it
    tokens = Tokens.entering((x,), {}, None, reader="gate='small'")
    with pytest.raises(ValueError, match="gate='small': want the 4 tokens of a sample at once"):
        tokens.counted(x[:, :2], encoded=False)
    tokens = Tokens.entering(
        (x,), {"attention_mask": torch.ones(3, 4)}, None, reader="gate='small'"
    )
    with pytest.raises(ValueError, match=r"want a mask for 2 rows of 4 tokens, got one for \[3, 4"):
        tokens.counted(x, encoded=False)
    model = tiny_experts.build("bert", torch.float32)
    module: Any
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 3
    pk.attach(model, adapter(**POOLED))
    with pytest.raises(ValueError, match="set chunk_size_feed_forward to 0"):
        model(**batch("bert"))
