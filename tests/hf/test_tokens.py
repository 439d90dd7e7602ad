"""Which tokens count: padding under every kind of cache, domains behind one, what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import petal_kernels as pk
from petal_kernels.hf.tokens import Domains, Tokens, named
from tests.hf import tiny_experts, tiny_text
from tests.hf.tiny_experts import adapter, batch, domain_of, lora, petal
from tests.hf.tiny_rows import (
    DECODERS,
    PACKED,
    POOLED,
    READER,
    WINDOWED,
    attached,
    generated,
    packed,
    padded,
    routed,
    same,
)

# -- where the columns of a mask lie ----------------------------------------------------------


@pytest.mark.parametrize("implementation", ["fused", "published"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_static_cache_routes_like_a_growing_one(family: str, implementation: str) -> None:
    """Its mask is as long as the cache, and of a window's layers as long as the window."""
    model, _ = attached(family, lora(**POOLED), implementation)
    ids, mask = padded()
    want = generated(model, ids, mask, "dynamic")
    got = generated(model, ids, mask, "static")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("dims", [2, 4])
def test_a_prompt_counts_its_own_columns_of_a_longer_mask(family: str, dims: int) -> None:
    import transformers
    from transformers.masking_utils import create_masks_for_generate

    model, attachment = attached(family, lora(**POOLED))
    ids, mask = padded()
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
        want = routed(attachment)
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        given: Any = nn.functional.pad(mask, (0, 9), value=1)
        if dims == 4:
            embeds = model.get_input_embeddings()(ids)
            given = create_masks_for_generate(model.config, embeds, mask, cache)
        model(ids, attention_mask=given, past_key_values=cache)
        same(routed(attachment), want)
        # Again behind a cache that starts anew: how full it is is now known to the device alone.
        cache.reset()
        model(ids, attention_mask=given if dims == 2 else mask, past_key_values=cache)
    same(routed(attachment), want)


@pytest.mark.parametrize("family", DECODERS)
def test_a_second_turn_counts_the_columns_behind_the_cache(family: str) -> None:
    """Longer than the window and padded: what is pooled is what the second call is given."""
    import transformers

    model, attachment = attached(family, adapter(**POOLED))
    first, mask = padded()
    more = torch.arange(10, 16).repeat(2, 1)
    keep = torch.ones_like(more)
    keep[0, 4:] = 0
    found = []
    for cut in (6, 4):  # the first row with its padding and without
        cache = transformers.DynamicCache(config=model.config)
        whole = torch.cat((mask, keep[:, :cut]), dim=1)
        with torch.no_grad():
            model(first, attention_mask=mask, past_key_values=cache)
            model(more[:, :cut], attention_mask=whole, past_key_values=cache)
        found.append({path: logits[:1] for path, logits in routed(attachment).items()})
    same(found[0], found[1])


def test_a_mask_without_the_tokens_columns_is_refused() -> None:
    model, _ = attached("llama", lora(**POOLED))
    ids, mask = padded()
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"for the 8 positions .* 7 in the cache\), got \[2, 1\]"):
        model(ids[:, :1], attention_mask=mask[:, -1:], past_key_values=cache)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_routes_alone_as_in_a_padded_batch(family: str, side: str) -> None:
    """Also where the user makes the 4-D mask, of booleans (not Gemma 2) or of what is added."""
    model, attachment = attached(family, lora(**POOLED))
    ids, mask = padded()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    causal = torch.ones(7, 7).tril().bool() & mask.bool()[:, None, None]
    added = torch.zeros(causal.shape, dtype=model.dtype)
    added = added.masked_fill(~causal, torch.finfo(model.dtype).min)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids[1:][mask[1:].bool()][None], use_cache=False)
        want = routed(attachment)
        for given in (mask, added) if family == "gemma2" else (mask, causal, added):
            model(ids, attention_mask=given, position_ids=positions, use_cache=False)
            same({path: logits[1:] for path, logits in routed(attachment).items()}, want)


def test_padding_that_sees_nothing_does_not_part_a_row() -> None:
    model, attachment = attached("llama", lora(**POOLED))
    ids, mask = (given.flip(1) for given in padded())
    sees = (
        torch.ones(7, 7).tril().bool() & mask.bool()[:, None, None] & mask.bool()[:, None, :, None]
    )
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
        want = routed(attachment)
        model(ids, attention_mask=sees, use_cache=False)
    same(routed(attachment), want)


@pytest.mark.parametrize("family", ["bart", "t5", "bert"])
def test_a_mask_given_by_position_is_read(family: str) -> None:
    config = adapter(**POOLED) if family == "bert" else pk.VLPetConfig(r=4, gate="small")
    model, _ = attached(family, config)
    stack: Any = model.bert if family == "bert" else model.get_encoder()
    values = batch(family)
    ids, mask = values["input_ids"], values["attention_mask"]
    with torch.no_grad():
        want = stack(input_ids=ids, attention_mask=mask)[0]
        assert torch.equal(stack(ids, mask)[0], want)
        assert not torch.allclose(stack(ids, torch.ones_like(mask))[0][-1, :6], want[-1, :6])


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_small_gate_counts_by_a_mask_of_four_dims(family: str, variant: Any) -> None:
    """As by the one of two; the released form takes its mean over the padding too."""
    model, _ = attached(family, pk.VLPetConfig(r=4, gate="small", variant=variant))
    encoder: Any = model.get_encoder()
    values = batch(family)
    ids, mask = values["input_ids"], values["attention_mask"]
    wide = mask.bool()[:, None, None].expand(-1, 1, ids.shape[1], -1)
    with torch.no_grad():
        want = encoder(ids, attention_mask=mask)[0]
        got = encoder(ids, attention_mask=wide)[0]
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])


def test_beams_of_a_sample_are_routed_alike() -> None:
    model, attachment = attached("bart", lora(**POOLED))
    values = batch("bart")
    values.pop("labels")
    with torch.no_grad():
        model.generate(**values, num_beams=2, max_new_tokens=3, min_new_tokens=3)
        beams = routed(attachment)
        encoded = {k: v for k, v in beams.items() if "encoder_attn.v_proj" in k}
        model(**values, decoder_input_ids=values["input_ids"][:, :1])
    assert len(encoded) == 2
    for path, logits in encoded.items():
        want = routed(attachment)[path].repeat_interleave(2, dim=0)
        torch.testing.assert_close(logits, want, rtol=1e-6, atol=1e-6)


def test_petals_experts_read_the_qformers_mask_in_all_its_forms() -> None:
    """[queries; instruction], by position, or of four dims; embeddings that are given too."""
    model, attachment = attached("instructblip", petal(**POOLED, tokens="all"))
    qformer: Any = model.qformer
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64)
    image = torch.randn(2, 4, 40, generator=generator, dtype=torch.float64)
    ids, mask = torch.arange(5, 12).repeat(2, 1), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    more = {"query_embeds": queries, "encoder_hidden_states": image}
    wide = mask.bool()[:, None, None].expand(-1, 1, 12, -1)
    found = []
    with torch.no_grad():
        qformer(ids[:, :4], attention_mask=mask[:, :9], **more)
        want = {path: logits[1:] for path, logits in routed(attachment).items()}
        for args, kwargs in (
            ((ids,), {"attention_mask": mask}),
            ((ids, mask), {}),
            ((ids,), {"attention_mask": wide}),
        ):
            qformer(*args, **kwargs, **more)
            found.append({path: logits[1:] for path, logits in routed(attachment).items()})
        for got in found:
            same(got, want)
        with pytest.raises(ValueError, match=PACKED.format("position_ids that start anew")):
            qformer(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), **more)


# -- domains ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_domains_behind_a_static_cache(family: str) -> None:
    model, attachment = attached(family, lora(gate="domain"))
    ids, mask = padded()
    domain = ids % tiny_experts.EXPERTS
    outs = []
    for cache in ("dynamic", "static"):
        with attachment.domains(domain, generated=2):
            outs.append(generated(model, ids, mask, cache))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_a_last_token_has_its_domain_in_every_layer(family: str) -> None:
    """Each layer appends to a static cache whose length only the device knows."""
    import transformers

    model, attachment = attached(family, lora(gate="domain"))
    ids, domain = padded()[0], padded()[0] % tiny_experts.EXPERTS
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        with attachment.domains(domain):
            want = model(ids, use_cache=False).logits[:, -1:]
        with attachment.domains(domain[:, :-1]):
            model(ids[:, :-1], past_key_values=cache)
        with attachment.domains(domain, generated=int(domain[0, -1] + 1) % tiny_experts.EXPERTS):
            got = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_domains_behind_a_length_that_the_device_knows() -> None:
    given, x = torch.tensor([[0, 1, 2, 1]]), torch.zeros(1, 2, 8)
    for past, want in ((0, [0, 1]), (2, [2, 1]), (3, [1, 9]), (4, [9, 9]), (7, [9, 9])):
        domains = Domains(given, generated=9, image=0, past=torch.tensor(past), length=2)
        assert domains.of(x, encoded=False).tolist() == [want]


def test_a_static_cache_that_starts_anew_still_checks_the_domains() -> None:
    import transformers

    model, attachment = attached("llama", lora(gate="domain"))
    ids, domain = batch("llama")["input_ids"], domain_of("llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad(), attachment.domains(domain):
        want = model(ids, past_key_values=cache).logits
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, want)
    cache.reset()
    with (
        pytest.raises(ValueError, match=r"for the 9 positions .* got \[2, 8\]"),
        attachment.domains(domain[:, :8]),
    ):
        model(ids, past_key_values=cache)


# -- cost -------------------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Counts the values that the host reads."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_ordinary_batches_are_entered_without_reading_a_value() -> None:
    import transformers

    model: Any = tiny_text.build("llama")
    ids, mask = padded()
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    model(ids, past_key_values=cache)
    domains = Domains(ids, generated=1, image=0)
    step = {"input_ids": ids[:, :1], "past_key_values": cache}
    positions = {"position_ids": mask.cumsum(1) - 1}
    with _Reads() as reads:
        calls: list[dict[str, Any]] = [
            {"input_ids": ids},
            {"input_ids": ids, "attention_mask": mask, **positions},
            {**step, "attention_mask": torch.ones(2, 16)},
            {**step, "attention_mask": {"full_attention": torch.ones(2, 1, 1, 16).bool()}},
        ]
        for call in calls:
            tokens = Tokens.entering((), call, domains, reader=READER)
            tokens.counted(torch.zeros(2, call["input_ids"].shape[1], 8), encoded=False)
        # Nobody averages: nothing is asked of the positions.
        Tokens.entering((), {"input_ids": ids, "position_ids": ids}, None)
        assert reads.count == 0
        with pytest.raises(ValueError, match="position_ids"):
            Tokens.entering(
                (), {"input_ids": ids, "position_ids": ids}, None, reader="gate='small'"
            )
    assert reads.count == 1


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
def test_compiled_entries_count_alike_and_assert() -> None:
    """Without a graph break; where the host cannot look the device refuses packed rows."""

    def count(x: Tensor, **call: Any) -> Tensor:
        tokens = Tokens.entering((x,), call, None, reader=READER)
        mask = tokens.counted(x, encoded=False)
        return x.new_ones(x.shape[:2]) if mask is None else mask + x.new_zeros(x.shape[:2])

    compiled = torch.compile(count, fullgraph=True, backend="eager")
    _, positions, parted = packed()
    x, mask = torch.zeros(1, 12, 8), (torch.arange(12) > 3).long()[None]
    causal = torch.ones(12, 12).tril().bool() & mask.bool()
    for call in (
        {"attention_mask": mask},
        {"attention_mask": causal[None, None]},
        {"position_ids": torch.arange(12)[None]},
    ):
        assert torch.equal(compiled(x, **call), count(x, **call))
    for call in ({"position_ids": positions}, {"attention_mask": parted}):
        with pytest.raises(RuntimeError, match=f"{READER}: want one sample per row"):
            compiled(x, **call)


@pytest.mark.usefixtures("_fresh")
def test_a_decoding_step_with_a_static_cache_compiles_whole() -> None:
    import transformers

    model, _ = attached("llama", lora(**POOLED))
    model.config.num_hidden_layers = 1
    ids, mask = padded()
    compiled = torch.compile(model.model, fullgraph=True, backend="eager")
    longer = nn.functional.pad(mask, (0, 9), value=1)
    outs = []
    for step in (model.model, compiled):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            for _ in range(2):  # the mask is given by position
                out = step(ids[:, -1:], longer, past_key_values=cache)
        outs.append(out[0])
    torch.testing.assert_close(outs[1], outs[0])


@pytest.mark.usefixtures("_fresh")
def test_domains_behind_a_static_cache_compile() -> None:
    import transformers

    model: Any = tiny_text.build("llama", torch.float32)
    ids, x = padded()[0], torch.zeros(2, 1, 8)
    given = Domains(ids % tiny_experts.EXPERTS, generated=9, image=0)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)

    def serve(x: Tensor) -> Tensor:
        tokens = Tokens.entering((x,), {"past_key_values": cache}, given)
        assert tokens.domains is not None
        return tokens.domains.of(x, encoded=False)

    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        compiled = torch.compile(serve, fullgraph=True, backend="eager")
        for want in (given.experts[:, 6:], torch.full((2, 1), 9)):
            assert torch.equal(compiled(x), want)
            model(ids[:, 6:], past_key_values=cache)


def test_arguments_by_name() -> None:
    class Stack(nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
            return hidden

    assert named(Stack, (1, 2), {"other": 3}) == {"hidden": 1, "mask": 2, "other": 3}
    assert named(Stack, (), {"mask": 2}) == {"mask": 2}
