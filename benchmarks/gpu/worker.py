"""The process that runs cases: one JSON line in, one JSON line out.

``python -m benchmarks.gpu.worker RESULT_FD MODULE SETTINGS``, where MODULE has
``run(case, settings) -> dict``. Results leave through their own descriptor, for libraries print.
The process ends when its input does (its parent has gone), after a CUDA error, which spoils the
context for every later case, and after a result that says ``spoilt`` itself.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

ERROR_LENGTH = 2000


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A case's result, or its exception as one."""
    begin = time.perf_counter()
    try:
        result = {"status": "pass"} | run()
    except Exception as e:
        text = "".join(traceback.format_exception(e))
        result = {"status": "error", "error": text[-ERROR_LENGTH:]}
    return result | {"seconds": round(time.perf_counter() - begin, 3)}


def _spoilt() -> bool:
    """Whether CUDA no longer works here; gives memory back otherwise."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def main() -> None:
    """Run cases until the input ends."""
    descriptor, module, settings = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        # Whatever is running, here or in a process of a case's: nobody waits for it any more.
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    stages = importlib.import_module(module)
    with os.fdopen(descriptor, "w") as out:

        def say(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        say({"ready": True})
        while True:
            case = json.loads(lines.get())
            result = attempt(functools.partial(stages.run, case, settings))
            spoilt = bool(result.pop("spoilt", False))
            if _spoilt():
                spoilt = True
                result["status"] = "error" if result["status"] == "pass" else result["status"]
            say(result | {"spoilt": spoilt})
            if spoilt:
                return


if __name__ == "__main__":
    main()
