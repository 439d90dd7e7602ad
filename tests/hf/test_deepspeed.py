"""An attached model under DeepSpeed's ZeRO, two processes on the CPU: gradients, steps and files
are those of one process, and what stage 3 holds in pieces is refused outside of its own block."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import petal_kernels as pk
from tests.hf import fused, ranks, tiny, tiny_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is missing"),
]
CONFIG = pk.LoraConfig(r=4, target_modules="all-linear")
RATE = 0.5


def _made() -> tuple[Any, Any]:
    model: Any = tiny_text.build("llama", torch.float32)
    attachment = pk.attach(model, CONFIG)
    tiny.randomise(attachment.adapter)
    return model, attachment


def _batch(rank: int) -> dict[str, Any]:
    given = fused.batch("llama", torch.float32)
    return {**given, "inputs_embeds": given["inputs_embeds"] + rank}


def _deepspeed(rank: int) -> Any:
    """Imported by the processes alone, since it changes torch's."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(ranks.RANKS), LOCAL_RANK=str(rank))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks.RANKS))
    deepspeed = importlib.import_module("deepspeed")
    # A faster way between processes of one machine, which it would compile here.
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    return deepspeed


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_what_one_process_trains(stage: int, tmp_path: Path) -> None:
    model, attachment = _made()
    steps = [fused.step(model, _batch(rank)) for rank in range(ranks.RANKS)]
    model.zero_grad()
    names = [name for name, _ in attachment.named_parameters()]
    want = {
        name: torch.stack([each[f"petal.{name}"] for each in steps]).mean(0) for name in names
    }
    trained = {n: p.detach() - RATE * want[n] for n, p in attachment.named_parameters()}
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }

    def work(rank: int) -> Any:
        deepspeed = _deepspeed(rank)
        own = list(attachment.parameters())
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=own,
            optimizer=torch.optim.SGD(own, lr=RATE),
            config={**settings, "zero_allow_untested_optimizer": True},
        )
        engine.backward(engine(**_batch(rank)).loss)
        grads = {n: deepspeed.utils.safe_get_full_grad(p) for n, p in attachment.named_parameters()}
        fused.same(grads, want, 1e-5)
        engine.step()
        if stage == 3:
            with pytest.raises(ValueError, match=r"save: .*GatheredParameters"):
                attachment.save(tmp_path / "pieces")
            with deepspeed.zero.GatheredParameters(list(attachment.adapter.parameters())):
                attachment.save(tmp_path / str(rank))
        else:
            attachment.save(tmp_path / str(rank))
        return "trained"

    assert ranks.forked(work, tmp_path / "ranks") == ["trained", "trained"]
    assert not (tmp_path / "pieces").exists()
    for rank in range(ranks.RANKS):
        loaded = pk.attach(tiny_text.build("llama", torch.float32), tmp_path / str(rank))
        fused.same({n: p.detach() for n, p in loaded.named_parameters()}, trained, 1e-5)
