"""Folders in PEFT's format, and ways to change them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import petal_kernels as pk
from petal_kernels.hf import pair
from petal_kernels.hf.peft_files import TENSORS
from tests.hf import tiny_text
from tests.hf.test_files_fuzz import fill, look

CONFIG = pair.OLD_CONFIG
F32 = torch.float32


def attached(family: str = "llama", **config: Any) -> pk.Attachment:
    """A LoRA adapter with any values."""
    made = pk.attach(tiny_text.build(family, F32), pk.LoraConfig(**{"r": 3, **config}))
    fill(made, 1)
    return made


def edit(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def refused(folder: Path, *parts: str, family: str = "llama") -> None:
    """attach refuses the folder, says `parts` in order, and changes nothing of the model."""
    model = tiny_text.build(family, F32)
    before = look(model)
    pattern = ".*".join(re.escape(part) for part in parts)
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        pk.attach(model, folder)
    assert look(model) == before


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
