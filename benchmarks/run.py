"""``python -m benchmarks.run``: time operators, layers and a whole Q-Former against their eager
forms.

    op [NAME ...]  every operator (or those named) at its workload's shapes, every backend that can
                   run: forward as in training, then forward and backward
    layer          PETAL's q, k, v of one attention: adapter part alone, whole layer, 16-bit layer,
                   saved bytes
    qformer        a full-width Q-Former step: frozen, published adapters, fused adapters
    plans          every plan of lowrank_linear against the planner's choice
    overhead       host microseconds of a tiny call: public function, and the raw backend underneath

The operators' tests run first and nothing is timed on red. Times are medians of interleaved
cold-cache rounds; the drift printed under a table is the run's own noise: ratios closer to 1 than
it are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import petal_kernels as pk
from petal_kernels.ops.lowrank_linear import op as lowrank_op
from petal_kernels.ops.lowrank_linear.arguments import Call, Settings, Tensors
from petal_kernels.tools import environment
from petal_kernels.tools.bench import scenarios, timing
from petal_kernels.tools.bench.qformer import QFormerCase, adapter_tax, qformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def gate(names: list[str]) -> None:
    """Run the operators' tests; exit 2 if they are red."""
    print(f"correctness first: {', '.join(names)} ...", flush=True)
    expression = f"({' or '.join(names)}) and (native or torch) and float32"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_ops.py", "-k", expression],
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output", flush=True)
    if done.returncode != 0:
        print(done.stdout[-3000:], file=sys.stderr)
        raise SystemExit(2)


def progress(done: int, total: int) -> None:
    """A one-line counter on a terminal, nothing in a log."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r  round {done}/{total}", end=end, file=sys.stderr, flush=True)


def table(name: str, rows: dict[str, timing.Timing], saved: dict[str, int]) -> dict[str, Any]:
    """Print one scenario and return it for the result file."""
    first = next(iter(rows.values())).median
    print(f"\n{name}")
    print(f"  {'provider':<16}{'ms':>10}{'p20':>10}{'p80':>10}{'x published':>13}{'saved MB':>10}")
    for label, t in rows.items():
        kept = f"{saved[label] / 1e6:10.2f}" if label in saved else f"{'':>10}"
        spread = f"{t.median:10.3f}{t.p20:10.3f}{t.p80:10.3f}"
        print(f"  {label:<16}{spread}{first / t.median:12.2f}x{kept}")
    print(f"  drift {100 * timing.drift(rows):.1f} %", flush=True)
    return {
        "scenario": name,
        "drift": round(timing.drift(rows), 4),
        "rows": {
            label: t.as_dict()
            | {"speedup": round(first / t.median, 4)}
            | ({"saved_bytes": saved[label]} if label in saved else {})
            for label, t in rows.items()
        },
    }


def run_scenario(
    scenario: scenarios.Scenario, device: torch.device, rounds: int, warmup: int = 3
) -> dict[str, Any]:
    """Count what each provider saves, then time them all."""
    saved = {
        label: scenarios.saved_bytes(forward, scenario.parameters)
        for label, forward in scenario.saved.items()
        if label != "compile"
    }
    rows = timing.compare(scenario.providers, device, rounds, warmup, progress)
    return table(scenario.name, rows, saved)


def bench_ops(
    names: list[str], dtype: torch.dtype, device: torch.device, rounds: int, quick: bool
) -> list[Any]:
    """Every shape of every named operator."""
    results = []
    for name in names:
        workload = importlib.import_module(f"petal_kernels.ops.{name}.workload")
        for case in workload.SHAPES[:2] if quick else workload.SHAPES:
            inputs = workload.make_inputs(case, dtype, device)
            explained = pk.explain(getattr(pk, name), **inputs)
            interpreted = device.type == "cpu"
            backends = [
                b for b, why in explained.rows if not why and not (b == "triton" and interpreted)
            ]
            for backward in (False, True):
                scenario = scenarios.operator(name, case, dtype, device, backends, backward)
                result = run_scenario(scenario, device, rounds)
                results.append(result | {"choice": explained.choice})
            print(f"  auto {explained.choice}")
    return results


def bench_layer(device: torch.device, rounds: int, quick: bool) -> list[Any]:
    """The layer rows of the README."""
    rows = 512 if quick else 4096
    cases = [
        scenarios.PetalLayer(rows=rows, outputs_given=True),
        scenarios.PetalLayer(rows=rows),
        scenarios.PetalLayer(rows=rows, dtype=torch.bfloat16),
    ]
    results = []
    for case in cases:
        slow = case.dtype != torch.float32 and device.type == "cpu"
        scenario = scenarios.petal_layer(case, device, compiled=not slow and not quick)
        if slow:
            results.append(run_scenario(scenario, device, 4, warmup=1))
        else:
            results.append(run_scenario(scenario, device, rounds))
    return results


def bench_qformer(device: torch.device, rounds: int, quick: bool) -> list[Any]:
    """The whole-model row: how much the adapters add to a frozen step."""
    case = QFormerCase(layers=2, batch=2) if quick else QFormerCase()
    scenario = qformer(case, device)
    result = run_scenario(scenario, device, rounds)
    tax = adapter_tax(result["rows"])
    print(
        "  adapter tax over the frozen step: "
        + ", ".join(f"{k} {100 * v:.1f} %" for k, v in tax.items())
    )
    return [result | {"adapter_tax": tax}]


def bench_plans(dtype: torch.dtype, device: torch.device, rounds: int, quick: bool) -> list[Any]:
    """Every plan of the selected backend against the planner's choice, inference and training."""
    workload = importlib.import_module("petal_kernels.ops.lowrank_linear.workload")
    results = []
    for case in workload.SHAPES[:1] if quick else workload.SHAPES:
        for training in (False, True):
            inputs = workload.make_inputs(case, dtype, device)
            if not training:
                inputs["dropout"] = 0.0
                inputs.pop("rng", None)
            results.append(_plans_of(case.name, inputs, training, device, rounds))
    worst = max((r["behind_best"] for r in results), default=0.0)
    print(f"\nthe planner is at most {100 * worst:.1f} % behind the best plan")
    return results


def _plans_of(
    name: str, inputs: dict[str, Any], training: bool, device: torch.device, rounds: int
) -> dict[str, Any]:
    def run(plan: str, backend: str) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(training):
                return pk.lowrank_linear(**inputs, plan=plan, backend=backend)

        return call

    if training:
        inputs["down" if inputs["down"] is not None else "hidden"].requires_grad_()
    with torch.set_grad_enabled(training):
        choice = pk.explain(pk.lowrank_linear, **inputs)
    providers = {}
    for name_of_backend in dict.fromkeys((choice.backend, "torch")):
        backend = next(b for b in lowrank_op.BACKENDS if b.name == name_of_backend)
        for plan in backend.load().PLANS:
            if training and plan == "merge":
                continue  # never chosen in training: it would form the merged weights each step
            step = run(plan, backend.name)
            with contextlib.suppress(ValueError):  # a plan that does not apply to this case
                step()
                providers[f"{backend.name} {plan}"] = step
    rows = timing.compare(providers, device, rounds, progress=progress)
    best = min(t.median for t in rows.values())
    label = f"{choice.backend} {choice.plan}"
    behind = rows[label].median / best - 1.0
    print(f"\n{name}, {'training' if training else 'inference'}: planner takes {label}")
    for provider, t in rows.items():
        print(f"  {provider:<18}{t.median:10.3f} ms")
    noise = timing.drift(rows)
    print(f"  behind the best {100 * behind:.1f} %, drift {100 * noise:.1f} %", flush=True)
    return {
        "scenario": f"plans {name} {'training' if training else 'inference'}",
        "choice": label,
        "behind_best": round(behind, 4),
        "drift": round(noise, 4),
        "milliseconds": {k: round(t.median, 4) for k, t in rows.items()},
    }


def bench_overhead(device: torch.device, rounds: int) -> list[Any]:
    """One row of 16 values: nothing but the path from the public function to the kernel."""
    x, u = torch.ones(1, 16, device=device), torch.ones(4, 16, device=device)
    ups, base = [torch.ones(16, 4, device=device)], [torch.ones(1, 16, device=device)]
    trained = x.clone().requires_grad_()
    name = next(
        b
        for b, why in pk.explain(pk.lowrank_linear, x, u, ups, base=base).rows
        if not why and b != "triton"
    )
    impl = next(b for b in lowrank_op.BACKENDS if b.name == name).load()
    calls = 200

    def repeat(f: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(calls):
                f()

        return run

    call = Call(Tensors(x, u, None, ups, [], [], base, None), Settings(1.0, 0.0, "bottleneck"))
    rows = timing.compare(
        {
            f"raw {name}": repeat(lambda: impl.forward(call, None, "update")),
            "public, no grad": repeat(lambda: pk.lowrank_linear(x, u, ups, base=base)),
            "public, grad": repeat(lambda: pk.lowrank_linear(trained, u, ups, base=base)),
        },
        device,
        rounds,
    )
    print("\nhost overhead of one lowrank_linear call, microseconds")
    micro = {k: round(t.median / calls * 1e3, 2) for k, t in rows.items()}
    for label, value in micro.items():
        print(f"  {label:<20}{value:8.1f}")
    return [
        {"scenario": "host overhead", "microseconds": micro, "drift": round(timing.drift(rows), 4)}
    ]


def command(arguments: list[str]) -> str:
    """What was typed, to be typed again; where the result went is left out."""
    kept = list(arguments)
    if "--json" in kept:
        at = kept.index("--json")
        del kept[at : at + 2]
    return " ".join(("python -m benchmarks.run", *(a for a in kept if a[:7] != "--json=")))


def main(argv: list[str] | None = None) -> int:
    """Parse, gate, time, write."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("what", choices=["op", "layer", "qformer", "plans", "overhead"])
    parser.add_argument("names", nargs="*", help="operators, default all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, to see that everything runs"
    )
    parser.add_argument(
        "--no-gate",
        action="store_true",
        help="skip the tests (their result is not then vouched for)",
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    known = sorted(
        p.parent.name for p in (environment.ROOT / "petal_kernels" / "ops").glob("*/op.py")
    )
    unknown = [n for n in args.names if n not in known]
    if unknown:
        parser.error(f"names: want some of {', '.join(known)}, got {', '.join(unknown)}")
    if not args.no_gate:
        gate(args.names or known)
    if args.what == "op":
        results = bench_ops(
            args.names or known, DTYPES[args.dtype], device, args.rounds, args.quick
        )
    elif args.what == "layer":
        results = bench_layer(device, args.rounds, args.quick)
    elif args.what == "plans":
        results = bench_plans(DTYPES[args.dtype], device, args.rounds, args.quick)
    elif args.what == "overhead":
        results = bench_overhead(device, args.rounds)
    else:
        results = bench_qformer(device, max(4, args.rounds // 2), args.quick)
    document = {
        "environment": environment.describe(args.threads),
        "command": command(sys.argv[1:] if argv is None else argv),
        "results": results,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"\nwritten {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
