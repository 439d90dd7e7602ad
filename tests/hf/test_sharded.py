"""Saving and loading while an engine shards the model: all of the adapter, or a refusal that says
which parameter is in pieces and how to gather it. Never pieces without a word."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf import tensors
from tests.hf import tiny, tiny_text

ROOT = Path(__file__).parents[2]
UP = "layers.1.decoder_query.up"


def attached() -> tuple[nn.Module, Any]:
    model = tiny_text.build("llama", torch.float32)
    attachment = pk.attach(model, pk.RoutingConfig(r=3, modules_to_save=["lm_head"]))
    tiny.randomise(attachment.adapter)
    return model, attachment


def values_of(attachment: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in attachment.state_dict().items()}


def same(got: dict[str, Tensor], want: dict[str, Tensor], more: float = 0.0) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[k], want[k] + more) for k in want)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)


@pytest.mark.usefixtures("group")
def test_a_fully_sharded_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, attachment = attached()
    want = values_of(attachment)
    shard(model)
    assert type(attachment.state_dict()[UP]).__name__ == "DTensor"
    attachment.save(tmp_path / "adapter")
    assert same(
        values_of(pk.attach(tiny_text.build("llama", torch.float32), tmp_path / "adapter")), want
    )

    attachment.load_state_dict({name: value + 1 for name, value in want.items()})
    got = {name: value.full_tensor() for name, value in attachment.state_dict().items()}
    assert same(got, want, 1.0)
    attachment.load(tmp_path / "adapter")
    state = attachment.state_dict()
    assert same({name: value.full_tensor() for name, value in state.items()}, want)
    _, other = attached()
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    assert same(values_of(other), want)


@pytest.mark.usefixtures("group")
def test_without_its_process_group_a_sharded_model_is_refused(tmp_path: Path) -> None:
    model, attachment = attached()
    shard(model)
    torch.distributed.destroy_process_group()
    with pytest.raises(
        RuntimeError, match=r"save: \S+: want the process group .* on every process"
    ):
        attachment.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def _parameter(attachment: Any) -> nn.Parameter:
    return dict(attachment.adapter.named_parameters())[UP]


def _empty(attachment: Any) -> None:
    _parameter(attachment).data = torch.empty(0)


def _piece(attachment: Any) -> None:
    """As FSDP1 leaves it on the process that has the values: flat."""
    parameter = _parameter(attachment)
    parameter.data = parameter.data.flatten()


def _gone(attachment: Any) -> None:
    """As FSDP1 leaves it without use_orig_params."""
    owner, name = UP.rsplit(".", 1)
    del attachment.adapter.get_submodule(owner)._parameters[name]


def _meta(attachment: Any) -> None:
    attachment.adapter.to("meta")


WAY_OUT = "on every process {} inside .*summon_full_params.*GatheredParameters"


@pytest.mark.parametrize("leave", [_empty, _piece, _gone])
def test_pieces_are_refused_by_name(leave: Callable[[Any], None], tmp_path: Path) -> None:
    _, attachment = attached()
    attachment.save(tmp_path / "whole")
    want = values_of(attachment)
    leave(attachment)
    for what, call in (
        ("save", lambda: attachment.save(tmp_path / "pieces")),
        ("load", lambda: attachment.load(tmp_path / "whole")),
        ("load", lambda: attachment.load_state_dict(want)),
    ):
        with pytest.raises(ValueError, match=f"^{what}: .*{WAY_OUT.format(what)}") as error:
            call()
        assert UP in str(error.value)
        assert len(str(error.value)) < 600
    assert not (tmp_path / "pieces").exists()
    head = attachment.state_dict()["modules_to_save.lm_head.weight"]
    assert torch.equal(head, want["modules_to_save.lm_head.weight"])


def test_a_meta_adapter_is_neither_saved_nor_loaded_into(tmp_path: Path) -> None:
    """The kind: a copy into a tensor without values, which does nothing and says nothing."""
    _, attachment = attached()
    attachment.save(tmp_path / "whole")
    want = values_of(attachment)
    _meta(attachment)
    for call in (
        lambda: attachment.save(tmp_path / "meta"),
        lambda: attachment.load(tmp_path / "whole"),
        lambda: attachment.load_state_dict(want),
    ):
        with pytest.raises(
            ValueError, match=r"want tensors with values, got layers\.\S+ on the meta"
        ):
            call()


def test_without_known_shapes_an_empty_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"save: b: want all its values, got shape \[0\]"):
        tensors.gathered("save", {"a": torch.ones(2), "b": torch.empty(0)})


WORKER = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from tests.hf.test_sharded import attached, same, shard, values_of
kind, folder = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
model, attachment = attached()
want = values_of(attachment)
more = {name: value + 1 for name, value in want.items()}
if kind == "FSDP2":
    shard(model)
    attachment.save(folder)
    attachment.load_state_dict(more)
    got = {name: value.full_tensor() for name, value in attachment.state_dict().items()}
else:
    sharded = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    for call in (lambda: attachment.save(folder), lambda: attachment.load_state_dict(want)):
        try:
            call()
        except ValueError as error:
            assert "summon_full_params" in str(error), error
        else:
            raise AssertionError("pieces were taken for the adapter")
    assert not os.path.exists(folder)
    dist.barrier()
    with FSDP.summon_full_params(sharded, writeback=False):
        attachment.save(folder)
    with FSDP.summon_full_params(sharded):
        attachment.load_state_dict(more)
    with FSDP.summon_full_params(sharded, writeback=False):
        got = values_of(attachment)
assert same(got, want, 1.0)
dist.barrier()
_, fresh = attached()
fresh.load_state_dict(more)
fresh.load(folder)
assert same(values_of(fresh), want)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    """What the refusals name as the way out does work, and every process may save."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, kind, str(tmp_path / "adapter")],
            env={**environment, "RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors[-2000:]
