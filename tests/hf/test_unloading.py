"""Plain models from adapted ones: unloaded, saved merged, and what a model's own save_pretrained
may write."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from tests.hf import tiny, tiny_text
from tests.hf.test_files_fuzz import look, values_of

F32 = torch.float32
LORA = pk.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
REFUSED = r"save_pretrained: want a model without an adapter.*att\.save\(.*att\.save_merged\("


def built(family: str, config: AdapterConfig = LORA, dtype: torch.dtype = F32) -> tuple[Any, Any]:
    """An adapted model whose adapter matters."""
    model = tiny_text.build(family, dtype)
    attachment = pk.attach(model, config)
    tiny.randomise(attachment.adapter)
    return model, attachment


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    found: Tensor = model.eval()(**tiny_text.batch(family)).logits
    return found


def loaded(model: Any, folder: Path) -> Any:
    """What the model's own class makes of a folder, in which it wants to know every key."""
    own = getattr(__import__("transformers"), type(model).__name__)
    found, info = own.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    return found


PLAIN: list[tuple[str, AdapterConfig]] = [
    ("llama", LORA),
    ("gpt2", pk.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], bias="all")),
    ("llama", pk.LoraConfig(r=3, modules_to_save=["lm_head", "model.norm"])),
    ("gpt2", pk.LoraConfig(r=3, modules_to_save=["lm_head"])),  # tied to the embeddings
    ("bert", pk.LoraConfig(r=3, bias="lora_only", modules_to_save=["cls"])),
    ("llava", LORA),
    ("gpt2", pk.RoutingConfig(r=3, train_bias=True, train_norms=True)),
    ("llama", pk.ExpertConfig(r=2, experts=2, gate="mean")),
]
PLAIN_ROWS = pytest.mark.parametrize(("family", "config"), PLAIN, ids=str)


@PLAIN_ROWS
@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
def test_an_unloaded_model_is_plain_and_computes_the_same(
    family: str, config: AdapterConfig, merged: bool
) -> None:
    base = tiny_text.build(family, F32)
    model, attachment = built(family, config)
    want = logits(model, family)
    assert (want - logits(base, family)).abs().max() > 1e-2
    if merged:
        attachment.merge()
    assert attachment.merge_and_unload() is model
    torch.testing.assert_close(logits(model, family), want, rtol=1e-3, atol=1e-3)
    assert {p: type(m) for p, m in model.named_modules()} == {
        p: type(m) for p, m in base.named_modules()
    }
    assert model.state_dict().keys() == base.state_dict().keys()
    assert not any("petal" in key for m in model.modules() for key in vars(m))
    assert "save_pretrained" not in vars(model)
    # What was one parameter is one.
    ties = [{n for n, p in m.named_parameters(remove_duplicate=False)} for m in (model, base)]
    assert ties[0] == ties[1]
    assert len(list(model.parameters())) == len(list(base.parameters()))
    assert all(p.requires_grad for p in model.parameters())


@PLAIN_ROWS
@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
def test_a_merged_folder_loads_as_the_unloaded_model(
    family: str, config: AdapterConfig, merged: bool, tmp_path: Path
) -> None:
    model, attachment = built(family, config)
    if merged:
        attachment.merge()
    before, values = look(model), values_of(attachment)
    attachment.save_merged(tmp_path)
    if merged:
        assert look(model) == before
        attachment.unmerge()
    assert values_of(attachment) == values
    assert pk.attachment(model) is attachment
    found = loaded(model, tmp_path)
    attachment.merge_and_unload()
    assert torch.equal(logits(found, family), logits(model, family))


def test_buffers_of_what_was_trained_whole_go_along() -> None:
    """As a batch norm's statistics, which training moves."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(self.lin(x))
            return found

    model = Model()
    config = pk.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["norm"])
    attachment = pk.attach(model, config)
    x = torch.randn(8, 4)
    for _ in range(3):
        model.train()(x).sum().backward()
    with torch.no_grad():
        want = model.eval()(x)
        attachment.merge_and_unload()
        torch.testing.assert_close(model(x), want)
    assert int(model.norm.num_batches_tracked) == 3  # type: ignore[arg-type]


def test_save_merged_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, attachment = built("gpt2", pk.LoraConfig(r=3, modules_to_save=["ln_f"], bias="all"))
    before = look(model)
    attachment.save_merged(tmp_path)
    assert look(model) == before


def test_save_merged_shards_as_transformers_does(tmp_path: Path) -> None:
    model, attachment = built("llama")
    attachment.save_merged(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    found = loaded(model, tmp_path)
    torch.testing.assert_close(logits(found, "llama"), logits(model, "llama"), rtol=1e-3, atol=1e-3)


def test_save_merged_keeps_the_base_s_dtype(tmp_path: Path) -> None:
    model, attachment = built(
        "llama", pk.LoraConfig(r=3, modules_to_save=["lm_head"]), torch.float16
    )
    attachment.save_merged(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    attachment.merge_and_unload()
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_a_failed_save_unmerges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, attachment = built("llama")
    before = look(model)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        attachment.save_merged(tmp_path)
    assert look(model) == before


@pytest.mark.parametrize("call", ["save_merged", "merge_and_unload"])
def test_what_no_plain_model_holds_is_refused(call: str, tmp_path: Path) -> None:
    """And nothing is written."""
    cases: list[tuple[str, AdapterConfig, str]] = [
        ("bart", pk.VLPetConfig(r=4, value_r=3), r"parts that stay \(first: .*, an activation"),
        ("llama", pk.ExpertConfig(r=2), "parts that stay"),
        ("llama", pk.RoutingConfig(r=2, function="mul"), "merge: "),
    ]
    for family, config, says in cases:
        model, attachment = built(family, config)
        before = look(model)
        args = (tmp_path / "a",) if call == "save_merged" else ()
        with pytest.raises(ValueError, match=says):
            getattr(attachment, call)(*args)
        assert look(model) == before
        assert not (tmp_path / "a").exists()


def test_a_linear_that_is_not_folded_hides_behind_no_trained_bias() -> None:
    """The kind: one path with two reasons, of which the harmless one is told."""
    model = tiny_text.build("gpt2", F32)
    linear = model.get_submodule("transformer.h.0.attn.c_attn")
    linear.register_forward_hook(lambda *args: None)
    attachment = pk.attach(model, pk.LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only"))
    with pytest.raises(ValueError, match=r"1 parts that stay \(first: transformer.h.0.attn.c_attn"):
        attachment.merge_and_unload()


def test_save_merged_wants_a_model_that_can(tmp_path: Path) -> None:
    attachment = pk.attach(nn.Sequential(nn.Linear(4, 4)), pk.LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="save_merged: want a model with save_pretrained"):
        attachment.save_merged(tmp_path)
    attachment.merge_and_unload()
    with pytest.raises(RuntimeError, match="save_merged: this attachment was detached"):
        attachment.save_merged(tmp_path)


# -- a model's own save_pretrained ----------------------------------------------------------------

METHODS: list[tuple[str, AdapterConfig]] = [
    ("llama", LORA),
    ("llama", pk.RoutingConfig(r=3)),
    ("llama", pk.RoutingConfig(r=3, function="mul")),
    ("llama", pk.ExpertConfig(r=2)),
    ("bart", pk.VLPetConfig(r=4, value_r=3)),
    ("bart", pk.VLAdapterConfig(r=4)),
]


@pytest.mark.parametrize(("family", "config"), METHODS, ids=str)
def test_an_adapted_model_s_own_save_is_refused(
    family: str, config: AdapterConfig, tmp_path: Path
) -> None:
    model, attachment = built(family, config)
    with pytest.raises(ValueError, match=f"(?s){REFUSED}"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    attachment.detach()
    model.save_pretrained(tmp_path / "a")
    base = tiny_text.build(family, F32)
    assert torch.equal(logits(loaded(model, tmp_path / "a"), family), logits(base, family))


def test_a_merged_model_s_own_save_is_the_merged_model(tmp_path: Path) -> None:
    model, attachment = built("llama")
    attachment.merge()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(model, tmp_path), "llama"), logits(model, "llama"))
    attachment.unmerge()
    with pytest.raises(ValueError, match=f"(?s){REFUSED}"):
        model.save_pretrained(tmp_path)


def test_a_partly_merged_model_s_own_save_is_refused(tmp_path: Path) -> None:
    model, attachment = built("llama", pk.LoraConfig(r=3, modules_to_save=["lm_head"]))
    attachment.merge()
    with pytest.raises(ValueError, match=f"(?s){REFUSED}"):
        model.save_pretrained(tmp_path)
    attachment.save_merged(tmp_path)


def test_a_part_s_own_save_is_refused_where_it_is_adapted(tmp_path: Path) -> None:
    """Its keys are the base's, none of the adapter's among them."""
    model, attachment = built("llava", pk.LoraConfig(r=3, target_modules=["q_proj"]))
    language = model.model.language_model
    with pytest.raises(ValueError, match=f"(?s){REFUSED}"):
        language.save_pretrained(tmp_path)
    model.model.vision_tower.save_pretrained(tmp_path)  # nothing in it is adapted
    attachment.merge()
    language.save_pretrained(tmp_path)
    attachment.detach()
    names = pk.LoraConfig(r=3, target_modules=["q_proj"], parts=("vision",))
    attachment = pk.attach(model, names)
    language.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){REFUSED}"):
        model.model.vision_tower.save_pretrained(tmp_path)
    attachment.detach()
    assert not any("save_pretrained" in vars(module) for module in model.modules())


def test_a_checkpoint_that_says_its_state_is_written(tmp_path: Path) -> None:
    """As Trainer does, with None too: it loads into an adapted model."""
    model, attachment = built("llama")
    model.save_pretrained(tmp_path, state_dict=None, is_main_process=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    again = tiny_text.build("llama", F32)
    other = pk.attach(again, LORA)
    again.load_state_dict(state)
    assert values_of(other) == values_of(attachment)
    model.save_pretrained(tmp_path / "b", True, model.state_dict())


def test_a_save_of_the_user_s_own_is_called_and_given_back(tmp_path: Path) -> None:
    model: Any = tiny_text.build("llama", F32)
    calls: list[Any] = []
    model.save_pretrained = own = lambda *args, **options: calls.append(args)
    attachment = pk.attach(model, LORA)
    with pytest.raises(ValueError, match=f"(?s){REFUSED}"):
        model.save_pretrained(tmp_path)
    attachment.merge()
    model.save_pretrained(tmp_path)
    assert calls == [(tmp_path,)]
    attachment.detach()
    assert model.save_pretrained is own


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_s_save_is_its_own(how: str, tmp_path: Path) -> None:
    model, attachment = built("llama", pk.LoraConfig(r=3, modules_to_save=["lm_head"], bias="all"))
    twin: Any = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
    attachment.detach()
    with pytest.raises(ValueError, match=f"(?s){REFUSED}"):
        twin.save_pretrained(tmp_path)
    want = logits(twin, "llama")
    pk.attachment(twin).save_merged(tmp_path)
    torch.testing.assert_close(logits(loaded(twin, tmp_path), "llama"), want, rtol=1e-3, atol=1e-3)
    pk.attachment(twin).merge_and_unload()
    twin.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(twin, "llama"), want, rtol=1e-3, atol=1e-3)


def test_attachments_of_a_model_and_its_part_taken_back_in_any_order(tmp_path: Path) -> None:
    model: Any = tiny_text.build("llava", F32)
    whole = pk.attach(model, pk.LoraConfig(r=2, target_modules=r".*language.*\.0\..*q_proj"))
    config = pk.LoraConfig(r=2, target_modules=r".*\.1\..*q_proj")
    part = pk.attach(model.model.language_model, config)
    whole.detach()
    with pytest.raises(ValueError, match=f"(?s){REFUSED}"):
        model.model.language_model.save_pretrained(tmp_path)
    part.detach()
    model.save_pretrained(tmp_path)
    model.model.language_model.save_pretrained(tmp_path)
