"""Which tokens of which layers the residuals and the context reach, written out by hand.

The fused and the published form share this wiring, so neither can be the oracle of the other here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from tests.hf import tiny

QUERIES, TEXT = 5, 7


def _want(
    attachment: pk.Attachment, index: int, layer: Any, inputs: tuple[Tensor, Tensor]
) -> Tensor:
    """The frozen layer's output with the additions made by hand (V is zero: no other change)."""
    config: Any = attachment.config
    adapter: Any = attachment.adapter
    seen: dict[str, Tensor] = {}
    hooks = [layer.attention.register_forward_hook(lambda m, a, out: seen.update(a=out))]
    if index % 2 == 0:

        def cross(module: nn.Module, args: object, out: Tensor) -> Tensor:
            out = out.clone()
            if config.context == "batch":
                out[:, 0] += 0.1 * seen["a"][:, 0].mean(0)
            seen["c"] = out
            return out

        hooks.append(layer.crossattention.register_forward_hook(cross))
    with attachment.disabled():
        want = layer(inputs[0], None, inputs[1], query_length=QUERIES)
    for hook in hooks:
        hook.remove()
    pair = adapter.pair(index, "self")
    want = want + 0.1 * (seen["a"] * pair.scale + pair.shift)
    if config.use_cross_residual and "c" in seen:
        pair = adapter.pair(index, "cross")
        want[:, :QUERIES] += 0.1 * (seen["c"] * pair.scale + pair.shift)
    return want


@pytest.mark.parametrize("form", ["fused", "published"])
@pytest.mark.parametrize(
    "values",
    [
        {"variant": "paper"},
        {"variant": "release"},
        {"variant": "release", "use_cross_residual": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", tuple(tiny.FAMILIES))
def test_layer_outputs(family: str, values: dict[str, object], form: str) -> None:
    model = tiny.FAMILIES[family]()
    config = pk.PetalConfig(r=4, dropout=0.0, **values)  # type: ignore[arg-type]
    attachment = pk.attach(model, config, implementation=form)
    tiny.randomise(attachment.adapter.get_submodule("layers"))
    model.double()
    tokens = QUERIES + (TEXT if family == "instructblip" else 0)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, tokens, 32, generator=generator, dtype=torch.float64)
    image = torch.randn(3, 6, 40, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for site in attachment.found.layers:
            got = site.module(x, None, image, query_length=QUERIES)
            want = _want(attachment, site.index, site.module, (x, image))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
            assert not torch.allclose(got[:, -1], x[:, -1])
