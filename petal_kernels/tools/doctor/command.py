"""``petal-kernels doctor``: is this installation right, and what would make it faster?

Prints versions, devices and compiled parts, then checks every backend of every operator that can
run here against an fp64 reference: forward and all gradients, by the rule of the test suite. Exit
code 0 when no check failed, 1 when one did.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import petal_kernels as pk
from petal_kernels._runtime.backends import ENVIRONMENT_VARIABLE
from petal_kernels.tools.doctor import facts, report, selfcheck

_HELP = (__doc__ or "").replace("``", "")
_RULE = (
    "parity: error against fp64 as a share of what is allowed "
    "(1.00: twice that of plain torch, gradients three times)"
)


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Look, check, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="petal-kernels doctor", description=_HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--all", action="store_true", help="every case, not a selection")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="without a GPU, run the Triton kernels in Triton's interpreter",
    )
    options = parser.parse_args(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which is later
    looked = {"versions": facts.versions(), "devices": facts.devices(), "built": facts.built()}
    if not options.json:
        print(f"{report.versions(looked['versions'])}\n\n{report.devices(looked['devices'])}")
        print(f"\n{report.built(looked['built'])}\n\n{_RULE}", flush=True)
    lines = []
    count = None if options.all else selfcheck.CASES
    with pk.use_backend("auto"):  # a backend that PETAL_BACKEND names would answer for all
        for line in selfcheck.check_all(count, options.interpret):
            lines.append(line)
            if not options.json:
                print(report.line(line), flush=True)
        choices = list(selfcheck.choices())
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    failed = [line for line in lines if line.status == "fail"]
    if options.json:
        parity = [_finite(asdict(line)) for line in lines]
        chosen = {"choices": choices, ENVIRONMENT_VARIABLE: named}
        document = {**looked, "parity": parity, **chosen, "ok": not failed}
        print(json.dumps(document, indent=1))
        return 1 if failed else 0
    print(f"\n{report.choices(choices)}")
    print(f"  {ENVIRONMENT_VARIABLE}={named} takes its place here\n" if named else "")
    if any(line.status == "refused" for line in lines):
        print(f"{report.remedies(lines)}\n")
    if failed:
        names = ", ".join(f"{line.operator} {line.backend}" for line in failed)
        print(f"WRONG RESULTS: {names}. Please report this with the output of --json.")
        return 1
    ran = sum(line.status == "pass" for line in lines)
    print(f"{ran} of {len(lines)} backends run here and are right.")
    return 0
