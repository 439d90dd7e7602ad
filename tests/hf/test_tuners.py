"""The methods as PEFT's tuners: what attach computes, under PEFT's calls and in its files."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

import peft
from peft.utils.peft_types import PeftType

import petal_kernels as pk
from tests.hf import methods, tiny_text
from tests.hf.methods import ROWS, Row, attached, differences, fresh, output, own, step

_ROWS = [row for row in ROWS if not isinstance(row.config(), pk.LoraConfig)]
_BATCH = tiny_text.batch("llama")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def every(quick: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(row, id=row.name, marks=[] if quick(row) else [pytest.mark.slow])
            for row in _ROWS
        ],
    )


def _face(config: Any, **more: Any) -> Any:
    kind = getattr(pk.peft, type(config).__name__)
    return kind(**config.to_dict(), **more)


def _wrapped(row: Row) -> tuple[Any, Any]:
    """As `methods.attached`, by PEFT."""
    base = fresh(row)
    torch.manual_seed(2)
    model = peft.get_peft_model(base, _face(row.config()))
    attachment = pk.attachment(model)
    methods.train(attachment)
    return model.to(torch.float64), attachment


@every(own)
def test_a_tuner_computes_what_attach_computes(row: Row) -> None:
    """The kind: a field of a config that is lost, a block that does not reach its method."""
    model, attachment = _wrapped(row)
    given = row.given(leaves="all")
    want = step(row, *attached(row), row.given(leaves="all"))
    assert differences(step(row, model, attachment, given), want, 0.0) == []
    with model.disable_adapter():
        assert torch.equal(output(row, model), methods.plain(row))
    trained = model.get_nb_trainable_parameters()[0]
    assert trained == sum(p.numel() for p in attachment.parameters())


@every(methods.first)
def test_files_and_unloading(row: Row, tmp_path: Path) -> None:
    model, attachment = _wrapped(row)
    model.float()
    want = output(row, model, attachment)
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(fresh(row).float(), tmp_path)
    assert torch.equal(output(row, again, pk.attachment(again)), want)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    kept: Any = again.peft_config["default"]
    assert kept.config().to_dict() == row.config().to_dict()
    base = again.unload()
    assert torch.equal(output(row, base), output(row, fresh(row).float()))
    stays = True
    with contextlib.suppress(ValueError):
        attached(row)[1].merge_and_unload()
        stays = False
    if stays:
        with pytest.raises(ValueError, match=r"parts that stay|merge"):
            model.merge_and_unload()
    else:
        torch.testing.assert_close(
            output(row, model.merge_and_unload()), want, rtol=1e-3, atol=1e-3
        )


# -- adapters by name -----------------------------------------------------------------------------


def _llama(**config: Any) -> Any:
    model = tiny_text.build("llama", torch.float32).eval()
    return peft.get_peft_model(model, pk.peft.RoutingConfig(r=3, task_type="CAUSAL_LM", **config))


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(**_BATCH).logits
    return logits


def _two() -> tuple[Any, dict[str, torch.Tensor]]:
    model, found = _llama(), {}
    model.add_adapter("text", pk.peft.RoutingConfig(r=2, kind="adapter"))
    for seed, name in enumerate(("default", "text")):
        model.set_adapter(name)
        methods.train(pk.attachment(model), seed)
        found[name] = _logits(model)
    return model, found


def test_adapters_are_switched_saved_and_deleted(tmp_path: Path) -> None:
    model, want = _two()
    assert isinstance(model, peft.PeftModelForCausalLM)
    for name in ("default", "text", "default"):
        model.set_adapter(name)
        assert torch.equal(_logits(model), want[name])
        assert model.active_adapters == [name]
    model.save_pretrained(str(tmp_path))
    assert torch.equal(_logits(model), want["default"])
    fresh_one = tiny_text.build("llama", torch.float32)
    again = peft.PeftModel.from_pretrained(fresh_one, tmp_path / "text", adapter_name="text")
    assert torch.equal(_logits(again), want["text"])
    again.load_adapter(str(tmp_path), "other", is_trainable=True)
    assert torch.equal(_logits(again), want["text"])
    again.set_adapter("other")
    assert torch.equal(_logits(again), want["default"])
    with pytest.warns(UserWarning, match="other was active; text is now"):
        again.delete_adapter("other")
    assert (again.active_adapters, list(again.peft_config)) == (["text"], ["text"])
    assert torch.equal(_logits(again), want["text"])
    with pytest.raises(ValueError, match="adapter_name: want one of several, got 'text' alone"):
        again.delete_adapter("text")


def test_what_is_trained_is_the_active_ones() -> None:
    model, _ = _two()
    for name in ("default", "text"):
        model.set_adapter(name)
        assert all(parameter.requires_grad for parameter in pk.attachment(model).parameters())
    model.set_adapter("text", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad("text")
    assert model.get_nb_trainable_parameters()[0] > 0


def test_status_and_merging() -> None:
    model = _llama()
    methods.train(pk.attachment(model))
    want = _logits(model)
    assert model.get_model_status().enabled is True
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
        plain = _logits(model)
        with model.disable_adapter():
            pass
        assert torch.equal(_logits(model), plain)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    torch.testing.assert_close(_logits(model), want)
    model.unmerge_adapter()
    assert torch.equal(_logits(model), want)
    assert not torch.equal(plain, want)


def test_copies_and_pickles() -> None:
    model, want = _two()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.set_adapter("default")
        assert torch.equal(_logits(twin), want["default"])
        assert torch.equal(_logits(model), want["text"])
    for kind in (PeftType("PETAL_KERNELS_PETAL"), model.peft_config["default"]):
        assert pickle.loads(pickle.dumps(kind)) == kind
        assert copy.deepcopy(kind) == kind


def test_state_dicts_both_ways() -> None:
    model, want = _two()
    for name in ("default", "text"):
        state = peft.get_peft_model_state_dict(model, adapter_name=name)
        assert all(key.startswith("base_model.model.petal.") for key in state)
        other, _ = _two()
        methods.train(pk.attachment(other), 9)
        peft.set_peft_model_state_dict(other, state, adapter_name=name)
        other.set_adapter(name)
        assert torch.equal(_logits(other), want[name])
        # An engine's gathered state counts for the active adapter.
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    state = peft.get_peft_model_state_dict(model, state_dict=gathered, adapter_name="text")
    plain = peft.get_peft_model_state_dict(model, adapter_name="text")
    assert all(torch.equal(state[key], value + 1) for key, value in plain.items())


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "unexpected", "shape"])
def test_a_file_that_does_not_fit_is_refused(how: str, tmp_path: Path) -> None:
    """The kind: an adapter that PEFT loads in part, in silence."""
    model = _llama()
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    name = next(iter(state))
    if how == "missing":
        del state[name]
    elif how == "unexpected":
        state[f"{name}.more"] = torch.zeros(1)
    else:
        state[name] = state[name][:-1].clone()
    save_file(state, file)
    with pytest.raises(ValueError, match=r"missing keys|want shape"):
        peft.PeftModel.from_pretrained(tiny_text.build("llama", torch.float32), tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: pk.peft.RoutingConfig(task_type="SEQ_CLS"), ValueError, "task_type: want one of"),
        (lambda: pk.peft.RoutingConfig(r=0), ValueError, "r: want an integer >= 1"),
        (lambda: pk.peft.RoutingConfig(rank=3), TypeError, "rank"),
        (
            lambda: peft.get_peft_model(
                tiny_text.build("llama"), pk.peft.RoutingConfig(r=2), low_cpu_mem_usage=True
            ),
            ValueError,
            "low_cpu_mem_usage: want False",
        ),
        (
            lambda: peft.get_peft_model(tiny_text.build("llama"), pk.peft.PetalConfig()),
            ValueError,
            "model: want a module",
        ),
        (lambda: _two()[0].base_model.set_adapter(["default", "text"]), ValueError, "one adapter"),
        (lambda: _two()[0].merge_adapter(["default"]), ValueError, "adapter_names: want None or"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.slow
def test_peft_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, petal_kernels as pk; pk.attach; assert 'peft' not in sys.modules;"
        "import petal_kernels.peft as faces; assert faces is pk.peft;"
        "from peft import PeftConfig; assert issubclass(pk.peft.VLPetConfig, PeftConfig)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
