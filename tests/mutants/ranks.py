"""Faults in what several processes say of one adapter, in saves while they are there, and in what
is refused of a model that they share."""

TESTS = [
    "tests/hf/test_ranks.py",
    "tests/hf/test_ranks_die.py",
    "tests/hf/test_tensor_parallel.py",
    "-m",
    "not slow",
]

_RANKS = "petal_kernels/hf/ranks.py"
_STORED = "petal_kernels/hf/stored.py"
_TENSORS = "petal_kernels/hf/tensors.py"
_PAIR = "petal_kernels/hf/pair.py"

MUTANTS = [
    (_RANKS, "for rank in range(1, len(told))", "for rank in range(1, 1)"),
    (_RANKS, "        if ours != theirs:\n", "        if False:\n"),
    (_RANKS, "    if changed:\n", "    if False:\n"),
    (_RANKS, "(not compared or (want.loaded and got.loaded))", "not compared"),
    (_RANKS, "(not compared or (want.loaded and got.loaded))", "want.loaded and got.loaded"),
    (_RANKS, "(not compared or (want.loaded and got.loaded))", "True"),
    (_RANKS, "    compared = len(whole) == len(want.values)\n", "    compared = True\n"),
    (_RANKS, "found.update(value.reshape(-1).view(torch.uint8).numpy().data)", "pass"),
    (_RANKS, "type(tensor.data) is Tensor and ", ""),
    (_RANKS, '    told["trained parameters"] = trained\n', ""),
    (_STORED, '                "implementation": self.implementation,\n', ""),
    (_STORED, '                "merged": self._merged is not None,\n', ""),
    (_STORED, '                "config": self.config.to_dict(),\n', ""),
    (_STORED, 'ranks.digest(state) if from_file else ""', '""'),
    (_STORED, 'if from_file else ""', "if from_file else self.installed.loaded"),
    ("petal_kernels/hf/trainer.py", 'attachment(given["model"]).check_ranks()', "pass"),
    (
        "petal_kernels/hf/installed.py",
        "if any(map(tensors.is_sharded, place.module._parameters.values())):",
        "if False:",
    ),
    # A save while another process dies.
    (_TENSORS, "        return there.full_tensor()\n", "        return there.to_local()\n"),
    (
        _PAIR,
        "        os.replace(tensors_file, waiting)\n        _sync_directory(folder)\n",
        "        os.replace(tensors_file, folder / TENSORS)\n        _sync_directory(folder)\n",
    ),
]
