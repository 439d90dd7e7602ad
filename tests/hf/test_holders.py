"""A model and what holds it: engines, larger models, wrappers; parts that are replaced or left."""

from __future__ import annotations

import copy
import gc
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from tests.hf import tiny, tiny_text
from tests.hf.methods import train

LORA = pk.RoutingConfig(r=3)


def llama() -> nn.Module:
    return tiny_text.build("llama", torch.float32)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tiny_text.batch("llama")["input_ids"]).logits


class Holder(nn.Module):
    """A user's own model around a language model."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.vision = nn.Linear(3, 4)
        self.text = text


# -- engines --------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def untouched(model: nn.Module) -> bool:
    return all(p.requires_grad for p in model.parameters()) and not hasattr(model, "petal")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_inside_ddp_is_refused(compiled: bool) -> None:
    model = llama()
    other = torch.compile(model) if compiled else None  # a second holder hides no engine
    engine = nn.parallel.DistributedDataParallel(model)
    message = "model: want a model that is not wrapped yet, got one in a DistributedDataParallel"
    for given in (model, engine, Holder(engine)):
        with pytest.raises(ValueError, match=message):
            pk.attach(given, LORA)
    assert untouched(model)
    del engine, other, given  # wrapped no longer
    pk.attach(model, LORA)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("whole", [False, True])
def test_a_sharded_model_is_refused(whole: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = llama()
    fully_shard(model if whole else model.model.layers[1])
    with pytest.raises(ValueError, match=r"got one in a FSDPLlama\w+, which would not know"):
        pk.attach(model, LORA)
    assert not hasattr(model, "petal")


# -- larger models --------------------------------------------------------------------------------


def test_a_part_of_a_model_that_stays_trainable_is_warned_of() -> None:
    outer = nn.ModuleDict({"whole": Holder(llama())})
    text: Any = outer["whole"].text
    with pytest.warns(
        UserWarning,
        match=r"attach: 2 parameters of the ModuleDict that holds this LlamaForCausalLM stay "
        r"trainable, whole\.vision\.weight first; freeze them",
    ):
        pk.attach(text, LORA)


def test_the_adapter_of_the_whole_model_is_meant_to_be_trained() -> None:
    model = tiny.instructblip()
    pk.attach(model, pk.PetalConfig(r=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.attach(model.language_model, LORA)  # type: ignore[arg-type]


@pytest.mark.parametrize("holder", ["frozen", "compiled", "wrapped", "none", "gone"])
def test_other_holders_are_not(holder: str) -> None:
    model = llama()
    held: Any = {
        "frozen": lambda: Holder(model).requires_grad_(False),
        "compiled": lambda: torch.compile(model),
        "wrapped": lambda: nn.ModuleDict({"module": model}),
        "none": lambda: None,
        "gone": lambda: Holder(model),
    }[holder]()
    if holder == "gone":
        held.itself = [held]  # a cycle: there until somebody collects
        held = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.attach(model, LORA)
    del held


# -- what is named or could be adapted, and is not -------------------------------------------------


def test_linears_that_an_expression_names_in_vain_are_said() -> None:
    config = pk.RoutingConfig(r=3, target_modules=r".*\.self_attn\.(q|k|v|o)_proj")
    with pytest.warns(UserWarning, match="attach: ") as caught:
        attachment = pk.attach(llama(), config)
    (text,) = [str(each.message) for each in caught]
    line = (
        "named by target_modules and not adapted ('routing' does not adapt them): 4 linears, "
        "model.layers.0.self_attn.k_proj first"
    )
    assert text == f"attach: {line}"
    assert line in str(attachment.report()).splitlines()
    assert attachment.report().notes == [line]
    assert len(attachment.found.places) == 4


def test_a_list_that_names_one_in_vain_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_modules: \['k_proj'\] match nothing"):
        pk.attach(llama(), pk.RoutingConfig(r=3, target_modules=["q_proj", "k_proj"]))


def test_the_other_side_of_two_models_in_one_is_said() -> None:
    import transformers

    sides = [tiny_text.build("bert", torch.float32).config.to_dict() for _ in range(2)]  # type: ignore[union-attr, operator]
    sides[1] |= {"is_decoder": True, "add_cross_attention": True}
    config = transformers.EncoderDecoderConfig(encoder=sides[0], decoder=sides[1])
    model = transformers.EncoderDecoderModel(config)
    line = "left as it is: decoder, a BertLMHeadModel beside encoder"
    with pytest.warns(UserWarning, match=f"attach: {line}"):
        attachment = pk.attach(model, LORA)
    assert line in str(attachment.report()).splitlines()
    assert {place.path.partition(".")[0] for place in attachment.found.places} == {"encoder"}
    attachment.detach()
    # Its decoder alone: the self-attention, and the cross-attention is said to be left.
    with pytest.warns(
        UserWarning, match="left as it is: the cross-attention of bert.encoder.layer"
    ):
        pk.attach(model.requires_grad_(False).decoder, LORA)


# -- modules that are replaced --------------------------------------------------------------------


def test_a_new_head_in_place_of_one_that_is_trained_is_refused(tmp_path: Path) -> None:
    model: Any = llama()
    attachment = pk.attach(model, pk.RoutingConfig(r=3, modules_to_save=["lm_head"]))
    model.lm_head = nn.Linear(tiny_text.WIDTH, 7)
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: attachment.save(tmp_path / "adapter"),
        "load": lambda: attachment.load_state_dict(attachment.state_dict()),
        "report": attachment.report,
        "named_parameters": lambda: list(attachment.parameters()),
        "merge": attachment.merge,
    }
    for name, call in calls.items():
        message = rf"{name}: 1 adapted modules were replaced since attach \(first: Linear\)"
        with pytest.raises(RuntimeError, match=message):
            call()
    assert not (tmp_path / "adapter").exists()
    new = model.lm_head
    assert attachment.detach().lm_head is new


def test_a_layer_that_is_replaced_is_named() -> None:
    model: Any = llama()
    attachment = pk.attach(model, LORA)
    model.model.layers[1] = copy.deepcopy(llama().model.layers[1])  # type: ignore[union-attr, index]
    with pytest.raises(RuntimeError, match=r"report: 3 .*first: model.layers.1.self_attn.q_proj"):
        attachment.report()


def test_resized_embeddings_lose_nothing(tmp_path: Path) -> None:
    model: Any = llama()
    attachment = pk.attach(model, LORA)
    train(attachment)
    want = {name: value.clone() for name, value in attachment.state_dict().items()}
    model.resize_token_embeddings(tiny_text.VOCABULARY + 4)
    before = logits(model)
    attachment.report()
    attachment.save(tmp_path / "adapter")
    other = pk.attach(llama(), tmp_path / "adapter").state_dict()
    assert all(torch.equal(other[name], value) for name, value in want.items())
    with attachment.disabled():
        assert not torch.equal(logits(model), before)
    model = attachment.detach()
    assert logits(model).shape[-1] == tiny_text.VOCABULARY + 4


# -- copies ---------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, pickled])
def test_a_copy_has_a_handle_that_does_everything(copy_of: Any, tmp_path: Path) -> None:
    base = llama()
    plain = logits(base)
    first = pk.attach(base, pk.RoutingConfig(r=3, modules_to_save=["lm_head"]))
    train(first)
    want = logits(base)
    model = copy_of(base)
    own = pk.attachment(model)
    assert own is not first
    assert own.model is model
    assert pk.attachment(base) is first
    with own.disabled():
        assert torch.equal(logits(model), plain)
        assert torch.equal(logits(base), want)  # the block is the copy's
    train(own, seed=9)
    own.save(tmp_path / "adapter")
    saved = pk.attach(llama(), tmp_path / "adapter")
    assert torch.equal(logits(saved.model), logits(model))
    own.detach()
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="model: want a model that attach has adapted, got a Ll"):
        pk.attachment(model)
    assert torch.equal(logits(base), want)


def test_no_cycle_keeps_a_holder_or_a_model() -> None:
    """What looks at holders holds none of them."""
    import weakref

    holder = Holder(llama()).requires_grad_(False)
    seen = weakref.ref(holder)
    attachment = pk.attach(holder.text, LORA)
    del holder
    gc.collect()
    assert seen() is None
    assert re.search("q_proj", str(attachment.report()))
