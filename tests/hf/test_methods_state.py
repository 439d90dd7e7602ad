"""What a call depends on belongs to the call: blocks that nest, interleave and end out of order,
threads, tasks, and what the handle does inside `disabled()`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from tests.hf import methods
from tests.hf.methods import (
    Row,
    around,
    attached,
    clear,
    differences,
    every,
    fresh,
    output,
    own,
    plain,
    read,
    step,
    values,
)

THREADS, CALLS, REQUESTS = 4, 96, 8


# -- disabled() -----------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@every("disabled")
def test_disabled_is_the_base_bit_for_bit(row: Row) -> None:
    model, attachment = attached(row)
    want, base = output(row, model, attachment), plain(row)
    with attachment.disabled():
        assert torch.equal(output(row, model), base)
        with attachment.disabled():
            assert torch.equal(output(row, model), base)
        assert torch.equal(output(row, model), base)
        given = row.given()
        with around(attachment, given):  # which says nothing to a base
            assert torch.equal(output(row, model), base)
    assert torch.equal(output(row, model, attachment), want)
    with pytest.raises(KeyError), attachment.disabled():
        raise KeyError
    assert torch.equal(output(row, model, attachment), want)


@pytest.mark.one_in(3)
@every("disabled")
def test_disabled_writes_nothing(row: Row) -> None:
    """Neither values nor versions: another graph may hold them."""
    model, attachment = attached(row)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {n: (id(t), t._version, t.data_ptr(), t.requires_grad) for n, t in tensors.items()}
    keys = list(model.state_dict())

    def now() -> dict[str, Any]:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {n: (id(t), t._version, t.data_ptr(), t.requires_grad) for n, t in tensors.items()}

    with attachment.disabled():
        assert now() == before
        assert list(model.state_dict()) == keys
    assert now() == before


@pytest.mark.one_in(3)
@every("disabled")
def test_blocks_that_interleave(row: Row) -> None:
    """As two generators' do: the first that ends does not end the second."""
    model, attachment = attached(row)
    want, base = output(row, model, attachment), plain(row)
    first, second = attachment.disabled(), attachment.disabled()
    first.__enter__()
    second.__enter__()
    assert torch.equal(output(row, model), base)
    first.__exit__(None, None, None)
    assert torch.equal(output(row, model), base)
    second.__exit__(None, None, None)
    assert torch.equal(output(row, model, attachment), want)


@pytest.mark.one_in(3)
@every("around")
def test_what_stands_around_a_call_nests_and_interleaves(row: Row) -> None:
    if not row.around:
        _refuses_what_it_would_not_read(row)
        return
    model, attachment = attached(row)
    here, there = row.given(0), row.given(2)
    there.batch = here.batch
    if isinstance(there.around, Tensor) and there.around.shape != here.around.shape:  # type: ignore[union-attr]
        there.around = here.around.flip(0).roll(1, -1)  # type: ignore[union-attr]

    @torch.no_grad()
    def now() -> Tensor:
        return read(model.eval(), here.batch)[0]

    wants = []
    for given in (here, there):
        with around(attachment, given):
            wants.append(now())
    assert not torch.allclose(wants[0], wants[1])
    with around(attachment, here):
        with around(attachment, there):
            assert torch.equal(now(), wants[1])
        assert torch.equal(now(), wants[0])
        with attachment.disabled():
            assert torch.equal(now(), plain(row))
        assert torch.equal(now(), wants[0])
    first, second = around(attachment, here), around(attachment, there)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(now(), wants[1])
    second.__exit__(None, None, None)
    if row.around == "context":
        assert not torch.allclose(now(), wants[0])
    else:
        with pytest.raises(ValueError, match="got none; run the model inside"):
            now()


def _refuses_what_it_would_not_read(row: Row) -> None:
    _, attachment = attached(row)
    domain = torch.zeros(2, dtype=torch.long)
    with pytest.raises((ValueError, AttributeError)), attachment.domains(domain):
        pass
    with pytest.raises((ValueError, AttributeError)), attachment.context(torch.zeros(2, 3)):
        pass


# -- threads and tasks ----------------------------------------------------------------------------


@pytest.fixture
def _switching() -> Iterator[None]:
    """Threads that take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def _answers(row: Row, model: nn.Module, attachment: Any) -> list[Tensor]:
    """Of the requests, one after the other; every other one is the base's."""
    return [
        plain(row, seed) if seed % 2 else output(row, model, attachment, seed)
        for seed in range(REQUESTS)
    ]


@torch.no_grad()
def _request(row: Row, model: nn.Module, attachment: Any, seed: int) -> Tensor:
    given = row.given(seed)
    off = attachment.disabled() if seed % 2 else contextlib.nullcontext()
    with off, around(attachment, given):
        return read(model, given.batch)[0]


@every("threads", quick=own)
@pytest.mark.usefixtures("_switching")
def test_threads_read_their_own_state(row: Row) -> None:
    model, attachment = attached(row)
    wants = _answers(row, model, attachment)
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        calls = [pool.submit(_request, row, model, attachment, i % REQUESTS) for i in range(CALLS)]
        errors = [call.exception() for call in calls]
    assert [e for e in errors if e] == []
    wrong = sum(not torch.equal(call.result(), wants[i % REQUESTS]) for i, call in enumerate(calls))
    assert wrong == 0, f"{wrong} wrong of {CALLS}"
    assert torch.equal(output(row, model, attachment), wants[0]), "left so for good"


@every("threads", quick=own)
def test_tasks_read_their_own_state(row: Row) -> None:
    """asyncio lets blocks of several tasks interleave in one thread."""
    model, attachment = attached(row)
    wants = _answers(row, model, attachment)

    async def request(seed: int) -> Tensor:
        given = row.given(seed)
        off = attachment.disabled() if seed % 2 else contextlib.nullcontext()
        with off:
            await asyncio.sleep(0)
            with around(attachment, given):
                await asyncio.sleep(0)
                with torch.no_grad():
                    out = read(model, given.batch)[0]
                await asyncio.sleep(0)
        return out

    async def gather() -> list[Tensor]:
        return await asyncio.gather(*(request(seed) for seed in range(REQUESTS)))

    got = asyncio.run(gather())
    wrong = sum(not torch.equal(a, b) for a, b in zip(got, wants, strict=True))
    assert wrong == 0, f"{wrong} wrong of {REQUESTS}"
    assert torch.equal(output(row, model, attachment), wants[0]), "left so for good"


def test_a_task_that_outlives_its_block_is_outside_of_it() -> None:
    """A task keeps the context that it was made in, whose block ends meanwhile."""
    row = methods.ROWS[0]
    model, attachment = attached(row)
    want = output(row, model, attachment)

    async def made_inside() -> list[Tensor]:
        async def call() -> list[Tensor]:
            outs = [output(row, model, attachment)]
            await asyncio.sleep(0)
            return [*outs, output(row, model, attachment)]

        with attachment.disabled():
            task = asyncio.create_task(call())
            await asyncio.sleep(0)
        return await task

    inside, outside = asyncio.run(made_inside())
    assert torch.equal(inside, plain(row))
    assert torch.equal(outside, want)


def test_a_block_lets_go_of_what_it_was_given() -> None:
    row = next(row for row in methods.ROWS if row.around == "vision")
    model, attachment = attached(row)
    features = torch.randn(2, 3, 32, dtype=torch.float64)
    held = weakref.ref(features)
    with attachment.vision(features), attachment.disabled():
        output(row, model)
    del features
    assert held() is None


# -- a reference between a forward and its backward -----------------------------------------------


@pytest.mark.one_in(3)
@every("reference")
def test_a_reference_forward_between_forward_and_backward(row: Row) -> None:
    """DPO, KL: the base's answer is wanted before the policy's backward."""

    def loss(form: str) -> methods.Values:
        model, attachment = attached(row, form)
        model.train()
        given = row.given(leaves="all")
        with around(attachment, given):
            out, own = read(model, given.batch)
        reference = plain(row)
        if form == "fused":
            with torch.no_grad(), attachment.disabled():
                reference = read(model, row.given().batch)[0]
        total = own + (torch.softmax(reference, -1) * (reference - out)).sum()
        clear(attachment)
        total.backward()
        return values(attachment, given, out, total)

    assert differences(loss("fused"), loss("published")) == []


# -- the handle's methods inside disabled() --------------------------------------------------------


@every("inside", quick=own)
def test_save_inside_disabled_writes_what_was_trained(row: Row, tmp_path: Path) -> None:
    model, attachment = attached(row)
    model.float()
    with attachment.disabled():
        attachment.save(tmp_path / "a")
    other = fresh(row).float()
    loaded = pk.attach(other, tmp_path / "a")
    assert torch.equal(output(row, other, loaded), output(row, model, attachment))


@every("inside", quick=own)
def test_load_inside_disabled_stays(row: Row, tmp_path: Path) -> None:
    model, attachment = attached(row)
    want = output(row, model, attachment)
    state = {name: t.clone() for name, t in attachment.state_dict().items()}
    attachment.save(tmp_path / "a")
    for load in (
        lambda: attachment.load(tmp_path / "a"),
        lambda: attachment.load_state_dict(state),
    ):
        methods.train(attachment, seed=4)
        with attachment.disabled():
            load()
            assert torch.equal(output(row, model), plain(row))
        assert torch.equal(output(row, model, attachment), want)


@every("inside", quick=own)
def test_merge_inside_disabled_merges(row: Row) -> None:
    model, attachment = attached(row)
    want = output(row, model, attachment)
    with attachment.disabled():
        if row.folds:
            attachment.merge()
        else:
            with pytest.raises(ValueError, match=r"merge: route .* depends on the vision"):
                attachment.merge()
        assert torch.equal(output(row, model), plain(row))
    torch.testing.assert_close(output(row, model, attachment), want, rtol=1e-9, atol=1e-9)
    if row.folds:
        attachment.unmerge()
    assert torch.equal(output(row, model, attachment), want)
    assert step(row, model, attachment, row.given())["loss"] is not None


@every("inside", quick=own)
def test_unmerge_inside_disabled_unmerges(row: Row) -> None:
    model, attachment = attached(row)
    want = output(row, model, attachment)
    if not row.folds:
        with pytest.raises(RuntimeError, match="unmerge: not merged"), attachment.disabled():
            attachment.unmerge()
        return
    attachment.merge()
    with attachment.disabled():
        attachment.unmerge()
        assert torch.equal(output(row, model), plain(row))
    assert torch.equal(output(row, model, attachment), want)


@every("inside", quick=own)
def test_detach_inside_disabled_gives_the_base(row: Row) -> None:
    model, attachment = attached(row)
    wanted = {n: p.requires_grad for n, p in fresh(row).named_parameters()}
    with attachment.disabled():
        assert attachment.detach() is model
        assert torch.equal(output(row, model), plain(row))
    assert torch.equal(output(row, model), plain(row))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    again = pk.attach(model, row.config())
    model.to(torch.float64)
    methods.train(again, seed=2)
    assert not torch.allclose(output(row, model, again), plain(row), atol=1e-3)
