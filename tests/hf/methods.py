"""Every method as one row of a table, and what the conformance tests do with a row.

A method joins by a row of `ROWS`: its name, a family of tiny models, its config, and what stands
around a call (vision features for routes, domains for experts by domain, text features for
Aurora's context). `tests/hf/test_methods*.py` run every check over every row.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from tests.hf import tiny
from tests.hf.method_families import FAMILIES

SAME = 1e-9  # relative, in fp64: another order of the same sums
EXPERTS = 3
Values = dict[str, Tensor | None]


@dataclass
class Given:
    """What one call is given: the model's batch, and what stands around the call."""

    batch: dict[str, Any]
    around: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that want a gradient."""
        found = {**self.batch, "around": self.around}
        return {n: t for n, t in found.items() if isinstance(t, Tensor) and t.requires_grad}


@dataclass(frozen=True, eq=False)
class Row:
    """A method on a family; `without` says which checks do not apply, and why.

    A row `like` another runs by the same mechanism: checks that take long are marked slow there.
    """

    name: str
    family: str
    config: Callable[..., AdapterConfig]
    around: Literal["", "vision", "domains", "context"] = ""
    idle: tuple[str, ...] = ()  # parts of names: zero gradients, since nobody reads what they do
    beside: tuple[str, ...] = ()  # ends of paths: changed by what the report lists as the adapter's
    without: dict[str, str] = field(default_factory=dict)
    like: str = ""

    @property
    def folds(self) -> bool:
        """Routed updates depend on each sample's features: `merge` refuses them."""
        return self.around != "vision"

    @property
    def joins(self) -> bool:
        """Its route joins each vision token with one of the text."""
        config = self.config()
        released = config.variant == "release" and getattr(config, "function", "") in ("add", "mul")
        return released or getattr(config, "function", "") == "xt"

    @property
    def plain(self) -> bool:
        """Ordinary LoRA or adapters, which share nothing between layers."""
        return isinstance(self.config(), (pk.RoutingConfig, pk.LoraConfig)) and not self.around

    def given(
        self,
        seed: int = 0,
        *,
        leaves: str = "",
        length: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Given:
        """Batches of other sizes and lengths by seed. `leaves`: "inputs" that want a gradient, or
        "all": what stands around the call too."""
        family, size = FAMILIES[self.family], 2 + seed % 2
        batch = family.batch(size=size, seed=seed, length=length or 9 - seed % 3)
        generator = torch.Generator().manual_seed(seed + 50)
        around: Tensor | None = None
        if self.around in ("vision", "context"):
            tokens = _positions(self.family, batch) if self.joins else 3
            shape: tuple[int, ...] = (size, tokens, family.width)
            around = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            around.requires_grad_(leaves == "all")
        if self.around == "domains":
            shape = (size, _positions(self.family, batch))
            around = torch.randint(0, EXPERTS, shape, generator=generator)
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                batch[name] = value.to(dtype).requires_grad_(bool(leaves))
        return Given(batch, around)


def _positions(family: str, batch: dict[str, Any]) -> int:
    """Of the sequence that the adapted stack sees."""
    if family in tiny.FAMILIES:
        return tiny.QUERIES + (batch["qformer_input_ids"].shape[1] if len(batch) > 4 else 0)
    return int(batch["attention_mask"].shape[1])


def around(attachment: Any, given: Given) -> contextlib.AbstractContextManager[Any]:
    """What stands around a call with `given`, by what the attachment's config asks for."""
    if given.around is None:
        return contextlib.nullcontext()
    if isinstance(attachment.config, pk.AuroraConfig):
        return attachment.context(given.around)
    if isinstance(attachment.config, pk.ExpertConfig):
        return attachment.domains(given.around, generated=2, image=1)
    return attachment.vision(given.around)


_petal = partial(pk.PetalConfig, r=5, dropout=0.0)
_experts: dict[str, Any] = {"experts": EXPERTS, "expert_r": 4}
_release: dict[str, Any] = {"variant": "release"}
_aurora = partial(pk.AuroraConfig, r=5, dropout=0.0, scale=0.8)
_vlpet = partial(pk.VLPetConfig, r=6, value_r=4, scale=0.7)
_placed = partial(pk.VLPetConfig, r=6, value_r=4, module="lora")
_shared = partial(pk.CompacterConfig, r=8, division=4, factor_r=2, share_rule=True)
_lora = partial(pk.RoutingConfig, r=4, alpha=6.0)
_adapter = partial(pk.RoutingConfig, r=4, kind="adapter")
_mix = partial(pk.ExpertConfig, r=4, experts=EXPERTS)
_mixed = partial(_mix, kind="adapter")
_peft = partial(pk.LoraConfig, r=4, lora_alpha=6)
_vision = partial(Row, around="vision")
_domains = partial(Row, around="domains")
_CONTEXT = ("crossattention.output.LayerNorm",)  # gains the batch context

ROWS = (
    Row("petal-paper-instructblip", "instructblip", partial(_petal, **_experts)),
    Row("petal-release-instructblip", "instructblip", partial(_petal, **_release, **_experts),
        beside=_CONTEXT, like="petal-paper-instructblip"),
    Row("petal-paper-blip2", "blip2", partial(_petal, modules_to_save=["language_projection"]),
        like="petal-paper-instructblip"),
    Row("petal-release-blip2", "blip2", partial(_petal, **_release), beside=_CONTEXT),
    Row("aurora-caption", "caption", _aurora, like="aurora-vqa"),
    Row("aurora-retrieval", "retrieval", partial(_aurora, context="batch"), "context",
        beside=("itm_head",)),
    Row("aurora-vqa", "vqa", partial(_aurora, **_release)),
    Row("vlpet-bart-large", "bart", _vlpet),
    Row("vlpet-bart-small", "bart", partial(_vlpet, gate="small")),
    *(Row(f"vlpet-bart-{g}", "bart", partial(_vlpet, gate=g), like="vlpet-bart-large")
      for g in ("middleX", "middleY", "none")),
    Row("vlpet-bart-release", "bart", partial(_vlpet, gate="middleX", **_release),
        like="vlpet-bart-large"),
    Row("vlpet-t5", "t5", _vlpet),
    Row("vlpet-bart-compacter", "bart", partial(_vlpet, module="compacter"),
        like="vlpet-bart-large"),
    Row("vlpet-t5-compacter", "t5", partial(_vlpet, module="compacter", gate="large", factor_r=1,
        share_rule=True), like="vlpet-bart-large"),
    Row("vlpet-bart-lora", "bart", partial(_placed, alpha=9.0), like="lora-llama"),
    Row("vlpet-t5-lora", "t5", _placed, like="lora-llama"),
    Row("vladapter-bart", "bart", partial(pk.VLAdapterConfig, r=6)),
    Row("vladapter-t5", "t5", partial(pk.VLAdapterConfig, r=6), like="vlpet-t5"),
    Row("compacter-bart", "bart", partial(pk.CompacterConfig, r=6)),
    Row("compacter-t5", "t5", _shared),
    Row("compacter-llama", "llama", partial(_shared, factor_r=None), like="compacter-bart"),
    Row("lora-llama", "llama", _lora),
    Row("lora-llama-whole", "llama", partial(_lora, modules_to_save=["lm_head"])),
    Row("lora-gpt2", "gpt2", partial(_lora, train_bias=True)),
    Row("lora-bert", "bert", partial(_lora, train_norms=True), like="adapter-roberta"),
    Row("lora-bart", "bart", _lora, like="lora-llama"),
    Row("lora-qformer", "instructblip", _lora, like="lora-llama"),
    Row("lora-blip", "retrieval", _lora, like="lora-llama"),
    Row("peft-llama", "llama", partial(_peft, target_modules="all-linear")),
    Row("peft-gpt2", "gpt2", partial(_peft, target_modules=["c_attn", "c_fc"], bias="all")),
    Row("dora-llama", "llama", partial(_peft, target_modules="all-linear", use_dora=True)),
    Row("dora-gpt2", "gpt2", partial(_peft, target_modules=["c_attn", "c_fc"], use_dora=True,
        bias="all", init_lora_weights="olora"), like="dora-llama"),
    Row("pissa-llama", "llama",
        partial(_peft, target_modules="all-linear", init_lora_weights="pissa")),
    Row("tokens-gpt2", "gpt2-words",
        partial(_peft, trainable_token_indices=[7, 3, 21, 9, 30, 44, 12, 50, 26])),
    Row("peft-llava", "llava", partial(_peft, use_rslora=True), like="peft-llama"),
    Row("peft-instructblip", "instructblip",
        partial(_peft, target_modules=["qkv", "query", "language_projection", "q_proj"],
                parts=("language", "projector", "vision")), like="peft-llama"),
    Row("adapter-llama", "llama", _adapter),
    Row("adapter-t5", "t5", _adapter, like="adapter-llama"),
    Row("adapter-gpt2", "gpt2", partial(_adapter, share=True), like="adapter-llama"),
    Row("adapter-roberta", "roberta", partial(_adapter, residual=False, train_norms=True)),
    _vision("route-lora-llama", "llama", partial(_lora, function="gram")),
    _vision("route-lora-llava", "llava", partial(_lora, function="mul"), like="route-lora-llama"),
    _vision("route-lora-gpt2", "gpt2", partial(_lora, function="expand", groups="merged"),
            like="route-lora-llama"),
    _vision("route-lora-roberta", "roberta", partial(_lora, function="add"),
            like="route-lora-llama"),
    _vision("route-lora-qwen2_5_vl", "qwen2_5_vl", partial(_lora, function="gram_relu"),
            like="route-lora-llama"),
    _vision("route-lora-qformer", "instructblip", partial(_lora, function="gram"),
            like="route-adapter-qformer"),
    _vision("route-adapter-llava", "llava", partial(_adapter, function="add"),
            like="route-adapter-qformer"),
    _vision("route-adapter-qformer", "blip2", partial(_adapter, function="mul")),
    _vision("route-adapter-blip", "caption", partial(_adapter, function="gram"),
            like="route-adapter-qformer"),
    _vision("route-lora-llama-xt", "llama", partial(_lora, function="xt"),
            like="route-lora-llama"),
    _vision("route-adapter-gpt2-release", "gpt2", partial(_adapter, function="mul", **_release),
            like="route-adapter-qformer"),
    Row("experts-lora-llama", "llama", _mix),
    Row("experts-lora-pooled-roberta", "roberta", partial(_mix, router_input="pooled")),
    Row("experts-lora-mean-bert", "bert", partial(_mix, gate="mean", shared_down=True),
        like="experts-lora-llama"),
    Row("experts-lora-topk-qformer", "blip2", partial(_mix, router_input="pooled", top_k=2),
        like="experts-lora-pooled-roberta"),
    _domains("experts-lora-domain-bart", "bart", partial(_mix, gate="domain")),
    _domains("experts-lora-domain-vqa", "vqa", partial(_mix, gate="domain"),
             like="experts-lora-domain-bart"),
    Row("experts-adapter-topk-llama", "llama", partial(_mixed, top_k=2),
        like="experts-lora-llama"),
    Row("experts-adapter-pooled-t5", "t5", partial(_mixed, router_input="pooled"),
        like="experts-lora-pooled-roberta"),
    Row("experts-adapter-mean-llava", "llava", partial(_mixed, gate="mean"),
        like="experts-lora-llama"),
    _domains("experts-adapter-domain-qformer", "instructblip", partial(_mixed, gate="domain"),
             idle=("layers.1.ffn.",)),
    _domains("experts-adapter-domain-gpt2", "gpt2", partial(_mixed, gate="domain"),
             like="experts-lora-domain-bart"),
)  # fmt: skip


def every(check: str, *, quick: Callable[[Row], bool] = lambda row: True) -> pytest.MarkDecorator:
    """Parametrises a test over the rows. Where the check does not apply, its reason is shown; where
    it is not `quick`, it is marked slow."""
    rows = []
    for row in ROWS:
        why = row.without.get(check)
        marks = [pytest.mark.skip(reason=f"{row.name}: {why}")] if why else []
        marks += [] if quick(row) else [pytest.mark.slow]
        rows.append(pytest.param(row, id=row.name, marks=marks))
    return pytest.mark.parametrize("row", rows)


def own(row: Row) -> bool:
    """A row whose mechanism no other stands for."""
    return not row.like


def first(row: Row) -> bool:
    """The first row of its method and of what stands around a call."""
    alike = (r for r in ROWS if r.around == row.around and type(r.config()) is type(row.config()))
    return row is next(alike)


@functools.cache
def _base(family: str) -> nn.Module:
    return FAMILIES[family].build().double().eval()


def fresh(row: Row) -> nn.Module:
    """The base model, as it came."""
    return copy.deepcopy(_base(row.family))


def attached(
    row: Row,
    implementation: str = "fused",
    model: nn.Module | None = None,
    config: AdapterConfig | None = None,
) -> tuple[nn.Module, Any]:
    """A model with the row's method and trained-like values."""
    model = fresh(row) if model is None else model
    torch.manual_seed(2)
    attachment = pk.attach(model, config or row.config(), implementation=implementation)
    train(attachment)
    return model.to(torch.float64), attachment


@torch.no_grad()
def train(attachment: Any, seed: int = 1) -> None:
    """Moves every trained parameter, so that each matters; to values that fp32 holds."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in attachment.parameters():
        moved = torch.randn(parameter.shape, generator=generator) * 0.3 + parameter.float()
        parameter.copy_(moved)


def several(model: nn.Module, configs: Mapping[str, Any]) -> Any:
    """An adapter of each name, all of whose parameters matter; the first is active."""
    attachment: Any = None
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        if attachment is None:
            attachment = pk.attach(model, config, name=name)
        else:
            attachment.add(name, config)
        attachment.switch(name)
        train(attachment, seed)
    attachment.switch(next(iter(configs)))
    return attachment


def read(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(what the model's task reads, its loss)."""
    out = model(**batch)
    if "itm_score" in out:
        wanted = torch.arange(len(out.itm_score)) % 2
        return out.itm_score, F.cross_entropy(out.itm_score, wanted)
    # Of an answer to a question nothing but the loss is returned.
    return (out.logits if "logits" in out else out.loss), out.loss


def values(attachment: Any, given: Given, out: Tensor, loss: Tensor) -> Values:
    """Outputs and all gradients, by name."""
    found: Values = {"out": out.detach(), "loss": loss.detach()}
    for name, parameter in attachment.named_parameters():
        found[f"grad of {name}"] = None if parameter.grad is None else parameter.grad.clone()
    for name, leaf in given.leaves().items():
        found[f"grad of input {name}"] = None if leaf.grad is None else leaf.grad.clone()
    return found


def clear(attachment: Any) -> None:
    """No gradients."""
    for parameter in attachment.parameters():
        parameter.grad = None


def step(row: Row, model: nn.Module, attachment: Any, given: Given) -> Values:
    """One training step's outputs and gradients."""
    clear(attachment)
    with around(attachment, given):
        out, loss = read(model.train(), given.batch)
    loss.backward()
    return values(attachment, given, out, loss)


@torch.no_grad()
def output(row: Row, model: nn.Module, attachment: Any = None, seed: int = 0) -> Tensor:
    """In evaluation; of a base where there is no attachment."""
    given = row.given(seed, dtype=next(model.parameters()).dtype)
    with around(attachment, given) if attachment else contextlib.nullcontext():
        return read(model.eval(), given.batch)[0]


@functools.cache
def plain(row: Row, seed: int = 0) -> Tensor:
    """The base's own output."""
    return output(row, fresh(row), seed=seed)


def differences(got: Values, want: Values, tolerance: float = SAME) -> list[str]:
    """What differs by more than `tolerance`, relative to a norm of at least 1."""
    if got.keys() != want.keys():
        return [f"names: {sorted(got.keys() ^ want.keys())}"]
    found = []
    for name, b in want.items():
        a = got[name]
        if a is None or b is None:
            if (a is None) != (b is None):
                found.append(f"{name}: want {_norm(b)}, got {_norm(a)}")
        elif a.shape != b.shape or not float((a - b).norm()) <= tolerance * max(1.0, _norm(b)):
            found.append(f"{name}: off by {float((a - b).norm()):.3g} of {_norm(b):.3g}")
    return found


def _norm(value: Tensor | None) -> Any:
    return None if value is None else float(value.norm())


@dataclass(frozen=True)
class Paths:
    """Of the base's modules that a row adapts."""

    places: tuple[str, ...]  # whose output the adapter changes, and those trained whole
    layers: tuple[str, ...]  # that hold them
    stacks: tuple[str, ...]  # that hold the layers
    norms: tuple[str, ...]  # in the layers


@functools.cache
def paths(row: Row) -> Paths:
    """From the report of an attachment."""
    base = dict(_base(row.family).named_modules())
    reported = attached(row)[1].report().rows
    places = dict.fromkeys(r.module for r in reported if r.module in base)
    inside = [m[1] for m in (re.match(r"(.*?\.\d+)\.", path) for path in places) if m]
    layers = dict.fromkeys(inside)
    stacks = dict.fromkeys(layer.rsplit(".", 2)[0] for layer in layers)
    norms = [
        f"{layer}.{name}"
        for layer in layers
        for name, module in base[layer].named_modules()
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    ]
    return Paths(tuple(places), tuple(layers), tuple(stacks), tuple(norms))
