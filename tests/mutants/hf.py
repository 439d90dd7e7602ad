"""Faults in the modules and the model layer: hand-over of the factors, dtypes, merge, files."""

TESTS = [
    "tests/hf",
    "tests/nn",
    "-k",
    "not compile and not full_size and not saved_bytes",
]

_LAYERS = "petal_kernels/hf/layers.py"
_ATTACH = "petal_kernels/hf/attach.py"
_MERGING = "petal_kernels/hf/merging.py"
_FILES = "petal_kernels/hf/files.py"
_LINEAR = "petal_kernels/nn/frozen_linear.py"
_RESIDUAL = "petal_kernels/nn/residual.py"
_MODES = "petal_kernels/nn/mode_approximation.py"

MUTANTS = [
    (_LAYERS, "                factors.reentrant.add(self.index)", "                pass"),
    (_LAYERS, "x is not self.source or self.version != _version(x)", "False"),
    (_LAYERS, "same = x is self.x and self.version == _version(x)", "same = True"),
    (_LAYERS, "same = x is self.x and self.version == _version(x)", "same = x is self.x"),
    (_LAYERS, "if not all(weight_is_plain(each.base) for each in self.members):", "if False:"),
    (_LAYERS, "            slot.call = previous", "            pass"),
    (_LAYERS, "hidden = hidden.detach().requires_grad_()", "pass"),
    (_LAYERS, "    state.factors = None\n\n\ndef", "    pass\n\n\ndef"),
    (_LAYERS, "ups[member.mode - first]", "ups[0]"),
    (
        _LAYERS,
        "        if not state.enabled:\n            return Fro",
        "        if 0:\n            return Fro",
    ),
    (_LAYERS, "y[:, queries:]], dim=1", "y[:, queries:] * 0], dim=1"),
    (_ATTACH, 'pairs["cross"].requires_grad_(live)', "pass"),
    (_ATTACH, "for parameter, flag in self._required:", "for parameter, flag in []:"),
    (_ATTACH, "            handle.remove()", "            pass"),
    (_MERGING, "exact = weight.to(wide) + update", "exact = weight.to(wide) - update"),
    (_MERGING, "for parameter in self.frozen:", "for parameter in []:"),
    (_FILES, 'if entry.get("sha256") != digest:', "if False:"),
    (_FILES, "if got[name].shape != tensor.shape:", "if False:"),
    (_LINEAR, "part.dtype == dtype and not part.requires_grad", "part.dtype == dtype"),
    (_LINEAR, "        self.base.training = mode", "        pass"),
    (_LINEAR, "if type(base) is not nn.Linear:", "if not isinstance(base, nn.Module):"),
    (_RESIDUAL, "(RESIDUAL_SCALE * self.shift)", "(self.shift)"),
    (_RESIDUAL, "a[:, 0].mean(dim=0)", "a[:, 1].mean(dim=0)"),
    (_MODES, "self.core.fill_(1.0)", "self.core.zero_()"),
    (_MODES, "scale=self.scale, dtype=dtype", "dtype=dtype"),
]
