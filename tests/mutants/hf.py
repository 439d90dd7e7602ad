"""Faults in the modules and the model layer: hand-over of the factors, dtypes, merge, files."""

TESTS = [
    "tests/hf",
    "tests/nn",
    "-k",
    "not compile and not full_size and not saved_bytes",
]

_LAYERS = "petal_kernels/hf/petal/layers.py"
_ATTACH = "petal_kernels/hf/attachment.py"
_PETAL = "petal_kernels/hf/petal/attachment.py"
_STACK = "petal_kernels/hf/stack.py"
_MERGING = "petal_kernels/hf/merging.py"
_INSERTION = "petal_kernels/hf/insertion/layers.py"
_SPECS = "petal_kernels/hf/insertion/specs.py"
_ADAPTER = "petal_kernels/nn/gated_adapter.py"
_VALUE = "petal_kernels/nn/value_adapter.py"
_LORA = "petal_kernels/nn/routed_lora.py"
_WALK = "petal_kernels/hf/walk.py"
_CONFIG = "petal_kernels/hf/config.py"
_AURORA = "petal_kernels/hf/aurora/attachment.py"
_BLOCKS = "petal_kernels/hf/aurora/blocks.py"
_PLACES = "petal_kernels/hf/aurora/specs.py"
_STACKS = "petal_kernels/hf/aurora/layers.py"
_LINEAR = "petal_kernels/nn/frozen_linear.py"
_RESIDUAL = "petal_kernels/nn/residual.py"
_MODES = "petal_kernels/nn/mode_approximation.py"
_ROUTINGS = "petal_kernels/hf/experts.py"
_EXPERTS = "petal_kernels/hf/insertion/experts.py"
_TOKENS = "petal_kernels/hf/tokens.py"
_DROPPED = "petal_kernels/hf/dropped_mask.py"
_EMBEDDINGS = "petal_kernels/hf/embeddings.py"
_PLACED = "petal_kernels/hf/insertion/attachment.py"
_INSTRUCTION = "petal_kernels/hf/petal/experts.py"

MUTANTS = [
    (_LAYERS, "                factors.reentrant.add(self.index)", "                pass"),
    (
        _LAYERS,
        "return self.hidden if self.version == version_of(x) else None",
        "return self.hidden",
    ),
    (_LAYERS, "return self.hidden if x is again else None", "return None"),
    (_INSERTION, "x is call.source or x is self.slot.source", "x is call.source"),
    (_LAYERS, "same = x is self.x and self.version == version_of(x)", "same = True"),
    (_LAYERS, "same = x is self.x and self.version == version_of(x)", "same = x is self.x"),
    (_LAYERS, "if not all(weight_is_plain(each.base) for each in self.members):", "if False:"),
    (_STACK, "            slot.call, slot.source = previous", "            pass"),
    (_STACK, "args = (args[0].detach().requires_grad_(), *args[1:])", "pass"),
    (_LAYERS, "    state.factors = None", "    pass"),
    (_LAYERS, "ups[member.mode - first]", "ups[0]"),
    (
        _LAYERS,
        "        if not state.enabled:\n            return Fro",
        "        if 0:\n            return Fro",
    ),
    (_LAYERS, "y[:, queries:]], dim=1", "y[:, queries:] * 0], dim=1"),
    (_PETAL, 'pairs["cross"].requires_grad_(live)', "pass"),
    (_ATTACH, "for parameter, flag in self._required:", "for parameter, flag in []:"),
    (_ATTACH, "            handle.remove()", "            pass"),
    (
        _MERGING,
        "exact = weight.to(update.dtype) + update",
        "exact = weight.to(update.dtype) - update",
    ),
    (_MERGING, "for parameter in self.frozen:", "for parameter in []:"),
    (_LINEAR, "part.dtype == dtype and not part.requires_grad", "part.dtype == dtype"),
    (_LINEAR, "        self.base.training = mode", "        pass"),
    (_LINEAR, "if type(base) is not nn.Linear:", "if not isinstance(base, nn.Module):"),
    (_RESIDUAL, "(RESIDUAL_SCALE * self.shift)", "(self.shift)"),
    (_RESIDUAL, "a[:, 0].mean(dim=0)", "a[:, 1].mean(dim=0)"),
    (_MODES, "self.core.fill_(1.0)", "self.core.zero_()"),
    (_MODES, "scale=self.scale, dtype=dtype", "dtype=dtype"),
    (_INSERTION, "factors.reentrant.add(self.index)", "pass"),
    (_INSERTION, "call.middles and (x is call.source or x is self.slot.source)", "call.middles"),
    (
        _INSERTION,
        "        if x is not None and self._norm_can_adapt(h, x):",
        "        if x is not None:",
    ),
    (_INSERTION, "            training=self.layer.training,\n", ""),
    (_INSERTION, 'if adapter.gate == "small" else None', "if False else None"),
    (_INSERTION, "return call.middles[self.number]", "return call.middles[0]"),
    (
        _INSERTION,
        "    state.factors = Context(state.vision, tokens",
        "    state.factors = Context(None, tokens",
    ),
    (_SPECS, 'config.variant == "release" and place.raw', "False"),
    (
        _ADAPTER,
        "vision.repeat_interleave(want // have, dim=0)",
        "vision.repeat(want // have, 1, 1)",
    ),
    (_ADAPTER, "bias.fill_(self._open_bias())", "bias.zero_()"),
    (_VALUE, "rows = slice(layer * self.r, (layer + 1) * self.r)", "rows = slice(0, self.r)"),
    (_LORA, "before, after = n * self.r,", "before, after = 0,"),
    (_LORA, "delta[target] =", "delta[n] ="),
    (_WALK, "re.fullmatch(wanted, site.path)", "re.search(wanted, site.path)"),
    (_WALK, 'endswith("." + name)', "endswith(name)"),
    (_CONFIG, '"aurora_release" if self.variant == "release" else "blocks"', '"blocks"'),
    (
        _AURORA,
        'config.layout == "aurora_release" and site.row.block in MLP_BLOCKS',
        'config.layout == "aurora_release"',
    ),
    (_PLACES, "site.modes = range(count, count + blocks)", "site.modes = range(blocks)"),
    (_BLOCKS, "else table.permute(1, 2, 0)", "else table.transpose(0, 1)"),
    (_BLOCKS, "turned = core.transpose(0, 1) if core.dim() == 3 else core", "turned = core"),
    (_STACKS, "VisionFactors) and factors.masked == masked", "VisionFactors)"),
    (_STACKS, "if cache is not None and cache.get_seq_length() > 0:", "if False:"),
    (_STACKS, "call.a is None or call.c is None", "call.a is None"),
    (_EMBEDDINGS, "        vectors = vectors.clone()", "        pass"),
    (_ROUTINGS, "        return Routings, ()", "        return Routings, (dict(self),)"),
    (_ROUTINGS, "if trains and not routing.logits.requires_grad:", "if False:"),
    (_EXPERTS, "(lora.up.to(dtype) @ downs).mean(0)", "(lora.up.to(dtype) @ downs).sum(0)"),
    (_EXPERTS, "isinstance(place, Target) and place.encoded", "False"),
    (_EXPERTS, "            self._state.domains = before", "            pass"),
    (
        _TOKENS,
        "repeat_interleave(rows // samples, dim=0)",
        "repeat(rows // samples, *[1] * (given.dim() - 1))",
    ),
    (_TOKENS, "0 < known <= self.past", "0 < known < self.past"),
    (_TOKENS, "self.encoded_mask if encoded else self.mask", "self.mask"),
    (_TOKENS, "mask[:, past : past + length]", "mask[:, mask.shape[1] - length :]"),
    (_TOKENS, "if mask.shape[1] < past + length:", "if False:"),
    (_TOKENS, "start: int | Tensor = past.to(mask.device).clamp(max=last)", "start = last"),
    (_TOKENS, "start = min(past, last)", "start = last"),
    (_TOKENS, "start = min(past, last)", "start = past"),
    (_TOKENS, "return _columns(mask, past, length, 0)", "return mask[:, -length:]"),
    (_TOKENS, "        if queries > 1:\n", "        if False:\n"),
    (_TOKENS, "        if seen.shape[1] > 1:\n", "        if False:\n"),
    (_TOKENS, "torch.where(real, index, -1)", "index.expand_as(real)"),
    (_TOKENS, "real[:, 1:] & (latest >= 0) & ~sees", "(latest >= 0) & ~sees"),
    (_TOKENS, "real[:, 1:] & (latest >= 0) & ~sees", "real[:, 1:] & ~sees"),
    (_TOKENS, "if mask is not None or not isinstance(positions", "if not isinstance(positions"),
    (_TOKENS, "ends.numel() - 1 > self.rows", "ends.numel() > self.rows"),
    (_TOKENS, "return past.clone()", "return past"),
    (_TOKENS, "if length == 1 or torch", "if True or torch"),
    (_TOKENS, "front + given.shape[1]", "given.shape[1]"),
    (_TOKENS, 'part == "all" and length != self.length', "False"),
    (_INSERTION, 'if adapter.variant == "release":', "if False:"),
    (_DROPPED, "            self.looks = 0\n", ""),
    (_DROPPED, "        self.looks -= 1\n", ""),
    (_DROPPED, "if bool(hidden.any()):", "if True:"),
    (
        _INSERTION,
        "if self.call is not None and self.call is self.state.factors:",
        "if self.call is not None:",
    ),
    (_INSERTION, "    if first:\n", "    if True:\n"),
    (_INSTRUCTION, "return served.to(output.dtype)", "return served"),
    (_INSTRUCTION, "queries = 0 if embeds is None else embeds.shape[1]", "queries = 0"),
    (_TOKENS, '    if part == "first":', '    if part == "none":'),
    (_TOKENS, "of_tokens[:, of_tokens.shape[1] - length :]", "of_tokens[:, :length]"),
    (_TOKENS, "if encoded and self.reads_image:", "if False:"),
    (_TOKENS, "behind_encoder=crosses and not first,", "behind_encoder=crosses,"),
    (_TOKENS, "return _part(mask, length, part)", 'return _part(mask, length, "last")'),
    (_SPECS, 'if place.part != "all" and chunk:', "if False:"),
    (
        _PLACED,
        'self._mark(stack, "_petal_first", number == 0)',
        'self._mark(stack, "_petal_first", True)',
    ),
    (_SPECS, "if point or linear_features(insertion.module)[0] == width:", "if True:"),
]
