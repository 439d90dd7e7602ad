"""Which expert serves which token, in models: domains, padding, losses, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from tests.hf.tiny import QUERIES
from tests.hf.tiny_experts import (
    EXPERTS,
    SAME,
    adapter,
    attached,
    batch,
    build,
    domain_of,
    logits,
    lora,
    petal,
)


def test_tokens_behind_the_prompt_have_the_generated_domain() -> None:
    """Cached decoding against one forward whose domains are written out."""
    model, attachment = attached("llava", lora(gate="domain"))
    ids, domain = batch("llava")["input_ids"], domain_of("llava")
    more = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    with torch.no_grad(), attachment.domains(domain, generated=2):
        found = model.generate(ids, return_dict_in_generate=True, **more)  # type: ignore[operator]
    whole = torch.cat((domain, domain.new_full((2, 5), 2)), dim=1)
    with torch.no_grad(), attachment.domains(whole):
        want = model(found.sequences).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1), want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_decoder_generates_and_reads_the_encoders_domains(family: str) -> None:
    model, attachment = attached(family, lora(gate="domain"))
    logits(model, attachment, family)
    want = nn.functional.one_hot(domain_of(family), EXPERTS).bool()
    for path, routing in attachment.routing().items():
        generated = torch.tensor([False, False, True]).expand_as(routing.chosen)
        role = next(r.role for r in attachment.report().rows if r.module == path)
        reads = role.startswith("encoder") or role == "decoder.cross.value"
        assert torch.equal(routing.chosen, want if reads else generated), path
    with torch.no_grad(), attachment.domains(torch.tensor([0, 1])):
        model(**batch(family))
    for routing in attachment.routing().values():
        assert torch.equal(routing.chosen, torch.eye(3).bool()[:2])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("config", [lora(), adapter()], ids=["lora", "adapter"])
def test_a_recompute_tells_nothing_of_a_forward(config: AdapterConfig) -> None:
    """The kind: a backward that puts its own routing in the place of the last forward's."""
    model: Any
    model, attachment = attached("llama", config)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch("llama")).loss
    with torch.no_grad():
        model(**batch("llama", seed=1))
    before = attachment.routing()
    loss.backward()
    after = attachment.routing()
    assert [path for path in before if after[path] is not before[path]] == []


_POOLED: dict[str, Any] = {"router_input": "pooled"}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, lora(**_POOLED)) for family in ("bart", "roberta", "llama", "caption")),
        *(("instructblip", f(**_POOLED)) for f in (petal, lora, adapter)),
    ],
)
def test_a_pooled_router_leaves_padding_out(family: str, config: AdapterConfig) -> None:
    """The logits of a sample do not depend on its padding."""
    blip = family == "instructblip"
    model, attachment = attached(family, config)
    found = []
    for padding in (0, 4):
        ids = torch.arange(5, 11).repeat(2, 1)
        mask = torch.ones_like(ids)
        ids, mask = (nn.functional.pad(t, (0, padding)) for t in (ids, mask))
        if blip:
            inputs = batch(family)
            inputs = {k: v[:2] for k, v in inputs.items()}
            inputs |= {"qformer_input_ids": ids, "qformer_attention_mask": mask}
        else:
            inputs = {"input_ids": ids, "attention_mask": mask}
            inputs |= {"decoder_input_ids": ids[:, :3]} if family == "bart" else {}
            if family == "caption":
                inputs["pixel_values"] = batch(family)["pixel_values"][:2]
        with torch.no_grad():
            model(**inputs)
        found.append({path: r.logits for path, r in attachment.routing().items()})
    for path, want in found[0].items():
        assert want.shape == (2, EXPERTS)
        torch.testing.assert_close(found[1][path], want, rtol=1e-6, atol=1e-6, msg=path)


@pytest.mark.parametrize("kind", [lora, adapter])
def test_a_qformers_places_see_their_part_of_the_domains(kind: Any) -> None:
    model, attachment = attached("instructblip", kind(gate="domain"))
    logits(model, attachment, "instructblip")
    want = nn.functional.one_hot(domain_of("instructblip"), EXPERTS).bool()
    parts = {
        "qformer.cross.value": torch.tensor([False, True, False]).expand(3, 3),  # image=1
        **dict.fromkeys(
            ("qformer.cross.query", "qformer.cross", "qformer.ffn_query"), want[:, :QUERIES]
        ),
        "qformer.ffn": want[:, QUERIES:],
    }
    roles = {row.module: row.role for row in attachment.report().rows}
    for path, routing in attachment.routing().items():
        assert torch.equal(routing.chosen, parts.get(roles[path], want)), roles[path]
    layers = {role: sum(r == role for r in roles.values()) for role in roles.values()}
    crossed = {"qformer.cross", "qformer.cross.query", "qformer.cross.value"}
    assert all(count == (2 if role in crossed else 4) for role, count in layers.items())
    with (
        pytest.raises(ValueError, match=r"for the 12 positions .* got \[3, 11\]"),
        attachment.domains(domain_of("instructblip")[:, 1:]),
    ):
        model(**batch("instructblip"))


def test_blips_decoder_reads_an_image_or_the_encoders_domains() -> None:
    """The first stack crosses to the image; an answering decoder to the question."""
    for task in ("caption", "vqa"):
        model, attachment = attached(task, lora(gate="domain"))
        logits(model, attachment, task)
        want = nn.functional.one_hot(domain_of(task), EXPERTS).bool()
        for path, routing in attachment.routing().items():
            decodes, crosses = "text_decoder" in path, "crossattention.self.value" in path
            if task == "vqa" and decodes:
                expected = want if crosses else torch.tensor([False, False, True])
            else:
                expected = torch.tensor([False, True, False]) if crosses else want
            assert torch.equal(routing.chosen, expected.expand_as(routing.chosen)), path


def test_pieces_of_a_feed_forward_are_refused() -> None:
    model = build("instructblip", torch.float32)
    module: Any
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 4
    pk.attach(model, lora()).detach()
    with pytest.raises(ValueError, match="want chunk_size_feed_forward = 0, since"):
        pk.attach(model, adapter())


def test_rows_of_one_sample_are_neighbours() -> None:
    model, attachment = attached("gpt2", lora(gate="domain"))
    ids, domain = batch("gpt2")["input_ids"].repeat_interleave(2, dim=0), domain_of("gpt2")
    outs = []
    for given in (domain, domain.repeat_interleave(2, dim=0)):
        with torch.no_grad(), attachment.domains(given):
            outs.append(model(ids).logits)
    assert torch.equal(*outs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("family", "config"), [("llama", lora(top_k=2)), ("bart", adapter()), ("instructblip", petal())]
)
def test_auxiliary_loss(family: str, config: AdapterConfig) -> None:
    """It is the sum over the places, trains the routers, and is the same under checkpointing."""

    def run(checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model, attachment = attached(family, config)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        loss = model(**batch(family)).loss
        auxiliary = attachment.auxiliary_loss(balance=2.0, z=3.0)
        want = sum(
            2.0 * r.load_balance_loss() + 3.0 * r.z_loss() for r in attachment.routing().values()
        )
        torch.testing.assert_close(auxiliary, want)
        (0.0 * loss + auxiliary).backward()
        routers = {n: p.grad for n, p in attachment.named_parameters() if n.endswith("router")}
        assert len(routers) == len(attachment.method.experts())
        assert all(bool(g.any()) for g in routers.values())
        return auxiliary.detach(), routers

    (plain, want), (again, got) = run(False), run(True)
    assert torch.equal(plain, again)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=SAME, atol=SAME, msg=name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_auxiliary_loss_refuses_logits_without_a_graph() -> None:
    model, attachment = attached("gpt2", lora())
    with pytest.raises(RuntimeError, match="routing: want a forward since attach, got none"):
        attachment.routing()
    with torch.no_grad():
        model(**batch("gpt2"))
    assert not attachment.auxiliary_loss().requires_grad  # in evaluation it is a number
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    model(**batch("gpt2"))
    with pytest.raises(RuntimeError, match=r"ran without gradients, as .*\(\{'use_reen"):
        attachment.auxiliary_loss()
    with torch.no_grad():
        attachment.auxiliary_loss()
    _, other = attached("gpt2", lora(gate="mean"))
    other.model(**batch("gpt2"))
    with pytest.raises(ValueError, match="auxiliary_loss: want a trained router"):
        other.auxiliary_loss()
    for usage in other.expert_usage().values():
        assert torch.equal(usage, torch.full((EXPERTS,), 1 / EXPERTS))


def test_routings_end_with_the_next_forward() -> None:
    model, attachment = attached("bart", lora())
    model(**batch("bart"))
    first = attachment.routing()
    assert set(first) == set(attachment.method.experts())
    encoder: Any = model.model.encoder  # type: ignore[union-attr]
    encoder(batch("bart")["input_ids"])
    now = attachment.routing()
    assert all(".encoder." in path and now[path] is not first[path] for path in now)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="experts: want a model whose Q-Former embeds an instruc"):
        pk.attach(build("blip2"), petal())
    with pytest.raises(ValueError, match="routing: want an attachment with experts"):
        pk.attach(build("blip2"), pk.PetalConfig(r=4)).routing()
    model, attachment = attached("gpt2", lora(gate="domain"))
    good = domain_of("gpt2")
    with torch.no_grad(), attachment.domains(good), attachment.domains(0 * good):
        model(**batch("gpt2"))
    with pytest.raises(ValueError, match="domain: want the domain of each token for"):
        model(**batch("gpt2"))
    for wrong, error, message in (
        (good.float(), TypeError, "domain: want dtype int64 or int32, got float32"),
        (good + 1, ValueError, "domain: want 0 to 2, got 1 to 3"),
        (good[None], ValueError, r"domain: want shape \[B, L\] or \[B\], got \[1, 2, 9\]"),
    ):
        with pytest.raises(error, match=message), attachment.domains(wrong):
            pass
    for name in ("generated", "image"):
        with pytest.raises(ValueError, match=f"{name}: want an expert, 0 to 2, got 3"):
            attachment.domains(good, **{name: 3}).__enter__()
    for wrong, message in (
        (good[:, :8], r"for the 9 positions of the sequence \(9 tokens\), got \[2, 8\]"),
        (torch.cat((good, good)), "domain: want a batch that divides the hidden states' 2, got 4"),
    ):
        with pytest.raises(ValueError, match=message), attachment.domains(wrong):
            model(**batch("gpt2"))
    attachment.detach()
    with pytest.raises(RuntimeError, match="routing: this attachment was detached"):
        attachment.routing()
    _, other = attached("gpt2", lora())
    with pytest.raises(ValueError, match="domains: want a config with gate='domain', got 'softm"):
        other.domains(good).__enter__()
