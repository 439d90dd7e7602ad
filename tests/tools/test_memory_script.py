"""`petal-kernels memory`: what it refuses, what it takes from a script, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from petal_kernels.tools import cli, exits
from petal_kernels.tools.memory import app, presets, whatif
from petal_kernels.tools.memory.options import Options
from tests.tools.memory_scripts import SCRIPT


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of a mistake: no report before it, no traceback."""
    with pytest.raises(SystemExit) as stopped:
        app.main(words)
    said = capsys.readouterr()
    assert stopped.value.code == exits.REFUSED
    assert "saved for backward" not in said.out
    assert "Traceback" not in said.err
    return said.err


def profiled(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert app.main([*words, "--json", "-"]) == 0
    # A script prints what it likes, elsewhere.
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# A default of ours in the place of the user's ------------------------------------------------


def test_what_if_doubles_what_the_script_has(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a default of the tool taken for the user's value."""

    def calls(*words: str) -> list[tuple[int, ...]]:
        assert app.main(["--script", script, *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [tuple(map(int, x.split()[-2:])) for x in lines if x.startswith("build called")]

    assert calls("--what-if", "batch,rank") == [(3, 5), (6, 5), (3, 10)]
    assert calls("--what-if", "batch,rank", "--batch", "7") == [(7, 5), (14, 5), (7, 10)]
    assert calls("--what-if", "all", "--rank", "2") == [(3, 2), (6, 2), (3, 4)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--what-if", "length"], "has length=None, no number to double: give --length"),
        (["--what-if", "published"], "'s function has no implementation"),
        (["--what-if", "eager"], "'s function has no attention"),
        (["--checkpointing"], "--checkpointing: build() of "),
        (["--dtype", "bfloat16"], "takes no argument 'dtype', it takes batch, length, rank"),
        (["--method", "lora"], "takes no argument 'method'"),
        (["--part", "a.b"], "takes no argument 'part'"),
    ],
)
def test_what_a_script_does_not_take_is_refused(
    script: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: an option or a question that goes unheeded without a word."""
    assert said in refused(capsys, "--script", script, *words)


def test_a_scripts_arguments(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: a call that fails for what could be said before it."""
    said = refused(capsys, "--script", f"{script}:needs")
    assert "--batch: needs(batch) of the script has no default, so it must be given" in said
    assert profiled(capsys, "--script", f"{script}:needs", "--batch", "4")["sizes"]["batch"] == 256
    assert "want defaults for what is no option" in refused(capsys, "--script", f"{script}:strange")
    found = profiled(capsys, "--script", f"{script}:anything", "--batch", "9")
    assert found["sizes"]["batch"] == 9 * 64
    asked = ["--what-if", "checkpointing"]
    assert "checkpointing is True already" in refused(
        capsys, "--script", f"{script}:checkpointed", *asked
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "gpt2-vit", "--method", "full", "--what-if", "rank"], "method full has no"),
        (["--model", "gpt2-vit", "--method", "full", "--rank", "4"], "method full: has no --rank"),
        (["--model", "gpt2-vit", "--method", "adapter", "--dropout", "0.1"], "has no --dropout"),
        (
            ["--model", "bart-base", "--method", "peft-lora", "--what-if", "published"],
            "has no impl",
        ),
        (["--model", "bart-base", "--attention", "eager", "--what-if", "eager"], "eager already"),
        (["--what-if", "length"], "--model demo has no length"),
        (["--compare", "lora-qkv", "--rows", "3"], "--compare: has no --rows"),
        (["--compare", "lora-qkv", "--optimizer", "sgd"], "--compare: has no --optimizer"),
        (["--compare", "lora-qkv", "--accumulate"], "--compare: has no --accumulate"),
        (["--fail-above", "nan"], "want a number of MiB >= 0, got nan"),
        (["--fail-above", "inf"], "want a number of MiB >= 0, got inf"),
        (["--fail-above", "-1"], "want a number of MiB >= 0, got -1"),
        (["--dropout", "1.0"], "want a number with 0 <= P < 1, got 1.0"),
        (["--optimizer", "lion"], "want one of adamw, adam, sgd, adamw8bit, adam8bit, got 'lion'"),
        (["--optimizer", "adamw:momentum=0.9"], "momentum: want settings of adamw"),
        (["--optimizer", "sgd:momentum=much"], "want momentum=yes, no or a number, got"),
        (["--model", "gpt2-vit", "--batch", "1", "--part", "nosuch"], "such as vision, projection"),
        (["--model", "gpt2-vit", "--targets", "(("], "want a regular expression, got '(('"),
        (["--model", "gpt2-vit", "--batch", "1", "--targets", "nowhere"], "nowhere"),
        (["--script", "nowhere.py"], "want a Python file, got 'nowhere.py'"),
        (
            ["--script", "no.such.module:build"],
            "a module that can be imported, got 'no.such.module'",
        ),
        (["--script", ":build"], "a module that can be imported, got ''"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a mistake on the command line that is a traceback, or goes unheeded."""
    assert said in refused(capsys, *words)


def test_every_method_heeds_what_it_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a table of what is heeded that is wrong: every option of an adapter that a method is
    said to heed reaches what it is made of, and no other does."""
    values: dict[str, Any] = {"rank": 6, "targets": ("query",), "dropout": 0.25}
    values |= {"parts": ("vision",), "recompute_mlp": True}
    for method, config in presets.CONFIGS.items():
        targets = "all-linear" if method == "lora" else None  # parts want them named
        base = Options(method=method, targets=targets)
        for name, value in values.items():
            changed = config(replace(base, **{name: value}))
            moved = changed.to_dict() != config(base).to_dict()
            assert moved == (name in presets.HEEDED[method]), (method, name)
    assert set(presets.HEEDED) == set(presets.METHODS)


# Steps ---------------------------------------------------------------------------------------


def test_a_step_function_is_profiled(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: what the library takes and the command does not: a function, under autocast."""
    found = profiled(capsys, "--script", f"{script}:step")
    # The weight's bfloat16 copy is no activation of the frozen input's; the input's is kept.
    rows = {(r["dtype"], tuple(r["shape"])) for r in found["saved"]}
    assert ("bfloat16", (2, 64)) in rows
    assert found["sizes"]["parameters"] == found["sizes"]["gradients"] == 4 * (64 * 64 + 64)
    assert found["training"]
    fake = profiled(capsys, "--script", f"{script}:meta_step")
    assert fake["fake"]
    assert fake["sizes"]["parameters"] == 4 * (64 * 64 + 64)


@pytest.mark.parametrize(
    ("name", "linears"), [("bound", 1), ("two", 2), ("by_global", 1), ("told", 1)]
)
def test_the_module_of_a_step_is_found(
    script: str, name: str, linears: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: parameters counted as activations, because nobody knew whose they are."""
    found = profiled(capsys, "--script", f"{script}:{name}")
    assert found["sizes"]["parameters"] == linears * 4 * (64 + 8)
    kept = 2 * 8 * 4 * linears  # the input of each
    assert found["saved_bytes"] == kept
    assert {r["role"] for r in found["saved"]} == {"trainable"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hidden", "refers to no torch.nn.Module: return (step, batch, loss or None, module)"),
        ("number", "got int as model"),
        ("one", "got Sequential"),
        ("bad_loss", "want a function of the output as loss, got 'mse'"),
        ("bad_module", "want a torch.nn.Module as module, got a str"),
        ("absent", "want a function absent()"),
        ("nothing_to_derive", "want an output with tensors in it"),
        ("leaves", "left with sys.exit(0)"),
    ],
)
def test_what_a_script_returns_is_refused(
    script: str, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a traceback of ours for a mistake in what a script returns."""
    assert said in refused(capsys, "--script", f"{script}:{name}")


# Exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "said"), [("raises", "seven"), ("wrong_model", "eight")])
def test_a_fault_of_a_script_shows_its_traceback_and_is_no_broken_bound(
    script: str, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: exit code 1, "over the budget", for anything else."""
    assert cli.main(["memory", "--script", f"{script}:{name}", "--fail-above", "1"]) == 2
    shown = capsys.readouterr().err
    assert f"{said} of mine" in shown.splitlines()[-1]
    assert script in shown


@pytest.mark.parametrize("option", ["--json", "--html", "--png"])
def test_a_report_that_cannot_be_written_is_refused_before_work(
    script: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: work thrown away at its end."""
    said = refused(capsys, "--script", f"{script}:raises", option, str(tmp_path))
    assert "want a file that can be written" in said
    same = str(tmp_path / "same")
    both = ("--json", same, "--html", same)
    assert "twice" in refused(capsys, "--script", f"{script}:raises", *both)


def test_too_large_a_model_is_no_traceback(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(whatif, "run", full)
    assert "without --device it runs on fake tensors" in refused(capsys, "--script", script)


def test_a_reader_who_leaves_and_an_interrupt(tmp_path: Path) -> None:
    """Kind: a closed pipe taken for wrong usage; 141 and 130, and nothing on stderr."""
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent("""
        import os, signal, torch
        def build():
            return torch.nn.Linear(64, 64), (torch.randn(2, 64),)
        def stopped():
            os.kill(os.getpid(), signal.SIGINT)
            return build()
        """)
    )
    run = [sys.executable, "-u", "-m", "petal_kernels.tools.cli", "memory", "--script"]
    with subprocess.Popen(
        [*run, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
    done = subprocess.run([*run, f"{path}:stopped"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


# The optimizer's step ------------------------------------------------------------------------


def test_the_optimizer_is_on_the_report(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a figure of one optimizer under another's name."""
    own = ["--script", f"{script}:by_global"]
    size = 4 * (64 + 8)
    found = profiled(capsys, *own, "--optimizer", "sgd:momentum=0.9", "--what-if", "all")
    assert found["optimizer"] == found["what_if_optimizer"] == "SGD with momentum (foreach)"
    assert found["sizes"]["states"] == size
    assert list(found["timeline"]["phases"]) == ["forward", "backward", "optimizer"]
    again = profiled(capsys, *own, "--optimizer", "sgd:momentum=0.9", "--accumulate")
    assert again["sizes"]["earlier_gradients"] == size
    assert again["timeline"]["live"][0] == found["timeline"]["live"][0] + size
    page = tmp_path / "page.html"
    words = ["--optimizer", "adamw:foreach=no,amsgrad", "--html", str(page)]
    assert app.main([*own, *words]) == 0
    shown = capsys.readouterr().out
    assert f"AdamW (loop, amsgrad), {3 * size} B of states" in shown
    assert "AdamW (loop, amsgrad)" in page.read_text()
    assert f"Above the {2 * 8 * 4 + 4 * size} B of parameters, batch, optimizer states" in (
        page.read_text()
    )
    assert app.main([*own, "--what-if", "all"]) == 0
    assert "with AdamW (foreach)" in capsys.readouterr().out


def test_what_if_compares_peaks_of_the_same_optimizer(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a column that holds another run's figure."""
    words = ("--script", script, "--optimizer", "adamw:fused")
    (answer,) = profiled(capsys, *words, "--what-if", "batch")["what_if"]
    twice = profiled(capsys, *words, "--batch", "6")
    assert answer["with_optimizer"] == twice["peak_bytes"]
    assert answer["saved"] == twice["saved_bytes"]
    assert answer["peak"] < answer["with_optimizer"]
