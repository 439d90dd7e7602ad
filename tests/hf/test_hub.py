"""Adapters on the Hub, without one: huggingface_hub's two calls are played by a folder."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

import petal_kernels as pk
from petal_kernels.hf import pair, peft_files
from tests.hf import tiny, tiny_text
from tests.hf.test_files_fuzz import fill, look, values_of

F32 = torch.float32


class Hub:
    """Repositories as folders, and what was asked of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []  # type: tuple[Path, list[Any]]

    def api(self, token: Any = None) -> Any:
        self.asked.append(("token", token))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.asked.append(("create", options))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        self.asked.append(("upload", options))
        self._copy(Path(folder_path), self.root / repo_id, options["allow_patterns"])
        return SimpleNamespace(commit_url=f"hub/{repo_id}")

    def snapshot_download(self, repo_id: str, *, allow_patterns: tuple[str, ...] = ("*",)) -> str:
        if not (self.root / repo_id).is_dir():
            raise OSError(f"404: {repo_id}")
        target = self.root / "cache" / repo_id
        self._copy(self.root / repo_id, target, allow_patterns)
        return os.fspath(target)

    @staticmethod
    def _copy(source: Path, target: Path, patterns: Iterable[str]) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
                shutil.copy(path, target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import transformers.utils.hub  # noqa: F401 - it looks at the class when it is imported

    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", found.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize("format", ["petal", "peft"])
def test_what_is_pushed_loads_by_its_name(format: str, hub: Hub) -> None:
    made = pk.attach(tiny_text.build("llama", F32), pk.LoraConfig(r=3))
    fill(made, 1)
    address = made.push_to_hub(
        "me/my-adapter", format=format, private=True, token="t", create_pr=True
    )
    assert address == "hub/me/my-adapter"
    assert hub.asked[0] == ("token", "t")
    assert hub.asked[1] == ("create", {"private": True, "exist_ok": True})
    assert hub.asked[2][1]["create_pr"] is True
    names = {"petal": [pair.CONFIG, pair.TENSORS], "peft": [pair.OLD_CONFIG, peft_files.TENSORS]}
    there = sorted(path.name for path in (hub.root / "me/my-adapter").iterdir())
    assert there == sorted(["README.md", *names[format]])
    model = tiny_text.build("llama", F32)
    pk.plan(model, "me/my-adapter")
    again = pk.attach(model, "me/my-adapter")
    assert values_of(again) == values_of(made)
    fill(again, 2)
    again.load("me/my-adapter")
    assert values_of(again) == values_of(made)


def test_the_card_says_what_it_is(hub: Hub) -> None:
    model: Any = tiny_text.build("llama", F32)
    model.name_or_path = "someone/llama-tiny"
    made = pk.attach(model, pk.LoraConfig(r=3))
    made.push_to_hub("me/it", format="peft")
    text = (hub.root / "me/it/README.md").read_text()
    count = sum(parameter.numel() for parameter in made.parameters())
    for said in (
        "---\nlibrary_name: peft\ntags:\n- lora\n- petal_kernels\n"
        "base_model: someone/llama-tiny\n---\n",
        "# it\n",
        "A Lora adapter (`lora`, variant `paper`, r 3) of a LlamaForCausalLM (someone/llama-tiny): "
        f"{count:,} trained parameters.",
        "model = LlamaForCausalLM.from_pretrained('someone/llama-tiny')",
        'att = pk.attach(model, "me/it")',
        f"petal_kernels {pk.__version__}, torch {torch.__version__.partition('+')[0]}",
    ):
        assert said in text, said


def test_the_card_tells_no_path_of_this_machine(hub: Hub, tmp_path: Path) -> None:
    model: Any = tiny.blip2()
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "model").mkdir()
    for name in (os.fspath(tmp_path / "my"), "my/model", ""):
        model.name_or_path = name
        made = pk.attach(model, pk.PetalConfig(r=4))
        made.push_to_hub("me/it")
        text = (hub.root / "me/it/README.md").read_text()
        assert "base_model" not in text
        assert os.fspath(tmp_path) not in text
        assert "model = ...\n" in text
        made.detach()


def test_nothing_but_an_adapter_s_files_is_fetched(hub: Hub) -> None:
    made = pk.attach(tiny_text.build("llama", F32), pk.LoraConfig(r=3))
    made.push_to_hub("me/it")
    (hub.root / "me/it/adapter_model.bin").write_bytes(b"x")
    (hub.root / "me/it/modeling.py").write_text("raise SystemExit")
    pk.attach(tiny_text.build("llama", F32), "me/it")
    fetched = {path.name for path in (hub.root / "cache/me/it").iterdir()}
    assert fetched == {pair.CONFIG, pair.TENSORS}


def test_a_folder_of_this_machine_comes_first(hub: Hub, tmp_path: Path) -> None:
    made = pk.attach(tiny_text.build("llama", F32), pk.LoraConfig(r=3))
    fill(made, 1)
    made.save("me/it")
    assert values_of(pk.attach(tiny_text.build("llama", F32), "me/it")) == values_of(made)
    assert not hub.asked


def test_what_is_neither_is_said_to_be_neither(hub: Hub) -> None:
    model = tiny_text.build("llama", F32)
    before = look(model)
    with pytest.raises(FileNotFoundError, match=r"me/gone: no such directory, and no reposi.*404"):
        pk.attach(model, "me/gone")
    for path in ("gone", "./me/gone", "me/gone/deeper", "/me/gone"):
        with pytest.raises(FileNotFoundError, match=r"no such directory$"):
            pk.attach(model, path)
    assert look(model) == before


def test_what_save_refuses_makes_no_repository(hub: Hub) -> None:
    made = pk.attach(tiny_text.build("llama", F32), pk.RoutingConfig(r=3))
    with pytest.raises(ValueError, match="format: want 'petal'"):
        made.push_to_hub("me/it", format="peft")
    for name in ("it", "a/b/c", "", "me/", 3):
        with pytest.raises(ValueError, match="repo: want 'user/name'"):
            made.push_to_hub(name)  # type: ignore[arg-type]
    assert not hub.root.exists()
