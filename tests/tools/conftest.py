"""Runs of the benchmark whose times are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from petal_kernels.tools import environment
from petal_kernels.tools.bench import app, ceilings, measure, op, packages, timing
from petal_kernels.tools.bench.ceilings import Ceilings
from petal_kernels.tools.bench.correctness import Errors
from petal_kernels.tools.bench.scenarios import Scenario
from tests.tools.known_times import COUNTS, ENVIRONMENT, ROOF, SAMPLES, Script, scenario


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command over given samples; its exit code."""

    def run(
        *words: str,
        samples: dict[str, list[float]] | None = None,
        errors: dict[str, Errors] | None = None,
        roof: Ceilings = ROOF,
        names: Sequence[str] = ("s",),
        stop: BaseException | None = None,
    ) -> int:
        def scenarios(*_: Any) -> Iterator[Callable[[], Scenario]]:
            for name in names:
                script = Script(samples or SAMPLES)
                monkeypatch.setattr(timing, "Clock", script.clock)
                yield partial(ready, name, script)

        def ready(name: str, script: Script) -> Scenario:
            if stop is not None and name == names[-1]:
                raise stop
            monkeypatch.setattr(timing, "Clock", script.clock)
            made = scenario(script, errors or {}, name)
            known = {id(p): COUNTS[label] for label, p in made.providers.items()}
            monkeypatch.setattr(measure, "_counts", lambda provider, *_: known[id(provider)])
            return made

        monkeypatch.setattr(op, "scenarios", scenarios)
        monkeypatch.setattr(ceilings, "measure", lambda *_: roof)
        monkeypatch.setattr(packages, "absent", lambda *_: {})
        monkeypatch.setattr(environment, "describe", lambda *_: dict(ENVIRONMENT))
        usual = ["op", "mode_contract", "--no-gate", "--rounds", "4", "--mode", "full"]
        return app.main([*usual, "--threads", str(torch.get_num_threads()), *words])

    return run
