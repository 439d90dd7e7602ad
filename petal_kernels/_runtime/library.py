"""The one handle on ``torch.library``: every raw operator lives in the namespace ``petal``.

Raw operators are private and functional: their outputs alias neither an argument nor each other,
and they write into no argument but one that their schema marks, a fresh gradient that nobody else
reads. Gradients are attached one level up, by the ``autograd.Function`` of each ``op.py``.

The dispatcher costs a call that leads from Python to Python more than a small kernel does. Where
nobody would see it pass (`front.signature`) a call goes straight to the implementation, and to the
backend that was chosen for the first call of its signature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from petal_kernels._runtime import front
from petal_kernels._runtime.backends import Explanation

NAMESPACE = "petal"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# By overload: what calls it, see `define`.
calls: dict[Any, Callable[..., Any]] = {}

# By overload: what compiled calls of other operators need to run it too, see `define`.
compiled: dict[Any, Callable[..., Any]] = {}

# By overload: which backend would run it on these very arguments, see `define`.
explainers: dict[Any, Callable[..., Explanation | None]] = {}


def define(
    schema: str,
    prepare: Callable[..., Callable[..., Any]],
    fake: Callable[..., Any],
    explain: Callable[..., Explanation | None] | None = None,
    settings: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``petal::<schema>`` and return what calls it, with every argument by position.

    ``prepare`` takes the arguments, real tensors of any device, and gives what runs on them: a
    function of them that also serves every other call of the same signature, and remembers none of
    their tensors. ``fake`` says shapes, dtypes and devices only and serves meta tensors, fake
    tensors and ``torch.compile``; ``explain`` takes the same arguments, fake or real, and says
    which backend would run, or None where none would; ``settings`` what a compiled call
    (``front.py``) must know to run the same kernels on them, or None where it could not.
    """
    name = schema.split("(", 1)[0].strip()

    def whole(*args: Any) -> Any:
        # The dtypes were settled by whoever called: a product that autocast rounds again inside an
        # operator would silently change its result.
        with torch._C._DisableAutocast():
            return prepare(*args)(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, whole, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if explain is not None:
        explainers[overload] = explain
    if settings is not None:
        compiled[overload] = settings
    if "!" in schema:  # the dispatcher tells autograd what is written to
        return overload  # type: ignore[no-any-return]
    known: front.Known[Callable[..., Any]] = front.Known()

    def direct(*args: Any) -> Any:
        key = front.signature(args)
        if key is None:
            return overload(*args)
        run = known.get(key)
        if run is None:
            run = known.keep(key, prepare(*args))
        return run(*args)

    calls[overload] = direct
    return direct
