"""Every method on its families: the published form's values, and a whole life."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import petal_kernels as pk
from petal_kernels._runtime import philox
from petal_kernels.hf.report import joined_rows
from tests.hf import methods
from tests.hf.methods import (
    ROWS,
    Row,
    attached,
    differences,
    every,
    fresh,
    output,
    own,
    plain,
    step,
)

P = 0.5
REFUSED = "this model has|want a model whose|want 'none' for a|match nothing"


def test_names_are_one_rows() -> None:
    whole = {row.name for row in ROWS if not row.like}
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.like for row in ROWS if row.like} <= whole


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@every("published")
def test_values_and_gradients_are_the_published_forms(row: Row) -> None:
    got, want = (
        step(row, *attached(row, form), row.given(leaves="all")) for form in ("fused", "published")
    )
    assert differences(got, want) == []
    idle = [n for n, g in want.items() if g is None or not float(g.norm())]
    assert [n for n in idle if not any(part in n for part in row.idle)] == []
    assert not torch.allclose(got["out"], plain(row), atol=1e-3)  # type: ignore[arg-type]


def _with_dropout(row: Row, form: str) -> tuple[nn.Module, Any]:
    """Every dropout of the method and of its base."""
    model = fresh(row)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = P
        elif isinstance(getattr(module, "dropout", None), float) and "Layer" in repr(type(module)):
            module.dropout = P  # type: ignore[assignment]
    config, names = row.config(), ["dropout", "lora_dropout"]
    if getattr(config, "module", "lora") != "lora":  # adapters are before their layer's own
        names.remove("dropout")
    names = [name for name in names if hasattr(config, name)]
    return attached(row, form, model, row.config(**dict.fromkeys(names, P)))


def _mask(like: Tensor, rows: int, columns: int, period: int) -> Tensor:
    """A mask that depends on the place alone, alike in blocks of `period` columns."""
    row = torch.arange(rows).unsqueeze(1)
    column = torch.arange(columns) % period
    return (((row * 31 + column * 17) % 10) >= 10 * P).to(like.dtype) / (1 - P)


@pytest.mark.one_in(3)
@every("dropout")
def test_dropout_stands_where_the_published_form_has_it(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same mask everywhere, both forms drop the same values."""
    period, dropped = row.config().r, []

    def scaled(rng: Tensor, p: float, streams: int, rows: int, columns: int, dtype: Any) -> Tensor:
        mask = _mask(torch.empty(0, dtype=dtype), rows, columns, period)
        return mask.expand(streams, rows, columns)

    def one(rng: Tensor, p: float, stream: int, rows: int, columns: int, dtype: Any) -> Tensor:
        return scaled(rng, p, 1, rows, columns, dtype)[0]

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not p:
            return x
        dropped.append(x.shape)
        return x * _mask(x, x.shape[:-1].numel(), x.shape[-1], period).reshape(x.shape)

    dry = step(row, *attached(row), row.given())["out"]
    monkeypatch.setattr(philox, "scaled_masks", scaled)
    monkeypatch.setattr(philox, "scaled_mask", one)
    # The base's own masks, as attention draws them, are to be the same too.
    monkeypatch.setattr(philox, "draw", lambda device: torch.zeros(2, dtype=torch.int64))
    monkeypatch.setattr(nn.functional, "dropout", dropout)
    got, want = (
        step(row, *_with_dropout(row, form), row.given(leaves="all"))
        for form in ("fused", "published")
    )
    assert differences(got, want) == []
    assert not dropped or not torch.allclose(got["out"], dry, atol=1e-3)  # type: ignore[arg-type]


@every("dropout", quick=own)
def test_masks_follow_the_seed(row: Row) -> None:
    drops = []
    for form in ("fused", "published"):
        model, attachment = _with_dropout(row, form)
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            runs.append(step(row, model, attachment, row.given()))
        assert differences(runs[1], runs[0], 0.0) == []
        drops.append(differences(runs[2], runs[0], 1e-3) != [])
    assert drops[0] == drops[1]


# -- report ---------------------------------------------------------------------------------------


def _told(cls: type, path: str, outputs: dict[str, Tensor]) -> type:
    """A class whose instances tell what a caller gets: a hook sees no adapter after a block."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = cls.__call__(self, *args, **kwargs)
        outputs.setdefault(path, _first(out).clone())
        return out

    return type(cls.__name__, (cls,), {"__call__": call})


def _replayed(row: Row) -> set[str]:
    """The innermost modules that answer otherwise than the base's own, given the same inputs."""
    model, attachment = attached(row, "published")
    base = fresh(row)
    given: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}
    for path, _ in base.named_modules():
        module = model.get_submodule(path)

        def keep(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            given.setdefault(path, tree_map_only(Tensor, torch.clone, (args, kwargs)))

        module.register_forward_pre_hook(keep, with_kwargs=True)
        module.__class__ = _told(type(module), path, outputs)
    output(row, model, attachment)
    with torch.no_grad():
        changed = {
            path
            for path, (args, kwargs) in given.items()
            if not _same(_first(base.get_submodule(path)(*args, **kwargs)), outputs[path])
        }
    return {p for p in changed if not any(q.startswith(f"{p}.") or not p for q in changed - {p})}


def _same(found: Tensor, want: Tensor) -> bool:
    """But for what a product rounds otherwise where its input lies otherwise in memory."""
    nearly = 1e3 * torch.finfo(want.dtype).eps
    return torch.allclose(found, want, rtol=nearly, atol=nearly)


def _first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


@pytest.mark.one_in(3)
@every("report")
def test_the_report_names_every_place_and_counts_every_parameter(row: Row) -> None:
    model, attachment = attached(row)
    report = attachment.report()
    changed = {path for path in _replayed(row) if not path.endswith(row.beside or ("!",))}
    assert set(methods.paths(row).places) == changed
    trained = sum(p.numel() for p in attachment.parameters())
    assert report.trainable == trained == sum(r.trainable for r in report.rows)
    assert report.stored == sum(t.numel() for t in attachment.state_dict().values())
    assert report.base_parameters == sum(p.numel() for p in fresh(row).parameters())
    assert report.percent == 100 * trained / report.base_parameters
    assert {id(p) for p in attachment.parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    text = str(report)
    shown = joined_rows(report.rows) if report.grouped else report.rows
    assert all(r.module in text and r.role in text for r in shown)
    assert f"{trained:,} trainable" in text
    kept = {(r.module, r.role): r.trainable for r in attached(row, "published")[1].report().rows}
    assert {(r.module, r.role): r.trainable for r in report.rows} == kept


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@every("files")
def test_a_saved_adapter_gives_the_same_bits(row: Row, tmp_path: Path) -> None:
    model, attachment = attached(row)
    model.float()
    attachment.save(tmp_path / "a")
    want = output(row, model, attachment)
    other = fresh(row).float()
    loaded: Any = pk.attach(other, tmp_path / "a")
    assert loaded.config == attachment.config
    assert torch.equal(output(row, other, loaded), want)
    methods.train(loaded, seed=5)
    assert not torch.equal(output(row, other, loaded), want)
    loaded.load(tmp_path / "a")
    assert torch.equal(output(row, other, loaded), want)
    loaded.detach()
    assert torch.equal(output(row, other.double()), plain(row))


@pytest.mark.one_in(3)
@every("files")
def test_another_family_refuses_the_file(row: Row, tmp_path: Path) -> None:
    _, attachment = attached(row)
    attachment.save(tmp_path / "a")
    other = _of_another_family(row)
    model = fresh(other)
    before = _snapshot(model)
    with pytest.raises(ValueError, match=REFUSED):
        pk.attach(model, tmp_path / "a")
    assert _snapshot(model) == before
    with pytest.raises(ValueError, match=REFUSED):
        attached(other, config=row.config())[1].load(tmp_path / "a")


def _of_another_family(row: Row) -> Row:
    """Of the same method; captioning and retrieval have the same layers."""
    alike = {"caption", "retrieval"} if row.family in ("caption", "retrieval") else {row.family}
    kind = type(row.config())
    return next(r for r in ROWS if r.family not in alike and type(r.config()) is kind)


# -- merge ----------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@every("merge")
def test_merge_changes_no_output_and_unmerge_no_bit(row: Row) -> None:
    model, attachment = attached(row)
    want = output(row, model, attachment)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    if row.folds:
        report = attachment.merge()
        whole = [r.module for r in attachment.report().rows if r.role == "modules_to_save"]
        assert [path for path in whole if path not in report.kept] == []
        names = ("modules_to_save", "train_norms", "train_bias")
        biases = getattr(attachment.config, "bias", "none") != "none"
        given = any(getattr(attachment.config, name, None) for name in names)
        assert bool(whole) == (given or biases)
        assert report.folded or report.kept
        assert str(report)
        torch.testing.assert_close(output(row, model, attachment), want, rtol=1e-9, atol=1e-9)
        with attachment.disabled():
            assert torch.equal(output(row, model), plain(row))
        torch.testing.assert_close(output(row, model, attachment), want, rtol=1e-9, atol=1e-9)
        attachment.unmerge()
    else:
        with pytest.raises(ValueError, match=r"merge: route .* depends on the vision features"):
            attachment.merge()
    assert torch.equal(output(row, model, attachment), want)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert step(row, model, attachment, row.given())["loss"] is not None


@pytest.mark.one_in(3)
@every("merge")
def test_detach_of_a_merged_model_gives_the_base(row: Row) -> None:
    model, attachment = attached(row)
    if row.folds:
        attachment.merge()
    attachment.detach()
    assert torch.equal(output(row, model), plain(row))


# -- detach, copies -------------------------------------------------------------------------------


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that detach must give back."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "tensors": [(n, t.data_ptr(), t.dtype) for n, t in model.state_dict().items()],
        "hooks": [
            (n, name, list(m.__dict__[name].values()))
            for n, m in model.named_modules()
            for name in hooks
        ],
        "attributes": [(name, sorted(m.__dict__)) for name, m in model.named_modules()],
    }


@pytest.mark.one_in(3)
@every("detach")
def test_detach_gives_back_the_very_model(row: Row) -> None:
    model = fresh(row)
    frozen = next(model.parameters()).requires_grad_(False)
    handle = next(model.children()).register_forward_hook(lambda *args: None)
    before = _snapshot(model)
    keys = list(model.state_dict())
    _, attachment = attached(row, model=model)
    held = {n: t.data_ptr() for n, t in model.state_dict().items() if not n.startswith("petal.")}
    assert list(held) == keys
    assert list(held.values()) == [pointer for _, pointer, _ in before["tensors"]]
    adapted = output(row, model, attachment)
    state = {name: t.clone() for name, t in attachment.state_dict().items()}
    step(row, model, attachment, row.given())
    model.eval()
    assert attachment.detach() is model
    assert _snapshot(model) == before
    assert torch.equal(output(row, model), plain(row))
    again: Any = pk.attach(model, row.config())
    model.to(torch.float64)
    again.load_state_dict(state)
    assert torch.equal(output(row, model, again), adapted)
    again.detach()
    handle.remove()
    assert not frozen.requires_grad


@pytest.mark.one_in(3)
@every("detach")
def test_layers_keep_the_names_of_their_classes(row: Row) -> None:
    """Trainers, sharding and quantisation find layers by them."""
    model, base = attached(row)[0], fresh(row)
    for path in methods.paths(row).layers:
        name = type(base.get_submodule(path)).__name__
        assert type(model.get_submodule(path)).__name__ == name
        assert isinstance(model.get_submodule(path), type(base.get_submodule(path)))


@pytest.mark.one_in(3)
@every("copy")
def test_a_copy_is_its_own_model(row: Row) -> None:
    model, attachment = attached(row)
    output(row, model, attachment)  # what a forward leaves behind is copied as well
    twin = copy.deepcopy(model)
    theirs: Any = _handle(row, twin)
    want, given = output(row, model, attachment), row.given()
    assert torch.equal(output(row, twin, theirs), want)
    if theirs is not None:
        got = step(row, twin, theirs, given)
        assert differences(got, step(row, model, attachment, row.given()), 1e-12) == []
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.mul_(1.5)
    assert torch.equal(output(row, twin, theirs), want)
    assert not torch.allclose(output(row, model, attachment), want, atol=1e-3)
    changed = output(row, model, attachment)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.startswith("petal."):
                parameter.zero_()
    assert torch.equal(output(row, model, attachment), changed)


def _handle(row: Row, twin: nn.Module) -> Any:
    """The copy's; without it only rows that need nothing around a call can go on."""
    if row.around or hasattr(pk, "attachment"):
        return pk.attachment(twin)
    return None


@pytest.mark.one_in(3)
@every("copy")
def test_a_copy_has_its_handle(row: Row) -> None:
    model, attachment = attached(row)
    assert pk.attachment(model) is attachment
    twin = copy.deepcopy(model)
    theirs: Any = pk.attachment(twin)
    assert theirs is not attachment
    assert theirs.model is twin
    assert theirs.config == attachment.config
    assert str(theirs.report()) == str(attachment.report())
    want = output(row, model, attachment)
    with theirs.disabled():
        assert torch.equal(output(row, twin), plain(row))
        assert torch.equal(output(row, model, attachment), want)
    if row.folds:
        theirs.merge()
    theirs.detach()
    assert torch.equal(output(row, twin), plain(row))
    assert torch.equal(output(row, model, attachment), want)
