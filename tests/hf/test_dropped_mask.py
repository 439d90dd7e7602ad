"""BLIP's cross-attention drops its mask: said once where adapters stand there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import petal_kernels as pk
from petal_kernels.hf.dropped_mask import LOOKS, DroppedMask, drops_mask
from tests.hf import tiny_blip, tiny_experts

MESSAGE = "encoder_attention_mask: this version of transformers does not read it"
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def heard(model: Any, task: str, *, padded: bool = True) -> list[str]:
    values = tiny_blip.batch(task)
    if not padded:
        values["attention_mask"] = torch.ones_like(values["attention_mask"])
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(**values)
    return [str(w.message) for w in caught if str(w.message).startswith(MESSAGE)]


def test_the_mask_is_dropped_by_the_base() -> None:
    """What the warning says, on a base alone; where this fails, transformers reads the mask."""
    model: Any = tiny_blip.build("vqa").get_submodule("text_decoder.bert")
    ids, image = torch.arange(5, 9)[None], torch.randn(1, 6, tiny_blip.WIDTH, dtype=torch.float64)
    mask = torch.ones(1, 6)
    with torch.no_grad():
        more = {"encoder_hidden_states": image, "encoder_attention_mask": mask}
        whole = model(ids, **more)[0]
        mask[:, 3:] = 0
        assert torch.equal(model(ids, **more)[0], whole) == drops_mask()
        more["encoder_hidden_states"] = image[:, :3]
        more.pop("encoder_attention_mask")
        assert not torch.allclose(model(ids, **more)[0], whole)


@pytest.mark.skipif(not drops_mask(), reason="this version of transformers reads the mask")
@pytest.mark.parametrize("implementation", ["fused", "published"])
@pytest.mark.parametrize(
    "config", [tiny_blip.config_of(), tiny_experts.lora(), pk.RoutingConfig(r=4, function="none")]
)
def test_a_padded_question_is_said_once(config: Any, implementation: str) -> None:
    model = tiny_blip.build("vqa")
    attachment: Any = pk.attach(model, config, implementation=implementation)
    model.to(torch.float64)
    assert not heard(model, "vqa", padded=False)
    with attachment.disabled():
        assert not heard(model, "vqa")
    assert len(heard(model, "vqa")) == 1
    assert not heard(model, "vqa")


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_masks_that_hide_nothing_are_passed_over(task: str) -> None:
    for config in (tiny_blip.config_of(), tiny_experts.lora()):
        model = tiny_blip.build(task)
        pk.attach(model, config)
        assert not heard(model.to(torch.float64), task)


def test_no_cross_attention_adapted_nothing_said() -> None:
    model = tiny_blip.build("vqa")
    pk.attach(model, tiny_experts.lora(target_modules=["text.query", "text.value"]))
    assert not heard(model.to(torch.float64), "vqa")


def test_the_host_looks_a_limited_number_of_times() -> None:
    watch, x = DroppedMask(), torch.zeros(1, 1, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is hidden, and then nobody looks
        for _ in range(LOOKS + 3):
            watch.look({"encoder_attention_mask": x, "encoder_hidden_states": x})
        assert watch.looks == 0
        watch.look({"encoder_attention_mask": x - 1, "encoder_hidden_states": x})
