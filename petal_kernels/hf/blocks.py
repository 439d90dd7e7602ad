"""The `with` blocks of an attachment: what a thread or task says to the calls it makes inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from petal_kernels._runtime import checks
from petal_kernels.hf.context import OFF, inside
from petal_kernels.hf.tokens import Domains, image_positions
from petal_kernels.hf.walk import device_of
from petal_kernels.nn.arguments import check_range, check_values

if TYPE_CHECKING:
    from petal_kernels.hf.installed import Installed
    from petal_kernels.hf.method import Method


class Blocks:
    """The part of an `Attachment` that concerns blocks.

    A block holds for the thread or asyncio task that is inside of it, and for nobody else. Blocks
    may nest, overlap and end in any order. What they say is bound to each layer's call: a backward
    outside the block recomputes with the right values.
    """

    method: Method
    _adapters: dict[str, Installed]

    def _need_attached(self, what: str) -> None:
        raise NotImplementedError

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model computes what it did before `attach`."""
        self._need_attached("disabled")
        return self._all_off()

    @contextlib.contextmanager
    def _all_off(self) -> Iterator[None]:
        """Off, whichever adapter becomes active inside."""
        with contextlib.ExitStack() as stack:
            for each in self._adapters.values():
                stack.enter_context(inside(each.method, OFF))
            yield

    def vision(self, features: Tensor) -> contextlib.AbstractContextManager[None]:
        """Inside, routes read `features`: [B, V, d], or [B, d] for one token per sample.

        d is the width of the adapted layers. Where the model runs a multiple of B rows (beam
        search), every sample serves that many neighbouring rows.
        """
        self._need_attached("vision")
        self._need_block("vision")
        width = self.method.width()
        checks.check_floating("features", features)
        if features.dim() not in (2, 3):
            raise ValueError(
                f"features: want shape [B, V, d] or [B, d], got {list(features.shape)}"
            )
        if features.shape[-1] != width:
            raise ValueError(
                f"features: want the width {width} of the adapted layers (project them "
                f"first), got {list(features.shape)}"
            )
        self._check_values("features", features)
        return inside(
            self.method, "vision", features if features.dim() == 3 else features.unsqueeze(1)
        )

    def domains(
        self, domain: Tensor, generated: int = 1, image: int = 0
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, `domain` says which expert serves each token: integers [B, L] for the L positions
        of the sequence that the adapted stack sees (of an encoder-decoder model: the encoder; of a
        Q-Former: queries, then instruction), or [B], one for all tokens of a sample.

        Tokens behind the prompt, in cached decoding and in a decoder behind an encoder, are served
        by expert `generated`, an image's features that the stack reads by cross-attention by expert
        `image`. Where the model runs a multiple of B rows (beam search), every sample
        serves that many neighbouring rows.
        """
        self._need_domains("domains")
        checks.check_tensor("domain", domain)
        checks.check_dtype("domain", domain, (torch.int64, torch.int32))
        if domain.dim() not in (1, 2):
            raise ValueError(f"domain: want shape [B, L] or [B], got {list(domain.shape)}")
        self._check_experts(generated=generated, image=image)
        check_range("domain", domain, 0, self.method.config.experts - 1)
        self._check_values("domain", domain)
        device = device_of(self.method.found.layers[0].module)
        said = Domains(domain.to(device, torch.int64), generated, image)
        return inside(self.method, "domains", said)

    def image_domains(
        self, input_ids: Tensor, *, image: int = 0, text: int = 1
    ) -> contextlib.AbstractContextManager[None]:
        """`domains` of a model that puts an image's features in place of tokens of its text: those
        tokens of `input_ids` [B, L] are served by expert `image`, all others, and what is
        generated, by expert `text`. Where the decoder reads the features by cross-attention
        instead, the features are served by `image` and every token by `text`."""
        self._need_domains("image_domains")
        checks.check_tensor("input_ids", input_ids)
        checks.check_dtype("input_ids", input_ids, (torch.int64, torch.int32))
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: want shape [B, L], got {list(input_ids.shape)}")
        found = self.method.found
        if any(layer.row.layer for layer in found.layers):
            raise ValueError(
                f"image_domains: want a decoder that reads an image among its text, got "
                f"{found.model_type!r}, whose adapted layers read other tokens; use domains()"
            )
        self._check_experts(image=image, text=text)
        self._check_values("input_ids", input_ids)
        where = image_positions(getattr(found.root, "config", None), input_ids)
        if any(layer.row.cross_block for layer in found.layers):
            where = torch.zeros_like(where)
        domain = torch.where(where, image, text)
        return self.domains(domain, generated=text, image=image)

    def context(self, features: Tensor) -> contextlib.AbstractContextManager[None]:
        """Inside, what the matching head reads gains 0.1 times the mean of `features`.

        `features` are the text encoder's outputs without image features, [B, T, d] (their first
        token counts) or [B, d]. Run the matching pairs inside and the others outside.
        """
        self._need_attached("context")
        self._need_block("context")
        config = self.method.config
        if config.context != "batch":
            raise ValueError(
                f"context: want an adapter attached with context='batch', got {config.context!r}"
            )
        checks.check_floating("features", features)
        width = self.method.width()
        if features.dim() not in (2, 3) or features.shape[-1] != width:
            raise ValueError(
                f"features: want shape [B, T, {width}] or [B, {width}], got {list(features.shape)}"
            )
        self._check_values("features", features)
        return inside(self.method, "features", features)

    def _need_domains(self, what: str) -> None:
        self._need_attached(what)
        self._need_block("domains")
        gate = self.method.config.gate
        if gate != "domain":
            raise ValueError(f"{what}: want a config with gate='domain', got {gate!r}")

    def _check_experts(self, **given: int) -> None:
        experts = self.method.config.experts
        for name, expert in given.items():
            if type(expert) is not int or not 0 <= expert < experts:
                raise ValueError(f"{name}: want an expert, 0 to {experts - 1}, got {expert!r}")

    def _need_block(self, name: str) -> None:
        if name not in self.method.blocks:
            raise ValueError(
                f"{name}: want a method that reads it, got {self.method.config.method!r}, which "
                f"has the blocks {['disabled', *self.method.blocks]}"
            )

    def _check_values(self, name: str, given: Tensor) -> None:
        if name == "features" and not given.numel():
            raise ValueError(f"features: want at least one token, got {list(given.shape)}")
        for parameter in self.method.adapter.parameters():
            check_values(name, given, parameter)
