"""One name of a module wherever its model stands, and files that were saved elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import petal_kernels as pk
from petal_kernels.hf.names import canonical, prefixes_of, renamed
from tests.hf import tiny, tiny_text
from tests.hf.saved import write

WRAPPED = "_orig_mod.module._fsdp_wrapped_module.module"


@pytest.mark.parametrize(
    ("path", "prefixes", "want"),
    [
        ("model.encoder.layers.0.norm", ("model",), "encoder.layers.0.norm"),
        ("encoder.layers.0.norm", ("model",), "encoder.layers.0.norm"),
        ("lm_head", ("model",), "lm_head"),
        ("model", ("model",), ""),
        ("", ("model",), ""),
        ("module", ("model",), ""),
        (f"{WRAPPED}.lm_head", ("model",), "lm_head"),
        (f"{WRAPPED}.model.norm", ("model",), "norm"),
        (f"model.{WRAPPED}.norm", ("model",), "norm"),
        ("model.layers.0._checkpoint_wrapped_module.norm", ("model",), "layers.0.norm"),
        ("model.layers.0._orig_mod.norm", (), "model.layers.0.norm"),
        ("model.model.norm", ("model",), "model.norm"),  # once
        ("decoder.model.norm", ("model",), "decoder.model.norm"),  # in front only
        ("models.norm", ("model",), "models.norm"),  # a whole part
        ("module_list.0", ("model",), "module_list.0"),
        ("model.text.norm", ("model", "model.text"), "norm"),  # the longest
        ("model.text.norm", ("model.text", "model"), "norm"),
        ("model.norm", ("", "model"), "norm"),
    ],
)
def test_canonical(path: str, prefixes: tuple[str, ...], want: str) -> None:
    assert canonical(path, prefixes) == want


def test_the_outermost_model_says_its_prefix() -> None:
    assert prefixes_of(tiny_text.build("bart")) == ("model",)
    assert prefixes_of(nn.Sequential(tiny_text.build("gpt2"))) == ("transformer",)
    assert prefixes_of(nn.Linear(2, 2)) == ()


def test_renaming_takes_only_what_is_one_name() -> None:
    given = {"x.model.a": 1, "x.b": 2, "x.c": 3, "x.model.c": 4, "model.d": 5, "x.model.e": 6}
    wanted = ("x.a", "x.b", "x.module.c", "d", "x.f")
    got = renamed(given, wanted, ("model",), "x.")
    assert got == {"x.a": 1, "x.b": 2, "x.c": 3, "x.model.c": 4, "model.d": 5, "x.model.e": 6}


def _base(name: str) -> nn.Module:
    return write.build(write.CASES[name]).get_submodule("model")


def _encoder(model: nn.Module) -> torch.Tensor:
    values = write.CASES["vlpet"].batch()
    encoder: Any = model.get_encoder()  # type: ignore[operator]
    ids, mask = values["input_ids"], values["attention_mask"]
    with torch.no_grad():
        return encoder(input_ids=ids, attention_mask=mask).last_hidden_state


def test_a_file_of_a_model_with_a_head_loads_on_its_base_model_and_back(tmp_path: Path) -> None:
    case, folder = write.CASES["vlpet"], write.HERE / "vlpet"
    headed = write.build(case)
    pk.attach(headed, folder)
    bare = write.build(case).get_submodule("model")
    attachment = pk.attach(bare, folder)
    assert torch.equal(_encoder(bare), _encoder(headed))
    stored = load_file(folder / "adapter.safetensors")
    name = "modules_to_save.{}encoder.layernorm_embedding.weight"
    assert torch.equal(attachment.state_dict()[name.format("")], stored[name.format("model.")])

    attachment.save(tmp_path)
    again = pk.attach(write.build(case), tmp_path)
    assert all(torch.equal(value, stored[key]) for key, value in again.state_dict().items())
    wrapped = nn.Sequential()
    wrapped.add_module("module", write.build(case))
    pk.attach(wrapped, tmp_path)
    assert torch.equal(_encoder(wrapped.get_submodule("module")), _encoder(headed))


def test_the_names_in_a_files_config_are_found_elsewhere_too(tmp_path: Path) -> None:
    names = ["model.encoder.layernorm_embedding"]
    config = pk.RoutingConfig(r=3, modules_to_save=names)
    attachment = pk.attach(write.build(write.CASES["vlpet"]), config)
    tiny.randomise(attachment.adapter)
    attachment.save(tmp_path)
    other = pk.attach(_base("vlpet"), tmp_path)
    want = {k.replace(".model.", "."): v for k, v in attachment.state_dict().items()}
    got = other.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())
    for name in ("model", "module", "nothing", "model.encoder.nothing"):
        with pytest.raises(ValueError, match=f"modules_to_save: want names .*'{name}'"):
            pk.attach(_base("vlpet"), pk.RoutingConfig(modules_to_save=[name]))


def test_a_file_with_what_the_base_model_lacks_is_refused() -> None:
    """The kind: a trained head that would be left out without a word."""
    model = _base("routing_whole")
    with pytest.raises(ValueError, match=r"modules_to_save.*'lm_head'"):
        pk.attach(model, write.HERE / "routing_whole")
    assert not hasattr(model, "petal")


def test_keys_under_another_root_are_called_that() -> None:
    config = pk.RoutingConfig(r=3)
    attachment = pk.attach(tiny_text.build("llama", torch.float32), config)
    tiny.randomise(attachment.adapter)
    state = {f"base.petal.{name}": value for name, value in attachment.state_dict().items()}
    with pytest.raises(ValueError, match=r"another root.*with 'base.petal.' in front") as error:
        attachment.load_state_dict(state)
    assert len(str(error.value)) < 600
    state = {name.partition(".")[2]: value for name, value in attachment.state_dict().items()}
    with pytest.raises(ValueError, match=r"another root.*without 'layers.' in front"):
        attachment.load_state_dict(state)
    config = pk.RoutingConfig(r=3, modules_to_save=["norm", "lm_head"])
    attachment = pk.attach(tiny_text.build("llama", torch.float32), config)
    head = "modules_to_save."
    state = {k.replace(head, f"{head}text."): v for k, v in attachment.state_dict().items()}
    with pytest.raises(ValueError, match=r"another root.*with 'text.' in front"):
        attachment.load_state_dict(state)
    state.pop(f"{head}text.lm_head.weight")
    with pytest.raises(ValueError, match="missing keys") as error:
        attachment.load_state_dict(state)
    assert "another root" not in str(error.value)


def test_an_error_about_many_keys_is_short() -> None:
    attachment = pk.attach(tiny_text.build("t5", torch.float32), pk.VLAdapterConfig(r=3))
    names = list(attachment.state_dict())
    state = {f"{'another.' * 40}{number}": torch.ones(1) for number in range(1000)}
    with pytest.raises(ValueError, match=r"missing keys \[.*\] and \d+ more, unexpected") as error:
        attachment.load_state_dict(state)
    assert len(str(error.value)) < 600
    assert names[0] in str(error.value)
    assert "and 999 more" in str(error.value)


def test_a_key_too_many_is_an_error() -> None:
    attachment = pk.attach(tiny_text.build("llama", torch.float32), pk.RoutingConfig(r=3))
    state = {**attachment.state_dict(), "more": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing keys \[\], unexpected keys \['more'\]$"):
        attachment.load_state_dict(state)
