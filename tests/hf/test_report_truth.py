"""report() says what a call made here runs on: compared with the recorded forwards of that call."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels._runtime.backends import BackendUnavailable
from petal_kernels.hf.context import THREAD
from petal_kernels.hf.report import SHARED_FACTORS, Report
from petal_kernels.hf.report import Row as ReportRow
from petal_kernels.nn.lora_init import is_taken
from tests.hf import methods, tiny, tiny_text
from tests.hf.method_families import FAMILIES
from tests.hf.methods import ROWS, Row, around, attached, every, first, own, read
from tests.hf.used_backends import ELSEWHERE, SHARED, Place, used_by_place

KINDS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "fp64": (torch.float64, False),
    "autocast": (torch.float32, True),
}
# rank, training, backend; the planner looks at rank and grad mode, the backends at dtypes.
SETTINGS = (
    (4, True, "auto"),
    (4, False, "torch"),
    (300, True, "native"),
    (300, False, "auto"),
)


def _grid() -> list[Any]:
    quick = {(row, "autocast") for row in ROWS if own(row)}
    quick |= {(row, kind) for row in ROWS if first(row) for kind in KINDS}
    return [
        pytest.param(
            row,
            kind,
            id=f"{row.name}-{kind}",
            marks=[] if (row, kind) in quick else [pytest.mark.slow],
        )
        for row in ROWS
        for kind in KINDS
    ]


@contextlib.contextmanager
def setting(model: nn.Module, training: bool, backend: str, autocast: bool) -> Iterator[None]:
    model.train(training)
    with (
        pk.use_backend(backend),
        torch.set_grad_enabled(training),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        yield


def built(row: Row, r: int, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """As a user has it: the model in its dtype, the adapter in its own. What is taken out of a
    weight has that weight's rank at most."""
    model, config = methods.fresh(row).to(dtype), row.config()
    if is_taken(getattr(config, "init_lora_weights", True)):
        r = min(r, *(size for p in model.parameters() if p.dim() == 2 for size in p.shape))
    return model, pk.attach(model, dataclasses.replace(config, r=r))


def _places(report: Any) -> dict[str, ReportRow]:
    """By path, without what is trained whole there beside (a linear's bias)."""
    return {each.module: each for each in report.rows if each.role != "modules_to_save"}


def check(row: Row, model: nn.Module, attachment: Any, dtype: torch.dtype) -> int:
    """Of one call made here; the number of places that ran an operator."""
    given, refused = row.given(dtype=dtype), False
    with used_by_place(attachment) as used:
        try:
            with around(attachment, given):
                read(model, given.batch)
        except BackendUnavailable:
            refused = True
    report = attachment.report()
    assert refused == any(each.backend == "none" for each in report.rows)
    if refused:
        return len(report.rows)
    assert ELSEWHERE not in used
    ran = {path: place for path, place in used.items() if place.used}
    shared = [each for each in report.rows if each.role.startswith(SHARED_FACTORS)]
    contracted = ran.pop(SHARED, Place())
    assert joined(*(each.backend for each in shared)) == backends(contracted)
    reports: dict[Any, dict[str, ReportRow]] = {}
    for path, place in ran.items():
        for tokens in place.tokens:
            # Of PETAL's experts the input comes from their embeddings' forward.
            size = tokens if len(tokens) == 2 else (2, 9)
            if size not in reports:
                reports[size] = _places(attachment.report(size))
            told = reports[size][path]
            assert told.backend == backends(place), (path, told.why)
            for each in place.used:
                plan = f"{each.backend}: plan {each.plan}"
                assert len(place.tokens) > 1 or each.plan is None or plan in told.why, path
    silent = {each.module for each in report.rows if each.backend} - used.keys()
    assert not {path for path in silent if not path.startswith("petal.")}
    return len(ran)


def backends(place: Place) -> str:
    # A recompute contracts its own modes; its row does not tell what else is the stack's.
    contracts = place.used and all(each.operator == "mode_contract" for each in place.used)
    own = [each for each in place.used if contracts or each.operator != "mode_contract"]
    return joined(*(each.backend for each in own))


def joined(*names: str) -> str:
    return " + ".join(dict.fromkeys(part for name in names for part in name.split(" + ")))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("row", "kind"), _grid())
def test_every_place_runs_on_the_backend_that_its_row_names(row: Row, kind: str) -> None:
    dtype, autocast = KINDS[kind]
    for r in (4, 300):
        model, attachment = built(row, r, dtype)
        for rank, training, backend in SETTINGS:
            if rank == r:
                with setting(model, training, backend, autocast):
                    assert check(row, model, attachment, dtype)


def _row(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def _bases(attachment: Any) -> dict[str, nn.Module]:
    return {place.path: wrapper.base for place, _, _, wrapper in attachment.installed.wrapped}


SPECIAL = ("petal-paper-blip2", "aurora-vqa", "lora-gpt2", "vlpet-t5", "experts-lora-llama")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SPECIAL)
def test_places_beside_special_ones_are_told_apart(name: str, training: bool) -> None:
    """Equal but for a hook, for a weight in another mode: the group's plan is another one."""
    row = _row(name)
    model, attachment = built(row, 300, torch.float32)
    bases = list(_bases(attachment).values())
    bases[0].register_forward_hook(lambda module, args, output: None)
    bases[-1].weight.requires_grad_(True)
    with setting(model, training, "auto", False):
        assert check(row, model, attachment, torch.float32)


def test_a_norm_that_others_watch_is_told_apart() -> None:
    row = _row("vlpet-bart-large")
    model, attachment = built(row, 4, torch.float32)
    norms = [m for n, m in model.named_modules() if n.endswith("layers.1.final_layer_norm")]
    norms[0].register_forward_hook(lambda module, args, output: None)
    with setting(model, True, "auto", False):
        assert check(row, model, attachment, torch.float32)


@pytest.mark.parametrize("name", ["petal-paper-blip2", "lora-llama", "vlpet-t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_runs_twice(name: str, reentrant: bool) -> None:
    """In the reentrant form without gradients first: what is best then may be another backend."""
    row = _row(name)
    model: Any
    model, attachment = built(row, 300, torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch = FAMILIES[row.family].batch(size=40, seed=0, length=9)
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            batch[key] = value.float()
    with setting(model, True, "auto", False), used_by_place(attachment) as used:
        read(model, batch)[1].backward()
    ran = {path: place for path, place in used.items() if place.used and path != SHARED}
    for path, place in ran.items():
        (tokens,) = place.tokens
        with setting(model, True, "auto", False):
            told = _places(attachment.report(tokens))[path]
        assert told.backend == backends(place), (path, told.why)
    both = any(backends(place) == "torch + native" for place in ran.values())
    assert both == (reentrant and name.startswith("petal"))


@every("report", quick=first)
def test_merged_places_disabled_ones_and_the_published_form_run_no_operator(row: Row) -> None:
    model, attachment = attached(row)
    model.eval()
    with attachment.disabled():
        off = _shown(attachment.report())
    assert set(off.values()) == {"off"}
    published = attached(row, "published")[1]
    assert set(_shown(published.report()).values()) == {"eager"}
    if not row.folds:
        return
    before = _shown(attachment.report())
    folded = set(attachment.merge().folded)
    report = attachment.report()
    assert {each.module for each in report.rows if each.backend == "merged"} == folded
    assert not folded or "merged: the update lies in the weight" in str(report)
    given = row.given()
    with torch.no_grad(), used_by_place(attachment) as used, around(attachment, given):
        read(model, given.batch)
    assert not [path for path in folded if path in used and used[path].used]
    attachment.unmerge()
    assert _shown(attachment.report()) == before


def _shown(report: Report) -> dict[str, str]:
    return {each.module: each.backend for each in report.rows if each.backend}


@every("report", quick=first)
def test_a_report_changes_nothing_and_shows_nobody_a_tensor(row: Row) -> None:
    model, attachment = attached(row)
    met: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *given, path=path: met.append(path))
        module.register_forward_pre_hook(lambda *given, path=path: met.append(path))
    given = row.given()
    with around(attachment, given):
        read(model.train(), given.batch)
    routed = {path: r.logits for path, r in _routing(attachment).items()}
    values = {name: (id(p), p._version, p.grad) for name, p in model.named_parameters()}
    attributes = {path: set(m.__dict__) for path, m in model.named_modules()}
    met.clear()
    state, thread = torch.get_rng_state(), dict(vars(THREAD))
    with torch.autocast("cpu", torch.bfloat16):
        first_report = str(attachment.report())
        assert str(attachment.report()) == first_report
        assert torch.is_autocast_cache_enabled()
        for parameter in attachment.parameters():
            assert type(parameter.to(torch.bfloat16) * 1) is Tensor
    assert not met
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(THREAD) == thread
    assert {path: r.logits for path, r in _routing(attachment).items()} == routed
    assert {name: (id(p), p._version, p.grad) for name, p in model.named_parameters()} == values
    assert {path: set(m.__dict__) for path, m in model.named_modules()} == attributes


def _routing(attachment: Any) -> dict[str, Any]:
    return attachment.routing() if attachment.method.routings else {}


@pytest.mark.parametrize("kind", ["plain", "hooked"])
def test_a_report_on_two_hundred_places_is_quick(kind: str) -> None:
    import transformers

    config = transformers.LlamaConfig(
        **{**tiny_text._llama_like(), "num_hidden_layers": 100, "initializer_range": 0.02}
    )
    attachment = pk.attach(transformers.LlamaForCausalLM(config), pk.RoutingConfig(r=4))
    if kind == "hooked":
        for base in _bases(attachment).values():
            base.register_forward_hook(lambda module, args, output: None)
    attachment.report()
    start = time.thread_time()
    rows = attachment.report().rows
    assert len(rows) == 200
    assert time.thread_time() - start < 2.0


class Reading(nn.Linear):
    """A linear of somebody else's, that looks at its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.abs().max().item() > 0 else 0.5)


@every("report", quick=first)
def test_a_base_that_reads_values_is_not_known_and_its_neighbours_are(row: Row) -> None:
    """And every base that is called, not read, is listed."""
    model = methods.fresh(row)
    bases = _bases(pk.attach(model, row.config()))
    linears = [path for path, base in bases.items() if isinstance(base, nn.Linear)]
    pk.attachment(model).detach()
    if not linears:
        pytest.skip("adapts no linear")
    model.get_submodule(linears[-1]).__class__ = Reading
    attachment = pk.attach(model, row.config())
    report = attachment.report()
    told = _places(report)[linears[-1]]
    assert told.backend == "not known"
    assert "not known: a Reading does not run dry (" in told.why
    assert [each.module for each in report.rows if each.backend == "not known"] == [told.module]
    assert list(report.declined) == linears[-1:]
    assert report.declined[linears[-1]].startswith("base is a Reading, not ")
    assert f"base called, not read: {told.module} (base is a Reading" in str(report)


@every("report", quick=own)
def test_every_merged_place_says_what_rounding_cost(row: Row) -> None:
    if not row.folds:
        pytest.skip("depends on each sample's features")
    model = methods.fresh(row).to(torch.bfloat16)
    attachment = pk.attach(model, row.config())
    methods.train(attachment)
    before = {path: base.weight.double() for path, base in _bases(attachment).items()}
    exact: dict[str, Any] = {
        path: wrapper.delta(torch.float64) for path, wrapper in attachment.wrappers()
    }
    report = attachment.merge()
    assert report.rounding.keys() == set(report.folded)
    assert not {p for p, d in exact.items() if isinstance(d, Tensor)} - set(report.folded)
    for path, base in _bases(attachment).items():
        if path not in report.folded:
            assert report.kept[path]
            continue
        update = exact[path] if isinstance(base, nn.Linear) else exact[path].t()
        lost = base.weight.double() - before[path] - update  # type: ignore[operator]
        want = float(lost.detach().norm() / update.detach().norm())
        assert report.rounding[path] == pytest.approx(want, rel=1e-3)
        assert 1e-4 < want < 1e-1
    if report.folded:
        assert report.worst_rounding == max(report.rounding.values())
        assert f"{report.worst_rounding:.2e}" in str(report)


def test_sizes_are_said_and_checked() -> None:
    attachment = pk.attach(tiny.blip2(), pk.PetalConfig(r=4))
    assert "backends and plans: of inputs [8, 128, features]" in str(attachment.report())
    assert "of inputs [3, 5, features]" in str(attachment.report((3, 5)))
    for wrong in ((8,), 8, (8, -1), (8.0, 128)):
        with pytest.raises(ValueError, match=r"tokens: want \(samples, tokens of each\), got"):
            attachment.report(wrong)  # type: ignore[arg-type]
