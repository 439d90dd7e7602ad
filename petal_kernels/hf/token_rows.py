"""Rows of embeddings that are trained, of tokens that a config names; the base's stay as they are.

The trained rows are values, not differences, as PEFT's are: an embedding that was resized, and so
filled with other random rows, gets what was trained. An embedding gives them where one of the
tokens stands; of a head that shares its weight the logits of these tokens follow. No copy of the
embedding is made: beside its output there is one more [..., width], or [..., tokens] of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels.hf.context import now
from petal_kernels.hf.merging import Merged
from petal_kernels.hf.method import Hand, Method
from petal_kernels.hf.parts import FrozenVectors, Part, Run, own_class
from petal_kernels.hf.walk import device_of
from petal_kernels.nn.frozen_linear import MERGED_TRAINING
from petal_kernels.nn.published import published_rows

FIELD = "trainable_token_indices"


class TokenRows(nn.Module):
    """The trained rows of one embedding, and where they belong."""

    rows: nn.Parameter
    tokens: Tensor  # their numbers as the config lists them
    ascending: Tensor  # the same in order, and the place of each in `rows`
    places: Tensor

    def __init__(self, weight: Tensor, tokens: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.numbers = list(tokens)
        self.__dict__["merged"] = None  # as of an adapted linear
        self.__dict__["partly"] = False
        numbers = torch.tensor(tokens, device=weight.device)
        ascending, places = numbers.sort()
        for name, value in (("tokens", numbers), ("ascending", ascending), ("places", places)):
            self.register_buffer(name, value, persistent=False)
        self.rows = nn.Parameter(weight.detach()[numbers].to(dtype))

    def look(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `ids` are among the tokens, and the place of each one's row."""
        at = torch.searchsorted(self.ascending, ids).clamp_max(len(self.numbers) - 1)
        return self.ascending[at] == ids, self.places[at]

    def padding(self, module: nn.Module) -> int | None:
        """The place of an embedding's padding, whose row gets no gradient there."""
        own = getattr(module, "padding_idx", None)
        return self.numbers.index(own) if own in self.numbers else None


class _TokenPart:
    """What the parts of an embedding and of its head have in common."""

    def __init__(self, method: Method, table: TokenRows) -> None:
        self.method, self.table = method, table

    def changes(self, module: nn.Module) -> bool:
        """Whether the module's own output is not what this call gives: where the rows are on, or
        off while they lie in the weight."""
        on, merged = now(self.method).on, self.merged is not None
        if on and merged and module.training:
            raise RuntimeError(MERGED_TRAINING)
        return on != merged

    @property
    def merged(self) -> Tensor | None:
        """The weight without the rows that lie in it."""
        merged: Tensor | None = self.table.__dict__["merged"]
        return merged


class EmbeddingRows(_TokenPart, FrozenVectors):
    """An embedding whose rows of some tokens are trained."""

    needed = True  # what is trained would stay without effect

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        y = run(*args, **kwargs)
        if not self.changes(module):
            return y
        ids: Tensor = args[0] if args else kwargs["input"]
        table, merged = self.table, self.merged
        scale = getattr(module, "embed_scale", 1.0)
        if isinstance(scale, Tensor):
            scale = scale.to(y.dtype)
        if self.method.published and merged is None:
            weight = published_rows(module.weight, table.tokens, table.rows)  # type: ignore[arg-type]
            return F.embedding(ids, weight, module.padding_idx) * scale  # type: ignore[arg-type]
        hit, place = table.look(ids)
        rows = table.rows if merged is None else merged[table.tokens]
        found = F.embedding(place, rows, table.padding(module)).to(y.dtype) * scale
        return torch.where(hit.unsqueeze(-1), found, y)


class HeadRows(_TokenPart, Part):
    """A head that shares the weight of such an embedding."""

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        y: Tensor = run(*args, **kwargs)
        if not self.changes(module):
            return y
        x: Tensor = args[0] if args else kwargs["input"]
        weight, bias = module._parameters["weight"], cast("Tensor | None", module.bias)
        assert weight is not None
        tokens, rows = self.table.tokens, self.table.rows
        if self.merged is not None:
            return F.linear(x, self.merged.to(weight), bias)
        if self.method.published:
            return F.linear(x, published_rows(weight, tokens, rows), bias)
        moved = F.linear(x, (rows - weight[tokens]).to(x.dtype)).to(y.dtype)
        # In place, the logits are many: nothing else holds what the linear has just made.
        plain = own_class(module) is nn.Linear and "forward" not in module.__dict__
        return y.index_add_(-1, tokens, moved) if plain else y.index_add(-1, tokens, moved)


class Tables:
    """The embeddings of a model whose rows are trained, and the heads that share their weights."""

    def __init__(self, model: nn.Module, wanted: Any, taken: dict[int, str]) -> None:
        """`taken`: modules that something else adapts, or trains whole, and what."""
        self.tokens: dict[str, list[int]] = {}
        self.modules: dict[str, dict[str, nn.Module]] = {}  # that share one weight, by path
        for path, numbers in _named(model, wanted).items():
            weight = _weight(path, model.get_submodule(path), numbers)
            uses = {p: m for p, m in model.named_modules() if m._parameters.get("weight") is weight}
            other = next((known for known, own in self.modules.items() if path in own), None)
            if other is not None:
                if sorted(self.tokens[other]) != sorted(numbers):
                    raise ValueError(
                        f"{FIELD}: want the same tokens of {other!r} and {path!r}, which share "
                        f"their weight, got {self.tokens[other]} and {numbers}"
                    )
                continue
            for use, module in uses.items():
                _check_use(use, module, taken)
            self.tokens[path], self.modules[path] = numbers, uses

    def build(self, dtype: torch.dtype) -> dict[str, TokenRows]:
        """The trained rows by the path of their embedding."""
        found = {}
        for path, uses in self.modules.items():
            weight = uses[path]._parameters["weight"]
            assert weight is not None
            table = found[path] = TokenRows(weight, self.tokens[path], dtype)
            table.to(device_of(uses[path]))
        return found

    def install(self, method: Method, tables: dict[str, TokenRows], hand: Hand) -> None:
        """Lets every module that shares a weight take part."""
        for path, table in tables.items():
            for module in self.modules[path].values():
                kind = EmbeddingRows if isinstance(module, nn.Embedding) else HeadRows
                hand.take(module, kind(method, table))

    def fold(self, tables: dict[str, TokenRows], merged: Merged) -> dict[str, str]:
        """Writes the rows into copies of the weights; beside modules that stay they stay too, as a
        checkpoint of such a model holds the weights without them."""
        if not merged.is_whole:
            return dict.fromkeys(tables, "rows of tokens, beside others that stay")
        for path, table in tables.items():
            uses = list(self.modules[path].values())
            weight = uses[0]._parameters["weight"]
            assert weight is not None
            rows = table.rows.detach().to(weight)
            exact = weight.detach().index_copy(0, table.tokens, rows)
            merged.put(path, table, uses, exact)
            merged.report.rounding[path] = _lost(rows, table.rows.detach(), weight[table.tokens])
            merged.freeze(table.parameters())
        return {}


def _lost(stored: Tensor, exact: Tensor, before: Tensor) -> float:
    """What rounding took of the rows' change, as `MergeReport` says it."""
    moved = float(torch.linalg.vector_norm(exact - before))
    if not moved > 0:
        return 0.0
    return float(torch.linalg.vector_norm(stored.to(exact) - exact)) / moved


def _named(model: nn.Module, wanted: Any) -> dict[str, list[int]]:
    """The tokens by the paths of the modules that are meant."""
    if not isinstance(wanted, dict):
        find = getattr(model, "get_input_embeddings", None)
        try:
            embeddings = None if find is None else find()
        except (AttributeError, NotImplementedError):
            embeddings = None
        own = [p for p, m in model.named_modules() if m is embeddings]
        wanted = {own[0] if own else "embed_tokens": wanted}
    found: dict[str, list[int]] = {}
    for name, numbers in wanted.items():
        paths = [p for p, _ in model.named_modules() if p == name or p.endswith(f".{name}")]
        if not paths:
            raise ValueError(f"{FIELD}: want names of embeddings of the model, got {name!r}")
        found.update({path: list(numbers) for path in paths})
    return found


def _weight(path: str, module: nn.Module, numbers: list[int]) -> nn.Parameter:
    """The weight whose rows are trained; ValueError where that cannot be."""
    weight = module._parameters.get("weight")
    if not isinstance(module, (nn.Embedding, nn.Linear)) or weight is None:
        raise ValueError(f"{FIELD}: want embeddings, got {path!r}, a {type(module).__name__}")
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        kind = f"{type(weight).__name__} of {weight.dtype}"
        raise ValueError(f"{FIELD}: want an embedding with a plain weight, got a {kind} in {path}")
    if weight.is_meta:
        raise ValueError(f"{FIELD}: want an embedding with values, got {path} on device meta")
    if max(numbers) >= weight.shape[0]:
        raise ValueError(
            f"{FIELD}: want tokens below {weight.shape[0]}, the rows of {path}, got {max(numbers)}"
        )
    return weight


def _check_use(path: str, module: nn.Module, taken: dict[int, str]) -> None:
    """ValueError unless a module that shares the weight can follow it."""
    if id(module) in taken:
        raise ValueError(
            f"{FIELD}: want modules that nothing else adapts, got {path!r}, which "
            f"{taken[id(module)]}"
        )
    if isinstance(module, nn.Embedding):
        for name, least in (("max_norm", None), ("scale_grad_by_freq", False)):
            if getattr(module, name) is not least:
                value = getattr(module, name)
                raise ValueError(f"{FIELD}: want {name}={least} of {path}, got {value!r}")
        known = type(module) is nn.Embedding or hasattr(module, "embed_scale")
    else:
        known = type(module) is nn.Linear
    if not known:
        raise ValueError(
            f"{FIELD}: want embeddings and heads of torch, got {path!r}, a "
            f"{type(module).__name__}, whose forward is its own"
        )
