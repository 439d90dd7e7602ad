"""The pages' tables, cell by cell from a result file whose figures are known.

Kind: a headline that can be inverted with every test green.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

MEDIANS = {"published": 8.0, "eager": 5.0, "compile": 6.0, "petal": 4.0}
Line = Callable[..., str]


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """What has been read is known by its name."""
    tables.results.cache_clear()
    yield
    tables.results.cache_clear()


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    """A row of a table over one file with the given medians."""
    count = iter(range(100))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def make(
        medians: dict[str, float] | None = None,
        drift: float = 0.02,
        more: dict[str, dict[str, Any]] | None = None,
        label: str = "x",
        forward: dict[str, float] | None = None,
    ) -> str:
        entries = []
        for mode, times in (("train", forward), ("full", MEDIANS | (medians or {}))):
            if times is not None:
                rows = {k: {"median": v} | (more or {}).get(k, {}) for k, v in times.items()}
                entry = {"scenario": "s", "mode": mode, "drift": drift, "rows": rows}
                entries.append(entry)
        name = f"file{next(count)}"
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": entries}))
        modes = tuple(e["mode"] for e in entries)
        return tables._line(tables.Row(label, name, "s", modes))  # type: ignore[arg-type]

    return make


def test_a_row(line: Line) -> None:
    assert line() == "| x | 8.0 ms | 5.0 | 6.0 | **4.0 (2.00x)** | 2.0 % |"


@pytest.mark.parametrize(
    ("ours", "ratio"),
    [(4.0, "2.00x"), (0.5, "16x"), (0.8, "10x"), (0.81, "9.88x"), (16.0, "0.50x"), (3.2, "2.50x")],
)
def test_the_ratio_is_published_over_ours(ours: float, ratio: str, line: Line) -> None:
    assert f"{ours:.1f} ({ratio})" in line({"petal": ours})


@pytest.mark.parametrize(
    ("ours", "drift", "bold"),
    [
        (4.9, 0.02, True),
        (4.91, 0.02, False),  # 4.91 x 1.02 > 5.0, the fastest baseline
        (4.9, 0.03, False),
        (5.5, 0.02, False),  # faster than published and compile only
        (4.0, 0.3, False),
        (4.0, 0.2, True),
    ],
)
def test_bold_is_faster_than_every_baseline_by_more_than_the_drift(
    ours: float, drift: float, bold: bool, line: Line
) -> None:
    assert ("**" in line({"petal": ours}, drift)) is bold


def test_bold_needs_every_mode(line: Line) -> None:
    won = {"published": 4.0, "eager": 3.0, "compile": 3.5, "petal": 2.0}
    text = line(forward=won)
    assert text == (
        "| x | 4.0 / 8.0 ms | 3.0 / 5.0 | 3.5 / 6.0 | **2.0 / 4.0 (2.00x / 2.00x)** | 2.0 / 2.0 % |"
    )
    assert "**" not in line(forward=won | {"petal": 2.99})
    assert "**" not in line({"petal": 4.99}, forward=won)


def test_every_baseline_is_a_rival_and_the_floor_is_none(line: Line) -> None:
    assert "**" not in line({"grouped_mm": 3.0})
    assert "**" in line({"petal torch": 1.0})  # ours too
    text = line({"base": 1.0, "grouped_mm": 7.0}, more={"base": {"floor": True}}, label="{base} x")
    assert text.startswith("| 1.0 x | 8.0 ms |")
    assert "**" in text


@pytest.mark.parametrize(
    ("ours", "drift", "noise"),
    [
        (8.0, 0.0, True),
        (7.7, 0.05, True),
        (7.6, 0.05, False),
        (8.39, 0.05, True),
        (8.41, 0.05, False),
    ],
)
def test_a_ratio_inside_the_drift_is_noise(
    ours: float, drift: float, noise: bool, line: Line
) -> None:
    """As far below 1 as above it."""
    assert ("(within noise)" in line({"petal": ours}, drift)) is noise


@pytest.mark.parametrize("drift", [0.0, 0.0123, 0.5])
def test_the_drift_is_in_per_cent(drift: float, line: Line) -> None:
    assert line(drift=drift).endswith(f"| {100 * drift:.1f} % |")


def test_what_was_not_run_says_so(line: Line, tmp_path: Path) -> None:
    rows = {"published": {"median": 8.0}, "petal": {"median": 4.0}}
    entry = {"scenario": "s", "mode": "full", "drift": 0.0, "rows": rows}
    (tmp_path / "few.json").write_text(json.dumps({"results": [entry]}))
    text = tables._line(tables.Row("x", "few", "s"))
    assert text == "| x | 8.0 ms | not run | not run | **4.0 (2.00x)** | 0.0 % |"


def test_long_times_are_in_seconds(line: Line) -> None:
    slow = {"published": 15_000.0, "eager": 14_700.0, "compile": 12_345.0, "petal": 197.0}
    text = line(slow)
    assert text == "| x | 15.0 s | 14.7 s | 12.3 s | **0.197 s (76x)** | 2.0 % |"


@pytest.mark.parametrize(
    ("label", "verdict"),
    [("petal", "WRONG"), ("petal", "suspect"), ("petal", "imprecise"), ("published", "WRONG"),
     ("published", "suspect")],
)  # fmt: skip
def test_what_the_file_does_not_vouch_for_is_no_row(label: str, verdict: str, line: Line) -> None:
    with pytest.raises(ValueError, match=f"{label} is {verdict}"):
        line(more={label: {"verdict": verdict}})


def test_an_imprecise_baseline_is_one(line: Line) -> None:
    assert "(2.00x)" in line(more={"published": {"verdict": "imprecise"}})


def test_saved_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    entries = []
    for name, factor in (("a", 2), ("b", 1)):
        kept = {"published": 6_000_000, "eager": 4_550_000, "petal": 3_000_000}
        rows = {k: {"median": 1.0, "saved_bytes": factor * v} for k, v in kept.items()}
        rows["compile"] = {"median": 1.0}
        entries.append({"scenario": name, "mode": "full", "drift": 0.0, "rows": rows})
    (tmp_path / "kept.json").write_text(json.dumps({"results": entries}))
    text = tables._line(tables.Saved("kept", "kept", ("a", "b")))
    assert text == "| kept | 12.0 / 6.0 MB | 9.1 / 4.5 | | **6.0 / 3.0** | exact |"


def _step(median: float, kept: int = 0, **more: Any) -> dict[str, Any]:
    return {"median": median, "saved_bytes": kept, **more}


def test_what_lora_adds_to_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a share of the whole step, or of the other dropout's frozen one."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    entries = []
    for p, floor in (("0.0", 10.0), ("0.05", 20.0)):
        rows = {
            "base": _step(floor, floor=True),
            "peft": _step(floor * (1.5 if p == "0.05" else 1.25), 37_000_000),
            "petal": _step(floor * (1.1 if p == "0.05" else 1.04), 15_000_000),
        }
        name = f"llama step, LoRA on all linears, dropout {p}, full, B=2 L=8 r=4"
        entries.append({"scenario": name, "mode": "full", "drift": 0.02, "rows": rows})
    monkeypatch.setattr(tables, "_LLAMA", "llama")
    (tmp_path / "llama.json").write_text(json.dumps({"results": entries}))
    head, with_dropout, without = tables._lora_step().splitlines()
    assert "`, full, B=2 L=8 r=4):" in head
    assert with_dropout == (
        "with dropout 0.05 PEFT adds 50 % to the frozen step and petal_kernels 10 % (drift 2.0 %), "
        "and 37 and 15 MB are kept for backward;"
    )
    assert without.startswith(
        "with dropout 0 PEFT adds 25 % to the frozen step and petal_kernels 4 %"
    )


def test_what_lora_keeps_is_what_the_command_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a figure written by hand."""
    pytest.importorskip("transformers")
    from petal_kernels.tools.memory import app

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    words = ["--compare", "lora-layer", "--batch", "1", "--length", "8", "--targets", "o_proj"]
    assert app.main([*words, "--json", str(tmp_path / f"{tables._LORA_MEMORY}.json")]) == 0
    printed = capsys.readouterr().out.strip()
    command = f"$ petal-kernels memory {' '.join(words)}"
    assert tables._lora_memory() == f"```\n{command}\n{printed}\n```"


def test_a_table_of_lora_has_pefts_column(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lora_layer", "petal_layer"):
        monkeypatch.setitem(tables.TABLES, name, ())
    head = {name: tables._table(name).splitlines()[0] for name in ("lora_layer", "petal_layer")}
    assert "torch.compile | PEFT | petal_kernels" in head["lora_layer"]
    assert "PEFT" not in head["petal_layer"]


def test_loras_rows_are_both_layers_in_each_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "_LORA", {"fp32": "wide", "bf16": "half"})
    for file, ours in (("wide", 4.0), ("half", 2.0)):
        entries = []
        for layer in ("lora_qkv q, k, v, width 2048", "lora_mlp MLP, width 1024"):
            for drop, add in ((", dropout 0.05", 1.0), ("", 0.0)):
                medians = {"published": 8.0, "peft": 9.0, "peft_half": 7.0, "petal": ours + add}
                rows = {k: _step(v, 10**6 * round(v)) for k, v in medians.items()}
                name = f"{layer}{drop}, B=1 L=2 d=3 r=4"
                entries.append({"scenario": name, "mode": "full", "drift": 0.0, "rows": rows})
        (tmp_path / f"{file}.json").write_text(json.dumps({"results": entries}))
    found = [tables._line(row, tables.WITH_PEFT) for row in tables._lora()]
    assert len(found) == 2 * (2 * 2 + 1)
    first = "q, k, v, fp32, dropout 0.05, B=1 L=2 d=3 r=4"
    assert found[0] == (f"| {first} | 8.0 ms | not run | not run | 9.0 | **5.0 (1.60x)** | 0.0 % |")
    assert found[4] == (
        "| kept for backward with dropout, fp32: q, k, v / MLP | 8.0 / 8.0 MB | | | 9.0 / 9.0 "
        "| **5.0 / 5.0** | exact |"
    )
    assert found[8].startswith("| MLP, bf16, B=1 L=2 d=3 r=4 (PEFT with bf16 factors: 7.0) |")
    assert "**2.0 (4.00x)**" in found[8]


def test_a_rows_size_is_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a size written by hand; a row of the other dropout, whose name begins alike."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    names = {"a, B=2 L=8": 3.0, "a, dropout 0.05, B=2 L=9": 4.0}
    entries = []
    for name, ours in names.items():
        rows = {"published": {"median": 8.0}, "petal": {"median": ours}}
        entries.append({"scenario": name, "mode": "full", "drift": 0.0, "rows": rows})
    (tmp_path / "sized.json").write_text(json.dumps({"results": entries}))
    found = [
        tables._line(tables.Row("{size}", "sized", name)).split("|")
        for name in ("a", "a, dropout 0.05")
    ]
    assert [cells[1].strip() for cells in found] == ["B=2 L=8", "B=2 L=9"]
    assert ["**3.0" in found[0][5], "**4.0" in found[1][5]] == [True, True]
    with pytest.raises(KeyError):
        tables._entry("sized", "b", "full")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README.md and docs/ as they are, for a test to change."""
    shutil.copy(tables.ROOT / "README.md", tmp_path)
    shutil.copytree(tables.ROOT / "docs", tmp_path / "docs")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/benchmark.md"])
def test_the_command_ends_by_the_table(
    page: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In whichever page the table stands."""
    assert tables.main([]) == 0
    changed = copied / page
    text = changed.read_text()
    changed.write_text(re.sub(r"\(2\.33x\)", "(3.33x)", text))
    assert tables.main([]) == 1
    out = capsys.readouterr().out
    assert "-| adapter part" in out
    assert f"--- {page}" in out
    assert tables.main(["--write"]) == 0
    assert changed.read_text() == text


def test_a_block_that_no_page_has_is_missed(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a table that is written nowhere any more; of two pages with it one may drop it."""
    readme, page = copied / "README.md", copied / "docs" / "benchmark.md"
    readme.write_text("no blocks")
    assert tables.main([]) == 0
    page.write_text(page.read_text().replace("figures: whole_step", "figures: demo"))
    with pytest.raises(SystemExit) as stopped:
        tables.main([])
    assert stopped.value.code == 2
    assert "got none of ['whole_step']" in capsys.readouterr().err
    page.write_text("<!-- figures: nothing -->\n<!-- end -->")
    with pytest.raises(ValueError, match=r"want some of \[.*got \['nothing'\]"):
        tables.render(page.read_text())


def test_the_demos_picture_says_what_its_report_says(copied: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = copied / tables.PICTURE
    text = picture.read_text()
    report = json.loads((tables.RESULTS / f"{tables._DEMO}.json").read_text())
    for form in ("published", "fused"):
        for values, unit in (("milliseconds", 1.0), ("saved_bytes", 1e-6)):
            found = report["comparison"][values]
            assert f"{found[form] * unit:.1f}<" in text
            assert f"adapter {(found[form] - found['frozen']) * unit:+.1f}<" in text
    assert report["question"] in text
    picture.write_text(text.replace("eager published<", "eager<"))
    assert tables.main([]) == 1
    assert tables.main(["--write"]) == 0
    assert "eager published<" in picture.read_text()
