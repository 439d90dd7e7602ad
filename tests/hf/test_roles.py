"""What a layer says of itself: roles by the flow through its code, names as a check, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from petal_kernels.hf.roles import Attention, attention_of, row_of

# -- an attention ---------------------------------------------------------------------------------


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    return F.scaled_dot_product_attention(query, key, value), None


class Three(nn.Module):
    """Three linears and one behind; subclasses say what is done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)


class Told(Three):
    """Neither in the order of the roles nor named after them."""

    def forward(self, x: Tensor) -> Tensor:
        value = self.a(x).view(2, -1, 8)
        key, query = self.b(x), self.norm(self.c(x))
        query, key = attend_less(query, key)
        query, key = query * 2.0, key.transpose(0, 1) + torch.zeros(query.shape)
        look_at(x, key, query, value)
        result, _ = attend(self, query, key, value)
        return self.out(result)


def attend_less(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return query, key


def look_at(*values: Tensor) -> None:
    """No attention, though it is given three."""


class Torchs(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.c(x), self.a(x), value=self.b(x)))


class Across(Three):
    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        key, value = self.b(features), self.c(features)
        return self.out(attend(self, self.a(x), key, value)[0])


class MayCross(Three):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        seen = x if other is None else other
        return self.out(attend(self, self.a(x), self.b(seen), self.c(seen))[0])


class Listed(Three):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each.view(2, -1, 8) for each in (self.c(x), self.a(x), self.b(x)))
        return self.out(attend(self, query, key, value)[0])


class Optional(Three):
    """As a model whose values may be its keys."""

    def forward(self, x: Tensor) -> Tensor:
        key = self.b(x)
        value = self.c(x) if self.c is not None else key
        return self.out(attend(self, self.a(x), key, value)[0])


class KeysAreValues(Three):
    def forward(self, x: Tensor) -> Tensor:
        key = self.b(x)
        return self.out(attend(self, self.a(x) + self.c(x), key, key)[0])


class Twice(Three):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            query, key = self.a(x), self.b(x)
        else:
            query, key = self.b(x), self.a(x)
        return self.out(attend(self, query, key, self.c(x))[0])


@pytest.mark.parametrize(
    ("cls", "want"),
    [
        (Told, Attention(("c", "b", "a"))),
        (Torchs, Attention(("c", "a", "b"))),
        (Across, Attention(("a", "b", "c"), crosses=True)),
        (MayCross, Attention(("a", "b", "c"), crosses_with=frozenset({"other"}))),
        (Listed, Attention(("c", "a", "b"))),
        (Optional, Attention(("a", "b", "c"))),
        (KeysAreValues, "its query, key and value are not each of one linear"),
        (Twice, "its query, key and value are not each of one linear"),
    ],
)
def test_roles_come_from_the_code(cls: type[nn.Module], want: Attention | str) -> None:
    assert attention_of(cls()) == want


class Fused(nn.Module):
    """One linear for all three, with a wide query where `grouped`."""

    def __init__(self, grouped: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 12 if grouped else 24), nn.Linear(8, 8)


class Chunked(Fused):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).to(x.dtype).chunk(3, dim=-1)
        return self.out(attend(self, query, key, value)[0])


class Split(Fused):
    def forward(self, x: Tensor) -> Tensor:
        both = torch.split(self.qkv(x), [8, 2, 2], -1)
        return self.out(attend(self, both[0], both[1], both[2])[0])


class Sliced(Fused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        query, key, value = y[..., :8], y[..., 8:10], y[..., 10:]
        return self.out(attend(self, query, key, value)[0])


class Stacked(Fused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.out(attend(self, y[0], y[1], y[2])[0])


class Unbound(Fused):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:-1], 3, 2, 4).unbind(-3)
        return self.out(attend(self, query, key, value)[0])


class Swapped(Fused):
    def forward(self, x: Tensor) -> Tensor:
        key, query, value = self.qkv(x).chunk(3, dim=-1)
        return self.out(attend(self, query, key, value)[0])


class ByHead(Fused):
    """Each head's query, key and value lie together."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(2, -1, 2, 12).chunk(3, dim=-1)
        return self.out(attend(self, query, key, value)[0])


class ByHeadStacked(Fused):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(2, 5, 2, 3, 4).unbind(3)
        return self.out(attend(self, query, key, value)[0])


class ByHeadSliced(Fused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x).view(2, -1, 2, 12)
        return self.out(attend(self, y[..., :4], y[..., 4:8], y[..., 8:])[0])


class OfTokens(Fused):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(2, 5, 3, 2, 4).unbind(1)
        return self.out(attend(self, query, key, value)[0])


class AnotherDim(Fused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x).reshape(2, 5, 3, 2, 4).permute(1, 0, 2, 3, 4)
        return self.out(attend(self, y[0], y[1], y[2])[0])


class AlongTokens(Fused):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=1)
        return self.out(attend(self, query, key, value)[0])


class Helped(Fused):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.cut(self.qkv(x))
        return self.out(attend(self, query, key, value)[0])

    def cut(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.chunk(3, dim=-1)


class TwoOfThree(Fused):
    def forward(self, x: Tensor) -> Tensor:
        query, key, _ = self.qkv(x).chunk(3, dim=-1)
        return self.out(attend(self, query, key, key)[0])


class Turned(Fused):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).transpose(1, 2).chunk(3, dim=-1)
        return self.out(attend(self, query, key, value)[0])


@pytest.mark.parametrize("cls", [Chunked, Split, Sliced, Stacked, Unbound])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_fused_linear_is_in_three_parts_of_its_columns(cls: Any, grouped: bool) -> None:
    assert attention_of(cls(grouped)) == Attention(("qkv",), (8, 2, 2) if grouped else (8, 8, 8))


@pytest.mark.parametrize(
    "cls",
    [
        *(Swapped, ByHead, ByHeadStacked, ByHeadSliced, OfTokens),
        *(AnotherDim, AlongTokens, Helped, TwoOfThree, Turned),
    ],
)
def test_a_fused_linear_that_is_cut_otherwise_is_refused(cls: Any) -> None:
    """The kind: an update of a query that reaches keys of other heads."""
    assert attention_of(cls()) == "'qkv' does not give query, key and value one after the other"


def test_the_parts_of_a_fused_linear_have_known_widths() -> None:
    module = Chunked()
    module.out = nn.Linear(5, 8)
    assert attention_of(module) == "'qkv' does not give query, key and value of known widths"


class Misnamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return attend(self, self.k_proj(x), self.q_proj(x), self.v_proj(x))[0]


class Unknown(Misnamed):
    """Its attention is written out."""

    def forward(self, x: Tensor, features: Any = None) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(features).mT
        return scores.softmax(-1) @ self.v_proj(features)


def test_names_are_a_check_and_decide_where_the_code_says_nothing() -> None:
    assert attention_of(Misnamed()) == "'k_proj' is what it reads as its query"
    assert attention_of(Unknown()) == Attention(("q_proj", "k_proj", "v_proj"), crosses=True)
    made = type("Made", (Misnamed,), {"forward": eval("lambda self, x: self.q_proj(x)")})
    assert attention_of(made()) == Attention(("q_proj", "k_proj", "v_proj"))
    assert attention_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == ""
    module = Misnamed()
    del module.q_proj, module.k_proj
    assert attention_of(module) == ""


# -- a layer --------------------------------------------------------------------------------------


class Layer(nn.Module):
    """An attention and an MLP; subclasses have more."""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.attn = Told() if attention is None else attention
        self.mlp = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Decodes(Layer):
    def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
        return x + self.mlp(x + self.attn(x))


class Crossed(Layer):
    def forward(self, x: Tensor, features: Any = None) -> Tensor:
        return x + self.mlp(x + self.attn(x, other=features))


class CrossedByPosition(Layer):
    def forward(self, x: Tensor, features: Any = None) -> Tensor:
        return x + self.mlp(x + self.attn(x, features))


class WithMore(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Sequential(nn.Linear(8, 8))


class Chunks(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.run(each) for each in (x + self.attn(x)).split(2)])

    def run(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Helps(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)

    def both(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attn(x))


class Stacks(Layer):
    """An MLP of experts, whose weights are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ParameterList([torch.zeros(2, 8, 8)])  # type: ignore[assignment]


class TwoAttentions(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.cross = Across()


def test_a_layer_s_row() -> None:
    row: Any = row_of(Layer())
    assert (row.name, [(each.name, each.path) for each in row.linears]) == (
        "encoder",
        [("query", "attn.c"), ("key", "attn.b"), ("value", "attn.a")],
    )
    assert not any(each.encoded for each in row.linears)
    assert [(each.name, each.output, each.reads) for each in row.blocks] == [
        ("attention", "attn", "attn"),
        ("ffn", "mlp", "mlp"),
    ]
    assert row_of(Decodes()).name == "decoder"  # type: ignore[union-attr]
    crossed: Any = row_of(Layer(Across()))
    assert [each.encoded for each in crossed.linears] == [False, True, True]
    assert {each.attention for each in crossed.linears} == {"cross"}
    assert crossed.cross_block == "attn"
    assert crossed.blocks[0].name == "cross"
    fused: Any = row_of(Layer(Split(True)))
    assert [(each.name, each.parts, each.targets) for each in fused.linears] == [
        ("query_value", (8, 2, 2), (0, 2))
    ]
    assert row_of(Layer(Chunked())).linears[0].parts == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("layer", "blocks"),
    [(WithMore, ["attn", "mlp"]), (Chunks, ["attn"]), (Stacks, ["attn", "mlp"]), (Helps, [])],
)
def test_the_feed_forward_of_a_layer(layer: type[nn.Module], blocks: list[str]) -> None:
    row: Any = row_of(layer())
    assert [each.output for each in row.blocks] == blocks


def test_what_is_no_layer_or_is_not_told() -> None:
    assert row_of(nn.Sequential(nn.Linear(2, 2))) == ""
    assert row_of(TwoAttentions()) == "it has 2 attentions, attn, cross"
    want = "attn: its key and value may read another sequence than its query"
    assert row_of(Crossed(MayCross())) == row_of(CrossedByPosition(MayCross())) == want
    assert not isinstance(row_of(Layer(MayCross())), str)
    assert str(row_of(Layer(Swapped()))).startswith("attn: 'qkv' does not give")
