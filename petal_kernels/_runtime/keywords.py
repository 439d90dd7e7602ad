"""Names that a caller wrote and nobody knows: the message says which, and the closest known one."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_LEAST = 0.6  # of difflib's ratio, its own default
# Other words for a name, of which its letters say nothing.
_WORDS = {
    **dict.fromkeys(("rank", "lora_rank", "lora_r", "bottleneck"), "r"),
    "lora_dtype": "adapter_dtype",
}


def closest(name: str, known: Collection[str]) -> str:
    """The known name that `name` most likely means; empty where none is near: one by another word,
    one spelt nearly so, then one of which it is a part, or that is a part of it."""
    if _WORDS.get(name) in known:
        return _WORDS[name]
    lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), lower, 1, _LEAST)
    if near:
        return lower[near[0]]
    parts = set(name.lower().split("_"))
    within = [each for each in known if parts <= set(each.split("_"))]
    within += [each for each in known if set(each.split("_")) <= parts]
    return within[0] if within else ""


def unknown(name: str, known: Collection[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """What is said of a name that is not known: what it is elsewhere, the closest known one, or all
    of them."""
    if elsewhere and name in elsewhere:
        return f"{name!r}, {elsewhere[name]}"
    near = closest(name, known)
    if near:
        return f"{name!r}; did you mean {near!r}?"
    return f"{name!r}; want some of {', '.join(known)}"


def check(
    function: Callable[..., Any],
    given: Collection[str],
    what: str,
    elsewhere: Callable[[], Mapping[str, str]] = dict,
) -> None:
    """TypeError about the first of the names `given` that is no parameter of `function`.

    what       whose name it is, in words
    elsewhere  what to say of names that belong into another call
    """
    parameters = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            said = unknown(name, [each for each in parameters if each != "self"], elsewhere())
            raise TypeError(f"{what} {said}")


def checked(
    elsewhere: Callable[[], Mapping[str, str]] = dict,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Lets a function answer an argument that it has not with the closest one that it has."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            check(function, kwargs, f"{function.__name__}: got an unknown argument", elsewhere)
            return function(*args, **kwargs)

        return call

    return decorate
