"""The one handle on ``torch.library``: every raw operator lives in the namespace ``petal``.

Raw operators are private and functional: their outputs alias neither an argument nor each other,
and they write into no argument but one that their schema marks, a fresh gradient that nobody else
reads. Gradients are attached one level up, by the ``autograd.Function`` of each ``op.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from petal_kernels._runtime.backends import Explanation

NAMESPACE = "petal"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# By overload: which backend would run it on these very arguments, see `define`.
explainers: dict[Any, Callable[..., Explanation | None]] = {}


def define(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    explain: Callable[..., Explanation | None] | None = None,
) -> Any:
    """Register ``petal::<schema>`` and return its overload, ready to call.

    ``impl`` runs on real tensors of any device; ``fake`` says shapes, dtypes and devices only and
    serves meta tensors, fake tensors and ``torch.compile``; ``explain`` takes the same arguments,
    fake or real, and says which backend ``impl`` would choose, or None where it would run none.
    """
    name = schema.split("(", 1)[0].strip()

    @functools.wraps(impl)
    def without_autocast(*args: Any) -> Any:
        # The dtypes were settled by whoever called: a product that autocast rounds again inside an
        # operator would silently change its result.
        with torch._C._DisableAutocast():
            return impl(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, without_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if explain is not None:
        explainers[overload] = explain
    return overload
