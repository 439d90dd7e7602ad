"""Faults in the loaders of the authors' checkpoints: rows, columns, orders, what is let through."""

TESTS = ["tests/hf/test_released.py", "tests/hf/test_released_refused.py"]

_MODES = "petal_kernels/hf/released/modes.py"
_BOTTLENECKS = "petal_kernels/hf/released/bottlenecks.py"
_ROUTING = "petal_kernels/hf/released/routing.py"
_LOAD = "petal_kernels/hf/released/load.py"
_STORED = "petal_kernels/hf/stored.py"
_ATTACH = "petal_kernels/hf/attach.py"
_ASKED = "petal_kernels/hf/asked.py"

MUTANTS = [
    # Which of theirs is which of ours.
    (
        _MODES,
        "    ordered = [rows[k] for k in range(len(rows))]",
        "    ordered = list(rows.values())",
    ),
    (
        _MODES,
        '"qkv": range(3), "projection": range(3, 4)',
        '"qkv": range(1, 4), "projection": range(1)',
    ),
    (_MODES, '"fc1": range(4), "fc2": range(4, 8)', '"fc1": range(4, 8), "fc2": range(4)'),
    (
        _MODES,
        "torch.stack([held[name][:, column] for name, column in ordered])",
        "torch.stack([held[name][:, 0] for name, _ in ordered])",
    ),
    (_MODES, 'Source.of(f"CP_C{end}")', 'Source.of("CP_C")'),
    (
        _MODES,
        '(("down", "ExpertA"), ("up", "ExpertB"))',
        '(("up", "ExpertA"), ("down", "ExpertB"))',
    ),
    (_MODES, 'f"{path}.CP_{name}{block}"', 'f"{path}.CP_{name}self"'),
    (_MODES, "for k in range(count))", "for k in reversed(range(count)))"),
    (_MODES, 'f"{front}.{name[0]}_CP"', 'f"{front}.k_CP"'),
    (_MODES, "if value.dim() != 2 or used != list(range(value.shape[1])):", "if value.dim() != 2:"),
    (
        _BOTTLENECKS,
        "return sorted(int(number) for number in found)",
        "return sorted((int(number) for number in found), reverse=True)",
    ),
    (
        _BOTTLENECKS,
        '"middleX": "middle_xy_add", "middleY": "middle_ia3_add"',
        '"middleX": "middle_ia3_add", "middleY": "middle_ia3_add"',
    ),
    (_BOTTLENECKS, 'for name in ("down", "up")\n', 'for name in ("up", "up")\n'),
    (_BOTTLENECKS, 'join = rows if name == "down" else stacked', "join = rows"),
    (_BOTTLENECKS, "values[end - count : end] for", "values[:count] for"),
    (
        _BOTTLENECKS,
        "    if any(not torch.equal(value, values[0]) for value in values[1:]):",
        "    if False:",
    ),
    (_BOTTLENECKS, '"self_attn_adapter" if own_name else', '"self_attn_adapter" if False else'),
    (_BOTTLENECKS, ' and ".layers." in place.path  # BART\'s', ""),
    (
        _ROUTING,
        "value.reshape(count, -1, value.shape[1])",
        "value.reshape(-1, count, value.shape[1]).transpose(0, 1)",
    ),
    (_ROUTING, "if shared else place.path", "if True else place.path"),
    (_ROUTING, "place.layer.path if shared else ", "place.layer.path if False else "),
    # What is let through.
    (_LOAD, "        if missing:\n", "        if False:\n"),
    (_LOAD, "    check_tensors(str(path), found, own)\n", ""),
    (_LOAD, "    _check_rest(path, {n: t", "    (path, {n: t"),
    (_LOAD, "    if kept or strange:\n", "    if strange:\n"),
    (_LOAD, "    if kept or strange:\n", "    if kept:\n"),
    (
        _LOAD,
        "    kept = [name for name in adapter if not re.match(layout.beside, name)]",
        "    kept = adapter",
    ),
    (_LOAD, "    if other:\n", "    if False:\n"),
    (
        _LOAD,
        "not torch.equal(value.to(parameter), parameter)",
        "not torch.equal(value, parameter.to(value))",
    ),
    (_LOAD, "    if absent:\n", "    if False:\n"),
    (_LOAD, "weights_only=True", "weights_only=False"),
    (_LOAD, "(pickle.UnpicklingError, RuntimeError, ", "(RuntimeError, "),
    (_LOAD, "    if wrong or not entries:\n", "    if wrong:\n"),
    (_LOAD, "    if wrong or not entries:\n", "    if not entries:\n"),
    (_LOAD, "            name = name.removeprefix(front)\n", "            pass\n"),
    (_LOAD, "        if name in state:\n", "        if False:\n"),
    (_LOAD, '    if config.variant != "release":\n', "    if False:\n"),
    (_LOAD, "    if config.method not in _LAYOUTS:\n", "    if False:\n"),
    (
        _LOAD,
        "        except RuntimeError as error:\n            shapes",
        "        except EOFError as error:\n            shapes",
    ),
    (_STORED, "        released.check_config(self.config)\n        own", "        own"),
    (
        _ATTACH,
        "    except BaseException:\n        made.detach()\n        raise\n\n\ndef _attach_saved",
        "    except BaseException:\n        raise\n\n\ndef _attach_saved",
    ),
    (
        _ASKED,
        "    if checkpoint is not None and isinstance(config, (str, os.PathLike)):",
        "    if False:",
    ),
]
