"""Faults in the methods and their modules: hand-over of the factors, wiring, dtypes, merging."""

TESTS = [
    "tests/hf/test_aurora.py",
    "tests/hf/test_aurora_layers.py",
    "tests/hf/test_attach.py",
    "tests/hf/test_checkpointing.py",
    "tests/hf/test_equivalence.py",
    "tests/hf/test_expert_routing.py",
    "tests/hf/test_experts.py",
    "tests/hf/test_insertion.py",
    "tests/hf/test_insertion_places.py",
    "tests/hf/test_lifecycle.py",
    "tests/hf/test_merged.py",
    "tests/hf/test_methods.py",
    "tests/hf/test_methods_engines.py",
    "tests/hf/test_methods_hooks.py",
    "tests/hf/test_methods_state.py",
    "tests/hf/test_postnorm.py",
    "tests/hf/test_report.py",
    "tests/hf/test_residual_wiring.py",
    "tests/hf/test_tokens.py",
    "tests/nn",
    "-m",
    "not slow",
    "-k",
    "not compile and not processes and not saved_bytes",
]

_ROUTINGS = "petal_kernels/hf/routing.py"
_PETAL = "petal_kernels/hf/methods/petal.py"
_AURORA = "petal_kernels/hf/methods/aurora.py"
_MODES = "petal_kernels/hf/methods/modes.py"
_SQUARE = "petal_kernels/hf/methods/square_blocks.py"
_INSERTION = "petal_kernels/hf/methods/insertion.py"
_EXPERTS = "petal_kernels/hf/methods/experts.py"
_ROUTING = "petal_kernels/hf/methods/routing.py"
_VLPET = "petal_kernels/hf/methods/vlpet.py"
_EMBEDDINGS = "petal_kernels/hf/methods/embeddings.py"
_ADAPTER = "petal_kernels/nn/gated_adapter.py"
_ROUTES = "petal_kernels/nn/vision_routes.py"
_VALUE = "petal_kernels/nn/value_adapter.py"
_LORA = "petal_kernels/nn/routed_lora.py"
_LINEAR = "petal_kernels/nn/frozen_linear.py"
_RESIDUAL = "petal_kernels/nn/residual.py"
_FACTORS = "petal_kernels/nn/mode_approximation.py"

MUTANTS = [
    (_ROUTINGS, "        return Routings, ()", "        return Routings, (dict(self),)"),
    (_ROUTINGS, "if trains and not routing.logits.requires_grad:", "if False:"),
    (_PETAL, "y[:, queries:]], dim=1", "y[:, queries:] * 0], dim=1"),
    (_PETAL, 'pairs["cross"].requires_grad_(live)', "pass"),
    (_PETAL, "            THREAD.frame = frame.outer", "            pass"),
    (_PETAL, "return served.to(output.dtype)", "return served"),
    (_PETAL, "queries = 0 if embeds is None else embeds.shape[1]", "queries = 0"),
    (_AURORA, "sorted(stack.places, key=together)", "stack.places"),
    (_AURORA, "range(count, count + blocks)", "range(blocks)"),
    (
        _AURORA,
        'config.layout == "aurora_release" and not row.attention',
        'config.layout == "aurora_release"',
    ),
    (
        _AURORA,
        "if isinstance(shared, Products) and shared.masked == masked:",
        "if isinstance(shared, Products):",
    ),
    (_AURORA, "if cache is not None and cache.get_seq_length() > 0:", "if False:"),
    (_AURORA, "if frame.a is None or frame.c is None:", "if frame.a is None:"),
    (_AURORA, "if says.features is None or not says.on:", "if says.features is None:"),
    (_MODES, "return self.hidden if self.version == version_of(x) else None", "return self.hidden"),
    (_MODES, "return self.hidden if x is again else None", "return None"),
    (_MODES, "same = x is self.x and self.version == version_of(x)", "same = True"),
    (_MODES, "same = x is self.x and self.version == version_of(x)", "same = x is self.x"),
    (_MODES, "return same and self.grad == torch.is_grad_enabled()", "return same"),
    (_MODES, "if not all(weight_is_plain(each.base) for each in self.members):", "if False:"),
    (_MODES, "ups[member.mode - first]", "ups[0]"),
    (
        _MODES,
        "frame is None or not frame.call.given.on:\n            return output\n        if",
        "frame is None:\n            return output\n        if",
    ),
    (_SQUARE, "else table.permute(1, 2, 0)", "else table.transpose(0, 1)"),
    (_SQUARE, "turned = core.transpose(0, 1) if core.dim() == 3 else core", "turned = core"),
    (
        _INSERTION,
        "            return self.finish(Pending(h, x, vision, None), adapter)",
        "            pass",
    ),
    (_INSERTION, "and x is not None and self._norm_can_adapt(h, x):", "and x is not None:"),
    (_INSERTION, "watched = norm._forward_hooks or", "watched ="),
    (_INSERTION, "            training=self.layer_module.training,\n", ""),
    (_INSERTION, 'if adapter.gate == "small" else None', "if False else None"),
    (_INSERTION, '        if adapter.variant == "release":', "        if False:"),
    (_INSERTION, 'self.config.variant == "release" and row.raw', "False"),
    (_INSERTION, 'if place.row.part != "all" and chunk:', "if False:"),
    (_EXPERTS, "(lora.up.to(dtype) @ downs).mean(0)", "(lora.up.to(dtype) @ downs).sum(0)"),
    (_EXPERTS, "isinstance(place.row, Linear) and place.row.encoded", "False"),
    (
        _EXPERTS,
        "        if running_call(self.layer.method, self.layer.stack) is call:",
        "        if True:",
    ),
    (_ROUTING, "        return reads == width", "        return True"),
    (_LINEAR, "y + (bias - own.to(bias)).to(y.dtype)", "y + bias.to(y.dtype)"),
    (_VLPET, "(x is shared.source or x is source)", "x is shared.source"),
    (
        _VLPET,
        "isinstance(shared, Middles) and (x is shared.source or x is source)",
        "isinstance(shared, Middles)",
    ),
    (_VLPET, "return shared.middles[self.number]", "return shared.middles[0]"),
    (_EMBEDDINGS, "            vectors = vectors.clone()", "            pass"),
    (
        _ROUTES,
        "vision.repeat_interleave(want // have, dim=0)",
        "vision.repeat(want // have, 1, 1)",
    ),
    (_ADAPTER, "bias.fill_(self._open_bias())", "bias.zero_()"),
    (_VALUE, "self.down[layer * self.r : (layer + 1) * self.r]", "self.down[: self.r]"),
    (_LORA, "before, after = n * self.r,", "before, after = 0,"),
    (_LORA, "rows[target] = self.scale", "rows[0] = self.scale"),
    (_LINEAR, "part.dtype == dtype and not part.requires_grad", "part.dtype == dtype"),
    (_LINEAR, "        self.base.training = mode", "        pass"),
    (_LINEAR, "if type(base) is not nn.Linear:", "if not isinstance(base, nn.Module):"),
    (_RESIDUAL, "(RESIDUAL_SCALE * self.shift)", "(self.shift)"),
    (_RESIDUAL, "a[:, 0].mean(dim=0)", "a[:, 1].mean(dim=0)"),
    (_FACTORS, "self.core.fill_(1.0)", "self.core.zero_()"),
    (_FACTORS, "scale=self.scale, dtype=dtype", "dtype=dtype"),
]
