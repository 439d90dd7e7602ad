"""Which linears LoRA adapts in which models, what is an error or a note, and the updates."""

from __future__ import annotations

import re
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import petal_kernels as pk
from petal_kernels.hf.report import joined_rows
from tests.hf import tiny, tiny_text
from tests.hf.lora_places import ALL, LLAMA, ends, places

# -- all-linear, parts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "want"),
    [
        ("llama", LLAMA),
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ("bert", ["query", "key", "value", "dense"]),
        ("t5", ["q", "k", "v", "o", "wi", "wo"]),
        ("bart", ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"]),
    ],
)
def test_all_linear_leaves_out_the_head(family: str, want: list[str]) -> None:
    assert ends(places(tiny_text.build(family), target_modules="all-linear")) == want


@pytest.mark.filterwarnings("ignore:attach. left as they are")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma", "idefics3", "smolvlm"])
def test_parts_of_a_model_that_sees(family: str) -> None:
    model = tiny_text.build(family)
    tower = {
        "qwen2_5_vl": "model.visual.",
        "idefics3": "model.vision_model.",
        "smolvlm": "model.vision_model.",
    }.get(family, "model.vision_tower.")
    decoder = "model.text_model." if family in ("idefics3", "smolvlm") else "model.language_model."
    found = {p: places(model, target_modules="all-linear", parts=[p]) for p in ALL[::2]}
    assert ends(found["language"]) == LLAMA
    assert all(path.startswith(decoder) for path in found["language"])
    assert all(path.startswith(tower) for path in found["vision"])
    assert places(model, target_modules="all-linear") == found["language"]
    every = places(model, target_modules="all-linear", parts=ALL)
    rest = [path for path in every if path not in found["language"] + found["vision"]]
    left = ("lm_head", "model.vision_tower.head.attention.out_proj")  # a head, what torch reads
    linears = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p not in left]
    assert sorted(every) == sorted(linears)
    if rest:
        assert places(model, target_modules="all-linear", parts=["projector"]) == rest
        assert all(re.search("project|connector", path) for path in rest)
    assert any(isinstance(m, (nn.Conv2d, nn.Conv3d)) for m in model.modules())


def test_a_q_former_is_a_projector_and_what_none_means() -> None:
    model = tiny.instructblip()
    roles = pk.plan(model, pk.LoraConfig(target_modules="all-linear", parts=ALL)).rows
    for row in roles:
        first = row.module.partition(".")[0]
        part = {"vision_model": "vision", "language_model": "language"}.get(first, "projector")
        assert row.role.partition(".")[0] == part
    assert {path.split(".")[0] for path in places(model)} == {"qformer"}
    routed = pk.attach(model, pk.RoutingConfig(r=2))
    want = [place.path for place in routed.found.places]
    routed.detach()
    assert sorted(places(model)) == sorted(want)
    assert ends(places(tiny_text.build("llava"))) == ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match=r"^target_modules: want names of linears or 'all-linear'"):
        places(nn.Sequential(nn.Linear(3, 3)))


def test_a_head_is_the_decoders_and_a_config_is_known_by_itself() -> None:
    model = tiny_text.build("llava", torch.float32)
    assert places(model, target_modules=["lm_head"]) == ["lm_head"]
    text, vision = (types.SimpleNamespace(model_type="both", n=n) for n in (1, 2))
    toy = nn.ModuleDict({name: nn.Sequential(nn.Linear(2, 2)) for name in ("see", "say", "join")})
    toy.config = types.SimpleNamespace(text_config=text, vision_config=vision)  # type: ignore[assignment]
    toy["see"].config, toy["say"].config = vision, text  # type: ignore[assignment]
    for part, name in zip(ALL, ("say", "join", "see"), strict=True):
        assert places(toy, target_modules="all-linear", parts=[part]) == [f"{name}.0"]
    toy["see"].config = types.SimpleNamespace(model_type="another")  # type: ignore[assignment]
    assert places(toy, target_modules="all-linear", parts=ALL[1:2]) == ["see.0", "join.0"]


def test_a_tower_alone_is_all_language() -> None:
    vision = tiny_text.build("llava").model.vision_tower  # type: ignore[union-attr]
    assert len(places(vision, target_modules="all-linear")) == 6  # type: ignore[arg-type]


def test_a_tied_head_is_left_out_or_said() -> None:
    model: Any = tiny_text.build("llama", torch.float32)
    model.get_output_embeddings = lambda: None
    assert "lm_head" in ends(places(model, target_modules="all-linear"))
    model.lm_head.weight = model.model.embed_tokens.weight
    assert "lm_head" not in ends(places(model, target_modules="all-linear"))
    with pytest.warns(UserWarning, match=r"lm_head has the weight of model.embed_tokens"):
        assert places(model, target_modules=["lm_head"]) == ["lm_head"]
    assert pk.plan(model, pk.LoraConfig(target_modules=["lm_head"])).rows[0].role.startswith("lang")


class Routed(nn.Module):
    """A mixture of experts as some models build it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(6, 4, bias=False))
        self.experts = nn.ModuleList(Gated() for _ in range(4))


class Gated(nn.Module):
    """An MLP whose gate is none of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)


@pytest.mark.parametrize("name", ["gate", "router"])
def test_routers_of_experts_are_left_out(name: str) -> None:
    model = nn.Sequential(Routed(name), Gated())
    found = places(model, target_modules="all-linear")
    assert f"0.{name}" not in found
    assert {"0.experts.3.gate", "0.experts.3.down", "1.gate", "1.down"} <= set(found)
    assert f"0.{name}" in places(model, target_modules=[name])


def test_a_mixtral_s_experts() -> None:
    import transformers

    sizes = {**tiny_text._llama_like(), "num_local_experts": 4}
    sizes.pop("initializer_range")
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    assert ends(places(model, target_modules="all-linear")) == LLAMA[:4]


def test_what_torch_reads_without_a_call_is_not_adapted() -> None:
    """The kind: an update that nothing computes."""
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(layer, nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"left as they are: 3 linears, 0.self_attn.out_proj"):
        assert places(model, target_modules="all-linear") == ["1"]
    with pytest.raises(ValueError, match=r"0.linear1, a Linear, .*reads its weight and does not"):
        places(model, target_modules=["linear1"])


# -- names that match what is not adapted ---------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q"]}, "target_modules: ['q'] match nothing; want names of linears"),
        ({"target_modules": ".*nope"}, "target_modules: .*nope match nothing"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "target_modules: want linears, got model.language_model.embed_tokens, a Embedding",
        ),
        (
            {"target_modules": ["patch_embedding"], "parts": ALL},
            "target_modules: want linears, got model.vision_tower.embeddings.patch_embedding, a "
            "Conv2d",
        ),
        ({"target_modules": ["mlp"]}, "target_modules: want linears, got model."),
        (
            {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
            "target_modules: want linears, got lm_head, a Linear, which LoRA does not adapt "
            "(modules_to_save trains it whole)",
        ),
        (
            {"target_modules": ["linear_1"]},
            "target_modules: model.multi_modal_projector.linear_1, a Linear is in the part "
            "'projector': want it in parts, as in parts=('language', 'projector'), got ('langu",
        ),
    ],
    ids=str,
)
def test_a_name_that_matches_nothing_to_adapt_is_an_error(
    config: dict[str, Any], message: str
) -> None:
    model = tiny_text.build("llava", torch.float32)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pk.attach(model, pk.LoraConfig(**config))
    assert dict(model.named_modules()) == before


def test_what_a_name_matches_beside_linears_is_said() -> None:
    model = tiny_text.build("llava", torch.float32)
    attachment: Any
    with pytest.warns(
        UserWarning,
        match=r"not adapted \(parts=\('language',\)\): 1 modules, model"
        r"\.vision_tower.*q_proj",
    ):
        attachment = pk.attach(model, pk.LoraConfig(target_modules=["q_proj"]))
    assert len(attachment.report().rows) == 2
    assert "named by target_modules and not adapted" in str(attachment.report())
    attachment.detach()
    with pytest.warns(UserWarning, match=r"\(it is no linear\): \d+ modules, .*norm"):
        found = places(model, target_modules=r".*(q_proj|norm)")
    assert ends(found) == ["q_proj"]
    inside = places(model, target_modules="all-linear", modules_to_save=["lm_head", "mlp"])
    assert ends(inside) == LLAMA[:4]


# -- the update -----------------------------------------------------------------------------------


class Twice(nn.Module):
    """One linear that two parts use, and one part that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"again": self.first, "own": nn.Linear(6, 6)})
        self.same = self.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.first(x))
        return self.same["own"](torch.tanh(self.block["again"](y)))


def test_a_shared_linear_is_adapted_wherever_it_is_used_and_counted_once() -> None:
    torch.manual_seed(0)
    model = Twice().double()
    before = [(path, id(m)) for path, m in model.named_modules(remove_duplicate=False)]
    config = pk.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    attachment = pk.attach(model, config)
    model.double()
    report = attachment.report()
    assert [row.module for row in report.rows] == ["first", "block.own"]
    assert report.trainable == 2 * 2 * 12
    x = torch.randn(5, 6, dtype=torch.float64)
    weights: dict[str, Any] = {
        name: model.get_parameter(f"{name}.weight")
        + attachment.adapter.get_submodule(name).delta(torch.float64)  # type: ignore[operator]
        for name in ("first", "block.own")
    }
    first: Any = model.first
    own: Any = model.block["own"]
    y = F.linear(x, weights["first"], first.bias)
    y = F.linear(torch.tanh(y), weights["first"], first.bias)
    want = F.linear(torch.tanh(y), weights["block.own"], own.bias)
    torch.testing.assert_close(model(x), want)
    model.eval()
    attachment.merge()
    torch.testing.assert_close(model(x), want)
    attachment.detach()
    assert [(path, id(m)) for path, m in model.named_modules(remove_duplicate=False)] == before


class Quantised(nn.Module):
    """A linear of somebody else's, whose weight no one else can read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.packed.to(x.dtype) * self.scale)  # type: ignore[operator]


def test_quantised_linears_are_called_and_not_merged() -> None:
    model: Any = tiny_text.build("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp.up_proj = Quantised(layer.mlp.up_proj)
    batch = tiny_text.batch("llama")
    plain = model(**batch).logits
    config = pk.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    attachment = pk.attach(model, config)
    assert ends([place.path for place in attachment.found.places]) == [*LLAMA[:5], *LLAMA[5:]]
    assert "base called, not read: model.layers.*.mlp.up_proj x 2 (base is a Quantised" in str(
        attachment.report()
    )
    want = model(**batch).logits
    want.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in attachment.parameters())
    model.eval()
    assert set(attachment.merge().kept) == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}
    torch.testing.assert_close(model(**batch).logits, want, rtol=1e-4, atol=1e-4)
    attachment.detach()
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_are_trained_as_in_peft(bias: str) -> None:
    import transformers

    config = transformers.LlamaConfig(**tiny_text._llama_like(), attention_bias=True)
    model = transformers.LlamaForCausalLM(config).double()
    trained = pk.LoraConfig(r=2, target_modules=["q_proj"], bias=bias)
    attachment = pk.attach(model, trained)
    model.double()
    names = [n.rpartition(".")[0] for n, _ in attachment.named_parameters() if "bias" in n]
    own = [n for n, _ in model.named_parameters() if n.endswith("bias") and "petal" not in n]
    wanted = {"none": [], "lora_only": [n for n in own if "q_proj" in n], "all": own}[bias]
    assert names == [f"modules_to_save.{n.rpartition('.')[0]}" for n in wanted]
    batch = tiny_text.batch("llama")
    base = {n: p for n, p in model.named_parameters() if "petal" not in n}
    with torch.no_grad():
        for name, parameter in attachment.named_parameters():
            if "bias" in name:
                parameter.add_(0.3)
    got = model(**batch).logits
    with torch.no_grad(), attachment.disabled():
        plain = model(**batch).logits
    attachment.detach()
    assert torch.equal(model(**batch).logits, plain)
    with torch.no_grad():
        for name in wanted:
            base[name].add_(0.3)
    torch.testing.assert_close(got, model(**batch).logits)


@pytest.mark.filterwarnings("ignore:attach. named")
def test_what_is_trained_whole_has_no_other_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Sequential(nn.Linear(3, 3)))
    config = pk.LoraConfig(r=2, target_modules=["0"], bias="all", modules_to_save=["2"])
    with pytest.raises(ValueError, match=r"target_modules: want linears, got 2, a Sequential"):
        pk.attach(model, pk.LoraConfig(target_modules=["2"]))
    attachment = pk.attach(model, config)
    names = [name for name, _ in attachment.named_parameters() if name.startswith("mod")]
    assert names == [f"modules_to_save.{n}" for n in ("2.0.weight", "2.0.bias", "0.bias", "1.bias")]
    assert [row.module for row in attachment.report().rows] == ["0", "0", "1", "2"]


def test_a_report_joins_the_rows_of_layers() -> None:
    model = tiny_text.build("llama", torch.float32)
    config = pk.LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 2})
    report = pk.plan(model, config)
    shapes = [(row.module, row.trainable) for row in joined_rows(report.rows)]
    assert shapes == [
        ("model.layers.0.self_attn.q_proj", 128),
        ("model.layers.1.self_attn.q_proj", 192),
    ]
    report = pk.plan(model, pk.LoraConfig(r=3, target_modules=["q_proj"]))
    (row,) = joined_rows(report.rows)
    assert (row.module, row.trainable) == ("model.layers.*.self_attn.q_proj x 2", 384)
    assert "model.layers.*.self_attn.q_proj x 2" in str(report)


def test_keys_are_pefts_by_a_rename() -> None:
    attachment = pk.attach(tiny_text.build("llama"), pk.LoraConfig(r=2, target_modules=["q_proj"]))
    assert list(attachment.state_dict()) == [
        f"model.layers.{i}.self_attn.q_proj.{name}" for i in (0, 1) for name in ("down", "up")
    ]
    assert "petal.model.layers.0.self_attn.q_proj.down" in attachment.model.state_dict()


def test_a_file_of_a_model_with_a_head_loads_into_one_without(tmp_path: Any) -> None:
    model: Any = tiny_text.build("llama", torch.float32)
    config = pk.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    pk.attach(model, config).save(tmp_path / "a")
    bare: Any = tiny_text.build("llama", torch.float32).model
    pk.attach(bare, tmp_path / "a")
    ids = tiny_text.batch("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_of_the_config_is_the_updates(training: bool) -> None:
    model = tiny_text.build("llama", torch.float32)
    config = pk.LoraConfig(
        r=2, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False
    )
    pk.attach(model.train(training), config)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model(**tiny_text.batch("llama")).logits)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2]) is not training
    lora: Any = model.model.layers[0].mlp.up_proj.used()  # type: ignore[union-attr, index]
    operands = lora.operands(torch.float32, torch.device("cpu"))
    assert operands.dropout == (0.5 if training else 0.0)
