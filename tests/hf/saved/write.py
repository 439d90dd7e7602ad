"""Small adapters as users have them on disk, and what their models computed when they were saved.

`python -m tests.hf.saved.write` writes, for every case below, a folder with the two files of
`attachment.save` and outputs.safetensors: `on`, and `off` inside `disabled()`, in fp64 rounded to
fp32. Those that are there were written by commit 4814e0a, those of `lora` by 77cd0a1; they stay as
they are, since later code has to load them and to compute the same, and a new case is written
beside them.

Neither a model's values nor an adapter's depend on a generator of random numbers or on the order in
which modules are made: each tensor's values come from a hash of its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from tests.hf import tiny, tiny_blip, tiny_text

HERE = Path(__file__).parent
OUTPUTS = "outputs.safetensors"
EXPERTS = 3


@dataclass(frozen=True)
class Case:
    """What was saved: a method's config on a model, and the batch that the outputs are of."""

    model: Callable[[], nn.Module]
    config: Callable[[], AdapterConfig]
    batch: Callable[[], dict[str, Tensor]]
    read: str = "logits"
    vision: bool = False  # given features
    domains: bool = False  # given the domain of every token


def _with_biases() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(**tiny_text._llama_like(), attention_bias=True)
    return transformers.LlamaForCausalLM(config)


def _retrieval() -> nn.Module:
    return tiny_blip.build("retrieval", torch.float32)


def _text(family: str, config: Callable[[], AdapterConfig], **more: Any) -> Case:
    return Case(tiny_text.MODELS[family], config, lambda: _ids(family in ("bart", "t5")), **more)


CASES: dict[str, Case] = {
    "petal_paper": Case(
        tiny.instructblip,
        lambda: pk.PetalConfig(r=5, experts=EXPERTS, expert_r=4),
        lambda: _image("instructblip"),
    ),
    "petal_release": Case(
        tiny.instructblip,
        lambda: pk.PetalConfig(r=5, experts=EXPERTS, expert_r=4, variant="release"),
        lambda: _image("instructblip"),
    ),
    "petal_blip2": Case(tiny.blip2, lambda: pk.PetalConfig(r=5), lambda: _image("blip2")),
    "aurora": Case(
        _retrieval, lambda: pk.AuroraConfig(r=5, scale=0.8), lambda: _blip(), "itm_score"
    ),
    "aurora_release": Case(
        _retrieval, lambda: pk.AuroraConfig(r=5, variant="release"), lambda: _blip(), "itm_score"
    ),
    "vlpet": _text("bart", lambda: pk.VLPetConfig(r=4, value_r=3)),
    "vladapter": _text("t5", lambda: pk.VLAdapterConfig(r=4)),
    "compacter": _text(
        "bart", lambda: pk.CompacterConfig(r=4, division=2, factor_r=2, share_rule=True)
    ),
    "routing_lora": _text("llama", lambda: pk.RoutingConfig(r=4, alpha=6.0)),
    "routing_whole": Case(
        _with_biases,
        lambda: pk.RoutingConfig(r=4, train_bias=True, modules_to_save=["lm_head"]),
        lambda: _ids(),
    ),
    "routing_adapter": _text("gpt2", lambda: pk.RoutingConfig(r=4, kind="adapter", share=True)),
    "routing_route": _text("roberta", lambda: pk.RoutingConfig(r=4, function="gram"), vision=True),
    "experts_lora": _text("llama", lambda: pk.ExpertConfig(r=3, experts=EXPERTS, top_k=2)),
    "experts_adapter": _text(
        "llama", lambda: pk.ExpertConfig(r=3, experts=EXPERTS, kind="adapter")
    ),
    "lora": _text(
        "llama",
        lambda: pk.LoraConfig(r=4, lora_alpha=6.0, lora_dropout=0.1, target_modules="all-linear"),
    ),
    "lora_patterns": Case(
        _with_biases,
        lambda: pk.LoraConfig(
            r=4,
            target_modules=["q_proj", "k_proj", "down_proj"],
            rank_pattern={"k_proj": 2},
            alpha_pattern={r"layers\.1\..*": 3.0},
            use_rslora=True,
            bias="lora_only",
            modules_to_save=["lm_head"],
        ),
        lambda: _ids(),
    ),
    "lora_gpt2": _text("gpt2", lambda: pk.LoraConfig(r=3, target_modules=["c_attn", "c_proj"])),
    "lora_parts": Case(
        tiny.instructblip,
        lambda: pk.LoraConfig(
            r=2, target_modules="all-linear", parts=("language", "vision", "projector")
        ),
        lambda: _image("instructblip"),
    ),
    "experts_domain": _text(
        "llama", lambda: pk.ExpertConfig(r=3, experts=EXPERTS, gate="domain"), domains=True
    ),
}


def numbers(name: str, count: int) -> Tensor:
    """`count` multiples of 1/512 in [-1, 1), the same on every machine."""
    data = hashlib.shake_256(name.encode()).digest(2 * count)
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(count, 2)
    return ((values[:, 0] * 256 + values[:, 1]) % 1024 - 512).double() / 512


def fill(named: Iterator[tuple[str, Tensor]], scale: float) -> None:
    """Values by name; scales of norms, which start at one, stay near it."""
    with torch.no_grad():
        for name, tensor in named:
            centre = 1.0 if tensor.dim() == 1 and name.endswith("weight") else 0.0
            values = numbers(name, tensor.numel()).view(tensor.shape) * scale
            tensor.copy_(values + centre)


def build(case: Case) -> nn.Module:
    """The base of a case, in fp32."""
    model = case.model()
    fill(model.named_parameters(), 0.375)
    return model.eval()


def _integers(name: str, shape: tuple[int, ...], least: int, end: int) -> Tensor:
    values = (numbers(name, torch.Size(shape).numel()) * 512 + 512).long()
    return least + values.view(shape) % (end - least)


def _ids(padded: bool = False) -> dict[str, Tensor]:
    ids = _integers("ids", (2, 7), 3, 55)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, 5:] = 0
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": _integers("decoder", (2, 4), 3, 55),
        }
    return {"input_ids": ids, "attention_mask": mask}


def _pixels(size: int) -> Tensor:
    return numbers("pixels", size * 3 * 28 * 28).view(size, 3, 28, 28)


def _image(family: str) -> dict[str, Tensor]:
    image = torch.full((2, tiny.QUERIES), tiny.IMAGE_TOKEN)
    ids = torch.cat([image, _integers("ids", (2, 4), 3, 90)], dim=1)
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _pixels(2),
    }
    if family == "instructblip":
        values["qformer_input_ids"] = _integers("instruction", (2, 5), 3, 90)
        values["qformer_attention_mask"] = torch.ones_like(values["qformer_input_ids"])
    return values


def _blip() -> dict[str, Tensor]:
    ids = _integers("ids", (3, 6), 3, 50)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pixels(3)}


@contextlib.contextmanager
def given(case: Case, attachment: Any) -> Iterator[None]:
    """What the method reads beside the batch."""
    with contextlib.ExitStack() as stack:
        if case.vision:
            features = numbers("features", 2 * 3 * tiny_text.WIDTH).view(2, 3, tiny_text.WIDTH)
            stack.enter_context(attachment.vision(features))
        if case.domains:
            stack.enter_context(attachment.domains(case.batch()["input_ids"] % EXPERTS))
        yield


@torch.no_grad()
def outputs(case: Case, model: nn.Module, attachment: Any) -> Mapping[str, Tensor]:
    """On, and off: what the model of an attached adapter computes in fp64."""
    model.to(torch.float64)
    found = {}
    with given(case, attachment):
        found["on"] = getattr(model(**case.batch()), case.read).float()
        with attachment.disabled():
            found["off"] = getattr(model(**case.batch()), case.read).float()
    return found


def write(name: str) -> None:
    """Saves a case and what it computes."""
    from safetensors.torch import save_file

    case = CASES[name]
    model = build(case)
    attachment = pk.attach(model, case.config())
    fill(attachment.named_parameters(), 0.25)
    attachment.save(HERE / name)
    save_file(dict(outputs(case, model, attachment)), HERE / name / OUTPUTS)


if __name__ == "__main__":
    for each in sys.argv[1:] or CASES:
        write(each)
