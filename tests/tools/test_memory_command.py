"""`petal-kernels memory`: models, comparisons, files, exit codes, and the limits it promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from petal_kernels import memory
from petal_kernels.memory.records import MIB, mib
from petal_kernels.tools import cli
from petal_kernels.tools.memory import app, compare, models, presets, whatif
from petal_kernels.tools.memory.options import Options
from tests.hf import tiny

SMALL = compare.Layer(batch=2, length=24, width=64, rank=4, dropout=0.25)
SCRIPT = """
import torch
from torch import nn

def build(batch=4, checkpointing=False):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[0].requires_grad_(False)
    return model, torch.randn(batch, 16)

def with_loss(attention="sdpa"):
    model, x = build()
    return model, (x,), lambda y: y.square().mean()

def wrong():
    return build()[0]

def broken():
    return int("seven")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert app.main([*arguments, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# Models --------------------------------------------------------------------------------------


def test_the_demo_keeps_what_hooks_of_a_plain_loop_count() -> None:
    pytest.importorskip("mlxtend")
    step = presets.prepare("demo", Options(**{**presets.DEMO, "batch": 16}))
    assert step.module is not None
    own = {t.untyped_storage().data_ptr() for t in step.module.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in step.module.buffers()}
    kept: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        alive.append(storage)
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step.model(*step.batch)
    counted = sum(kept.values())
    del loss
    found = whatif.run(step)
    assert found.saved_bytes == counted > MIB
    assert found.sizes.elsewhere == 0
    assert any(r.of_batch for r in found.saved)  # the cached features of the pictures


_LIMITED = """
import json, sys, time
from petal_kernels.tools.environment import most_resident
from petal_kernels.tools.memory import app
began = time.process_time()
code = app.main(sys.argv[1:])
print(json.dumps([code, time.process_time(), most_resident()]))
"""


def test_the_most_resident_is_not_that_of_whoever_started_the_command() -> None:
    """On Linux `ru_maxrss` of a child is at least its parent's."""
    held = b"x" * (512 * MIB)
    code = "from petal_kernels.tools.environment import most_resident; print(most_resident())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 16 * MIB < int(done.stdout) < len(held)


def limited(report: Path, *words: str) -> dict[str, Any]:
    """The report of a whole process, imports included, of 30 seconds and 2 GiB at most. Seconds of
    the processor: others may run beside it."""
    options = [*words, "--json", str(report)]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *options], capture_output=True, text=True, check=True
    )
    code, seconds, most = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert seconds < 30, f"{seconds:.1f} s"
    assert 0 < most < 2**31, mib(most)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def test_lora_on_all_linears_of_7b_in_30_seconds_and_2_gib(tmp_path: Path) -> None:
    """The question that needs no package with it: two runs."""
    words = ["--model", "llama-7b", "--what-if", "recompute-mlp"]
    found = limited(tmp_path / "report.json", *words)
    assert found["fake"]
    (answer,) = found["what_if"]
    # Gate and up of every layer, in 16 bits.
    assert found["saved_bytes"] - answer["saved"] == 32 * 2 * 2 * (8 * 128 * 11008)


def test_7b_in_30_seconds_and_2_gib(tmp_path: Path) -> None:
    found = limited(tmp_path / "report.json", "--model", "instructblip-vicuna-7b", "--batch", "8")
    assert found["fake"]
    # 7,913,209,856 of the model and the adapter's, two bytes and four.
    trained = found["sizes"]["trainable_numbers"]
    assert found["sizes"]["parameters"] == 2 * 7_913_209_856 + 4 * trained
    # Of every layer of the language model: the down-projection's... no, of its gated product, both
    # factors and the activation's input.
    gates = [
        r for r in found["saved"] if re.search(r"language_model.*\.mlp(\.act_fn)?$", r["module"])
    ]
    assert sum(r["bytes"] for r in gates) == 32 * 3 * (8 * 160 * 11008 * 2)
    assert any("language_model" in a["text"] and a["cause"] == "frozen" for a in found["advice"])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_shrunk_model_through_fake_tensors(family: str, checkpointing: bool) -> None:
    """The steps of a preset, on a small config: fake tensors keep what real ones do, but 16 bytes
    of generator state for each projection that shares its operator call on real weights, factors
    that such projections share, which checkpointed regions hold, and attention masks, which on real
    ones are dropped where they mask nothing."""

    def profile(fake: bool) -> memory.Profile:
        model = tiny.FAMILIES[family]()
        batch: Any = tiny.batch(family)
        options = Options(rank=4, checkpointing=checkpointing)
        keep = presets.adapt(model, options)
        model.train()
        if checkpointing:
            models.checkpoint(model)
        if fake:
            model, batch = memory.fake_tensors(model, batch)
        found = memory.profile(model, batch, cuda_rules=False)
        del keep
        return found

    def kept(found: memory.Profile) -> int:
        masks = sum(
            r.bytes for r in found.saved if r.argument == "attn_mask" or r.dtype == torch.bool
        )
        states = sum(r.bytes for r in found.saved if (r.shape, r.dtype) == ((2,), torch.int64))
        shared = sum(
            r.bytes
            for r in found.saved
            if r.argument == "cache" and r.module == "qformer.encoder" and len(r.shape) == 3
        )
        return found.saved_bytes - masks - states - shared

    real, fake = profile(False), profile(True)
    assert fake.fake
    assert kept(fake) == kept(real)
    assert fake.sizes.gradients == real.sizes.gradients > 0
    assert (len(fake.recomputed) > 4) == checkpointing


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bart-base", "vladapter"),
        ("bart-base", "full"),
        ("gpt2-vit", "routing"),
    ],
)
def test_presets(name: str, method: str) -> None:
    preset = presets.PRESETS[name]
    assert method in preset.methods
    options = Options(method=method, batch=2, length=16, rank=8)
    found = whatif.run(presets.prepare(name, options))
    assert found.fake
    assert found.training
    assert found.saved_bytes > 0
    assert found.sizes.gradients == found.sizes.trainable
    assert {r.role for r in found.saved} == (
        {"trainable"} if method == "full" else {"trainable", "frozen"}
    )
    # Nothing trained lies before the frozen tower: it keeps nothing.
    assert method == "full" or not [r for r in found.saved if r.module.startswith("vision")]


# What if, comparisons ------------------------------------------------------------------------


def test_what_if_answers_are_runs_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    # Long enough that probabilities weigh more than what fused attention keeps instead.
    size = ("--batch", "1", "--length", "256", "--rank", "8")
    found = run_json(
        capsys, "--model", "bart-base", *size, "--what-if", "checkpointing,eager,batch"
    )
    answers = {a["label"]: a for a in found["what_if"]}
    assert list(answers) == ["gradient checkpointing", "eager attention", "batch x 2"]
    assert answers["gradient checkpointing"]["saved"] < found["saved_bytes"] / 2
    assert answers["eager attention"]["saved"] > found["saved_bytes"]
    twice = run_json(capsys, "--model", "bart-base", *size, "--batch", "2")
    assert answers["batch x 2"]["saved"] == twice["saved_bytes"]


def expected(layer: compare.Layer) -> list[int]:
    """Bytes of every form of `compare.forms`, by hand."""
    n, d, r, p = layer.batch * layer.length, layer.width, layer.rank, 3
    return [
        p * (4 * n * d + 4 * n * r),  # a float32 copy of x and x A^T each
        p * (4 * n * d + n * d + 4 * n * r),  # dropped-out copy and mask
        2 * n * d + p * 2 * n * r,  # x itself, once
        p * (2 * n * d + n * d + 2 * n * r),
        2 * n * d + p * 2 * n * r,  # x once, with a middle of each
        2 * n * d + p * 2 * n * r + 16,  # the generator's state
        2 * n * d + 2 * n * r,
        2 * n * d + 2 * n * r + 16,
    ]


def test_lora_on_q_k_v_keeps_what_the_formulas_say() -> None:
    kept = compare.compare(SMALL, peft=False)
    assert [k.bytes for k in kept] == expected(SMALL)
    for form in kept[:2]:  # copies, and dropped-out copies of copies
        assert form.profile is not None
        assert "3 float32 copies of one tensor" in form.profile.table()
        assert "fused layer" in form.profile.table()


def test_the_restatement_is_peft() -> None:
    pytest.importorskip("peft")
    real, restated = compare.compare(SMALL, peft=True), compare.compare(SMALL, peft=False)
    assert [k.bytes for k in real] == [k.bytes for k in restated]


def test_compare_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    size = ("--batch", "1", "--length", "8", "--rank", "2")
    assert app.main(["--compare", "lora-qkv", *size, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "LoraConfig, dropout 0.05" in shown
    assert "<svg" in page.read_text()
    found = run_json(capsys, "--compare", "lora-qkv", *size)
    assert [f["form"] for f in found["forms"]] == list(compare.forms(compare.Layer(), peft=False))


# The command ---------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Every tag is closed, and nothing refers to anything outside."""

    void = frozenset({"meta", "link", "br", "rect", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href") or (value or "").startswith(("data:", "#"))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def test_a_script_of_ones_own(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    page, plot, data = (tmp_path / f"out.{kind}" for kind in ("html", "png", "json"))
    files = ["--html", str(page), "--png", str(plot), "--json", str(data)]
    asked = ["--what-if", "all"]
    assert cli.main(["memory", "--script", f"{script}:build", "--batch", "8", *asked, *files]) == 0
    shown = capsys.readouterr().out
    found = json.loads(data.read_text())
    # Tanh's result is the second linear's input, the only tensor kept.
    assert found["saved_bytes"] == sum(r["bytes"] for r in found["saved"]) == 8 * 16 * 4
    assert found["schema"] == 2
    assert {"torch", "cpu", "commit", "date"} <= set(found["environment"])
    assert found["command"].startswith("petal-kernels memory --script")
    assert [a["label"] for a in found["what_if"]] == ["batch x 2", "gradient checkpointing"]
    assert set(found["not_asked"]) == {
        *("length", "rank", "eager", "published", "recompute-mlp", "peft")
    }
    assert f"not asked: eager: {script}:build's function has no attention" in shown
    assert found["what_if"][0]["saved"] == 2 * found["saved_bytes"]
    assert found["timeline"]["live"]
    for text in ("512 B", "2", "trainable", "batch x 2", "input of a linear layer"):
        assert text in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    parser = _Page()
    parser.feed(page.read_text())
    assert parser.open == []
    assert {"svg", "table"} <= set(parser.seen)


def test_a_scripts_own_loss_is_taken(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: another loss than the script's, which keeps less."""
    own, plain = (
        run_json(capsys, "--script", f"{script}:{name}")["saved_bytes"]
        for name in ("with_loss", "build")
    )
    assert own == plain + 4 * 16 * 4  # the square's operand


def test_exit_codes(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--script", f"{script}:with_loss"]
    assert app.main([*own, "--fail-above", "1"]) == 0
    assert app.main([*own, "--fail-above", "0.0001"]) == 1
    assert "--fail-above" in capsys.readouterr().err
    for wrong, said in (
        (["--script", f"{script}:absent"], "absent"),
        (["--script", f"{script}:wrong"], "(model, batch)"),
        (["--script", "nowhere.py"], "nowhere.py"),
        (["--model", "bart-base", "--method", "petal"], "--method"),
        (["--what-if", "weather"], "weather"),
        (["--batch", "0"], "--batch"),
        (["--method", "lora"], "demo"),
        (["--length", "50"], "--model demo: has no --length"),
        (["--device", "mps"], "want cpu or cuda[:N]"),
        (["--compare", "lora-qkv", "--fail-above", "1"], "--compare: has no --fail-above"),
    ):
        with pytest.raises(SystemExit) as stopped:
            app.main(wrong)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="seven"):  # the script's own, with its traceback
        app.main(["--script", f"{script}:broken"])


def test_a_terminal_cuts_long_lines(script: Path) -> None:
    from petal_kernels.memory.text import report

    found = memory.profile(tiny.instructblip().train(), tiny.batch("instructblip"))
    assert max(map(len, report(found, width=80).splitlines())) <= 80
    assert max(map(len, report(found).splitlines())) > 100


def test_a_run_on_cuda_is_set_beside_the_allocator_and_a_fake_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The printing of it, with figures in the place of the allocator's."""
    measured = memory.profile(torch.nn.Linear(8, 8), torch.randn(4, 8))
    kept = measured.kept_bytes
    measured.device_bytes = {"before": 0, "forward kept": 2 * kept, "forward peak": kept}
    asked: list[Options] = []

    def measure(options: Options) -> memory.Profile:
        asked.append(options)
        return measured

    app._calibrate(Options(device="cuda"), measured, measure, print)
    shown = capsys.readouterr().out
    assert shown.count("margin +100.0 %") == 2
    assert [o.device for o in asked] == [""]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_allocator_agrees() -> None:
    """Within 5 % of what is kept, where blocks are large enough that their rounding is not."""
    from petal_kernels.memory.calibrate import margins

    options = Options(method="lora", batch=8, length=256, device="cuda")
    measured = whatif.run(presets.prepare("gpt2-vit", options))
    for margin in margins(measured):
        assert abs(margin.percent) < 5, str(margin)
