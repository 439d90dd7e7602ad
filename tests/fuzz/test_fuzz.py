"""A share of the fuzzer in every run of the suite, and that the fuzzer itself judges by the rule.

``make fuzz CALLS=N SEED=S`` runs as many calls as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from petal_kernels._runtime import device
from petal_kernels.tools import parity
from tests.fuzz import worker
from tests.fuzz.__main__ import reproduction
from tests.fuzz.check import OPERATORS

SEED = 0
CALLS = 2000  # on the torch and native backends, two to a case


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a worker: one thread, fresh memory reads NaN."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with parity.poisoned():
        yield
    torch.set_num_threads(before)


def run(operator: str, profile: str, first: int, count: int) -> dict[str, object]:
    """Check cases; fails with a script for each that is wrong."""
    found = worker.run_chunk(operator, SEED, first, count, profile)
    shown = []
    for failure in found["failures"][:5]:
        script = reproduction(profile, operator, SEED, failure["index"])
        shown.append("\n".join([*failure["faults"], f"python - <<'E'\n{script}\nE"]))
    assert not shown, f"{len(found['failures'])} failures\n" + "\n\n".join(shown)
    return found


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_and_native(operator: str, half: int, one_thread: None) -> None:
    count = CALLS // len(OPERATORS) // 2 // 2
    calls = run(operator, "cpu", half * count, count)["calls"]
    assert calls["torch"] == count  # type: ignore[index]
    if device.cpu_library_reason() is None:
        assert calls["native"] > 0.85 * count  # type: ignore[index]  # all but fp64


@pytest.mark.skipif(
    device.triton_reason() is not None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton(operator: str, one_thread: None) -> None:
    run(operator, "triton", 0, 6)
