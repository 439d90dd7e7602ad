"""Processes of one group that hold different adapters: what engines make of them, and that
`check_ranks` refuses them in every process, before and after an engine came."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import petal_kernels as pk
from tests.hf import ranks, tiny, tiny_text
from tests.hf.test_files_fuzz import values_of
from tests.hf.test_sharded import shard

Q = pk.LoraConfig(r=2, target_modules=["q_proj"])


def _made(config: Any = Q, seed: int = 1, **options: Any) -> tuple[nn.Module, Any]:
    model = tiny_text.build("llama", torch.float32)
    attachment = pk.attach(model, config, **options)
    tiny.randomise(attachment.adapter, seed)
    return model, attachment


def _lora(**changes: Any) -> pk.LoraConfig:
    return pk.LoraConfig(**{"r": 2, "target_modules": ["k_proj"], **changes})


def _frozen() -> tuple[nn.Module, Any]:
    model, attachment = _made()
    next(attachment.parameters()).requires_grad_(False)
    return model, attachment


def _merged() -> tuple[nn.Module, Any]:
    model, attachment = _made()
    attachment.merge()
    return model, attachment


# What rank 0 and rank 1 hold, and what is said of it.
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "values": (_made, lambda: _made(seed=2), r"other values of \S*layers\.0\S* \(4 of 4 tensors"),
    "rank": (lambda: _made(_lora()), lambda: _made(_lora(r=3)), r"config\.r: 2 on rank 0, 3 there"),
    "alpha": (
        lambda: _made(_lora(lora_alpha=8)),
        lambda: _made(_lora(lora_alpha=16)),
        r"config\.lora_alpha: 8\S* on rank 0, 16\S* there",
    ),
    "places": (
        lambda: _made(_lora()),
        lambda: _made(_lora(target_modules=["v_proj"])),
        r"config\.target_modules: .*k_proj.* on rank 0, .*v_proj.* there",
    ),
    "method": (_made, lambda: _made(pk.RoutingConfig(r=2)), "method: 'lora' on rank 0, 'routing'"),
    "form": (_made, lambda: _made(implementation="published"), "implementation: 'fused' on rank 0"),
    "trained": (_made, _frozen, r"trained parameters: \["),
    "merged": (_made, _merged, "merged: False on rank 0, True there"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_adapter_is_refused_in_every_process(kind: str, tmp_path: Path) -> None:
    *makers, said = OTHERS[kind]
    held = [make() for make in makers]
    for answer in ranks.forked(lambda rank: held[rank][1].check_ranks(), tmp_path):
        assert isinstance(answer, RuntimeError), answer
        assert "on rank 1 than on rank 0" in str(answer)
        with pytest.raises(RuntimeError, match=said):
            raise answer


def test_one_adapter_passes(tmp_path: Path) -> None:
    """Whole, replicated and sharded; a file loaded everywhere, and in nobody."""
    model, attachment = _made()
    want = {name: value.clone() for name, value in attachment.state_dict().items()}

    def work(rank: int) -> str:
        attachment.check_ranks()
        attachment.save(tmp_path / "saved" / str(rank))
        DistributedDataParallel(model)
        attachment.check_ranks()
        attachment.load(tmp_path / "saved" / str(rank))  # equal values in two files
        attachment.check_ranks()
        with torch.no_grad():
            next(attachment.parameters()).add_(rank)
        attachment.save(tmp_path / "other" / str(rank))
        attachment.load(tmp_path / "other" / str(rank))
        attachment.load_state_dict(want)  # what the files held is no more
        attachment.check_ranks()
        shard(model)
        attachment.check_ranks()
        return "passed"

    assert ranks.forked(work, tmp_path / "ranks") == ["passed", "passed"]


def test_alone_there_is_nothing_to_compare() -> None:
    _, attachment = _made()
    attachment.check_ranks()
    attachment.detach()
    with pytest.raises(RuntimeError, match="check_ranks: this attachment was detached"):
        attachment.check_ranks()


def test_ddp_gives_rank_0s_values_to_all(tmp_path: Path) -> None:
    """So another file on rank 1 is lost there without a word: the check says it all the same."""
    model, attachment = _made()
    folders = [tmp_path / "0", tmp_path / "1"]
    want = []
    for seed, folder in enumerate(folders):
        tiny.randomise(attachment.adapter, seed)
        attachment.save(folder)
        want.append(values_of(attachment))

    def work(rank: int) -> Any:
        attachment.load(folders[rank])
        DistributedDataParallel(model)
        assert values_of(attachment) == want[0]
        return attachment.check_ranks()

    for answer in ranks.forked(work, tmp_path / "ranks"):
        with pytest.raises(RuntimeError, match="rank 1 than on rank 0: other values were loaded"):
            raise answer


def test_who_loads_in_rank_0_alone_and_lets_ddp_send_it_is_right(tmp_path: Path) -> None:
    model, attachment = _made()
    attachment.save(tmp_path / "saved")
    tiny.randomise(attachment.adapter, 5)

    def work(rank: int) -> Any:
        if rank == 0:
            attachment.load(tmp_path / "saved")
        DistributedDataParallel(model)
        return attachment.check_ranks()

    assert ranks.forked(work, tmp_path / "ranks") == [None, None]


def test_ddp_refuses_other_shapes_itself(tmp_path: Path) -> None:
    held = [_made(), _made(_lora(r=3, target_modules=["q_proj"]))]
    answers = ranks.forked(lambda rank: DistributedDataParallel(held[rank][0]), tmp_path)
    assert "appears not to match sizes" in str(answers[1])
    assert isinstance(answers[0], RuntimeError)


@pytest.mark.parametrize("loads", [(0, 1), (0, None)], ids=["another file", "no file"])
def test_fsdp2_makes_one_adapter_of_two(loads: Any, tmp_path: Path) -> None:
    """Half of each process's values: seen before sharding, and after it by what was loaded."""
    model, attachment = _made()
    whole = [value.shape for value in attachment.state_dict().values()]
    for seed in (0, 1):
        tiny.randomise(attachment.adapter, seed)
        attachment.save(tmp_path / str(seed))
    name = next(name for name, value in attachment.state_dict().items() if len(value) % 2 == 0)

    def work(rank: int) -> Any:
        if loads[rank] is not None:
            attachment.load(tmp_path / str(loads[rank]))
        own = attachment.state_dict()[name].clone().chunk(2)
        with pytest.raises(RuntimeError, match="other values of"):
            attachment.check_ranks()
        shard(model)
        mixed = attachment.state_dict()[name].full_tensor().chunk(2)
        assert torch.equal(mixed[rank], own[rank])
        assert not torch.equal(mixed[1 - rank], own[1 - rank])
        assert [value.shape for value in attachment.state_dict().values()] == whole
        return attachment.check_ranks()

    for answer in ranks.forked(work, tmp_path / "ranks"):
        with pytest.raises(RuntimeError, match="rank 1 than on rank 0: other values were loaded"):
            raise answer


def test_trainer_asks_when_training_begins(tmp_path: Path) -> None:
    """Through the callback alone: Trainer itself would train either."""
    held = [_made(_lora(lora_alpha=8 * (rank + 1)))[0] for rank in range(ranks.RANKS)]
    call = pk.hf.AdapterCheckpoint().on_train_begin

    def work(rank: int) -> Any:
        return call(None, None, None, model=DistributedDataParallel(held[rank]))

    for answer in ranks.forked(work, tmp_path):
        with pytest.raises(RuntimeError, match=r"rank 1 than on rank 0: config\.lora_alpha"):
            raise answer
