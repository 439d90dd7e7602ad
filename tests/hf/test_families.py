"""Today's families, one line of `tiny_vlms.py` each: what is adapted in them, and its values."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

import petal_kernels as pk
from tests.hf.lora_places import ALL
from tests.hf.methods import train
from tests.hf.tiny_vlms import FAMILIES, IMAGE, PLAIN, VLMS, Vlm, read

SAME = 1e-9  # relative, in fp64
DECODERS = [*VLMS, *(name for name, row in PLAIN.items() if row.model.endswith("CausalLM"))]
SELF = ("self_attn.q_proj", "self_attn.v_proj")
VIT = ("attention.q_proj", "attention.v_proj")
QKV = ("self_attn.qkv_proj",)
LINEARS = {"phi3": QKV, "phi3-grouped": QKV, "dinov3": VIT, "vit": VIT}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: pk.RoutingConfig(r=4, alpha=6.0),
    "route-lora": lambda: pk.RoutingConfig(r=4, function="gram"),
    "route-adapter": lambda: pk.RoutingConfig(r=4, kind="adapter", function="mul"),
    "experts-lora": lambda: pk.ExpertConfig(r=4, experts=3, top_k=2),
    "experts-pooled": lambda: pk.ExpertConfig(r=4, experts=3, router_input="pooled"),
    "experts-domain": lambda: pk.ExpertConfig(r=4, experts=2, kind="adapter", gate="domain"),
}


GENERATES = {
    **{name: CONFIGS[name] for name in ("route-lora", "experts-domain")},
    "all-linear": lambda: pk.LoraConfig(r=3, target_modules="all-linear"),
}
# Each stands for others: cross-attention, positions of several axes, an encoder, uneven parts.
QUICK = ("mllama", "qwen3-vl", "dinov3", "phi3-grouped")
SPECIAL = [IMAGE - n for n in range(4)]  # an image's tokens, a video's, and what is around them


def _some(families: Iterable[str], *quick: str) -> list[Any]:
    """All, those that are not `quick` marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=[] if name in quick else [slow]) for name in families]


@functools.cache
def _base(family: str) -> nn.Module:
    return FAMILIES[family].build(torch.float64)


def fresh(family: str) -> Any:
    """The family's model in fp64, as it came."""
    return copy.deepcopy(_base(family))


def attached(family: str, config: Any, implementation: str = "fused") -> tuple[Any, Any]:
    """With values with which every part of the adapter matters."""
    model = fresh(family)
    torch.manual_seed(2)
    attachment = pk.attach(model, config, implementation=implementation)
    train(attachment)
    return model.double(), attachment


def batch(family: str, seed: int = 0) -> dict[str, Tensor]:
    values = FAMILIES[family].batch(seed)
    return {n: t.double() if t.is_floating_point() else t for n, t in values.items()}


def around(attachment: Any, family: str, values: dict[str, Tensor]) -> Any:
    """What stands around a call: features for a route, the image's tokens for domains."""
    config = attachment.config
    if getattr(config, "function", "none") != "none":
        generator = torch.Generator().manual_seed(5)
        width = attachment.method.width()
        return attachment.vision(torch.randn(2, 3, width, generator=generator).double())
    if getattr(config, "gate", "") != "domain":
        return contextlib.nullcontext()
    if family in VLMS:
        return attachment.image_domains(values["input_ids"])
    return attachment.domains(torch.tensor([1, 0]))


def step(family: str, model: Any, attachment: Any, seed: int = 0) -> dict[str, Tensor]:
    """Outputs and gradients of one training step."""
    values = batch(family, seed)
    for parameter in attachment.parameters():
        parameter.grad = None
    with around(attachment, family, values):
        out, loss = read(model.train()(**values))
    loss.backward()
    return {"out": out.detach(), **gradients(attachment.named_parameters())}


def gradients(named: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in named}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing
    return {name: gradient.clone() for name, gradient in found.items()}


def same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = SAME) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        norm = float(value.norm())
        assert norm > 0, name
        assert float((got[name] - value).norm()) <= tolerance * max(1.0, norm), name


# -- what is adapted ------------------------------------------------------------------------------


def places(model: nn.Module, config: Any) -> dict[str, str]:
    """Roles by path."""
    return {row.module: row.role for row in pk.plan(model, config).rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_a_layer_and_which_layers(family: str) -> None:
    """The kind: a tower that is adapted with the decoder, a role that is another linear's."""
    model, name = FAMILIES[family].build(), "encoder"
    if family in DECODERS:
        name = "decoder"
    start = {"clip": "text_model.", **{n: v.decoder for n, v in VLMS.items()}}.get(family, "")
    layers = [
        n for n, m in model.named_modules() if n.startswith(start) and n.endswith((".0", ".1"))
    ]
    held = [
        n for n in layers if isinstance(model.get_submodule(n.rpartition(".")[0]), nn.ModuleList)
    ]
    assert len(held) == 2
    want, blocks = {}, {}
    for layer in held:
        crosses = hasattr(model.get_submodule(layer), "cross_attn")
        paths = LINEARS.get(family, SELF)
        roles = ("query", "value") if len(paths) == 2 else ("query_value",)
        attention, cross = paths[0].partition(".")[0], "cross." if crosses else ""
        for path, role in zip(paths, roles, strict=True):
            path = path.replace("self_attn", "cross_attn") if crosses else path
            want[f"{layer}.{path}"] = f"{name}.{cross}{role}"
        blocks[f"{layer}.{'cross_attn' if crosses else attention}"] = (
            f"{name}.{'cross' if crosses else 'attention'}"
        )
        blocks[f"{layer}.mlp"] = f"{name}.ffn"
    assert places(model, pk.RoutingConfig(r=2)) == want
    assert places(model, pk.ExpertConfig(r=2, kind="adapter")) == blocks
    assert places(model, pk.LoraConfig(r=2)).keys() == want.keys()


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore:attach. left as they are")
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_and_the_part_that_each_is_in(family: str) -> None:
    """The kind: a head, tied or not, a patch projection, a part that is another's."""
    model = FAMILIES[family].build()
    found = places(model, pk.LoraConfig(r=2, target_modules="all-linear", parts=ALL))
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert found.keys() == linears - {"lm_head"}
    row = FAMILIES[family]
    starts = {"vision": "vision_model.", "language": "text_model."} if family == "clip" else {}
    if isinstance(row, Vlm):
        starts = {"vision": row.tower, "language": row.decoder}
    for path, role in found.items():
        part = next((p for p, start in starts.items() if path.startswith(start)), None)
        assert role.partition(".")[0] == (part or ("projector" if starts else "language"))
    alone = places(model, pk.LoraConfig(r=2, target_modules="all-linear"))
    assert alone == {path: role for path, role in found.items() if role.startswith("language.")}


# -- values and gradients -------------------------------------------------------------------------


class PlainLora(nn.Module):
    """y = base(x) + s B (A x), as the paper writes it."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())

    @property
    def weight(self) -> Any:  # whose dtype some models ask for
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.scale * F.linear(F.linear(x, self.down), self.up)


@pytest.mark.filterwarnings("ignore:attach. left as they are")
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_every_linear_is_the_plain_one(family: str) -> None:
    config = pk.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", parts=ALL)
    model, attachment = attached(family, config)
    other = fresh(family).requires_grad_(False)
    for place in attachment.found.places:
        factors: Any = attachment.adapter.get_submodule(place.path)
        parent, _, name = place.path.rpartition(".")
        holder = other.get_submodule(parent)
        plain = PlainLora(getattr(holder, name), factors.down.data, factors.up.data, 5 / 3)
        setattr(holder, name, plain)
    values = batch(family)
    out, loss = read(other.train()(**values))
    loss.backward()
    got = step(family, model, attachment)
    want = {"out": out.detach()}
    want |= gradients((n, p) for n, p in other.named_parameters() if p.requires_grad)
    same(got, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", _some(FAMILIES, *QUICK))
def test_lora_on_every_linear_is_peft_s(family: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False
    )
    model, attachment = attached(family, config)
    other = peft.get_peft_model(fresh(family), config).double()
    ours = dict(attachment.named_parameters())
    rename = {"lora_A.default.weight": "down", "lora_B.default.weight": "up"}
    theirs = {}
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            path = name.removeprefix("base_model.model.")
            for end, own in rename.items():
                path = path.replace(end, own)
            theirs[path] = parameter
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    out, loss = read(other.train()(**batch(family)))
    loss.backward()
    same(step(family, model, attachment), {"out": out.detach(), **gradients(theirs.items())})


@pytest.mark.one_in(3)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", _some(FAMILIES, *QUICK))
def test_fused_and_published_agree(family: str, config: str) -> None:
    """Outputs and every gradient, with an image in the text of those that see."""
    got, want = (
        step(family, *attached(family, CONFIGS[config](), implementation))
        for implementation in ("fused", "published")
    )
    same(got, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("config", GENERATES)
@pytest.mark.parametrize("family", _some(FAMILIES, *QUICK))
def test_checkpointing_changes_nothing(family: str, config: str, reentrant: bool) -> None:
    model, attachment = attached(family, GENERATES[config]())
    want = step(family, model, attachment)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(step(family, model, attachment), want)


# -- generation -----------------------------------------------------------------------------------


def generated(family: str, model: Any, values: dict[str, Tensor], **more: Any) -> Any:
    given = {name: value for name, value in values.items() if name != "labels"}
    return model.eval().generate(
        **given,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        suppress_tokens=SPECIAL,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )


def continued(values: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The batch of a longer text: what is said of each token is said of the new ones too."""
    more = ids.shape[1] - values["input_ids"].shape[1]
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in values:
            longer[name] = F.pad(values[name], (0, more))
    if "cross_attention_mask" in values:
        longer["cross_attention_mask"] = F.pad(
            values["cross_attention_mask"], (0, 0, 0, 0, 0, more), value=1
        )
    return {name: longer.get(name, value) for name, value in values.items() if name != "labels"}


@pytest.mark.parametrize("config", GENERATES)
@pytest.mark.parametrize("family", _some(DECODERS, *QUICK))
def test_what_a_cache_generates_is_what_one_call_gives(family: str, config: str) -> None:
    """The kind: a generated token that counts as an image's, a cache of what was not adapted."""
    if family == "paligemma2":
        pytest.skip("its prompt sees itself whole, so that a longer text is not the same prompt")
    model, attachment = attached(family, GENERATES[config]())
    values = batch(family)
    with around(attachment, family, values):
        got = generated(family, model, values)
    longer = continued(values, got.sequences)
    with torch.no_grad(), around(attachment, family, longer):
        want = read(model(**longer))[0][:, -5:-1]
    torch.testing.assert_close(torch.stack(got.logits, 1), want.float())  # as generate gives them


@pytest.mark.slow
@pytest.mark.parametrize("config", ["route-lora", "all-linear"])
@pytest.mark.parametrize("family", [name for name in DECODERS if name != "gemma3"])
def test_a_cache_changes_nothing_of_beams(family: str, config: str) -> None:
    """Gemma 3 itself gives something else without a cache."""
    model, attachment = attached(family, GENERATES[config]())
    values = batch(family)
    with around(attachment, family, values):
        got, want = (
            generated(family, model, values, use_cache=cache, num_beams=2)
            for cache in (True, False)
        )
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits))


# -- an image's tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", VLMS)
def test_an_image_s_tokens_are_served_by_its_expert(family: str) -> None:
    """The kind: text that is served as an image, or features in a place that is not theirs."""
    model, attachment = attached(family, CONFIGS["experts-domain"]())
    values = batch(family)
    ids = values["input_ids"]

    def output(block: Any) -> Tensor:
        with torch.no_grad(), block:
            return read(model.eval()(**values))[0]

    got = output(attachment.image_domains(ids))
    text = output(attachment.domains(torch.ones_like(ids)))
    if family == "mllama":  # its decoder reads the features by cross-attention
        torch.testing.assert_close(got, text)
        return
    image = (ids == IMAGE) | (ids == getattr(model.config, "video_token_id", IMAGE))
    torch.testing.assert_close(got, output(attachment.domains(torch.where(image, 0, 1))))
    assert not torch.allclose(got, text)
    swapped = output(attachment.image_domains(ids, image=1, text=0))
    torch.testing.assert_close(swapped, output(attachment.domains(torch.where(image, 1, 0))))
