"""Any model of transformers from its own config file, on shapes alone, and a batch for it."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels import memory
from petal_kernels.tools.memory import models, pictures
from petal_kernels.tools.memory.options import DTYPES, Options


@dataclass(frozen=True)
class Source:
    """A config that was read, and the folder that it lies in."""

    name: str
    config: Any
    folder: Path

    @property
    def sees(self) -> bool:
        """Whether it is of a model that is given pictures."""
        return getattr(self.config, "vision_config", None) is not None


def read(path: Path) -> Source:
    """The config in a folder or file. Nothing else is read and no network is used.

    Raises ValueError where there is none, or transformers does not know its model.
    """
    import transformers

    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config: want a config.json or its folder, got {path}: {error}") from (
            error
        )
    kind = str(values.get("model_type")) if isinstance(values, dict) else ""
    known: Any = transformers.CONFIG_MAPPING
    if kind not in known:
        raise ValueError(
            "--config: want the model_type of a model that transformers "
            f"{transformers.__version__} has, got {kind!r} in {file}"
        )
    config = known[kind].from_dict(values)
    name = path.resolve().name if path.is_dir() else path.stem
    return Source(kind if name == "config" else name, config, file.parent)


def build(source: Source, options: Options) -> nn.Module:
    """The model that the config names, or that its type is for, on the device in force."""
    import transformers

    config = copy.deepcopy(source.config)
    if options.attention != "sdpa":  # transformers' own choice, where a model has it
        config._attn_implementation = options.attention
    names = getattr(config, "architectures", None) or ()
    kinds: list[Any] = [getattr(transformers, name, None) for name in names]
    for mapping in (
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    ):
        kinds += [mapping[type(config)]] if type(config) in mapping else []
    for kind in kinds:
        if kind is not None:
            model: nn.Module = kind(config)
            return model
    raise ValueError(
        f"--config: want a model that is trained on text, got {config.model_type}, architectures "
        f"{getattr(config, 'architectures', None)}"
    )


def attention(model: nn.Module, options: Options) -> list[str]:
    """Where a model's attention is not what was asked for, in words."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
        above = path.rpartition(".")[0]
        if kind not in (None, options.attention, found.get(above)):
            found.setdefault(path, str(kind))
    tops = [p for p in found if not any(p.startswith(f"{q}.") or not q for q in found if q != p)]
    return [f"attention of {p or 'the model'}: {found[p]}, it has no other" for p in tops]


def picture_size(source: Source, options: Options) -> tuple[int, int]:
    """Width and height of each picture."""
    return options.image_size or pictures.side_of(source.config)


def batch(
    source: Source, model: nn.Module, options: Options
) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """The model on fake tensors, a batch for it, and what it is in words. Ids and sizes of pictures
    are real: they decide about shapes.
    """
    if not source.sees or not options.images:
        model, _ = memory.fake_tensors(model, ())
        ids = models.words(_words(source.config), options.batch, options.length)
        return model, {"input_ids": ids, "labels": ids}, [f"{options.length} tokens a sample"]
    if hasattr(source.config, "num_query_tokens"):
        model, given = memory.fake_tensors(model, models.image_text_batch(model, options))
        queries = source.config.num_query_tokens
        return model, given, _said(source, options, queries, given["input_ids"].shape[1])
    size = picture_size(source, options)
    one = pictures.inputs(model, source.config, source.folder, size, options.images)
    dtype = DTYPES[options.dtype]
    real = {k: v.to(dtype) if v.is_floating_point() else v for k, v in one.items()}
    model, _ = memory.fake_tensors(model, ())
    mode = next(model.parameters()).fake_mode  # type: ignore[attr-defined]

    def repeated(times: int, values: bool) -> dict[str, Tensor]:
        """Of each picture `times`, whose pixels are fake or have values."""
        found = {}
        for name, t in real.items():
            if values or not t.is_floating_point():
                found[name] = t.repeat(times, *[1] * (t.dim() - 1))
            else:
                with mode:
                    found[name] = torch.empty(times * t.shape[0], *t.shape[1:], dtype=t.dtype)
        return found

    visual, values = pictures.tokens(model, lambda v: repeated(1, v), options.images)
    given = {**_text(source, model, options, visual), **repeated(options.batch, values)}
    return model, given, _said(source, options, visual, given["input_ids"].shape[1])


def _words(config: Any) -> int:
    """Of the vocabulary, the first thousand: what stands for pictures lies above, as a rule."""
    return min(1000, int(config.get_text_config().vocab_size))


def _said(source: Source, options: Options, visual: int, length: int) -> list[str]:
    width, height = picture_size(source, options)
    count = options.images
    noun = "picture" if count == 1 else "pictures"
    seen = f"{visual:,} visual tokens"
    if visual == count:
        seen = "seen by cross-attention" if visual == 1 else "each seen by cross-attention"
    return [
        f"{count} {noun} of {width} x {height} a sample: {seen}, {length:,} tokens with the "
        f"text's {options.length}"
    ]


def _text(source: Source, model: nn.Module, options: Options, visual: int) -> dict[str, Tensor]:
    """Tokens of pictures and words, in each sample of the batch; the words are learnt."""
    config = source.config
    image = getattr(config, "image_token_id", None)
    image = config.image_token_index if image is None else image
    said = models.words(_words(config), options.batch, options.length)
    said[said == image] = 5
    if options.length < options.images:
        raise ValueError(f"--length: want a word for each picture, got {options.length}")
    pieces = []  # of each picture, and a word between it and the next
    for i in range(options.images):
        pieces += [torch.full((options.batch, visual // options.images), image), said[:, i : i + 1]]
    ids = torch.cat([*pieces, said[:, options.images :]], 1)
    of_image = ids == image
    given = {"input_ids": ids, "labels": torch.where(of_image, -100, ids)}
    taken = inspect.signature(type(model).forward).parameters
    kinds = {"mm_token_type_ids", "token_type_ids"} & set(taken)
    given |= {name: of_image.long() for name in kinds}
    if "cross_attention_mask" in taken:
        tiles = config.vision_config.max_num_tiles
        shape = (options.batch, ids.shape[1], options.images, tiles)
        given["cross_attention_mask"] = torch.ones(shape, dtype=torch.int64)
    return given
