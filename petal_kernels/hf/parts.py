"""How a model's own modules take part in an attachment: a mixin in front of a module's class.

`call` of a part runs around everything a caller of the module gets, hooks of others included;
`forward` inside these hooks and, for layers, inside the checkpointed region. The class keeps its
name, the module its place, its children and its hooks; `detach` assigns the own class back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from petal_kernels.hf.context import (
    SWITCHED,
    THREAD,
    Call,
    Frame,
    Given,
    Running,
    in_backward,
)

if TYPE_CHECKING:
    from petal_kernels.hf.found import Layer, Site
    from petal_kernels.hf.frozen import Watch
    from petal_kernels.hf.method import Hand, Method

Run = Callable[..., Any]


class Part:
    """What is added to one module; a plain object, copied and pickled with the model."""

    needed: ClassVar[bool] = True  # something is lost where the module is replaced

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        """What a caller of the module gets; `run` is the module without this part."""
        return run(*args, **kwargs)

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        """The module's forward, as its hooks see it."""
        return run(*args, **kwargs)


class Both(Part):
    """Two parts of one module: `outer` around `inner`."""

    def __init__(self, outer: Part, inner: Part) -> None:
        self.outer, self.inner = outer, inner

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return self.inner.call(module, run, args, kwargs)

        return self.outer.call(module, inner, args, kwargs)

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return self.inner.forward(module, run, args, kwargs)

        return self.outer.forward(module, inner, args, kwargs)


PartT = TypeVar("PartT", bound=Part)


def within(part: Part | None, kind: type[PartT]) -> PartT | None:
    """A part, or one of those that it joins, of that kind."""
    if isinstance(part, Both):
        found = within(part.outer, kind)
        return within(part.inner, kind) if found is None else found
    return part if isinstance(part, kind) else None


class Adapted:
    """Mixin put in front of a module's own class."""

    _petal: Part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._petal.call(self, super().__call__, args, kwargs)  # type: ignore[misc, arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._petal.forward(self, super().forward, args, kwargs)  # type: ignore[misc, arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy make it again from the module's own.
        return _rebuild, (own_class(self), type(self).__mro__[1]), self.__dict__


class Readable(Adapted):
    """The same for a module that is trained whole: where the call is on, its own forward and others
    read the copy's parameters and buffers from it."""

    def __getattr__(self, name: str) -> Any:
        part = self.__dict__.get("_petal_copy")
        value = None if part is None else part.value(name)
        return super().__getattr__(name) if value is None else value  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        part = self.__dict__.get("_petal_copy")
        if part is None or not part.takes(name, value):
            super().__setattr__(name, value)


class FrozenVectors(Part):
    """Frozen input embeddings. Enabling checkpointing makes transformers hook them, to call
    `requires_grad_` on their output: the reentrant form needs it. A compiled graph, which must not
    do that to a tensor of its own, leaves this hook out."""

    needed = False

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            hooks = [getattr(hook, "__name__", "") for hook in module._forward_hooks.values()]
            if hooks and all(name == "make_inputs_require_grads" for name in hooks):
                return module.forward(*args, **kwargs)
        return run(*args, **kwargs)


class Gone(Part):
    """A layer that the active adapter leaves alone and another one had adapted: a recompute of that
    one's call cannot run here, one of its own can."""

    needed = False

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_checkpointed(module):
            return run(*args, **kwargs)
        source = Source(None, args, kwargs, self)
        return run(*args, **kwargs, petal_call=Call(Given()), petal_source=source)

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        bound = kwargs.pop("petal_source", None)
        kwargs.pop("petal_call", None)
        if in_backward() if bound is None else bound.method is not self:
            raise RuntimeError(SWITCHED)
        return run(*args, **kwargs)


class PatchedForward:
    """Stands for a `forward` that somebody put on the instance: runs it inside the part."""

    def __init__(self, module: nn.Module, inner: Run) -> None:
        self.module, self.inner = module, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part: Part = self.module.__dict__["_petal"]
        return part.forward(self.module, self.inner, args, kwargs)


def own_class(module: object) -> type:
    """The class of `module` without what attach put in front."""
    mro = type(module).__mro__
    own: type = mro[mro.index(Adapted) + 1] if Adapted in mro else mro[0]
    return own


def _rebuild(own: type, mixin: type) -> Any:
    return object.__new__(adapted_class(own, mixin))


_ADAPTED: dict[tuple[type, type], type] = {}


def adapted_class(cls: type, mixin: type = Adapted) -> type:
    """The subclass of `cls`, by the same name, whose instances take part; made once per class."""
    if (cls, mixin) not in _ADAPTED:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _ADAPTED[cls, mixin] = type(cls.__name__, (mixin, cls), names)
    return _ADAPTED[cls, mixin]


class LayerPart(Part):
    """A layer of a stack: binds what its call depends on, and gives its parts a frame to meet in.

    Where the parts leave nothing for one another (`frame` is None), only a checkpointed run needs
    one: a compiled graph or a plain forward sees an ordinary layer.
    """

    watch: Watch | None = None  # of one layer for all

    def __init__(
        self, method: Method, index: int, stack: int, frame: type[Frame] | None = None
    ) -> None:
        self.method, self.index, self.stack, self.frame = method, index, stack, frame

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self.watch is not None:
            self.watch.look(module)
        plain = self.frame is None
        if plain and (torch.compiler.is_compiling() or not _is_checkpointed(module)):
            return run(*args, **kwargs)
        # Before the checkpoint wrapper binds the keywords: its recompute sees this call.
        call = self.method.call_of(self)
        source = Source(call.shared, args, kwargs, self.method)
        kwargs = {**kwargs, "petal_call": call, "petal_source": source}
        if args and call.given.on and _needs_grad_input(module, args[0]):
            args = (args[0].detach().requires_grad_(), *args[1:])
        return run(*args, **kwargs)

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel runs replicas of one module in threads, which adapted layers do "
                "not support; use DistributedDataParallel"
            )
        if "petal_call" not in kwargs and self.frame is None:
            return run(*args, **kwargs)
        # Who calls `forward` by itself binds nothing: then it is a call of its own.
        call: Call = kwargs.pop("petal_call", None) or self.method.call_of(self)
        shared = call.shared
        bound: Source = kwargs.pop("petal_source", None) or Source(
            shared, args, kwargs, self.method
        )
        if bound.method is not self.method:
            raise RuntimeError(SWITCHED)
        source = bound.given(shared, args, kwargs)
        if call.grad and not torch.is_grad_enabled():
            why = self.method.why_not_reentrant(call)
            if why:
                raise RuntimeError(why)
            call.reentrant.add(self.index)
        elif self.index in call.reentrant:
            # A graph shared by the layers would be backwarded once per layer: the reentrant form
            # does not detach what a keyword holds.
            shared = None
        frame = (self.frame or Frame)(self, call, shared, source, THREAD.frame)
        THREAD.frame = frame
        try:
            return self.finish(frame, run(*args, **kwargs))
        finally:
            THREAD.frame = frame.outer

    def alone(self, run: Callable[[], Any]) -> Any:
        """Runs a block that somebody called outside its layer: its parts have a frame all the
        same."""
        frame = (self.frame or Frame)(self, self.method.call_of(self), None, None, THREAD.frame)
        frame.alone = True
        THREAD.frame = frame
        try:
            return run()
        finally:
            THREAD.frame = frame.outer

    def install(self, layer: Layer, hand: Hand) -> None:
        """What the layer has beside its places."""

    def finish(self, frame: Any, output: Any) -> Any:
        """The layer's output."""
        return output

    def running(self) -> Any:
        """The frame of the run that this thread is in, None outside of one."""
        frame = THREAD.frame
        while frame is not None and frame.layer is not self:
            frame = frame.outer
        return frame

    def shared(self) -> tuple[Any, Tensor | None]:
        """What the layers share in the present forward, and what this run was given in place of the
        tensor that it was computed from."""
        frame = self.running()
        if frame is not None:
            return frame.shared, frame.source
        call = running_call(self.method, self.stack)
        return (None if call is None else call.shared), None

    def call_now(self) -> Call:
        """The call that this thread is in, or what one would be now."""
        frame = self.running()
        return self.method.call_of(self) if frame is None else frame.call


class StackPart(Part):
    """A stack of layers: once per forward, before the first layer and outside every checkpointed
    region, makes what they share."""

    def __init__(self, method: Method, number: int, site: Site) -> None:
        self.method, self.number, self.site = method, number, site

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        before = THREAD.running
        call = self.method.enter(self, module, args, kwargs)
        THREAD.running = Running(self, call, before)
        try:
            return run(*args, **kwargs)
        finally:
            THREAD.running = before


def running_call(method: Method, stack: int) -> Call | None:
    """The call of the forward of that stack which this thread is in."""
    running = THREAD.running
    while running is not None:
        if running.stack.method is method and running.stack.number == stack:
            return running.call
        running = running.outer
    return None


def _is_checkpointed(layer: Any) -> bool:
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def _needs_grad_input(layer: Any, hidden: Any) -> bool:
    """Whether reentrant checkpointing would drop every gradient of this layer: it returns nothing
    to differentiate unless an input requires grad."""
    if not isinstance(hidden, Tensor) or hidden.requires_grad or not torch.is_grad_enabled():
        return False
    return runs_twice(layer)


def runs_twice(layer: Any) -> bool:
    """Whether reentrant checkpointing runs a layer without gradients before it runs it with."""
    if not _is_checkpointed(layer):
        return False
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant") is not False


class Source:
    """Which argument of one layer call the shared products were computed from, and by which method
    the layer ran."""

    def __init__(
        self, shared: Any, args: tuple[Any, ...], kwargs: dict[str, Any], method: Method | Gone
    ) -> None:
        self.method = method
        self.key: int | str | None = None
        self.kept: bool | None = None  # whether the layer's hooks left it as it was
        source = getattr(shared, "source", None)
        if source is not None:
            named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            self.key = next((key for key, value in named if value is source), None)

    def given(self, shared: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What a run of the layer was given for it; None where a hook has put another tensor there.

        A recompute may be given another object all the same: saved-tensor hooks move inputs about.
        """
        if self.key is None:
            return None
        if isinstance(self.key, int):
            found = args[self.key] if self.key < len(args) else None
        else:
            found = kwargs.get(self.key)
        if torch.compiler.is_compiling():
            return found
        if self.kept is None:
            self.kept = found is shared.source
        return found if self.kept else None
