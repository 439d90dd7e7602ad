"""The places that target_modules names: one rule and one wording for every method."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

import petal_kernels as pk
from petal_kernels.hf.walk import select_named
from tests.hf import tiny, tiny_blip, tiny_text


@dataclass
class Place:
    path: str
    role: str


PLACES = [
    Place("layers.0.attn.query", "self.query"),
    Place("layers.0.attn.key", "self.key"),
    Place("layers.10.attn.query", "self.query"),
]
METHODS: dict[str, tuple[Any, Any]] = {
    "petal": (tiny.blip2, pk.PetalConfig),
    "aurora": (lambda: tiny_blip.build("vqa"), pk.AuroraConfig),
    "routing": (lambda: tiny_text.build("gpt2"), pk.RoutingConfig),
}


def selected(wanted: Any) -> list[str]:
    config = pk.PetalConfig(target_modules=wanted)
    return [place.path for place in select_named(PLACES, config, ["self.query"], "two layers")]


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        (None, [0, 1, 2]),
        (["self.query"], [0, 2]),
        (["layers.0.attn.key"], [1]),
        (["query"], [0, 2]),
        (["key", "0.attn.query"], [0, 1]),
        (r"layers\.\d\.attn\..*", [0, 1]),
        (r".*query", [0, 2]),
    ],
    ids=str,
)
def test_roles_paths_their_ends_or_one_expression_over_the_path(
    wanted: Any, numbers: list[int]
) -> None:
    assert selected(wanted) == [PLACES[i].path for i in numbers]


@pytest.mark.parametrize(
    "wanted", [["uery"], ["attn"], ["query", "value"], "query", r"layers\.0", r"attn\.key"], ids=str
)
def test_part_of_a_name_is_no_name(wanted: Any) -> None:
    with pytest.raises(ValueError, match=r"match nothing|and none selected"):
        selected(wanted)


@pytest.mark.parametrize("method", METHODS)
def test_one_wording_for_all_methods(method: str) -> None:
    build, config = METHODS[method]
    model: nn.Module = build()
    with pytest.raises(
        ValueError, match=r"^target_modules: \['gate_proj'\] match nothing; want na"
    ):
        pk.attach(model, config(r=4, target_modules=["gate_proj"]))
    message = f"model: want places that '{method}' adapts (roles ['"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.* candidates in .*none selected$"):
        pk.attach(model, config(r=4, target_modules="nothing"))
    assert all(p.requires_grad for p in model.parameters())
