"""The scripts of `examples/` on a tiny model: they train, and what they save loads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM

import petal_kernels as pk
from tests.examples import support
from tests.examples.support import losses, script

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(support.tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def _on_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts say nothing of devices: here they are to find none."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=torch.arange(4, 14)[None]).logits
    return logits


def _again(model: str, folder: Path) -> torch.Tensor:
    """What the base computes with the adapter in a folder."""
    base = AutoModelForCausalLM.from_pretrained(model)
    pk.attach(base, folder)
    return _logits(base)


def test_every_script_is_run_by_a_test() -> None:
    """The kind: a script that nobody runs. How long one may be: `test_layers.py`."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for path in sorted(support.EXAMPLES.glob("*.py")):
        assert re.search(rf'(script|load)\("{path.stem}"\)', text), path


def test_trainer(model: str, tmp_path: Path) -> None:
    """Checkpoints hold the adapter alone; a resumed run ends where an uninterrupted one does."""
    words = ["--model", model, "--data", str(support.texts(tmp_path / "texts.jsonl"))]
    words += ["--save-steps", "2"]
    main = script("trainer").main
    words += ["--steps", "4"]
    whole = main([*words, "--out", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    resumed = main([*words, "--out", str(tmp_path / "parts"), "--resume"])
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert all(key.startswith("petal.") for key in _keys(checkpoint / "model.safetensors"))
    assert not (checkpoint / "config.json").exists()
    assert resumed.state.global_step == 4
    for name, parameter in pk.attachment(whole.model).named_parameters():
        other = dict(pk.attachment(resumed.model).named_parameters())[name]
        assert torch.equal(parameter, other), name
        assert float(parameter.abs().sum()) > 0, name
    best = Path(str(whole.state.best_model_checkpoint))
    for folder in (best, tmp_path / "whole"):
        assert torch.equal(_again(model, folder), _logits(whole.model))


@pytest.mark.slow
def test_trainer_compiles(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", model, "--data", str(support.texts(tmp_path / "texts.jsonl"))]
    main = script("trainer").main
    torch.manual_seed(0)
    want = main([*words, "--steps", "2", "--save-steps", "2", "--out", str(tmp_path / "a")])
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    words.append("--compile")
    torch.manual_seed(0)
    got = main([*words, "--steps", "2", "--save-steps", "2", "--out", str(tmp_path / "b")])
    torch.testing.assert_close(_logits(got.model), _logits(want.model), rtol=1e-4, atol=1e-5)


def test_accelerate_loop(model: str, tmp_path: Path) -> None:
    words = ["--model", model, "--data", str(support.texts(tmp_path / "texts.jsonl"))]
    main = script("accelerate_loop").main
    torch.manual_seed(0)
    whole = main([*words, "--epochs", "2", "--out", str(tmp_path / "whole")])
    torch.manual_seed(0)
    first = main([*words, "--epochs", "1", "--out", str(tmp_path / "parts")])
    then = main([*words, "--epochs", "1", "--out", str(tmp_path / "parts"), "--resume"])
    assert [*first, *then] == whole
    assert not list((tmp_path / "whole" / "state").glob("*.safetensors"))
    got, want = (_again(model, tmp_path / each / "adapter") for each in ("parts", "whole"))
    assert torch.equal(got, want)
    assert not torch.equal(got, _logits(AutoModelForCausalLM.from_pretrained(model)))


def test_trl_sft(model: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    words = ["--model", model, "--data", str(support.texts(tmp_path / "texts.jsonl")), "--no-bf16"]
    trainer = script("trl_sft").main([*words, "--steps", "6", "--out", str(tmp_path / "out")])
    assert len(losses(trainer)) == 6
    assert all(key.startswith("petal.") for key in _keys(tmp_path / "out" / "model.safetensors"))
    logits = _again(model, tmp_path / "out")
    assert torch.equal(logits, _logits(trainer.model))
    assert not torch.equal(logits, _logits(AutoModelForCausalLM.from_pretrained(model)))


def test_trl_dpo(model: str, tmp_path: Path) -> None:
    """The first loss is log 2: the reference is the model itself, whose adapter adds nothing yet.
    Fused or not, the same losses."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    data = support.preferences(tmp_path / "pairs.jsonl")
    words = ["--model", model, "--data", str(data), "--no-bf16", "--steps", "4"]
    words += ["--out", str(tmp_path / "out")]
    main = script("trl_dpo").main
    torch.manual_seed(0)
    found = losses(main(words))
    assert found[0] == pytest.approx(0.693147, abs=1e-6)
    assert found[-1] != found[0]
    torch.manual_seed(0)
    assert found == pytest.approx(losses(main([*words, "--no-fuse"])), rel=1e-5)


def test_qlora(model: str, tmp_path: Path) -> None:
    """The line changes no loss beyond rounding."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    words = ["--model", model, "--data", str(support.texts(tmp_path / "texts.jsonl"))]
    words += ["--dtype", "float32", "--steps", "4", "--out", str(tmp_path / "out")]
    main = script("qlora").main
    torch.manual_seed(0)
    fused = main(words)
    found = losses(fused)
    up = fused.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    assert type(up).__name__ == "Linear4bit"
    assert len(found) == 4
    trained = [p for name, p in fused.model.named_parameters() if "lora_B" in name]
    assert all(float(parameter.abs().sum()) for parameter in trained)
    torch.manual_seed(0)
    assert found == pytest.approx(losses(main([*words, "--no-fuse"])), rel=1e-4)
