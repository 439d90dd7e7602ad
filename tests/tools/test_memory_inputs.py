"""What a profile is asked of: functions, models of other kinds, parameters of several kinds; and
the sentences for what it cannot do."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from petal_kernels import memory

WIDTH = 8
NUMBERS = 2 * (WIDTH * WIDTH + WIDTH)  # of the network below


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


GLOBAL = network()


def step_of_a_global(x: Tensor) -> Tensor:
    return GLOBAL(x).sum()


class Trainer:
    def __init__(self) -> None:
        self.model = network()

    def step(self, x: Tensor) -> Tensor:
        return self.model(x).sum()

    def __call__(self, x: Tensor) -> Tensor:
        return self.step(x)


class Holder:
    """Where nobody looks."""

    def __init__(self) -> None:
        self.model = network()


HOLDER = Holder()


def closure() -> Any:
    model = network()
    return lambda x: model(x).sum()


def compiled_like() -> Any:
    inner = closure()

    @functools.wraps(inner)
    def outer(*args: Any) -> Any:
        return inner(*args)

    return outer


STEPS: dict[str, Any] = {
    "forward": network().forward,
    "closure": closure(),
    "global": step_of_a_global,
    "method": Trainer().step,
    "object": Trainer(),
    "partial": functools.partial(lambda model, x: model(x), network()),
    "wrapped": compiled_like(),
}


@pytest.mark.parametrize("way", STEPS)
def test_a_function_finds_its_module(way: str) -> None:
    """Without module=, the model's weights counted as activations: three times the bytes."""
    x = torch.randn(4, WIDTH)
    found = memory.profile(STEPS[way], x)
    assert found.saved_bytes == 2 * x.nbytes  # x, tanh's result
    assert found.sizes.parameters == found.sizes.gradients == 4 * NUMBERS
    assert {r.module for r in found.saved} == {"0", "1"}
    assert found.notes == []


def test_a_function_of_several_modules_names_each() -> None:
    student, teacher = network(), network().requires_grad_(False)
    x = torch.randn(4, WIDTH)
    found = memory.profile(lambda t: (student(t) - teacher(t)).square().mean(), x)
    assert {r.module for r in found.saved} == {"student.0", "student.1", ""}
    assert found.saved_bytes == 3 * x.nbytes
    assert found.sizes.parameters == 2 * 4 * NUMBERS
    assert found.sizes.trainable == 4 * NUMBERS
    inner = student[2]
    both = memory.profile(lambda t: inner(student(t)), x)
    assert both.sizes.parameters == 4 * NUMBERS
    assert {r.module for r in both.saved} == {"0", "1", "2"}


def test_parameters_of_a_module_that_is_not_found_are_parameters_and_said() -> None:
    x = torch.randn(4, WIDTH)
    found = memory.profile(lambda t: HOLDER.model(t).sum(), x)
    assert found.saved_bytes == 2 * x.nbytes
    assert found.sizes.parameters == found.sizes.trainable == 4 * NUMBERS
    assert found.resident_bytes + 4 <= found.peak_bytes
    assert all(p.grad is None for p in HOLDER.model.parameters())
    (note,) = found.notes
    assert "module=" in note
    assert note == found.to_dict()["notes"][0]
    assert "module=" in found.table().replace("\n", " ")
    given = memory.profile(lambda t: HOLDER.model(t).sum(), x, module=HOLDER.model)
    assert (given.saved_bytes, given.notes) == (found.saved_bytes, [])
    assert {**vars(given.sizes), "saved_parameters": 0} == {
        **vars(found.sizes),
        "saved_parameters": 0,
    }


# Parameters ----------------------------------------------------------------------------------


class Tied(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, WIDTH)
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("scale", torch.ones(3, WIDTH))
        self.register_buffer("first", self.scale[0])  # of one storage
        self.register_buffer("row", self.words.weight.detach()[0])

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids) * self.first)


def test_what_shares_a_storage_is_counted_once() -> None:
    """Tied parameters, buffers and gradients; parts of a batch; a storage kept twice."""
    ids = torch.arange(10)
    model = Tied()
    found = memory.profile(model, ids)
    weight = 10 * WIDTH * 4
    assert found.sizes.parameters == found.sizes.trainable == found.sizes.gradients == weight
    assert found.sizes.trainable_numbers == 10 * WIDTH
    assert found.sizes.buffers == 3 * WIDTH * 4
    assert found.sizes.batch == ids.nbytes
    assert found.live[0] == found.resident_bytes + weight  # and the words' result
    # The head's input, and the embedding's indices.
    assert found.saved_bytes == weight + ids.nbytes
    assert sum(found.sizes.saved_parameters.values()) == weight + 3 * WIDTH * 4
    pieces = memory.profile(lambda a, b: model(a) + model(b), (ids[:5], ids[5:]), module=model)
    assert pieces.sizes.batch == ids.nbytes
    assert sum(r.bytes for r in pieces.saved if r.of_batch) == ids.nbytes
    own = memory.profile(lambda t: (model.head.weight * t).sum(), model.first, module=model)
    assert (own.sizes.batch, own.sizes.buffers, own.saved_bytes) == (0, 3 * WIDTH * 4, 0)
    fake = memory.profile(*memory.fake_tensors(Tied(), ids))
    assert (fake.sizes, fake.saved_bytes) == (found.sizes, found.saved_bytes)
    with torch.device("meta"):
        model, ids = Tied(), torch.arange(20)[5:]
    part = memory.profile(*memory.fake_tensors(model, (ids,)))
    assert part.sizes.buffers == found.sizes.buffers
    assert part.sizes.batch == 20 * 8


def test_what_has_no_bytes_is_no_record() -> None:
    assert memory.profile(network(), torch.randn(0, WIDTH)).saved == []


def test_gradients_of_one_storage_are_counted_once() -> None:
    """Kind: an engine's bucket counted once for each gradient that is a piece of it."""
    model = network()
    bucket = torch.zeros(NUMBERS)
    pieces = bucket.split([p.numel() for p in model.parameters()])
    for parameter, piece in zip(model.parameters(), pieces, strict=True):

        def into(p: Tensor, piece: Tensor = piece) -> None:
            p.grad = piece.view_as(p)

        parameter.register_post_accumulate_grad_hook(into)
    assert memory.profile(model, torch.randn(2, WIDTH)).sizes.gradients == bucket.nbytes


def test_parameters_of_one_storage_have_gradients_of_their_own() -> None:
    """Views of one flat storage, as an engine lays parameters out."""
    flat = torch.randn(2, WIDTH, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, False), nn.Linear(WIDTH, WIDTH, False))
    for layer, part in zip(model, flat, strict=True):
        layer.weight = nn.Parameter(part)
    found = memory.profile(model, torch.randn(4, WIDTH))
    assert found.sizes.parameters == flat.nbytes
    assert found.sizes.gradients == flat.nbytes
    assert found.sizes.trainable_numbers == flat.numel()
    assert found.saved_bytes == 2 * 4 * WIDTH * 4


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("engine", ["fully sharded", "tensor parallel"])
def test_sharded_parameters_are_the_bytes_of_their_shards(engine: str) -> None:
    """DTensors: FSDP2's and tensor parallelism's parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = network()
    mesh = init_device_mesh("cpu", (1,))
    if engine == "fully sharded":
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    x = torch.randn(4, WIDTH)
    model(x).sum().backward()
    found = memory.profile(model, x)
    assert found.saved_bytes == 2 * x.nbytes
    assert found.sizes.gradients == found.sizes.parameters == 4 * NUMBERS
    assert found.sizes.trainable_numbers == NUMBERS
    assert found.notes == []


# What it cannot do ---------------------------------------------------------------------------


class Asks(nn.Module):
    """Wants a value in its forward."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.way == "item" and y.mean().item() > 0:
            y = y * 2
        if self.way == "branch" and (y.mean() > 0):
            y = y * 2
        if self.way == "nonzero":
            y = y[torch.where(y[:, 0] > 0)[0]]
        if self.way == "mask":
            y = y[y > 0]
        if self.way == "list":
            y = y * len(y.tolist())
        return y.sum()


@pytest.mark.parametrize("way", ["item", "branch", "nonzero", "mask", "list"])
def test_a_module_that_asks_fake_tensors_for_values_is_named(way: str) -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Identity(), Asks(way))})
    model.forward = lambda x: model["blocks"](x)
    fake, x = memory.fake_tensors(model, torch.randn(4, WIDTH))
    with pytest.raises(ValueError, match=r"^model: blocks\.1 \(Asks\).*fake.*real tensors"):
        memory.profile(fake, x)


def test_an_error_of_the_models_own_is_its_own_on_fake_tensors_too() -> None:
    def step(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        memory.profile(step, memory.fake_tensors(nn.Identity(), torch.randn(2))[1])


@pytest.mark.parametrize("wrong", [lambda out: float(out.sum()), lambda out: None, torch.argmax])
def test_a_loss_that_returns_no_tensor_to_derive_is_named(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^loss: want .*floating-point tensor, got "):
        memory.profile(network(), torch.randn(4, WIDTH), loss=wrong)
    with pytest.raises(TypeError, match=r"^loss: "):
        memory.assert_saved_bytes(network(), torch.randn(4, WIDTH), at_most=9, loss=wrong)


def test_a_budget_counts_what_a_selective_checkpoint_caches() -> None:
    """As it does what every other way of keeping keeps."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    model = network()
    x = torch.randn(4, WIDTH)

    def step(t: Tensor) -> Tensor:
        return checkpoint(model, t, use_reentrant=False, context_fn=keep)

    kept = 3 * x.nbytes  # x and both products
    found = memory.assert_saved_bytes(step, x, exactly=kept)
    assert {(r.operation, r.argument) for r in found.saved} == {
        ("checkpoint", "input"),
        ("checkpoint", "cache"),
    }
    assert found.sizes.elsewhere == 0
    with pytest.raises(AssertionError, match=f"{kept} bytes"):
        memory.assert_saved_bytes(step, x, at_most=kept - 1)
