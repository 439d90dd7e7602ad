"""The dropout generator against published test vectors' construction and against its statistics."""

from __future__ import annotations

import pytest
import torch

from petal_kernels._runtime import philox


def scalar_philox(
    key: tuple[int, int], counter: tuple[int, int, int, int], rounds: int
) -> list[int]:
    """Philox4x32 on Python integers, written from the definition in Salmon et al. 2011, figure
    4."""
    mask = 0xFFFFFFFF
    k0, k1 = key
    c = list(counter)
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & mask, (a >> 32) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


def test_scalar_form_gives_the_published_ten_round_vectors() -> None:
    """Known answers of Random123 for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert scalar_philox((0, 0), (0, 0, 0, 0), 10) == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]
    assert scalar_philox((ones, ones), (ones,) * 4, 10) == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (12345, 7), (-1, 2**32 - 1), (2**61 + 3, -5)])
def test_lanes_are_the_scalar_generator(seed: int, offset: int) -> None:
    got = philox.lanes(torch.tensor([seed, offset]), 3, 5, 21)
    for k in range(3):
        for row in range(5):
            for col in range(21):
                words = scalar_philox(
                    (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF),
                    (row, 0, col // 8, (offset + k) & 0xFFFFFFFF),
                    philox.ROUNDS,
                )
                lane = (words[(col % 8) // 2] >> (16 * (col % 2))) & 0xFFFF
                assert got[k, row, col] == lane


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_independence(p: float) -> None:
    masks = philox.keep_masks(torch.tensor([99, 0]), p, 2, 4096, 64).double()
    n = masks[0].numel()
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(float(masks.mean()) - (1 - p)) < 5 * sigma
    centred = masks - masks.mean()
    variance = p * (1 - p)
    for a, b in (
        (centred[0], centred[1]),
        (centred[0, :, :-1], centred[0, :, 1:]),
        (centred[0, :-1], centred[0, 1:]),
    ):
        assert abs(float((a * b).mean())) / variance < 5 / a.numel() ** 0.5


def test_scale_is_the_exact_inverse_of_the_kept_share() -> None:
    for p in (0.0, 1e-6, 0.1, 0.5, 0.999999):
        kept = (philox.LEVELS - philox.threshold(p)) / philox.LEVELS
        assert philox.keep_scale(p) * kept == pytest.approx(1.0, abs=1e-12)
    assert abs(philox.threshold(0.1) / philox.LEVELS - 0.1) < 2**-17


@pytest.mark.parametrize(
    ("bad", "kind"), [(1.0, ValueError), (-0.1, ValueError), ("0.1", TypeError), (True, TypeError)]
)
def test_bad_probability(bad: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="dropout: want"):
        philox.check_probability(bad)  # type: ignore[arg-type]
