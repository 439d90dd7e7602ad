"""What one forward of a stack knows of its tokens: which are padding, which domain is whose, and
whether a row is one sample.

A pooled router and VL-PET's small gate take one choice per sample, by a mean over its tokens; they
are the readers of a mask. What they may not average over is found out when the stack is entered,
before its layers append to the cache. A mask's columns are the positions of the sequence; the
hidden states stand behind those in the cache, wherever a static or a sliding-window cache lets the
mask end. Of a 4-D mask the diagonal says which token is no padding: every other one sees itself.

What would be averaged over several samples is refused. Looking at values synchronises a GPU; this
is done, where there is a reader at all, for `position_ids` without a mask, and for 4-D masks of
several queries that a user made. Where an embedding module made the mask (BERT, BLIP, a Q-Former)
and under torch.compile or CUDA graph capture, the device itself asserts it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Part = Literal["all", "first", "last"]

# What takes one choice per sample, and what else it could be.
_IMAGE_TOKENS = ("image_token_id", "video_token_id")  # or by the names that configs map to these
_CROSS = ("encoder_hidden_states", "cross_attention_states")  # what a stack reads beside its tokens
_INSTEAD = {"router_input='pooled'": "router_input='token'", "gate='small'": "another gate"}


def reader_of(config: Any) -> str | None:
    """What in a method's config takes one choice per sample, as an error names it."""
    if getattr(config, "router_input", None) == "pooled":
        return "router_input='pooled'"
    return "gate='small'" if getattr(config, "gate", None) == "small" else None


def image_positions(config: Any, input_ids: Tensor) -> Tensor:
    """Which tokens a model of that config puts an image's or a video's features in place of;
    ValueError where its config names none."""
    tokens = [getattr(config, name, None) for name in _IMAGE_TOKENS]
    known = [token for token in tokens if type(token) is int]
    if not known:
        raise ValueError(
            f"model: want a model whose config says which tokens are an image's "
            f"({' or '.join(_IMAGE_TOKENS)}), got a {type(config).__name__} without"
        )
    return torch.isin(input_ids, input_ids.new_tensor(known))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def named(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module of that class, by name."""
    if not args:
        return kwargs
    return {**dict(zip(_parameters(cls), args, strict=False)), **kwargs}


@dataclass(frozen=True)
class Domains:
    """Which expert serves each token, as given to `attachment.domains`."""

    experts: Tensor  # [B, L], or [B]: of all tokens of a sample
    generated: int  # of the tokens behind the prompt
    image: int  # of an image's features that the stack reads by cross-attention
    past: int | Tensor = 0  # positions that lie in the cache
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
        if self.behind_encoder:
            return self.experts.new_full((samples,), self.generated)
        if isinstance(self.past, Tensor):
            return _columns(self.experts, self.past, length, self.generated)
        if 0 < known <= self.past:
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

    mask: Tensor | None = None  # [B, L] of the hidden states, nonzero where a token counts
    encoded_mask: Tensor | None = None  # of the encoder's output
    domains: Domains | None = None
    reader: str | None = None  # the masks are kept for it alone
    length: int | None = None  # of the hidden states
    rows: int = 0

    @classmethod
    def entering(
        cls,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        domains: Domains | None,
        *,
        first: bool = True,
        reader: str | None = None,
    ) -> Tokens:
        """From the arguments of the stack's call; what the first stack of a forward reads by
        cross-attention is an image. `named` puts what is given by position into `kwargs`; without
        a `reader` (`reader_of` the config) no mask is looked at."""
        if args:
            kwargs = {"hidden_states": args[0], **kwargs}
        rows, length, embedded = _shape(kwargs)
        if domains is not None:
            crosses = any(kwargs.get(name) is not None for name in _CROSS)
            domains = replace(
                domains,
                past=_past(kwargs, length),
                length=length,
                behind_encoder=crosses and not first,
                reads_image=crosses and first,
            )
        if reader is None or length is None:
            return cls(domains=domains)
        entry = _Entry(kwargs, reader, rows, length)
        mask, encoded = entry.own(), entry.encoded()
        entry.refuse(wait=not embedded)
        return cls(mask, encoded, domains, reader, length, rows)

    def counted(self, x: Tensor, encoded: bool, part: Part = "all") -> Tensor | None:
        """[B, l]: which tokens of x [B, l, D] are no padding; None where all count."""
        if self.reader is None or x.dim() != 3:
            return None
        mask, (rows, length) = self.encoded_mask if encoded else self.mask, x.shape[:2]
        if not encoded and part == "all" and length != self.length:
            raise ValueError(
                f"{self.reader}: want the {self.length} tokens of a sample at once, got {length}; "
                "set chunk_size_feed_forward to 0 where a feed-forward runs in chunks"
            )
        if encoded and rows != self.rows:
            raise ValueError(
                f"{self.reader}: want one row for every sample of what the cross-attention reads, "
                f"got {rows} for {self.rows} samples; use {_INSTEAD[self.reader]}"
            )
        if mask is None:
            return None
        if mask.shape[0] == 1:
            mask = mask.expand(rows, -1)
        fits = mask.shape[1] == length or (not encoded and mask.shape[1] > length)
        if mask.shape[0] != rows or not fits:
            raise ValueError(
                f"{self.reader}: want a mask for {rows} rows of {length} tokens, got one for "
                f"{list(mask.shape)}"
            )
        return _part(mask, length, part).to(x.device)


class _Entry:
    """What the call of a stack says of its rows, looked at for one reader."""

    def __init__(self, kwargs: dict[str, Any], reader: str, rows: int, length: int) -> None:
        self.kwargs, self.reader, self.rows, self.length = kwargs, reader, rows, length
        self.doubts: list[tuple[Tensor, str]] = []  # true where a row holds several samples

    def own(self) -> Tensor | None:
        """[B, L] of the hidden states."""
        given: Any = self.kwargs.get("attention_mask")
        self._packed(given)
        if isinstance(given, dict):  # one for each kind of layers
            kinds = [given["full_attention"]] if "full_attention" in given else [*given.values()]
            given = kinds[0] if kinds else None
        if given is None:
            return None
        cache, length = self.kwargs.get("past_key_values"), self.length
        past = 0 if cache is None else cache.get_seq_length()
        mask = self._checked("attention_mask", given)
        if mask.dim() == 2:
            if isinstance(past, Tensor):  # a column that is not there is padding, as in the model
                return _columns(mask, past, length, 0)
            if mask.shape[1] < past + length:
                behind = f" behind {past} in the cache" if past else ""
                self._say(
                    f"columns of attention_mask for the {past + length} positions of the sequence "
                    f"({length} tokens{behind}), got {list(mask.shape)}"
                )
            return mask[:, past : past + length]
        queries, last = mask.shape[2], mask.shape[3] - length
        if queries not in (1, length) or last < 0:
            self._say(f"an attention_mask [B, 1, {length}, positions], got {list(mask.shape)}")
        # A sliding-window cache has columns for its last positions, which end with these tokens.
        if isinstance(past, Tensor):
            start: int | Tensor = past.to(mask.device).clamp(max=last)
        else:
            start = min(past, last)
        seen = _seen(mask).expand(-1, length, -1)
        index = torch.arange(length, device=mask.device) + start
        real = seen.gather(2, index.view(1, -1, 1).expand(len(seen), -1, -1)).squeeze(2)
        if queries > 1:
            self._doubt(_strangers(seen, real, start), "an attention_mask that parts a row")
        return real

    def encoded(self) -> Tensor | None:
        """[B, S] of the encoder's output."""
        mask = self.kwargs.get("encoder_attention_mask")
        if mask is None or self.kwargs.get("encoder_hidden_states") is None:
            return None
        mask = self._checked("encoder_attention_mask", mask)
        if mask.dim() == 2:
            return mask
        seen = _seen(mask)
        if seen.shape[1] > 1:
            parted = (seen != seen[:, :1]).any()
            self._doubt(parted, "an encoder_attention_mask that parts a row")
        return seen[:, 0]

    def refuse(self, wait: bool) -> None:
        """ValueError where a row holds several samples. `wait` for the GPU to say so, or have it
        stop by itself."""
        for doubt, met in self.doubts:
            if torch.compiler.is_compiling() or (doubt.is_cuda and (not wait or _capturing())):
                torch._assert_async(~doubt, f"{self.reader}: want {self._want(met)}")
            elif type(doubt) is Tensor and not doubt.is_meta and bool(doubt):
                self._say(self._want(met))

    def _packed(self, mask: Any) -> None:
        """Rows that a collator packed, as transformers recognises them."""
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            ends = self.kwargs.get(name)
            if isinstance(ends, Tensor) and ends.numel() - 1 > self.rows:
                met = f"{name} of {ends.numel() - 1} samples in {self.rows} rows"
                self._say(self._want(met, ""))
        numbers = self.kwargs.get("seq_idx")
        if isinstance(numbers, Tensor) and self.length > 1:
            self._doubt((numbers.diff() != 0).any(), "seq_idx that changes inside a row")
        positions = self.kwargs.get("position_ids")
        if mask is not None or not isinstance(positions, Tensor) or positions.shape[-1] < 2:
            return
        if positions.dim() == 3:  # of several axes; the first of four is the text's
            if positions.shape[0] != 4:
                return
            positions = positions[0]
        self._doubt((positions.diff() != 1).any(), "position_ids that start anew inside a row")

    def _checked(self, name: str, mask: Any) -> Tensor:
        dims = mask.dim() if isinstance(mask, Tensor) else None
        if dims == 4 and not (mask.dtype == torch.bool or mask.is_floating_point()):
            self._say(f"a 4-D {name} of booleans or floats to add, got {mask.dtype}")
        if dims not in (2, 4):
            got = f"a {type(mask).__name__}" if dims is None else list(mask.shape)
            self._say(
                f"{name} as a Tensor [B, positions] or [B, 1, queries, positions], got {got} (with "
                "flex attention: load the model with attn_implementation='sdpa')"
            )
        assert isinstance(mask, Tensor)
        return mask

    def _doubt(self, doubt: Tensor, met: str) -> None:
        self.doubts.append((doubt, met))

    def _want(self, met: str, tail: str = " (packed samples)") -> str:
        return (
            f"one sample per row, since it is one choice for all tokens of a row, got {met}{tail}; "
            f"use {_INSTEAD[self.reader]}, or rows of one sample with padding and an attention_mask"
        )

    def _say(self, want: str) -> None:
        raise ValueError(f"{self.reader}: want {want}")


def _shape(kwargs: dict[str, Any]) -> tuple[int, int | None, bool]:
    """Rows and length of the hidden states, and whether they were embedded by another module."""
    names = (("hidden_states", 3), ("inputs_embeds", 3), ("input_ids", 2), ("query_embeds", 3))
    for name, dims in names:
        given = kwargs.get(name)
        if isinstance(given, Tensor) and given.dim() == dims:
            queries = kwargs.get("query_embeds") if name == "input_ids" else None
            front = queries.shape[1] if isinstance(queries, Tensor) else 0  # of a Q-Former
            return given.shape[0], front + given.shape[1], name == "hidden_states"
    return 0, None, False


def _past(kwargs: dict[str, Any], length: int | None) -> int | Tensor:
    """Positions in the cache now; of a static cache that decodes as a tensor, which is not read."""
    cache = kwargs.get("past_key_values")
    past: int | Tensor = 0 if cache is None else cache.get_seq_length()
    if not isinstance(past, Tensor):
        return past
    if length == 1 or torch.compiler.is_compiling() or (past.is_cuda and _capturing()):
        return past.clone()  # the layers write into it
    return int(past)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _part(of_tokens: Tensor, length: int, part: Part) -> Tensor:
    """The `length` columns in front, else those behind."""
    if part == "first":
        return of_tokens[:, :length]
    return of_tokens[:, of_tokens.shape[1] - length :]


def _columns(of_positions: Tensor, past: Tensor, length: int, beyond: int) -> Tensor:
    """[B, length] behind `past` positions, which the host does not know; `beyond` past the end."""
    known = of_positions.shape[1]
    index = torch.arange(length, device=of_positions.device) + past.to(of_positions.device)
    padded = F.pad(of_positions, (0, 1), value=beyond)
    return padded.index_select(1, index.clamp(max=known))


def _seen(mask: Tensor) -> Tensor:
    """[B, Q, K] of [B, heads, Q, K]: which positions a query sees."""
    rows = mask[:, 0]
    return rows if rows.dtype == torch.bool else rows == 0


def _strangers(seen: Tensor, real: Tensor, start: int | Tensor) -> Tensor:
    """Whether some token of real [B, L] does not see the one before it that is no padding: in one
    sample it does, whatever its window. The tokens' columns of seen [B, L, K] begin at start."""
    index = torch.arange(real.shape[1], device=real.device)
    latest = torch.where(real, index, -1).cummax(1).values[:, :-1]
    before = (latest.clamp(min=0) + start).unsqueeze(2)
    sees = seen[:, 1:].gather(2, before).squeeze(2)
    return (real[:, 1:] & (latest >= 0) & ~sees).any()
