"""`petal-kernels memory --config`: any model of transformers from its own config file, its pictures
by its own processor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import transformers

from petal_kernels import memory
from petal_kernels.tools.memory import app, configs, pictures, presets, whatif
from petal_kernels.tools.memory.options import Options
from tests.hf import tiny_vlms
from tests.tools.vlm_configs import BY_NAME, PUBLISHED, Published

LORA = Options(method="lora", targets="all-linear", rank=4, batch=2, length=8, dtype="float32")
# Of a picture of 640 x 480.
TOKENS = {
    "llava-1.5-7b-hf": 24 * 24,
    # 27 x 27 of the whole; 2 x 2 pieces without what pads them, each row with its end.
    "llava-onevision-qwen2-7b-ov-hf": 27 * 27 + 40 * (54 + 1),
    "paligemma2-3b-pt-224": 16 * 16,
    "gemma-3-4b-it": 256,
    "Qwen2-VL-2B-Instruct": 23 * 17,  # 28 pixels each
    "Qwen2.5-VL-3B-Instruct": 23 * 17,
    "Qwen3-VL-4B-Instruct": 20 * 15,  # 32 pixels each
    "InternVL3-8B-hf": (4 * 3 + 1) * 256,
    "SmolVLM2-2.2B-Instruct": (4 * 3 + 1) * 81,
    "Idefics3-8B-Llama3": (4 * 3 + 1) * 169,
    "Llama-3.2-11B-Vision": 1,  # its text sees by cross-attention
    "pixtral-12b": 40 * 30,
    "Mistral-Small-3.1-24B-Instruct-2503": 23 * 18,
}
QUICK = ("llava-1.5-7b-hf", "Qwen3-VL-4B-Instruct")


def source_of(published: Published, folder: Path) -> configs.Source:
    (folder / "config.json").write_text(json.dumps(published.values))
    return configs.read(folder)


@pytest.mark.parametrize("published", PUBLISHED, ids=list(BY_NAME))
def test_a_model_has_the_published_number_of_parameters(
    published: Published, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = configs.build(source_of(published, tmp_path), Options())
    count = sum(p.numel() for p in model.parameters())
    assert count == published.count(published.values)
    assert round(count / 1e9, 2) == published.billions


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TOKENS]
)
def test_a_picture_has_as_many_tokens_as_its_processor_makes(name: str, tmp_path: Path) -> None:
    source = source_of(BY_NAME[name], tmp_path)
    options = Options(method="full", batch=2, length=5, image_size=(640, 480))
    with torch.device("meta"):
        model = configs.build(source, options)
    _, batch, said = configs.batch(source, model, options)
    image = getattr(source.config, "image_token_id", None) or source.config.image_token_index
    assert [int(row.sum()) for row in batch["input_ids"] == image] == [TOKENS[name]] * 2
    assert batch["input_ids"].shape == (2, TOKENS[name] + 5)
    seen = "seen by" if name.startswith("Llama") else f"{TOKENS[name]:,} visual tokens"
    assert f"640 x 480 a sample: {seen}" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_a_published_model_takes_half_a_minute_and_two_gibibytes(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BY_NAME[name].values))
    code = (
        "import sys\nfrom petal_kernels.tools.memory import app\n"
        "from petal_kernels.tools import environment\n"
        "import time\nbegan = time.process_time()\n"
        "assert app.main(sys.argv[1:]) == 0\n"
        "print(time.process_time() - began, environment.most_resident())\n"
    )
    words = ["--config", str(tmp_path), "--image-size", "640x480", "--rows", "1"]
    out = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    ).stdout
    seconds, resident = out.splitlines()[-1].split()
    assert float(seconds) < 30
    assert int(resident) < 2 * 2**30


# Small ones, run for real too -------------------------------------------------------------------


def tiny_config(name: str, folder: Path) -> tuple[configs.Source, Any]:
    """A tiny model's own config in a file."""
    built: Any = tiny_vlms.VLMS[name].build()
    values = built.config.to_dict() | {"architectures": [type(built).__name__]}
    (folder / "config.json").write_text(json.dumps(values))
    return configs.read(folder), built


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "idefics3", "paligemma2"])
def test_fake_weights_with_real_ids_keep_what_real_ones_do(name: str, tmp_path: Path) -> None:
    """Windows of pictures, masks that pick rows, pixels that are asked for their values. Where a
    mask of 8 tokens picked, two int64 for each are kept in its place, twice.
    """
    _, model = tiny_config(name, tmp_path)
    batch = tiny_vlms.VLMS[name].batch()
    real = memory.profile(model.train(), batch, cuda_rules=True)
    floats = {k: v for k, v in batch.items() if v.is_floating_point() and name != "idefics3"}
    model, twins = memory.fake_tensors(model, floats)
    fake = memory.profile(model, batch | twins)
    assert fake.fake
    more = 2 * 8 * 2 * 8 if name == "qwen3-vl" else 0
    assert fake.saved_bytes == real.saved_bytes + more > more
    assert fake.peak_bytes == real.peak_bytes or more


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_vlms.VLMS)
def test_every_family_runs_with_every_choice(name: str, tmp_path: Path) -> None:
    """A picture by the family's processor; a base in 4 bits, checkpoints, inputs with gradients."""
    source, _ = tiny_config(name, tmp_path)
    chosen = {"base": "nf4", "checkpointing": True, "input_grads": True, "image_size": (56, 56)}
    step = presets.prepare_config(source, Options(**vars(LORA) | chosen))
    found = whatif.run(step)
    assert found.saved_bytes > 0
    assert found.sizes.gradients == found.sizes.trainable > 0


def test_real_masks_on_fake_tensors_pick_as_many_as_they_have() -> None:
    class Picks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x)
            y[mask] = y[mask] * 2.0
            picked: torch.Tensor = y[mask]
            return picked.sum()

    model, x = memory.fake_tensors(Picks(), torch.empty(5, 4))
    mask = torch.tensor([True, False, True, True, False])
    shapes = [b.shape for b in memory.profile(model, (x, mask)).blocks]
    assert (3, 3) in shapes
    with pytest.raises(ValueError, match="as real ones"):
        memory.profile(*memory.fake_tensors(model, (x, mask)))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_every_sample_has_its_pictures(images: int, tmp_path: Path) -> None:
    source, _ = tiny_config("qwen2-vl", tmp_path)
    step = presets.prepare_config(
        source, Options(**vars(LORA) | {"images": images, "image_size": (84, 56)})
    )
    found = whatif.run(step)
    assert found.saved_bytes > 0
    seen = images * 3 * 2  # 28 pixels each
    assert step.batch["input_ids"].shape == (2, seen + 8)
    if images:
        assert step.batch["image_grid_thw"].tolist() == [[1, 4, 6]] * 2 * images
        assert step.batch["pixel_values"].shape[0] == 2 * images * 24


def test_a_text_model_needs_no_pictures(tmp_path: Path) -> None:
    values = {**tiny_vlms._decoder("llama"), "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    source = configs.read(tmp_path)
    step = presets.prepare_config(source, LORA)
    assert not source.sees
    assert set(step.batch) == {"input_ids", "labels"}
    assert type(step.model) is transformers.LlamaForCausalLM


def test_a_file_beside_the_config_says_how_pictures_are_made(tmp_path: Path) -> None:
    source, _ = tiny_config("qwen2-vl", tmp_path)
    assert pictures.processor(source.config, tmp_path).patch_size == 14
    given = {"patch_size": 7, "merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    assert pictures.processor(source.config, tmp_path).patch_size == 7


def test_labels_are_of_words_alone(tmp_path: Path) -> None:
    source, _ = tiny_config("llava-qwen2", tmp_path)
    batch = presets.prepare_config(source, LORA).batch
    of_image = batch["input_ids"] == tiny_vlms.IMAGE
    assert torch.equal(batch["labels"] == -100, of_image)
    assert int(of_image.sum()) == 2 * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "want the model_type of a model that transformers"),
        ('{"model_type": "nothing"}', "got 'nothing'"),
        ("[1]", "want the model_type"),
        ("{", "want a config.json or its folder"),
        (None, "want a config.json or its folder"),
        ('{"model_type": "clip_vision_model"}', "want a model that is trained on text"),
        ('{"model_type": "llava_next"}', "want a family whose pictures are known"),
    ],
)
def test_what_is_no_config_is_refused(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        app.main(["--config", str(tmp_path)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image-size", "0x4"], "want WIDTHxHEIGHT in pixels"),
        (["--image-size", "wide"], "want WIDTHxHEIGHT in pixels"),
        (["--images", "-1"], "want a number >= 0"),
        (["--method", "vlpet"], "want one of lora, peft-lora"),
        (["--device", "cpu"], "has no --device"),
        (["--method", "full", "-r", "4"], "has no --rank"),
    ],
)
def test_what_a_config_has_not_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("llava-qwen2", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        app.main(["--config", str(tmp_path), *words])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_report_says_what_the_batch_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("llava-qwen2", tmp_path)
    assert app.main(["--config", str(tmp_path), "--length", "8", "--dtype", "float32"]) == 0
    assert "1 picture of 28 x 28 a sample: 4 visual tokens, 12 tokens" in capsys.readouterr().out
