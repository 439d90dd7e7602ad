"""A tiny model with its tokenizer on disk, and data, for the scripts of `examples/`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
_WORDS = ["one", "two", "three", "four", "five", "six", "red", "green", "blue", "is", "and", "a"]


def script(name: str) -> Any:
    """A script of `examples/` as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_model(folder: Path) -> Path:
    """A llama of two layers and a tokenizer of a few words."""
    known = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *_WORDS])}
    tokens = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=16,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        picked = torch.randint(0, len(_WORDS), (6,), generator=generator).tolist()
        found.append(" ".join(_WORDS[i] for i in picked))
    return found


def texts(path: Path, count: int = 24) -> Path:
    """Sentences, one a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _sentences(count)))
    return path


def preferences(path: Path, count: int = 16) -> Path:
    """Prompts with an answer that is preferred and one that is not."""
    rows = []
    for text in _sentences(count):
        words = text.split()
        rows.append(
            {
                "prompt": " ".join(words[:2]),
                "chosen": " ".join(words[2:4]),
                "rejected": " ".join(words[4:]),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def losses(trainer: Any) -> list[float]:
    """What a Trainer logged while it trained."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
