"""The authors' checkpoints: what each tensor becomes, by the authors' formulas; what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import petal_kernels as pk
from petal_kernels.hf.released.modes import _modes
from tests.hf.released import CASES, R
from tests.hf.test_files_fuzz import values_of

ALL = pytest.mark.parametrize("name", list(CASES))
Tensors = dict[str, Tensor]


def loaded(name: str, folder: Path) -> tuple[pk.Attachment, Tensors]:
    case = CASES[name]
    tensors = case.tensors()
    torch.save({"model": tensors, "epoch": 3, "config": {"run": {"lr": 1e-5}}}, folder / "c.pth")
    return pk.attach(case.model(), case.config(), checkpoint=folder / "c.pth"), tensors


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@ALL
@pytest.mark.filterwarnings("ignore:attach. 2 tensors of .*visual_embedding")
def test_every_tensor_of_the_adapter_is_the_checkpoint_s(name: str, tmp_path: Path) -> None:
    """No value is left as it was drawn, and none of theirs lies unused."""
    made, tensors = loaded(name, tmp_path)
    theirs = {float(x) for t in tensors.values() for x in t.flatten()}
    ours = {float(x) for t in made.state_dict().values() for x in t.flatten()}
    assert ours <= theirs
    left = theirs - ours
    beside = ("_m.", "queue", "temp", "Wrapper", "position_ids", "qkv", "visual_embedding")
    unused = {n for n, t in tensors.items() if {float(x) for x in t.flatten()} & left}
    assert all(any(word in name for word in beside) for name in unused), unused


def delta(made: pk.Attachment, path: str) -> Tensor:
    """What a linear's weight gains."""
    wrapper: Any = dict(made.wrappers())[path]
    found: Tensor = wrapper.delta(torch.float32)
    return found


def test_petal_s_modes_are_those_of_their_projections(tmp_path: Path) -> None:
    made, t = loaded("petal", tmp_path)
    assert len(made.wrappers()) == 4 * 3 + 2 * 3
    for path, _ in made.wrappers():
        number = path.split(".")[3]
        block = "crossattention" if "cross" in path else "attention"
        vector = t[f"Qformer.bert.encoder.layer.{number}.{block}.self.{path.split('.')[-1][0]}_CP"]
        image = "_Image" if "cross" in path and "query" not in path else ""
        core = t[f"CP_C{image}"] @ vector  # its first index is the input's
        x = torch.eye(t[f"CP_U{image}.weight"].shape[1])
        update = F.linear(
            F.linear(x, t[f"CP_U{image}.weight"]) @ core[:, :, 0], t[f"CP_V{image}.weight"]
        )
        same(delta(made, path), update.t())


def test_petal_s_experts_and_residuals(tmp_path: Path) -> None:
    made, t = loaded("petal", tmp_path)
    state = made.state_dict()
    for number in range(3):
        for ours, theirs in (("down", "ExpertA"), ("up", "ExpertB")):
            linear = f"Qformer.bert.{theirs}.{number}"
            assert torch.equal(state[f"experts.{ours}"][number], t[f"{linear}.weight"])
            assert torch.equal(state[f"experts.{ours}_bias"][number], t[f"{linear}.bias"])
    for number in range(4):
        for block in ("self", "cross"):
            for name in ("scale", "shift"):
                theirs = f"Qformer.bert.encoder.layer.{number}.CP_{name}{block}"
                assert torch.equal(state[f"layers.{number}.{block}.{name}"], t[theirs])


def test_rows_go_by_their_numbers_in_whatever_order_projections_come() -> None:
    late, early = torch.randn(R, 2), torch.randn(R, 1)
    source = _modes(
        {"late": range(1, 3), "early": range(1)},
        lambda path, count: [(path, column) for column in range(count)],
    )
    got = source.make(*({"late": late, "early": early}[name] for name in source.names))
    assert torch.equal(got, torch.cat([early, late], 1).t())


@pytest.mark.parametrize("name", ["aurora-retrieval", "aurora-vqa"])
def test_aurora_s_modes_are_those_of_their_projections(name: str, tmp_path: Path) -> None:
    """Whatever rows they have here; and a feed-forward's mix the entries of their modes."""
    made, t = loaded(name, tmp_path)
    u, v, c = t["CP_U.weight"], t["CP_V.weight"], t["CP_C"]
    eye = torch.eye(16)

    def through(x: Tensor, middle: Tensor) -> Tensor:
        return F.linear(F.linear(x, u) @ middle, v)

    for path, _ in made.wrappers():
        words = path.split(".")
        if words[0] != "vision_model":
            vector = t[f"{path.rpartition('.')[0]}.{words[-1][0]}_CP"]
            same(delta(made, path), through(eye, (c @ vector)[:, :, 0]).t())
            continue
        block = f"visual_encoder.blocks.{words[3]}"
        attention, ffn = c @ t[f"{block}.attn.CP_attention"], c @ t[f"{block}.mlp.mlp_CP"]
        if words[-1] == "qkv":
            parts = [through(eye, attention[:, :, k]) for k in range(3)]
            same(delta(made, path), torch.cat(parts, 1).t())
        elif words[-1] == "projection":
            same(delta(made, path), through(eye, attention[:, :, 3]).t())
        elif words[-1] == "fc1":
            mixed = ffn[:, :, :4].reshape(R, R * 4)
            four = (F.linear(eye, u) @ mixed).reshape(16, 4, R)
            same(delta(made, path), F.linear(four, v).reshape(16, 64).t())
        else:
            mixed = ffn[:, :, 4:].reshape(R, R * 4)
            blocks = F.linear(torch.eye(64).reshape(64, 4, 16), u).reshape(64, R * 4)
            same(delta(made, path), F.linear(blocks @ mixed.t(), v).t())


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("vlpet")])
@pytest.mark.filterwarnings("ignore:attach. 2 tensors of .*visual_embedding")
def test_vl_pet_s_gated_adapters_compute_what_the_authors_do(name: str, tmp_path: Path) -> None:
    made, t = loaded(name, tmp_path)
    gate, family = name.split("-")[1:]
    generator = torch.Generator().manual_seed(2)
    h, x = (torch.randn(2, 5, 32, generator=generator) for _ in range(2))
    checked = 0
    for place in made.found.places:
        module: Any = made.method.trains(place)
        if module is None:
            continue
        front = place.path.rpartition(".")[0]
        kind = "attn" if place.role.endswith("attention") else "ff"

        def linear(end: str, value: Tensor, front: str = front) -> Tensor:
            return F.linear(value, t[f"{front}.{end}.weight"], t[f"{front}.{end}.bias"])

        heads = [linear(f"{kind}_adapter_multihead_down.{k}", h) for k in range(4)]
        middle = F.gelu(torch.cat(heads, -1), approximate="tanh")
        y = h + linear(f"{kind}_adapter_multihead_up", middle)
        theirs = f"encoder_{kind}_adapter_gating"
        if gate == "large":
            lower = F.gelu(linear(f"{theirs}_large_x_down", x), approximate="tanh")
            g = linear(f"{theirs}_large_x_up", lower).sigmoid()
        elif gate == "middleX":
            g = linear(f"{theirs}_middle_xy_add", x + y).sigmoid()
        elif gate == "middleY":
            g = 1 + t[f"{front}.{theirs}_middle_ia3_add"]
        else:
            g = linear(f"{theirs}_small_xy_cat", torch.cat([x, y], -1)).sigmoid().mean(1, True)
        same(module(h, None if gate == "middleY" else x), y * g)
        checked += 1
    assert checked == 4
    value: Any = made.adapter.value
    for number in range(2):
        where = f"model.decoder.layers.{number}.encoder_attn"
        if family == "t5":
            where = f"decoder.block.{number}.layer.1.EncDecAttention"
        own = f"{where}.attn_value_parallel_adapter.adapters.gqa"
        z = F.linear(x, t[f"{own}.down_sampler.weight"], t[f"{own}.down_sampler.bias"])
        z = F.gelu(z, approximate="tanh")
        want = h + F.linear(z, t[f"{own}.up_sampler.weight"], t[f"{own}.up_sampler.bias"])
        same(value(h, value.project(x, number)[0], number), want)


@pytest.mark.parametrize("name", [n for n in CASES if "adapter" in n])
def test_an_adapter_is_that_of_its_block(name: str, tmp_path: Path) -> None:
    made, t = loaded(name, tmp_path)
    for place in made.found.places:
        module: Any = made.method.trains(place)
        number = re.findall(r"\d+", place.path)[0]
        stack, block = place.role.split(".")
        if name == "adapters-gpt2":
            theirs = f"transformer.h.{number}.adapter"
        elif name == "adapters-roberta":
            inner = "attention.output" if block == "attention" else "output"
            theirs = f"roberta.encoder.layer.{number}.{inner}.adapter"
        else:
            own = {"attention": "attn_adapter", "cross": "enc_attn_adapter", "ffn": "ff_adapter"}
            layer = f"model.{stack}.layers.{number}"
            if name.endswith("t5"):
                order = (
                    ["attention", "cross", "ffn"] if stack == "decoder" else ["attention", "ffn"]
                )
                layer = f"{stack}.block.{number}.layer.{order.index(block)}"
            elif stack == "decoder":
                own["attention"] = "self_attn_adapter"
            theirs = f"{layer}.{own[block]}.adapters.vqa"
        for ours, sampler in (("down", "down_sampler"), ("up", "up_sampler")):
            assert torch.equal(getattr(module, ours), t[f"{theirs}.{sampler}.weight"])
            assert torch.equal(getattr(module, f"{ours}_bias"), t[f"{theirs}.{sampler}.bias"])


def test_routed_lora_of_gpt2_has_query_then_value(tmp_path: Path) -> None:
    made, t = loaded("routing-gpt2", tmp_path)
    for number in range(2):
        theirs = f"gpt.transformer.h.{number}.attn.c_attn"
        module: Any = made.method.trains(made.found.places[number])
        assert torch.equal(module.down, t[f"{theirs}.lora_A"])
        assert torch.equal(module.up[0], t[f"{theirs}.lora_B"][:32])
        assert torch.equal(module.up[1], t[f"{theirs}.lora_B"][32:])


@pytest.mark.parametrize("front", ["", "module."])
@pytest.mark.parametrize("under", [True, False], ids=["under model", "bare"])
def test_how_scripts_wrap_a_state_dict_is_no_matter(
    front: str, under: bool, tmp_path: Path
) -> None:
    case = CASES["vladapter-t5"]
    tensors = {front + name: value for name, value in case.tensors().items()}
    torch.save({"model": tensors} if under else tensors, tmp_path / "c.pth")
    made = pk.attach(case.model(), case.config())
    before = values_of(made)
    made.load_checkpoint(tmp_path / "c.pth")
    assert all(value != before[name] for name, value in values_of(made).items())


def test_heads_may_be_one(tmp_path: Path) -> None:
    """As `single` configurations of VL-PET's code have it."""
    case = CASES["vlpet-middleX-t5"]
    tensors = {}
    for name, value in case.tensors().items():
        if "multihead_down" in name:
            front, _, rest = name.partition("_multihead_down.")
            head, _, kind = rest.partition(".")
            if head == "0":
                heads = [case.tensors()[f"{front}_multihead_down.{k}.{kind}"] for k in range(4)]
                tensors[f"{front}.adapters.vqa.down_sampler.{kind}"] = torch.cat(heads)
        else:
            tensors[name.replace("_multihead_up.", ".adapters.vqa.up_sampler.")] = value
    torch.save(tensors, tmp_path / "one.pth")
    with pytest.warns(UserWarning, match=r"2 tensors of .* belong to a module that this model has"):
        one = pk.attach(case.model(), case.config(), checkpoint=tmp_path / "one.pth")
    torch.save(case.tensors(), tmp_path / "several.pth")
    with pytest.warns(UserWarning, match="visual_embedding"):
        several = pk.attach(case.model(), case.config(), checkpoint=tmp_path / "several.pth")
    assert values_of(one) == values_of(several)
