"""examples/photos.py: real photographs, held out by stripes; a question learnt by the adapter.

Kind: a task that is solved by seeing the answers, or not at all.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("skimage")

from tests.examples.scripts import load


@pytest.fixture(scope="module")
def photos() -> ModuleType:
    return load("photos")


def test_pictures_are_photographs(photos: ModuleType) -> None:
    found = photos.photographs()
    assert len(found) == len(photos.THINGS)
    for picture in found:
        assert picture.dim() == 3
        assert picture.shape[0] == 3
        assert min(picture.shape[1:]) >= 4 * photos.PIECE
        assert 0.0 <= picture.min() < 0.25
        assert 0.7 < picture.max() <= 1.0
        assert len(picture.unique()) > 100


def test_held_out_pieces_share_no_pixel_with_the_others(photos: ModuleType) -> None:
    """Every column of a photograph has its own grey: the pieces show which ones they hold."""
    wide = 4 * photos.PIECE
    columns = torch.arange(float(wide)).expand(3, 3 * photos.PIECE, wide) / wide

    def seen(held_out: int) -> set[int]:
        pixels = photos.draw([columns] * 10, 64, 0, 0, held_out)["pixel_values"]
        return set((((pixels / 4 + 0.45) * wide) // photos.PIECE).int().unique().tolist())

    assert seen(0) == {0, 2}
    assert seen(1) == {1, 3}


def test_answers_are_those_of_the_picture(photos: ModuleType) -> None:
    flat = [torch.full((3, 128, 128), k / 10) for k in range(10)]
    for question, text in enumerate(photos.QUESTIONS):
        batch = photos.draw(flat, 50, question, 1)
        which = ((batch["pixel_values"].mean((1, 2, 3)) / 4 + 0.45) * 10).round().long()
        right = [list(photos.THINGS.values())[k].split()[question] for k in which]
        assert [photos.WORDS[i] for i in batch["input_ids"][:, -1]] == right
        assert {photos.WORDS[i] for i in batch["input_ids"][:, -2]} == {text}
        assert (batch["labels"][:, :-1] == -100).all()
        assert torch.equal(batch["labels"][:, -1], batch["input_ids"][:, -1])


def test_a_short_run(photos: ModuleType) -> None:
    found = photos.main(steps=8)
    assert found["what ?, adapter off"] == found["what ?"]
    assert all(math.isfinite(share) for share in found.values())
    assert found["what kind ?, before"] < 0.2


@pytest.mark.slow
def test_the_new_question_is_learnt(photos: ModuleType) -> None:
    found = photos.main()
    assert found["what ?"] > 0.6
    assert found["what kind ?, before"] < 0.1
    assert found["what kind ?, after"] > 0.8 * found["what ?"]
    assert found["what ?, adapter off"] == found["what ?"]
