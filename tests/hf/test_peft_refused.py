"""Files of PEFT's that are refused: by name, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf import pair
from petal_kernels.hf.peft_files import TENSORS
from tests.hf import tiny, tiny_text
from tests.hf.peft_folders import CONFIG, F32, attached, change_tensors, edit, refused
from tests.hf.test_files_fuzz import values_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    attached(target_modules=["q_proj", "v_proj"]).save(tmp_path, format="peft")
    return tmp_path


def test_either_file_truncated_or_missing(folder: Path) -> None:
    for name, says in ((TENSORS, "not a safetensors file"), (CONFIG, "not readable as json")):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        refused(folder, name, says)
        (folder / name).unlink()
        refused(folder, f"missing ['{name}']")
        (folder / name).write_bytes(data)
    pk.attach(tiny_text.build("llama", F32), folder)


def test_a_pickle_is_refused(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).unlink()
    refused(folder, "missing", "the pickle adapter_model.bin is refused")
    (folder / "adapter_model.bin").rename(folder / TENSORS)
    refused(folder, TENSORS, "got a pickle")
    (folder / TENSORS).write_bytes(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("peft_type", "IA3"), ("peft_type", None), ("lora_bias", True)),
        *(("loftq_config", {"loftq_bits": 4}), ("megatron_core", "another"), ("later", "thing")),
        *(("layer_replication", [[0, 1]]), ("qalora_group_size", 8), ("init_lora_weights", "o")),
        *(("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora")),
        *(("r", "three"), ("r", 0), ("r", None), ("lora_alpha", "x"), ("target_modules", 3)),
        *(("rank_pattern", [1]), ("bias", True), ("modules_to_save", "x")),
        *(("modules_to_save", [1]), ("trainable_token_indices", [1])),
        ("target_modules", ["q_proj", "gone"]),
    ],
)  # fmt: skip
def test_a_config_that_means_something_else_is_refused_by_name(
    name: str, value: Any, folder: Path
) -> None:
    edit(folder, **{name: value})
    refused(folder, CONFIG, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("trainable_token_indices", [1, 3]),
    ],
)
def test_what_its_files_cannot_hold_is_not_written(name: str, value: Any, tmp_path: Path) -> None:
    config = pk.LoraConfig(r=2, target_modules=["q_proj"], **{name: value})
    made = pk.attach(tiny_text.build("llama", F32), config)
    with pytest.raises(ValueError, match=rf"(?s)format: want 'petal'.*{name}"):
        made.save(tmp_path / "new", format="peft")
    assert not (tmp_path / "new").exists()


def test_what_a_later_peft_leaves_empty_is_no_matter(folder: Path) -> None:
    edit(folder, later=None, later_too={}, and_this=False, peft_version="9.9", revision="main")
    pk.attach(tiny_text.build("llama", F32), folder)


def _without_one(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def _with_one_more(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(
        3
    )


def _with_a_base_weight(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(60, 32)


def _of_another_rank(tensors: dict[str, Tensor]) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    tensors[name] = torch.ones(4, 32)


def _wide(tensors: dict[str, Tensor]) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    tensors[name] = tensors[name].double()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without_one, "missing keys ['model.layers.0.self_attn.q_proj.up']"),
        (_with_one_more, "unexpected keys ['model.layers.0.self_attn.q_proj.magnitude']"),
        (_with_a_base_weight, "unexpected keys ['modules_to_save.model.embed_tokens.weight']"),
        (_of_another_rank, "want shape [3, 32], got [4, 32]"),
        (_wide, "want torch.float32"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], None], says: str, folder: Path
) -> None:
    change_tensors(folder, change)
    refused(folder, TENSORS, says)


def test_another_base_is_refused(folder: Path) -> None:
    """Of other shapes, of other names."""
    model = tiny_text.build("llama", F32)
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 16)  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"q_proj.up: want shape \[16, 3\], got \[32, 3\]"):
        pk.attach(model, folder)
    refused(folder, CONFIG, "target_modules", "match nothing", family="gpt2")


def test_loading_into_an_attachment_wants_the_same_scale_and_method(folder: Path) -> None:
    others: dict[str, Any] = {"lora_alpha": 4, "use_rslora": True, "alpha_pattern": {"q": 2}}
    for name, value in others.items():
        made = attached(target_modules=["q_proj", "v_proj"], **{name: value})
        before = values_of(made)
        with pytest.raises(ValueError, match=f"{CONFIG}: {name}: want "):
            made.load(folder)
        assert values_of(made) == before
    other = pk.attach(tiny.blip2(), pk.PetalConfig(r=4))
    with pytest.raises(ValueError, match="method: want 'petal' as attached, got 'lora'"):
        other.load(folder)


def test_our_own_adapter_counts_where_both_are(folder: Path) -> None:
    """And without its json PEFT's does, whatever tensors of ours lie beside it."""
    made = pk.attach(tiny_text.build("llama", F32), pk.RoutingConfig(r=3))
    made.save(folder)
    assert isinstance(pk.attach(tiny_text.build("llama", F32), folder).config, pk.RoutingConfig)
    (folder / pair.CONFIG).unlink()
    assert isinstance(pk.attach(tiny_text.build("llama", F32), folder).config, pk.LoraConfig)


def test_a_json_of_neither_is_refused(folder: Path) -> None:
    """Beside PEFT's tensors it is PEFT's, and says nothing of a method."""
    edit(folder, peft_type=None)
    content = (folder / CONFIG).read_text().replace('"peft_type": null, ', "")
    assert "peft_type" not in content
    (folder / CONFIG).write_text(content)
    refused(folder, CONFIG, "peft_type: want 'LORA'")
