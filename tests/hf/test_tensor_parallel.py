"""A base that transformers' tensor-parallel plan has split over two processes: what stands beside
the split linears works, what would have to be split with them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip("transformers.distributed.tensor_parallel")

import petal_kernels as pk
from tests.hf import fused, ranks, tiny_text

ADAPTER = pk.RoutingConfig(r=3, kind="adapter")
WHOLE = pk.RoutingConfig(r=3, kind="adapter", modules_to_save=["lm_head", "model.norm"])


def _split(model: Any) -> Any:
    """As `from_pretrained(distributed_config=...)` does it."""
    from transformers.distributed import tensor_parallel
    from transformers.distributed.configuration_utils import DistributedConfig

    mesh = init_device_mesh("cpu", (ranks.RANKS,), mesh_dim_names=("tp",))
    plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=ranks.RANKS))
    return tensor_parallel.apply_tensor_parallelism(model, mesh, plan)


def _llama() -> Any:
    return tiny_text.build("llama", torch.float32)


def _fill(attachment: Any) -> None:
    """Every process the same; what is trained whole keeps its base's values."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in attachment.named_parameters():
        if not name.startswith("modules_to_save"):
            nn.init.normal_(parameter, generator=generator)


def _step(model: Any, attachment: Any) -> fused.Values:
    found = fused.step(model, fused.batch("llama", torch.float32))
    assert len(found) == 1 + len(list(attachment.named_parameters()))
    return {name: _whole(value) for name, value in found.items()}


def _whole(value: Tensor) -> Tensor:
    gathered = getattr(value, "full_tensor", None)
    return value if gathered is None else gathered()


@pytest.mark.filterwarnings("ignore:.*RNG")
@pytest.mark.parametrize(
    ("order", "config"),
    [
        ("split first", ADAPTER),
        ("split first", WHOLE),
        pytest.param("attach first", ADAPTER, marks=pytest.mark.slow),
    ],
    ids=["split first", "modules trained whole", "attach first"],
)
def test_adapters_behind_blocks_are_those_of_one_process(
    order: str, config: Any, tmp_path: Path
) -> None:
    """Gradients in every process; and the file is whole, split or not."""
    model = _llama()
    attachment = pk.attach(model, config)
    _fill(attachment)
    want = _step(model, attachment)
    parallel = _llama()

    def work(rank: int) -> Any:
        if order == "split first":
            _split(parallel)
        adapted = pk.attach(parallel, config)
        _fill(adapted)
        if order == "attach first":
            _split(parallel)
        assert parallel.model.layers[0].self_attn.q_proj.weight.placements[0].dim == 0
        got = _step(parallel, adapted)
        fused.same(got, want, 1e-5)
        adapted.save(tmp_path / f"saved{rank}")
        return "same"

    assert ranks.forked(work, tmp_path / "ranks") == ["same", "same"]
    for rank in range(ranks.RANKS):
        loaded = _llama()
        fused.same(_step(loaded, pk.attach(loaded, tmp_path / f"saved{rank}")), want, 1e-6)


SPLIT: dict[str, Any] = {
    "columns": pk.LoraConfig(r=2, target_modules=["q_proj"]),
    "rows": pk.LoraConfig(r=2, target_modules=["down_proj"]),
    "all": pk.LoraConfig(r=2, target_modules="all-linear"),
    "routing": pk.RoutingConfig(r=2),
    "experts": pk.ExpertConfig(r=2, experts=2),
}


def test_split_linears_are_refused_by_name(tmp_path: Path) -> None:
    model = _llama()

    def work(rank: int) -> Any:
        _split(model)
        before = list(model.modules())
        for kind, config in SPLIT.items():
            for call in (pk.attach, pk.plan):
                with pytest.raises(ValueError, match=r"got one at model\.layers\.0\S+ that tensor"):
                    raise AssertionError(kind, call(model, config))
        assert list(model.modules()) == before
        return "refused"

    assert ranks.forked(work, tmp_path) == ["refused", "refused"]


def test_splitting_an_adapted_linear_is_refused_at_its_first_call(tmp_path: Path) -> None:
    """By torch, which has no rule for our operators: never a piece for the whole."""
    model = _llama()
    attachment = pk.attach(model, SPLIT["columns"])

    def work(rank: int) -> Any:
        _split(model)
        with pytest.raises(RuntimeError, match=r"lowrank_linear\S+ got mixed .* DTensor"):
            _step(model, attachment)
        return "refused"

    assert ranks.forked(work, tmp_path) == ["refused", "refused"]


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(["q_proj", "v_proj"], marks=pytest.mark.slow),
        pytest.param(["o_proj", "down_proj"], marks=pytest.mark.slow),
        "all-linear",
    ],
    ids=str,
)
def test_a_split_model_of_pefts_computes_what_peft_computes(targets: Any, tmp_path: Path) -> None:
    """PEFT makes factors of the pieces' sizes."""
    pytest.importorskip("peft")
    model = _llama()

    def work(rank: int) -> Any:
        adapted = fused.adapted(_split(model), target_modules=targets)
        given = fused.batch("llama", torch.float32)
        want = fused.step(adapted, given)
        report = pk.fuse(adapted)
        with fused.operators() as calls:
            got = fused.step(adapted, given)
        fused.same(got, want, 1e-5)
        assert set(report.declined.values()) <= {"base has its forward replaced"}
        return fused.forwards(calls), len(report.rows)

    for answer in ranks.forked(work, tmp_path):
        assert isinstance(answer, tuple), answer
        assert answer == ({"lowrank_linear": answer[1]}, answer[1])
