"""Compiled code under a function mode, for which it would be compiled again: refused, and until the
step ends run eagerly, so that what was compiled stays as it is.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

_DYNAMO = "torch._dynamo.eval_frame"
_CALLBACK = "_callback_from_stance"  # asked by every entry into compiled code
_REFUSED = (
    "model: parts of it are compiled (torch.compile), which CUDA's rules for attention and dropout "
    "do not reach; profile the model that was not compiled, or this one under "
    'torch.compiler.set_stance("force_eager"), or on real tensors with cuda_rules=False'
)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Raises ValueError at the end if this thread entered compiled code."""
    dynamo: Any = sys.modules.get(_DYNAMO)
    original = getattr(dynamo, _CALLBACK, None)
    if original is None:  # nothing has been compiled in this process
        yield
        return
    here, met = threading.get_ident(), []

    def callback(compiling: Any) -> Any:
        found = original(compiling)
        if threading.get_ident() != here or found is None:
            return found
        met.append(found)
        return None  # run what was compiled as it was written

    setattr(dynamo, _CALLBACK, callback)
    try:
        yield
    except Exception as error:
        if met:
            raise ValueError(_REFUSED) from error
        raise
    finally:
        setattr(dynamo, _CALLBACK, original)
    if met:
        raise ValueError(_REFUSED)
