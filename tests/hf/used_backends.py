"""What each place of an adapted model runs on: the recorded forwards of a real call, by place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from petal_kernels.hf.methods.experts import Mixture
from petal_kernels.hf.methods.insertion import AfterBlock
from petal_kernels.hf.methods.lora_parts import FusedMlp
from petal_kernels.hf.methods.petal import Served
from petal_kernels.hf.wrappers import AdaptedLinear
from tests.ops.record_backends import Used, record_backends

SHARED = "what a stack's forward makes for its layers"
ELSEWHERE = "elsewhere"


@dataclass
class Place:
    """The forwards of one place, and what they were given: (samples, tokens) of each call."""

    used: list[Used] = field(default_factory=list)
    tokens: set[tuple[int, ...]] = field(default_factory=set)


@contextlib.contextmanager
def used_by_place(attachment: Any) -> Iterator[dict[str, Place]]:
    """Grows by what every place's own call computes in this block. Of a group the member that is
    called first computes all."""
    names = {id(wrapper): place.path for place, _, _, wrapper in attachment.installed.wrapped}
    names |= {id(part): path for path, part in getattr(attachment.method, "parts", {}).items()}
    found: dict[str, Place] = {}
    running = [ELSEWHERE]

    with contextlib.ExitStack() as stack:
        used = stack.enter_context(record_backends())

        def settle() -> None:
            if used:
                found.setdefault(running[-1], Place()).used.extend(used)
                used.clear()

        def watch(owner: Any, name: str, path: Callable[[Any], str]) -> None:
            real = getattr(owner, name)

            def run(self: Any, *args: Any, **kwargs: Any) -> Any:
                settle()
                running.append(path(self))
                x = getattr(args[0], "h", args[0])
                place = found.setdefault(running[-1], Place())
                place.tokens.add(tuple(getattr(x, "shape", ())[:-1]))
                try:
                    return real(self, *args, **kwargs)
                finally:
                    settle()
                    running.pop()

            stack.enter_context(mock.patch.object(owner, name, run))

        watch(AdaptedLinear, "forward", lambda wrapper: names[id(wrapper)])
        real_mlp = FusedMlp.forward

        def mlp(self: Any, module: Any, run: Any, args: Any, kwargs: Any) -> Any:
            """All that a joined MLP runs is its first adapted member's."""
            paths = [names[id(m)] for m in self.members.values() if id(m) in names]
            if self._input(module, args, kwargs) is None:
                return real_mlp(self, module, run, args, kwargs)
            settle()
            running.append(paths[0])
            for path in paths:
                found.setdefault(path, Place()).tokens.add(tuple(args[0].shape[:-1]))
            try:
                return real_mlp(self, module, run, args, kwargs)
            finally:
                settle()
                running.pop()

        stack.enter_context(mock.patch.object(FusedMlp, "forward", mlp))
        for name in ("run", "finish"):
            watch(AfterBlock, name, lambda part: names[id(part)])
        watch(Mixture, "serve", lambda mixture: mixture.path)
        watch(Served, "call", lambda part: next(iter(part.method.experts())))
        watch(type(attachment.method), "share", lambda method: SHARED)
        yield found
        settle()
