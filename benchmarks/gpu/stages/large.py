"""More than 2^31 elements: tensors that are that long, and short ones spread that far apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.suite import DTYPES, Case, Suite, changes
from petal_kernels.tools import operators, parity

SHARE, LIMIT, PARALLEL, CHECKS = 4.0, 240.0, False, True
_ELEMENTS = 2**31
_REHEARSED_REPEATS = 3
_TENSORS = 16  # of full length that a training step may have at once, to see whether it fits
_DTYPE = "float16"
_ROWS = ("x", "base", "hidden", "mask", "indices")  # and the workload's ACTIVATIONS


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """Per operator and backend: the first and last shape repeated, and the second small case
    spread."""
    found = []
    for op in suite.operators():
        shapes = suite.shapes(op)
        for backend in suite.kernels:
            base = {"op": op.name, "backend": backend, "dtype": _DTYPE}
            few = suite.dry and backend == "triton"  # the interpreter takes seconds
            for shape in shapes[:1] if few else (shapes[0], shapes[-1]):
                if not hasattr(shape, "lead"):
                    continue
                dull = changes(shape, dropout=0.0)  # a mask depends on the row's number
                found.append(
                    base
                    | {"id": f"large/{op.name}/{backend}/long {shape.name}", "kind": "long"}
                    | {"shape": shape.name, "changes": dull}
                )
            shape = op.workload.CASES[1]
            if not few:
                found.append(
                    base
                    | {"id": f"large/{op.name}/{backend}/spread {shape.name}", "kind": "spread"}
                    | {"shape": shape.name}
                )
    return found


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """One case; skipped where the backend declines or memory does not suffice."""
    op, shape = suite.shape(case)
    reason = parity.refusal(op, shape, case["backend"], suite.inputs(case))
    if reason is not None:
        return {"status": "skip", "reason": reason}
    try:
        return _spread(case, suite) if case["kind"] == "spread" else _long(case, suite)
    except torch.cuda.OutOfMemoryError as e:
        return {"status": "skip", "reason": str(e)[:200]}


def far_apart(t: Tensor) -> Tensor:
    """The same values, the rows of the first dim so far apart that the last lies beyond 2^31
    elements."""
    stride = _ELEMENTS // (t.shape[0] - 1) + 1
    buffer = torch.empty(stride * (t.shape[0] - 1) + t[0].numel(), dtype=t.dtype, device=t.device)
    return buffer.as_strided(t.shape, (stride, *t.contiguous().stride()[1:])).copy_(t)


def _spread(case: Case, suite: Suite) -> dict[str, Any]:
    op, shape = suite.shape(case)
    names = operators.trainable(op, shape)
    given = operators.options(op, shape) | {"backend": case["backend"]}
    inputs = suite.inputs(case)
    near = operators.run(op.public, inputs, names, **given)
    moved = inputs | {names[0]: far_apart(inputs[names[0]])}
    far = operators.run(op.public, moved, names, **given)
    pairs = zip(
        (*near[0], *(g for _, g in near[1])), (*far[0], *(g for _, g in far[1])), strict=True
    )
    faults = [f"result {i} differs" for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
    return {"status": "fail" if faults else "pass", "faults": faults}


def _repeat(value: Any, times: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_repeat(v, times) for v in value]
    return value.repeat(times, *(1,) * (value.dim() - 1)) if isinstance(value, Tensor) else value


def _long(case: Case, suite: Suite) -> dict[str, Any]:
    """The same rows many times over: every period of the result must be the first's, and with a
    gradient in the last period alone every parameter's gradient is that of one period."""
    op, shape = suite.shape(case)
    period, names = shape.lead[0], operators.trainable(op, shape)
    elements = shape.rows * shape.width
    times = _REHEARSED_REPEATS if suite.dry else _ELEMENTS // elements + 2
    need = _TENSORS * times * elements * DTYPES[_DTYPE].itemsize
    if not suite.dry and torch.cuda.mem_get_info()[0] < need:
        return {"status": "skip", "reason": f"needs {need / 2**30:.0f} GiB of free memory"}
    inputs = suite.inputs(case)
    exact_in = operators.map_tensors(inputs, lambda _, t: t.double())
    with torch.no_grad():
        found = op.reference.forward(**inputs)
    outs = [found] if isinstance(found, Tensor) else list(found)
    douts = [d.to(o) for d, o in zip(operators.output_gradients(outs), outs, strict=True)]
    exact, exact_grads = operators.run(op.reference.forward, exact_in, names, douts)
    plain, plain_grads = operators.run(op.reference.forward, inputs, names, douts)
    rows = {*_ROWS, *getattr(op.workload, "ACTIVATIONS", ())}
    many = {k: _repeat(v, times) if k in rows else v for k, v in inputs.items()}
    late = []
    for d in douts:
        whole = d.new_zeros((times * period, *d.shape[1:]))
        whole[-period:] = d
        late.append(whole)
    given = operators.options(op, shape) | {"backend": case["backend"]}
    got, grads = operators.run(op.public, many, names, late, **given)
    faults, worst = [], 0.0
    for i, (g, e, p) in enumerate(zip(got, exact, plain, strict=True)):
        for at in (0, times // 2, times - 1):
            part = g[at * period : (at + 1) * period]
            ratio, fault = parity.compare(f"output {i}, period {at}", part, e, p, 2.0)
            worst = max(worst, ratio)
            faults += [fault] if fault else []
    for (label, g), (_, e), (_, p) in zip(grads, exact_grads, plain_grads, strict=True):
        row = label.split("[")[0] in rows
        if row and bool(g[:period].count_nonzero()):
            faults.append(f"gradient of {label} is not zero where its output's is")
        part = g[-period:] if row else g
        ratio, fault = parity.compare(f"gradient of {label}", part, e, p, 3.0)
        worst = max(worst, ratio)
        faults += [fault] if fault else []
    status = "fail" if faults else "pass"
    size = {"elements": times * elements, "ratio": round(worst, 4)}
    return {"status": status, "faults": faults[:8]} | size


def report(records: list[Record]) -> list[str]:
    """A line per case."""
    return [
        f"- {r['op']} {r['backend']} {r['kind']} {r['shape']}: {r['status']}"
        + (f", {r['elements']:,} elements" if "elements" in r else "")
        + (f" ({r['reason']})" if "reason" in r else "")
        for r in records
    ]
