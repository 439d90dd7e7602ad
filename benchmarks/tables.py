"""``python -m benchmarks.tables``: the figures of README.md and docs/, from committed result files.

Each block of a page between ``<!-- figures: NAME -->`` and ``<!-- end -->`` is written from the
spec below, in whichever page it stands, and so is the demo's picture; ``--check`` (the default)
tells whether they agree, ``--write`` makes them agree. A row is bold where the package is faster
than every baseline by more than the run's drift; a ratio that is closer to 1 than the drift is
"within noise". Exit code: 1 where they differ; 2 where a result file cannot stand behind a row, a
block is in no page, or a page has one that is not known.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petal_kernels.tools import exits
from petal_kernels.tools.bench.judge import change
from petal_kernels.tools.memory.compare import Kept
from petal_kernels.tools.memory.compare_layer import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

COLUMNS = {"published": "published", "eager": "well-written eager", "compile": "torch.compile"}
WITH_PEFT = COLUMNS | {"peft": "PEFT"}
MISSING = "not run"
PICTURE = "docs/pictures/demo.svg"
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One line: a scenario of a result file in one or more modes. `{NAME}` in the label is that
    provider's times."""

    label: str
    file: str
    scenario: str
    modes: tuple[str, ...] = ("full",)
    ours: str = "petal"


@dataclass(frozen=True)
class Saved:
    """Bytes kept for backward, of several scenarios of one file."""

    label: str
    file: str
    scenarios: tuple[str, ...]


_LAYER = "epyc-avx512-2core-6d30940e4164-layer"
_AVX2 = "epyc-2core-182c7665a0e3-layer"
_GATED = "epyc-avx512-2core-8adc31027bbd-op-gated_bottleneck"
_EXPERTS = "epyc-avx512-2core-3be9ccd9b36c-op-expert_dispatch"
_DEMO = "epyc-avx512-2core-c6147b0082d7-demo"
_DEMO_METHODS = "epyc-avx512-2core-c6147b0082d7-demo-methods"
_QFORMER = "epyc-avx512-2core-6d30940e4164-qformer"
_OVERHEAD = "epyc-avx512-2core-6d30940e4164-overhead"
# Of LoRA's times, layers by dtype and a whole step: pages have the blocks whose files are named.
_LORA: dict[str, str] = {}
_LLAMA = ""
_LORA_MEMORY = "epyc-avx2-2core-f98b9351d3d7-memory-lora-layer"
_QKV = "petal qkv layer, N=4096 d=768 R=64 "
_QKV_GIVEN = "petal qkv adapter part, base outputs given, N=4096 d=768 R=64 float32"


def _both(label: str, file: str, scenario: str) -> Row:
    return Row(label, file, scenario, ("train", "full"), "petal native")


def _lora() -> tuple[Row | Saved, ...]:
    """Two layers in each dtype, with and without dropout; what they keep with it."""
    found = list[Row | Saved]()
    qkv = ("q, k, v", "lora_qkv q, k, v, width 2048")
    mlp = ("MLP", "lora_mlp MLP, width 1024")
    for short, file in _LORA.items():
        half = "" if short == "fp32" else f" (PEFT with {short} factors: {{peft_half}})"
        for name, scenario in (qkv, mlp):
            found += [
                Row(f"{name}, {short}{drop}, {{size}}{half}", file, scenario + drop)
                for drop in (", dropout 0.05", "")
            ]
        kept = tuple(f"{scenario}, dropout 0.05" for _, scenario in (qkv, mlp))
        found.append(Saved(f"kept for backward with dropout, {short}: q, k, v / MLP", file, kept))
    return tuple(found)


TABLES: dict[str, Sequence[Row | Saved]] = {
    "lora_layer": _lora(),
    "petal_layer": (
        Row("adapter part, base outputs given, fp32", _LAYER, _QKV_GIVEN),
        Row("whole layer, fp32", _LAYER, _QKV + "float32"),
        Row("whole layer, bf16", _LAYER, _QKV + "bfloat16"),
        Row("whole layer, bf16, AVX2", _AVX2, _QKV + "bfloat16"),
        Saved("kept for backward, fp32 / bf16", _LAYER, (_QKV + "float32", _QKV + "bfloat16")),
    ),
    "gated_bottleneck": tuple(
        _both(label, _GATED, f"gated_bottleneck {scenario}")
        for label, scenario in (
            ("VL-PET large", "vl-pet large N=6400 r=96"),
            ("VL-PET middleX", "vl-pet middleX N=6400 r=96"),
            ("VL-PET small", "vl-pet small N=6400 r=96"),
            ("VL-Adapter", "vl-adapter N=6400 r=96"),
            (
                "routing adapter, GPT-2, V=197, gram (N=2040 r=128, no norm)",
                "routing adapter gpt-2 gram V=197",
            ),
        )
    ),
    "expert_dispatch": tuple(
        _both(label, _EXPERTS, f"expert_dispatch {scenario}")
        for label, scenario in (
            ("PETAL, mean of 6 experts, r=64, x frozen", "petal mean E=6 r=64 N=4096"),
            ("PETAL, softmax over 6, r=64", "petal softmax E=6 r=64 N=4096"),
            ("top-2 of 8, r=64 (`grouped_mm`: {grouped_mm})", "top-2 of 8 r=64 N=4096"),
            ("top-2 of 16, r=64 (`grouped_mm`: {grouped_mm})", "top-2 of 16 r=64 N=4096"),
            ("LoRA, top-2 of 8, r=16 (`grouped_mm`: {grouped_mm})", "lora top-2 of 8 r=16 N=4096"),
        )
    ),
}


@functools.cache
def results(file: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The entries of a result file by scenario and mode.

    Files of before ``mode`` was an entry's own say ", forward" (as in training) behind the name.
    """
    document = json.loads((RESULTS / f"{file}.json").read_text())
    found = {}
    for entry in document["results"]:
        name, mode = entry["scenario"], entry.get("mode")
        if mode is None:
            mode = "train" if name.endswith(", forward") else "full"
            name = name.removesuffix(", forward")
        found[name, mode] = entry
    return found


def _entry(file: str, scenario: str, mode: str) -> dict[str, Any]:
    """Of a scenario by its name, or by all of it but the sizes at its end."""
    found = results(file)
    sized = [key for key in found if key[1] == mode and key[0].startswith(f"{scenario}, B=")]
    (key,) = [(scenario, mode)] if (scenario, mode) in found else sized or [(scenario, mode)]
    return found[key]


def _times(milliseconds: Sequence[float], seconds: bool) -> str:
    """Of all modes: ``1.2 / 3.4``, or three digits in seconds."""
    if seconds:
        return " / ".join(f"{_digits(m / 1e3)} s" for m in milliseconds)
    return " / ".join(f"{m:.1f}" for m in milliseconds)


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _ratio(value: float, drift: float) -> str:
    if change(value) <= drift:
        return "within noise"
    return f"{value:.0f}x" if value >= 10 else f"{value:.2f}x"


def _vouched(row: Row, entries: Sequence[dict[str, Any]]) -> None:
    """ValueError where the file itself gives no ratio for the row."""
    for entry in entries:
        for label in ("published", row.ours):
            found = entry["rows"][label]
            said = found.get("verdict", "")
            if said in ("WRONG", "suspect") or (said == "imprecise" and label == row.ours):
                name = f"{row.file}: {row.scenario}, {entry.get('mode', 'full')}"
                raise ValueError(f"{name}: want figures that hold, {label} is {said}")


def _line(row: Row | Saved, columns: dict[str, str] = COLUMNS) -> str:
    found = _saved_cells(row, columns) if isinstance(row, Saved) else _timed_cells(row, columns)
    return re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(found)} |")


def _timed_cells(row: Row, columns: dict[str, str]) -> list[str]:
    entries = [_entry(row.file, row.scenario, mode) for mode in row.modes]
    _vouched(row, entries)
    medians = {
        label: [entry["rows"][label]["median"] for entry in entries] for label in entries[0]["rows"]
    }
    seconds = min(medians["published"]) >= 10_000
    times = {label: _times(values, seconds) for label, values in medians.items()}
    published = times["published"] + ("" if seconds else " ms")
    size = entries[0]["scenario"].removeprefix(f"{row.scenario}, ")
    cells = [row.label.format(**times, size=size), published]
    cells += [times.get(label, MISSING) for label in columns if label != "published"]
    triples = zip(medians["published"], medians[row.ours], entries, strict=True)
    ratios = " / ".join(_ratio(a / b, entry["drift"]) for a, b, entry in triples)
    ours = f"{times[row.ours]} ({ratios})"
    cells.append(f"**{ours}**" if _wins(row, entries) else ours)
    return [*cells, " / ".join(f"{100 * e['drift']:.1f}" for e in entries) + " %"]


def _wins(row: Row, entries: Sequence[dict[str, Any]]) -> bool:
    """Whether ours beats every baseline by more than the drift, in every mode."""
    for entry in entries:
        rivals = [
            row["median"]
            for label, row in entry["rows"].items()
            if not label.startswith("petal") and not row.get("floor")
        ]
        if entry["rows"][row.ours]["median"] * (1 + entry["drift"]) >= min(rivals):
            return False
    return True


def _saved_cells(row: Saved, columns: dict[str, str]) -> list[str]:
    entries = [_entry(row.file, name, "full")["rows"] for name in row.scenarios]

    def of(label: str) -> str:
        if not all(label in rows and "saved_bytes" in rows[label] for rows in entries):
            return ""
        return " / ".join(f"{rows[label]['saved_bytes'] / 1e6:.1f}" for rows in entries)

    cells = [of(label) for label in columns]
    return [row.label, f"{cells[0]} MB", *cells[1:], f"**{of('petal')}**", "exact"]


def _table(name: str) -> str:
    columns = WITH_PEFT if name.startswith("lora") else COLUMNS
    head = f"| | {' | '.join(columns.values())} | petal_kernels | drift |"
    lines = [_line(row, columns) for row in TABLES[name]]
    return "\n".join([head, "|---" * (len(columns) + 3) + "|", *lines])


def _lora_step() -> str:
    """What LoRA adds to a whole step, with and without dropout."""
    said = []
    for p in ("0.05", "0.0"):
        found = results(_LLAMA)
        name, entry = next(
            (n, e) for (n, mode), e in found.items() if mode == "full" and f"dropout {p}," in n
        )
        rows = entry["rows"]
        floor = next(r["median"] for r in rows.values() if r.get("floor"))
        added = {k: 100 * (rows[k]["median"] / floor - 1) for k in ("peft", "petal")}
        kept = {k: rows[k]["saved_bytes"] / 1e6 for k in ("peft", "petal")}
        said.append(
            f"with dropout {float(p):g} PEFT adds {added['peft']:.0f} % to the frozen step and "
            f"petal_kernels {added['petal']:.0f} % (drift {100 * entry['drift']:.1f} %), and "
            f"{kept['peft']:.0f} and {kept['petal']:.0f} MB are kept for backward"
        )
    size = re.search(r"\w+, B=\d+ L=\d+ r=\d+", name)
    return (
        f"A whole step of a Llama without a head, fp32, with LoRA on all linears (`... model "
        f"llama`, {size and size[0]}):\n{said[0]};\n{said[1]}."
    )


def _lora_memory() -> str:
    """What `petal-kernels memory --compare lora-layer` printed."""
    document = json.loads((RESULTS / f"{_LORA_MEMORY}.json").read_text())
    kept = [
        Kept(f["form"], f["bytes"], f["times_x"], targets=f["targets"]) for f in document["forms"]
    ]
    command = re.sub(r" --json(=| )\S+", "", document["command"])
    lines = [f"$ {command}", document["title"], "", table(kept)]
    return "\n".join(["```", *lines, "```"])


def _whole_step() -> str:
    name, entry = next((n, e) for (n, mode), e in results(_QFORMER).items() if mode == "full")
    size = re.search(r"(\d+ layers, )?B=\d+ L=\d+", name)
    rows = entry["rows"]
    # Files of before `floor` was an entry's own call it "frozen".
    floor = next(r["median"] for k, r in rows.items() if r.get("floor") or k == "frozen")
    added = {k: 100 * (rows[k]["median"] / floor - 1) for k in ("published", "petal")}
    (overhead,) = results(_OVERHEAD).values()
    micro = overhead["microseconds"]
    raw = next(v for k, v in micro.items() if k.startswith("raw"))
    return (
        f"A whole Q-Former step ({size and size[0]}, release; `... model qformer`): the adapters "
        f"add {added['published']:.1f} % to the frozen step in the published form and "
        f"{added['petal']:.1f} % fused (drift {100 * entry['drift']:.1f} %). A tiny "
        f"`lowrank_linear` call\ncosts {micro['public, no grad']:.0f} us of host time without and "
        f"{micro['public, grad']:.0f} us with gradients, {raw:.0f} us of it the raw backend "
        "(`... overhead`)."
    )


def _demo() -> str:
    """The demo's report, and that of its other methods, as `petal-kernels demo` wrote them."""
    report = json.loads((RESULTS / f"{_DEMO}.json").read_text())
    methods = json.loads((RESULTS / f"{_DEMO_METHODS}.json").read_text())
    word, before, after = report["question"], report["before"], report["after"]
    moved = max(100 * abs(after[q] - before[q]) for q in before if q != word)
    compared, added = report["comparison"], {}
    for key, unit in (("milliseconds", 1.0), ("saved_bytes", 1e6)):
        values = compared[key]
        added[key] = [(values[form] - values["frozen"]) / unit for form in ("fused", "published")]
    ms, kept = added["milliseconds"], added["saved_bytes"]
    scores = [f"{m['label']} {100 * m['after'][word]:.1f} %" for m in methods.values()]
    steps = [m["comparison"]["milliseconds"] for m in methods.values()]
    slower = sorted(100 * (step["fused"] / step["published"] - 1) for step in steps)
    agree = all(m["comparison"]["agrees"] for m in (report, *methods.values()))
    curves = "coincide" if agree else "differ"
    left = report["baselines"]["always the left digit"]
    return (
        f"`make demo` ({report['comparison']['total'] / 1e6:.0f} M parameters, real digits): "
        f'"{word}", a word the model never saw, goes from {100 * before[word]:.1f} % to '
        f"{100 * after[word]:.1f} % on held-out\npictures (always-left would score "
        f"{100 * left:.1f} %) with {compared['trainable_percent']:.2f} % of the parameters, "
        f"{report['settings']['experts']} instruction experts among them, whose shares it prints "
        f"by instruction;\nold instructions stay within {moved:.1f} points; the adapter adds "
        f"{ms[0]:.0f} ms to a step instead of {ms[1]:.0f} and keeps {kept[0]:.1f} MB for backward "
        f"instead of {kept[1]:.1f}.\n`petal-kernels demo --method all` does the same on a small "
        f"BART and GPT-2: {', '.join(scores)};\nfused and published curves {curves}; at this width "
        f"(128, one thread) the fused step takes {slower[0]:+.0f} to {slower[-1]:+.0f} % against "
        "the eager one."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    name: functools.partial(_table, name) for name, rows in TABLES.items() if rows
} | {"whole_step": _whole_step, "demo": _demo, "lora_memory": _lora_memory}
if _LLAMA:
    BLOCKS["lora_step"] = _lora_step


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and every page of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def blocks_of(text: str) -> list[str]:
    """The names of a page's blocks."""
    return [match[2] for match in _BLOCK.finditer(text)]


def render(text: str) -> str:
    """`text` with every block written anew. ValueError where one is unknown."""
    unknown = sorted(set(blocks_of(text)) - BLOCKS.keys())
    if unknown:
        raise ValueError(f"blocks: want some of {sorted(BLOCKS)}, got {unknown}")
    # A blank line on both sides: without it markdown takes a table for text.
    return _BLOCK.sub(lambda m: f"{m[1]}\n{BLOCKS[m[2]]()}\n\n{m[3]}", text)


def rendered(root: Path = ROOT) -> dict[Path, tuple[str, str]]:
    """Of every page what stands there and what should. ValueError where a block is in none."""
    old = {path: path.read_text(encoding="utf-8") for path in pages(root)}
    missing = sorted(BLOCKS.keys() - {name for text in old.values() for name in blocks_of(text)})
    if missing:
        raise ValueError(f"pages: want the blocks {sorted(BLOCKS)}, got none of {missing}")
    found = {path: (text, render(text)) for path, text in old.items()}
    picture = root / PICTURE
    drawn = picture.read_text(encoding="utf-8") if picture.exists() else ""
    made = demo_picture()
    # Another matplotlib draws the same figures with other curves: what the picture says counts.
    found[picture] = (drawn, drawn if _texts(drawn) == _texts(made) else made)
    return found


def demo_picture() -> str:
    """The demo's chart of its committed report."""
    from petal_kernels.tools.demo.chart import chart

    return chart(json.loads((RESULTS / f"{_DEMO}.json").read_text()))


def _texts(picture: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or write; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.tables", description=__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="compare only (the default)")
    group.add_argument("--write", action="store_true", help="write the pages and the picture")
    args = parser.parse_args(arguments)
    with exits.refusing(parser, ValueError, KeyError, OSError):
        found = {path: texts for path, texts in rendered(ROOT).items() if texts[0] != texts[1]}
    for path, (old, new) in found.items():
        if args.write:
            path.write_text(new, encoding="utf-8")
            continue
        name = path.relative_to(ROOT).as_posix()
        lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, "results")
        sys.stdout.writelines(lines)
    return exits.BROKEN_BOUND if found and not args.write else exits.FINE


if __name__ == "__main__":
    sys.exit(exits.run(main, "python -m benchmarks.tables"))
