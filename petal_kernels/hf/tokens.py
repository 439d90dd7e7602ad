"""What a stack knows of the tokens it is given: which are padding, and which domain is whose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Part = Literal["all", "first", "last"]


@dataclass(frozen=True)
class Domains:
    """Which expert serves each token, as given to `attachment.domains`."""

    experts: Tensor  # [B, L], or [B]: of all tokens of a sample
    generated: int  # of the tokens behind the prompt
    image: int  # of an image's features that the stack reads by cross-attention
    past: int = 0  # positions that lie in the cache
    length: int | None = None  # of the stack's hidden states
    behind_encoder: bool = False  # the stack generates; [B, L] are the encoder's positions
    reads_image: bool = False  # what is encoded is no sequence of tokens

    def of(self, x: Tensor, encoded: bool, part: Part = "all") -> Tensor:
        """[B', l] or [B'] for x [B', l, D], a stack's hidden states, a part of them, or the
        encoder's output; the B' rows are B times the beams, which are neighbours."""
        rows, length = x.shape[:2]
        given, samples = self.experts, self.experts.shape[0]
        if samples == 0 or rows % samples:
            raise ValueError(
                f"domain: want a batch that divides the hidden states' {rows}, got {samples}"
            )
        if encoded and self.reads_image:
            given = given.new_full((samples,), self.image)
        elif given.dim() == 2 and not encoded:
            known = length if part == "all" or self.length is None else self.length
            given = self._from_past(known)
            if given.dim() == 2:
                given = _part(given, length, part)
        elif given.dim() == 2 and given.shape[1] != length:
            self._refuse(length, 0)
        return given.to(x.device).repeat_interleave(rows // samples, dim=0)

    def _from_past(self, length: int) -> Tensor:
        samples, known = self.experts.shape
        if self.behind_encoder or 0 < known <= self.past:
            return self.experts.new_full((samples,), self.generated)
        if self.past + length != known:
            self._refuse(length, self.past)
        return self.experts[:, self.past :]

    def _refuse(self, length: int, past: int) -> None:
        behind = f" behind {past} in the cache" if past else ""
        raise ValueError(
            f"domain: want [B, L] for the {past + length} positions of the sequence ({length} "
            f"tokens{behind}), got {list(self.experts.shape)}; tokens are generated with a cache"
        )


@dataclass(frozen=True)
class Tokens:
    """Of one forward of a stack; the layers get it with their context."""

    mask: Tensor | None = None  # [B, positions], nonzero where a token counts
    encoded_mask: Tensor | None = None  # of the encoder's output
    domains: Domains | None = None

    @classmethod
    def entering(
        cls,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        domains: Domains | None,
        *,
        first: bool = True,
    ) -> Tokens:
        """From the arguments of the stack's call; what the first stack of a forward reads by
        cross-attention is an image."""
        if domains is not None:
            # Now: the layers append to the cache.
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            crosses = kwargs.get("encoder_hidden_states") is not None
            hidden = args[0] if args else kwargs.get("hidden_states")
            known = isinstance(hidden, Tensor) and hidden.dim() == 3
            domains = replace(
                domains,
                past=past,
                length=hidden.shape[1] if known else None,  # type: ignore[union-attr]
                behind_encoder=crosses and not first,
                reads_image=crosses and first,
            )
        own, encoded = kwargs.get("attention_mask"), kwargs.get("encoder_attention_mask")
        return cls(_padding(own), _padding(encoded), domains)

    def counted(self, x: Tensor, encoded: bool, part: Part = "all") -> Tensor | None:
        """[B, l]: which tokens of x [B, l, D] are no padding; None where that is not known."""
        mask = self.encoded_mask if encoded else self.mask
        if mask is None or x.dim() != 3 or mask.shape[0] != x.shape[0]:
            return None
        return _part(mask, x.shape[1], part) if mask.shape[1] >= x.shape[1] else None


def _part(of_tokens: Tensor, length: int, part: Part) -> Tensor:
    """The `length` columns in front, else those behind."""
    if part == "first":
        return of_tokens[:, :length]
    return of_tokens[:, of_tokens.shape[1] - length :]


def _padding(mask: Any) -> Tensor | None:
    """[B, positions]; of a 4-D mask what its last query may see."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last == 0
