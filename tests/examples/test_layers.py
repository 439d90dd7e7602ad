"""examples/swap.py, bench.py and memory.py on small sizes: they do what their first lines say.

Kind: an example that runs and shows nothing.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import petal_kernels as pk
from tests.examples.scripts import SCRIPTS, load


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_an_example_is_short(path: Path) -> None:
    """At most 60 lines that say something, imports and docstrings aside."""
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "what does it do?"
    aside: set[int] = set()
    for node in ast.walk(tree):
        said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if said or isinstance(node, (ast.Import, ast.ImportFrom)):
            aside |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # type: ignore[attr-defined]
    lines = [x for n, x in enumerate(text.splitlines(), 1) if x.strip() and n not in aside]
    assert len(lines) <= 60


def test_swapped_layers_learn_and_the_base_stays() -> None:
    swap = load("swap")
    block = swap.Block(32, 4, 4)
    x = torch.randn(2, 5, 32)
    frozen = {n: p.clone() for n, p in block.named_parameters() if not p.requires_grad}
    assert {n.split(".")[0] for n, p in block.named_parameters() if p.requires_grad} == {
        "qkv", "out", "adapter",
    }  # fmt: skip
    plain = swap.Block(32, 4)
    state = {n.replace(".base.", "."): v for n, v in block.state_dict().items()}
    plain.load_state_dict({n: state[n] for n in plain.state_dict()})
    # Step 0 of the adapted block is the frozen one.
    torch.testing.assert_close(block.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    losses = swap.main(steps=25, width=32, r=4)
    assert losses[-1] < 0.85 * losses[0]
    assert all(torch.equal(p, dict(block.named_parameters())[n]) for n, p in frozen.items())


def test_the_benchmark_times_what_it_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load("bench")
    monkeypatch.setattr(torch, "compile", lambda module: module)
    sizes = {"rows": 64, "width": 32, "rank": 4, "rounds": 4, "device": "cpu"}
    times = bench.main(**sizes)
    assert list(times) == ["eager", "torch.compile", "fused"]
    out = capsys.readouterr().out
    assert f"{times['eager'].median / times['fused'].median:5.2f}x" in out
    assert "drift" in out
    wrong = pk.nn.LoRALinear.forward
    monkeypatch.setattr(pk.nn.LoRALinear, "forward", lambda self, x: 1.01 * wrong(self, x))
    with pytest.raises(SystemExit, match="want an error like eager's"):
        bench.main(**sizes)


def test_memory_orders_the_forms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    memory = load("memory")
    monkeypatch.setattr(memory, "FORMS", ("peft", "peft, fused", "attach, MLP recomputed"))
    kept = memory.main(layers=1, width=128, batch=1, length=64)
    assert kept["peft"] > kept["peft, fused"] > kept["attach, MLP recomputed"]
    assert f"{kept['peft'] / 2**20:9.1f} MiB kept" in capsys.readouterr().out
