"""The emulation of CUDA itself, and what its kernels share: 16-bit conversions, the generator, the
alarms, the sanitizers."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from petal_kernels._runtime import philox
from tests.emulation import build
from tests.emulation.support import needs_compiler
from tests.ops import folders

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = needs_compiler


def pointer(a: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_are_torchs(dtype: torch.dtype, lib: ctypes.CDLL) -> None:
    bfloat = int(dtype == torch.bfloat16)
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(1 << 16, dtype=np.float32)
    lib.probe_widen(pointer(bits), pointer(wide), ctypes.c_int64(1 << 16), bfloat)
    values = torch.from_numpy(bits.view(np.int16)).view(dtype)
    torch.testing.assert_close(
        torch.from_numpy(wide), values.float(), rtol=0, atol=0, equal_nan=True
    )
    # Every value, the midpoints of neighbours and what lies just beside them; random bits.
    near = values.float().double()
    near = near[near.isfinite()].sort().values
    middle = (near[1:] + near[:-1]) / 2
    random = torch.from_numpy(
        np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    )
    floats = torch.cat(
        [near.float(), middle.float(), torch.nextafter(middle.float(), torch.tensor(9e9)), random]
    )
    floats = torch.cat(
        [floats, torch.tensor([float("inf"), float("-inf"), 65519.9, 65520.0, 1e-45])]
    )
    source = floats.numpy()
    got = np.empty(source.size, dtype=np.uint16)
    lib.probe_narrow(pointer(source), pointer(got), ctypes.c_int64(source.size), bfloat)
    narrowed = torch.from_numpy(got.view(np.int16)).view(dtype)
    torch.testing.assert_close(narrowed, floats.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99999, 1.5 / 65536])
def test_generator_is_the_definition(p: float, lib: ctypes.CDLL) -> None:
    rows, groups = 9, 5

    def keep(seed: int, offset: int, stream: int, row0: int) -> Tensor:
        bits = np.empty((rows, groups), dtype=np.uint8)
        wide, p_ = ctypes.c_int64, ctypes.c_double(p)
        place = (wide(row0), wide(rows), wide(groups), p_, pointer(bits))
        lib.probe_keep(wide(seed), wide(offset), ctypes.c_uint32(stream), *place)
        unpacked = np.unpackbits(bits[..., None], axis=2, bitorder="little")
        return torch.from_numpy(unpacked.reshape(rows, groups * 8)).bool()

    for seed, offset, stream in ((0, 0, 0), (-1, -1, 3), (0x0123_4567_89AB_CDEF, 0xFFFF_FFFF, 1)):
        rng = torch.tensor([seed, offset])
        want = philox.keep_masks(rng, p, 4, rows, groups * 8)[stream]
        assert torch.equal(keep(seed, offset, stream, 0), want)
        # Rows beyond 2^32 are other rows, not the first ones again.
        if p == 0.5:
            assert not torch.equal(keep(seed, offset, stream, 1 << 32), want)
    scale = lib.probe_scale(ctypes.c_double(p))
    assert torch.tensor(scale) == torch.tensor(philox.keep_scale(p))


@pytest.mark.usefixtures("emulated")
def test_emulation_sees_planted_faults(lib: ctypes.CDLL) -> None:
    source = np.arange(128, dtype=np.float32)
    want = source.reshape(64, 2)[:, ::-1].reshape(-1)[::-1]

    def run(fault: int) -> tuple[bytes | None, bool]:
        out = np.zeros(128, dtype=np.float32)
        message = lib.probe_reverse(pointer(source), pointer(out), fault)
        return message, np.array_equal(out, want)

    assert run(0) == (None, True)
    assert run(1) == (None, False)
    message, _ = run(2)
    assert message is not None
    assert b"barrier" in message
    assert run(3) == (None, False)


@pytest.mark.slow
@pytest.mark.parametrize("driver", build.drivers(), ids=lambda path: path.stem)
def test_sanitizers_find_nothing(driver: Path) -> None:
    program = build.sanitized(driver)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every kernel is right" in done.stdout


def test_every_operator_has_a_driver() -> None:
    """And each one's launchers are called there, by the headers that drivers include."""
    text = "".join(driver.read_text() for driver in build.drivers())
    included = "".join(re.findall(r'^#include "(.*)"', text, re.MULTILINE))
    assert [name for name in folders.names("cuda_impl") if name not in included] == []
