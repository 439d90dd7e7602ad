"""Scenarios of whole training steps: a model of random weights with one method attached.

A step is forward, backward and AdamW's update (with a learning rate of zero, so that every round
computes the same). `published` and `petal` are one configuration in `attach`'s two implementations;
`base` is the frozen model alone, its embeddings made to require grad so that its backward runs
through the same layers: the floor.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.hf import attach
from petal_kernels.tools.bench import correctness, packages
from petal_kernels.tools.bench.correctness import Results
from petal_kernels.tools.bench.fresh import Fresh
from petal_kernels.tools.bench.layer import on_backend
from petal_kernels.tools.bench.model_builders import BUILDERS, SIZES, Subject
from petal_kernels.tools.bench.op import Oracle
from petal_kernels.tools.bench.request import Request, covered
from petal_kernels.tools.bench.scenarios import Forward, Inputs, Provider, Scenario

INIT = 0.02  # standard deviation added to the adapter, so that nothing of it is zero


@dataclass(frozen=True)
class ModelCase:
    """One method on one model."""

    name: str
    model: str
    config: Callable[[int], Any]
    batch: int
    tokens: int
    rank: int
    size: str = "full"


def _all_linear(r: int, dropout: float) -> pk.LoraConfig:
    return pk.LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout, target_modules="all-linear")


_METHODS: dict[str, tuple[ModelCase, ...]] = {
    "qformer": (
        ModelCase("PETAL", "qformer", lambda r: pk.PetalConfig(r=r, variant="release"), 16, 32, 64),
        ModelCase(
            "PETAL, 6 experts", "qformer", lambda r: pk.PetalConfig(r=r, experts=6), 16, 32, 64
        ),
    ),
    "bart": (
        ModelCase("VL-PET large", "bart", lambda r: pk.VLPetConfig(r=r), 16, 64, 96),
        ModelCase("VL-Adapter", "bart", lambda r: pk.VLAdapterConfig(r=r), 16, 64, 96),
        ModelCase("LoRA", "bart", lambda r: pk.LoraConfig(r=r, lora_alpha=r), 16, 64, 16),
    ),
    "gpt2-vit": (
        ModelCase(
            "routing LoRA, mul", "gpt2-vit", lambda r: pk.RoutingConfig(r=r, function="mul"),
            8, 51, 128,
        ),
        ModelCase(
            "routing adapter, gram", "gpt2-vit",
            lambda r: pk.RoutingConfig(r=r, kind="adapter", function="gram"), 8, 51, 128,
        ),
        ModelCase(
            "mixture of 4 LoRA", "gpt2-vit", lambda r: pk.ExpertConfig(r=r, experts=4), 8, 51, 16
        ),
    ),
    "llama": tuple(
        ModelCase(
            f"LoRA on all linears, dropout {p}", "llama",
            functools.partial(_all_linear, dropout=p), 4, 256, 16,
        )
        for p in (0.05, 0.0)
    ),
    "qwen2_5_vl": (
        ModelCase(
            "LoRA on all linears, dropout 0.05", "qwen2_5_vl",
            functools.partial(_all_linear, dropout=0.05), 4, 256, 16,
        ),
    ),
}  # fmt: skip


def names() -> list[str]:
    """Every model."""
    return list(_METHODS)


@dataclass
class _Attached:
    """A copy of the model with the method in it, and how it runs."""

    subject: Subject
    attachment: Any

    def both(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the outputs that it is of, with what the method wants around them."""
        vision = self.subject.vision(**batch)
        inside: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if vision is not None and getattr(self.attachment.config, "function", "none") != "none":
            inside = self.attachment.vision(vision)
        with inside:
            return self.subject.both(**batch)

    def trained(self) -> list[Tensor]:
        return list(self.attachment.parameters())


def _attach(base: Subject, case: ModelCase, implementation: str) -> _Attached:
    subject = copy.deepcopy(base)
    torch.manual_seed(2)
    attachment = attach(subject.model, case.config(case.rank), implementation=implementation)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attachment.parameters():
            noise = INIT * torch.randn(parameter.shape, generator=g)
            parameter.add_(noise.to(parameter))
    subject.train()
    return _Attached(subject, attachment)


def _step(both: Forward, trained: Sequence[Tensor]) -> Provider:
    """Forward, backward and the optimizer's update."""

    def forward(**batch: Tensor) -> Tensor:
        loss: Tensor = both(**batch)[0]
        return loss

    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0) if trained else None

    def backward(outs: Sequence[Tensor]) -> list[Tensor | None]:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        outs[0].backward()
        if optimizer is not None:
            optimizer.step()
        return [t.grad for t in trained]

    return Provider(forward, lambda _: trained, backward)


def _floor(subject: Subject) -> Provider:
    subject.entry.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_())

    def both(**batch: Tensor) -> tuple[Tensor, Tensor]:
        subject.vision(**batch)
        return subject.both(**batch)

    return replace(_step(both, []), floor=True)


def _results(
    subject: Subject,
    both: Forward,
    trained: Sequence[Tensor],
    inputs: Inputs,
    gradients: bool = True,
) -> Results:
    """Outputs, and the loss's gradients, without dropout: the implementations draw different
    masks."""
    subject.eval()
    try:
        with torch.set_grad_enabled(gradients):
            loss, seen = both(**inputs.arguments)
        if not gradients:
            return [seen], []
        return [seen.detach()], torch.autograd.grad(loss, list(trained), allow_unused=True)
    finally:
        subject.train()


def _published(base: Subject, case: ModelCase, inputs: Inputs, wide: bool) -> Results:
    attached = _attach(base, case, "published")
    if wide:
        attached.subject.double()
        inputs = inputs.map(Tensor.double)
    return _results(attached.subject, attached.both, attached.trained(), inputs)


def build(case: ModelCase, request: Request, shape: str, value: float | None) -> Scenario:
    """One method on one model."""
    torch.manual_seed(0)
    base = BUILDERS[case.model](SIZES[case.size]).to(request.device, request.dtype)
    base.requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    batch = base.batch(case.batch, case.tokens, g)
    floating = {k: v.to(request.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    inputs = Inputs({k: v.to(request.device) for k, v in floating.items()})
    fresh = Fresh(t for t in inputs.arguments.values() if isinstance(t, Tensor))
    oracle = Oracle(
        lambda: _published(base, case, inputs, True),
        lambda: _published(base, case, inputs, False),
        correctness.pooled,
        fresh,
    )
    providers: dict[str, Provider] = {}
    parameters: list[Tensor] = []

    def add(
        label: str,
        subject: Subject,
        both: Forward,
        trained: Sequence[Tensor],
        ours: bool = False,
        compiled: bool = False,
    ) -> None:
        check = oracle(functools.partial(_results, subject, both, trained, inputs))
        step = _step(both, trained)
        providers[label] = replace(step, check=check, ours=ours, chosen=ours, compiled=compiled)
        parameters.extend(subject.parameters())

    published = _attach(base, case, "published")
    add("published", published.subject, published.both, published.trained())
    if "compile" in request.against:  # minutes of compiling: only where it is named
        torch._dynamo.reset()
        compiled = torch.compile(published.both)
        add("compile", published.subject, compiled, published.trained(), compiled=True)
    for backend in request.backends or ("",):
        fused = _attach(base, case, "fused")
        both = on_backend(fused.both, backend) if backend else fused.both
        label = f"petal {backend}".strip()
        add(label, fused.subject, both, fused.trained(), ours=True)
    for name in ("peft", "peft_half") if case.name.startswith("LoRA") else ():
        package = packages.PACKAGES[name]
        offered = package.offers(case.model, 0.0, request.dtype)
        if offered and request.wants(name) and not package.why_not(request.device):
            like = packages.peft_like(base, fused.subject, fused.trained(), package.half)
            add(name, like[0], like[0].both, like[1])
    if request.wants("base"):
        alone = copy.deepcopy(base).train()
        providers["base"] = _floor(alone)
        parameters.extend(alone.parameters())
    arguments = ["model", case.model, "--shape", shape, "--size", case.size]
    if value is not None:
        arguments += ["--sweep", str(request.sweep), "--values", str(int(value))]
    said = f"{case.model} step, {shape}, {case.size}, B={case.batch} L={case.tokens} r={case.rank}"
    return Scenario(
        said, inputs, providers, arguments, parameters=parameters, swept=value, fresh=fresh
    )


def tax(medians: dict[str, float]) -> dict[str, float]:
    """What each provider adds to the frozen step, as a share of it."""
    floor = medians["base"]
    return {k: v / floor - 1.0 for k, v in medians.items() if k != "base"}


def scenarios(
    wanted: Sequence[str], request: Request, size: str = "full"
) -> Iterator[Callable[[], Scenario]]:
    """What builds each scenario, one at a time."""
    size = "small" if request.quick else size
    for name in wanted:
        cases = [c for c in _METHODS[name] if request.matches(c.name)]
        cases = [c for c in cases if c.name == request.shape] or cases
        for plain in cases:
            sized = replace(plain, size=size)
            if size == "small":
                sized = replace(sized, batch=min(plain.batch, 4), rank=min(plain.rank, 16))
            for case, value in covered(sized, replace(request, quick=False)):
                yield functools.partial(build, case, request, plain.name, value)
