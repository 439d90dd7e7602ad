"""Helpers for testing Triton kernels without a GPU: a faster interpreter, traffic counts,
canaries."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def hasten_interpreter() -> None:
    """Patch the language once per launch in place of once per device-function call.

    The interpreter swaps ``triton.language``'s members anew at every call of a device function from
    a kernel, which costs more than running it. Nothing else changes. Safe to call twice; does
    nothing outside the interpreter.
    """
    from triton.runtime import interpreter

    if hasattr(interpreter, "petal_patched"):
        return
    patch_lang, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    interpreter.petal_patched = patched = set()

    @functools.cache
    def languages(fn: Any) -> frozenset[str]:
        modules = {"tl": interpreter.tl, "core": interpreter.tl.core}
        visible = {id(v) for v in fn.__globals__.values()}
        return frozenset(name for name, module in modules.items() if id(module) in visible)

    def patch_once(fn: Any) -> Any:
        seen = languages(fn)
        if seen in patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        patched.add(seen)
        return scope

    numpy_type = functools.lru_cache(maxsize=None)(interpreter._get_np_dtype)

    def quick_numpy_type(t: Any) -> Any:
        scalar = t.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else numpy_type(scalar)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return call(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run
    interpreter._get_np_dtype = quick_numpy_type
