"""Runs a page's Python: its blocks in order, in one namespace, with tiny models under the names of
the large ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from tests.hf import tiny, tiny_blip, tiny_text

ROOT = Path(__file__).resolve().parent.parent.parent
_FENCE = re.compile(r"^```python *(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    """Python of a page, by its first line; `title` is said where it needs what is not here."""

    page: Path
    line: int
    title: str
    text: str


def pages() -> list[Path]:
    """Whatever has blocks that a user may copy."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """All Python blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        title = re.search(r'title="(.*?)"', match["info"])
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, title[1] if title else "", match["text"]))
    return found


# -- the models that pages name -------------------------------------------------------------------


def _instructblip_batch() -> Batch:
    batch = tiny.batch("instructblip", 4)
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}


def _blip_batch() -> Batch:
    batch = tiny_blip.batch("retrieval")
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}


def _llava_batch() -> Batch:
    """An image's tokens in front of the text."""
    batch = tiny_text.batch("llava")
    config: Any = tiny_text.llava().config
    batch["input_ids"][:, :4] = config.image_token_id
    generator = torch.Generator().manual_seed(0)
    return {**batch, "pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}


def _text(family: str) -> tuple[Callable[[], nn.Module], Callable[[], Batch]]:
    return (
        lambda: tiny_text.build(family, torch.float32),
        lambda: tiny_text.batch(family),
    )


TINY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "Salesforce/instructblip-vicuna-7b": (tiny.instructblip, _instructblip_batch),
    "Salesforce/blip-itm-base-coco": (
        lambda: tiny_blip.build("retrieval", torch.float32),
        _blip_batch,
    ),
    "meta-llama/Llama-2-7b-hf": _text("llama"),
    "facebook/bart-base": _text("bart"),
    "openai-community/gpt2": _text("gpt2"),
    "llava-hf/llava-1.5-7b-hf": (_text("llava")[0], _llava_batch),
}


def run(page: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The page's namespace after its blocks ran; those with a title are only read."""
    import transformers

    names: dict[str, Any] = {"__name__": "page"}

    def from_pretrained(name: str, **_: Any) -> nn.Module:
        model, batch = TINY[name]
        given = batch()
        rows: Any = [
            dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)
        ]
        names.update(batch=given, loader=torch.utils.data.DataLoader(rows, 2), dataset=rows)
        return model()

    for cls in ("AutoModelForCausalLM", "PreTrainedModel"):
        patch.setattr(getattr(transformers, cls), "from_pretrained", staticmethod(from_pretrained))
    patch.setenv("ACCELERATE_USE_CPU", "true")
    for block in blocks(page):
        place = f"{page.relative_to(ROOT)}:{block.line}"
        # Lines of the page in what is raised.
        code = compile("\n" * (block.line - 1) + block.text, place, "exec")
        if block.title:
            unknown = list(unknown_names(block.text))
            assert not unknown, f"{place}: {unknown}"
        else:
            exec(code, names)
    return names


def unknown_names(text: str) -> Iterator[str]:
    """What of ``pk.x.y`` in a text the package has not."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Attribute):
            continue
        path = ast.unparse(node)
        if re.fullmatch(r"pk(\.\w+)+", path):
            value: Any = pk
            for part in path.split(".")[1:]:
                if not hasattr(value, part):
                    yield path
                    break
                value = getattr(value, part)
