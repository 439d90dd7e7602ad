"""Small models that keep what a forward needs in every way there is."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

WIDTH = 32

Step = tuple[nn.Module | Callable[..., Any], tuple[Any, ...]]


def rows(count: int = 6) -> Tensor:
    return torch.randn(count, WIDTH)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(F.gelu(self.up(self.norm(x)))))


class Loss(nn.Module):
    """Blocks one after the other, and a scalar."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x.square().mean()


class Checkpointed(Loss):
    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        super().__init__(*blocks)
        self.options = options

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, **self.options)


def blocks(count: int = 2) -> list[nn.Module]:
    return [Mlp() for _ in range(count)]


def eager() -> Step:
    return Loss(*blocks()), (rows(),)


def a_trained_input() -> Step:
    return Loss(*blocks()), (rows().requires_grad_(),)


def several_outputs() -> Step:
    first, second = blocks()
    return lambda x: (first(x), {"second": second(x)[:2]}), (rows(),)


def checkpointed(reentrant: bool) -> Step:
    return Checkpointed(*blocks(3), use_reentrant=reentrant), (rows().requires_grad_(),)


def selective() -> Step:
    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return Checkpointed(*blocks(3), use_reentrant=False, context_fn=keep), (rows(),)


def nested_checkpoints() -> Step:
    inner = Checkpointed(*blocks(2), use_reentrant=False)
    first = nn.Linear(WIDTH, WIDTH)
    return lambda x: checkpoint(inner, first(x), use_reentrant=False), (rows(),)


def checkpointed_with_arguments() -> Step:
    """A tensor made in the step that a region has as a keyword argument."""
    block = Mlp()

    def step(x: Tensor) -> Tensor:
        scale = x.exp()
        return checkpoint(
            lambda t, *, scale: (block(t) * scale).sum(), x, use_reentrant=False, scale=scale
        )

    return step, (rows(),)


def autocast() -> Step:
    model = Loss(*blocks())

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    return step, (rows(),)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, WIDTH)
        self.block = Mlp()
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.block(self.words(ids))), ids)


def tied() -> Step:
    return Tied(), (torch.arange(12) % 50,)


class Experts(nn.Module):
    """Two experts of four for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == i)
            if len(row):
                out = out.index_add(0, row, expert(x[row]) * weights[row, slot, None])
        return out


def mixture_of_experts() -> Step:
    return Loss(Experts()), (rows(12),)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(
            WIDTH, 4, 1, 1, dim_feedforward=48, dropout=0.1, batch_first=True
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.model(source, target).mean()


def encoder_decoder() -> Step:
    return EncoderDecoder(), (torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH))


class Attributes(torch.autograd.Function):
    """Keeps tensors as attributes of its ctx, in a list and a dict too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = x.exp()
        ctx.more = [x.sin(), {"last": x.cos()}]
        return x * ctx.factor

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.factor * ctx.more[0] * ctx.more[1]["last"]


def attributes_of_ctx() -> Step:
    block = Mlp()
    return lambda x: Attributes.apply(block(x)).sum(), (rows(),)


def hooks_of_saved_tensors() -> Step:
    """Kept in half the bytes, as other hooks than the profiler's make of it."""
    block = Mlp()

    def step(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.bfloat16() if t.is_floating_point() else t.clone(),
            lambda t: t.float() if t.is_floating_point() else t,
        ):
            return block(x).sum()

    return step, (rows(),)


def saved_on_cpu() -> Step:
    block = Mlp()

    def step(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return block(x).sum()

    return step, (rows(),)


def closures_of_hooks() -> Step:
    block = Mlp()

    def step(x: Tensor) -> Tensor:
        y = block(x)
        factor = y.detach().exp()
        y.register_hook(lambda dy: dy * factor)
        return y.sum()

    return step, (rows(),)


class Cached(nn.Module):
    """Holds a tensor that no gradient needs, as a cache of keys does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Mlp()
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        self.cache[:] = [y.detach() + 1]
        return y.sum()


def held_by_python() -> Step:
    return Cached(), (rows(),)


class Unknown:
    """An output of a class that nobody knows, as a cache of keys is."""

    def __init__(self, loss: Tensor, keys: Tensor) -> None:
        self.loss = loss
        self.keys = keys


def held_by_the_output() -> Step:
    block = Mlp()

    def step(x: Tensor) -> Unknown:
        y = block(x)
        return Unknown(y.sum(), y.detach() + 1)

    return step, (rows(),)


def convolutions() -> Step:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return Loss(model), (torch.randn(2, 3, 9, 9),)


def recurrent() -> Step:
    lstm = nn.LSTM(WIDTH, 8, batch_first=True)
    return lambda x: lstm(x)[0].sum(), (torch.randn(2, 5, WIDTH),)


def derivatives_inside() -> Step:
    """Of torch.func, which runs under no hooks of saved tensors."""
    block = Mlp()
    region = Checkpointed(Mlp(), use_reentrant=False)

    def step(x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda t: block(t).square().sum())(region(x) * x)
        return slope.square().sum()

    return step, (rows().requires_grad_(),)


def compiled() -> Step:
    return torch.compile(Loss(*blocks()), backend="aot_eager"), (rows(),)


def compiled_in_place() -> Step:
    model = Loss(*blocks())
    model.compile(backend="aot_eager")
    return model, (rows(),)


def compiled_parts() -> Step:
    first, second, third = blocks(3)
    second.compile(backend="aot_eager")
    return Loss(first, second, torch.compile(third, backend="aot_eager")), (rows(),)  # type: ignore[arg-type]


def compiled_function() -> Step:
    block = Mlp()
    function = torch.compile(lambda t: (t * torch.sigmoid(t)).exp(), backend="aot_eager")
    return lambda x: function(block(x)).sum(), (rows(),)


def compiled_and_checkpointed() -> Step:
    block: Any = torch.compile(Mlp(), backend="aot_eager")
    return Checkpointed(Mlp(), block, use_reentrant=False), (rows(),)


# A step, and how many generator states its checkpointed regions hold at most.
STEPS: dict[str, tuple[Callable[[], Step], int]] = {
    "eager": (eager, 0),
    "a trained input": (a_trained_input, 0),
    "several outputs": (several_outputs, 0),
    "checkpointed": (lambda: checkpointed(False), 3),
    "checkpointed, reentrant": (lambda: checkpointed(True), 3),
    "selective checkpoints": (selective, 3),
    "nested checkpoints": (nested_checkpoints, 3),
    "a checkpoint's arguments": (checkpointed_with_arguments, 1),
    "autocast": (autocast, 0),
    "tied weights": (tied, 0),
    "mixture of experts": (mixture_of_experts, 0),
    "encoder-decoder": (encoder_decoder, 0),
    "attributes of a ctx": (attributes_of_ctx, 0),
    "hooks of saved tensors": (hooks_of_saved_tensors, 0),
    "saved on the CPU": (saved_on_cpu, 0),
    "closures of hooks": (closures_of_hooks, 0),
    "held by Python": (held_by_python, 0),
    "held by the output": (held_by_the_output, 0),
    "convolutions": (convolutions, 0),
    "recurrent": (recurrent, 0),
    "derivatives inside, checkpointed": (derivatives_inside, 1),
    "compiled": (compiled, 0),
    "compiled in place": (compiled_in_place, 0),
    "compiled parts": (compiled_parts, 0),
    "compiled function": (compiled_function, 0),
    "compiled and checkpointed": (compiled_and_checkpointed, 2),
}
