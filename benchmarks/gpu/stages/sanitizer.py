"""The small cases under NVIDIA's compute-sanitizer, in a process of their own.

A case passes where the tool has said that it found nothing: a tool that did not attach says that
too, or nothing at all. What it finds in kernels of the libraries around ours is told, and no fault.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.suite import DTYPES, Case, Suite
from petal_kernels.tools import operators, parity

SHARE, LIMIT, PARALLEL, CHECKS = 8.0, 300.0, True, True
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_CASES = (1, 4, 6)  # of each operator's small ones: odd sizes, another plan or gate
_TOOLKIT = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_FOUND = 99
_CLEAN = "SUMMARY: 0 "
_ABSENT = re.compile("^=+ .*(before first instrumented|Internal|[Nn]ot supported|Unable)", re.M)
_WHERE = re.compile(r"^=+ .*\bat (?!0x)(.+)", re.M)
_TAIL, _LINE = 1500, 200
_BODY = "from benchmarks.gpu.stages import sanitizer; sanitizer.body({!r})"


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """Per tool, operator and backend of ours."""
    found = []
    for tool in TOOLS[:1] if suite.dry else TOOLS:
        for op in suite.operators()[-1:] if suite.dry else suite.operators():
            for backend in suite.kernels[:1] if suite.dry else suite.kernels:
                found.append(
                    {
                        "id": f"sanitizer/{tool}/{op.name}/{backend}",
                        "tool": tool,
                        "op": op.name,
                        "backend": backend,
                        "dtypes": [suite.dtype, "float32"],
                    }
                )
    return found


def body(text: str) -> None:
    """What runs under the tool: the operator alone, since poisoned memory or a reference would
    hide what the tool looks for."""
    case = json.loads(text)
    suite = Suite(**case["suite"])
    op = suite.operator(case["op"])
    for dtype in dict.fromkeys(case["dtypes"]):
        for shape in (op.workload.CASES[i] for i in _CASES):
            inputs = op.workload.make_inputs(shape, DTYPES[dtype], suite.device)
            if parity.refusal(op, shape, case["backend"], inputs) is None:
                given = operators.options(op, shape) | {"backend": case["backend"]}
                operators.run(op.public, inputs, operators.trainable(op, shape), **given)
                print("ran", shape.name, dtype, flush=True)


def _command(case: Case) -> list[str] | None:
    """The tool and its options; None where there is none."""
    home = os.environ.get("CUDA_HOME", "")
    places = (os.environ.get("PATH", ""), f"{home}/bin" if home else "", *_TOOLKIT)
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(filter(None, places)))
    if tool is None:
        return None
    options = ["--error-exitcode", str(_FOUND), "--target-processes", "application-only"]
    options += ["--show-backtrace", "no"]
    if case["tool"] == "memcheck":  # torch asks the driver for what older ones do not have
        options += ["--report-api-errors", "no"]
    return [tool, "--tool", case["tool"], *options]


def verdict(case: Case, code: int, text: str, ran: int) -> dict[str, Any]:
    """What the tool's exit code and words say."""
    if code == _FOUND:
        where = list(dict.fromkeys(_WHERE.findall(text)))
        if not where or any("petal" in w or case["op"] in w for w in where):
            # The findings are at the front, their summary at the end.
            return {"status": "fail", "faults": [text[:_TAIL], text[-_TAIL:]]}
        return {"status": "skip", "reason": f"findings in others' kernels only: {where[0][:120]}"}
    if code and (ran or "Traceback" in text):
        return {"status": "error", "error": text[-_TAIL:]}
    if code or _ABSENT.search(text) or _CLEAN not in text:
        return {"status": "skip", "reason": f"the tool did not attach: {text[-_LINE:].strip()}"}
    return {} if ran else {"status": "skip", "reason": "the backend declines every case"}


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """Run the tool; in a rehearsal, the process without it."""
    prefix = [] if suite.dry else _command(case)
    if prefix is None:
        return {"status": "skip", "reason": "compute-sanitizer is not on PATH"}
    text = json.dumps(case | {"suite": {"dry": suite.dry}})
    try:
        done = subprocess.run(
            [*prefix, sys.executable, "-c", _BODY.format(text)],
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT - 20,
            # The caching allocator hands out memory that is neither out of bounds nor unwritten.
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    except subprocess.TimeoutExpired as e:
        out = (e.stdout or b"").decode(errors="replace") if isinstance(e.stdout, bytes) else ""
        return {
            "status": "skip",
            "reason": f"too slow under the tool; {out.count('ran ')} cases ran",
            "spoilt": True,  # so that the process under the tool ends, too
        }
    ran, text = done.stdout.count("ran "), done.stdout + done.stderr
    said = text if prefix else text + _CLEAN
    return verdict(case, done.returncode, said, ran) | {"ran": ran}


def report(records: list[Record]) -> list[str]:
    """A line per tool."""
    lines = []
    for tool in TOOLS:
        found = [r for r in records if r["tool"] == tool]
        clean = sum(r["status"] == "pass" for r in found)
        ran = sum(r.get("ran", 0) for r in found)
        reasons = sorted({r["reason"] for r in found if "reason" in r})
        note = f" ({'; '.join(reasons)})" if reasons else ""
        lines += [f"- {tool}: {clean} of {len(found)} clean, {ran} cases{note}"] if found else []
    return lines
