"""Ways to damage a saved adapter: each is a name and a function of its folder.

`seal` says what the digests say afterwards: "kept" (as saved: bit rot, a copy that broke off, a
stray edit), "fresh" (as if the package had written what is there now) or "none" (as in files
written before the json had a digest of its own).
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petal_kernels.hf import files, pair

VALUES: dict[str, Any] = {
    "null": None,
    "zero": 0,
    "minus one": -1,
    "large": 10**18,
    "half": 0.5,
    "true": True,
    "text": "nonsense",
    "empty text": "",
    "list": [],
    "list of one": [1],
    "object": {},
    "object of one": {"a": 1},
}
RAW = {"nan": "NaN", "infinity": "Infinity", "beyond floats": "1e999", "digits": "1" * 5000}
DTYPES = ("F64", "F16", "BF16", "I32", "U32", "I64", "BOOL", "F8_E4M3", "C64", "F4", "nonsense")


@dataclass(frozen=True)
class Mutation:
    """What is done to a folder, and whether the digests are made to fit it."""

    name: str
    apply: Callable[[Path], None]
    seal: str = "kept"


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(the header, the tensors' bytes) of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: Any, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def reseal(folder: Path) -> None:
    """Digests that fit what is there now."""
    data, path = (folder / pair.TENSORS).read_bytes(), folder / pair.CONFIG
    values = json.loads(path.read_bytes())
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if isinstance(values.get("tensors"), dict):
        values["tensors"].update(entry)
    path.write_text(json.dumps(files.seal(values)))


def unseal(folder: Path) -> None:
    """The json as it was written before it had a digest of its own."""
    path = folder / pair.CONFIG
    values = json.loads(path.read_bytes())
    values.pop("sha256", None)
    path.write_text(json.dumps(values))


# -- bytes of either file -------------------------------------------------------------------------


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def _head(length: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:length]


def _always(content: bytes) -> Callable[[bytes], bytes]:
    return lambda data: content


def _flip(place: int, bit: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        return bytes(damaged)

    return change


def cut_and_flipped(folder: Path, count: int, seed: int) -> Iterator[Mutation]:
    """Truncations and additions at every kind of place, and `count` flipped bits in each of the
    header's length, the header, the tensors and the json."""
    generator = random.Random(seed)
    for name in (pair.TENSORS, pair.CONFIG):
        data = (folder / name).read_bytes()
        regions = {"": (0, len(data))}
        if name == pair.TENSORS:
            end = 8 + struct.unpack("<Q", data[:8])[0]
            regions = {"length": (0, 8), "header": (8, end), "tensors": (end, len(data))}
        cuts = {0, 1, len(data) // 2, len(data) - 1}
        for begin, end in regions.values():
            cuts |= {begin, begin + 1, (begin + end) // 2, end - 1}
        for cut in sorted(cuts):
            yield Mutation(f"{name} cut at {cut}", _rewrite(name, _head(cut)))
        yield Mutation(f"{name} with a byte more", _rewrite(name, lambda d: d + b"\0"))
        yield Mutation(f"{name} twice", _rewrite(name, lambda d: d + d))
        yield Mutation(f"{name} of zeros", _rewrite(name, lambda d: bytes(len(d))))
        for region, (begin, end) in regions.items():
            for _ in range(count):
                place, bit = generator.randrange(begin, end), generator.randrange(8)
                label = f"{name} {region} bit {bit} of byte {place}"
                yield Mutation(label, _rewrite(name, _flip(place, bit)))


# -- the header of the tensors --------------------------------------------------------------------


def _header(change: Callable[[dict[str, Any], bytes], bytes]) -> Callable[[Path], None]:
    return _rewrite(pair.TENSORS, lambda data: change(*header_of(data)))


def headers(folder: Path) -> Iterator[Mutation]:
    """Every part of a header made wrong, with digests that fit."""
    header, _ = header_of((folder / pair.TENSORS).read_bytes())
    names = [name for name in header if name != "__metadata__"]
    first, last = names[0], names[-1]
    begin, end = header[first]["data_offsets"]

    def entry(key: str, value: Any) -> Callable[[dict[str, Any], bytes], bytes]:
        return lambda h, rest: with_header(h | {first: h[first] | {key: value}}, rest)

    shape = header[first]["shape"]
    edits: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
        **{f"dtype {dtype}": entry("dtype", dtype) for dtype in DTYPES},
        "dtype of a number": entry("dtype", 4),
        "shape larger": entry("shape", [shape[0] + 1, *shape[1:]]),
        "shape flat": entry("shape", [1, *shape]),
        "shape negative": entry("shape", [-shape[0], *shape[1:]]),
        "shape of text": entry("shape", "nonsense"),
        "shape of floats": entry("shape", [0.5]),
        "shape beyond": entry("shape", [2**63, 2**63]),
        "offsets reversed": entry("data_offsets", [end, begin]),
        "offsets empty": entry("data_offsets", [begin, begin]),
        "offsets short": entry("data_offsets", [begin, end - 4]),
        "offsets beyond": entry("data_offsets", [begin, 10**12]),
        "offsets negative": entry("data_offsets", [-4, end]),
        "offsets of three": entry("data_offsets", [begin, end, end]),
        "offsets overlapping": entry("data_offsets", header[last]["data_offsets"]),
        "entry gone": lambda h, rest: with_header({k: v for k, v in h.items() if k != first}, rest),
        "entry of a list": lambda h, rest: with_header(h | {first: []}, rest),
        "renamed": lambda h, rest: with_header(
            {("renamed" if k == first else k): v for k, v in h.items()}, rest
        ),
        "renamed in Greek": lambda h, rest: with_header(
            {("λ" if k == first else k): v for k, v in h.items()}, rest
        ),
        "a name more": lambda h, rest: with_header(h | {"more": h[first]}, rest),
        "a name twice": lambda h, rest: with_header(
            json.dumps(h)[:-1].encode() + b", " + json.dumps({first: h[last]})[1:].encode(), rest
        ),
        "metadata of numbers": lambda h, rest: with_header(h | {"__metadata__": {"a": 1}}, rest),
        "metadata of a list": lambda h, rest: with_header(h | {"__metadata__": []}, rest),
        "no header": lambda h, rest: with_header(b"", rest),
        "an empty header": lambda h, rest: with_header({}, b""),
        "a list for a header": lambda h, rest: with_header([], rest),
        "no utf-8": lambda h, rest: with_header(b'{"\xff": {}}', rest),
        "brackets": lambda h, rest: with_header(b"[" * 100_000, rest),
        "length beyond": lambda h, rest: struct.pack("<Q", 2**63) + with_header(h, rest)[8:],
        "length large": lambda h, rest: struct.pack("<Q", 10**8) + with_header(h, rest)[8:],
        "length zero": lambda h, rest: struct.pack("<Q", 0) + with_header(h, rest)[8:],
        "tensors cut": lambda h, rest: with_header(h, rest[:-1]),
        "tensors longer": lambda h, rest: with_header(h, rest + b"\0\0\0\0"),
    }
    for name, change in edits.items():
        yield Mutation(f"header: {name}", _header(change), "fresh")


# -- the json -------------------------------------------------------------------------------------


def _places(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _places(value, (*path, key))


def _edit(path: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> Any:
    def apply(folder: Path) -> None:
        file = folder / pair.CONFIG
        values = json.loads(file.read_bytes())
        within = values
        for key in path[:-1]:
            within = within[key]
        change(within, path[-1])
        file.write_text(json.dumps(values))

    return apply


def _set(value: Any) -> Callable[[dict[str, Any], str], None]:
    return lambda within, key: within.__setitem__(key, value)


def _raw(path: tuple[str, ...], text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        _edit(path, _set("@@"))(folder)
        file = folder / pair.CONFIG
        file.write_text(file.read_text().replace('"@@"', text))

    return apply


def jsons(folder: Path) -> Iterator[Mutation]:
    """Every key gone, renamed, beside an unknown one, and of every other kind of value: as a stray
    edit, and in a file without a digest of its own."""
    values = json.loads((folder / pair.CONFIG).read_bytes())
    places = [place for place in _places(values) if place != ("sha256",)]
    for seal in ("kept", "none"):
        for path in places:
            name = f"json ({seal}): {'.'.join(path)}"
            yield Mutation(f"{name} gone", _edit(path, lambda w, k: w.__delitem__(k)), seal)
            renamed = _edit(path, lambda w, k: w.__setitem__(f"{k}_", w.pop(k)))
            yield Mutation(f"{name} renamed", renamed, seal)
            for label, value in VALUES.items():
                yield Mutation(f"{name} = {label}", _edit(path, _set(value)), seal)
        for path in [("unknown",), ("config", "unknown"), ("base", "unknown")]:
            name = f"json ({seal}): {'.'.join(path)}"
            yield Mutation(f"{name} more", _edit(path, _set(1)), seal)
    for label, text in RAW.items():
        for path in places:
            yield Mutation(f"json: {'.'.join(path)} = {label}", _raw(path, text))
    others = {"petal", "aurora", "vlpet", "vladapter", "routing", "experts"} - {values["method"]}
    for method in sorted(others):
        yield Mutation(f"json: method {method}", _edit(("method",), _set(method)), "none")
    for version in (-1, 2, 1.5, "1", True):
        label = f"json: format_version {version!r}"
        yield Mutation(label, _edit(("format_version",), _set(version)), "none")
    data = (folder / pair.CONFIG).read_bytes()
    whole = {
        "empty": b"",
        "null": b"null",
        "a list": b"[]",
        "a number": b"1",
        "brackets": b"[" * 100_000,
        "objects": b'{"a":' * 100_000,
        "utf-16": data.decode().encode("utf-16"),
        "a byte-order mark": b"\xef\xbb\xbf" + data,
        "no utf-8": data.replace(b"petal", b"\xff").replace(b"r", b"\xfe"),
        "a key twice": data.replace(b'"format_version": 1', b'"format_version": 1, "method": "x"'),
        "a lone surrogate": data.replace(b'"variant"', b'"variant\\ud800"'),
        "single quotes": data.replace(b'"', b"'"),
    }
    for label, content in whole.items():
        yield Mutation(f"json: {label}", _rewrite(pair.CONFIG, _always(content)))


# -- whole files ----------------------------------------------------------------------------------


def folders(folder: Path) -> Iterator[Mutation]:
    """Files that are missing, folders, or one another."""

    def missing(*names: str) -> Callable[[Path], None]:
        def apply(at: Path) -> None:
            for name in names:
                (at / name).unlink()

        return apply

    def as_folder(name: str) -> Callable[[Path], None]:
        def apply(at: Path) -> None:
            (at / name).unlink()
            (at / name).mkdir()

        return apply

    def as_loop(name: str) -> Callable[[Path], None]:
        def apply(at: Path) -> None:
            (at / name).unlink()
            (at / name).symlink_to(name)

        return apply

    def exchanged(at: Path) -> None:
        first, second = (at / name for name in (pair.TENSORS, pair.CONFIG))
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)

    both = (pair.TENSORS, pair.CONFIG)
    yield Mutation("nothing there", missing(*both))
    for name in both:
        yield Mutation(f"{name} missing", missing(name))
        yield Mutation(f"{name} a folder", as_folder(name))
        yield Mutation(f"{name} a loop", as_loop(name))
    yield Mutation("exchanged", exchanged)


def all_of(folder: Path, flips: int, seed: int) -> list[Mutation]:
    """Every mutation of a saved adapter."""
    found = [*cut_and_flipped(folder, flips, seed), *headers(folder), *jsons(folder)]
    return [*found, *folders(folder)]
