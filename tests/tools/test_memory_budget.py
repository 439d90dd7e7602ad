"""What `petal-kernels memory` says a step needs of a device: the allocator's segments, the parts of
the peak, weights in 4 and 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from petal_kernels import memory
from petal_kernels.memory.allocator import Allocator, needed_bytes
from petal_kernels.memory.optimizer import STATES, settings_of
from petal_kernels.memory.records import MIB, Block
from petal_kernels.tools.memory import budget, planner, presets, quantised, whatif
from petal_kernels.tools.memory.options import Options
from tests.tools.test_memory_config import tiny_config

ADAMW = settings_of("adamw")


# The allocator ----------------------------------------------------------------------------------


def block(size: int, born: int = 0, died: int | None = None) -> Block:
    return Block(size, born, "", "", died=died)


@pytest.mark.parametrize(
    ("sizes", "segments"),
    [
        ([1], 2 * MIB),
        ([512] * 4096, 2 * MIB),  # a small segment is full
        ([513] * 2048 + [1], 4 * MIB),  # each takes 1024 bytes
        ([MIB, MIB, 1], 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([9 * MIB, 9 * MIB, MIB + 512], 20 * MIB),
        ([9 * MIB, 9 * MIB, 3 * MIB], 40 * MIB),
        ([10 * MIB - 512], 20 * MIB),
        ([10 * MIB], 10 * MIB),
        ([11 * MIB + 1], 12 * MIB),
        # Of a large segment what is left is free where it has more than 1 MiB.
        ([19 * MIB], 20 * MIB),
    ],
)
def test_segments_are_those_of_cudas_allocator(sizes: list[int], segments: int) -> None:
    """By the constants of c10/cuda/CUDACachingAllocator.h."""
    assert needed_bytes(block(size) for size in sizes) == segments


def test_what_is_let_go_is_taken_again_and_joins_its_neighbours() -> None:
    allocator = Allocator()
    parts = [allocator.take(5 * MIB) for _ in range(4)]
    assert allocator.needed == 20 * MIB
    for i in (0, 2, 1):
        allocator.drop(parts[i])
    number, begin, size = allocator.take(15 * MIB)
    assert (number, begin, size) == (0, 0, 15 * MIB)
    assert allocator.needed == 20 * MIB


def test_the_smallest_piece_that_holds_a_block_is_taken() -> None:
    allocator = Allocator()
    a, b, c, *_ = (allocator.take(size * MIB) for size in (3, 2, 5, 2, 2))
    allocator.drop(a)
    allocator.drop(c)
    assert allocator.take(3 * MIB)[1] == 0
    assert allocator.take(4 * MIB)[1] == 5 * MIB
    assert b[1] == 3 * MIB


def test_a_rest_of_a_large_piece_stays_with_its_block() -> None:
    """Half a MiB behind a block is not joined to what becomes free behind it."""
    allocator = Allocator()
    _, b, c = (allocator.take(size * MIB) for size in (5, 5, 10))
    allocator.drop(b)
    assert allocator.take(9 * MIB // 2)[1:] == (5 * MIB, 5 * MIB)
    allocator.drop(c)
    assert allocator.take(21 * MIB // 2)[0] == 1
    assert allocator.needed == 20 * MIB + 12 * MIB


def test_a_segment_that_nothing_is_in_is_not_needed() -> None:
    first, then = block(30 * MIB, 0, 1), block(64 * MIB, 1)
    assert needed_bytes([first, then]) == 64 * MIB
    assert needed_bytes([block(30 * MIB, 0, 2), then]) == 94 * MIB
    # What came and went within one operation was never on the curve.
    assert needed_bytes([block(90 * MIB, 3, 3), then]) == 64 * MIB


def test_a_block_keeps_its_whole_segment() -> None:
    """Pieces of 8 MiB go, one of 2 stays: the 20 around it are needed."""
    blocks = [block(8 * MIB, 0, 1), block(2 * MIB, 0), block(8 * MIB, 0, 1), block(40 * MIB, 1)]
    assert needed_bytes(blocks) == 60 * MIB


# Parts ------------------------------------------------------------------------------------------


def small_step(folder: Path, **options: Any) -> tuple[memory.Profile, presets.Step]:
    given: dict[str, Any] = {"method": "lora", "targets": "all-linear", "rank": 4, "batch": 2}
    given |= {"length": 8, "dtype": "bfloat16"}
    source, _ = tiny_config("llava-qwen2", folder)
    step = presets.prepare_config(source, Options(**given | options))
    return whatif.run(step), step


def test_parts_are_those_of_the_peak(tmp_path: Path) -> None:
    profile, step = small_step(tmp_path, method="full", targets=None)
    found = budget.budget(profile, ADAMW, 7 * MIB, planner.model_of(step))
    with_step = profile.with_optimizer(ADAMW)
    parts = dict(found.parts)
    assert parts.pop(budget.CONTEXT) == 7 * MIB
    assert parts.pop(budget.ROUNDING) == needed_bytes(with_step.blocks) - with_step.peak_bytes
    assert sum(parts.values()) == with_step.peak_bytes
    assert parts[budget.FROZEN] == 0
    assert parts[budget.TRAINED] == profile.sizes.parameters == 2 * count(step)
    assert parts[STATES] == with_step.sizes.states
    assert found.saved == profile.saved_bytes
    assert found.need == sum(found.parts.values())


def count(step: presets.Step) -> int:
    return sum(p.numel() for p in step.model.parameters())  # type: ignore[attr-defined]


def test_adapters_stand_beside_the_frozen_weights(tmp_path: Path) -> None:
    profile, step = small_step(tmp_path)
    found = budget.budget(profile, ADAMW, 0, planner.model_of(step)).parts
    trained = profile.sizes.trainable_numbers
    assert found[budget.TRAINED] == 4 * trained > 0
    assert found[budget.FROZEN] == 2 * (count(step) - trained)
    assert found[STATES] == 2 * 4 * trained
    half, _ = small_step(tmp_path, adapter_dtype="bfloat16")
    assert half.sizes.trainable == 2 * trained


def test_logits_are_told_by_the_width_of_the_head(tmp_path: Path) -> None:
    profile, step = small_step(tmp_path)
    head = step.model.get_output_embeddings().weight.shape[0]  # type: ignore[attr-defined]
    assert budget.vocabularies(planner.model_of(step)) == {head}
    shaped = [Block(5, 0, "", "", shape=(3, width)) for width in (head, head + 1)]
    words = frozenset({head})
    assert [budget._part(b, frozenset(), words) for b in shaped] == [budget.LOSS, budget.OTHERS]
    assert profile.saved_bytes > 0


PARTS = dict.fromkeys(budget.PARTS, 0) | {
    budget.FROZEN: 160, budget.TRAINED: 17, budget.GRADIENTS: 16, STATES: 32,
    budget.KEPT: 100, budget.OTHERS: 1,
}  # fmt: skip


def test_an_engine_divides_what_it_shards_and_gathers_a_unit() -> None:
    whole = budget.Budget(PARTS, "backward", unit=50)
    zero, fsdp = (budget.sharded(whole, how, 4) for how in (budget.ZERO2, budget.FSDP))
    assert zero.need == whole.need - 12 - 24
    assert fsdp.need == 40 + 5 + 4 + 8 + 100 + 1 + 50


def test_a_unit_is_two_layers_and_what_is_in_none() -> None:
    class Layer(nn.Linear):
        pass

    model = nn.Module()
    model._no_split_modules = ["Layer"]  # type: ignore[assignment]
    model.layers = nn.ModuleList([Layer(3, 5), Layer(3, 2), Layer(3, 2)])
    model.head = nn.Linear(2, 7)
    assert budget.gathered(model) == 4 * (2 * (3 * 5 + 5) + 2 * 7 + 7)


# Quantised bases --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("int8", 300 * 100 + 4 * 300),
        ("nf4", 15000 + 4 * 469 + 64),
        ("nf4-double", 15000 + 469 + 4 * 2 + 4 + 1024 + 64),
    ],
)
def test_a_weight_has_the_bytes_of_its_blocks(kind: str, size: int) -> None:
    """300 x 100: 468.75 blocks of 64, of which 256 share a scale again."""
    assert quantised.weight_bytes(300, 100, kind) == size
    made = quantised.QuantisedLinear(nn.Linear(100, 300), kind)
    assert made.weight.numel() == size


@pytest.mark.parametrize(("kind", "kept"), [("int8", True), ("nf4", False), ("nf4-double", False)])
def test_an_8_bit_product_keeps_its_input(kind: str, kept: bool) -> None:
    layer = quantised.QuantisedLinear(nn.Linear(64, 32).requires_grad_(False), kind)
    x = torch.zeros(4, 64, requires_grad=True)
    found = memory.profile(layer, (x,))
    assert found.saved_bytes == (4 * 64 * 4 if kept else 0)
    decoded = [b for b in found.blocks if b.shape == (32, 64)]
    assert len(decoded) == (1 if kept else 2)  # of 4 bits in the forward, too


def test_a_quantised_base_leaves_heads_and_embeddings(tmp_path: Path) -> None:
    profile, step = small_step(tmp_path, base="nf4")
    model: Any = step.model
    kinds = {type(m).__name__ for p, m in model.named_modules() if p.endswith("q_proj")}
    assert "Linear" not in kinds
    assert type(model.lm_head) is nn.Linear
    plain, _ = small_step(tmp_path)
    assert profile.sizes.parameters < plain.sizes.parameters
    assert profile.sizes.trainable == plain.sizes.trainable
