"""``python -m tests.peft_suite``: PEFT's own tests with LoRA, run as they are and then with every
adapted model fused; exit 1 where a test fails that passed before.

They come with the source distribution of the installed PEFT, from the package index, as one small
library does; nothing else needs a network. Tests that want a model or data from the hub fail in
both runs. Two libraries that no other test uses are stood in for by empty modules.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "peft_suite"
FILES = ("test_custom_models.py", "test_lora_variants.py", "test_mixed.py")
MORE = ("parameterized==0.9.0",)
# By their names those of plain LoRA, and of what else its layers do.
CHOSEN = (
    "(-LoraConfig- or test_requires_grad_lora or TestMixedAdapterBatches or TestDynamicDispatch"
    " or TestLayerRepr or test_lora_variants)"
)
STAND_INS = {
    "datasets": "load_dataset = None\n",
    "diffusers": "StableDiffusionPipeline = None\n",
}


def prepare(folder: Path) -> None:
    """Unpacks the tests of the installed PEFT as a package."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"peft-{version('peft')}"
    archive = folder / f"{name}.tar.gz"
    if not archive.exists():
        options = ("--no-deps", "--no-build-isolation", "--no-binary", "peft", "-d", str(folder))
        command = [sys.executable, "-m", "pip", "download", "-q", *options]
        subprocess.run([*command, name.replace("-", "==")], check=True)
    with tarfile.open(archive) as files:
        inside = [m for m in files.getmembers() if m.name.startswith(f"{name}/tests/")]
        for member in inside:
            member.name = member.name.replace(f"{name}/tests", "peft_tests")
        files.extractall(folder, inside, filter="data")
    (folder / "peft_tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", str(folder / "more"), *MORE], check=True)
    for module, text in STAND_INS.items():
        (folder / f"{module}.py").write_text(text)


def outcomes(folder: Path, label: str, chosen: str, plugins: list[str]) -> dict[str, str]:
    """What each test came to: passed, skipped or failed."""
    report = folder / f"{label}.xml"
    given = os.environ.get("PYTHONPATH")
    paths = [str(folder), str(folder / "more"), str(ROOT), *([given] if given else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    options = ["-q", "--tb=line", "-p", "no:cacheprovider", "-k", chosen, f"--junitxml={report}"]
    options += ["-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    files = [str(folder / "peft_tests" / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", *options, *plugins, *files]
    subprocess.run(command, env=environment, cwd=folder, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        word = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = word
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("-k", default=CHOSEN, help="which tests, as pytest takes it")
    given = parser.parse_args()
    prepare(FOLDER)
    before = outcomes(FOLDER, "before", given.k, [])
    after = outcomes(FOLDER, "fused", given.k, ["-p", "tests.peft_suite.plugin"])
    for label, found in (("as they are", before), ("fused", after)):
        words = list(found.values())
        print(label, {word: words.count(word) for word in ("passed", "skipped", "failed")})
    worse = [t for t, word in before.items() if word == "passed" and after.get(t) != "passed"]
    for test in worse:
        print(f"passed before and not when fused: {test}")
    return 1 if worse or not before else 0


if __name__ == "__main__":
    raise SystemExit(main())
