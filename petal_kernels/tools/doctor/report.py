"""The doctor's report as text, one fact per line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from petal_kernels._runtime.columns import rounded
from petal_kernels.tools.colours import BOLD, GREEN, RED, YELLOW, painted
from petal_kernels.tools.doctor.selfcheck import Line

_COLOURS = {"pass": GREEN, "fail": f"{RED};{BOLD}", "refused": YELLOW}
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_SHOWN_FAULTS = 3


def versions(found: dict[str, str | None]) -> str:
    """The versions, what is missing last."""
    here = [f"{name} {version}" for name, version in found.items() if version is not None]
    absent = [name for name, version in found.items() if version is None]
    lines = ["versions", "  " + ", ".join(here)]
    if absent:
        lines.append("  without " + ", ".join(absent))
    return "\n".join(lines)


def devices(found: dict[str, Any]) -> str:
    """The CPU and every GPU."""
    cpu = found["cpu"]
    able = ", ".join(cpu["instructions"]) or f"torch uses {cpu['torch_capability']}"
    lines = ["devices", f"  cpu   {cpu['name']}: {able}, {cpu['threads']} threads"]
    for i, gpu in enumerate(found["gpus"]):
        lines.append(
            f"  gpu {i} {gpu['name']}: capability {gpu['capability']}, "
            f"{gpu['memory_gib']} GiB, {gpu['processors']} multiprocessors"
        )
    if not found["gpus"]:
        lines.append("  gpu   none that torch can use")
    if found["driver"]:
        lines.append(f"  driver {found['driver']}")
    return "\n".join(lines)


def built(found: dict[str, Any]) -> str:
    """What was compiled, and by what."""
    lines = ["compiled kernels"]
    for name, part in found["parts"].items():
        state = f"{part['mib']} MiB" if part["missing"] is None else f"none: {part['missing']}"
        lines.append(f"  {name:<5} {part['library']}: {state}")
    facts = found["facts"]
    if facts:
        archs = facts.get("cuda_archs") or "none"
        lines.append(
            f"  by {facts['compiler']}, instruction sets {facts['isas']}, CUDA {archs}, "
            f"commit {facts['commit']}"
        )
    return "\n".join(lines)


def line(found: Line) -> str:
    """One backend of one operator."""
    word = "no" if found.status == "refused" else found.status
    shown = painted(f"{word:<4}", _COLOURS[found.status])
    head = f"  {found.operator:<17}{found.backend:<8}{shown}  "
    if found.status == "refused":
        return f"{head}{found.reason}"
    dtypes = " ".join(_SHORT[d] for d in found.dtypes)
    text = f"{head}{found.checks:3} checks, worst {rounded(found.ratio, 2)}  {dtypes}"
    for fault in found.faults[:_SHOWN_FAULTS]:
        text += f"\n{'':>31}{fault}"
    if len(found.faults) > _SHOWN_FAULTS:
        text += f"\n{'':>31}and {len(found.faults) - _SHOWN_FAULTS} more (--json lists them)"
    return text


def remedies(found: Sequence[Line]) -> str:
    """What to do about the refusals, each once."""
    lines = ["to run the rest"]
    for line in found:
        if line.remedy is not None:
            lines.append(f"  {line.backend}: {line.reason}\n      -> {line.remedy}")
    return "\n".join(dict.fromkeys(lines))


def choices(found: list[dict[str, str]]) -> str:
    """What auto takes."""
    lines = ["auto, in training"]
    lines += [
        f"  {c['operator']:<17}{c['choice']}  ({c['shape']}, {_SHORT[c['dtype']]})" for c in found
    ]
    return "\n".join(lines)
