"""The wheel that `make wheel` builds, in an environment without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from petal_kernels._runtime import device

ROOT = Path(__file__).resolve().parent.parent.parent

USE = """
import torch
import petal_kernels as pk
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
att = pk.attach(model, pk.LoraConfig(r=2, target_modules=["0", "2"]))
optimizer = torch.optim.AdamW(att.parameters(), lr=0.05)
x, y = torch.randn(16, 8), torch.randn(16, 4)
losses = []
for _ in range(20):
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print(pk.__file__)
print(att.report())
"""


def _run(command: list[str], **env: str) -> str:
    # Without a PYTHONPATH: pip would find the checkout's package installed.
    env = {**os.environ, "PYTHONPATH": "", **env}
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library")
def test_the_wheel_serves_an_environment_without_a_compiler(tmp_path: Path) -> None:
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    wheels, fresh, empty = tmp_path / "wheels", tmp_path / "fresh", tmp_path / "empty"
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(wheels), str(ROOT)]
    parts = {f"PETAL_BUILD_{part}": "0" for part in ("HOST", "FRONT", "CUDA")}
    _run([sys.executable, *build], **parts)
    (wheel,) = wheels.glob("*.whl")
    assert "-py3-none-" in wheel.name

    _run([sys.executable, "-m", "venv", str(fresh)])
    python = str(fresh / "bin" / "python")
    _run([python, *pip, "install", "--no-deps", "--no-index", str(wheel)])
    # torch and transformers as they are here; what is installed here for editing is not among them.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = fresh / "lib" / version / "site-packages"
    (site / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    empty.mkdir()
    bare = {"PATH": f"{fresh / 'bin'}:{empty}", "PYTHONSAFEPATH": "1"}
    where, report = _run([python, "-c", USE], **bare).split("\n", 1)
    assert where.startswith(str(site))
    assert "native" in report
    doctor = _run([str(fresh / "bin" / "petal-kernels"), "doctor"], **bare)
    assert "native" in doctor
