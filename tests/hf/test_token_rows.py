"""Rows of embeddings that are trained, of tokens that a config names, and the heads that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

import petal_kernels as pk
from tests.hf import tiny_text

TOKENS = [7, 3, 21]
WORDS, WIDTH = 12, 6


class Scaled(nn.Embedding):
    """As several models write it; a head reads the weight without the scale."""

    def __init__(self, words: int, width: int, scale: float | Tensor, **more: Any) -> None:
        super().__init__(words, width, **more)
        self.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Model(nn.Module):
    """An embedding, a linear and a head, tied or not."""

    def __init__(self, words: nn.Module, tied: bool, bias: bool = False) -> None:
        super().__init__()
        self.words, self.inner = words, nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = words.weight  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.words(ids))))


def build(tied: bool = True, scale: Any = None, bias: bool = False, **more: Any) -> Model:
    torch.manual_seed(0)
    words = nn.Embedding(WORDS, WIDTH, **more)
    if scale is not None:
        words = Scaled(WORDS, WIDTH, scale, **more)
    return Model(words, tied, bias).double()


def attach(model: nn.Module, tokens: Any, **more: Any) -> Any:
    settings = {"r": 2, "target_modules": ["inner"], "trainable_token_indices": tokens} | more
    return pk.attach(model, pk.LoraConfig(**settings))


@torch.no_grad()
def moved(attachment: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    attachment.model.double()
    for parameter in attachment.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))
    return attachment


def whole(model: Any, rows: Tensor, tokens: list[int], ids: Tensor, head: bool) -> Tensor:
    """In plain torch over a copy of the whole weight; `head`: it is tied."""
    words = model.words
    weight = words.weight.detach().index_copy(0, torch.tensor(tokens), rows)
    x = F.embedding(ids, weight, words.padding_idx) * getattr(words, "embed_scale", 1.0)
    x = torch.tanh(model.inner(x))
    own = weight if head else model.head.weight
    return F.linear(x, own, model.head.bias)


IDS = torch.tensor([[1, 3, 3, 0], [9, 7, 11, 5]])
LISTS = [[3, 7, 0], [5], list(range(WORDS))[::-1], [11, 1, 2]]


@pytest.mark.parametrize("tokens", LISTS, ids=str)
@pytest.mark.parametrize("scale", [None, 2.5, torch.tensor(0.5)], ids=["plain", "number", "tensor"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
def test_values_and_gradients_are_those_of_a_whole_copy(
    padding: int | None, tied: bool, scale: Any, tokens: list[int]
) -> None:
    model = build(tied, scale, bias=tied, padding_idx=padding)
    attachment = moved(attach(model, tokens))
    rows = attachment.adapter.words.rows
    got = model(IDS)
    want = whole(model, rows, tokens, IDS, tied)
    torch.testing.assert_close(got, want)
    loss = torch.randn_like(got)
    leaves = [rows, *(p for n, p in attachment.named_parameters() if "rows" not in n)]
    grads = [torch.autograd.grad((y * loss).sum(), leaves) for y in (got, want)]
    torch.testing.assert_close(grads[0], grads[1])
    if padding in tokens and not tied:
        assert not grads[0][0][tokens.index(padding)].any()
    assert not torch.allclose(got, moved_back(attachment, model))


@pytest.mark.parametrize("implementation", ["fused", "published"])
def test_a_head_s_bias_is_trained_beside_its_rows(implementation: str) -> None:
    model = build(bias=True)
    config = pk.LoraConfig(
        r=2, target_modules=["inner"], trainable_token_indices=[3, 5], bias="all"
    )
    attachment = moved(pk.attach(model, config, implementation=implementation))
    assert sum("bias" in name for name, _ in attachment.named_parameters()) == 2
    rows = attachment.adapter.words.rows
    want = whole(model, rows, [3, 5], IDS, True)
    torch.testing.assert_close(model(IDS), want)
    plain = build(bias=True)
    with attachment.disabled():
        assert torch.equal(model(IDS), plain(IDS))
    attachment.model.eval()
    attachment.merge()
    with attachment.disabled():
        assert torch.equal(model(IDS), plain(IDS))


def moved_back(attachment: Any, model: nn.Module) -> Tensor:
    with attachment.disabled():
        return model(IDS)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_no_copy_of_the_embedding_is_made(kind: torch.dtype) -> None:
    from tests.nn.test_dora import Watch

    torch.manual_seed(0)
    words = nn.Embedding(5000, WIDTH)
    model = Model(words, False).requires_grad_(False)
    model.head = nn.Linear(WIDTH, 5000, bias=False)
    model.head.weight = words.weight
    attach(model, [17, 4])
    with Watch() as watch:
        y = model.words(torch.tensor([[1, 17, 4]], dtype=kind))
        logits = model.head(y)
    largest, name = max(watch.sizes)
    assert largest == 3 * 5000 * 4, name  # the logits
    made = [size for size, _ in watch.sizes if size >= 3 * 5000 * 4]
    assert len(made) == 1
    assert logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_a_16_bit_model_are_wide(dtype: torch.dtype) -> None:
    model: Any = tiny_text.build("gpt2", dtype)
    attachment = pk.attach(model, pk.LoraConfig(r=2, trainable_token_indices=TOKENS))
    rows: Any = attachment.adapter.get_parameter("transformer.wte.rows")
    assert rows.dtype == torch.float32
    ids = torch.tensor([[7, 3, 5]])
    with torch.no_grad():
        rows.add_(1.0)
    y = model.transformer.wte(ids)
    weight = model.transformer.wte.weight
    want = torch.stack([rows[0], rows[1], weight[5].float()]).to(dtype)[None]
    assert torch.equal(y, want)
    x = torch.randn(1, 3, tiny_text.WIDTH).to(dtype)
    exact = x.double() @ weight.double().index_copy(0, torch.tensor(TOKENS), rows.double()).T
    close = 0.05 if dtype == torch.bfloat16 else 0.01
    torch.testing.assert_close(model.lm_head(x).double(), exact, rtol=close, atol=close)
    model(input_ids=ids, labels=ids).loss.backward()
    assert rows.grad.dtype == torch.float32
    assert rows.grad.abs().sum(1).gt(0).all()


# -- names ----------------------------------------------------------------------------------------


def _names(model: nn.Module, wanted: Any) -> dict[str, int]:
    attachment = pk.attach(model, pk.LoraConfig(r=2, trainable_token_indices=wanted))
    rows = [row for row in attachment.report().rows if row.role == "rows of tokens"]
    attachment.detach()
    return {row.module: row.trainable for row in rows}


def test_a_list_means_the_input_embeddings_and_a_dict_its_names() -> None:
    size = 3 * tiny_text.WIDTH
    llama = tiny_text.build("llama")
    assert _names(llama, TOKENS) == {"model.embed_tokens": size}
    assert _names(llama, {"embed_tokens": TOKENS}) == {"model.embed_tokens": size}
    both = {"model.embed_tokens": size, "lm_head": tiny_text.WIDTH}
    assert _names(llama, {"embed_tokens": TOKENS, "lm_head": [4]}) == both
    gpt2 = tiny_text.build("gpt2")
    tied = {"transformer.wte": size, "lm_head": 0}
    assert _names(gpt2, TOKENS) == tied
    assert _names(gpt2, {"wte": TOKENS, "lm_head": TOKENS[::-1]}) == tied
    assert "decoder" in str(_names(tiny_text.build("bert"), TOKENS))
    positions = _names(gpt2, {"wpe": [0, 1]})
    assert positions == {"transformer.wpe": 2 * tiny_text.WIDTH}
    unnamed = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 4), "q_proj": nn.Linear(4, 4)})
    config = pk.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1])
    assert "embed_tokens.rows" in dict(pk.attach(unnamed, config).named_parameters())


class Own(nn.Embedding):
    """Whose forward is its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1


def _own() -> Model:
    return Model(Own(WORDS, WIDTH), False)


def _own_head() -> Model:
    class Head(nn.Linear):
        pass

    model = build()
    head = Head(WIDTH, WORDS, bias=False).double()
    head.weight = model.words.weight  # type: ignore[assignment]
    model.head = head
    return model


def _integers() -> Model:
    model = build(False)
    weight = torch.ones(WORDS, WIDTH, dtype=torch.int8)
    model.words.weight = nn.Parameter(weight, requires_grad=False)
    return model


_FIELD = "trainable_token_indices: want"


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (build, {"tokens": [WORDS]}, f"{_FIELD} tokens below {WORDS}, the rows of words, got 12"),
        (build, {"tokens": {"nowhere": [1]}}, f"{_FIELD} names of embeddings .* got 'nowhere'"),
        (build, {"tokens": {"": [1]}}, f"{_FIELD} embeddings, got '', a Model"),
        (
            build,
            {"tokens": {"words": [1], "head": [2]}},
            f"{_FIELD} the same tokens of 'words' and 'head', .* got \\[1\\] and \\[2\\]",
        ),
        (
            build,
            {"tokens": [1], "modules_to_save": ["words"]},
            f"{_FIELD} modules that nothing else adapts, got 'words', which modules_to_save",
        ),
        (
            build,
            {"tokens": [1], "target_modules": ["head"]},
            f"{_FIELD} modules that nothing else adapts, got 'head', which LoRA adapts",
        ),
        (lambda: build(max_norm=1.0), {"tokens": [1]}, f"{_FIELD} max_norm=None of words, got 1.0"),
        (
            lambda: build(scale_grad_by_freq=True),
            {"tokens": [1]},
            f"{_FIELD} scale_grad_by_freq=False of words, got True",
        ),
        (_own, {"tokens": [1]}, f"{_FIELD} embeddings and heads of torch, got 'words', a Own"),
        (_own_head, {"tokens": [1]}, f"{_FIELD} embeddings and heads of torch, got 'head', a Head"),
        (_integers, {"tokens": [1]}, f"{_FIELD} an embedding with a plain weight, got a Parameter"),
        (
            lambda: build().to("meta"),
            {"tokens": [1]},
            f"{_FIELD} an embedding with values, got words on device meta",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:attach. head has the weight of words")
def test_refusals_name_the_field(model: Any, values: Any, message: str) -> None:
    made = model()
    before = [type(m) for m in made.modules()]
    with pytest.raises(ValueError, match=f"^{message}"):
        attach(made, values.pop("tokens"), **values)
    assert [type(m) for m in made.modules()] == before


# -- merging, files -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_merging_writes_the_rows_into_a_copy(tied: bool) -> None:
    model = build(tied, 2.0, bias=True)
    weight = model.words.weight
    attachment = moved(attach(model.eval(), [3, 5]))
    want, base = model(IDS), moved_back(attachment, model)
    report = attachment.merge()
    assert report.folded == ["inner", "words"]
    assert model.words.weight is not weight
    assert (model.head.weight is model.words.weight) is tied
    torch.testing.assert_close(model(IDS), want)
    assert torch.equal(moved_back(attachment, model), base)
    assert not any(p.requires_grad for p in attachment.adapter.parameters())
    assert not any(name.startswith("petal") for name in model.state_dict())
    model.train()
    parts: list[Any] = [model, model.words, *([model.head] if tied else [])]
    for part in parts:
        with pytest.raises(RuntimeError, match="merged into the base weights"):
            part(IDS if part is not model.head else torch.ones(2, WIDTH, dtype=torch.float64))
    model.eval()
    attachment.unmerge()
    assert model.words.weight is weight
    assert (model.head.weight is weight) is tied
    torch.testing.assert_close(model(IDS), want)
    plain = attachment.merge_and_unload()
    assert type(plain.words) is Scaled
    torch.testing.assert_close(plain(IDS), want)


def test_rounding_is_of_the_rows_change() -> None:
    model = build().to(torch.bfloat16)
    attachment = attach(model, [3, 5])
    assert attachment.merge().rounding["words"] == 0.0
    attachment.unmerge()
    with torch.no_grad():
        attachment.adapter.words.rows.add_(0.3)
    lost = attachment.merge().rounding["words"]
    rows = attachment.adapter.words.rows
    off = (rows.bfloat16().float() - rows).norm() / (0.3 * rows.numel() ** 0.5)
    assert lost == pytest.approx(float(off), rel=1e-3)


def test_a_weight_that_was_written_since_is_not_lost() -> None:
    model = build()
    attachment = moved(attach(model.eval(), [3]))
    attachment.merge()
    with torch.no_grad():
        model.words.weight.add_(1.0)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="unmerge: the merged weight of words was written"):
        attachment.unmerge()


def test_rows_stay_beside_what_stays() -> None:
    """A checkpoint then holds the weights without them."""
    model = build(False)
    attachment = moved(attach(model.eval(), [3], modules_to_save=["head"]))
    want = model(IDS)
    before = model.words.weight
    report = attachment.merge()
    assert report.kept == {
        "head": "trained whole",
        "words": "rows of tokens, beside others that stay",
    }
    assert model.words.weight is before
    torch.testing.assert_close(model(IDS), want)


def test_a_file_brings_the_rows_to_an_embedding_that_was_drawn_anew(tmp_path: Path) -> None:
    """They are values: differences would be added to other values."""
    model = build()
    attachment = moved(attach(model, [3, 5]))
    attachment.adapter.float()
    attachment.save(tmp_path / "a")
    rows = attachment.adapter.words.rows.detach()
    assert set(attachment.state_dict()) == {"inner.down", "inner.up", "words.rows"}
    other: Any = build()
    with torch.no_grad():
        other.words.weight[[3, 5]] = 0.0
    pk.attach(other, tmp_path / "a")
    torch.testing.assert_close(other(IDS), model(IDS))
    torch.testing.assert_close(other.words(torch.tensor([3, 5])), rows.double())


def test_resized_embeddings_are_said() -> None:
    model: Any = tiny_text.build("gpt2")
    attachment = pk.attach(model, pk.LoraConfig(r=2, trainable_token_indices=TOKENS))
    model.set_input_embeddings(nn.Embedding(80, tiny_text.WIDTH))
    with pytest.raises(RuntimeError, match="save: 1 adapted modules were replaced since attach"):
        attachment.save("nowhere")
