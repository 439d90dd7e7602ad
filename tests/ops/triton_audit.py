"""Testing Triton kernels without a GPU: a faster interpreter, traffic counts, compilation, IR
lint."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.ops import folders


def hasten_interpreter() -> None:
    """Patch the language once per launch in place of once per device-function call.

    The interpreter swaps ``triton.language``'s members anew at every call of a device function from
    a kernel, which costs more than running it. Nothing else changes. Safe to call twice; does
    nothing outside the interpreter.
    """
    from triton.runtime import interpreter

    if hasattr(interpreter, "petal_patched"):
        return
    patch_lang, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    interpreter.petal_patched = patched = set()

    @functools.cache
    def languages(fn: Any) -> frozenset[str]:
        modules = {"tl": interpreter.tl, "core": interpreter.tl.core}
        visible = {id(v) for v in fn.__globals__.values()}
        return frozenset(name for name, module in modules.items() if id(module) in visible)

    def patch_once(fn: Any) -> Any:
        seen = languages(fn)
        if seen in patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        patched.add(seen)
        return scope

    numpy_type = functools.lru_cache(maxsize=None)(interpreter._get_np_dtype)

    def quick_numpy_type(t: Any) -> Any:
        scalar = t.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else numpy_type(scalar)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return call(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run
    interpreter._get_np_dtype = quick_numpy_type


@dataclass
class Launch:
    """What one kernel launch touched: unique and issued bytes per tensor argument, writes per
    element."""

    kernel: str
    grid: tuple[int, ...]
    spans: dict[str, tuple[int, int]]
    reads: dict[str, list[Any]] = field(default_factory=dict)
    writes: dict[str, list[Any]] = field(default_factory=dict)

    def record(self, kind: dict[str, list[Any]], addresses: Any, size: int) -> None:
        """Attribute active lanes to the arguments they lie in; refuse lanes that lie in none."""
        left = addresses
        for name, (begin, end) in self.spans.items():
            inside = (left >= begin) & (left + size <= end)
            if inside.any():
                kind.setdefault(name, []).append((left[inside], size))
                left = left[~inside]
        if left.size:
            # Before the memory is touched: a stray store would corrupt the test run's own heap.
            raise IndexError(f"{self.kernel}: {left.size} active lanes lie outside every argument")

    @staticmethod
    def _bytes(kind: dict[str, list[Any]], name: str, unique: bool) -> int:
        total = 0
        for size in {s for _, s in kind.get(name, [])}:
            lanes = np.concatenate([a for a, s in kind[name] if s == size])
            total += size * (np.unique(lanes).size if unique else lanes.size)
        return total

    def moved(self, ignore: tuple[str, ...] = ("rng_ptr",)) -> int:
        """Unique bytes read plus unique bytes written: the compulsory traffic of the launch."""
        return sum(
            self._bytes(kind, name, True)
            for kind in (self.reads, self.writes)
            for name in kind
            if name not in ignore
        )

    def issued(self) -> int:
        """All bytes asked of the caches."""
        return sum(self._bytes(k, n, False) for k in (self.reads, self.writes) for n in k)

    def readback(self) -> int:
        """Unique bytes read of what the launch has itself written."""
        total = 0
        for name in self.reads.keys() & self.writes.keys():
            read = np.unique(np.concatenate([a for a, _ in self.reads[name]]))
            written = np.unique(np.concatenate([a for a, _ in self.writes[name]]))
            total += self.reads[name][0][1] * int(np.isin(read, written).sum())
        return total

    def rewritten(self) -> list[str]:
        """Arguments with an element stored more than once."""
        return [
            n
            for n in self.writes
            if self._bytes(self.writes, n, True) != self._bytes(self.writes, n, False)
        ]


def _span(t: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    begin = t.data_ptr()
    return begin, begin + (last + 1) * t.element_size() if t.numel() else begin


class Audit:
    """Records every launch of the interpreter inside the block; ``reverse`` runs the programs last
    to first."""

    def __init__(self, reverse: bool = False) -> None:
        self.launches: list[Launch] = []
        self.reverse = reverse

    def __enter__(self) -> Audit:
        from triton.runtime import interpreter

        executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
        call, set_index = executor.__call__, builder.set_grid_idx
        load, store = builder.create_masked_load, builder.create_masked_store
        self._saved = (executor, builder, call, load, store, set_index)
        audit = self

        def run(grid: Any, *args: Any, **kwargs: Any) -> Any:
            named = {**dict(zip(grid.arg_names, args, strict=False)), **kwargs}
            tensors = {n: t for n, t in named.items() if isinstance(t, torch.Tensor)}
            spans: dict[str, tuple[int, int]] = {}
            for name, tensor in tensors.items():
                span = _span(tensor)
                if span not in spans.values():
                    spans[name] = span
            audit.launches.append(Launch(grid.fn.__name__, grid.grid, spans))
            return call(grid, *args, **kwargs)

        def active(pointers: Any, mask: Any) -> tuple[Any, int]:
            addresses = np.asarray(pointers.data)
            lanes = np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)
            size = pointers.get_element_ty().primitive_bitwidth // 8
            return addresses[lanes].astype(np.int64), size

        def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            launch = audit.launches[-1]
            launch.record(launch.reads, *active(pointers, mask))
            return load(self, pointers, mask, *rest)

        def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            launch = audit.launches[-1]
            launch.record(launch.writes, *active(pointers, mask))
            return store(self, pointers, value, mask, *rest)

        def reversed_index(self: Any, x: int, y: int, z: int) -> Any:
            last = [n - 1 for n in self.grid_dim]
            return set_index(self, last[0] - x, last[1] - y, last[2] - z)

        executor.__call__ = run
        builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
        if self.reverse:
            builder.set_grid_idx = reversed_index
        return self

    def __exit__(self, *_: object) -> None:
        executor, builder, call, load, store, set_index = self._saved
        executor.__call__, builder.set_grid_idx = call, set_index
        builder.create_masked_load, builder.create_masked_store = load, store

    def of(self, fragment: str) -> list[Launch]:
        """The launches whose kernel's name contains the fragment."""
        return [launch for launch in self.launches if fragment in launch.kernel]


# The operators that have a launch table: triton_configs.py with shipped_configs().
OPERATORS = folders.names("triton_configs")
# What each architecture grants a block; bucket 80 also serves 8.6, 8.9 and 12.0, which have 99 KiB.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
_TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")
_SPILL = re.compile(r"\b(?:LDL|STL)\b")
_ATOMIC = re.compile(r"\b(?:ATOM|ATOMG|RED|REDG)\b")


def _source(shipped: Any) -> Any:
    from triton.compiler import ASTSource

    names = shipped.kernel.arg_names
    # What the launcher's arguments have at run time: 16-byte aligned pointers, sizes and strides
    # divisible by 16. Without this, every access is compiled as if misaligned.
    divisible = [
        n
        for n, kind in shipped.signature.items()
        if kind.startswith("*")
        or n.startswith(("stride", "out", "rank", "start"))
        or n in ("D", "R", "O", "F", "DG", "RG", "W")
    ]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    signature = {**shipped.signature, **dict.fromkeys(shipped.constexprs, "constexpr")}
    return ASTSource(shipped.kernel, signature, shipped.constexprs, attributes)


def _output(*command: Any) -> str:
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return run.stdout


def compile_report(shipped: Any, arch: int) -> dict[str, Any]:
    """Cross-compile one shipped form and read its resources and instructions off the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        _source(shipped), target=GPUTarget("cuda", arch, 32), options=shipped.options
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = _output(tools / "nvdisasm", "-c", file.name)
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    return {
        "name": shipped.name,
        "arch": arch,
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "tensor_cores": len(_TENSOR_CORE.findall(sass)),
        "wants_tensor_cores": shipped.tensor_cores,
        "spills": len(_SPILL.findall(sass)),
        "atomics": len(_ATOMIC.findall(sass)),
    }


def ttir(shipped: Any, arch: int) -> str:
    """The optimised Triton IR of one form: no code generation, so it is quick."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", arch, 32)
    source, backend = _source(shipped), make_backend(target)
    options = backend.parse_options(dict(shipped.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    return str(stages["ttir"](module, {}))


_DEFINITION = re.compile(r"^\s*(%[\w:]+) = (?:\"?)([\w.]+)\"?(.*)$")
_CARRIES = {
    "arith.addi", "arith.subi", "arith.extsi", "arith.select", "arith.minsi", "arith.maxsi",
    "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans",
}  # fmt: skip


def narrow_offsets(text: str) -> list[str]:
    """Lines of TTIR where a 32-bit product of two run-time values (a row times a stride) reaches an
    address.

    A product with a constant (a program number times a tile) is no row offset; a quotient or
    remainder ends the chain.
    """
    constant: set[str] = set()
    tainted: set[str] = set()
    offenders = []
    for line in text.splitlines():
        carried = line.partition("iter_args")[2]
        for inner, outer in re.findall(r"(%\w+) = (%[\w#]+)(?=[,)])", carried):
            if outer in tainted:
                tainted.add(inner)
        match = _DEFINITION.match(line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        operands = re.findall(r"%[\w#]+", rest)
        shapes = operation in ("tt.splat", "tt.broadcast", "tt.expand_dims")
        if operation == "arith.constant" or (shapes and operands[0] in constant):
            constant.add(result)
        elif operation == "arith.muli" and re.search(r"\bi32\b|xi32>", rest):
            if not any(o in constant for o in operands):
                tainted.add(result)
        elif operation in _CARRIES and any(o in tainted for o in operands):
            tainted.add(result)
        elif operation == "tt.addptr" and any(o in tainted for o in operands):
            offenders.append(line.strip())
    return offenders


def shipped_configs(operator: str) -> list[Any]:
    """Every form in an operator's launch table."""
    table = importlib.import_module(f"petal_kernels.ops.{operator}.triton_configs")
    return list(table.shipped_configs())


def main(arguments: list[str]) -> None:
    """``compile|offsets OPERATOR PATTERN ARCH``: one JSON line per matching form, on stdout."""
    what, operator, pattern, arch = arguments[0], arguments[1], arguments[2], int(arguments[3])
    for shipped in shipped_configs(operator):
        if arch not in shipped.archs or not re.search(pattern, shipped.name):
            continue
        if what == "compile":
            report = compile_report(shipped, arch)
        else:
            report = {"name": shipped.name, "narrow": narrow_offsets(ttir(shipped, arch))}
        print(json.dumps(report), flush=True)


def in_subprocess(*arguments: str) -> list[dict[str, Any]]:
    """``main`` in a process of its own, without the interpreter: a compiler's abort must not end
    the test run."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_audit", *arguments],
        cwd=folders.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{arguments}: {run.stderr[-2000:]}"
    return [json.loads(line) for line in run.stdout.splitlines()]


if __name__ == "__main__":
    main(sys.argv[1:])
