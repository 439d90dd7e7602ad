"""Adapter files: a round trip, and every way in which a file can be wrong, with its message."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import petal_kernels as pk
from petal_kernels.hf import files, pair
from tests.hf import tiny


@pytest.fixture(scope="module")
def attachment() -> pk.Attachment:
    attachment = pk.attach(tiny.blip2(), pk.PetalConfig(r=4))
    tiny.randomise(attachment.adapter)
    return attachment


@pytest.fixture
def saved(attachment: pk.Attachment, tmp_path: Path) -> Path:
    attachment.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def _edit(folder: Path, **values: Any) -> None:
    path = folder / pair.CONFIG
    content = json.loads(path.read_text())
    for key, value in values.items():
        if value is None:
            del content[key]
        elif isinstance(value, dict):
            content[key].update(value)
        else:
            content[key] = value
    path.write_text(json.dumps(files.seal(content)))


def _replace_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes other tensors together with the size and digest that belong to them."""

    save_file(tensors, folder / pair.TENSORS)
    data = (folder / pair.TENSORS).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    _edit(folder, tensors={"bytes": len(data), "sha256": digest})


def _refused(attachment: pk.Attachment, folder: Path, *parts: str) -> None:
    """Both ways of loading refuse it, name the file or key, and change nothing."""
    before = {name: value.clone() for name, value in attachment.state_dict().items()}
    pattern = ".*".join(re.escape(part) for part in parts)
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        attachment.load(folder)
    after = attachment.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    model = tiny.blip2()
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        pk.attach(model, folder)
    assert not hasattr(model, "petal")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_round_trip_in_place(attachment: pk.Attachment, saved: Path) -> None:
    want = {name: value.clone() for name, value in attachment.state_dict().items()}
    with torch.no_grad():
        for parameter in attachment.adapter.parameters():
            parameter.add_(1.0)
    attachment.load(saved)
    assert all(torch.equal(attachment.state_dict()[name], want[name]) for name in want)
    assert sorted(path.name for path in saved.iterdir()) == [pair.TENSORS, pair.CONFIG]


def test_shared_factors_are_stored_once(saved: Path) -> None:
    names = list(load_file(saved / pair.TENSORS))
    assert len([n for n in names if n.startswith("branches.")]) == 2 * 4
    content = json.loads((saved / pair.CONFIG).read_text())
    assert content["format_version"] == 1
    assert content["method"] == "petal"
    assert content["base"]["stack"] == "Blip2QFormerEncoder"
    assert content["base"]["projections"]["cross.key"] == {"count": 2, "in": 40, "out": 32}


def test_an_interrupted_save_leaves_the_old_adapter(
    attachment: pk.Attachment, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    want = {name: value.clone() for name, value in attachment.state_dict().items()}
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        attachment.save(saved)
    monkeypatch.undo()
    assert sorted(path.name for path in saved.iterdir()) == [pair.TENSORS, pair.CONFIG]
    attachment.load(saved)
    assert all(torch.equal(attachment.state_dict()[name], want[name]) for name in want)


def test_truncated_tensors(attachment: pk.Attachment, saved: Path) -> None:
    path = saved / pair.TENSORS
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    _refused(attachment, saved, pair.TENSORS, f"want {len(data)} bytes", "truncated")


def test_truncated_config(attachment: pk.Attachment, saved: Path) -> None:
    path = saved / pair.CONFIG
    path.write_text(path.read_text()[:40])
    _refused(attachment, saved, pair.CONFIG, "not readable as json")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", '{"format_version": 1,', "a key stands there twice"),
        ('"format_version": 1', '"format_version": NaN', "NaN is no json"),
    ],
    ids=["a key twice", "no number"],
)
def test_json_that_readers_disagree_about(
    attachment: pk.Attachment, saved: Path, old: str, new: str, message: str
) -> None:
    path = saved / pair.CONFIG
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    _refused(attachment, saved, pair.CONFIG, message)


def test_a_save_while_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a reader's json of the save before, and its tensors of this one, called damaged."""
    other = pk.attach(tiny.blip2(), saved)
    with torch.no_grad():
        for parameter in other.adapter.parameters():
            parameter.add_(1.0)
    read, saves = files._read_tensors, [other.save]

    def late(config: Path, record: Any) -> Any:
        while saves:
            saves.pop()(config.parent)
        return read(config, record)

    monkeypatch.setattr(files, "_read_tensors", late)
    got, want = pk.attach(tiny.blip2(), saved).state_dict(), other.state_dict()
    assert not saves
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_damaged_tensors(attachment: pk.Attachment, saved: Path) -> None:
    path = saved / pair.TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    _refused(attachment, saved, pair.TENSORS, "sha256: want", "damaged")


def test_two_files_of_different_saves(attachment: pk.Attachment, saved: Path) -> None:
    tensors = load_file(saved / pair.TENSORS)
    tensors["branches.text.up"] = tensors["branches.text.up"] + 1.0
    data = (saved / pair.CONFIG).read_bytes()
    _replace_tensors(saved, tensors)
    (saved / pair.CONFIG).write_bytes(data)
    _refused(attachment, saved, pair.TENSORS, "not of one save")


def test_mis_shaped(attachment: pk.Attachment, saved: Path) -> None:
    tensors = load_file(saved / pair.TENSORS)
    tensors["branches.text.up"] = tensors["branches.text.up"][:, :2].contiguous()
    _replace_tensors(saved, tensors)
    _refused(attachment, saved, "branches.text.up: want shape [32, 4], got [32, 2]")


def test_another_dtype(attachment: pk.Attachment, saved: Path) -> None:
    tensors = load_file(saved / pair.TENSORS)
    tensors["branches.text.up"] = tensors["branches.text.up"].double()
    _replace_tensors(saved, tensors)
    _refused(attachment, saved, "branches.text.up: want torch.float32", "got torch.float64")


def test_a_narrower_dtype_is_widened(attachment: pk.Attachment, saved: Path) -> None:
    model = tiny.blip2()
    other = pk.attach(model, saved)
    model.bfloat16()
    other.save(saved)
    want = {name: value.float() for name, value in other.state_dict().items()}
    attachment.load(saved)
    assert all(torch.equal(attachment.state_dict()[name], want[name]) for name in want)


def test_a_module_trained_whole_follows_its_base(tmp_path: Path) -> None:
    config = pk.PetalConfig(r=4, modules_to_save=["language_projection"])
    attachment = pk.attach(tiny.blip2(), config)
    attachment.save(tmp_path)
    narrow = tiny.blip2().bfloat16()
    other = pk.attach(narrow, tmp_path)
    name = "modules_to_save.language_projection.weight"
    assert other.state_dict()[name].dtype == torch.bfloat16
    assert torch.equal(other.state_dict()[name], attachment.state_dict()[name].bfloat16())


def test_missing_and_unexpected_keys(attachment: pk.Attachment, saved: Path) -> None:
    tensors = load_file(saved / pair.TENSORS)
    tensors["branches.text.gate"] = tensors.pop("branches.text.up")
    _replace_tensors(saved, tensors)
    _refused(
        attachment,
        saved,
        "missing keys ['branches.text.up'], unexpected keys ['branches.text.gate']",
    )


def test_an_unexpected_key_alone(attachment: pk.Attachment, saved: Path) -> None:
    """Kind: a tensor of a file passed over in silence, because nothing else is missing."""
    tensors = load_file(saved / pair.TENSORS)
    tensors["branches.text.gate"] = tensors["branches.text.up"].clone()
    _replace_tensors(saved, tensors)
    _refused(attachment, saved, "missing keys [], unexpected keys ['branches.text.gate']")


def test_a_pickle_with_a_safetensors_name(attachment: pk.Attachment, saved: Path) -> None:
    torch.save({"x": torch.ones(2)}, saved / pair.TENSORS)
    _refused(attachment, saved, pair.TENSORS, "got a pickle, which is refused")


def test_not_a_safetensors_file(attachment: pk.Attachment, saved: Path) -> None:

    data = b"not a tensor file at all"
    (saved / pair.TENSORS).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    _edit(saved, tensors={"bytes": len(data), "sha256": digest})
    _refused(attachment, saved, pair.TENSORS, "not a safetensors file")


def test_a_pickle_path(attachment: pk.Attachment, tmp_path: Path) -> None:
    path = tmp_path / "adapter.bin"
    torch.save({"x": torch.ones(2)}, path)
    _refused(attachment, path, "adapter.bin: a pickle can run code")


def test_a_directory_with_a_pickle_only(attachment: pk.Attachment, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "adapter_model.bin")
    _refused(attachment, tmp_path, "missing ['adapter.safetensors'", "adapter_model.bin is refused")


def test_a_newer_format(attachment: pk.Attachment, saved: Path) -> None:
    _edit(saved, format_version=2)
    _refused(attachment, saved, pair.CONFIG, "format_version: want at most 1, got 2")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": "1"}, "format_version: want 1, got '1'"),
        (
            {"method": "nothing"},
            "method: want one of ['aurora', 'compacter', 'experts', 'lora', 'petal', 'routing', "
            "'vladapter', 'vlpet'], got ",
        ),
        ({"base": None}, "missing ['base']"),
        ({"more": 1}, "got unknown ['more']"),
        ({"variant": "release"}, "variant: want 'paper' as in config, got 'release'"),
        ({"config": {"rank": 4}}, "got unknown ['rank']"),
        ({"config": {"r": 0}}, "r: want an integer >= 1, got 0"),
        (
            {"base": {"stack": "Other"}},
            "base.stack: the adapter was trained on a base with 'Other'",
        ),
        ({"base": {"layers": 12}}, "base.layers"),
        ({"base": {"more": 1}}, "base.more: this model has no such entry"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(
    attachment: pk.Attachment, saved: Path, values: dict[str, Any], message: str
) -> None:
    _edit(saved, **values)
    _refused(attachment, saved, pair.CONFIG, message)


def test_another_base(saved: Path) -> None:
    model = tiny.instructblip()
    with pytest.raises(ValueError, match=r"base.stack.*'Blip2QFormerEncoder'.*'InstructBlip"):
        pk.attach(model, saved)


def test_another_configuration(saved: Path) -> None:
    attachment = pk.attach(tiny.blip2(), pk.PetalConfig(r=8))
    with pytest.raises(ValueError, match=r"config.r: want 8 as attached, got 4"):
        attachment.load(saved)
    attachment = pk.attach(tiny.blip2(), pk.PetalConfig(r=4, dropout=0.5))
    attachment.load(saved)  # dropout is no property of the tensors


def test_paths_that_are_no_adapter(attachment: pk.Attachment, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        attachment.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="want a directory"):
        attachment.load(tmp_path / "file")
    with pytest.raises(ValueError, match="want a directory to save into"):
        attachment.save(tmp_path / "adapter.bin")


def test_state_dict_round_trip_is_as_strict(attachment: pk.Attachment) -> None:
    state = {name: value.clone() for name, value in attachment.state_dict().items()}
    attachment.load_state_dict(state)
    del state["branches.text.up"]
    with pytest.raises(ValueError, match=r"state_dict: missing keys \['branches.text.up'\]"):
        attachment.load_state_dict(state)


def _as_before(folder: Path) -> None:
    """The json under the name that it had first."""
    (folder / pair.CONFIG).rename(folder / pair.OLD_CONFIG)


def _peft(folder: Path) -> bytes:
    """What PEFT leaves in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}).encode()
    (folder / pair.OLD_CONFIG).write_bytes(content)
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors"
    )
    return content


def test_the_json_under_its_old_name_is_read_checked_and_replaced(
    attachment: pk.Attachment, saved: Path
) -> None:
    _as_before(saved)
    attachment.load(saved)
    pk.attach(tiny.blip2(), saved)
    text = (saved / pair.OLD_CONFIG).read_text()
    (saved / pair.OLD_CONFIG).write_text(text.replace('"dropout": 0.1', '"dropout": 0.2'))
    _refused(attachment, saved, pair.OLD_CONFIG, "sha256", "damaged, or edited by hand")
    (saved / pair.OLD_CONFIG).write_text(text)
    path = saved / pair.TENSORS
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    _refused(attachment, saved, pair.TENSORS, f"bytes as {pair.OLD_CONFIG} says")
    (saved / pair.OLD_CONFIG).write_text(text.replace('"dropout": 0.1', '"dropout": 0.2'))
    attachment.save(saved)
    assert sorted(path.name for path in saved.iterdir()) == [pair.TENSORS, pair.CONFIG]
    attachment.load(saved)


def test_the_new_name_counts_where_both_are(attachment: pk.Attachment, saved: Path) -> None:
    """As after a save that died before it removed the old one."""
    (saved / pair.OLD_CONFIG).write_bytes((saved / pair.CONFIG).read_bytes())
    _edit(saved, tensors={"bytes": 1, "sha256": "0" * 64})
    _refused(attachment, saved, f"want 1 bytes as {pair.CONFIG} says")


@pytest.mark.parametrize("content", ["PEFT's", "nobody's", "damaged"])
def test_a_json_of_the_old_name_that_may_be_anothers_is_left(
    content: str, attachment: pk.Attachment, saved: Path
) -> None:
    path = saved / pair.OLD_CONFIG
    if content == "PEFT's":
        want = _peft(saved)
    else:
        want = b'{"format_version": 1}' if content == "nobody's" else b'{"format_ver'
        path.write_bytes(want)
    attachment.load(saved)
    attachment.save(saved)
    attachment.load(saved)
    assert path.read_bytes() == want


def test_a_models_own_folder_still_loads_with_an_adapter_in_it(tmp_path: Path) -> None:
    """The kind: a file name that means something else to transformers."""
    import transformers

    from tests.hf import tiny_text

    model = tiny_text.build("llama", torch.float32)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    attachment = pk.attach(model, pk.RoutingConfig(r=3))
    tiny.randomise(attachment.adapter)
    attachment.save(tmp_path)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is transformers.LlamaForCausalLM
    loaded = pk.attach(again, tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in attachment.state_dict().items())
