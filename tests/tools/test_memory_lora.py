"""`petal-kernels memory` on LoRA as people train it: all linears, dropout on, PEFT's beside ours.

Exact numbers of bytes, each a sum over what a layer keeps.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from petal_kernels.tools.memory import app, arguments, compare, compare_layer, presets, whatif
from petal_kernels.tools.memory.compare import Kept
from petal_kernels.tools.memory.lora_forms import adapted_paths
from petal_kernels.tools.memory.options import Options

D, FF, HEADS, HEAD = 4096, 11008, 32, 128  # of Llama-7B
R = 16
STATE = 16  # of a generator
ALL = "all-linear"


def norm(n: int, own: bool = True) -> int:
    """A float32 copy of its input, of the operator's the input itself, and 1 / rms."""
    return (4 if own else 2) * n * D + 4 * n


def attention(n: int) -> int:
    """q, k, v and the output in 16 bits, one float32 for each row of scores."""
    return 4 * 2 * n * D + 4 * n * HEADS


def lora_layer(n: int, recompute: bool = False) -> int:
    """A layer whose linears are all adapted, without its norms: x of q, k and v with three middles;
    of o, whose input attention keeps, a middle; x of the MLP, three middles, gate and up."""
    qkv = 2 * n * D + 2 * n * 3 * R + STATE
    mlp = 2 * n * D + 2 * n * 3 * R + STATE + (0 if recompute else 2 * 2 * n * FF)
    return qkv + attention(n) + 2 * n * R + STATE + mlp


def cos_and_sin(length: int) -> int:
    return 2 * 2 * length * HEAD


def measured(name: str, **options: Any) -> Any:
    preset = presets.PRESETS[name]
    given = {"method": preset.methods[0], **preset.defaults, **options}
    return whatif.run(presets.prepare(name, Options(**given)))


@pytest.mark.parametrize("recompute", [False, True])
def test_llama_7b_with_lora_on_all_linears_keeps_what_its_layers_keep(recompute: bool) -> None:
    """The default of the preset: rank 16 and dropout 0.05."""
    length = 64
    n = 2 * length
    found = measured("llama-7b", batch=2, length=length, recompute_mlp=recompute)
    layers = 32 * (2 * norm(n) + lora_layer(n, recompute))
    # Nothing trained lies before the first norm. Behind the last one: the loss's logarithms, its
    # labels and their sum.
    rest = cos_and_sin(length) - norm(n) + norm(n) + 4 * n * 32000 + 8 * n + 4
    assert found.fake
    assert found.saved_bytes == layers + rest
    assert recompute or found.saved_bytes == 533_793_284
    # r (in + out) of every linear; PEFT counts as many.
    assert found.sizes.trainable_numbers == 39_976_960


def layer_by_hand(sizes: compare_layer.Sizes) -> dict[tuple[str, str], int]:
    """Bytes of every form, `targets` by `label`."""
    n = sizes.batch * sizes.length
    frozen = 2 * norm(n) + attention(n) + cos_and_sin(sizes.length) + 3 * 2 * n * FF
    lora = 2 * norm(n) + cos_and_sin(sizes.length)
    # What the first projections add keeps x once more than nothing; v has as many heads as q.
    found = {("nothing", "frozen"): frozen}
    names = {"q_proj, v_proj": (2, 0), "q_proj, k_proj, v_proj": (3, 0), ALL: (6, 1)}
    for targets, (of_d, of_ff) in names.items():
        for label, size in (("float32", 4), ("bfloat16", 2)):
            # Dropped out in the factors' dtype, and a mask, of each linear for itself.
            copies = (size + 1) * n * (of_d * D + of_ff * FF)
            middles = (of_d + of_ff) * size * n * R
            found[targets, f"peft-lora, {label}"] = frozen + copies + middles
        for label, chosen in compare_layer.OURS.items():
            norms = chosen.get("frozen_norms", "module")
            # An operator's norm keeps its input as it is; folded, what reads it keeps no x.
            less = 0 if norms == "module" else 2 * (norm(n) - norm(n, own=False))
            less += {6: 2, 2: 1, 3: 1}[of_d] * 2 * n * D if norms == "folded" else 0
            of_qkv = frozen + 2 * n * D + 2 * n * of_d * R + STATE
            whole = lora + lora_layer(n, "recompute_mlp" in chosen)
            found[targets, label] = (whole if of_d == 6 else of_qkv) - less
    return found


def test_a_layer_keeps_what_the_formulas_say() -> None:
    sizes = compare_layer.Sizes(batch=2, length=32)
    kept = list(compare_layer.compare(sizes, peft=False))
    assert {(k.targets, k.label): k.bytes for k in kept} == layer_by_hand(sizes)


def test_a_layer_keeps_these_times_x() -> None:
    """The headline, at its own size."""
    found = layer_by_hand(compare_layer.Sizes())
    x = 4 * 512 * D * 2
    times = {key: round(value / x, 2) for key, value in found.items()}
    assert times["nothing", "frozen"] == 16.09
    assert times["q_proj, v_proj", "peft-lora, float32"] == 21.11
    assert times[ALL, "peft-lora, float32"] == 37.87
    ours = [label for targets, label in times if targets == ALL and label.startswith("lora")]
    assert ours == list(compare_layer.OURS)
    assert [times[ALL, label] for label in ours] == [15.43, 13.43, 11.43, 10.06, 8.06, 6.06]
    of_two = [times["q_proj, v_proj", label] for label in ours]
    assert of_two == 2 * [17.10, 15.10, 14.10]


def test_the_restatement_of_a_layer_is_peft() -> None:
    pytest.importorskip("peft")
    sizes = compare_layer.Sizes(batch=1, length=8)
    real, restated = (list(compare_layer.compare(sizes, peft=p)) for p in (True, False))
    assert [(k.name, k.bytes) for k in real] == [(k.name, k.bytes) for k in restated]


def test_a_table_has_a_line_for_each_form_and_a_column_for_what_is_adapted() -> None:
    kept = [Kept("frozen", 3, 1.5, targets="nothing")]
    for targets, factor in (("a", 1), ("b", 10)):
        kept += [Kept(label, 0, factor * times, targets=targets) for label, times in
                 (("one", 2.004), ("two", 3.0))]  # fmt: skip
    head, first, second, *_, said = compare_layer.table(kept).splitlines()
    assert head.split() == ["form", "a", "b"]
    assert first.split() == ["one", "2.00", "20.04"]
    assert second.split() == ["two", "3.00", "30.00"]
    assert "the frozen layer keeps 1.50" in said


def test_the_command_compares_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """With targets and dropout of one's own, and everything in the file."""
    words = ["--compare", "lora-layer", "--batch", "1", "--length", "8", "-r", "4"]
    words += ["--targets", "o_proj,down_proj", "--lora-dropout", "0.25"]
    assert app.main(words) == 0
    shown = capsys.readouterr().out
    assert "1 x 8 x 4096 bfloat16, r=4, dropout 0.25" in shown
    assert "o_proj, down_proj" in shown
    assert app.main([*words, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["forms"]
    assert [f["targets"] for f in found] == ["nothing", *["o_proj, down_proj"] * 8]
    x = 8 * 4096 * 2
    assert all(f["times_x"] == f["bytes"] / x for f in found)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("all-linear", ALL),
        ("ALL-linear", ALL),
        ("q_proj", ("q_proj",)),
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("model.layers.0.mlp.up_proj,k_proj", ("model.layers.0.mlp.up_proj", "k_proj")),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("q_proj,v.*", "q_proj,v.*"),
    ],
)
def test_targets_are_names_all_linears_or_an_expression(text: str, want: object) -> None:
    """Kind: a name taken for an expression, which matches whole paths, or the other way round."""
    assert arguments.targets(text) == want
    assert arguments.parser().parse_args(["--targets", text]).targets == want


def _vision_language() -> torch.nn.Module:
    from tests.hf import tiny

    return tiny.instructblip()


def _trained(method: str, **options: Any) -> int:
    model = _vision_language()
    keep = presets.adapt(model, Options(method=method, rank=4, **options))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    del keep
    return count


SUBSETS: dict[str, dict[str, Any]] = {
    "the table's": {},
    "all of the decoder": {"targets": ALL},
    "all of the tower": {"targets": ALL, "parts": ("vision",)},
    "everywhere": {"targets": ALL, "parts": ("language", "vision", "projector")},
    "names": {"targets": ("q_proj", "v_proj")},
    "an expression": {"targets": r".*language_model.*\.k_proj"},
}


@pytest.mark.parametrize("subset", SUBSETS)
def test_pefts_lora_is_on_the_linears_that_ours_is_on(subset: str) -> None:
    """Kind: two columns of other linears."""
    pytest.importorskip("peft")
    assert _trained("peft-lora", **SUBSETS[subset]) == _trained("lora", **SUBSETS[subset]) > 0


@pytest.mark.parametrize("subset", SUBSETS)
def test_peft_is_asked_for_what_ours_has(subset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a column of another rank, dropout or dtype; with a stand-in of PEFT."""
    asked: list[Any] = []

    def record(model: torch.nn.Module, *given: Any) -> torch.nn.Module:
        asked.extend(given)
        return model

    monkeypatch.setattr(presets, "peft_lora", record)
    monkeypatch.setattr(presets, "installed", lambda: True)
    options = Options(method="peft-lora", rank=3, dropout=0.25, **SUBSETS[subset])
    presets.adapt(_vision_language(), options)
    config = presets.CONFIGS["lora"](replace(options, method="lora"))
    assert asked == [adapted_paths(_vision_language(), config), 3, 0.25, torch.float32]


def test_without_peft_its_method_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "installed", lambda: False)
    with pytest.raises(ValueError, match="want PEFT, which is missing: pip install peft"):
        presets.adapt(_vision_language(), Options(method="peft-lora"))


def test_every_option_of_lora_reaches_its_config() -> None:
    options = Options(
        method="lora", rank=3, targets=("q_proj",), dropout=0.25, parts=("vision",),
        recompute_mlp=True,
    )  # fmt: skip
    config = presets.CONFIGS["lora"](options)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 3, 0.25)
    assert (config.target_modules, config.parts) == (["q_proj"], ("vision",))
    assert config.recompute_mlp
    assert len(adapted_paths(_vision_language(), replace(config, target_modules=ALL))) > 2


def test_a_title_says_what_of_lora_was_chosen() -> None:
    options = Options(method="lora", targets=("q_proj", "v_proj"), dropout=0.05, rank=16)
    heeded = presets.HEEDED["lora"]
    said = options.describe(heeded)
    assert said == "lora r=16, batch 8, 128 words, sdpa, q_proj v_proj, dropout 0.05"
    more = replace(options, targets=ALL, parts=("vision",), recompute_mlp=True, dropout=None)
    assert more.describe(heeded).endswith("all-linear, parts vision, MLPs recomputed")
    assert "q_proj" not in options.describe(presets.HEEDED["full"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "bart-base", "--recompute-mlp"], "method vlpet: has no --recompute-mlp"),
        (["--model", "llama-7b", "--method", "full", "--parts", "vision"], "has no --parts"),
        (["--model", "llama-7b", "--parts", "eyes"], "want some of language, projector, vision"),
        (["--model", "llama-7b", "--targets", "nowhere"], "['nowhere'] match nothing"),
        (["--model", "llama-7b", "--targets", "("], "want a regular expression"),
        (["--model", "llama-7b", "--lora-dropout", "1"], "0 <= P < 1"),
        (["--compare", "lora-qkv", "--targets", "q_proj"], "--compare: has no --targets"),
        (["--compare", "lora-layer", "--parts", "vision"], "--compare: has no --parts"),
        (["--compare", "lora-layer", "--targets", "lm_head"], "match nothing"),
        (["--model", "bart-base", "--what-if", "peft"], "asked of method lora, method vlpet has"),
    ],
)
def test_what_lora_has_not_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_pefts_answer_needs_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    options, heeded = Options(method="lora"), presets.HEEDED["lora"]
    monkeypatch.setattr(whatif, "installed", lambda name: name != "peft")
    assert "pip install peft" in whatif.why_not("peft", options, heeded, "method lora")
    assert not whatif.why_not("recompute-mlp", options, heeded, "method lora")


def test_what_if_asks_peft_and_recomputed_mlps() -> None:
    options = Options(method="lora")
    assert whatif.changed("peft", options) == replace(options, method="peft-lora")
    assert whatif.changed("recompute-mlp", options) == replace(options, recompute_mlp=True)


def test_a_title_says_only_what_decides() -> None:
    """Kind: a default printed as if it had been used."""
    options = Options(method="full", batch=2)
    assert options.describe(presets.HEEDED["full"]) == "full, batch 2, 128 words, sdpa"
    demo = Options(**presets.DEMO)
    assert demo.describe(presets.DEMO_HEEDS) == "petal r=32, batch 128, sdpa"


def test_peft_keeps_six_times_what_the_fused_layer_keeps() -> None:
    layer = compare.Layer(length=32)  # the ratio depends on width and rank alone
    kept = {k.label: round(k.times_x, 1) for k in compare.compare(layer, peft=False)}
    assert kept["PEFT LoRA, float32 adapters (its default)"] == 6.1
    assert kept["LoraConfig, dropout 0.05"] == kept["one down-projection"] == 1.0
