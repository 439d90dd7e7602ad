"""Names that nobody knows. Kind: a typo answered without what it was a typo of."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from petal_kernels._runtime import keywords

FIELDS = ["r", "target_modules", "lora_alpha", "rank_pattern", "adapter_dtype"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lora_alhpa", "lora_alpha"),
        ("LORA_ALPHA", "lora_alpha"),
        ("rank", "r"),
        ("lora_r", "r"),
        ("alpha", "lora_alpha"),
        ("dtype", "adapter_dtype"),
        ("lora_dtype", "adapter_dtype"),
        ("modules", "target_modules"),
        ("modules_target_names", "target_modules"),
        ("quux", ""),
        ("", ""),
    ],
)
def test_the_closest_name(name: str, wanted: str) -> None:
    assert keywords.closest(name, FIELDS) == wanted


def test_another_word_counts_where_the_name_is_known() -> None:
    assert keywords.closest("rank", ["rank_pattern", "alpha"]) == "rank_pattern"


def test_what_is_said_of_a_name() -> None:
    assert keywords.unknown("quux", ["a", "b"]) == "'quux'; want some of a, b"
    assert keywords.unknown("rnk", ["rank"]) == "'rnk'; did you mean 'rank'?"
    assert keywords.unknown("rnk", ["rank"], {"rnk": "theirs"}) == "'rnk', theirs"


@keywords.checked(lambda: {"c": "another call's"})
def given(first: int, *, second: int = 2) -> tuple[int, int]:
    """What it says."""
    return first, second


@keywords.checked()
def anything(**values: Any) -> dict[str, Any]:
    return values


def test_a_checked_function_is_itself_but_for_names_that_it_has_not() -> None:
    assert given(1) == (1, 2)
    assert given(first=3, second=4) == (3, 4)
    assert (given.__doc__, list(inspect.signature(given).parameters)) == (
        "What it says.",
        ["first", "second"],
    )
    assert anything(c=1) == {"c": 1}
    for name, said in (("secnd", "did you mean 'second'"), ("c", "another call's")):
        with pytest.raises(TypeError, match=f"^given: got an unknown argument '{name}'.*{said}"):
            given(1, **{name: 5})
    with pytest.raises(TypeError, match="first"):
        given()  # type: ignore[call-arg]
