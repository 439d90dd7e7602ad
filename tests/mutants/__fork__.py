"""Runs pytest in forks of a process that has torch and transformers imported: a run then costs
what its tests cost.

A line of standard input is a JSON list of pytest arguments; its answer, a line of standard output,
is a JSON list of the exit code (negative: the signal that ended it) and what pytest printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile

import pytest
import torch  # noqa: F401

with contextlib.suppress(ImportError):
    from transformers import (  # noqa: F401
        BartForConditionalGeneration,
        GPT2LMHeadModel,
        InstructBlipForConditionalGeneration,
        LlamaForCausalLM,
        T5ForConditionalGeneration,
    )
with contextlib.suppress(ImportError):
    import peft  # noqa: F401


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of one fork's pytest."""
    with tempfile.TemporaryFile() as log, open(os.devnull) as nothing:
        child = os.fork()
        if child == 0:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = 70
            try:
                code = int(pytest.main(arguments))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        return code, log.read().decode(errors="replace")


def main() -> None:
    early = {"petal_kernels", "tests.conftest"} & set(sys.modules)
    assert not early, f"imported before the fault is planted: {sorted(early)}"
    # Some tests interrupt programs; a shell's background jobs ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
