"""fuse() under what people train with: checkpointing, autocast, compile, processes, threads,
optimizers and Trainer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers

import petal_kernels as pk
from petal_kernels.hf.methods import lora_parts
from tests.hf import fused, fused_parallel, ranks

P = 0.25
CHECKPOINTED = [
    pytest.param(family, marks=[] if family == "llama" else [pytest.mark.slow])
    for family in ("llama", "gpt2", "t5", "llava")
]


# -- checkpointing --------------------------------------------------------------------------------


def _lead_in(given: dict[str, Any]) -> None:
    """The reentrant form differentiates nothing unless an input is to be."""
    given["inputs_embeds"].requires_grad_()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("p", [0.0, P], ids=["", "dropout"])
@pytest.mark.parametrize("family", CHECKPOINTED)
def test_checkpointing_changes_nothing(family: str, p: float, reentrant: bool) -> None:
    """A recompute draws the masks of its forward; without dropout it is PEFT's too."""
    model, given = fused.family(family, lora_dropout=p), fused.batch(family)
    _lead_in(given)
    plain = fused.step(model, given)
    pk.fuse(model)
    want = fused.step(model, given)
    if not p:
        fused.same(want, plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with fused.operators() as calls:
        fused.same(fused.step(model, given), want)
    assert fused.forwards(calls)["lowrank_linear"] > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_two_forwards_before_one_backward(reentrant: bool) -> None:
    model = fused.family("llama", lora_dropout=P)
    pk.fuse(model)
    batches = [fused.batch("llama"), fused.batch("llama")]
    batches[1]["inputs_embeds"] = batches[1]["inputs_embeds"].flip(0)
    for given in batches:
        _lead_in(given)

    def both(model: Any) -> fused.Values:
        model.zero_grad()
        torch.manual_seed(3)
        losses = [model(**given).loss for given in batches]
        sum(losses, torch.zeros(())).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = both(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    fused.same(both(model), want)


# -- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(base: torch.dtype) -> None:
    """As exact as PEFT's own run under it, against fp64."""
    given = fused.batch("llama", base)
    exact = fused.step(fused.family("llama", base).double(), fused.batch("llama"))
    model = fused.family("llama", base)
    with torch.autocast("cpu", torch.bfloat16):
        plain = fused.step(model, given)
        pk.fuse(model)
        got = fused.step(model, given)
    assert {n: v.dtype for n, v in got.items()} == {n: v.dtype for n, v in plain.items()}
    for name, value in exact.items():
        own = fused.relative(plain[name], value)
        assert fused.relative(got[name], value) <= 3 * own + 1e-5, name


# -- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def _dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("p", [0.0, P], ids=["", "dropout"])
def test_a_compiled_block_is_one_graph(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph runs the linears of one tensor one by one: other masks of the same seed."""
    monkeypatch.setattr(lora_parts, "lora_linears", lambda *_: "one by one")
    model, x = fused.block(torch.float32, lora_dropout=p), fused.rows(torch.float32)
    pk.fuse(model)
    want = fused.run(model, x)
    model.compile(fullgraph=True, backend="aot_eager")
    fused.same(fused.run(model, x), want, 1e-6)


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_compiled_model_is_one_graph(family: str) -> None:
    model = fused.family(family, torch.float32)
    given = {name: v for name, v in fused.batch(family, torch.float32).items() if name != "labels"}

    def logits(model: Any) -> fused.Values:
        model.zero_grad()
        out = model(**given).logits
        out.square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"out": out.detach(), **grads}

    want = logits(model)
    pk.fuse(model)
    model.compile(fullgraph=True, backend="aot_eager")
    fused.same(logits(model), want, 1e-5)


@pytest.mark.usefixtures("_dynamo")
def test_a_compiled_model_follows_pefts_state() -> None:
    plain, x = fused.block(torch.float32), fused.rows(torch.float32)
    model = copy.deepcopy(plain)
    pk.fuse(model)
    model.compile(fullgraph=True, backend="aot_eager")
    for each in (plain, model):
        each.add_adapter(
            "other", peft.LoraConfig(r=3, target_modules=["a"], init_lora_weights=False)
        )
        with torch.no_grad():
            for name, p in each.named_parameters():
                if "other" in name:
                    p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
    for adapter in ("default", "other", "default"):
        plain.set_adapter(adapter)
        model.set_adapter(adapter)
        fused.same(fused.run(model, x), fused.run(plain, x), 1e-5)
    with plain.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(model(x), plain(x))


# -- processes and threads ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parallel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """What went wrong in two processes, by kind; of the kinds that are asked for."""
    kinds = [
        item.callspec.params["kind"]  # type: ignore[attr-defined]
        for item in request.session.items
        if "parallel" in getattr(item, "fixturenames", ()) and item.fspath == request.node.fspath
    ]
    found = ranks.run("tests.hf.fused_parallel", tmp_path_factory.mktemp("parallel"), kinds)
    return {kind: [fault for each in found for fault in each[kind]] for kind in kinds}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind == "replicated" else [pytest.mark.slow])
        for kind in fused_parallel.KINDS
    ],
)
def test_two_processes(kind: str, parallel: dict[str, list[str]]) -> None:
    assert parallel[kind] == []


def test_threads_do_not_meet() -> None:
    """One model, an x for each thread, many calls at once."""
    model = fused.block().eval()
    pk.fuse(model)
    inputs = [fused.rows(torch.float64, 4, 3).detach() + i for i in range(4)]
    with torch.no_grad():
        want = [model(x) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(len(inputs))

    def work(number: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(model(inputs[number]), want[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- training -------------------------------------------------------------------------------------


def _trained(model: Any, steps: int, fuse_at: int | None) -> tuple[list[float], Any]:
    given = fused.batch("llama", torch.float32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for number in range(steps):
        if number == fuse_at:
            pk.fuse(model)
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


@pytest.mark.parametrize("fuse_at", [0, 3])
def test_a_loop_of_adamw(fuse_at: int) -> None:
    """From the start, or in the middle of a run whose optimizer goes on as it was."""
    want, plain = _trained(fused.family("llama", torch.float32), 6, None)
    got, optimizer = _trained(fused.family("llama", torch.float32), 6, fuse_at)
    assert want[-1] < want[0] - 0.05
    assert got == pytest.approx(want, rel=1e-4)
    state, other = optimizer.state_dict(), plain.state_dict()
    assert state["param_groups"] == other["param_groups"]
    assert all(state["state"][i]["step"] == other["state"][i]["step"] for i in other["state"])


def _trainer(model: Any, folder: Path, **settings: Any) -> list[float]:
    """The losses that transformers' Trainer logs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (16, 9), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=6,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
    ],
    ids=["plain", "checkpointed", "bf16"],
)
def test_one_line_in_a_script_with_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    want = _trainer(fused.family("llama", torch.float32), tmp_path, **settings)
    model = fused.family("llama", torch.float32)
    pk.fuse(model)
    got = _trainer(model, tmp_path, **settings)
    assert len(want) == 6
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=2e-2 if "bf16" in settings else 1e-4)


# -- a quantised base -----------------------------------------------------------------------------


def _in_4_bits() -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    block: Any = fused.Block(64).float()
    for name, linear in list(block.named_children()):
        quantised = bnb.nn.Linear4bit(
            *(linear.in_features, linear.out_features),
            bias=True,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
        quantised.weight = bnb.nn.Params4bit(
            linear.weight.detach(), requires_grad=False, quant_type="nf4"
        )
        quantised.bias = linear.bias
        setattr(block, name, quantised.to("cpu"))
    block.is_loaded_in_4bit = True
    return fused.adapted(block, target_modules=["a", "b", "c"])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_4_bit_base_is_called_and_its_update_fused(autocast: bool) -> None:
    model, x = _in_4_bits(), fused.rows(torch.float32, width=64)
    assert type(model.base_model.model.a).__name__ == "Linear4bit"

    def ran() -> fused.Values:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return fused.run(model, x)

    want = ran()
    report = pk.fuse(model)
    with fused.operators() as calls:
        got = ran()
    assert fused.forwards(calls) == {"lowrank_linear": 3}
    fused.same(got, want, 2e-2 if autocast else 1e-5)
    assert len(report.declined) == 3
    assert "a Linear4bit" in next(iter(report.declined.values()))
    assert not [row for row in report.rows if row.backend == "peft"]


def test_an_8_bit_base_is_called_and_its_update_fused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    block: Any = fused.Block(64).float()
    for name in ("a", "b"):
        linear = block.get_submodule(name)
        quantised = bnb.nn.Linear8bitLt(64, 5, bias=True, has_fp16_weights=False)
        quantised.weight = bnb.nn.Int8Params(
            linear.weight.detach(), requires_grad=False, has_fp16_weights=False
        )
        quantised.bias = linear.bias
        setattr(block, name, quantised.to("cpu"))
    block.is_loaded_in_8bit = True
    model = fused.adapted(block, target_modules=["a", "b"])
    assert type(model.base_model.model.a).__name__ == "Linear8bitLt"
    x = fused.rows(torch.float32, width=64)
    want: Tensor = model(x)
    pk.fuse(model)
    with fused.operators() as calls:
        got = model(x)
    assert fused.forwards(calls) == {"lowrank_linear": 2}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
