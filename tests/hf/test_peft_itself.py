"""What PEFT itself makes of our files, and we of PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import petal_kernels as pk
from petal_kernels.hf.peft_files import TENSORS
from tests.hf import tiny_text
from tests.hf.peft_folders import F32
from tests.hf.test_files_fuzz import values_of
from tests.hf.test_peft_files import CASES

peft: Any = pytest.importorskip("peft")


def fill(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def outputs(model: Any, family: str) -> torch.Tensor:
    """Logits without dropout."""
    found: torch.Tensor = model.eval()(**tiny_text.batch(family)).logits.detach()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "config"), CASES, ids=str)
def test_peft_loads_what_we_saved(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    made = pk.attach(tiny_text.build(family, F32), pk.LoraConfig(**{"r": 3, **config}))
    fill(made.parameters())
    made.save(tmp_path, format="peft")
    with warnings.catch_warnings():
        # PEFT warns of keys that it misses or does not know.
        warnings.filterwarnings("error", message=".*(missing|unexpected|keys).*")
        other = peft.PeftModel.from_pretrained(tiny_text.build(family, F32), str(tmp_path))
    base = outputs(tiny_text.build(family, F32), family)
    ours, theirs = outputs(made.model, family), outputs(other, family)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 1e-2
    # And every tensor is the very one.
    other.save_pretrained(tmp_path / "again")
    ours_there, theirs_there = (load_file(f / TENSORS) for f in (tmp_path, tmp_path / "again"))
    assert set(ours_there) <= set(theirs_there)
    assert all(torch.equal(theirs_there[name], value) for name, value in ours_there.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "config"), CASES, ids=str)
def test_we_load_what_peft_saved(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    values = {"r": 3, **config}
    values.pop("parts", None)
    values.setdefault(
        "target_modules", {"t5": ["q", "v"], "gpt2": ["c_attn"]}.get(family, ["q_proj"])
    )
    other = peft.get_peft_model(tiny_text.build(family, F32), peft.LoraConfig(**values))
    fill(p for _, p in other.named_parameters() if p.requires_grad)
    other.save_pretrained(tmp_path)
    made = pk.attach(tiny_text.build(family, F32), tmp_path)
    ours, theirs = outputs(made.model, family), outputs(other, family)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    made.save(tmp_path / "again", format="peft")
    theirs_there, ours_there = (load_file(f / TENSORS) for f in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(theirs_there[name], value) for name, value in ours_there.items())
    trained = {n for n, p in other.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in made.parameters()) == sum(
        p.numel() for n, p in other.named_parameters() if n in trained
    )


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_of_peft_loads_with_its_head(tmp_path: Path) -> None:
    import transformers

    def build() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**tiny_text._llama_like())
        config.num_labels = 3
        return transformers.LlamaForSequenceClassification(config)

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")
    other = peft.get_peft_model(build(), config)
    fill(p for _, p in other.named_parameters() if p.requires_grad)
    other.save_pretrained(tmp_path)
    made = pk.attach(build(), tmp_path)
    assert made.config.modules_to_save == ["score"]
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    ours, theirs = (m.eval()(**batch).logits for m in (made.model, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["IA3Config", "LoHaConfig"])
def test_other_methods_of_peft_are_refused(method: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"feedforward_modules": []} if method == "IA3Config" else {}
    config = getattr(peft, method)(target_modules=["q_proj"], **values)
    peft.get_peft_model(tiny_text.build("llama", F32), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type: want 'LORA'"):
        pk.attach(tiny_text.build("llama", F32), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_it_by_the_class_of_the_base(tmp_path: Path) -> None:
    """`auto_mapping` says which; and a round trip through both changes no bit."""
    made = pk.attach(tiny_text.build("llama", F32), pk.LoraConfig(r=2))
    fill(made.parameters())
    made.save(tmp_path / "a", format="peft")
    other = peft.PeftModel.from_pretrained(tiny_text.build("llama", F32), str(tmp_path / "a"))
    other.save_pretrained(tmp_path / "b")
    assert values_of(pk.attach(tiny_text.build("llama", F32), tmp_path / "b")) == values_of(made)
