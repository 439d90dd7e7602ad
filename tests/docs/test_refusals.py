"""The page of refusals has every message of the package, in the words that a user sees.

Kind: a message that is raised and stands nowhere.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from tests.docs.tools import hooks, messages, refusals
from tests.hf import tiny_text

FOUND = messages.messages()


def read(tmp_path: Path, **files: str) -> dict[str, list[tuple[str, str]]]:
    """(kind, text) of what stands in a package of these files, by module."""
    for name, text in files.items():
        path = tmp_path / "p" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    found: dict[str, list[tuple[str, str]]] = {}
    for message in messages.messages(sorted((tmp_path / "p").glob("*.py")), tmp_path):
        found.setdefault(message.module, []).append((message.kind, message.text))
    return found


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ('raise ValueError("r: want 1")', [("ValueError", "r: want 1")]),
        ('raise ValueError(f"r: want 1, got {r!r}")', [("ValueError", "r: want 1, got …")]),
        ('raise x.MyError("a " + "b") from None', [("MyError", "a b")]),
        ('raise Refusal("no")', [("Refusal", "no")]),
        ('raise MyError("a " + ("b" if r else "c"))', [("MyError", "a b"), ("MyError", "a c")]),
        ('raise KeyError', []),
        ('raise AssertionError("ours")', []),
        ('return ValueError("given back")', [("ValueError", "given back")]),
        ('warnings.warn(f"{r} is old", stacklevel=2)', [("warning", "… is old")]),
        ('why = "two\\n  lines"\n    raise ValueError(why)', [("ValueError", "two lines")]),
        ('why = r()\n    raise ValueError(f"a {why}")', [("ValueError", "a …")]),
        ('w = "b"\n    w = r()\n    raise E.Error("a" + w)', [("Error", "ab"), ("Error", "a…")]),
        ('def inner():\n        raise ValueError("inside")', [("ValueError", "inside")]),
    ],
)  # fmt: skip
def test_what_a_function_says(code: str, said: list[tuple[str, str]], tmp_path: Path) -> None:
    assert read(tmp_path, a=f"def f(r):\n    {code}\n").get("p.a", []) == said


def test_reasons_are_messages(tmp_path: Path) -> None:
    text = """
        def unsupported(call):
            reasons = ["needs a device"]
            reasons.append(f"rank at most 4, got {call.rank}")
            return reasons

        def other(call):
            return ["is no reason at all"]
    """
    want = [("reason", "needs a device"), ("reason", "rank at most 4, got …")]
    assert read(tmp_path, a=text)["p.a"] == want


def test_words_that_a_caller_gives_are_his(tmp_path: Path) -> None:
    """Through two functions, an import by another name and a default."""
    checks = """
        def want(ok, name, what="a number"):
            if not ok:
                raise ValueError(f"{name}: want {what}, got {ok!r}")

        def one_of(name, value, choices):
            want(value in choices, name, f"one of {choices}")
    """
    user = """
        from p.checks import one_of, want as _want
        from p import checks

        def f(r, gate):
            _want(r > 1, "r")
            one_of("gate", gate, ("a", "b"))
            checks.want(what="a bool", ok=r, name="flag")
            want(r, "not this one")
    """
    said = [text for _, text in read(tmp_path, checks=checks, user=user)["p.user"]]
    assert said == [
        "r: want a number, got …",
        "gate: want one of …, got …",
        "flag: want a bool, got …",
    ]


# -- of the package -------------------------------------------------------------------------------


def _wrong(call: Callable[[], Any]) -> str:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever a user meets
        call()
    return str(raised.value)


def _named(backend: str) -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    pk.gated_bottleneck(x, torch.randn(2, 8).double(), torch.randn(8, 2).double(), backend=backend)


CALLS: dict[str, Callable[[], Any]] = {
    "config": lambda: pk.LoraConfig(r=0),
    "choice": lambda: pk.VLPetConfig(gate="huge"),
    "no model": lambda: pk.attach("model", pk.LoraConfig()),  # type: ignore[arg-type]
    "unknown family": lambda: pk.attach(nn.Linear(2, 2), pk.VLPetConfig()),
    "no match": lambda: pk.attach(
        tiny_text.build("llama"), pk.LoraConfig(target_modules=["nothing"])
    ),
    "twice": lambda: [pk.attach(m, pk.LoraConfig()) for m in [tiny_text.build("llama")] * 2],
    "no file": lambda: pk.attach(tiny_text.build("llama"), "./no/such/folder/at/all"),
    "no layers of PEFT's": lambda: pk.fuse(nn.Linear(2, 2)),
    "no tensor": lambda: pk.lowrank_linear(1, 2, 3),  # type: ignore[arg-type]
    "shape": lambda: pk.gated_bottleneck(torch.ones(2, 4), torch.ones(2, 3), torch.ones(4, 2)),
    "named backend": lambda: _named("native"),
    "no operator": lambda: pk.explain(len),
    "memory": lambda: pk.memory.assert_saved_bytes(nn.Linear(2, 2), torch.ones(1, 2)),
    "module": lambda: pk.nn.VLAdapter(8, r=0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_raised_stands_on_the_page(call: Callable[[], Any]) -> None:
    said = " ".join(_wrong(call).split())
    shown = [message.text for message in refusals.shown(FOUND)]
    matching = [text for text in shown if re.fullmatch(as_pattern(text), said, flags=re.DOTALL)]
    letters = [sum(c.isalpha() for c in text) for text in matching]
    assert max(letters, default=0) >= 7, f"{said!r} is like none of them"


def as_pattern(text: str) -> str:
    return ".*".join(re.escape(part) for part in text.split(messages.GAP))


def test_every_module_has_its_advice() -> None:
    without = {message.module for message in FOUND if refusals.area_of(message.module) is None}
    assert not without, "docs/tools/refusals.py: AREAS"


def test_no_advice_is_about_what_is_gone() -> None:
    names = {message.module.removeprefix("petal_kernels.") for message in FOUND}
    for area in refusals.AREAS:
        for module in area.modules:
            there = messages.PACKAGE / (module.rstrip(".").replace(".", "/"))
            assert any(name.startswith(module) for name in names) or (
                there.exists() or there.with_suffix(".py").exists()
            ), f"{area.title}: {module}"
    for part in refusals.HINTS:
        assert any(part in message.text for message in FOUND), part


def test_the_page_has_each_message_once_and_its_hint() -> None:
    text = refusals.page(FOUND)
    sections = dict(part.split("\n", 1) for part in f"\n{text}".split("\n### ")[1:])
    assert list(sections) == [area.title for area in refusals.AREAS]
    for message in refusals.shown(FOUND):
        section = sections[refusals.area_of(message.module).title]
        assert f"| `` {refusals._cell(message.text)} ``" in section, message
    hint = refusals.HINTS["already attached? detach it first"]
    (line,) = [line for line in text.splitlines() if "already attached? detach it first" in line]
    assert hint in line
    assert "hf.attach" in line
    rows = [line for line in text.splitlines() if line.startswith("| ``")]
    assert len(rows) == len(set(rows))


def test_the_hook_fills_what_a_page_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "messages", lambda: FOUND)
    text = hooks.on_page_markdown(f"before\n{refusals.MARK}\n{hooks.SCRIPTS}\nafter")
    assert refusals.page(FOUND) in text
    assert refusals.MARK not in text
    assert "| `examples/swap.py` |" in text
    assert hooks.on_page_markdown("nothing marked") == "nothing marked"


def test_a_script_without_a_docstring_is_refused(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"a\.py: want a docstring"):
        hooks.scripts(tmp_path)
