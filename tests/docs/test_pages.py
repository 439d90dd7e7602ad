"""Pages for users: their Python runs as it stands, their links lead somewhere, their figures and
pictures are what is committed.

Kind: a page that was right once.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import petal_kernels as pk
from benchmarks import tables
from petal_kernels.hf.config import METHODS
from tests.docs import blocks
from tests.docs.tools import pictures

ROOT = blocks.ROOT
PAGES = blocks.pages()
WITH_CODE = [page for page in PAGES if blocks.blocks(page)]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_a_pages_python_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = blocks.run(page, monkeypatch)
    assert names["pk"] is pk


def test_readme_shows_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a block that is not run, or runs on nothing."""
    monkeypatch.chdir(tmp_path)
    names = blocks.run(ROOT / "README.md", monkeypatch)
    assert "trainable" in capsys.readouterr().out
    assert (tmp_path / "my-adapter").is_dir()
    assert names["reference"].isfinite().all()


def test_a_wrong_name_is_found() -> None:
    text = "pk.attach(m, pk.NoConfig())\npk.nn.Nothing"
    assert set(blocks.unknown_names(text)) == {"pk.NoConfig", "pk.nn.Nothing"}


def test_every_block_that_does_not_run_says_what_it_needs() -> None:
    said = {block.title for page in PAGES for block in blocks.blocks(page) if block.title}
    assert said <= {"needs the Hub", "needs a process group", "needs a GPU"}


# -- links ----------------------------------------------------------------------------------------


def dead_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of one."""
    found = []
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b, c\n[x](there.md) [y](#a-b-c) [z](#gone) [w](page.md#a-b-c)")
    assert dead_links(page) == ["there.md", "#gone"]


# -- what is written by machine -------------------------------------------------------------------


def test_pictures_are_what_their_script_draws() -> None:
    drawn = pictures.pictures()
    for name, text in drawn.items():
        assert (pictures.FOLDER / name).read_text() == text, "python docs/tools/pictures.py"
    there = {path.name for path in pictures.FOLDER.iterdir()}
    assert there == {*drawn, Path(tables.PICTURE).name}


def test_a_picture_shows_every_box_and_arrow() -> None:
    """Kind: an arrow that leads nowhere, a box outside of its picture."""
    boxes = {"a": pictures.Box(0, 0, "left <"), "b": pictures.Box(1, 1, "right")}
    text = pictures.svg(pictures.Picture("a picture", boxes, "a>b"))
    assert "left &lt;" in text
    (points,) = re.findall(r'points="([^"]+)"', text)
    width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', text)[0])
    ends = [tuple(map(int, p.split(","))) for p in points.split()]
    a, b = boxes["a"], boxes["b"]
    assert ends[0] == (round(a.x + a.width / 2), round(a.y))
    assert ends[-1] == (round(b.x - b.width / 2), round(b.y))
    assert all(0 < x < width and 0 < y < height for x, y in ends)
    with pytest.raises(KeyError):
        pictures.svg(pictures.Picture("a picture", boxes, "a>c"))


@pytest.mark.parametrize("config", METHODS.values(), ids=lambda c: c.__name__)
def test_every_method_has_a_page(config: type) -> None:
    """Kind: a method that is there and that no page says how to use."""
    texts = [page.read_text() for page in PAGES if "docs" in page.parts]
    mine = [text for text in texts if f"pk.{config.__name__}(" in text]
    assert any(re.search(r"!\[[^]]+\]\((\.\./)?pictures/", text) for text in mine)


MODULES = [name for name in pk.__all__ if isinstance(getattr(pk, name), ModuleType)]


@pytest.mark.parametrize("name", sorted(set(pk.__all__) - {"__version__", *MODULES}))
def test_the_api_page_has_every_public_name(name: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert re.search(rf"^::: petal_kernels\.[\w.]+\.{name}$", text, flags=re.M), name


@pytest.mark.parametrize("module", MODULES)
def test_the_api_page_has_every_name_of(module: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for name in getattr(pk, module).__all__:
        assert re.search(rf"^::: petal_kernels\.{module}\.(?:[\w.]+\.)?{name}$", text, re.M), name


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120
