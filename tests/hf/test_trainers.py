"""Trainer and TRL with an adapted model, as attach and as PEFT's model has it: what checkpoints
hold, and what they give back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
import transformers

import petal_kernels as pk
from petal_kernels.hf import pair
from tests.examples import support
from tests.hf import methods, tiny_text

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def _trainer(model: Any, folder: Path, callbacks: Any = None, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (16, 9), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    given = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps"}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{**given, **settings},
    )
    return transformers.Trainer(model, arguments, None, data, data[:4], callbacks=callbacks)


def _adapted(how: str, seed: int = 0) -> Any:
    model = tiny_text.build("llama", torch.float32)
    torch.manual_seed(seed)
    if how == "peft":
        return peft.get_peft_model(model, pk.peft.RoutingConfig(r=3, kind="adapter"))
    pk.attach(model, pk.RoutingConfig(r=3, kind="adapter", modules_to_save=["lm_head"]))
    return model


def _callbacks(how: str) -> list[Any]:
    return [] if how == "peft" else [pk.hf.AdapterCheckpoint()]


def _values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in pk.attachment(model).named_parameters()}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("how", ["attach", "peft"])
def test_a_checkpoint_is_the_adapter_and_resumes(how: str, tmp_path: Path) -> None:
    """The kind: a base in every checkpoint, an adapter that starts anew, the last for the best."""
    whole = _trainer(_adapted(how), tmp_path, _callbacks(how), load_best_model_at_end=True)
    whole.train()
    best = Path(whole.state.best_model_checkpoint)
    adapter = sum(4 * value.numel() for value in _values(whole.model).values())
    assert _bytes(best) < (3 if how == "attach" else 2) * adapter + 20_000
    resumed = _trainer(_adapted(how, seed=5), tmp_path / "again", _callbacks(how))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    final = _adapted(how, seed=6)
    if how == "peft":
        base, last = tiny_text.build("llama", torch.float32), str(tmp_path / "checkpoint-4")
        final = peft.PeftModel.from_pretrained(base, last, is_trainable=True)
    else:
        pk.attachment(final).load(tmp_path / "checkpoint-4")
    for name, value in _values(resumed.model).items():
        assert torch.equal(value, _values(final)[name]), name
    assert any(
        not torch.equal(value, _values(_adapted(how))[name])
        for name, value in _values(whole.model).items()
    )
    loaded = _adapted(how, seed=7)
    if how == "attach":
        pk.attachment(loaded).load(best)
        assert all(torch.equal(v, _values(loaded)[n]) for n, v in _values(whole.model).items())


def test_without_the_callback_the_base_is_written_too(tmp_path: Path) -> None:
    trainer = _trainer(_adapted("attach"), tmp_path)
    trainer.save_model()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "model.embed_tokens.weight" in names
    assert any(name.startswith("petal.") for name in names)


def test_a_checkpoint_of_another_adapter_is_an_error(tmp_path: Path) -> None:
    """The kind: Trainer loads what fits, and logs the rest."""
    trainer = _trainer(_adapted("attach"), tmp_path, _callbacks("attach"))
    trainer.train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    state = load_file(file)
    del state[next(iter(state))]
    save_file(state, file, metadata={"format": "pt"})
    again = _trainer(_adapted("attach"), tmp_path, _callbacks("attach"))
    with pytest.raises(RuntimeError, match="petal: want the tensors of the adapter"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_another_adapter_is_an_error_after_a_switch_too(tmp_path: Path) -> None:
    """The kind: what is set up on the adapter that was active alone."""
    model = _adapted("attach")
    trainer = _trainer(model, tmp_path, _callbacks("attach"))
    trainer.save_model()
    attachment = pk.attachment(model)
    attachment.add("b", pk.LoraConfig(r=2))
    attachment.switch("b")
    with pytest.raises(RuntimeError, match="petal: want the tensors of the adapter"):
        model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def test_a_save_that_dies_leaves_the_checkpoint_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind: a file that is cut where it stood."""
    model = _adapted("attach")
    trainer = _trainer(model, tmp_path, _callbacks("attach"))
    trainer.save_model()
    file = tmp_path / "model.safetensors"
    before, write = file.read_bytes(), pair._write_synced

    def cut(path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2] if pair.CHECKPOINT in path.name else data)
        if pair.CHECKPOINT in path.name:
            raise OSError("no space left")

    methods.train(pk.attachment(model), 9)
    monkeypatch.setattr(pair, "_write_synced", cut)
    with pytest.raises(OSError, match="no space left"):
        trainer.save_model()
    assert file.read_bytes() == before
    monkeypatch.undo()
    trainer.save_model()
    assert file.read_bytes() != before
    assert sorted(path.name for path in tmp_path.glob(".*.tmp")) == []


def test_the_callback_follows_a_switch(tmp_path: Path) -> None:
    model = _adapted("attach")
    attachment = pk.attachment(model)
    attachment.add("b", pk.LoraConfig(r=2))
    trainer = _trainer(model, tmp_path, _callbacks("attach"))
    attachment.switch("b")
    methods.train(attachment)
    trainer.save_model()
    other = pk.attach(tiny_text.build("llama", torch.float32), tmp_path)
    assert other.config == attachment.config
    assert all(torch.equal(v, _values(model)[n]) for n, v in other.named_parameters())


def test_the_callback_wants_an_adapted_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="want a model that attach has adapted"):
        _trainer(tiny_text.build("llama"), tmp_path, _callbacks("attach"))
    model: Any = tiny_text.build("llama")
    pk.attach(model.model, pk.LoraConfig(r=2))
    with pytest.raises(ValueError, match="attach to the whole model"):
        _trainer(model, tmp_path, _callbacks("attach"))


def test_trainer_asks_whether_all_ranks_hold_one_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, when training begins; what it says of others is in test_ranks.py."""
    model = _adapted("attach")
    asked: list[Any] = []
    handle = type(pk.attachment(model))
    monkeypatch.setattr(handle, "check_ranks", lambda self: asked.append(self))
    trainer = _trainer(model, tmp_path, _callbacks("attach"), max_steps=1)
    assert asked == []
    trainer.train()
    assert asked == [pk.attachment(model)]


def test_trl_takes_a_method_for_its_peft_config(tmp_path: Path) -> None:
    """The reference is the model with the adapter off: the first loss is log 2, a later one not."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    folder = support.tiny_model(tmp_path / "model")
    rows = datasets.load_dataset(
        "json",
        data_files=str(support.preferences(tmp_path / "pairs.jsonl")),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    trainer = trl.DPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            learning_rate=1e-2,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=rows,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        peft_config=pk.peft.RoutingConfig(r=4, task_type="CAUSAL_LM"),
    )
    trainer.train()
    found = support.losses(trainer)
    assert found[0] == pytest.approx(0.693147, abs=1e-6)
    assert abs(found[-1] - found[0]) > 1e-3
